// Codes of 4 bits with a table, a scale and perhaps an offset for a group, to bf16.
//
//   w = table[code] · scale (+ offset), each operation rounded, and the last result to bf16
//
// Of 64 neighbours of a row all with one scale have 16 different values: these are computed once, kept in registers byte by
// byte, and looked up there.
//
// GROUP: values of a scale: 32, 64 or 128. SCALE: float, half, or uint8_t for scales quantized again. OFFSETS: 0 or 1.
#pragma once
#include "scales.cuh"

constexpr int RUN_OF_CODES = 64;  // neighbours that are decoded together: 32 bytes
constexpr int SETS = GROUP < RUN_OF_CODES ? RUN_OF_CODES / GROUP : 1;        // of numbers, for a run
constexpr int RUNS_OF_GROUP = GROUP > RUN_OF_CODES ? GROUP / RUN_OF_CODES : 1;

// W [rows, columns] as it is stored.
struct Stored {
  const uint8_t* codes;
  const SCALE* scales;
  Nested nested;
  const half* offsets;
};

// What codes of a group are multiplied with, and what is added.
struct Number {
  float scale, offset;
};
static __device__ __forceinline__ Number number_of(const Stored& w, uint32_t run, int set) {
  const uint32_t group = run * SETS / RUNS_OF_GROUP + set;
  return {scale_of(w.scales, w.nested, group), OFFSETS ? wide(w.offsets[group]) : 0.0f};
}

// The 16 values of a group as bf16: their low bytes, four a word, and their high bytes.
struct Values {
  uint32_t low[4], high[4];
};

// Four of them, of what four codes mean.
static __device__ __forceinline__ void multiply_out(const float (&meaning)[4], Number number, int four, Values& values) {
  float products[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float product = __fmul_rn(meaning[i], number.scale);
    products[i] = OFFSETS ? __fadd_rn(product, number.offset) : product;
  }
  const uint32_t one = pack_bf16(products[0], products[1]), two = pack_bf16(products[2], products[3]);
  values.low[four] = permute_bytes(one, two, 0x6420);
  values.high[four] = permute_bytes(one, two, 0x7531);
}

// Bits of one where `mask` has them, else of the other.
static __device__ __forceinline__ uint32_t choose(uint32_t mask, uint32_t one, uint32_t other) {
  return (mask & one) | (~mask & other);
}

// Eight codes to pairs of neighbours. A code's three lower bits choose among eight bytes, its upper one, which a permutation
// makes eight bits of, between two eights.
static __device__ __forceinline__ void look_up(uint32_t word, const Values& values, uint32_t (&pairs)[4]) {
  const uint32_t places = word & 0x77777777u, shifted = word << 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint32_t place = places >> 16 * half, second = permute_bytes(shifted, word, half ? 0xfbea : 0xd9c8);
    const uint32_t low = choose(second, permute_bytes(values.low[2], values.low[3], place),
                                permute_bytes(values.low[0], values.low[1], place));
    const uint32_t high = choose(second, permute_bytes(values.high[2], values.high[3], place),
                                 permute_bytes(values.high[0], values.high[1], place));
    pairs[2 * half] = permute_bytes(low, high, 0x4051);  // the first of a byte's two codes is its upper half
    pairs[2 * half + 1] = permute_bytes(low, high, 0x6273);
  }
}

// Four neighbours.
static __device__ __forceinline__ void load_four(const float* from, float (&out)[4]) {
  const uint4 v = load16(from);
  out[0] = __uint_as_float(v.x);
  out[1] = __uint_as_float(v.y);
  out[2] = __uint_as_float(v.z);
  out[3] = __uint_as_float(v.w);
}
