// y = Σ softmax(scale q · k) v of each token over those before it in its own sequence, and the gradients: training.
// See kernels/attention.py.
//
//   p = exp(scale q · k − m),  m = log Σ exp(scale q · k)      dv_s = Σ_t p_ts dy_t
//   ds_ts = p_ts (dy_t · v_s − dy_t · y_t)      dq_t = scale Σ_s ds_ts k_s      dk_s = scale Σ_t ds_ts q_t
//
// A block has 64 rows of a head of one sequence, 16 a warp, with the tensor core: of queries for y and dq, of keys for dk
// and dv, which are summed over the heads of the group; so all sums have a fixed order, and no two blocks write to the same
// place. 32 rows at a time of the other two matrices come through two stages of shared memory. Rows and steps are counted
// from the sequence's first token: a sequence has the same bits whatever is beside it. HEAD: values of a head, a multiple
// of 64.
//
// ptxas -O1: above it, registers are filled with what is loaded ahead, and others spilled.
#include "pieces.cuh"
#include "ragged.cuh"

constexpr int THREADS = 128;
constexpr int ROWS = 64;  // of a block
constexpr int STEP = 32;  // rows of the other matrices
constexpr int PIECES = HEAD / PIECE, TILES = HEAD / 8, SIXTEENS = HEAD / 16;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
typedef bf16 Stage[2 * STEP][HEAD];  // of two matrices
typedef float Sums[TILES][4];        // [tile of 8 values of the head][register]
typedef uint32_t Left[SIXTEENS][4];  // 16 rows of a warp

// One head of a matrix [tokens, heads, HEAD].
struct Head {
  const bf16* first;
  int values;  // of a token
};
static __device__ __forceinline__ Head head_of(const bf16* matrix, int heads, int head) {
  return {matrix + head * HEAD, heads * HEAD};
}

// Starts the copy of rows first … first + COUNT − 1, zeros from row `end` on.
template <int COUNT>
static __device__ __forceinline__ void copy_rows(bf16 (*to)[HEAD], const Head& head, int first, int end) {
  constexpr int AT_ONCE = THREADS / PIECES;
  const int row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
#pragma unroll
  for (int i = 0; i < COUNT / AT_ONCE; i++) {
    const int one = row + i * AT_ONCE;
    const bool there = first + one < end;
    const bf16* from = head.first + (int64_t)(there ? first + one : 0) * head.values + piece * PIECE;
    copy16_async(to[one] + (piece ^ one % 8) * PIECE, from, there);
  }
}
static __device__ __forceinline__ void copy_step(Stage& stage, const Head& one, const Head& two, int first, int end) {
  copy_rows<STEP>(stage, one, first, end);
  copy_rows<STEP>(stage + STEP, two, first, end);
  copy_commit();
}

// The warp's rows of a matrix, through a stage. It may hold other such rows: those of the matrix before the last, if two
// stages take turns, which all have read before the barrier here for the last.
static __device__ __forceinline__ void load_own(Left& left, Stage& stage, const Head& head, int first, int end) {
  copy_rows<ROWS>(stage, head, first, end);
  copy_commit();
  copy_wait<0>();
  __syncthreads();  // they are there for all
#pragma unroll
  for (int d = 0; d < SIXTEENS; d++) load_left(left[d], stage, threadIdx.x / 32 * 16, d * 16, threadIdx.x % 32);
}

// scores += own rows · some of the step's rows of a matrix; of scores, [tile of 8 such rows][register].
template <int COUNT>
static __device__ __forceinline__ void multiply(float (&scores)[COUNT][4], const Left& left, const bf16 (*rows)[HEAD], int lane) {
#pragma unroll
  for (int j = 0; j < COUNT / 2; j++)
#pragma unroll
    for (int d = 0; d < SIXTEENS; d++) {
      uint32_t b[4];
      load_right(b, rows, j * 16, d * 16, lane);
      mma_bf16(scores[2 * j], left[d], b[0], b[1]);
      mma_bf16(scores[2 * j + 1], left[d], b[2], b[3]);
    }
}

