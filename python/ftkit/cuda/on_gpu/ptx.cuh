// The only file with PTX: asynchronous copies, the tensor core, conversions. `on_cpu/include/ptx.cuh` is its twin for the CPU.
#pragma once

typedef unsigned char uint8_t;
typedef signed char int8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
static_assert(sizeof(int64_t) == 8, "int64_t is 8 bytes");

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define DEVICE static __device__ __forceinline__

DEVICE uint32_t shared_address(const void* pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }

// 16 or 8 bytes in one access, from and to aligned addresses.
DEVICE uint4 load16(const void* from) { return *reinterpret_cast<const uint4*>(from); }
DEVICE uint2 load8(const void* from) { return *reinterpret_cast<const uint2*>(from); }
DEVICE void store8(void* to, uint2 value) { *reinterpret_cast<uint2*>(to) = value; }
DEVICE void store16(void* to, uint4 value) { *reinterpret_cast<uint4*>(to) = value; }

// Starts a copy of 16 bytes from global to shared memory; zeros where it is not wanted.
DEVICE void copy16_async(void* to, const void* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(wanted ? 16 : 0) : "memory");
}
// Closes a group of copies.
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most GROUPS of this thread's groups are in flight.
template <int GROUPS>
DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// Four 8 × 8 matrices of 16-bit numbers, whose rows are at the lanes' addresses, eight lanes a matrix: of matrix i, lane
// (g, q) gets row g, columns 2 q and 2 q + 1; transposed, column g, rows 2 q and 2 q + 1.
DEVICE void ldmatrix_x4(uint32_t (&result)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void ldmatrix_x4_transposed(uint32_t (&result)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b for a [16, 16] and b [16, 8]. With g = lane / 4 and q = lane % 4: a[i] has row g + 8 (i % 2), columns
// 2 q + 8 (i / 2) and the next; b_i has rows 2 q + 8 i and the next, column g; d[i] is row g + 8 (i / 2), column 2 q + i % 2.
DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four of the eight bytes of low and high: byte i is that which bits 4 i … 4 i + 2 of `chosen` count. With bit 4 i + 3 it is
// that one's sign eight times.
DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t chosen) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(chosen));
  return bytes;
}

// Bits of the nearest number, ties to even.
DEVICE uint16_t half_bits(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
DEVICE float half_value(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
// As half of a pair: sm_80 to sm_89 convert pairs four times as fast as single numbers.
DEVICE uint16_t bf16_bits(float value) { return (uint16_t)pack_bf16(value, 0.0f); }
