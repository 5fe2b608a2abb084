// Numbers of 16 bits, and their way from and to float32.
#pragma once
#include "ptx.cuh"

struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

static __device__ __forceinline__ float wide(float value) { return value; }
static __device__ __forceinline__ float wide(bf16 value) { return __uint_as_float((uint32_t)value.bits << 16); }
static __device__ __forceinline__ float wide(half value) { return half_value(value.bits); }

template <class T>
struct Narrow;
template <>
struct Narrow<float> {
  static __device__ __forceinline__ float of(float value) { return value; }
};
template <>
struct Narrow<bf16> {
  static __device__ __forceinline__ bf16 of(float value) { return bf16{bf16_bits(value)}; }
};
template <>
struct Narrow<half> {
  static __device__ __forceinline__ half of(float value) { return half{half_bits(value)}; }
};
// The nearest T.
template <class T>
static __device__ __forceinline__ T narrow(float value) {
  return Narrow<T>::of(value);
}
// The value as it is once rounded to T.
template <class T>
static __device__ __forceinline__ float rounded(float value) {
  return wide(narrow<T>(value));
}

// Eight neighbours, from and to addresses that are multiples of their size (of 16 bytes for float).
static __device__ __forceinline__ void load_values(const bf16* from, float (&out)[8]) {
  uint4 v = load16(from);
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 8; i++) out[i] = __uint_as_float(i & 1 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
}
static __device__ __forceinline__ void load_values(const half* from, float (&out)[8]) {
  uint4 v = load16(from);
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 8; i++) out[i] = half_value((uint16_t)(words[i / 2] >> 16 * (i & 1)));
}
static __device__ __forceinline__ void load_values(const float* from, float (&out)[8]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint4 v = load16(from + 4 * i);
    out[4 * i] = __uint_as_float(v.x);
    out[4 * i + 1] = __uint_as_float(v.y);
    out[4 * i + 2] = __uint_as_float(v.z);
    out[4 * i + 3] = __uint_as_float(v.w);
  }
}
static __device__ __forceinline__ void store_values(bf16* to, const float (&v)[8]) {
  store16(to, make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])));
}
static __device__ __forceinline__ void store_values(half* to, const float (&v)[8]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) words[i] = half_bits(v[2 * i]) | (uint32_t)half_bits(v[2 * i + 1]) << 16;
  store16(to, make_uint4(words[0], words[1], words[2], words[3]));
}
static __device__ __forceinline__ void store_values(float* to, const float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += 4)
    store16(to + i, make_uint4(__float_as_uint(v[i]), __float_as_uint(v[i + 1]), __float_as_uint(v[i + 2]), __float_as_uint(v[i + 3])));
}

// The sum over the warp's lanes, in every lane; the order is fixed.
static __device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int other = 16; other; other /= 2) value += __shfl_xor_sync(~0u, value, other);
  return value;
}
static __device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int other = 16; other; other /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, other));
  return value;
}

// Halves of two words side by side: the lower ones, or the upper ones.
static __device__ __forceinline__ uint32_t beside(uint32_t one, uint32_t two, int upper) {
  return upper ? one >> 16 | (two & 0xffff0000u) : (one & 0xffffu) | two << 16;
}
