// y = x Wᵀ + low Bᵀ for many rows of x, W in NF4: prompts and training.
//
// low = s x Aᵀ [m, rank], rank a multiple of 16, comes from before: at ranks above 16 to make it here would cost more. x,
// low, B and y are bf16, sums float32. k is a multiple of 64, n of 4. SCALE: float, or uint8_t for nested scales.
#include "nf4.cuh"
#include "tile.cuh"

constexpr int THREADS = 128;

extern "C" __global__ void __launch_bounds__(THREADS) nf4_lora_forward(
    const bf16* __restrict__ x, const uint8_t* __restrict__ codes, const float* __restrict__ table,
    const SCALE* __restrict__ scales, const float* __restrict__ map, const float* __restrict__ greatest,
    const float* __restrict__ mean, const bf16* __restrict__ low, const bf16* __restrict__ b, bf16* __restrict__ y, int m,
    int n, int k, int rank) {
  __shared__ Stage stages[2];
  __align__(16) __shared__ float scales_of[2][TILE_COLUMNS];
  __shared__ float meaning[16];
  const int t = threadIdx.x, lane = t % 32, warp_column = t / 32 * WARP_COLUMNS;
  const int first = blockIdx.x * TILE_ROWS, tile = blockIdx.y * TILE_COLUMNS, column = tile + warp_column;
  const Weights<SCALE> w{codes, scales, Nested{map, greatest, mean}, n, k};
  if (t < 16) meaning[t] = table[t];
  Sums sums = {};
  Codes stored;
  copy_rows(stages[0], x, first, m, k, 0);
  fetch(w, column, 0, lane, stored);
  scales_of[0][t] = scale_at(w, tile + t, 0);
  for (int at = 0; at < k; at += K_STEP) {
    const int stage = at / K_STEP % 2, next = at + K_STEP;
    copy_wait<0>();
    __syncthreads();  // this stage is there for all, and all are done with the other
    if (next < k) copy_rows(stages[1 - stage], x, first, m, k, next);
    const float next_scale = scale_at(w, tile + t, next);
    float scale[LANE_ROWS];
    load_four(&scales_of[stage][warp_column + lane / 4 * LANE_ROWS], scale);
    Operand operand;
    decode(stored, scale, 0, meaning, operand);
    multiply(sums, stages[stage], operand, 0, lane);
    decode(stored, scale, 1, meaning, operand);
    if (next < k) fetch(w, column, next, lane, stored);
    multiply(sums, stages[stage], operand, 1, lane);
    scales_of[1 - stage][t] = next_scale;
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
