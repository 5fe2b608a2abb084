// NF4 weights as the tensor core's first operand, made in registers from the codes as they are stored.
//
// Products are taken as yᵀ = W xᵀ: rows of the first operand are W's. A sum over k may take k in any order, if both
// operands take the same. So of 64 neighbours, lane (g, q) of a warp has the 16 from 16 q on: eight neighbouring bytes of
// codes, and 32 of x. In step t of four, the operands' pairs of k (2 q, 2 q + 1) and (2 q + 8, 2 q + 9) stand for
// 16 q + 4 t + (0, 1) and (2, 3). Nothing is repacked, and W never lies in shared memory.
//
// Of the 32 rows of W that a warp takes, rows g and g + 8 of the mma's tile i are 4 g + 2 i and 4 g + 2 i + 1: then a lane
// has four neighbours of a row of the result.
#pragma once
#include "scales.cuh"

constexpr int K_STEP = 64;        // values of k that are one step; also of one scale
constexpr int WARP_COLUMNS = 32;  // columns of the result of a warp
constexpr int LANE_ROWS = 4;      // of W

template <class Scale>
struct Weights {
  const uint8_t* codes;
  const Scale* scales;
  Nested nested;
  int rows, columns;  // of W, which is [rows, columns]
};

// The first operand for half of a step: a[i][t] are tile i's registers, t of two.
typedef uint32_t Operand[2][2][4];

// Codes of a lane's rows for a step, as they are stored.
struct Codes {
  uint2 of_row[LANE_ROWS];
};

// The scale of W's row at k; zero past the last row and column.
template <class Scale>
static __device__ __forceinline__ float scale_at(const Weights<Scale>& w, int row, int k) {
  const uint64_t place = (uint64_t)min(row, w.rows - 1) * w.columns + min(k, w.columns - 1);
  const float scale = scale_of(w.scales, w.nested, place / K_STEP);
  return row < w.rows && k < w.columns ? scale : 0.0f;
}

// Codes of rows first + 4 g + j from k + 16 q on; past the last row, those of any.
template <class Scale>
static __device__ __forceinline__ void fetch(const Weights<Scale>& w, int first, int k, int lane, Codes& codes) {
#pragma unroll
  for (int j = 0; j < LANE_ROWS; j++) {
    const int row = min(first + lane / 4 * LANE_ROWS + j, w.rows - 1);
    codes.of_row[j] = load8(w.codes + ((uint64_t)row * w.columns + k) / 2 + lane % 4 * 8);
  }
}

// What the 4 bits of a word from `shift` on mean. Their offset in the table is had without another multiplication.
static __device__ __forceinline__ float meaning_of(const float* meaning, uint32_t word, int shift) {
  const uint32_t offset = (shift < 2 ? word << (2 - shift) : word >> (shift - 2)) & 60;
  return *(const float*)((const char*)meaning + offset);
}

// Half of a step's codes to pairs of bf16: the value is rounded once, after the product with its row's scale.
static __device__ __forceinline__ void decode(const Codes& codes, const float (&scales)[LANE_ROWS], int half,
                                              const float* meaning, Operand& a) {
#pragma unroll
  for (int j = 0; j < LANE_ROWS; j++) {
    const uint32_t word = half ? codes.of_row[j].y : codes.of_row[j].x;
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
      for (int pair = 0; pair < 2; pair++) {
        const int shift = t * 16 + pair * 8;
        const float first = meaning_of(meaning, word, shift + 4), second = meaning_of(meaning, word, shift);
        a[j / 2][t][j % 2 + 2 * pair] = pack_bf16(first * scales[j], second * scales[j]);
      }
  }
}

// Four neighbours in shared memory.
static __device__ __forceinline__ void load_four(const float* from, float (&out)[4]) {
  const uint4 v = load16(from);
  out[0] = __uint_as_float(v.x);
  out[1] = __uint_as_float(v.y);
  out[2] = __uint_as_float(v.z);
  out[3] = __uint_as_float(v.w);
}
