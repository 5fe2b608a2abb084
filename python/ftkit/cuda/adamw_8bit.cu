// AdamW's update over a state of 8 bits, in place: see kernels/blockwise_adamw.py for the equations and the maps.
//
// A block of threads moves one block of 256 entries: reads both states, moves, and rounds them back under their new
// greatest magnitudes. A share takes the code of the first edge that it isn't beyond, 255 beyond all.
#include "block.cuh"

constexpr int THREADS = 256;  // the entries that share their greatest magnitude
constexpr int EDGES = 255;

// How many of the rising edges the share is beyond.
static __device__ __forceinline__ uint8_t nearest(const float* edges, float share) {
  int code = 0;
#pragma unroll
  for (int step = 128; step; step /= 2)
    if (share > edges[code + step - 1]) code += step;
  return (uint8_t)code;
}

extern "C" __global__ void __launch_bounds__(THREADS) adamw_8bit(
    float* __restrict__ weight, const float* __restrict__ gradient, uint8_t* __restrict__ mean_codes,
    float* __restrict__ mean_greatest, const float* __restrict__ mean_map, const float* __restrict__ mean_edges,
    uint8_t* __restrict__ square_codes, float* __restrict__ square_greatest, const float* __restrict__ square_map,
    const float* __restrict__ square_edges, int64_t count, float beta1, float gain1, float beta2, float gain2,
    float epsilon, float rate, float correction, float kept) {
  __shared__ float parts[THREADS / 32];
  __shared__ float edges[2][EDGES];
  if (threadIdx.x < EDGES) {
    edges[0][threadIdx.x] = mean_edges[threadIdx.x];
    edges[1][threadIdx.x] = square_edges[threadIdx.x];
  }
  const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  const bool there = at < count;
  float m = 0.0f, v = 0.0f;
  if (there) {
    const float g = gradient[at];
    m = mean_map[mean_codes[at]] * mean_greatest[blockIdx.x] * beta1 + g * gain1;
    v = square_map[square_codes[at]] * square_greatest[blockIdx.x] * beta2 + g * g * gain2;
    weight[at] = weight[at] * kept - rate * (m / (sqrtf(v) / correction + epsilon));
  }
  const float most_m = block_max<THREADS>(fabsf(m), parts), most_v = block_max<THREADS>(v, parts);
  const float least = 1.17549435e-38f;  // a block of zeros stays one
  if (there) {
    mean_codes[at] = nearest(edges[0], m / fmaxf(most_m, least));
    square_codes[at] = nearest(edges[1], v / fmaxf(most_v, least));
  }
  if (threadIdx.x == 0) {
    mean_greatest[blockIdx.x] = most_m;
    square_greatest[blockIdx.x] = most_v;
  }
}
