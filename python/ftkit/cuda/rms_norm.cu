// y = weight ⊙ x / √(mean(x²) + ε) over rows of d values, and its gradients.
//
// The division is rounded to VALUE before the product with the weight, as published weights were trained. `scales` float
// [rows] is 1 / √(mean(x²) + ε), kept for the gradients. A block makes a row; d is a multiple of 8. VALUE: float, bf16, half.
#include "block.cuh"

constexpr int THREADS = 256;
constexpr int COLUMNS = 32;  // that a block of the weight's gradient makes

extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_forward(
    const VALUE* __restrict__ x, const VALUE* __restrict__ weight, VALUE* __restrict__ y, float* __restrict__ scales, int d,
    float epsilon) {
  __shared__ float parts[THREADS / 32];
  const int64_t row = (int64_t)blockIdx.x * d;
  float sum = 0.0f;
#pragma unroll 1
  for (int at = threadIdx.x * 8; at < d; at += THREADS * 8) {
    float v[8];
    load_values(x + row + at, v);
#pragma unroll
    for (int i = 0; i < 8; i++) sum += v[i] * v[i];
  }
  const float scale = rsqrtf(block_sum<THREADS>(sum, parts) / d + epsilon);
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
#pragma unroll 1
  for (int at = threadIdx.x * 8; at < d; at += THREADS * 8) {
    float v[8], w[8];
    load_values(x + row + at, v);
    load_values(weight + at, w);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = w[i] * rounded<VALUE>(v[i] * scale);
    store_values(y + row + at, v);
  }
}

// dx = (g − n mean(g n)) / √(mean(x²) + ε) with g = weight ⊙ dy and n the normalised row.
extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_dx(
    const VALUE* __restrict__ dy, const VALUE* __restrict__ x, const VALUE* __restrict__ weight, const float* __restrict__ scales,
    VALUE* __restrict__ dx, int d) {
  __shared__ float parts[THREADS / 32];
  const int64_t row = (int64_t)blockIdx.x * d;
  const float scale = scales[blockIdx.x];
  float sum = 0.0f;
  for (int at = threadIdx.x * 8; at < d; at += THREADS * 8) {
    float g[8], v[8], w[8];
    load_values(dy + row + at, g);
    load_values(x + row + at, v);
    load_values(weight + at, w);
#pragma unroll
    for (int i = 0; i < 8; i++) sum += rounded<VALUE>(g[i] * w[i]) * rounded<VALUE>(v[i] * scale);
  }
  const float along = block_sum<THREADS>(sum, parts) / d;
  for (int at = threadIdx.x * 8; at < d; at += THREADS * 8) {
    float g[8], v[8], w[8];
    load_values(dy + row + at, g);
    load_values(x + row + at, v);
    load_values(weight + at, w);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = (rounded<VALUE>(g[i] * w[i]) - rounded<VALUE>(v[i] * scale) * along) * scale;
    store_values(dx + row + at, v);
  }
}

// dweight = Σ over rows of dy n, float [d]. The block's 8 warps share out the rows; a lane has one column.
extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_dweight(
    const VALUE* __restrict__ dy, const VALUE* __restrict__ x, const float* __restrict__ scales, float* __restrict__ dweight,
    int rows, int d) {
  __shared__ float parts[THREADS / 32][COLUMNS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = blockIdx.x * COLUMNS + lane;
  float sum = 0.0f;
  if (column < d)
    for (int row = warp; row < rows; row += THREADS / 32) {
      const int64_t place = (int64_t)row * d + column;
      sum += wide(dy[place]) * rounded<VALUE>(wide(x[place]) * scales[row]);
    }
  parts[warp][lane] = sum;
  __syncthreads();
  if (warp || column >= d) return;
  sum = 0.0f;
#pragma unroll
  for (int part = 0; part < THREADS / 32; part++) sum += parts[part][lane];
  dweight[column] = sum;
}
