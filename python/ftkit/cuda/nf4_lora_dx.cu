// dx = dy W + dlow A, W in NF4: the gradient that goes down.
//
// The sum goes over W's rows: lane (g, q) has the rows 16 q + 4 t + i of 64, and of them the columns 4 g + j, two bytes
// of codes. dlow = s dy B [m, rank], rank a multiple of 16. dy, dlow, A and dx are bf16; k is a multiple of 64, n of 8.
// SCALE: float, or uint8_t for nested scales.
#include "nf4.cuh"
#include "tile.cuh"

constexpr int THREADS = 128;

// Rows `first` + 16 q …, columns `column` + 4 g + j; rows past the last are zeros.
static __device__ __forceinline__ void fetch_and_decode(const Weights<SCALE>& w, int first, int column, int lane,
                                                        const float* meaning, Operand& b) {
#pragma unroll
  for (int t = 0; t < 4; t++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float values[2][TILES];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = first + lane % 4 * 16 + t * 4 + i * 2 + h;
        const bool there = row < w.rows && column < w.columns;
        const int64_t place = there ? (int64_t)row * w.columns + column + lane / 4 * 4 : 0;
        const uint32_t codes = *(const uint16_t*)(w.codes + place / 2);
        const float scale = there ? scale_of(w.scales, w.nested, place / K_STEP) : 0.0f;
#pragma unroll
        for (int j = 0; j < TILES; j++) values[h][j] = meaning[codes >> (j / 2 * 8 + (j % 2 ? 0 : 4)) & 15] * scale;
      }
#pragma unroll
      for (int j = 0; j < TILES; j++) b[j][t][i] = pack_bf16(values[0][j], values[1][j]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) nf4_lora_dx(
    const bf16* __restrict__ dy, const uint8_t* __restrict__ codes, const float* __restrict__ table,
    const SCALE* __restrict__ scales, const float* __restrict__ map, const float* __restrict__ greatest,
    const float* __restrict__ mean, const bf16* __restrict__ dlow, const bf16* __restrict__ a, bf16* __restrict__ dx,
    int m, int n, int k, int rank) {
  __shared__ Stage stages[2];
  __shared__ float meaning[16];
  const int lane = threadIdx.x % 32;
  const int first = blockIdx.x * TILE_ROWS, column = blockIdx.y * TILE_COLUMNS + threadIdx.x / 32 * WARP_COLUMNS;
  const Weights<SCALE> w{codes, scales, Nested{map, greatest, mean}, n, k};
  if (threadIdx.x < 16) meaning[threadIdx.x] = table[threadIdx.x];
  Sums sums = {};
  copy_rows(stages[0], dy, first, m, n, 0);
  for (int at = 0; at < n; at += STEP) {
    const int stage = at / STEP % 2;
    copy_wait<0>();
    __syncthreads();  // this stage is there for all, and all are done with the other
    if (at + STEP < n) copy_rows(stages[1 - stage], dy, first, m, n, at + STEP);
    Operand operand;
    fetch_and_decode(w, at, column, lane, meaning, operand);
    multiply(sums, stages[stage], operand, lane);
  }
  for (int r = 0; r < rank; r += 16) {
    uint2 rows[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      rows[i] = column < k ? load8(a + (int64_t)(r + lane % 4 * 4 + i) * k + column + lane / 4 * 4) : uint2{0, 0};
    uint32_t operand[TILES][2];
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t upper = j < 2 ? rows[2 * i].x : rows[2 * i].y, lower = j < 2 ? rows[2 * i + 1].x : rows[2 * i + 1].y;
        operand[j][i] = j % 2 ? upper >> 16 | (lower & 0xffff0000u) : (upper & 0xffffu) | lower << 16;
      }
    multiply_low(sums, dlow, first, m, rank, r, operand, lane);
  }
  store_rows(sums, dx, first, m, k, column, lane);
}
