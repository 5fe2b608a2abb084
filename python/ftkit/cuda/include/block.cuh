// Sums and maxima over all threads of a block, in an order that is fixed.
#pragma once
#include "numbers.cuh"

// The sum of the block's values, in every thread; `parts` is shared memory for one number a warp.
template <int THREADS>
static __device__ __forceinline__ float block_sum(float value, float (&parts)[THREADS / 32]) {
  value = warp_sum(value);
  __syncthreads();  // parts may still be read from the sum before
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int part = 0; part < THREADS / 32; part++) sum += parts[part];
  return sum;
}

template <int THREADS>
static __device__ __forceinline__ float block_max(float value, float (&parts)[THREADS / 32]) {
  value = warp_max(value);
  __syncthreads();  // parts may still be read from the maximum before
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  float most = parts[0];
#pragma unroll
  for (int part = 1; part < THREADS / 32; part++) most = fmaxf(most, parts[part]);
  return most;
}
