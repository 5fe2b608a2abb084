// low = s x Aᵀ and y += low Bᵀ with the tensor core: segments of many rows, each with its adapter's matrices.
//
// For what lies where, see lora_bgmv.cu. x, low and y are bf16; in is a multiple of 16, out of 4, width of 16. low has
// zeros from an adapter's rank up to the next sixteen. A block makes a piece of at most 32 rows of one segment, and reads
// all its operands straight from memory: of 64 neighbours along in, lane (g, q) of a warp has the 16 from 16 q on, and
// the four products of 16 take them by fours, as fragments.cuh has it. So a row's numbers depend on the row and its adapter
// alone. WEIGHT: what the pool holds: float, bf16.
#include "numbers.cuh"
#include "ragged.cuh"

constexpr int SHRINK_THREADS = 256;
constexpr int EXPAND_THREADS = 128;
constexpr int ROWS = 32;  // of a piece
constexpr int WARPS = 8, SIXTEEN = 16;
constexpr int COLUMNS = 128;  // of y, that a block makes

// Four neighbours as pairs of bf16.
static __device__ __forceinline__ uint2 pairs_at(const float* from) {
  const uint4 v = load16(from);
  return {pack_bf16(__uint_as_float(v.x), __uint_as_float(v.y)), pack_bf16(__uint_as_float(v.z), __uint_as_float(v.w))};
}
static __device__ __forceinline__ uint2 pairs_at(const bf16* from) { return load8(from); }
// Those of four that are there, from any address; zeros for the others.
static __device__ __forceinline__ uint2 pairs_at(const WEIGHT* from, int there) {
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = i < there ? wide(from[i]) : 0.0f;
  return {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])};
}

// The block's warps share out k; their sums are added in the order of the warps.
extern "C" __global__ void __launch_bounds__(SHRINK_THREADS) lora_sgmv_shrink(
    const bf16* __restrict__ x, const WEIGHT* __restrict__ pool, const int64_t* __restrict__ places,
    const int* __restrict__ ranks, const float* __restrict__ factors, const int* __restrict__ ends,
    const int* __restrict__ adapters, bf16* __restrict__ low, int segments, int columns, int width) {
  __shared__ float parts[WARPS][ROWS][SIXTEEN + 4];  // two rows on, in other banks
  const Piece piece = piece_of<ROWS>(ends, segments, blockIdx.x);
  const int adapter = adapters[piece.segment], base = blockIdx.y * SIXTEEN;
  if (piece.first >= piece.end || adapter < 0 || base >= ranks[adapter]) return;
  const int rank = ranks[adapter], warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const WEIGHT* matrix = pool + places[adapter];
  float sums[ROWS / 8][4] = {};
  for (int k = warp * 64; k < columns; k += WARPS * 64) {
    const int at = k + q * 16;
    uint32_t a[4][4];  // [product][register]
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int t = 0; t < 4; t++) {
        const int r = base + g + 8 * i;
        const bool there = at < columns && r < rank;
        const uint2 pairs = there ? pairs_at(matrix + (int64_t)r * columns + at + 4 * t) : uint2{0, 0};
        a[t][i] = pairs.x;
        a[t][i + 2] = pairs.y;
      }
#pragma unroll
    for (int u = 0; u < ROWS / 8; u++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = piece.first + u * 8 + g;
        const bool there = at < columns && row < piece.end;
        const uint4 b = there ? load16(x + (int64_t)row * columns + at + 8 * half) : make_uint4(0, 0, 0, 0);
        mma_bf16(sums[u], a[2 * half], b.x, b.y);
        mma_bf16(sums[u], a[2 * half + 1], b.z, b.w);
      }
  }
#pragma unroll
  for (int u = 0; u < ROWS / 8; u++)
#pragma unroll
    for (int c = 0; c < 4; c++) parts[warp][u * 8 + 2 * q + c % 2][g + c / 2 * 8] = sums[u][c];
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * SIXTEEN; i += SHRINK_THREADS) {
    const int row = piece.first + i / SIXTEEN;
    if (row >= piece.end) continue;
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < WARPS; part++) sum += parts[part][i / SIXTEEN][i % SIXTEEN];
    low[(int64_t)row * width + base + i % SIXTEEN] = narrow<bf16>(sum * factors[adapter]);
  }
}

// A warp makes 32 columns; a lane has four neighbours of each of its rows, see fragments.cuh.
extern "C" __global__ void __launch_bounds__(EXPAND_THREADS) lora_sgmv_expand(
    const bf16* __restrict__ low, const WEIGHT* __restrict__ pool, const int64_t* __restrict__ places,
    const int* __restrict__ ranks, const int* __restrict__ ends, const int* __restrict__ adapters, bf16* __restrict__ into,
    int segments, int columns, int width) {
  const Piece piece = piece_of<ROWS>(ends, segments, blockIdx.x);
  const int adapter = adapters[piece.segment], g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  if (piece.first >= piece.end || adapter < 0) return;
  const int rank = ranks[adapter], column = blockIdx.y * COLUMNS + threadIdx.x / 32 * 32 + 4 * g;
  const WEIGHT* matrix = pool + places[adapter];
  float sums[ROWS / 8][2][4] = {};
  for (int r = 4 * q; r < rank + 4 * q; r += SIXTEEN) {
    uint32_t operand[2][4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const WEIGHT* from = matrix + (int64_t)(column + j) * rank + r;
      uint2 pairs = {0, 0};
      if (column < columns) pairs = rank % 4 == 0 && r < rank ? pairs_at(from) : pairs_at(from, rank - r);
      operand[j / 2][j % 2] = pairs.x;
      operand[j / 2][j % 2 + 2] = pairs.y;
    }
#pragma unroll
    for (int u = 0; u < ROWS / 8; u++) {
      const int row = piece.first + u * 8 + g;
      const uint2 b = row < piece.end ? load8(low + (int64_t)row * width + r) : uint2{0, 0};
#pragma unroll
      for (int i = 0; i < 2; i++) mma_bf16(sums[u][i], operand[i], b.x, b.y);
    }
  }
  if (column >= columns) return;
#pragma unroll
  for (int u = 0; u < ROWS / 8; u++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int row = piece.first + u * 8 + 2 * q + e;
      if (row >= piece.end) continue;
      bf16* y = into + (int64_t)row * columns + column;
      const uint2 old = load8(y);
      const uint32_t words[2] = {old.x, old.y};
      uint32_t sum[2];
#pragma unroll
      for (int i = 0; i < 2; i++)
        sum[i] = pack_bf16(__uint_as_float(words[i] << 16) + sums[u][i][e],
                           __uint_as_float(words[i] & 0xffff0000u) + sums[u][i][2 + e]);
      store8(y, uint2{sum[0], sum[1]});
    }
}
