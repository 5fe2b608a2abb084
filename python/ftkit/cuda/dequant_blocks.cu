// Blocks of GGUF files to numbers.
//
//   Q4_0: d (q − 8)     Q4_1: d q + m     Q8_0: d q     Q4_K, Q5_K: (d s) q − (d' m)     Q6_K: (d s) q
//
// Each operation is rounded, as the CPU's are. FORMAT: one of these names. OUT: float, bf16, half. A thread makes 4 neighbours.
#include "numbers.cuh"

constexpr int THREADS = 256;

static __device__ __forceinline__ float half_at(const uint8_t* bytes) {
  return half_value((uint16_t)(bytes[0] | bytes[1] << 8));
}

// Value i of a block; the first 16 of 32 values are in the low halves of the bytes.
struct Q4_0 {
  static constexpr int VALUES = 32, BYTES = 18;
  static __device__ __forceinline__ float value(const uint8_t* block, int i) {
    uint8_t byte = block[2 + i % 16];
    return __fmul_rn(half_at(block), (float)((i < 16 ? byte & 15 : byte >> 4) - 8));
  }
};
struct Q4_1 {
  static constexpr int VALUES = 32, BYTES = 20;
  static __device__ __forceinline__ float value(const uint8_t* block, int i) {
    uint8_t byte = block[4 + i % 16];
    return __fadd_rn(__fmul_rn(half_at(block), (float)(i < 16 ? byte & 15 : byte >> 4)), half_at(block + 2));
  }
};
struct Q8_0 {
  static constexpr int VALUES = 32, BYTES = 34;
  static __device__ __forceinline__ float value(const uint8_t* block, int i) {
    return __fmul_rn(half_at(block), (float)(int8_t)block[2 + i]);
  }
};
// w = (d s) q − (d' m) for a code of group 0 to 7: the 6-bit scales and offsets lie in 12 bytes; see src/quant/scales.rs.
static __device__ __forceinline__ float of_group(const uint8_t* block, int group, int code) {
  const uint8_t* packed = block + 4;
  int scale, offset;
  if (group < 4) {
    scale = packed[group] & 63;
    offset = packed[group + 4] & 63;
  } else {
    scale = (packed[group + 4] & 15) | packed[group - 4] >> 6 << 4;
    offset = packed[group + 4] >> 4 | packed[group] >> 6 << 4;
  }
  return __fsub_rn(__fmul_rn(__fmul_rn(half_at(block), (float)scale), (float)code),
                   __fmul_rn(half_at(block + 2), (float)offset));
}
struct Q4_K {
  static constexpr int VALUES = 256, BYTES = 144;
  static __device__ __forceinline__ float value(const uint8_t* block, int i) {
    int group = i / 32;
    uint8_t byte = block[16 + group / 2 * 32 + i % 32];
    return of_group(block, group, group % 2 ? byte >> 4 : byte & 15);
  }
};
// Bit j of byte i of the 32 before the low bits is the fifth bit of value 32 j + i.
struct Q5_K {
  static constexpr int VALUES = 256, BYTES = 176;
  static __device__ __forceinline__ float value(const uint8_t* block, int i) {
    int group = i / 32;
    uint8_t byte = block[48 + group / 2 * 32 + i % 32], fifth = block[16 + i % 32] >> group & 1;
    return of_group(block, group, (group % 2 ? byte >> 4 : byte & 15) | fifth << 4);
  }
};
// Halves of 128 values; of 32 values j of a half, the low bits are in 64 bytes, the high ones in bits 2 j, 2 j + 1 of 32.
struct Q6_K {
  static constexpr int VALUES = 256, BYTES = 210;
  static __device__ __forceinline__ float value(const uint8_t* block, int i) {
    int half = i / 128, j = i / 32 % 4;
    uint8_t low = block[half * 64 + j % 2 * 32 + i % 32], high = block[128 + half * 32 + i % 32];
    int code = ((j < 2 ? low & 15 : low >> 4) | (high >> 2 * j & 3) << 4) - 32;
    return __fmul_rn(__fmul_rn(half_at(block + 208), (float)(int8_t)block[192 + i / 16]), (float)code);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    dequant_blocks(const uint8_t* __restrict__ blocks, OUT* __restrict__ out, int64_t count) {
  int64_t first = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 4;
  if (first >= count) return;
  const uint8_t* block = blocks + first / FORMAT::VALUES * FORMAT::BYTES;
#pragma unroll
  for (int i = 0; i < 4; i++) out[first + i] = narrow<OUT>(FORMAT::value(block, (int)(first % FORMAT::VALUES) + i));
}
