// NF4 weights as the tensor core's first operand, made in registers from the codes as they are stored.
//
// Products are taken as yᵀ = W xᵀ: rows of the first operand are W's. A sum over k may take k in any order, if both
// operands take the same. So of a span of 256 neighbours, lane (g, q) of a warp has the 64 that are scale q's, 32
// neighbouring bytes of codes, in four parts of 16. In step t of a part's four, the operands' pairs of k (2 q, 2 q + 1)
// and (2 q + 8, 2 q + 9) stand for 4 t + (0, 1) and (2, 3) of them. Nothing is repacked, and W never lies in shared memory.
//
// A lane's 64 values of a row are thus 16 different ones: these are multiplied and rounded once, and looked up in
// registers, byte by byte.
//
// Of the 32 rows of W that a warp takes, rows g and g + 8 of the mma's tile i are 4 g + 2 i and 4 g + 2 i + 1: then a lane
// has four neighbours of a row of the result.
#pragma once
#include "scales.cuh"

constexpr int GROUP = 64;         // values of a scale
constexpr int SPAN = 4 * GROUP;   // values of k that a warp's four lanes of a row have
constexpr int PARTS = 4;          // of a span
constexpr int WARP_COLUMNS = 32;  // columns of the result of a warp
constexpr int LANE_ROWS = 4;      // of W

// W as a lane sees it: four rows, of which all are there or none (then those of any: such results are nobody's).
template <class Scale>
struct Weights {
  const uint8_t* codes;
  const Scale* scales;
  Nested nested;
  uint32_t first;  // group of W that the lane's first row begins with
  int groups;      // of a row
};

template <class Scale>
static __device__ __forceinline__ Weights<Scale> weights_of(const uint8_t* codes, const Scale* scales, Nested nested,
                                                            int rows, int columns, int first, int lane) {
  const int row = first + lane / 4 * LANE_ROWS, groups = columns / GROUP;
  return {codes, scales, nested, (uint32_t)min(row, rows - LANE_ROWS) * groups, groups};
}

// The first operand for half of a part: a[i][t] are tile i's registers, t of two.
typedef uint32_t Operand[2][2][4];

// Codes of a lane's rows for two parts, as they are stored.
struct Codes {
  uint32_t of_row[LANE_ROWS][4];
};

// The 16 values of a scale as bf16: their low bytes, four a word, and their high bytes.
struct Values {
  uint32_t low[4], high[4];
};

// The group of the span at k that is the lane's; past the last, that one again: x is zero there.
template <class Scale>
static __device__ __forceinline__ uint32_t group_of(const Weights<Scale>& w, int k, int lane) {
  return w.first + min(k / GROUP + lane % 4, w.groups - 1);
}

// The lane's scales for a span.
template <class Scale>
static __device__ __forceinline__ void fetch_scales(const Weights<Scale>& w, int k, int lane, float (&scales)[LANE_ROWS]) {
  const uint32_t group = group_of(w, k, lane);
#pragma unroll
  for (int j = 0; j < LANE_ROWS; j++) scales[j] = scale_of(w.scales, w.nested, group + j * w.groups);
}

// The lane's codes for two parts of a span, the first two or the others.
template <class Scale>
static __device__ __forceinline__ void fetch(const Weights<Scale>& w, int k, int others, int lane, Codes& codes) {
  const uint32_t group = group_of(w, k, lane);
#pragma unroll
  for (int j = 0; j < LANE_ROWS; j++) {
    const uint4 words = load16(w.codes + (uint64_t)(group + j * w.groups) * (GROUP / 2) + others * 16);
    codes.of_row[j][0] = words.x;
    codes.of_row[j][1] = words.y;
    codes.of_row[j][2] = words.z;
    codes.of_row[j][3] = words.w;
  }
}

// Four neighbours in shared memory.
static __device__ __forceinline__ void load_four(const float* from, float* out) {
  const uint4 v = load16(from);
  out[0] = __uint_as_float(v.x);
  out[1] = __uint_as_float(v.y);
  out[2] = __uint_as_float(v.z);
  out[3] = __uint_as_float(v.w);
}

// What codes mean under the lane's scales: a value is rounded once, after the product.
static __device__ __forceinline__ void multiply_out(const float* meaning, const float (&scales)[LANE_ROWS],
                                                    Values (&values)[LANE_ROWS]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float four[4];
    load_four(meaning + 4 * i, four);
#pragma unroll
    for (int j = 0; j < LANE_ROWS; j++) {
      const uint32_t one = pack_bf16(four[0] * scales[j], four[1] * scales[j]);
      const uint32_t two = pack_bf16(four[2] * scales[j], four[3] * scales[j]);
      values[j].low[i] = permute_bytes(one, two, 0x6420);
      values[j].high[i] = permute_bytes(one, two, 0x7531);
    }
  }
}

// Eight codes to pairs of neighbours. A code's three lower bits choose among eight bytes, its upper one of two eights.
static __device__ __forceinline__ void look_up(uint32_t word, const Values& values, uint32_t (&pairs)[4]) {
  const uint32_t places = word & 0x77777777u, eights = (word >> 1 & 0x44444444u) | 0x32103210u;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint32_t place = places >> 16 * half, eight = eights >> 16 * half;
    const uint32_t low = permute_bytes(permute_bytes(values.low[0], values.low[1], place),
                                       permute_bytes(values.low[2], values.low[3], place), eight);
    const uint32_t high = permute_bytes(permute_bytes(values.high[0], values.high[1], place),
                                        permute_bytes(values.high[2], values.high[3], place), eight);
    pairs[2 * half] = permute_bytes(low, high, 0x4051);  // the first of a byte's two codes is its upper half
    pairs[2 * half + 1] = permute_bytes(low, high, 0x6273);
  }
}

// Word `word` of the codes of a tile's two rows to its registers for half of a part.
static __device__ __forceinline__ void decode(const Codes& codes, int word, const Values (&values)[LANE_ROWS], int tile,
                                              uint32_t (&a)[2][4]) {
#pragma unroll
  for (int row = 0; row < 2; row++) {
    uint32_t pairs[4];
    look_up(codes.of_row[2 * tile + row][word], values[2 * tile + row], pairs);
#pragma unroll
    for (int pair = 0; pair < 4; pair++) a[pair / 2][row + 2 * (pair % 2)] = pairs[pair];
  }
}
