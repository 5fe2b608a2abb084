// y = Σ softmax(scale q · k) v over the cache pages of a token's sequence, for many new tokens of one: prompts and their
// chunks. See kernels/paged_attention.py.
//
// A block makes one head of a piece of 64 rows of one sequence, 16 rows a warp, with the tensor core; 32 positions at a
// time come through two stages of shared memory, and greatest scores and sums are carried along. Steps begin at multiples
// of 32 of the position, whatever the piece, and what a row may not see changes nothing to the bit: so a prompt in chunks
// gives what it gives in one. Of 16 positions, lane (g, q) of a warp has weights of the four from 4 q on; they lie in
// shared memory in an order in which both products read them without conflicts. Positions rise in a sequence. Nothing
// outside of the first row's window and after the last row is read. HEAD: values of a head, a multiple of 16.
#include "numbers.cuh"
#include "ragged.cuh"

constexpr int THREADS = 128;
constexpr int ROWS = 64;  // of a piece
constexpr int KEYS = 32, TILES = HEAD / 8, STEPS = HEAD / 16, WIDE = HEAD / 32;
constexpr int PADDED = HEAD + (HEAD % 32 ? 0 : 16);
typedef bf16 Stage[2][KEYS][PADDED];  // keys and values

struct Cache {
  const bf16* head;  // the first page's first key of this layer and head
  const int* table;  // of the sequence
  int block_tokens, token_values;
  int64_t page_values;
};

// Starts the copy of positions base … base + 31 to a stage, zeros for those before `first` and after `last`. Four lanes
// take a position.
static __device__ __forceinline__ void copy_positions(Stage& stage, const Cache& cache, int base, int first, int last) {
  const int key = threadIdx.x / 4, place = base + key, q = key / 4 % 4, e = key % 4;
  const bool there = place >= first && place <= last;
  const int64_t page = there ? cache.table[place / cache.block_tokens] : 0;
  const bf16* from = cache.head + page * cache.page_values + (there ? place % cache.block_tokens : 0) * cache.token_values;
  const int64_t to_values = (int64_t)cache.block_tokens * cache.token_values;
  bf16* keys = stage[0][key / 16 * 16 + e / 2 * 8 + q * 2 + e % 2];
  bf16* values = stage[1][key / 16 * 16 + e * 4 + q];
  for (int at = threadIdx.x % 4 * 8; at < HEAD; at += 32) {
    copy16_async(keys + at, there ? from + at : cache.head, there);
    copy16_async(values + at, there ? from + to_values + at : cache.head, there);
  }
  copy_commit();
}

