// y = x Wᵀ + low Bᵀ for at most 16 rows of x, W in NF4: decoding for several sequences at once.
//
// The block's 8 warps share out k and make the same 32 columns; their sums are added in the order of the warps. So a
// number depends on its row and on k alone. x is read straight from memory into the second operand's registers, 32
// neighbouring bytes a lane (see nf4.cuh). low = s x Aᵀ float [m, rank]; x, B and y are bf16; k is a multiple of 64, n of 4.
// SCALE: float, or uint8_t for nested scales.
#include "nf4.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = 8, ROWS = 16;

// Values k + 16 q … of row 8 u + g of x, which is zeros past the last row.
static __device__ __forceinline__ void fetch_rows(const bf16* x, int m, int columns, int k, int lane, uint4 (&b)[2][2]) {
#pragma unroll
  for (int u = 0; u < 2; u++) {
    const int row = u * 8 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++)
      b[u][half] = row < m ? load16(x + (int64_t)row * columns + k + lane % 4 * 16 + half * 8) : make_uint4(0, 0, 0, 0);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) nf4_decode(
    const bf16* __restrict__ x, const uint8_t* __restrict__ codes, const float* __restrict__ table,
    const SCALE* __restrict__ scales, const float* __restrict__ map, const float* __restrict__ greatest,
    const float* __restrict__ mean, const float* __restrict__ low, const bf16* __restrict__ b, bf16* __restrict__ y, int m,
    int n, int k, int rank) {
  __shared__ float meaning[16];
  __shared__ float parts[WARPS][ROWS][WARP_COLUMNS + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * WARP_COLUMNS;
  const Weights<SCALE> w{codes, scales, Nested{map, greatest, mean}, n, k};
  if (threadIdx.x < 16) meaning[threadIdx.x] = table[threadIdx.x];
  __syncthreads();
  float sums[2][2][4] = {};  // [tile of 8 rows of x][tile of 16 columns][register]
  Codes stored, next;
  float scale = scale_at(w, column + lane, warp * K_STEP), next_scale = 0.0f;  // of one row; the others are other lanes'
  if (warp * K_STEP < k) fetch(w, column, warp * K_STEP, lane, stored);
  for (int at = warp * K_STEP; at < k; at += WARPS * K_STEP) {
    const int then = at + WARPS * K_STEP;
    fetch(w, column, min(then, k - K_STEP), lane, next);
    next_scale = scale_at(w, column + lane, then);
    uint4 b[2][2];
    fetch_rows(x, m, k, at, lane, b);
    float scale_of_row[LANE_ROWS];
#pragma unroll
    for (int j = 0; j < LANE_ROWS; j++) scale_of_row[j] = __shfl_sync(~0u, scale, lane / 4 * LANE_ROWS + j);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Operand a;
      decode(stored, scale_of_row, half, meaning, a);
#pragma unroll
      for (int u = 0; u < 2; u++) {
        if (u && m <= 8) continue;  // the second tile of rows is empty
#pragma unroll
        for (int i = 0; i < 2; i++) {
          mma_bf16(sums[u][i], a[i][0], b[u][half].x, b[u][half].y);
          mma_bf16(sums[u][i], a[i][1], b[u][half].z, b[u][half].w);
        }
      }
    }
    stored = next;
    scale = next_scale;
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
    for (int r = 0; r < rank; r++) sum += low[row * rank + r] * wide(b[(int64_t)(column + place) * rank + r]);
    y[(int64_t)row * n + column + place] = narrow<bf16>(sum);
  }
}
