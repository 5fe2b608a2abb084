// y = x Wᵀ + low Bᵀ for at most 16 rows of x, W in 4-bit codes: decoding for several sequences at once.
//
// The block's 8 warps share out k, each every eighth span, and make the same 32 columns; their sums are added in the order
// of the warps. So a number depends on its row and on k alone. x is read straight from memory into the second operand's
// registers; see fragments.cuh for the order of k. A lane past the end of its row reads the last of it again, times a W of
// zero: a number that isn't finite there is met twice. low = s x Aᵀ float [m, rank]; x, B and y are bf16; k is a multiple of 64
// and of GROUP, n of 4. See codes.cuh for GROUP, SCALE and OFFSETS.
//
// ptxas -O1: above it, registers are filled with what is loaded ahead, and others spilled.
#include "fragments.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = 8, ROWS = 16;
constexpr int BLOCKS = OFFSETS || SETS > 1 ? 1 : 2;  // at once: with more numbers there are too few registers

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) coded_decode(
    const bf16* __restrict__ x, const uint8_t* __restrict__ codes, const float* __restrict__ table,
    const SCALE* __restrict__ scales, const float* __restrict__ map, const float* __restrict__ greatest,
    const float* __restrict__ mean, const half* __restrict__ offsets, const float* __restrict__ low,
    const bf16* __restrict__ b, bf16* __restrict__ y, int m, int n, int k, int rank) {
  __align__(16) __shared__ float meaning[16];
  __shared__ float parts[WARPS][ROWS][WARP_COLUMNS + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * WARP_COLUMNS;
  const Weights w = weights_of(Stored{codes, scales, Nested{map, greatest, mean}, offsets}, n, k, column, lane);
  if (threadIdx.x < 16) meaning[threadIdx.x] = table[threadIdx.x];
  __syncthreads();
  float sums[2][2][4] = {};  // [tile of 8 rows of x][tile of 16 columns][register]
  Codes stored[2];
  Numbers numbers;
  const int start = warp * SPAN, left = k - lane % 4 * RUN_OF_CODES;
  const int row = min(lane / 4, m - 1), more = (min(lane / 4 + 8, m - 1) - row) * k;  // past the last row, that one again
  const bf16* from = x + (int64_t)row * k + (run_of(w, start, lane) - w.first) * RUN_OF_CODES;
  const bf16* other = from + more;
  fetch(w, start, 0, lane, stored[0]);
  fetch(w, start, 1, lane, stored[1]);
  fetch_numbers(w, start, lane, numbers);
  for (int span = start; span < k; span += WARPS * SPAN) {
    const int then = span + WARPS * SPAN;
    Values values[LANE_ROWS];
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      if (multiply_out(meaning, numbers, part, values)) fetch_numbers(w, then, lane, numbers);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int at = part * (RUN_OF_CODES / PARTS) + half * 8;
        const uint4 b[2] = {load16(from + at), load16(other + at)};
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
          uint32_t a[2][4];
          decode(stored[part / 2], part % 2 * 2 + half, values, tile, a);
#pragma unroll
          for (int u = 0; u < 2; u++) {
            if (u && m <= 8) continue;  // the second tile of rows is empty
            mma_bf16(sums[u][tile], a[0], b[u].x, b[u].y);
            mma_bf16(sums[u][tile], a[1], b[u].z, b[u].w);
          }
        }
      }
      if (part % 2 && then < k) fetch(w, then, part / 2, lane, stored[part / 2]);
    }
    if (then < left) {  // the pointers are moved, for the assembler would work them out anew for every load
      from += WARPS * SPAN;
      other += WARPS * SPAN;
    }
  }
#pragma unroll
  for (int u = 0; u < 2; u++)
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int c = 0; c < 4; c++)
        parts[warp][u * 8 + lane % 4 * 2 + c % 2][lane / 4 * 4 + i * 2 + c / 2] = sums[u][i][c];
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * WARP_COLUMNS; i += THREADS) {
    const int row = i / WARP_COLUMNS, place = i % WARP_COLUMNS;
    if (row >= m || column + place >= n) continue;
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < WARPS; part++) sum += parts[part][row][place];
    for (int r = 0; r < rank; r++) sum += low[row * rank + r] * wide(b[(int64_t)(column + place) * rank + r]);
    y[(int64_t)row * n + column + place] = narrow<bf16>(sum);
  }
}
