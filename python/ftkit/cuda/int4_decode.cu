// y = x Wᵀ for at most 16 rows of x, W in 4-bit codes with offsets: decoding for several sequences at once.
//
// The block's 8 warps share out k and make the same 32 columns; their sums are added in the order of the warps. So a
// number depends on its row and on k alone. x is read straight from memory into the second operand's registers. x and y
// are bf16; k is a multiple of 64 and of GROUP. See int4.cuh for W and GROUP.
#include "int4.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = 8, ROWS = 16;

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    int4_decode(const bf16* __restrict__ x, const uint8_t* __restrict__ codes, const float* __restrict__ table,
                const half* __restrict__ scales, const half* __restrict__ offsets, bf16* __restrict__ y, int m, int n, int k) {
  __shared__ float meaning[16];
  __shared__ float parts[WARPS][ROWS][WARP_COLUMNS + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * WARP_COLUMNS;
  const Weights w{codes, scales, offsets, n, k};
  if (threadIdx.x < 16) meaning[threadIdx.x] = table[threadIdx.x];
  __syncthreads();
  float sums[2][2][4] = {};  // [tile of 8 rows of x][tile of 16 columns][register]
  Codes stored, next;
  if (warp * STEP < k) fetch(w, column, warp * STEP, lane, stored);
  for (int at = warp * STEP; at < k; at += WARPS * STEP) {
    fetch(w, column, min(at + WARPS * STEP, k - STEP), lane, next);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Operand a;
      decode(stored, half, meaning, a);
#pragma unroll
      for (int u = 0; u < 2; u++) {
        if (u && m <= 8) continue;  // the second tile of rows is empty
        const int row = u * 8 + lane / 4;
        const bf16* from = x + (int64_t)row * k + at + lane % 4 * 16 + half * 8;
        const uint4 b = row < m ? load16(from) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          mma_bf16(sums[u][i], a[i][0], b.x, b.y);
          mma_bf16(sums[u][i], a[i][1], b.z, b.w);
        }
      }
    }
    stored = next;
  }
#pragma unroll
  for (int u = 0; u < 2; u++)
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int c = 0; c < 4; c++)
        parts[warp][u * 8 + lane % 4 * 2 + c % 2][lane / 4 * 4 + i * 2 + c / 2] = sums[u][i][c];
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * WARP_COLUMNS; i += THREADS) {
    const int row = i / WARP_COLUMNS, place = i % WARP_COLUMNS;
    if (row >= m || column + place >= n) continue;
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < WARPS; part++) sum += parts[part][row][place];
    y[(int64_t)row * n + column + place] = narrow<bf16>(sum);
  }
}
