// The twin of the kernels' own `ptx.cuh`, which is the only file with PTX: the same functions, done by the runtime.
#pragma once

#define DYNAMIC_SHARED(name) unsigned char* const name = (unsigned char*)on_cpu_dynamic_shared()

// 16 bytes in one access; the host's compiler would make four of it.
static __forceinline__ __attribute__((no_sanitize_thread)) uint4 load16(const void* from) {
  on_cpu_access(from, 16, 0);
  uint4 value;
  __builtin_memcpy(&value, from, 16);
  return value;
}
static __forceinline__ __attribute__((no_sanitize_thread)) uint2 load8(const void* from) {
  on_cpu_access(from, 8, 0);
  uint2 value;
  __builtin_memcpy(&value, from, 8);
  return value;
}
static __forceinline__ __attribute__((no_sanitize_thread)) void store8(void* to, uint2 value) {
  on_cpu_access(to, 8, 1);
  __builtin_memcpy(to, &value, 8);
}
static __forceinline__ __attribute__((no_sanitize_thread)) void store16(void* to, uint4 value) {
  on_cpu_access(to, 16, 1);
  __builtin_memcpy(to, &value, 16);
}
static __forceinline__ void copy16_async(void* to, const void* from, bool wanted) {
  on_cpu_copy_async(to, from, 16, wanted ? 16 : 0);
}
static __forceinline__ void copy_commit() { on_cpu_copy_commit(); }
template <int GROUPS>
static __forceinline__ void copy_wait() {
  on_cpu_copy_wait(GROUPS);
}
static __forceinline__ void ldmatrix_x4(uint32_t (&result)[4], const void* row) {
  OnCpuLdmatrix arguments{row, result, 4, 0};
  on_cpu_warp(ON_CPU_LDMATRIX, &arguments, ~0u);
}
static __forceinline__ void ldmatrix_x4_transposed(uint32_t (&result)[4], const void* row) {
  OnCpuLdmatrix arguments{row, result, 4, 1};
  on_cpu_warp(ON_CPU_LDMATRIX, &arguments, ~0u);
}
static __forceinline__ uint32_t movmatrix(uint32_t value) {
  OnCpuMovmatrix arguments{value, 0};
  on_cpu_warp(ON_CPU_MOVMATRIX, &arguments, ~0u);
  return arguments.result;
}
static __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t b[2] = {b0, b1};
  OnCpuMma arguments{d, a, b};
  on_cpu_warp(ON_CPU_MMA_BF16, &arguments, ~0u);
}
static __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t b[2] = {b0, b1};
  OnCpuMma arguments{d, a, b};
  on_cpu_warp(ON_CPU_MMA_F16, &arguments, ~0u);
}
static __forceinline__ void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t b[2] = {b0, b1};
  OnCpuMma arguments{d, a, b};
  on_cpu_warp(ON_CPU_MMA_S8, &arguments, ~0u);
}
static __forceinline__ uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t chosen) {
  const uint64_t pool = (uint64_t)high << 32 | low;
  uint32_t bytes = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t one = pool >> 8 * (chosen >> 4 * i & 7) & 255;
    bytes |= (chosen >> 4 * i & 8 ? (one >> 7) * 255 : one) << 8 * i;
  }
  return bytes;
}
static __forceinline__ uint16_t bf16_bits(float value) {
  uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7fff;
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static __forceinline__ uint16_t half_bits(float value) { return on_cpu::bits<uint16_t>((_Float16)value); }
static __forceinline__ float half_value(uint16_t bits) { return (float)on_cpu::bits<_Float16>(bits); }
static __forceinline__ uint32_t pack_bf16(float low, float high) {
  return (uint32_t)bf16_bits(low) | (uint32_t)bf16_bits(high) << 16;
}
