// Codes with a table and a scale (and perhaps an offset) for a group, to numbers: nf4, fp4, int4_group, int8, fp8.
//
//   w = table[code] · scale  or  w = code · scale, + offset; each operation rounded, as the CPU's kernels do
//
// TABLE: numbers in the table: 16 (two codes a byte, the first in the high half), 256, or 0 where codes are int8.
// SCALE: float, half, or uint8_t for scales quantized again. OFFSETS: 0 or 1. OUT: float, bf16, half.
#include "scales.cuh"

constexpr int THREADS = 256;
constexpr int EACH = 8;  // values of a thread; groups are multiples of it

static __device__ __forceinline__ float value_of(const uint8_t* codes, const float* meaning, int64_t place, float scale,
                                                 float offset) {
  float number;
  if (TABLE == 16) {
    const uint8_t pair = codes[place / 2];
    number = meaning[place % 2 ? pair & 15 : pair >> 4];
  } else {
    const uint8_t code = codes[place];
    number = TABLE ? meaning[code] : (float)(int8_t)code;
  }
  const float value = __fmul_rn(number, scale);
  return OFFSETS ? __fadd_rn(value, offset) : value;
}

extern "C" __global__ void __launch_bounds__(THREADS) dequant_coded(
    const uint8_t* __restrict__ codes, const float* __restrict__ table, const SCALE* __restrict__ scales,
    const float* __restrict__ map, const float* __restrict__ greatest, const float* __restrict__ mean,
    const half* __restrict__ offsets, OUT* __restrict__ out, int64_t count, int group) {
  __shared__ float meaning[TABLE ? TABLE : 1];
  for (int i = threadIdx.x; i < TABLE; i += THREADS) meaning[i] = table[i];
  __syncthreads();
  const int64_t first = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * EACH;
  if (first >= count) return;
  const int64_t place = first / group;
  const float scale = scale_of(scales, Nested{map, greatest, mean}, place);
  const float offset = OFFSETS ? wide(offsets[place]) : 0.0f;
  if (first + EACH <= count) {
    float values[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) values[i] = value_of(codes, meaning, first + i, scale, offset);
    store_values(out + first, values);
  } else {
    for (int64_t i = first; i < count; i++) out[i] = narrow<OUT>(value_of(codes, meaning, i, scale, offset));
  }
}
