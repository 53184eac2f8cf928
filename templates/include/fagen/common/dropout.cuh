// Dropout of the weights that a thread holds of a key tile, in the accumulators' order. Nothing where none is wanted.
#pragma once
#include "fagen/common/element.cuh"
#include "fagen/common/philox.h"
#include "fagen/ptx/math.cuh"

namespace fagen {

// All lanes have the same: said to the compiler, which then keeps the keys of the rounds in uniform registers.
__device__ __forceinline__ Dropout make_uniform(Dropout dropout) {
  const auto uniform = [](uint32_t x) { return __reduce_or_sync(~0u, x); };
#pragma unroll
  for (int round = 0; round < kRounds; ++round)
#pragma unroll
    for (int half = 0; half < 2; ++half) dropout.keys.key[round][half] = uniform(dropout.keys.key[round][half]);
  dropout.offset = uniform(dropout.offset);
  dropout.limits = uniform(dropout.limits), dropout.above = uniform(dropout.above);
  return dropout;
}

// The numbers of a thread's weights in a block of 16 rows and 16 keys, or if kPairs in two of them one behind the
// other: two words for each block, of lines r and r + 8 of 16, a byte a weight of two pieces of 8 columns. Lines are
// rows of q. If kTransposed they are keys, and the words are of the two pieces, with two bytes a line. `odd`: whether
// the thread's line is. With kPairs neighbouring lines make a call each, the odd one that of the second block, and
// exchange halves.
template <bool kTransposed, bool kPairs>
__device__ __forceinline__ void draw_blocks(const Dropout& dropout, const RowPart& row, const KeyPart& key, bool odd,
                                            uint32_t (&words)[2][2]) {
  const RandomWords drawn = dropout.words(row, key);
  const auto half = [&](int r, bool of_odd) {
    const uint32_t first = drawn.word[r], second = drawn.word[2 + r];
    return kTransposed ? __byte_perm(first, second, of_odd ? 0x7351 : 0x6240) : of_odd ? second : first;
  };
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t mine = half(r, odd);
    if constexpr (kPairs) {
      const uint32_t received = __shfl_xor_sync(~0u, half(r, !odd), 4);
      words[0][r] = odd ? received : mine, words[1][r] = odd ? mine : received;
    } else {
      words[0][r] = mine;
    }
  }
}

// One row, wherever it lies in its block.
__device__ __forceinline__ uint32_t draw_row(const Dropout& dropout, int row, const KeyPart& key) {
  const RandomWords drawn = dropout.words(dropout.of_row(Dropout::counter(row)), key);
  const bool odd = row % 2, upper = row / 8 % 2;
  const uint32_t first = odd ? drawn.word[2] : drawn.word[0], second = odd ? drawn.word[3] : drawn.word[1];
  return upper ? second : first;
}

// Factors of two neighbouring weights, as half floats: 1, or 0 where they are dropped. Their numbers are bytes 2 h and
// 2 h + 1 of a word.
__device__ __forceinline__ uint32_t kept_factors(const Dropout& dropout, uint32_t word, int h) {
  return ptx::are_below(__byte_perm(word, dropout.above, h ? 0x4342 : 0x4140), dropout.limits);
}
// Two weights of 16 bits times their factors. Read as bfloat16 the half float 1 is 2^-7: `scale_up_pairs` makes up.
template <class Element>
__device__ __forceinline__ uint32_t multiply_factors(uint32_t pair, uint32_t factors);
template <>
__device__ __forceinline__ uint32_t multiply_factors<half_t>(uint32_t pair, uint32_t factors) {
  __half2 x, y;
  memcpy(&x, &pair, 4), memcpy(&y, &factors, 4);
  x = __hmul2(x, y);
  memcpy(&pair, &x, 4);
  return pair;
}
template <>
__device__ __forceinline__ uint32_t multiply_factors<bfloat_t>(uint32_t pair, uint32_t factors) {
  __nv_bfloat162 x, y;
  memcpy(&x, &pair, 4), memcpy(&y, &factors, 4);
  x = __hmul2(x, y);
  memcpy(&pair, &x, 4);
  return pair;
}
template <class Element>
constexpr float kInverseFactor = 1.f;
template <>
inline constexpr float kInverseFactor<bfloat_t> = 128.f;

// kPairs: steps of 16 keys come by two. kRowsAligned: slabs of rows begin at multiples of 16.
template <class C, class Element, int kSlabs, bool kPairs, bool kRowsAligned = true, bool kDropout = C::kDropout>
struct TileDropout {
  template <class Params>
  __device__ __forceinline__ void set_head(const Params& p, int batch, int head) {}
  __device__ __forceinline__ void set_place(int row, int key) {}
  __device__ __forceinline__ uint32_t kept(uint32_t pair, int slab, int step, int i) const { return pair; }
};

template <class C, class Element, int kSlabs, bool kPairs, bool kRowsAligned>
struct TileDropout<C, Element, kSlabs, kPairs, kRowsAligned, true> {
  static constexpr bool kExchanged = kPairs && kRowsAligned;

  Dropout dropout;
  int row;                       // of this thread's first weight
  uint32_t key;                  // the counter of its first call
  RowPart of_rows[kSlabs];       // if they are aligned
  uint32_t words[kSlabs][2][2];  // of two steps, rows r and r + 8

  template <class Params>
  __device__ __forceinline__ void set_head(const Params& p, int batch, int head) {
    dropout = make_uniform(Dropout::of(p, batch, head));
  }
  // `row` and `key`: the first weight of the lane, in its first slab and piece.
  __device__ __forceinline__ void set_place(int first_row, int first_key) {
    row = first_row, key = Dropout::counter(first_key) + (kExchanged && row % 2 ? 4 : 0);
#pragma unroll
    for (int s = 0; s < kSlabs; ++s)
      if constexpr (kRowsAligned) of_rows[s] = dropout.of_row(Dropout::counter(row) + s * 4);
  }

  // Two neighbouring weights of 16 bits, or 0 in place of those that are dropped: register i of the `step`-th 16 keys
  // of a slab. Registers come in order.
  __device__ __forceinline__ uint32_t kept(uint32_t pair, int slab, int step, int i) {
    if (i == 0 && (step % 2 == 0 || !kExchanged)) draw(slab, step);
    const uint32_t word = words[slab][kExchanged ? step % 2 : 0][i % 2];
    return multiply_factors<Element>(pair, kept_factors(dropout, word, i / 2));
  }

 private:
  __device__ __forceinline__ void draw(int slab, int step) {
    const KeyPart of_key = dropout.of_key(key + step * 4);
    if constexpr (kRowsAligned)
      draw_blocks<false, kExchanged>(dropout, of_rows[slab], of_key, row % 2, words[slab]);
    else
#pragma unroll
      for (int r = 0; r < 2; ++r) words[slab][0][r] = draw_row(dropout, row + slab * 16 + r * 8, of_key);
  }
};

// A factor of O, or of dV, times what makes up for the weights that were dropped.
template <class C, class Params>
__device__ __forceinline__ float scale_up(const Params& p, float factor) {
  if constexpr (C::kDropout) factor *= Dropout::scale_of(Dropout::kept_of(p.dropout));
  return factor;
}
// The same where weights were multiplied by factors in pairs.
template <class C, class Element, class Params>
__device__ __forceinline__ float scale_up_pairs(const Params& p, float factor) {
  return scale_up<C>(p, C::kDropout ? factor * kInverseFactor<Element> : factor);
}

}  // namespace fagen
