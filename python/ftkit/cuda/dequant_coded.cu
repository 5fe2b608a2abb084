// Codes with a table and a scale (and perhaps an offset) for a group, to numbers: nf4, fp4, int4_group, int8, fp8.
//
//   w = table[code] · scale  or  w = code · scale, + offset; each operation rounded, as the CPU's kernels do
//
// TABLE: numbers in the table: 16 (two codes a byte, the first in the high half), 256, or 0 where codes are int8.
// SCALE: float, half, or uint8_t for scales quantized again. OFFSETS: 0 or 1. OUT: float, bf16, half.
#include "scales.cuh"

constexpr int THREADS = 256;  // no fewer than a table has numbers
constexpr int EACH = 8;  // values of a thread; groups are multiples of it

// What a code means, number `i` of those in two words (of four bits, in the first of them).
static __device__ __forceinline__ float number_of(uint2 words, const float* meaning, int i) {
  if (TABLE == 16) {  // the first of a byte's two is its upper half; its place in the table is had without a product
    const int shift = (i ^ 1) * 4;
    return *(const float*)((const char*)meaning + ((shift < 2 ? words.x << 2 : words.x >> (shift - 2)) & 60));
  }
  const uint8_t code = (uint8_t)((i < 4 ? words.x : words.y) >> i % 4 * 8);
  return TABLE ? meaning[code] : (float)(int8_t)code;
}

static __device__ __forceinline__ float moved(float number, float scale, float offset) {
  const float value = __fmul_rn(number, scale);
  return OFFSETS ? __fadd_rn(value, offset) : value;
}

extern "C" __global__ void __launch_bounds__(THREADS) dequant_coded(
    const uint8_t* __restrict__ codes, const float* __restrict__ table, const SCALE* __restrict__ scales,
    const float* __restrict__ map, const float* __restrict__ greatest, const float* __restrict__ mean,
    const half* __restrict__ offsets, OUT* __restrict__ out, int64_t count, int group) {
  __shared__ float meaning[TABLE ? TABLE : 1];
  if (threadIdx.x < TABLE) meaning[threadIdx.x] = table[threadIdx.x];
  __syncthreads();
  const int64_t first = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * EACH;
  if (first >= count) return;
  const int64_t place = (uint32_t)(first / EACH) / (uint32_t)(group / EACH);  // a division of 64 bits would cost more than the rest
  const float scale = scale_of(scales, Nested{map, greatest, mean}, place);
  const float offset = OFFSETS ? wide(offsets[place]) : 0.0f;
  if (first + EACH <= count) {
    const uint2 words = TABLE == 16 ? uint2{*(const uint32_t*)(codes + first / 2), 0} : load8(codes + first);
    float values[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) values[i] = moved(number_of(words, meaning, i), scale, offset);
    store_values(out + first, values);
  } else {
#pragma unroll 1
    for (int64_t i = first; i < count; i++) {
      const uint8_t code = codes[TABLE == 16 ? i / 2 : i];
      const uint32_t own = TABLE == 16 && i % 2 == 0 ? code >> 4 : code;  // where the second of a word is looked for
      out[i] = narrow<OUT>(moved(number_of(uint2{own, 0}, meaning, TABLE == 16), scale, offset));
    }
  }
}
