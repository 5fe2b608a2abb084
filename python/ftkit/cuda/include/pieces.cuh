// Matrices in shared memory in pieces of eight neighbours, for ldmatrix: of row r, piece p lies where p ^ r % 8 would lie
// otherwise. So neither eight lanes that copy a row meet in a bank, nor the reads of a piece of eight rows.
//
// With g = lane / 4 and q = lane % 4, see ptx.cuh for the fragments of the tensor core's operands.
#pragma once
#include "numbers.cuh"

constexpr int PIECE = 8;

// Sixteen rows from `row` on and sixteen columns from `column` on, as a first operand.
template <int COLUMNS>
static __device__ __forceinline__ void load_left(uint32_t (&a)[4], const bf16 (*matrix)[COLUMNS], int row, int column, int lane) {
  ldmatrix_x4(a, &matrix[row + lane % 16][column ^ (lane / 16 ^ lane % 8) * PIECE]);
}
// Sixteen rows and columns as second operands, whose columns are the rows: b[0], b[1] of the first eight rows.
template <int COLUMNS>
static __device__ __forceinline__ void load_right(uint32_t (&b)[4], const bf16 (*matrix)[COLUMNS], int row, int column, int lane) {
  ldmatrix_x4(b, &matrix[row + lane % 8 + lane / 16 * 8][column ^ (lane / 8 % 2 ^ lane % 8) * PIECE]);
}
// Sixteen rows and columns as second operands: b[0], b[1] of the first eight columns.
template <int COLUMNS>
static __device__ __forceinline__ void load_right_turned(uint32_t (&b)[4], const bf16 (*matrix)[COLUMNS], int row, int column,
                                                         int lane) {
  ldmatrix_x4_transposed(b, &matrix[row + lane % 16][column ^ (lane / 16 ^ lane % 8) * PIECE]);
}

// Two neighbouring pieces of a row, of which the lane has neighbours 2 q and 2 q + 1 of each, to where the row's first of
// them goes: from its neighbour a lane gets two more of one piece, and gives two of the other.
static __device__ __forceinline__ void store_pieces(bf16* to, const float* one, const float* two, bool there, int lane) {
  const int odd = lane % 2;
  const uint32_t pairs[2] = {pack_bf16(one[0], one[1]), pack_bf16(two[0], two[1])};
  const uint32_t got = __shfl_xor_sync(~0u, odd ? pairs[0] : pairs[1], 1);
  if (there) store8(to + odd * PIECE + lane % 4 / 2 * 4, odd ? uint2{got, pairs[1]} : uint2{pairs[0], got});
}
