// From scores to weights and their gradients, cell by cell: softcap, ALiBi, the mask, exp, dS = P (dP - delta).
#pragma once
#include <math.h>

#include "fagen/common/cell_dropout.cuh"
#include "fagen/common/dropout.cuh"
#include "fagen/mask/mask.cuh"
#include "fagen/ptx/math.cuh"
#include "fagen/sm80/backward/products.cuh"

namespace fagen {

// A row's logsumexp in base-2 logarithms, and delta = sum of dO * O, less the gradient of the logsumexp. Rows that see
// nothing, and those past the last, have an infinite one: their weights are 0.
struct RowStats {
  float lse_log2, delta;
};

// A score q.k of a head to its weight, and the gradient of the weight to that of scale * q.k.
template <class C>
struct ScoreGradient {
  static constexpr float kLog2e = 1.4426950408889634f;
  float scale, cap_log2, slope_log2;
  int shift;
  Dropout dropout;

  __device__ __forceinline__ ScoreGradient(const fagen_forward_params& p, int batch, int head)
      : shift(p.seqlen_k - p.seqlen_q) {
    scale = C::kSoftcap ? p.scale / p.softcap : p.scale * kLog2e;
    cap_log2 = p.softcap * kLog2e;
    const float* slopes = static_cast<const float*>(p.alibi_slopes.data);
    slope_log2 = C::kAlibi ? slopes[batch * p.alibi_slopes.stride[0] + head] * kLog2e : 0.f;
    if constexpr (C::kDropout) dropout = Dropout::of(p, batch, head);
  }

  // `score` becomes P and `gradient`, which comes in as dP, becomes dS. Where the weight was dropped, dP counts as
  // 0, and so does the P that is left, which is for dV.
  __device__ __forceinline__ void apply(float& score, float& gradient, const RowStats& row, int m, int key, bool hidden,
                                        bool kept) const {
    float slope = 1.f, exponent;
    if constexpr (C::kSoftcap) {
      const float capped = ptx::tanh_approx(score * scale);
      slope = 1.f - capped * capped;
      exponent = fmaf(capped, cap_log2, -row.lse_log2);
    } else {
      exponent = fmaf(score, scale, -row.lse_log2);
    }
    if constexpr (C::kAlibi) exponent -= slope_log2 * fabsf(float(m + shift - key));
    score = hidden ? 0.f : ptx::ex2(exponent);
    if constexpr (C::kDropout) gradient = kept ? gradient * dropout.scale : 0.f;
    gradient = score * (gradient - row.delta);
    if constexpr (C::kSoftcap) gradient *= slope;
    if constexpr (C::kDropout) score = kept ? score : 0.f;
  }
};

// A warp's cells of S and dP: kSlabs x 16 lines of kColumns cells. A line is a row of q, or a key if kTransposed.
template <class C, class Element, bool kTransposed, int kSlabs, int kColumns>
struct Cells {
  using Sums = float[kSlabs][kColumns / 8][4];
  using Pairs = Packed<kSlabs, kColumns>;
  static constexpr int kLines = kSlabs * 2;  // lines a thread shares
  // whether a line may have hidden cells before its visible ones, and after them; keys end somewhere in any case
  static constexpr bool kHidesFirst = kTransposed || MaskOf<C>::kHasBegin;
  static constexpr bool kHidesLast = !kTransposed || MaskOf<C>::kHasBegin;

  // Where this lane's first cell lies in the matrix; the stats of its rows.
  const Lane& lane;
  const ScoreGradient<C>& score;
  const MaskOf<C>& mask;
  const RowStats* stats;  // of the warp's first row
  int row, key;           // the warp's first ones

  static __device__ __forceinline__ int line(int i) { return i / 2 * 16 + i % 2 * 8; }

  // The visible cells of a line, counted from this lane's first column: rows of a key, or keys of a row.
  __device__ __forceinline__ Band::Columns visible(int i) const {
    if constexpr (!kTransposed) return mask.band.visible_columns(row + line(i) + lane.row, key, lane.column);
    const int n = key + line(i) + lane.row, first = row + lane.column;
    return {n < mask.band.seqlen_k ? n - mask.band.last - first : kFar, n - mask.band.first + 1 - first};
  }

  // P and dS in 16 bits, from S and dP.
  template <bool kMasked>
  __device__ __forceinline__ void differentiate(Sums& s_acc, Sums& dp_acc, Pairs& weights, Pairs& gradients) const {
    CellDropout<kTransposed, kColumns % 32 == 0, kSlabs> dropout;
    Band::Columns seen[kLines];
    HiddenRows hidden_rows[kLines];  // transposed: of each line's key
    if constexpr (kMasked) {
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
        seen[i] = visible(i);
        if constexpr (kTransposed && MaskOf<C>::kIntervals) hidden_rows[i] = hidden_at(line(i) + lane.row);
      }
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      HiddenRows hidden_keys[2];  // else: of each column's key
      if constexpr (kMasked && !kTransposed && MaskOf<C>::kIntervals)
        for (int e = 0; e < 2; ++e) hidden_keys[e] = hidden_at(lane.column + n * 8 + e);
      if constexpr (C::kDropout) dropout.load(score.dropout, lane, row, key, n);
      RowStats column_stats[2];
      if constexpr (kTransposed) load_pair(column_stats, stats + lane.column + n * 8);
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
        float* s = &s_acc[i / 2][n][i % 2 * 2];
        float* dp = &dp_acc[i / 2][n][i % 2 * 2];
        const int at = line(i) + lane.row;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = n * 8 + e, m = row + (kTransposed ? lane.column + column : at);
          const int cell_key = key + (kTransposed ? at : lane.column + column);
          bool hidden = false;
          if constexpr (kMasked) {
            if constexpr (kHidesFirst) hidden = column < seen[i].begin;
            if constexpr (kHidesLast) hidden |= column >= seen[i].end;
            if constexpr (MaskOf<C>::kIntervals) hidden |= (kTransposed ? hidden_rows[i] : hidden_keys[e]).contains(m);
          }
          bool kept = true;
          if constexpr (C::kDropout) kept = dropout.kept(i, n, e);
          if constexpr (kTransposed)
            score.apply(s[e], dp[e], column_stats[e], m, cell_key, hidden, kept);
          else
            score.apply(s[e], dp[e], stats[at], m, cell_key, hidden, kept);
        }
        weights.pairs[i / 2][n][i % 2] = pack<Element>(s[0], s[1]);
        gradients.pairs[i / 2][n][i % 2] = pack<Element>(dp[0], dp[1]);
      }
    }
  }

  // The bounds of a key of the warp's; keys past the last are hidden by the band.
  __device__ __forceinline__ HiddenRows hidden_at(int n) const {
    return mask.intervals.at(min(key + n, mask.intervals.last_key));
  }

  static __device__ __forceinline__ void load_pair(RowStats (&pair)[2], const RowStats* from) {
    const float4 both = *reinterpret_cast<const float4*>(from);
    pair[0] = {both.x, both.y}, pair[1] = {both.z, both.w};
  }
};

}  // namespace fagen