// sums += weights · these rows of a matrix.
template <int COUNT>
static __device__ __forceinline__ void add(Sums& sums, const float (&weights)[COUNT][4], const bf16 (*rows)[HEAD], int lane) {
#pragma unroll
  for (int j = 0; j < COUNT / 2; j++) {
    const float(&low)[4] = weights[2 * j], (&high)[4] = weights[2 * j + 1];
    const uint32_t a[4] = {pack_bf16(low[0], low[1]), pack_bf16(low[2], low[3]), pack_bf16(high[0], high[1]),
                           pack_bf16(high[2], high[3])};
#pragma unroll
    for (int d = 0; d < SIXTEENS; d++) {
      uint32_t b[4];
      load_right_turned(b, rows, j * 16, d * 16, lane);
      mma_bf16(sums[2 * d], a, b[0], b[1]);
      mma_bf16(sums[2 * d + 1], a, b[2], b[3]);
    }
  }
}

// Of the warp's rows from `first` on, those before `end`, multiplied, to one head of `to`.
static __device__ __forceinline__ void store(const Sums& sums, float one, float two, bf16* to, int values, int first, int end,
                                             int lane) {
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int row = first + threadIdx.x / 32 * 16 + lane / 4 + 8 * e;
    const float factor = e ? two : one;
#pragma unroll
    for (int d = 0; d < SIXTEENS; d++) {
      const float pairs[2][2] = {{sums[2 * d][2 * e] * factor, sums[2 * d][2 * e + 1] * factor},
                                 {sums[2 * d + 1][2 * e] * factor, sums[2 * d + 1][2 * e + 1] * factor}};
      store_pieces(to + (int64_t)row * values + d * 16, pairs[0], pairs[1], row < end, lane);
    }
  }
}

// Does the query see the key? By their places; a width is a window, which counts the token itself, or all there is.
static __device__ __forceinline__ bool sees(int query, int key, uint32_t width) { return (uint32_t)(query - key) < width; }
static __device__ __forceinline__ uint32_t width_of(int window) { return window ? window : 0x7fffffff; }

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_forward(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v,
                      const int* __restrict__ ends, bf16* __restrict__ y, float* __restrict__ m, int sequences, int heads,
                      int key_value_heads, float scale, int window) {
  __align__(16) __shared__ Stage stages[2];
  const Piece piece = piece_of<ROWS>(ends, sequences, blockIdx.x);
  if (piece.first >= piece.end) return;
  const int head = blockIdx.y, group = heads / key_value_heads, lane = threadIdx.x % 32, start = ends[piece.segment];
  const Head keys = head_of(k, key_value_heads, head / group), values = head_of(v, key_value_heads, head / group);
  const int begin = start + (window ? max(0, piece.first - start - window + 1) / STEP * STEP : 0);
  Left query;
  load_own(query, stages[1], head_of(q, heads, head), piece.first, piece.end);
  copy_step(stages[0], keys, values, begin, piece.end);
  const float least = -__uint_as_float(0x7f800000u), factor = scale * LOG2_E;
  const uint32_t width = width_of(window);
  const int own = piece.first + threadIdx.x / 32 * 16 + lane / 4;
  float most[2] = {least, least}, sum[2] = {};
  Sums output = {};
  for (int base = begin; base < piece.end; base += STEP) {
    const int now = (base - begin) / STEP % 2;
    copy_wait<0>();
    __syncthreads();  // this stage is there for all, and all are done with the other
    if (base + STEP < piece.end) copy_step(stages[1 - now], keys, values, base + STEP, piece.end);
    float scores[STEP / 8][4] = {};
    multiply(scores, query, stages[now], lane);
    float kept[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float greatest = most[i];
#pragma unroll
      for (int j = 0; j < STEP / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& score = scores[j][2 * i + e];
          score = sees(own + 8 * i, base + j * 8 + lane % 4 * 2 + e, width) ? score * factor : least;
          greatest = fmaxf(greatest, score);
        }
      greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, 1));
      greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, 2));
      const float from = greatest == least ? 0.0f : greatest;  // a row that has seen nothing yet
      kept[i] = exp2f(most[i] - from);
      most[i] = greatest;
      sum[i] *= kept[i];
