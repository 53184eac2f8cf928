// Dropout of a warp's cells of S and dP in backward: which cells are kept, piece by piece of 8 columns.
#pragma once
#include "fagen/common/philox.h"

namespace fagen {

// kSlabs x 16 lines of cells. A line is a row of q, or a key if kTransposed. kKeysAligned: the keys begin at a multiple
// of 32. Rows always begin at a multiple of 16.
template <bool kTransposed, bool kKeysAligned, int kSlabs>
struct CellDropout {
  RandomWords words[kSlabs];  // rows are lines: of 16 rows and 32 keys
  int odd;                    // whether the present keys are the second 16 of these

  // Make the random numbers of piece `n`, whose warp's first row and key are given. Pieces come in order.
  template <class Lane>
  __device__ __forceinline__ void load(const Dropout& dropout, const Lane& lane, int row, int key, int n) {
    if (n % (kKeysAligned ? 4 : 2)) return;
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) words[s] = dropout.words(row + s * 16 + lane.row, key + n * 8 + lane.column);
    odd = kKeysAligned ? 0 : (key / 16 + n / 2) % 2;
  }
  // Whether cell e of line i of piece n is kept; lines are r and r + 8 of each slab.
  __device__ __forceinline__ bool kept(const Dropout& dropout, int i, int n, int e) const {
    const uint32_t* word = words[i / 2].word;
    const uint32_t mine = kKeysAligned ? word[n % 4] : odd ? word[2 + n % 2] : word[n % 2];
    return dropout.keeps(mine, i % 2 * 2 + e);
  }
};

// Keys are lines: the lanes make the calls that they would make for the same rows as lines, and exchange the words.
template <bool kKeysAligned, int kSlabs>
struct CellDropout<true, kKeysAligned, kSlabs> {
  uint32_t words[kSlabs][2][2];  // of keys r and r + 8 of a slab, and this lane's two rows of a piece; two pieces

  template <class Lane>
  __device__ __forceinline__ void load(const Dropout& dropout, const Lane& lane, int row, int key, int n) {
    if (n % 2) return;
    RandomWords drawn;
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      if (!kKeysAligned || s % 2 == 0) drawn = dropout.words(row + n * 8 + lane.row, key + s * 16 + lane.column);
      const bool odd = kKeysAligned ? s % 2 : (key / 16 + s) % 2;
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < 2; ++e) {  // from the lane that made row `column` + e and the pair of keys of `row`
          const uint32_t word = odd ? drawn.word[2 + half] : drawn.word[half];
          words[s][half][e] = __shfl_sync(~0u, word, (lane.column + e) * 4 + lane.row / 2) >> lane.row % 2 * 8;
        }
    }
  }
  __device__ __forceinline__ bool kept(const Dropout& dropout, int i, int n, int e) const {
    return dropout.keeps(words[i / 2][i % 2][e], n % 2 * 2);
  }
};

}  // namespace fagen
