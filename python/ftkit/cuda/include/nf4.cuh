// NF4 weights as the tensor core's second operand, made in registers from the codes as they are stored.
//
// A sum over k may take k in any order, if both operands take the same. So of 64 neighbours, lane (g, q) of a warp has
// the 16 from 16 q on: eight neighbouring bytes of codes, and 32 of x. In step t of four, the operands' pairs of k
// (2 q, 2 q + 1) and (2 q + 8, 2 q + 9) stand for 16 q + 4 t + (0, 1) and (2, 3). Nothing is repacked, and W never lies in
// shared memory.
//
// Of the 32 columns that a warp makes, column c of the mma's tile j is 4 c + j: then lane (g, q) has 8 neighbours of
// the result, and stores them in one access.
#pragma once
#include "scales.cuh"

constexpr int K_STEP = 64;          // values of k that are one step; also of one scale
constexpr int WARP_COLUMNS = 32;    // columns of the result of a warp
constexpr int TILES = 4;            // of 8 columns

template <class Scale>
struct Weights {
  const uint8_t* codes;
  const Scale* scales;
  Nested nested;
  int rows, columns;  // of W, which is [rows, columns]
};

// b[j][t][i]: register i of tile j's operand in step t.
typedef uint32_t Operand[TILES][4][2];

// What a lane needs of W for a step, as it is stored.
struct Raw {
  uint2 codes[TILES];
  float scales[TILES];
};

// Rows 4 g + j from `first` on, values from `k` on; rows past the last are zeros.
template <class Scale>
static __device__ __forceinline__ void fetch(const Weights<Scale>& w, int first, int k, int lane, Raw& raw) {
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    const int row = first + lane / 4 * 4 + j;
    const bool there = row < w.rows;
    const int64_t place = (int64_t)(there ? row : 0) * w.columns + k;
    raw.codes[j] = load8(w.codes + place / 2 + lane % 4 * 8);
    raw.scales[j] = there ? scale_of(w.scales, w.nested, place / K_STEP) : 0.0f;
  }
}

// Codes to pairs of bf16: the value is rounded once, after the product with its scale.
static __device__ __forceinline__ void decode(const Raw& raw, const float* meaning, Operand& b) {
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    const uint32_t words[2] = {raw.codes[j].x, raw.codes[j].y};
#pragma unroll
    for (int t = 0; t < 4; t++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t byte = words[t / 2] >> (t % 2 * 16 + i * 8);
        b[j][t][i] = pack_bf16(meaning[byte >> 4 & 15] * raw.scales[j], meaning[byte & 15] * raw.scales[j]);
      }
  }
}
