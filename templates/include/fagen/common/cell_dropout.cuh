// Dropout of a warp's cells of S and dP: which cells are kept, piece by piece of 8 columns.
#pragma once
#include "fagen/common/dropout.cuh"

namespace fagen {

// kSlabs x 16 lines of cells. A line is a row of q, or a key if kTransposed. kPairs: pieces come by four. Rows and keys
// always begin at multiples of 16.
template <bool kTransposed, bool kPairs, int kSlabs>
struct CellDropout {
  uint32_t dropped[kSlabs][2][2];  // a sign bit a weight, in the order of `draw_blocks`

  // Draw for piece `n`, whose warp's first row and key are given. Pieces come in order.
  template <class Lane>
  __device__ __forceinline__ void load(const Dropout& dropout, const Lane& lane, int row, int key, int n) {
    if (n % (kPairs ? 4 : 2)) return;
    const bool odd = lane.row % 2;
    const int columns = n * 8 + (kPairs && odd ? 16 : 0) + lane.column;
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      const int lines = s * 16 + lane.row;
      const RowPart of_row = dropout.of_row(Dropout::counter(row + (kTransposed ? columns : lines)));
      const KeyPart of_key = dropout.of_key(Dropout::counter(key + (kTransposed ? lines : columns)));
      draw_blocks<kTransposed, kPairs>(dropout, of_row, of_key, odd, dropped[s]);
#pragma unroll
      for (int block = 0; block < (kPairs ? 2 : 1); ++block)
        for (uint32_t& word : dropped[s][block]) word = dropout.dropped(word);
    }
  }
  // Whether cell e of line i of piece n is kept; lines are r and r + 8 of each slab.
  __device__ __forceinline__ bool kept(int i, int n, int e) const {
    const uint32_t word = dropped[i / 2][kPairs ? n / 2 % 2 : 0][kTransposed ? n % 2 : i % 2];
    const int byte = (kTransposed ? i % 2 : n % 2) * 2 + e;
    return !(word >> (8 * byte + 7) & 1);
  }
};

}  // namespace fagen
