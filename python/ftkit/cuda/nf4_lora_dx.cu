// dx = dy W + dlow A, W in NF4: the gradient that goes down.
//
// The sum goes over W's rows, and the first operand is Wᵀ: lane (g, q) has the rows 16 q + 4 t + … of 64, and of them the
// columns 4 g + j, two bytes of codes. dlow = s dy B [m, rank], rank a multiple of 16. dy, dlow, A and dx are bf16; k is a
// multiple of 64, n of 8. SCALE: float, or uint8_t for nested scales.
#include "nf4.cuh"
#include "tile.cuh"

constexpr int THREADS = 128;

// W as a lane sees it: its columns of every row.
struct Columns {
  const uint8_t* codes;
  int row_bytes, rows;
};

// Codes of half of a step: rows first + 16 q + 8 half + …, of which all or none are there; past the last, those of any.
static __device__ __forceinline__ void fetch_columns(const Columns& w, int first, int half, int lane, uint16_t (&codes)[8]) {
  const uint8_t* from = w.codes + (int64_t)min(first + lane % 4 * 16 + half * 8, w.rows - 8) * w.row_bytes;
#pragma unroll
  for (int i = 0; i < 8; i++) codes[i] = *(const uint16_t*)(from + (int64_t)i * w.row_bytes);
}

// The scale of W's row at a column; past the last, that one's: dy is zero there, or the result nobody's.
static __device__ __forceinline__ float scale_at(const SCALE* scales, Nested nested, int row, int column, int rows,
                                                 int columns) {
  const uint32_t group = min(row, rows - 1) * (columns / GROUP) + min(column, columns - 1) / GROUP;
  return scale_of(scales, nested, group);
}

// What the 4 bits of a word from `shift` on mean. Their offset in the table is had without another multiplication.
static __device__ __forceinline__ float meaning_of(const float* meaning, uint32_t word, int shift) {
  const uint32_t offset = (shift < 2 ? word << (2 - shift) : word >> (shift - 2)) & 60;
  return *(const float*)((const char*)meaning + offset);
}

// Them to pairs of bf16 of neighbouring rows; scales are those of the 8 rows.
static __device__ __forceinline__ void decode_columns(const uint16_t (&codes)[8], const float* scales,
                                                      const float* meaning, Operand& a) {
#pragma unroll
  for (int t = 0; t < 2; t++) {
    float scale[4], values[4][LANE_ROWS];
    load_four(scales + 4 * t, scale);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < LANE_ROWS; j++)
        values[i][j] = meaning_of(meaning, codes[4 * t + i], j / 2 * 8 + (j % 2 ? 0 : 4)) * scale[i];
#pragma unroll
    for (int j = 0; j < LANE_ROWS; j++)
#pragma unroll
      for (int pair = 0; pair < 2; pair++)
        a[j / 2][t][j % 2 + 2 * pair] = pack_bf16(values[2 * pair][j], values[2 * pair + 1][j]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) nf4_lora_dx(
    const bf16* __restrict__ dy, const uint8_t* __restrict__ codes, const float* __restrict__ table,
    const SCALE* __restrict__ scales, const float* __restrict__ map, const float* __restrict__ greatest,
    const float* __restrict__ mean, const bf16* __restrict__ dlow, const bf16* __restrict__ a, bf16* __restrict__ dx,
    int m, int n, int k, int rank) {
  __shared__ Stage stages[2];
  __align__(16) __shared__ float scales_of[2][TILE_COLUMNS / GROUP][4][20];  // 16 rows, in other banks than the next
  __shared__ float meaning[16];
  const int t = threadIdx.x, lane = t % 32, warp_column = t / 32 * WARP_COLUMNS;
  const int first = blockIdx.x * TILE_ROWS, tile = blockIdx.y * TILE_COLUMNS, column = tile + warp_column;
  const int at_column = column + lane / 4 * LANE_ROWS;
  const Columns w{codes + min(at_column, k - LANE_ROWS) / 2, k / 2, n};
  const Nested nested{map, greatest, mean};
  const Rows rows = rows_of(dy, first, m, n);
  if (t < 16) meaning[t] = table[t];
  Sums sums = {};
  uint16_t stored[2][8];
  copy_rows<RUN>(stages[0], rows, 0);
  fetch_columns(w, 0, 0, lane, stored[0]);
  scales_of[0][t / STEP][t % STEP / 16][t % 16] = scale_at(scales, nested, t % STEP, tile + t / STEP * GROUP, n, k);
  for (int at = 0; at < n; at += STEP) {
    const int stage = at / STEP % 2, next = at + STEP;
    copy_wait<0>();
    __syncthreads();  // this stage is there for all, and all are done with the other
    if (next < n) copy_rows<RUN>(stages[1 - stage], rows, next);
    const float next_scale = scale_at(scales, nested, next + t % STEP, tile + t / STEP * GROUP, n, k);
    const float* scale = scales_of[stage][warp_column / GROUP][lane % 4];
    Operand operand;
    fetch_columns(w, at, 1, lane, stored[1]);
    decode_columns(stored[0], scale, meaning, operand);
    multiply(sums, stages[stage], operand, 0, lane);
    if (next < n) fetch_columns(w, next, 0, lane, stored[0]);
    decode_columns(stored[1], scale + 8, meaning, operand);
    multiply(sums, stages[stage], operand, 1, lane);
    scales_of[1 - stage][t / STEP][t % STEP / 16][t % 16] = next_scale;
  }
  for (int r = 0; r < rank; r += 16) {
    uint2 rows[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      rows[i] = column < k ? load8(a + (int64_t)(r + lane % 4 * 4 + i) * k + column + lane / 4 * LANE_ROWS) : uint2{0, 0};
    uint32_t operand[2][4];
#pragma unroll
    for (int j = 0; j < LANE_ROWS; j++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint2 one = rows[2 * half], two = rows[2 * half + 1];
        const uint32_t upper = j < 2 ? one.x : one.y, lower = j < 2 ? two.x : two.y;
        operand[j / 2][j % 2 + 2 * half] = j % 2 ? upper >> 16 | (lower & 0xffff0000u) : (upper & 0xffffu) | lower << 16;
      }
    multiply_low(sums, dlow, first, m, rank, r, operand, lane);
  }
  store_rows(sums, dx, first, m, k, column, lane);
}
