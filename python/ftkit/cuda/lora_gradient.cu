// G_a = Σ low_tᵀ x_t over the rows t of adapter a, wherever they are in the stream: dA of dlow and x, dBᵀ of low and dy.
//
// low bf16 [rows, width], x bf16 [rows, columns], out float [adapters, width, columns], zeros from an adapter's rank on
// and where it has no rows. A block makes 16 × 32 numbers of one adapter. It goes through the segments in their order, its
// warps share out the rows of each by sixteens, and their sums are added in the order of the warps: nothing depends on
// other adapters' rows, nor on when blocks run. Of 16 rows, lane (g, q) of a warp has the four from 4 q on, of x the
// columns 4 g … 4 g + 3 and of low the ranks 2 g and 2 g + 1. columns is a multiple of 4, width of 16.
#include "numbers.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = 8, SIXTEEN = 16;
constexpr int COLUMNS = 32;

extern "C" __global__ void __launch_bounds__(THREADS) lora_gradient(
    const bf16* __restrict__ low, const bf16* __restrict__ x, const int* __restrict__ ranks, const int* __restrict__ ends,
    const int* __restrict__ adapters, float* __restrict__ out, int segments, int columns, int width) {
  __shared__ float parts[WARPS][SIXTEEN][COLUMNS + 1];
  const int adapter = blockIdx.y / (width / SIXTEEN), base = blockIdx.y % (width / SIXTEEN) * SIXTEEN;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const int tile = blockIdx.x * COLUMNS, column = tile + 4 * g, rank = ranks[adapter];
  float sums[4][4] = {};  // [tile of 8 columns][register]
  for (int segment = 0; segment < segments; segment++) {
    if (adapters[segment] != adapter) continue;
    const int end = ends[segment + 1];
    for (int first = ends[segment] + warp * SIXTEEN; first < end; first += WARPS * SIXTEEN) {
      uint32_t pairs[4];
      uint2 four[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = first + 4 * q + i;
        const bool there = row < end;
        pairs[i] = there && base + 2 * g < rank ? *(const uint32_t*)(low + (int64_t)row * width + base + 2 * g) : 0;
        four[i] = there && column < columns ? load8(x + (int64_t)row * columns + column) : uint2{0, 0};
      }
      const uint32_t a[4] = {beside(pairs[0], pairs[1], 0), beside(pairs[0], pairs[1], 1), beside(pairs[2], pairs[3], 0),
                             beside(pairs[2], pairs[3], 1)};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const uint32_t b0 = j < 2 ? beside(four[0].x, four[1].x, j % 2) : beside(four[0].y, four[1].y, j % 2);
        const uint32_t b1 = j < 2 ? beside(four[2].x, four[3].x, j % 2) : beside(four[2].y, four[3].y, j % 2);
        mma_bf16(sums[j], a, b0, b1);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int c = 0; c < 4; c++) parts[warp][2 * g + c / 2][4 * (2 * q + c % 2) + j] = sums[j][c];
  __syncthreads();
  for (int i = threadIdx.x; i < SIXTEEN * COLUMNS; i += THREADS) {
    const int r = i / COLUMNS, at = tile + i % COLUMNS;
    if (at >= columns) continue;
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < WARPS; part++) sum += parts[part][r][i % COLUMNS];
    out[((int64_t)adapter * width + base + r) * columns + at] = base + r < rank ? sum : 0.0f;
  }
}
