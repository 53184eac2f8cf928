// Dropout of the weights that a thread holds of a key tile, in the accumulators' order. Nothing where none is wanted.
#pragma once
#include "fagen/common/philox.h"
#include "fagen/ptx/math.cuh"

namespace fagen {

// kKeysAligned: tiles of keys begin at multiples of 32, so that one call of Philox serves 32 keys. kRowsAligned: slabs
// of rows begin at multiples of 16, so that it serves a thread's two rows.
template <class C, int kSlabs, bool kKeysAligned, bool kRowsAligned = true, bool kDropout = C::kDropout>
struct TileDropout {
  template <class Params>
  __device__ __forceinline__ void set_head(const Params& p, int batch, int head) {}
  __device__ __forceinline__ void set_place(int row, int key) {}
  __device__ __forceinline__ uint32_t kept(uint32_t pair, int slab, int step, int i) const { return pair; }
};

template <class C, int kSlabs, bool kKeysAligned, bool kRowsAligned>
struct TileDropout<C, kSlabs, kKeysAligned, kRowsAligned, true> {
  Dropout dropout;
  int row, key;  // of this thread's first weight
  RandomWords words[kSlabs][kRowsAligned ? 1 : 2];

  template <class Params>
  __device__ __forceinline__ void set_head(const Params& p, int batch, int head) {
    const auto uniform = [](uint32_t x) { return __shfl_sync(~0u, x, 0); };  // for the compiler as well
    dropout = Dropout::of(p, batch, head);
    dropout.seed = uint64_t(uniform(dropout.seed >> 32)) << 32 | uniform(dropout.seed);
    dropout.offset = uniform(dropout.offset), dropout.kept = uniform(dropout.kept);
  }
  // `row` and `key`: the first weight of the lane, in its first slab and piece.
  __device__ __forceinline__ void set_place(int first_row, int first_key) { row = first_row, key = first_key; }

  // Two neighbouring weights of 16 bits, or 0 in place of those that are dropped: register i of the `step`-th 16 keys
  // of a slab. Registers come in order.
  __device__ __forceinline__ uint32_t kept(uint32_t pair, int slab, int step, int i) {
    if (i == 0 && (step % 2 == 0 || !kKeysAligned)) {
#pragma unroll
      for (int r = 0; r < (kRowsAligned ? 1 : 2); ++r)
        words[slab][r] = dropout.words(row + slab * 16 + r * 8, key + step * 16);
    }
    const int r = i % 2, piece = i / 2;
    const RandomWords& drawn = words[slab][kRowsAligned ? 0 : r];
    const bool odd = kKeysAligned ? step % 2 : (key / 16 + step) % 2;
    const uint32_t word = odd ? drawn.word[2 + piece] : drawn.word[piece];
    const int half = kRowsAligned ? r : (row / 8 + r) % 2;
    // a byte of `kept` or more, which drops its weight, reaches the sign bit
    const uint32_t reach = (0x8000 - dropout.kept) * 0x10001;
    return pair & ~ptx::spread_signs(ptx::widen_bytes(word, half) + reach);
  }
};

// A factor of O, or of dV, times what makes up for the weights that were dropped.
template <class C, class Params>
__device__ __forceinline__ float scale_up(const Params& p, float factor) {
  if constexpr (C::kDropout) factor *= Dropout::scale_of(Dropout::kept_of(p.dropout));
  return factor;
}

}  // namespace fagen
