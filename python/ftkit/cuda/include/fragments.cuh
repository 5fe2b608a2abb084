// Weights as the tensor core's first operand, made in registers from the codes as they are stored.
//
// Products are taken as yᵀ = W xᵀ: rows of the first operand are W's. A sum over k may take k in any order, if both
// operands take the same. So of a span of 256 neighbours, lane (g, q) of a warp has the q-th 64, 32 neighbouring bytes of
// codes, in four parts of 16. In step t of a part's four, the operands' pairs of k (2 q, 2 q + 1) and (2 q + 8, 2 q + 9)
// stand for 4 t + (0, 1) and (2, 3) of them. Nothing is repacked, and W never lies in shared memory.
//
// Of the 32 rows of W that a warp takes, rows g and g + 8 of the mma's tile i are 4 g + 2 i and 4 g + 2 i + 1: then a lane
// has four neighbours of a row of the result.
#pragma once
#include "codes.cuh"

constexpr int SPAN = 4 * RUN_OF_CODES;  // values of k that a warp's four lanes of a row have
constexpr int PARTS = 4;                // of a span
constexpr int WARP_COLUMNS = 32;        // columns of the result of a warp
constexpr int LANE_ROWS = 4;            // of W

// W as a lane sees it: four rows, of which all are there or none (then those of any: such results are nobody's).
struct Weights {
  Stored stored;
  uint32_t first;  // run of W that the lane's first row begins with
  int runs;        // of a row
};

static __device__ __forceinline__ Weights weights_of(const Stored& stored, int rows, int columns, int first, int lane) {
  const int row = first + lane / 4 * LANE_ROWS, runs = columns / RUN_OF_CODES;
  return {stored, (uint32_t)min(row, rows - LANE_ROWS) * runs, runs};
}

// The first operand for half of a part: a[i][t] are tile i's registers, t of two.
typedef uint32_t Operand[2][2][4];

// Codes of a lane's rows for two parts, as they are stored.
struct Codes {
  uint32_t of_row[LANE_ROWS][4];
};
typedef Number Numbers[SETS][LANE_ROWS];

// The run of the span at k that is the lane's; past the last, that one again: its numbers are zero there.
static __device__ __forceinline__ uint32_t run_of(const Weights& w, int k, int lane) {
  return w.first + min(k / RUN_OF_CODES + lane % 4, w.runs - 1);
}

// The lane's numbers for a span; zeros past the last run, so that W is zero.
static __device__ __forceinline__ void fetch_numbers(const Weights& w, int k, int lane, Numbers& numbers) {
  const uint32_t run = run_of(w, k, lane);
  const bool there = k / RUN_OF_CODES + lane % 4 < w.runs;
#pragma unroll
  for (int set = 0; set < SETS; set++)
#pragma unroll
    for (int j = 0; j < LANE_ROWS; j++) {
      const Number number = number_of(w.stored, run + j * w.runs, set);
      numbers[set][j] = {there ? number.scale : 0.0f, there ? number.offset : 0.0f};
    }
}

// The lane's codes for two parts of a span, the first two or the others.
static __device__ __forceinline__ void fetch(const Weights& w, int k, int others, int lane, Codes& codes) {
  const uint32_t run = run_of(w, k, lane);
#pragma unroll
  for (int j = 0; j < LANE_ROWS; j++) {
    const uint4 words = load16(w.stored.codes + (uint64_t)(run + j * w.runs) * (RUN_OF_CODES / 2) + others * 16);
    codes.of_row[j][0] = words.x;
    codes.of_row[j][1] = words.y;
    codes.of_row[j][2] = words.z;
    codes.of_row[j][3] = words.w;
  }
}

// What codes mean under the lane's numbers, before a part that begins with others. True when the next span's may come.
static __device__ __forceinline__ bool multiply_out(const float* meaning, const Numbers& numbers, int part,
                                                    Values (&values)[LANE_ROWS]) {
  if (part % (PARTS / SETS)) return false;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float four[4];
    load_four(meaning + 4 * i, four);
#pragma unroll
    for (int j = 0; j < LANE_ROWS; j++) multiply_out(four, numbers[part / (PARTS / SETS)][j], i, values[j]);
  }
  return part / (PARTS / SETS) == SETS - 1;
}

// Word `word` of the codes of a tile's two rows to its registers for half of a part.
static __device__ __forceinline__ void decode(const Codes& codes, int word, const Values (&values)[LANE_ROWS], int tile,
                                              uint32_t (&a)[2][4]) {
#pragma unroll
  for (int row = 0; row < 2; row++) {
    uint32_t pairs[4];
    look_up(codes.of_row[2 * tile + row][word], values[2 * tile + row], pairs);
#pragma unroll
    for (int pair = 0; pair < 4; pair++) a[pair / 2][row + 2 * (pair % 2)] = pairs[pair];
  }
}
