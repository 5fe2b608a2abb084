// A block's tile of a product: 128 rows by 128 columns, 4 warps of 128 by 32, x through two stages of shared memory.
//
// Rows of x in shared memory are 16 bytes longer than their 64 values: then the two rows that are read in one round lie in
// different banks. See nf4.cuh for the order of k.
#pragma once
#include "numbers.cuh"

constexpr int TILE_ROWS = 128, TILE_COLUMNS = 128, TILE_THREADS = 128, ROW_TILES = TILE_ROWS / 16;
constexpr int STEP = 64, PADDED = STEP + 8;
typedef bf16 Stage[TILE_ROWS][PADDED];
typedef float Sums[ROW_TILES][4][4];  // [tile of 16 rows][tile of 8 columns][register]

// Starts the copy of columns k … k + 63 of x [rows, columns], from row `first` on, to a stage; zeros
// past the last row and column.
static __device__ __forceinline__ void copy_rows(Stage& stage, const bf16* x, int first, int rows, int columns, int k) {
#pragma unroll
  for (int i = 0; i < TILE_ROWS * STEP / 8 / TILE_THREADS; i++) {
    const int piece = threadIdx.x + i * TILE_THREADS, row = piece / 8, column = piece % 8 * 8;
    const bool there = first + row < rows && k + column < columns;
    copy16_async(&stage[row][column], there ? x + (int64_t)(first + row) * columns + k + column : x, there);
  }
  copy_commit();
}

// sums += x bᵀ for the 64 values of k in a stage.
static __device__ __forceinline__ void multiply(Sums& sums, const Stage& stage, const uint32_t (&b)[4][4][2], int lane) {
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4 upper = load16(&stage[i * 16 + lane / 4][lane % 4 * 16 + half * 8]);
      const uint4 lower = load16(&stage[i * 16 + 8 + lane / 4][lane % 4 * 16 + half * 8]);
      const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y}, second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        mma_bf16(sums[i][j], first, b[j][half * 2][0], b[j][half * 2][1]);
        mma_bf16(sums[i][j], second, b[j][half * 2 + 1][0], b[j][half * 2 + 1][1]);
      }
    }
}

// sums += low · other for 16 values of the rank; low [rows, rank], `b` as mma takes it, in the order 4 q + (0, 1), (2, 3).
static __device__ __forceinline__ void multiply_low(Sums& sums, const bf16* low, int first, int rows, int rank, int r,
                                                    const uint32_t (&b)[4][2], int lane) {
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++) {
    uint2 halves[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = first + i * 16 + h * 8 + lane / 4;
      halves[h] = row < rows ? load8(low + (int64_t)row * rank + r + lane % 4 * 4) : uint2{0, 0};
    }
    const uint32_t a[4] = {halves[0].x, halves[1].x, halves[0].y, halves[1].y};
#pragma unroll
    for (int j = 0; j < 4; j++) mma_bf16(sums[i][j], a, b[j][0], b[j][1]);
  }
}

// The 8 neighbours that a lane has of each of its rows, to y [rows, columns] from column `column` on.
static __device__ __forceinline__ void store_rows(const Sums& sums, bf16* y, int first, int rows, int columns, int column,
                                                  int lane) {
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = first + i * 16 + h * 8 + lane / 4, at = column + lane % 4 * 8;
      float values[8];
#pragma unroll
      for (int c = 0; c < 8; c++) values[c] = sums[i][c % 4][h * 2 + c / 4];
      if (row < rows && at < columns) store8(y + (int64_t)row * columns + at, values);
    }
}
