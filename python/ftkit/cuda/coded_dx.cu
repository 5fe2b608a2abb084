// dx = dy W + dlow A, W in 4-bit codes: the gradient that goes down.
//
// A block makes 128 rows and 128 columns, each of its 4 warps 64 by 64; the sum goes over W's rows, 64 a step. Of these,
// each thread decodes 64 neighbours of one to shared memory: their 16 values are computed once. Both operands come from
// there by ldmatrix, W's turned.
//
// dlow = s dy B [m, rank], rank a multiple of 16. dy, dlow, A and dx are bf16, sums float32; k is a multiple of 64 and of
// GROUP, n of 8. See codes.cuh for GROUP, SCALE and OFFSETS.
#include "codes.cuh"
#include "pieces.cuh"

constexpr int THREADS = 128;
constexpr int TILE = 128, STEP = 64, WARP_TILE = 64;
constexpr int COPIES = TILE * STEP / PIECE / THREADS;  // of a thread, for a step
typedef bf16 Left[TILE][STEP];   // rows of dy
typedef bf16 Right[STEP][TILE];  // rows of W
typedef float Sums[WARP_TILE / 16][WARP_TILE / 8][4];

// x [rows, columns] as a thread copies it: a piece of each sixteenth row of the tile; past the last row, that one again.
struct Rows {
  const bf16* from;
  int columns;  // that are left from there on
  uint32_t at[COPIES];
};

static __device__ __forceinline__ Rows rows_of(const bf16* x, int first, int rows, int columns) {
  const int piece = threadIdx.x % 8 * PIECE;
  Rows found = {x + (int64_t)first * columns + piece, columns - piece, {}};
#pragma unroll
  for (int i = 0; i < COPIES; i++) found.at[i] = min((int)threadIdx.x / 8 + i * 16, rows - first - 1) * columns;
  return found;
}

// Starts the copy of columns k … k + 63; zeros past the last one.
static __device__ __forceinline__ void copy_left(Left& left, const Rows& x, int k) {
  bf16* to = &left[threadIdx.x / 8][(threadIdx.x % 8 ^ threadIdx.x / 8 % 8) * PIECE];
  const bf16* from = x.from + k;
#pragma unroll
  for (int i = 0; i < COPIES; i++) copy16_async(to + i * 16 * STEP, from + x.at[i], k < x.columns);
}

// Halves of the codes of two neighbouring rows, of which one is the thread's, and its own row's numbers.
struct Fetched {
  uint4 of_even, of_odd;
  Number numbers[SETS];
};

// Where a thread's rows are: of each pair of rows, the even lane has the first halves of both runs, the odd one the second.
// So two lanes read 32 neighbouring bytes.
struct Place {
  int row, odd, run, runs;  // run: of a row, runs: of W's rows
};

static __device__ __forceinline__ uint4 half_of(const Stored& w, const Place& place, int row) {
  return load16(w.codes + (uint64_t)(uint32_t)(row * place.runs + place.run) * (RUN_OF_CODES / 2) + place.odd * 16);
}

// Codes and numbers of W's rows first … first + 63; past the last row, those of that one.
static __device__ __forceinline__ void fetch(const Stored& w, const Place& place, int first, int rows, Fetched& fetched) {
  const int even = min(first + (place.row & ~1), rows - 1), odd = min(first + (place.row | 1), rows - 1);
  const uint32_t run = (place.odd ? odd : even) * place.runs + place.run;
  fetched.of_even = half_of(w, place, even);
  fetched.of_odd = half_of(w, place, odd);
#pragma unroll
  for (int set = 0; set < SETS; set++) fetched.numbers[set] = number_of(w, run, SETS == 2 ? set ^ place.odd : 0);
}

// Them to bf16 in shared memory.
static __device__ __forceinline__ void decode(const Fetched& fetched, const Place& place, const float (&meaning)[4][4],
                                              Right& right) {
  const uint4 mine = place.odd ? fetched.of_odd : fetched.of_even, its = place.odd ? fetched.of_even : fetched.of_odd;
  const uint32_t words[2][4] = {{mine.x, mine.y, mine.z, mine.w},
                                {__shfl_xor_sync(~0u, its.x, 1), __shfl_xor_sync(~0u, its.y, 1),
                                 __shfl_xor_sync(~0u, its.z, 1), __shfl_xor_sync(~0u, its.w, 1)}};
  char* const to = (char*)&right[place.row][threadIdx.x / STEP * RUN_OF_CODES];
  const uint32_t turned = (place.row % 8 ^ place.odd * 4) * 16;
  Values values;
#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (half < SETS) multiply_out(meaning[i], fetched.numbers[half], i, values);
#pragma unroll
    for (int word = 0; word < 4; word++) {
      uint32_t pairs[4];
      look_up(words[half][word], values, pairs);
      store16(to + (turned ^ (half * 4 + word) * 16), uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
    }
  }
}

