// y = x Wᵀ + low Bᵀ for at most 16 rows of x, W in NF4: decoding for several sequences at once.
//
// The block's 8 warps share out k and make the same 32 columns; their sums are added in the order of the warps. So a
// number depends on its row and on k alone. x is read straight from memory into the first operand's registers, 32 neighbouring
// bytes a lane (see nf4.cuh). low = s x Aᵀ float [m, rank]; x, B and y are bf16; k is a multiple of 64, n of 8.
// SCALE: float, or uint8_t for nested scales.
#include "nf4.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = 8, ROWS = 16;

// Values k + 16 q … of row g (or g + 8) of x, which is zeros past the last row.
static __device__ __forceinline__ void fetch_rows(const bf16* x, int m, int columns, int k, int lane, uint32_t (&a)[4][4]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = lane / 4 + 8 * h;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4 v = row < m ? load16(x + (int64_t)row * columns + k + lane % 4 * 16 + half * 8) : make_uint4(0, 0, 0, 0);
      a[half * 2][h] = v.x;
      a[half * 2][h + 2] = v.y;
      a[half * 2 + 1][h] = v.z;
      a[half * 2 + 1][h + 2] = v.w;
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) nf4_decode(
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
  float sums[TILES][4] = {};
  Raw raw, next;
  if (warp * K_STEP < k) fetch(w, column, warp * K_STEP, lane, raw);
  for (int at = warp * K_STEP; at < k; at += WARPS * K_STEP) {
    if (at + WARPS * K_STEP < k) fetch(w, column, at + WARPS * K_STEP, lane, next);
    uint32_t a[4][4];
    fetch_rows(x, m, k, at, lane, a);
    Operand operand;
    decode(raw, meaning, operand);
#pragma unroll
    for (int t = 0; t < 4; t++)
#pragma unroll
      for (int j = 0; j < TILES; j++) mma_bf16(sums[j], a[t], operand[j][t][0], operand[j][t][1]);
    raw = next;
  }
#pragma unroll
  for (int j = 0; j < TILES; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) parts[warp][lane / 4 + i / 2 * 8][(lane % 4 * 2 + i % 2) * 4 + j] = sums[j][i];
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