#pragma unroll
      for (int j = 0; j < STEP / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& score = scores[j][2 * i + e];
          score = exp2f(score - from);
          sum[i] += score;
        }
    }
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int c = 0; c < 4; c++) output[n][c] *= kept[c / 2];
    add(output, scores, stages[now] + STEP, lane);
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
    sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
    const int row = own + 8 * i;
    if (lane % 4 == 0 && row < piece.end) m[(int64_t)row * heads + head] = most[i] * LN_2 + logf(sum[i]);
  }
  store(output, 1.0f / sum[0], 1.0f / sum[1], y + head * HEAD, heads * HEAD, piece.first, piece.end, lane);
}

// dq, and along = dy · y of each row and head.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_dq(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v,
                 const bf16* __restrict__ y, const float* __restrict__ m, const bf16* __restrict__ dy,
                 const int* __restrict__ ends, float* __restrict__ along, bf16* __restrict__ dq, int sequences, int heads,
                 int key_value_heads, float scale, int window) {
  __align__(16) __shared__ Stage stages[2];
  const Piece piece = piece_of<ROWS>(ends, sequences, blockIdx.x);
  if (piece.first >= piece.end) return;
  const int head = blockIdx.y, group = heads / key_value_heads, lane = threadIdx.x % 32, start = ends[piece.segment];
  const Head keys = head_of(k, key_value_heads, head / group), values = head_of(v, key_value_heads, head / group);
  const int begin = start + (window ? max(0, piece.first - start - window + 1) / STEP * STEP : 0);
  const int own = piece.first + threadIdx.x / 32 * 16 + lane / 4;
  Left slope, query;
  load_own(query, stages[0], head_of(y, heads, head), piece.first, piece.end);
  load_own(slope, stages[1], head_of(dy, heads, head), piece.first, piece.end);
  float dot[2] = {}, log_sum[2];
#pragma unroll
  for (int d = 0; d < SIXTEENS; d++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      dot[i % 2] += __uint_as_float(query[d][i] << 16) * __uint_as_float(slope[d][i] << 16);
      dot[i % 2] += __uint_as_float(query[d][i] & 0xffff0000u) * __uint_as_float(slope[d][i] & 0xffff0000u);
    }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    dot[i] += __shfl_xor_sync(~0u, dot[i], 1);
    dot[i] += __shfl_xor_sync(~0u, dot[i], 2);
    const int row = own + 8 * i;
    log_sum[i] = row < piece.end ? m[(int64_t)row * heads + head] * LOG2_E : 0.0f;
    if (lane % 4 == 0 && row < piece.end) along[(int64_t)row * heads + head] = dot[i];
  }
  load_own(query, stages[0], head_of(q, heads, head), piece.first, piece.end);
  copy_step(stages[1], keys, values, begin, piece.end);
  const float factor = scale * LOG2_E;
  const uint32_t width = width_of(window);
  Sums sums = {};
  for (int base = begin; base < piece.end; base += STEP) {
    const int now = 1 - (base - begin) / STEP % 2;
    copy_wait<0>();
    __syncthreads();  // this stage is there for all, and all are done with the other
    if (base + STEP < piece.end) copy_step(stages[1 - now], keys, values, base + STEP, piece.end);
#pragma unroll
    for (int half = 0; half < STEP; half += 16) {
      float scores[2][4] = {}, slopes[2][4] = {};
      multiply(scores, query, stages[now] + half, lane);
      multiply(slopes, slope, stages[now] + STEP + half, lane);
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
          const bool seen = sees(own + c / 2 * 8, base + half + j * 8 + lane % 4 * 2 + c % 2, width);
          const float share = seen ? exp2f(scores[j][c] * factor - log_sum[c / 2]) : 0.0f;
          scores[j][c] = share * (slopes[j][c] - dot[c / 2]);
        }
      add(sums, scores, stages[now] + half, lane);
    }
  }
  store(sums, scale, scale, dq + head * HEAD, heads * HEAD, piece.first, piece.end, lane);
}

