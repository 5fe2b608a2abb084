// y = x Wᵀ for many rows of x, W in 4-bit codes with offsets: prompts and training with int4_group and QALoRA.
//
// x and y are bf16, sums float32. k is a multiple of 64 and of GROUP, n of 4. See int4.cuh for W and GROUP.
#include "staged.cuh"

constexpr int THREADS = 128;

extern "C" __global__ void __launch_bounds__(THREADS)
    int4_forward(const bf16* __restrict__ x, const uint8_t* __restrict__ codes, const float* __restrict__ table,
                 const half* __restrict__ scales, const half* __restrict__ offsets, bf16* __restrict__ y, int m, int n, int k) {
  __shared__ Stage stages[2];
  __shared__ float meaning[16];
  const int t = threadIdx.x, lane = t % 32;
  const int first = blockIdx.x * TILE_ROWS, column = blockIdx.y * TILE_COLUMNS + t / 32 * WARP_COLUMNS;
  const Weights w{codes, scales, offsets, n, k};
  if (t < 16) meaning[t] = table[t];
  Sums sums = {};
  Codes stored;
  copy_rows(stages[0], x, first, m, k, 0);
  fetch(w, column, 0, lane, stored);
  for (int at = 0; at < k; at += STEP) {
    const int stage = at / STEP % 2, next = at + STEP;
    copy_wait<0>();
    __syncthreads();  // this stage is there for all, and all are done with the other
    if (next < k) copy_rows(stages[1 - stage], x, first, m, k, next);
    Operand operand;
    decode(stored, 0, meaning, operand);
    multiply(sums, stages[stage], operand, 0, lane);
    decode(stored, 1, meaning, operand);
    if (next < k) fetch(w, column, next, lane, stored);
    multiply(sums, stages[stage], operand, 1, lane);
  }
  store_rows(sums, y, first, m, n, column, lane);
}
