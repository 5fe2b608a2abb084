// A block's tile of a product: 128 rows of x by 128 columns of the result, 4 warps of 128 by 32, x through two stages of
// shared memory, whose rows are 16 bytes longer than their 64 values: so neighbours lie in different banks.
#pragma once
#include "int4.cuh"

constexpr int TILE_ROWS = 128, TILE_COLUMNS = 128, TILE_THREADS = 128, ROW_TILES = TILE_ROWS / 8;
typedef bf16 Stage[TILE_ROWS][STEP + 8];
typedef float Sums[ROW_TILES][2][4];  // [tile of 8 rows of x][tile of 16 columns][register]

// Starts the copy of columns k … k + 63 of x [rows, columns], from row `first` on, to a stage; zeros past the last row
// and column.
static __device__ __forceinline__ void copy_rows(Stage& stage, const bf16* x, int first, int rows, int columns, int k) {
  const int column = threadIdx.x % 8 * 8;
#pragma unroll
  for (int row = threadIdx.x / 8; row < TILE_ROWS; row += TILE_THREADS / 8) {
    const bool there = first + row < rows && k + column < columns;
    copy16_async(&stage[row][column], there ? x + (int64_t)(first + row) * columns + k + column : x, there);
  }
  copy_commit();
}

// sums += (a xᵀ)ᵀ for half of the 64 values of k in a stage.
static __device__ __forceinline__ void multiply(Sums& sums, const Stage& stage, const Operand& a, int half, int lane) {
#pragma unroll
  for (int u = 0; u < ROW_TILES; u++) {
    const uint4 b = load16(&stage[u * 8 + lane / 4][lane % 4 * 16 + half * 8]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      mma_bf16(sums[u][i], a[i][0], b.x, b.y);
      mma_bf16(sums[u][i], a[i][1], b.z, b.w);
    }
  }
}

// The 4 neighbours that a lane has of each of its rows, to y [rows, columns] from column `column` on.
static __device__ __forceinline__ void store_rows(const Sums& sums, bf16* y, int first, int rows, int columns, int column,
                                                  int lane) {
  const int at = column + lane / 4 * LANE_ROWS;
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
