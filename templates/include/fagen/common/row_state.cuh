// The state that a warp's rows carry from key tile to key tile: O, softmax, and what is done to the scores of a tile.
#pragma once
#include "fagen/common/softmax.cuh"
#include "fagen/mask/mask.cuh"

namespace fagen {

// Changes of a score beyond the product: softcap, ALiBi. With either, scores are turned to base-2 logarithms here, and
// the softmax's own scale is 1.
template <class C>
struct ScoreMod {
  static constexpr bool kActive = C::kSoftcap || C::kAlibi;
  static constexpr float kLog2e = 1.4426950408889634f;
  float scale, cap_log2, slope_log2;
  int shift;

  __device__ __forceinline__ ScoreMod(const fagen_forward_params& p, int batch, int head)
      : shift(p.seqlen_k - p.seqlen_q) {
    scale = C::kSoftcap ? p.scale / p.softcap : p.scale * kLog2e;
    cap_log2 = p.softcap * kLog2e;
    const float* slopes = static_cast<const float*>(p.alibi_slopes.data);
    slope_log2 = C::kAlibi ? slopes[batch * p.alibi_slopes.stride[0] + head] * kLog2e : 0.f;
  }
  static __device__ __forceinline__ float softmax_scale_log2(const fagen_forward_params& p) {
    return kActive ? 1.f : p.scale * kLog2e;
  }
  __device__ __forceinline__ float operator()(float score, int m, int key) const {
    score *= scale;
    if constexpr (C::kSoftcap) score = cap_log2 * ptx::tanh_approx(score);
    if constexpr (C::kAlibi) score -= slope_log2 * fabsf(float(m + shift - key));
    return score;
  }
};

// A thread's place in an accumulator piece of 16 rows and 8 columns: it holds rows `row` and `row` + 8, columns
// `column` and `column` + 1.
struct Lane {
  int id = threadIdx.x % 32;
  int row = id / 4, column = id % 4 * 2;
};

template <int kPieces>
__device__ __forceinline__ void clear(float (&pieces)[kPieces][4]) {
#pragma unroll
  for (auto& piece : pieces) piece[0] = piece[1] = piece[2] = piece[3] = 0.f;
}

// kSlabs slabs of 16 rows: kColumns columns of O, unnormalised, in accumulators, and the softmax. kKeys keys a tile.
template <class C, int kSlabs, int kKeys, int kColumns>
struct RowState {
  static constexpr int kRows = kSlabs * 2;  // rows a thread shares
  using Scores = float[kSlabs][kKeys / 8][4];
  using Softmax = OnlineSoftmax<kRows, C::kRescale == Rescale::deferred>;

  Lane lane;
  float o[kSlabs][kColumns / 8][4];
  Softmax softmax;

  __device__ __forceinline__ explicit RowState(const fagen_forward_params& p)
      : softmax(ScoreMod<C>::softmax_scale_log2(p)) {
#pragma unroll
    for (auto& slab : o) clear(slab);
  }

  // Score mods alone. `m` is the warp's first row of q, `key` its first key.
  __device__ __forceinline__ void apply_score_mod(Scores& s_acc, const ScoreMod<C>& mod, int m, int key) {
    if constexpr (ScoreMod<C>::kActive) {
#pragma unroll
      for (int s = 0; s < kSlabs; ++s)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = m + s * 16 + half * 8 + lane.row;
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& score = s_acc[s][n][half * 2 + e];
              score = mod(score, row, key + lane.column + n * 8 + e);
            }
        }
    }
  }

  // Score mods and, on partial tiles, the mask. `m` is the warp's first row of q, `key` its first key.
  template <bool kMasked>
  __device__ __forceinline__ void modify(Scores& s_acc, const ScoreMod<C>& mod, const MaskOf<C>& mask, int m, int key) {
    if constexpr (kMasked || ScoreMod<C>::kActive) {
#pragma unroll
      for (int s = 0; s < kSlabs; ++s)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = m + s * 16 + half * 8 + lane.row;
          // thresholds relative to the thread's first column: one comparison with a constant a side
          const Band::Columns visible = mask.band.visible_columns(row, key, lane.column);
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& score = s_acc[s][n][half * 2 + e];
              if constexpr (ScoreMod<C>::kActive) score = mod(score, row, key + lane.column + n * 8 + e);
              if constexpr (kMasked) {
                bool hidden = n * 8 + e >= visible.end;
                if constexpr (MaskOf<C>::kHasBegin) hidden |= n * 8 + e < visible.begin;
                if (hidden) score = -INFINITY;
              }
            }
        }
      if constexpr (kMasked && MaskOf<C>::kIntervals) hide_intervals(s_acc, mask.intervals, m, key);
    }
  }

  __device__ __forceinline__ void hide_intervals(Scores& s_acc, const Intervals<C>& intervals, int m, int key) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = min(key + lane.column + n * 8 + e, intervals.last_key);
        const HiddenRows hidden = intervals.at(column);
#pragma unroll
        for (int s = 0; s < kSlabs; ++s)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            if (hidden.contains(m + s * 16 + half * 8 + lane.row)) s_acc[s][n][half * 2 + e] = -INFINITY;
      }
  }

  __device__ __forceinline__ void thread_maxima(const Scores& s_acc, float (&tile_max)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      tile_max[r] = -INFINITY;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
        tile_max[r] = fmaxf(tile_max[r], fmaxf(s_acc[r / 2][n][r % 2 * 2], s_acc[r / 2][n][r % 2 * 2 + 1]));
    }
  }

  // Take a new tile's maxima into the softmax; O follows.
  __device__ __forceinline__ void update_max(Scores& s_acc) {
    float tile_max[kRows], factor[kRows];
    thread_maxima(s_acc, tile_max);
    if (__any_sync(~0u, softmax.exceeds_slack(tile_max))) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) tile_max[r] = quad_max(tile_max[r]);
      set_reference(s_acc, tile_max, factor);
      rescale(factor);
    } else {
      softmax.refresh_offset();
    }
  }

  // Raise the references to the rows' maxima, and subtract those that are too large for the exponential's FMA from the
  // scores. Score mods leave a scale of 1, by which no product rounds.
  __device__ __forceinline__ void set_reference(Scores& s_acc, const float (&row_max)[kRows], float (&factor)[kRows]) {
    softmax.set_reference(row_max, factor);
    if constexpr (!ScoreMod<C>::kActive)
      while (__any_sync(~0u, softmax.offset_too_large())) {  // once; as a loop it stays out of the common tile's way
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (auto& piece : s_acc[r / 2])
            piece[r % 2 * 2] -= softmax.reference[r], piece[r % 2 * 2 + 1] -= softmax.reference[r];
          softmax.offset[r] = 0.f;
        }
      }
  }

  __device__ __forceinline__ void rescale(const float (&factor)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (auto& piece : o[r / 2]) piece[r % 2 * 2] *= factor[r], piece[r % 2 * 2 + 1] *= factor[r];
  }
};

}  // namespace fagen
