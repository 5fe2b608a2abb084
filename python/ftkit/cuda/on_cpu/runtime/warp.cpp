// What the lanes of a warp do together: shuffles, ballots, and the tensor core's matrices.
//
// Fragments of mma and ldmatrix lie as the PTX manual says; with g = lane / 4 and q = lane % 4, of m16n8k16:
//   A register i, half h: row g + 8 (i & 1), column 2 q + h + 8 (i / 2)     B: row 2 q + h + 8 i, column g
//   C and D register i: row g + 8 (i / 2), column 2 q + (i & 1)
// Sums are float32 in the order of k; silicon rounds otherwise, so results are compared with a tolerance.
#include "runtime.h"

#include <string.h>

namespace on_cpu {

static float wide(uint16_t value, bool is_bf16) {
  if (!is_bf16) return (float)bits<_Float16>(value);
  return bits<float>((uint32_t)value << 16);
}

template <class T>
static T* of(Thread& lane) {
  return (T*)lane.arguments;
}

static void shuffle(Thread* lanes, uint32_t mask) {
  for (int lane = 0; lane < WARP; lane++) {
    if (!(mask >> lane & 1)) continue;
    OnCpuShuffle& mine = *of<OnCpuShuffle>(lanes[lane]);
    if (mask >> mine.source & 1) {
      mine.result = of<OnCpuShuffle>(lanes[mine.source])->value;
    } else {
      report("shuffle from outside the mask", lanes[lane].pc, 0, "lane %u", mine.source);
      mine.result = ~0u;
    }
  }
}

static void ballot(Thread* lanes, uint32_t mask) {
  uint32_t result = 0;
  for (int lane = 0; lane < WARP; lane++)
    if (mask >> lane & 1) result |= of<OnCpuBallot>(lanes[lane])->predicate << lane;
  for (int lane = 0; lane < WARP; lane++)
    if (mask >> lane & 1) of<OnCpuBallot>(lanes[lane])->result = result;
}

static void put_half(uint32_t& word, int half, uint16_t value) {
  word = half ? (word & 0xffff) | (uint32_t)value << 16 : (word & 0xffff0000) | value;
}

static void ldmatrix(Thread* lanes) {
  Thread* caller = current;
  int preemption_before = preemption;
  preemption = 0;
  const OnCpuLdmatrix& first = *of<OnCpuLdmatrix>(lanes[0]);
  for (int matrix = 0; matrix < first.matrices && !aborting; matrix++) {
    counters.ldmatrix++;
    uint64_t addresses[8];
    for (int row = 0; row < 8 && !aborting; row++) {
      current = &lanes[matrix * 8 + row];
      const uint16_t* values = (const uint16_t*)of<OnCpuLdmatrix>(*current)->row;
      addresses[row] = (uint64_t)values;
      access(values, 16, false, current->pc, ROW_OF_LDMATRIX);
      for (int column = 0; column < 8; column++) {
        int r = first.transposed ? column : row, c = first.transposed ? row : column;
        put_half(of<OnCpuLdmatrix>(lanes[r * 4 + c / 2])->result[matrix], c & 1, values[column]);
      }
    }
    if (counting_traffic) note_ldmatrix(lanes[0].pc, addresses);
  }
  current = caller;
  preemption = preemption_before;
}

static void movmatrix(Thread* lanes) {
  for (int row = 0; row < 8; row++)
    for (int column = 0; column < 8; column++) {
      uint32_t word = of<OnCpuMovmatrix>(lanes[row * 4 + column / 2])->value;
      put_half(of<OnCpuMovmatrix>(lanes[column * 4 + row / 2])->result, row & 1, (uint16_t)(word >> 16 * (column & 1)));
    }
}

static void mma_16(Thread* lanes, bool is_bf16) {
  float a[16][16], b[16][8], sums[16][8] = {};
  for (int lane = 0; lane < WARP; lane++) {
    const OnCpuMma& mine = *of<OnCpuMma>(lanes[lane]);
    int g = lane / 4, q = lane % 4;
    for (int h = 0; h < 2; h++) {
      for (int i = 0; i < 4; i++)
        a[g + 8 * (i & 1)][2 * q + h + 8 * (i / 2)] = wide((uint16_t)(mine.a[i] >> 16 * h), is_bf16);
      for (int i = 0; i < 2; i++) b[2 * q + h + 8 * i][g] = wide((uint16_t)(mine.b[i] >> 16 * h), is_bf16);
    }
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 16; k++)
      for (int column = 0; column < 8; column++) sums[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < WARP; lane++)
    for (int i = 0; i < 4; i++)
      ((float*)of<OnCpuMma>(lanes[lane])->d)[i] += sums[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + (i & 1)];
}

// m16n8k32: four bytes a register, and columns of A (rows of B) 4 q + h + 16 …
static void mma_8(Thread* lanes) {
  int a[16][32], b[32][8];
  for (int lane = 0; lane < WARP; lane++) {
    const OnCpuMma& mine = *of<OnCpuMma>(lanes[lane]);
    int g = lane / 4, q = lane % 4;
    for (int h = 0; h < 4; h++) {
      for (int i = 0; i < 4; i++) a[g + 8 * (i & 1)][4 * q + h + 16 * (i / 2)] = (int8_t)(mine.a[i] >> 8 * h);
      for (int i = 0; i < 2; i++) b[4 * q + h + 16 * i][g] = (int8_t)(mine.b[i] >> 8 * h);
    }
  }
  for (int lane = 0; lane < WARP; lane++)
    for (int i = 0; i < 4; i++)
      for (int k = 0; k < 32; k++)
        ((int*)of<OnCpuMma>(lanes[lane])->d)[i] += a[lane / 4 + 8 * (i / 2)][k] * b[k][2 * (lane % 4) + (i & 1)];
}

void execute(int operation, Thread* lanes, uint32_t mask) {
  switch (operation) {
    case ON_CPU_SHUFFLE: return shuffle(lanes, mask);
    case ON_CPU_BALLOT: return ballot(lanes, mask);
    case ON_CPU_LDMATRIX: return ldmatrix(lanes);
    case ON_CPU_MOVMATRIX: return movmatrix(lanes);
    case ON_CPU_MMA_BF16:
    case ON_CPU_MMA_F16: counters.mma++; return mma_16(lanes, operation == ON_CPU_MMA_BF16);
    case ON_CPU_MMA_S8: counters.mma++; return mma_8(lanes);
  }
}

}  // namespace on_cpu
