// The number that a group's codes are multiplied with: as it is, in half precision, or quantized again (QLoRA).
#pragma once
#include "numbers.cuh"

struct Nested {
  const float* map;       // [256]
  const float* greatest;  // one for 256 groups
  const float* mean;      // [1]
};
static __device__ __forceinline__ float scale_of(const float* scales, Nested, int64_t group) { return scales[group]; }
static __device__ __forceinline__ float scale_of(const half* scales, Nested, int64_t group) { return wide(scales[group]); }
static __device__ __forceinline__ float scale_of(const uint8_t* scales, Nested nested, int64_t group) {
  return __fadd_rn(__fmul_rn(nested.map[scales[group]], nested.greatest[group / 256]), *nested.mean);
}
