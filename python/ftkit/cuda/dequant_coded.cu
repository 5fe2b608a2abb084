// Codes with a table and a scale (and perhaps an offset) for a group, to numbers: nf4, fp4, int4_group, int8, fp8.
//
//   w = table[code] · scale  or  w = code · scale, + offset; each operation rounded, as the CPU's kernels do
//
// TABLE: numbers in the table: 16 (two codes a byte, the first in the high half), 256, or 0 where codes are int8.
// SCALE: float, half, or uint8_t for scales quantized again. OFFSETS: 0 or 1. OUT: float, bf16, half.
#include "scales.cuh"

constexpr int THREADS = 256;
constexpr int EACH = 8;  // values of a thread; groups are multiples of it

extern "C" __global__ void __launch_bounds__(THREADS) dequant_coded(
    const uint8_t* __restrict__ codes, const float* __restrict__ table, const SCALE* __restrict__ scales,
    const float* __restrict__ map, const float* __restrict__ greatest, const float* __restrict__ mean,
    const half* __restrict__ offsets, OUT* __restrict__ out, int64_t count, int group) {
  __shared__ float meaning[TABLE ? TABLE : 1];
  for (int i = threadIdx.x; i < TABLE; i += THREADS) meaning[i] = table[i];
  __syncthreads();
  int64_t first = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * EACH;
  if (first >= count) return;
  int64_t place = first / group;
  float scale = scale_of(scales, Nested{map, greatest, mean}, place);
  float offset = OFFSETS ? wide(offsets[place]) : 0.0f;
  int here = count - first < EACH ? (int)(count - first) : EACH;
  float values[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    if (i >= here) break;
    float number;
    if (TABLE == 16) {
      uint8_t pair = codes[(first + i) / 2];
      number = meaning[i % 2 ? pair & 15 : pair >> 4];
    } else {
      uint8_t code = codes[first + i];
      number = TABLE ? meaning[code] : (float)(int8_t)code;
    }
    values[i] = __fmul_rn(number, scale);
    if (OFFSETS) values[i] = __fadd_rn(values[i], offset);
  }
  if (here == EACH) {
    store8(out + first, values);
  } else {
    for (int i = 0; i < here; i++) out[first + i] = narrow<OUT>(values[i]);
  }
}
