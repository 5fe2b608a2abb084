// A block's tile of a product: 128 rows of x by 128 columns of the result, 4 warps of 128 by 32, x through two stages of
// shared memory.
//
// A stage has four runs of 16 neighbours of each row of x. Rows are 32 bytes longer than that, and in odd rows a run's
// halves are swapped: so neither the copies of four rows meet in a bank, nor the reads of two. See fragments.cuh for the order of
// k, and for which columns a lane has.
#pragma once
#include "numbers.cuh"

constexpr int TILE_ROWS = 128, TILE_COLUMNS = 256, TILE_THREADS = 256, ROW_TILES = TILE_ROWS / 8;
constexpr int RUNS = 4, RUN = 16, STEP = RUNS * RUN, PADDED = STEP + 16;
typedef bf16 Stage[TILE_ROWS][PADDED];
typedef float Sums[ROW_TILES][2][4];  // [tile of 8 rows of x][tile of 16 columns][register]

// x [rows, columns] as a thread copies it: half of each run, of a row of the tile and of that 64 rows on.
struct Rows {
  const bf16* from;
  int rows, columns;  // that are left from there on
};

static __device__ __forceinline__ Rows rows_of(const bf16* x, int first, int rows, int columns) {
  const int row = first + threadIdx.x / 2, half = threadIdx.x % 2 * 8;
  return {x + (int64_t)row * columns + half, rows - row, columns - half};
}

// Starts the copy of a stage, whose runs are at columns k, k + APART, …; zeros past the last row and column.
template <int APART>
static __device__ __forceinline__ void copy_rows(Stage& stage, const Rows& x, int k) {
  const int row = threadIdx.x / 2, half = (threadIdx.x % 2 ^ row % 2) * 8;
  bf16* to = &stage[row][half];
  const bf16* from = x.from + k;
#pragma unroll
  for (int run = 0; run < RUNS; run++)
    copy16_async(to + run * RUN, from + run * APART, 0 < x.rows && k + run * APART < x.columns);
  copy_commit();
}

// sums += (a xᵀ)ᵀ for half of each run of a stage.
static __device__ __forceinline__ void multiply(Sums& sums, const Stage& stage, const uint32_t (&a)[2][2][4], int half,
                                                int lane) {
#pragma unroll
  for (int u = 0; u < ROW_TILES; u++) {
    const uint4 b = load16(&stage[u * 8 + lane / 4][lane % 4 * RUN + (half ^ lane / 4 % 2) * 8]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      mma_bf16(sums[u][i], a[i][0], b.x, b.y);
      mma_bf16(sums[u][i], a[i][1], b.z, b.w);
    }
  }
}

// sums += (a lowᵀ)ᵀ for 16 values of the rank, in the order 4 q + (0, 1), (2, 3); low [rows, rank].
static __device__ __forceinline__ void multiply_low(Sums& sums, const bf16* low, int first, int rows, int rank, int r,
                                                    const uint32_t (&a)[2][4], int lane) {
#pragma unroll
  for (int u = 0; u < ROW_TILES; u++) {
    const int row = first + u * 8 + lane / 4;
    const uint2 b = row < rows ? load8(low + (int64_t)row * rank + r + lane % 4 * 4) : uint2{0, 0};
#pragma unroll
    for (int i = 0; i < 2; i++) mma_bf16(sums[u][i], a[i], b.x, b.y);
  }
}

// The 4 neighbours that a lane has of each of its rows, to y [rows, columns] from column `column` on.
static __device__ __forceinline__ void store_rows(const Sums& sums, bf16* y, int first, int rows, int columns, int column,
                                                  int lane) {
  const int at = column + lane / 4 * 4;
  if (at >= columns) return;
#pragma unroll
  for (int u = 0; u < ROW_TILES; u++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int row = first + u * 8 + lane % 4 * 2 + e;
      if (row >= rows) continue;
      const uint2 four = {pack_bf16(sums[u][0][e], sums[u][0][2 + e]), pack_bf16(sums[u][1][e], sums[u][1][2 + e])};
      store8(y + (int64_t)row * columns + at, four);
    }
}
