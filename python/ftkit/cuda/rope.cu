// y = [a cos − b sin, b cos + a sin] of the halves x = [a, b] of each head; with sign −1 the way back, which is its gradient.
//
// x [tokens, heads, 2 half], cos and sin [tokens, half], half a multiple of 8. Each operation is rounded to VALUE, as torch
// does. A thread turns 8 pairs. VALUE: float, bf16, half.
#include "numbers.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
    rope(const VALUE* __restrict__ x, const VALUE* __restrict__ cosines, const VALUE* __restrict__ sines, VALUE* __restrict__ y,
         int tokens, int heads, int half_size, float sign) {
  const int64_t piece = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  const int pieces = half_size / 8;  // of a head
  const int64_t head = piece / pieces, token = head / heads;
  if (token >= tokens) return;
  const int at = (int)(piece % pieces) * 8;
  const int64_t place = head * 2 * half_size + at;
  float a[8], b[8], c[8], s[8];
  load_values(x + place, a);
  load_values(x + place + half_size, b);
  load_values(cosines + token * half_size + at, c);
  load_values(sines + token * half_size + at, s);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float sine = s[i] * sign, first = a[i];
    a[i] = __fsub_rn(rounded<VALUE>(__fmul_rn(first, c[i])), rounded<VALUE>(__fmul_rn(b[i], sine)));
    b[i] = __fadd_rn(rounded<VALUE>(__fmul_rn(b[i], c[i])), rounded<VALUE>(__fmul_rn(first, sine)));
  }
  store_values(y + place, a);
  store_values(y + place + half_size, b);
}
