// 4-bit weights with a half-precision scale and offset a group, as the tensor core's first operand.
//
// w = table[code] · scale + offset, each operation rounded, then rounded to bf16. The order of k and which rows of W a lane
// has are those of NF4's kernels: of 64 neighbours, lane (g, q) of a warp has the 16 from 16 q on, and of the warp's 32
// rows of W the four from 4 g on; row 4 g + 2 i is row g of the mma's tile i, the next one row g + 8.
// GROUP: values of a scale: 32, 64 or 128.
#pragma once
#include "numbers.cuh"

constexpr int STEP = 64;          // values of k that are one step
constexpr int WARP_COLUMNS = 32;  // columns of the result of a warp
constexpr int LANE_ROWS = 4;      // of W

struct Weights {
  const uint8_t* codes;
  const half *scales, *offsets;
  int rows, columns;  // of W, which is [rows, columns]
};

// The first operand for half of a step: a[i][t] are tile i's registers, t of two.
typedef uint32_t Operand[2][2][4];

// A group's scale and offset side by side in one register.
static __device__ __forceinline__ uint32_t numbers_of(const Weights& w, uint32_t group) {
  return w.scales[group].bits | (uint32_t)w.offsets[group].bits << 16;
}
static __device__ __forceinline__ float scale_of(uint32_t numbers) { return half_value((uint16_t)numbers); }
static __device__ __forceinline__ float offset_of(uint32_t numbers) { return half_value((uint16_t)(numbers >> 16)); }

// What a lane has of a step, as it is stored.
struct Codes {
  uint2 of_row[LANE_ROWS];
  uint32_t numbers[LANE_ROWS];
};

// Rows first + 4 g + j from k + 16 q on; past the last row, those of the last four.
static __device__ __forceinline__ void fetch(const Weights& w, int first, int k, int lane, Codes& codes) {
  const int row = min(first + lane / 4 * LANE_ROWS, w.rows - LANE_ROWS), at = k + lane % 4 * 16;
  const uint8_t* from = w.codes + ((int64_t)row * w.columns + at) / 2;
  uint32_t group = (uint32_t)row * (uint32_t)(w.columns / GROUP) + at / GROUP;
#pragma unroll
  for (int j = 0; j < LANE_ROWS; j++) {
    codes.of_row[j] = load8(from);
    codes.numbers[j] = numbers_of(w, group);
    from += w.columns / 2;
    group += w.columns / GROUP;
  }
}

// What the 4 bits of a word from `shift` on mean. Their offset in the table is had without another multiplication.
static __device__ __forceinline__ float meaning_of(const float* meaning, uint32_t word, int shift) {
  const uint32_t offset = (shift < 2 ? word << (2 - shift) : word >> (shift - 2)) & 60;
  return *(const float*)((const char*)meaning + offset);
}
static __device__ __forceinline__ float moved(float number, float scale, float offset) {
  return __fadd_rn(__fmul_rn(number, scale), offset);
}

// Half of a step's codes to pairs of bf16.
static __device__ __forceinline__ void decode(const Codes& codes, int half, const float* meaning, Operand& a) {
#pragma unroll
  for (int j = 0; j < LANE_ROWS; j++) {
    const uint32_t word = half ? codes.of_row[j].y : codes.of_row[j].x;
    const float scale = scale_of(codes.numbers[j]), offset = offset_of(codes.numbers[j]);
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
      for (int pair = 0; pair < 2; pair++) {
        const int shift = t * 16 + pair * 8;  // the first of a pair is in the high half of its byte
        const float first = meaning_of(meaning, word, shift + 4), second = meaning_of(meaning, word, shift);
        a[j / 2][t][j % 2 + 2 * pair] = pack_bf16(moved(first, scale, offset), moved(second, scale, offset));
      }
  }
}
