// low = s x Aᵀ and y += low Bᵀ, each row with the matrices of its own adapter in the pool's pages: few rows an adapter.
//
// The pool is one memory; an adapter's A [rank, in] and B [out, rank] lie in it at places of their own, counted in
// values. `ends` int [segments + 1] cuts the rows in segments, `adapters` says whose they are, −1 for nobody's: then
// low isn't written and y stays. Ranks differ; low is [rows, width], of which a row has its adapter's rank. in is a
// multiple of 8. Matrices are rounded to VALUE first. VALUE: float, bf16, half. WEIGHT: what the pool holds, likewise.
#include "numbers.cuh"
#include "ragged.cuh"

constexpr int THREADS = 128;
constexpr int LANES = 8;     // that share a number of y
constexpr int COLUMNS = 64;  // of y, that a block makes

// A warp makes one number of low.
extern "C" __global__ void __launch_bounds__(THREADS) lora_bgmv_shrink(
    const VALUE* __restrict__ x, const WEIGHT* __restrict__ pool, const int64_t* __restrict__ places,
    const int* __restrict__ ranks, const float* __restrict__ factors, const int* __restrict__ ends,
    const int* __restrict__ adapters, VALUE* __restrict__ low, int segments, int columns, int width) {
  const int row = blockIdx.x, r = blockIdx.y * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int adapter = adapters[segment_of(ends, segments, row)];
  if (adapter < 0 || r >= ranks[adapter]) return;
  const WEIGHT* a = pool + places[adapter] + (int64_t)r * columns;
  float sum = 0.0f;
  for (int at = lane * 8; at < columns; at += 32 * 8) {
    float values[8], weights[8];
    load_values(x + (int64_t)row * columns + at, values);
    load_values(a + at, weights);
#pragma unroll
    for (int i = 0; i < 8; i++) sum += values[i] * rounded<VALUE>(weights[i]);
  }
  sum = warp_sum(sum);
  if (lane == 0) low[(int64_t)row * width + r] = narrow<VALUE>(sum * factors[adapter]);
}

extern "C" __global__ void __launch_bounds__(THREADS) lora_bgmv_expand(
    const VALUE* __restrict__ low, const WEIGHT* __restrict__ pool, const int64_t* __restrict__ places,
    const int* __restrict__ ranks, const int* __restrict__ ends, const int* __restrict__ adapters,
    VALUE* __restrict__ into, int segments, int columns, int width) {
  const int row = blockIdx.x, lane = threadIdx.x % LANES;
  const int adapter = adapters[segment_of(ends, segments, row)];
  if (adapter < 0) return;
  const int rank = ranks[adapter];
  for (int i = threadIdx.x / LANES; i < COLUMNS; i += THREADS / LANES) {
    const int column = blockIdx.y * COLUMNS + i;
    const WEIGHT* b = pool + places[adapter] + (int64_t)min(column, columns - 1) * rank;
    float sum = 0.0f;
    for (int r = lane; r < rank; r += LANES) sum += wide(low[(int64_t)row * width + r]) * rounded<VALUE>(wide(b[r]));
#pragma unroll
    for (int other = LANES / 2; other; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
    VALUE* y = into + (int64_t)row * columns + column;
    if (lane == 0 && column < columns) *y = narrow<VALUE>(wide(*y) + sum);
  }
}
