// dx = dy W, W in 4-bit codes with offsets: the gradient that goes down, with int4_group and QALoRA.
//
// The sum goes over W's rows, and the first operand is Wᵀ: of 64 rows, lane (g, q) has the 16 from 16 q on, and of them the
// columns 4 g … 4 g + 3 of its warp's 32, two bytes of codes. Those are of one group. dy and dx are bf16; k is a multiple
// of 64 and of GROUP, n of 8. See int4.cuh for W and GROUP.
#include "staged.cuh"

constexpr int THREADS = 128;

// Of 64 rows, the scales (or offsets) of a warp's columns; 16 rows lie in other banks than the next 16.
typedef float OfRows[4][20];

// Codes of half of a step: rows first + 16 q + 8 half + …, columns at … at + 3; past the last, those of any.
static __device__ __forceinline__ void fetch_columns(const Weights& w, int first, int at, int half, int lane,
                                                     uint16_t (&codes)[8]) {
  const int row = min(first + lane % 4 * 16 + half * 8, w.rows - 8);
  const uint8_t* from = w.codes + ((int64_t)row * w.columns + min(at, w.columns - LANE_ROWS)) / 2;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    codes[i] = *(const uint16_t*)from;
    from += w.columns / 2;
  }
}

// Four neighbours in shared memory.
static __device__ __forceinline__ void load_four(const float* from, float (&out)[4]) {
  const uint4 v = load16(from);
  out[0] = __uint_as_float(v.x);
  out[1] = __uint_as_float(v.y);
  out[2] = __uint_as_float(v.z);
  out[3] = __uint_as_float(v.w);
}

// Them to pairs of bf16 of neighbouring rows; scales and offsets are those of the 8 rows.
static __device__ __forceinline__ void decode_columns(const uint16_t (&codes)[8], const float* scales,
                                                      const float* offsets, const float* meaning, Operand& a) {
#pragma unroll
  for (int t = 0; t < 2; t++) {
    float scale[4], offset[4], values[4][LANE_ROWS];
    load_four(scales + 4 * t, scale);
    load_four(offsets + 4 * t, offset);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < LANE_ROWS; j++)
        values[i][j] = moved(meaning_of(meaning, codes[4 * t + i], j / 2 * 8 + (j % 2 ? 0 : 4)), scale[i], offset[i]);
#pragma unroll
    for (int j = 0; j < LANE_ROWS; j++)
#pragma unroll
      for (int pair = 0; pair < 2; pair++)
        a[j / 2][t][j % 2 + 2 * pair] = pack_bf16(values[2 * pair][j], values[2 * pair + 1][j]);
  }
}

// To shared memory, the scales and offsets of 64 rows from `first` on, two a lane; past the last row, those of the last.
static __device__ __forceinline__ void put_numbers(const Weights& w, int first, uint32_t group, int lane, OfRows& scales,
                                                   OfRows& offsets) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = lane + 32 * i;
    const uint32_t numbers = numbers_of(w, (uint32_t)min(first + row, w.rows - 1) * (uint32_t)(w.columns / GROUP) + group);
    scales[row / 16][row % 16] = scale_of(numbers);
    offsets[row / 16][row % 16] = offset_of(numbers);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    int4_dx(const bf16* __restrict__ dy, const uint8_t* __restrict__ codes, const float* __restrict__ table,
            const half* __restrict__ scales, const half* __restrict__ offsets, bf16* __restrict__ dx, int m, int n, int k) {
  __shared__ Stage stages[2];
  __align__(16) __shared__ OfRows row_scales[2][4], row_offsets[2][4];
  __shared__ float meaning[16];
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  const int first = blockIdx.x * TILE_ROWS, column = blockIdx.y * TILE_COLUMNS + warp * WARP_COLUMNS;
  const int at_column = column + lane / 4 * LANE_ROWS;
  const Weights w{codes, scales, offsets, n, k};
  if (t < 16) meaning[t] = table[t];
  const uint32_t group = min(column, k - WARP_COLUMNS) / GROUP;  // of a row
  Sums sums = {};
  uint16_t stored[2][8];
  copy_rows(stages[0], dy, first, m, n, 0);
  fetch_columns(w, 0, at_column, 0, lane, stored[0]);
  put_numbers(w, 0, group, lane, row_scales[0][warp], row_offsets[0][warp]);
  for (int at = 0; at < n; at += STEP) {
    const int stage = at / STEP % 2, next = at + STEP;
    copy_wait<0>();
    __syncthreads();  // this stage is there for all, and all are done with the other
    if (next < n) copy_rows(stages[1 - stage], dy, first, m, n, next);
    const float *scale = row_scales[stage][warp][lane % 4], *offset = row_offsets[stage][warp][lane % 4];
    Operand operand;
    fetch_columns(w, at, at_column, 1, lane, stored[1]);
    decode_columns(stored[0], scale, offset, meaning, operand);
    multiply(sums, stages[stage], operand, 0, lane);
    decode_columns(stored[1], scale + 8, offset + 8, meaning, operand);
    if (next < n) fetch_columns(w, next, at_column, 0, lane, stored[0]);
    if (next < n) put_numbers(w, next, group, lane, row_scales[1 - stage][warp], row_offsets[1 - stage][warp]);
    multiply(sums, stages[stage], operand, 1, lane);
  }
  store_rows(sums, dx, first, m, k, column, lane);
}
