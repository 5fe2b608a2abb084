// y = Σ softmax(scale q · k) v over the cache pages of a token's sequence: decoding. See kernels/paged_attention.py.
//
// A block makes one head of one token. Eight lanes take a position, a warp four, the block 16 at a time; each of the 16
// keeps its own greatest score and sums, which meet in their order at the end. So the result depends on the token's own
// sequence alone. HEAD: values of a head, a multiple of 64. VALUE: float, bf16, half.
#include "numbers.cuh"
#include "ragged.cuh"

constexpr int THREADS = 128;
constexpr int LANES = 8, GROUPS = 16;
constexpr int PIECES = HEAD / (8 * LANES);  // of 8 values, that a lane has

extern "C" __global__ void __launch_bounds__(THREADS) paged_attention(
    const VALUE* __restrict__ q, const VALUE* __restrict__ pages, const int* __restrict__ block_table,
    const int* __restrict__ cu_seqlens, const int* __restrict__ positions, VALUE* __restrict__ y, int sequences,
    int blocks, int heads, int key_value_heads, int block_tokens, int64_t page_values, int64_t layer_start, float scale,
    int window) {
  __shared__ float greatest[GROUPS], sums[GROUPS], parts[GROUPS][HEAD];
  const int token = blockIdx.x, head = blockIdx.y, group = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const int* table = block_table + (int64_t)segment_of(cu_seqlens, sequences, token) * blocks;
  const int position = positions[token], first = window ? max(0, position - window + 1) : 0;
  const int64_t place = ((int64_t)token * heads + head) * HEAD;
  float query[PIECES][8], output[PIECES][8] = {};
#pragma unroll
  for (int c = 0; c < PIECES; c++) load_values(q + place + (c * LANES + lane) * 8, query[c]);
  float most = -__uint_as_float(0x7f800000u), sum = 0.0f;
  for (int base = first; base <= position; base += GROUPS) {
    const int at = base + group;
    const bool there = at <= position;
    const int slot = there ? at % block_tokens : 0;
    const int64_t page = there ? table[at / block_tokens] : table[0];
    const VALUE* key = pages + page * page_values + layer_start +
                       ((int64_t)slot * key_value_heads + head / (heads / key_value_heads)) * HEAD + lane * 8;
    float score = 0.0f;
#pragma unroll
    for (int c = 0; c < PIECES; c++) {
      float k[8];
      load_values(key + c * LANES * 8, k);
#pragma unroll
      for (int i = 0; i < 8; i++) score += query[c][i] * k[i];
    }
#pragma unroll
    for (int other = LANES / 2; other; other /= 2) score += __shfl_xor_sync(~0u, score, other);
    if (!there) continue;
    score *= scale;
    const float now = fmaxf(most, score), kept = expf(most - now), weight = expf(score - now);
    most = now;
    sum = sum * kept + weight;
#pragma unroll
    for (int c = 0; c < PIECES; c++) {
      float v[8];
      load_values(key + (int64_t)block_tokens * key_value_heads * HEAD + c * LANES * 8, v);
#pragma unroll
      for (int i = 0; i < 8; i++) output[c][i] = output[c][i] * kept + weight * v[i];
    }
  }
  if (lane == 0) {
    greatest[group] = most;
    sums[group] = sum;
  }
#pragma unroll
  for (int c = 0; c < PIECES; c++)
#pragma unroll
    for (int i = 0; i < 8; i++) parts[group][(c * LANES + lane) * 8 + i] = output[c][i];
  __syncthreads();
  most = greatest[0];
#pragma unroll
  for (int part = 1; part < GROUPS; part++) most = fmaxf(most, greatest[part]);
  for (int d = threadIdx.x; d < HEAD; d += THREADS) {
    float above = 0.0f, below = 0.0f;
#pragma unroll
    for (int part = 0; part < GROUPS; part++) {
      const float weight = expf(greatest[part] - most);
      above += weight * parts[part][d];
      below += weight * sums[part];
    }
    y[place + d] = narrow<VALUE>(above / below);
  }
}
