// Dropout of a warp's cells of S and dP: which cells are kept, piece by piece of 8 columns.
#pragma once
#include "fagen/common/dropout.cuh"

namespace fagen {

// kSlabs x 16 lines of cells. A line is a row of q, or a key if kTransposed. kPairs: pieces come by four. Rows and keys
// always begin at multiples of 16.
template <bool kTransposed, bool kPairs, int kSlabs>
struct CellDropout {
  // A sign bit a weight: of two blocks of 16 columns, and lines r and r + 8, or of columns 2 t and 2 t + 1 of
  // transposed cells.
  uint32_t dropped[kSlabs][2][2];

  // Draw for piece `n`, whose warp's first row and key are given. Pieces come in order.
  template <class Lane>
  __device__ __forceinline__ void load(const Dropout& dropout, const Lane& lane, int row, int key, int n) {
    if (n % (kPairs ? 4 : 2)) return;
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      if constexpr (kTransposed) {
        draw_keys(dropout, row + n * 8 + lane.column, key + s * 16 + lane.row, dropped[s]);
      } else {
        const int m = row + s * 16 + lane.row, first = key + n * 8 + lane.column;
        if constexpr (kPairs)
          draw_rows(dropout, m, first, dropped[s]);
        else
          draw_rows(dropout, m, first, dropped[s][0]);
      }
    }
  }
  // Whether cell e of line i of piece n is kept; lines are r and r + 8 of each slab.
  __device__ __forceinline__ bool kept(int i, int n, int e) const {
    const uint32_t (&words)[2] = dropped[i / 2][kPairs ? n / 2 % 2 : 0];
    const int byte = n % 2 * 2 + (kTransposed ? i % 2 : e);
    return !(words[kTransposed ? e : i % 2] >> (8 * byte + 7) & 1);
  }

 private:
  // Lines are keys: each of the two words has rows r and r + 8, and of each the thread's two keys.
  __device__ __forceinline__ void draw_keys(const Dropout& dropout, int row, int key, uint32_t (&to)[2][2]) const {
    const bool odd = key % 2;
    const RandomWords drawn = dropout.words(row + (kPairs && odd ? 16 : 0), key);
    const uint32_t even_bytes = 0x6420, odd_bytes = 0x7531;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint32_t lower = drawn.word[2 * e], upper = drawn.word[2 * e + 1];
      const uint32_t mine = dropout.dropped(__byte_perm(lower, upper, odd ? odd_bytes : even_bytes));
      if constexpr (kPairs) {
        const uint32_t other = dropout.dropped(__byte_perm(lower, upper, odd ? even_bytes : odd_bytes));
        const uint32_t received = __shfl_xor_sync(~0u, other, 4);
        to[0][e] = odd ? received : mine, to[1][e] = odd ? mine : received;
      } else {
        to[0][e] = mine;
      }
    }
  }
};

}  // namespace fagen