extern "C" __global__ void __launch_bounds__(THREADS) paged_prefill(
    const bf16* __restrict__ q, const bf16* __restrict__ pages, const int* __restrict__ block_table,
    const int* __restrict__ ends, const int* __restrict__ positions, bf16* __restrict__ y, int sequences, int blocks,
    int heads, int key_value_heads, int block_tokens, int64_t page_values, int64_t layer_start, float scale, int window) {
  __align__(16) __shared__ Stage stages[2];
  const Piece piece = piece_of<ROWS>(ends, sequences, blockIdx.x);
  if (piece.first >= piece.end) return;
  const int head = blockIdx.y, lane = threadIdx.x % 32, g = lane / 4, quad = lane % 4;
  const Cache cache{pages + layer_start + head / (heads / key_value_heads) * HEAD,
                    block_table + (int64_t)piece.segment * blocks, block_tokens, key_value_heads * HEAD, page_values};
  const int warp_row = piece.first + threadIdx.x / 32 * 16, last = positions[piece.end - 1];
  const int first = window ? max(0, positions[piece.first] - window + 1) : 0;
  const int warp_last = warp_row < piece.end ? positions[min(warp_row + 15, piece.end - 1)] : -1;
  int place[2];
  uint32_t query[STEPS][4];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = warp_row + g + 8 * i;
    place[i] = row < piece.end ? positions[row] : -1;
#pragma unroll
    for (int d = 0; d < STEPS; d++) {
      const bf16* from = q + ((int64_t)row * heads + head) * HEAD + d * 16 + quad * 4;
      const uint2 four = row < piece.end ? load8(from) : uint2{0, 0};
      query[d][i] = four.x;
      query[d][i + 2] = four.y;
    }
  }
  const float least = -__uint_as_float(0x7f800000u);
  float most[2] = {least, least}, sum[2] = {}, output[TILES][4] = {};
  const int begin = first / KEYS * KEYS;
  copy_positions(stages[0], cache, begin, first, last);
  for (int base = begin; base <= last; base += KEYS) {
    const int now = (base - begin) / KEYS % 2;
    copy_wait<0>();
    __syncthreads();  // this stage is there for all, and all are done with the other
    if (base + KEYS <= last) copy_positions(stages[1 - now], cache, base + KEYS, first, last);
    if (base > warp_last) continue;  // nothing to see for this warp
    const Stage& stage = stages[now];
    float scores[KEYS / 8][4] = {};
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
      for (int d = 0; d < STEPS; d++) {
        const uint2 b = load8(&stage[0][j * 8 + g][d * 16 + quad * 4]);
        mma_bf16(scores[j], query[d], b.x, b.y);
      }
    float kept[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float greatest = most[i];
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int at = base + j / 2 * 16 + quad * 4 + j % 2 * 2 + e;
          const bool seen = at <= place[i] && (!window || at > place[i] - window);
          float& score = scores[j][2 * i + e];
          score = seen ? score * scale : least;
          greatest = fmaxf(greatest, score);
        }
      greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, 1));
      greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, 2));
      const float from = greatest == least ? 0.0f : greatest;  // a row that has seen nothing yet
      kept[i] = expf(most[i] - from);
      most[i] = greatest;
      sum[i] *= kept[i];
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& score = scores[j][2 * i + e];
          score = expf(score - from);
          sum[i] += score;
        }
    }
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int c = 0; c < 4; c++) output[n][c] *= kept[c / 2];
#pragma unroll
    for (int t = 0; t < KEYS / 16; t++) {
      const float(&low)[4] = scores[2 * t], (&high)[4] = scores[2 * t + 1];
      const uint32_t a[4] = {pack_bf16(low[0], low[1]), pack_bf16(low[2], low[3]), pack_bf16(high[0], high[1]),
                             pack_bf16(high[2], high[3])};
#pragma unroll
      for (int c = 0; c < WIDE; c++) {
        uint2 v[4];
#pragma unroll
        for (int e = 0; e < 4; e++) v[e] = load8(&stage[1][t * 16 + e * 4 + quad][c * 32 + g * 4]);
#pragma unroll
        for (int n = 0; n < 4; n++) {
          const uint32_t b0 = n < 2 ? beside(v[0].x, v[1].x, n % 2) : beside(v[0].y, v[1].y, n % 2);
          const uint32_t b1 = n < 2 ? beside(v[2].x, v[3].x, n % 2) : beside(v[2].y, v[3].y, n % 2);
          mma_bf16(output[c * 4 + n], a, b0, b1);
        }
      }
      if (HEAD % 32) {  // the last 16 values
        uint32_t v[4];
#pragma unroll
        for (int e = 0; e < 4; e++) v[e] = *(const uint32_t*)&stage[1][t * 16 + e * 4 + quad][WIDE * 32 + g * 2];
#pragma unroll
        for (int n = 0; n < 2; n++)
          mma_bf16(output[TILES - 2 + n], a, beside(v[0], v[1], n), beside(v[2], v[3], n));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
    sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
    const int row = warp_row + g + 8 * i;
    if (row >= piece.end) continue;
    const float share = 1.0f / sum[i];
    bf16* to = y + ((int64_t)row * heads + head) * HEAD;
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int c = 2 * i + e, column = 2 * quad + e;  // of a tile
#pragma unroll
      for (int n = 0; n < WIDE; n++)
        store8(to + n * 32 + column * 4, uint2{pack_bf16(output[n * 4][c] * share, output[n * 4 + 1][c] * share),
                                               pack_bf16(output[n * 4 + 2][c] * share, output[n * 4 + 3][c] * share)});
      if (HEAD % 32)
        *(uint32_t*)(to + WIDE * 32 + column * 2) = pack_bf16(output[TILES - 2][c] * share, output[TILES - 1][c] * share);
    }
  }
}
