// y = x Wᵀ + low Bᵀ for many rows of x, W in NF4: prompts and training.
//
// low = s x Aᵀ [m, rank], rank a multiple of 16, comes from before: at ranks above 16 to make it here would cost more. x,
// low, B and y are bf16, sums float32. k is a multiple of 64, n of 8. SCALE: float, or uint8_t for nested scales.
#include "nf4.cuh"
#include "tile.cuh"

constexpr int THREADS = 128;

extern "C" __global__ void __launch_bounds__(THREADS) nf4_lora_forward(
    const bf16* __restrict__ x, const uint8_t* __restrict__ codes, const float* __restrict__ table,
    const SCALE* __restrict__ scales, const float* __restrict__ map, const float* __restrict__ greatest,
    const float* __restrict__ mean, const bf16* __restrict__ low, const bf16* __restrict__ b, bf16* __restrict__ y, int m,
    int n, int k, int rank) {
  __shared__ Stage stages[2];
  __shared__ float meaning[16];
  const int lane = threadIdx.x % 32;
  const int first = blockIdx.x * TILE_ROWS, column = blockIdx.y * TILE_COLUMNS + threadIdx.x / 32 * WARP_COLUMNS;
  const Weights<SCALE> w{codes, scales, Nested{map, greatest, mean}, n, k};
  if (threadIdx.x < 16) meaning[threadIdx.x] = table[threadIdx.x];
  Sums sums = {};
  Raw raw;
  copy_rows(stages[0], x, first, m, k, 0);
  fetch(w, column, 0, lane, raw);
  for (int at = 0; at < k; at += K_STEP) {
    const int stage = at / K_STEP % 2;
    copy_wait<0>();
    __syncthreads();  // this stage is there for all, and all are done with the other
    if (at + K_STEP < k) copy_rows(stages[1 - stage], x, first, m, k, at + K_STEP);
    Operand operand;
    decode(raw, meaning, operand);
    if (at + K_STEP < k) fetch(w, column, at + K_STEP, lane, raw);
    multiply(sums, stages[stage], operand, lane);
  }
  for (int r = 0; r < rank; r += 16) {
    uint32_t operand[TILES][2];
#pragma unroll
    for (int j = 0; j < TILES; j++) {
      const int row = column + lane / 4 * 4 + j;
      const uint2 pair = row < n ? load8(b + (int64_t)row * rank + r + lane % 4 * 4) : uint2{0, 0};
      operand[j][0] = pair.x;
      operand[j][1] = pair.y;
    }
    multiply_low(sums, low, first, m, rank, r, operand, lane);
  }
  store_rows(sums, y, first, m, n, column, lane);
}
