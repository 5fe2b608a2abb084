// y = x Wᵀ + low Bᵀ for at most 4 rows of x, W in 4-bit codes with a table: decoding one token.
//
// A warp makes one number of each row. Lane l takes the values 8 l … 8 l + 7 of every 256, so that a warp reads 128
// neighbouring bytes of codes; its sums meet in a fixed order that depends on K alone. Values of W are rounded to VALUE first,
// as everywhere.
//
// ROWS: 1 to 4. VALUE: float, bf16, half. GROUP: values of a scale, a multiple of 8. SCALE, OFFSETS: see dequant_coded.cu.
#include "scales.cuh"

constexpr int THREADS = 128;
constexpr int EACH = 8;

extern "C" __global__ void __launch_bounds__(THREADS, 8) coded_gemv(
    const VALUE* __restrict__ x, const uint8_t* __restrict__ codes, const float* __restrict__ table,
    const SCALE* __restrict__ scales, const float* __restrict__ map, const float* __restrict__ greatest,
    const float* __restrict__ mean, const half* __restrict__ offsets, const float* __restrict__ low,
    const VALUE* __restrict__ b, VALUE* __restrict__ y, int n, int k, int rank) {
  __shared__ float meaning[16];
  if (threadIdx.x < 16) meaning[threadIdx.x] = table[threadIdx.x];
  __syncthreads();
  const int lane = threadIdx.x % 32, column = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  if (column >= n) return;
  float sums[ROWS] = {};
  for (int at = lane * EACH; at < k; at += 32 * EACH) {
    const int64_t place = (int64_t)column * k + at;
    const uint32_t packed = *(const uint32_t*)(codes + place / 2);
    const float scale = scale_of(scales, Nested{map, greatest, mean}, place / GROUP);
    const float offset = OFFSETS ? wide(offsets[place / GROUP]) : 0.0f;
    float w[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int shift = i / 2 * 8 + (i % 2 ? 0 : 4);
      float value = __fmul_rn(meaning[packed >> shift & 15], scale);
      w[i] = rounded<VALUE>(OFFSETS ? __fadd_rn(value, offset) : value);
    }
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
      float values[EACH];
      load_values(x + (int64_t)row * k + at, values);
#pragma unroll
      for (int i = 0; i < EACH; i++) sums[row] += values[i] * w[i];
    }
  }
  for (int r = lane; r < rank; r += 32) {
    const float weight = wide(b[(int64_t)column * rank + r]);
#pragma unroll
    for (int row = 0; row < ROWS; row++) sums[row] += low[row * rank + r] * weight;
  }
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    const float sum = warp_sum(sums[row]);
    if (lane == 0) y[(int64_t)row * n + column] = narrow<VALUE>(sum);
  }
}
