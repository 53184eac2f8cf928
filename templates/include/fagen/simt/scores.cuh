// Changes of a tile's scores beside the product: softcap, ALiBi, the mask; and dropout of their weights.
#pragma once
#include <math.h>

#include "fagen/common/philox.h"
#include "fagen/mask/mask.cuh"

namespace fagen {

// Softcap and ALiBi in float32. With either, scores are scaled here, and the softmax's own scale is 1.
template <class C>
struct ExactScoreMod {
  static constexpr bool kActive = C::kSoftcap || C::kAlibi;
  float scale, softcap, slope;
  int shift;

  template <class Params>
  __device__ __forceinline__ ExactScoreMod(const Params& p, int batch, int head) : shift(p.seqlen_k - p.seqlen_q) {
    scale = C::kSoftcap ? p.scale / p.softcap : p.scale;
    softcap = p.softcap;
    const float* slopes = static_cast<const float*>(p.alibi_slopes.data);
    slope = C::kAlibi ? slopes[batch * p.alibi_slopes.stride[0] + head] : 0.f;
  }
  template <class Params>
  static __device__ __forceinline__ float softmax_scale(const Params& p) {
    return kActive ? 1.f : p.scale;
  }
  __device__ __forceinline__ float operator()(float score, int m, int key) const {
    score *= scale;
    if constexpr (C::kSoftcap) score = softcap * tanhf(score);
    if constexpr (C::kAlibi) score -= slope * fabsf(float(m + shift - key));
    return score;
  }
};

// Apply the mod to a thread's scores. `m` and `key` are the tile's first ones.
template <class C, class Grid, int kKeys>
__device__ __forceinline__ void apply_mod(float (&scores)[Grid::kRows][kKeys], const Grid& grid,
                                          const ExactScoreMod<C>& mod, int m, int key) {
  if constexpr (ExactScoreMod<C>::kActive) {
#pragma unroll
    for (int i = 0; i < Grid::kRows; ++i)
#pragma unroll
      for (int j = 0; j < kKeys; ++j)
        scores[i][j] = mod(scores[i][j], m + grid.row(i), key + grid.lane + j * Grid::kLanes);
  }
}

// Make the scores that the mask hides -inf.
template <class C, class Grid, int kKeys>
__device__ __forceinline__ void hide_scores(float (&scores)[Grid::kRows][kKeys], const Grid& grid,
                                            const MaskOf<C>& mask, int m, int key) {
#pragma unroll
  for (int i = 0; i < Grid::kRows; ++i) {
    const Band::Columns visible = mask.band.visible_columns(m + grid.row(i), key, grid.lane);
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      bool hidden = j * Grid::kLanes >= visible.end;
      if constexpr (MaskOf<C>::kHasBegin) hidden |= j * Grid::kLanes < visible.begin;
      if (hidden) scores[i][j] = -INFINITY;
    }
  }
  if constexpr (MaskOf<C>::kIntervals) {
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      const HiddenRows hidden = mask.intervals.at(min(key + grid.lane + j * Grid::kLanes, mask.intervals.last_key));
#pragma unroll
      for (int i = 0; i < Grid::kRows; ++i)
        if (hidden.contains(m + grid.row(i))) scores[i][j] = -INFINITY;
    }
  }
}

// Dropout: the weights of a tile that are kept. Tiles of keys begin at multiples of 32, as the random numbers' blocks
// do.
template <class C, bool kDropout = C::kDropout>
struct WeightDropout {
  template <class Params>
  __device__ __forceinline__ WeightDropout(const Params&, int, int) {}
  // Call keep(i, j, whether that weight is kept) for each weight of a thread.
  template <class Grid, int kKeys, class Keep>
  __device__ __forceinline__ void each(const Grid&, int, int, Keep) const {}
};

template <class C>
struct WeightDropout<C, true> {
  Dropout dropout;

  template <class Params>
  __device__ __forceinline__ WeightDropout(const Params& p, int batch, int head)
      : dropout(Dropout::of(p, batch, head)) {}

  template <class Grid, int kKeys, class Keep>
  __device__ __forceinline__ void each(const Grid& grid, int m, int first_key, Keep keep) const {
#pragma unroll
    for (int i = 0; i < Grid::kRows; ++i) {
      const int row = m + grid.row(i);
      RandomWords words;
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const int key = first_key + grid.lane + j * Grid::kLanes;
        if (j * Grid::kLanes % 16 == 0) words = dropout.words(row, key);
        // the row's word is one of four, without an index that is known at run time only
        uint32_t word = words.word[0];
#pragma unroll
        for (int n = 1; n < 4; ++n)
          if (row % 2 * 2 + row / 8 % 2 == n) word = words.word[n];
        keep(i, j, dropout.keeps(word, key / 8 % 2 * 2 + key % 2));
      }
    }
  }
};

}  // namespace fagen
