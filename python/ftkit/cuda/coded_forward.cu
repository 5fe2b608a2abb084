// y = x Wᵀ + low Bᵀ for many rows of x, W in 4-bit codes: prompts and training.
//
// low = s x Aᵀ [m, rank], rank a multiple of 16, comes from before: at ranks above 16 to make it here would cost more. x,
// low, B and y are bf16, sums float32. k is a multiple of 64 and of GROUP (of 256, or the last span is made for less), n of
// 4. See codes.cuh for GROUP, SCALE and OFFSETS.
//
// ptxas -O1: above it, registers are filled with what is loaded ahead, and others spilled.
#include "fragments.cuh"
#include "tile.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS) coded_forward(
    const bf16* __restrict__ x, const uint8_t* __restrict__ codes, const float* __restrict__ table,
    const SCALE* __restrict__ scales, const float* __restrict__ map, const float* __restrict__ greatest,
    const float* __restrict__ mean, const half* __restrict__ offsets, const bf16* __restrict__ low,
    const bf16* __restrict__ b, bf16* __restrict__ y, int m, int n, int k, int rank) {
  __shared__ Stage stages[2];
  __align__(16) __shared__ float meaning[16];
  const int t = threadIdx.x, lane = t % 32;
  const int first = blockIdx.x * TILE_ROWS, column = blockIdx.y * TILE_COLUMNS + t / 32 * WARP_COLUMNS;
  const Weights w = weights_of(Stored{codes, scales, Nested{map, greatest, mean}, offsets}, n, k, column, lane);
  const Rows rows = rows_of(x, first, m, k);
  if (t < 16) meaning[t] = table[t];
  Sums sums = {};
  Codes stored;
  Numbers numbers;
  copy_rows<RUN_OF_CODES>(stages[0], rows, 0);
  fetch(w, 0, 0, lane, stored);
  fetch_numbers(w, 0, lane, numbers);
  __syncthreads();
  for (int span = 0; span < k; span += SPAN) {
    Values values[LANE_ROWS];
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      if (multiply_out(meaning, numbers, part, values)) fetch_numbers(w, span + SPAN, lane, numbers);
      const Stage& stage = stages[part % 2];
      const int next = part + 1 < PARTS ? span + RUN * (part + 1) : span + SPAN;
      copy_wait<0>();
      __syncthreads();  // this stage is there for all, and all are done with the other
      if (next < k) copy_rows<RUN_OF_CODES>(stages[1 - part % 2], rows, next);
      Operand operand;
#pragma unroll
      for (int tile = 0; tile < 2; tile++) decode(stored, part % 2 * 2, values, tile, operand[tile]);
      multiply(sums, stage, operand, 0, lane);
#pragma unroll
      for (int tile = 0; tile < 2; tile++) decode(stored, part % 2 * 2 + 1, values, tile, operand[tile]);
      if (part == 1) fetch(w, span, 1, lane, stored);
      if (part == 3) fetch(w, span + SPAN, 0, lane, stored);
      multiply(sums, stage, operand, 1, lane);
    }
  }
  for (int r = 0; r < rank; r += 16) {
    uint32_t operand[2][4];
#pragma unroll
    for (int j = 0; j < LANE_ROWS; j++) {
      const int row = column + lane / 4 * LANE_ROWS + j;
      const uint2 pairs = row < n ? load8(b + (int64_t)row * rank + r + lane % 4 * 4) : uint2{0, 0};
      operand[j / 2][j % 2] = pairs.x;
      operand[j / 2][j % 2 + 2] = pairs.y;
    }
    multiply_low(sums, low, first, m, rank, r, operand, lane);
  }
  store_rows(sums, y, first, m, n, column, lane);
}