// dk and dv; `along` is what attention_dq made.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_dkv(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v,
                  const float* __restrict__ m, const bf16* __restrict__ dy, const float* __restrict__ along,
                  const int* __restrict__ ends, bf16* __restrict__ dk, bf16* __restrict__ dv, int sequences, int heads,
                  int key_value_heads, float scale, int window) {
  __align__(16) __shared__ Stage stages[2];
  __shared__ float rows[2][2][STEP];  // log sums and dy · y of the step's rows
  const Piece piece = piece_of<ROWS>(ends, sequences, blockIdx.x);
  if (piece.first >= piece.end) return;
  const int key_head = blockIdx.y, group = heads / key_value_heads, t = threadIdx.x, lane = t % 32;
  const int last = ends[piece.segment + 1], until = window ? min(last, piece.end + window - 1) : last;
  const int own = piece.first + t / 32 * 16 + lane / 4, steps = (until - piece.first + STEP - 1) / STEP;
  Left key, value;
  load_own(key, stages[0], head_of(k, key_value_heads, key_head), piece.first, piece.end);
  load_own(value, stages[1], head_of(v, key_value_heads, key_head), piece.first, piece.end);
  const float factor = scale * LOG2_E;
  const uint32_t width = width_of(window);
  Sums key_sums = {}, value_sums = {};
  for (int step = -1; step < group * steps; step++) {  // each head's steps after another's; first nothing but a copy
    const int next = step + 1, now = step & 1;
    copy_wait<0>();
    __syncthreads();  // this stage is there for all, and all are done with the other
    if (next < group * steps) {
      const int head = key_head * group + next / steps, base = piece.first + next % steps * STEP;
      copy_step(stages[next & 1], head_of(q, heads, head), head_of(dy, heads, head), base, until);
      const int row = base + t % STEP;
      if (t < 2 * STEP) {
        const float* from = t < STEP ? m : along;
        rows[next & 1][t / STEP][t % STEP] = row < until ? from[(int64_t)row * heads + head] * (t < STEP ? LOG2_E : 1.0f) : 0.0f;
      }
    }
    if (step < 0) continue;
    const int base = piece.first + step % steps * STEP;
#pragma unroll
    for (int half = 0; half < STEP; half += 16) {
      float scores[2][4] = {}, slopes[2][4] = {};
      multiply(scores, key, stages[now] + half, lane);
      multiply(slopes, value, stages[now] + STEP + half, lane);
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
          const int place = half + j * 8 + lane % 4 * 2 + c % 2;
          const bool seen = sees(base + place, own + c / 2 * 8, width);
          scores[j][c] = seen ? exp2f(scores[j][c] * factor - rows[now][0][place]) : 0.0f;
          slopes[j][c] = scores[j][c] * (slopes[j][c] - rows[now][1][place]);
        }
      add(value_sums, scores, stages[now] + STEP + half, lane);
      add(key_sums, slopes, stages[now] + half, lane);
    }
  }
  store(key_sums, scale, scale, dk + key_head * HEAD, key_value_heads * HEAD, piece.first, piece.end, lane);
  store(value_sums, 1.0f, 1.0f, dv + key_head * HEAD, key_value_heads * HEAD, piece.first, piece.end, lane);
}
