// Where rows of a ragged stream belong: segments one after another, of which any may be empty.
#pragma once

// The segment that a row is of: the last whose first row isn't after it.
static __device__ __forceinline__ int segment_of(const int* ends, int segments, int row) {
  int low = 0, high = segments - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (ends[middle] <= row)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// Rows first … end − 1 of one segment; none where end isn't after first.
struct Piece {
  int segment, first, end;
};

// Which piece of at most ROWS rows a block makes. Segment s has the slots from ends[s] / ROWS + s on: never fewer than its
// pieces, so that no sums over segments are needed. All slots are rows / ROWS + segments.
template <int ROWS>
static __device__ __forceinline__ Piece piece_of(const int* ends, int segments, int slot) {
  int low = 0, high = segments - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (ends[middle] / ROWS + middle <= slot)
      low = middle;
    else
      high = middle - 1;
  }
  const int first = ends[low] + (slot - ends[low] / ROWS - low) * ROWS;
  return {low, first, min(first + ROWS, ends[low + 1])};
}
