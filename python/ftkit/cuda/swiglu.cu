// y = silu(gate) ⊙ up with silu(g) = g / (1 + exp(−g)), and its gradients.
//
// silu(gate) is rounded to VALUE before the product. Tensors of `count` values, flat; a thread has 8. VALUE: float, bf16, half.
#include "numbers.cuh"

constexpr int THREADS = 256;
constexpr int EACH = 8;

static __device__ __forceinline__ float sigmoid(float g) { return 1.0f / (1.0f + expf(-g)); }
static __device__ __forceinline__ float product(float g, float u) { return rounded<VALUE>(g * sigmoid(g)) * u; }
// of gate: dy up σ(g) (1 + g (1 − σ(g)))
static __device__ __forceinline__ float slope(float d, float g, float u) {
  const float s = sigmoid(g);
  return rounded<VALUE>(d * u) * s * (1.0f + g * (1.0f - s));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu_forward(const VALUE* __restrict__ gate, const VALUE* __restrict__ up, VALUE* __restrict__ y, int64_t count) {
  const int64_t first = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * EACH;
  if (first + EACH <= count) {
    float g[EACH], u[EACH];
    load_values(gate + first, g);
    load_values(up + first, u);
#pragma unroll
    for (int i = 0; i < EACH; i++) u[i] = product(g[i], u[i]);
    store_values(y + first, u);
  } else {
    for (int64_t i = first; i < count; i++) y[i] = narrow<VALUE>(product(wide(gate[i]), wide(up[i])));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu_backward(const VALUE* __restrict__ dy, const VALUE* __restrict__ gate, const VALUE* __restrict__ up,
                    VALUE* __restrict__ dgate, VALUE* __restrict__ dup, int64_t count) {
  const int64_t first = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * EACH;
  if (first + EACH <= count) {
    float d[EACH], g[EACH], u[EACH];
    load_values(dy + first, d);
    load_values(gate + first, g);
    load_values(up + first, u);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      u[i] = slope(d[i], g[i], u[i]);
      g[i] = product(g[i], d[i]);
    }
    store_values(dgate + first, u);
    store_values(dup + first, g);
  } else {
    for (int64_t i = first; i < count; i++) {
      dgate[i] = narrow<VALUE>(slope(wide(dy[i]), wide(gate[i]), wide(up[i])));
      dup[i] = narrow<VALUE>(product(wide(gate[i]), wide(dy[i])));
    }
  }
}