// Sums += left right, for 16 of the step's values of the sum.
static __device__ __forceinline__ void multiply(Sums& sums, const Left& left, const Right& right, int sixteen, int lane,
                                                int warp) {
  uint32_t a[WARP_TILE / 16][4];
#pragma unroll
  for (int i = 0; i < WARP_TILE / 16; i++) load_left(a[i], left, warp % 2 * WARP_TILE + i * 16, sixteen * 16, lane);
#pragma unroll
  for (int j = 0; j < WARP_TILE / 16; j++) {
    uint32_t b[4];
    load_right_turned(b, right, sixteen * 16, warp / 2 * WARP_TILE + j * 16, lane);
#pragma unroll
    for (int i = 0; i < WARP_TILE / 16; i++) {
      mma_bf16(sums[i][2 * j], a[i], b[0], b[1]);
      mma_bf16(sums[i][2 * j + 1], a[i], b[2], b[3]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) coded_dx(
    const bf16* __restrict__ dy, const uint8_t* __restrict__ codes, const float* __restrict__ table,
    const SCALE* __restrict__ scales, const float* __restrict__ map, const float* __restrict__ greatest,
    const float* __restrict__ mean, const half* __restrict__ offsets, const bf16* __restrict__ dlow,
    const bf16* __restrict__ a, bf16* __restrict__ dx, int m, int n, int k, int rank) {
  __align__(16) __shared__ Left left[2];
  __align__(16) __shared__ Right right;
  const int t = threadIdx.x, lane = t % 32, warp = t / 32, first = blockIdx.x * TILE, column = blockIdx.y * TILE;
  const Stored w{codes, scales, Nested{map, greatest, mean}, offsets};
  const int runs = k / RUN_OF_CODES;
  const Place place{t % STEP, t % 2, min(column / RUN_OF_CODES + t / STEP, runs - 1), runs};
  float meaning[4][4];
#pragma unroll
  for (int i = 0; i < 16; i++) meaning[i / 4][i % 4] = table[i];
  const Rows rows = rows_of(dy, first, m, n);
  Sums sums = {};
  Fetched fetched;
  copy_left(left[0], rows, 0);
  copy_commit();
  fetch(w, place, 0, n, fetched);
  for (int at = 0; at < n; at += STEP) {
    const int stage = at / STEP % 2, next = at + STEP;
    __syncthreads();  // all are done with the step before
    if (next < n) copy_left(left[1 - stage], rows, next);
    copy_commit();
    decode(fetched, place, meaning, right);
    if (next < n) fetch(w, place, next, n, fetched);
    copy_wait<1>();
    __syncthreads();  // this stage is there for all, and W
#pragma unroll
    for (int sixteen = 0; sixteen < STEP / 16; sixteen++) multiply(sums, left[stage], right, sixteen, lane, warp);
  }
  const Rows low_rows = rows_of(dlow, first, m, rank);
  for (int r = 0; r < rank; r += STEP) {
    __syncthreads();  // all are done with the step before
    copy_left(left[0], low_rows, r);
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      const int row = t / 16 + i * 8, piece = t % 16;
      const bool there = r + row < rank && column + piece * PIECE < k;
      copy16_async(&right[row][(piece ^ row % 8) * PIECE], there ? a + (int64_t)(r + row) * k + column + piece * PIECE : a, there);
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();  // both are there for all
#pragma unroll 1
    for (int sixteen = 0; sixteen < min(STEP, rank - r) / 16; sixteen++) multiply(sums, left[0], right, sixteen, lane, warp);
  }
#pragma unroll
  for (int i = 0; i < WARP_TILE / 16; i++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int row = first + warp % 2 * WARP_TILE + i * 16 + lane / 4 + 8 * e;
#pragma unroll
      for (int j = 0; j < WARP_TILE / 16; j++) {
        const int at = column + warp / 2 * WARP_TILE + j * 16;
        store_pieces(dx + (int64_t)row * k + at, &sums[i][2 * j][2 * e], &sums[i][2 * j + 1][2 * e], row < m && at < k, lane);
      }
    }
}
