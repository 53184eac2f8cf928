// Dropout of the weights that a thread holds of a key tile, in the accumulators' order. Nothing where none is wanted.
#pragma once
#include "fagen/common/philox.h"
#include "fagen/ptx/math.cuh"

namespace fagen {

// All lanes have the same: said to the compiler, which then keeps the keys of the rounds in uniform registers.
__device__ __forceinline__ Dropout make_uniform(Dropout dropout) {
  const auto uniform = [](uint32_t x) { return __reduce_or_sync(~0u, x); };
  dropout.seed = uint64_t(uniform(uint32_t(dropout.seed >> 32))) << 32 | uniform(uint32_t(dropout.seed));
  dropout.offset = uniform(dropout.offset);
  dropout.lower_bits = uniform(dropout.lower_bits), dropout.sign_bits = uniform(dropout.sign_bits);
  return dropout;
}

// The dropped weights of two rows of a thread, r and r + 8 of a block of 16, in two blocks of 16 keys one behind the
// other: a sign bit a weight, a word for each block and row. `row` and `key` are the thread's first weight. Lanes of
// neighbouring rows make a call each.
__device__ __forceinline__ void draw_rows(const Dropout& dropout, int row, int key, uint32_t (&dropped)[2][2]) {
  const bool odd = row % 2;
  const RandomWords drawn = dropout.words(row, key + (odd ? 16 : 0));
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t mine = odd ? drawn.word[2 + r] : drawn.word[r], other = odd ? drawn.word[r] : drawn.word[2 + r];
    const uint32_t received = __shfl_xor_sync(~0u, other, 4);
    dropped[0][r] = dropout.dropped(odd ? received : mine), dropped[1][r] = dropout.dropped(odd ? mine : received);
  }
}

// The same in one block, where there is no second one.
__device__ __forceinline__ void draw_rows(const Dropout& dropout, int row, int key, uint32_t (&dropped)[2]) {
  const bool odd = row % 2;
  const RandomWords drawn = dropout.words(row, key);
#pragma unroll
  for (int r = 0; r < 2; ++r) dropped[r] = dropout.dropped(odd ? drawn.word[2 + r] : drawn.word[r]);
}

// One row, wherever it lies in its block.
__device__ __forceinline__ uint32_t draw_row(const Dropout& dropout, int row, int key) {
  const RandomWords drawn = dropout.words(row, key);
  const bool odd = row % 2, upper = row / 8 % 2;
  const uint32_t first = odd ? drawn.word[2] : drawn.word[0], second = odd ? drawn.word[3] : drawn.word[1];
  return dropout.dropped(upper ? second : first);
}

// kPairs: steps of 16 keys come by two. kRowsAligned: slabs of rows begin at multiples of 16.
template <class C, int kSlabs, bool kPairs, bool kRowsAligned = true, bool kDropout = C::kDropout>
struct TileDropout {
  template <class Params>
  __device__ __forceinline__ void set_head(const Params& p, int batch, int head) {}
  __device__ __forceinline__ void set_place(int row, int key) {}
  __device__ __forceinline__ uint32_t kept(uint32_t pair, int slab, int step, int i) const { return pair; }
};

template <class C, int kSlabs, bool kPairs, bool kRowsAligned>
struct TileDropout<C, kSlabs, kPairs, kRowsAligned, true> {
  static constexpr bool kExchanged = kPairs && kRowsAligned;

  Dropout dropout;
  int row, key;  // of this thread's first weight
  uint32_t dropped[kSlabs][2][2];  // of two steps, rows r and r + 8

  template <class Params>
  __device__ __forceinline__ void set_head(const Params& p, int batch, int head) {
    dropout = make_uniform(Dropout::of(p, batch, head));
  }
  // `row` and `key`: the first weight of the lane, in its first slab and piece.
  __device__ __forceinline__ void set_place(int first_row, int first_key) { row = first_row, key = first_key; }

  // Two neighbouring weights of 16 bits, or 0 in place of those that are dropped: register i of the `step`-th 16 keys
  // of a slab. Registers come in order.
  __device__ __forceinline__ uint32_t kept(uint32_t pair, int slab, int step, int i) {
    if (i == 0 && (step % 2 == 0 || !kExchanged)) draw(slab, step);
    return pair & ~ptx::spread_byte_signs(dropped[slab][kExchanged ? step % 2 : 0][i % 2], i / 2);
  }

 private:
  __device__ __forceinline__ void draw(int slab, int step) {
    const int m = row + slab * 16, n = key + step * 16;
    if constexpr (kExchanged)
      draw_rows(dropout, m, n, dropped[slab]);
    else if constexpr (kRowsAligned)
      draw_rows(dropout, m, n, dropped[slab][0]);
    else
      dropped[slab][0][0] = draw_row(dropout, m, n), dropped[slab][0][1] = draw_row(dropout, m + 8, n);
  }
};

// A factor of O, or of dV, times what makes up for the weights that were dropped.
template <class C, class Params>
__device__ __forceinline__ float scale_up(const Params& p, float factor) {
  if constexpr (C::kDropout) factor *= Dropout::scale_of(Dropout::kept_of(p.dropout));
  return factor;
}

}  // namespace fagen
