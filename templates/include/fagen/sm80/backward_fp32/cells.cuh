// From scores to weights and their gradients in float32: softcap, ALiBi, the mask, exp, dS = P (dP - delta).
#pragma once
#include <math.h>

#include "fagen/common/cell_dropout.cuh"
#include "fagen/mask/mask.cuh"
#include "fagen/ptx/math.cuh"
#include "fagen/sm80/backward_fp32/products.cuh"

namespace fagen {

// A score q.k of a head to its weight, and the gradient of the weight to that of scale * q.k.
template <class P>
struct ScoreGradient {
  static constexpr float kLog2e = 1.4426950408889634f;
  float scale, softcap, slope;
  int shift;
  Dropout dropout;

  __device__ __forceinline__ ScoreGradient(const fagen_backward_params& p, int batch, int head)
      : scale(P::kSoftcap ? p.scale / p.softcap : p.scale), softcap(p.softcap), shift(p.seqlen_k - p.seqlen_q) {
    const float* slopes = static_cast<const float*>(p.alibi_slopes.data);
    slope = P::kAlibi ? slopes[batch * p.alibi_slopes.stride[0] + head] : 0.f;
    if constexpr (P::kDropout) dropout = Dropout::of(p, batch, head);
  }

  // `score` becomes P and `gradient`, which comes in as dP, becomes dS. Where the weight was dropped, dP counts as 0,
  // and so does the P that is left, which is for dV. The LSE is subtracted before the exponent goes to base 2: the
  // product is not rounded where it is close to the LSE.
  __device__ __forceinline__ void apply(float& score, float& gradient, const RowStats& row, int m, int key, bool hidden,
                                        bool kept) const {
    float exponent, derivative = 1.f;
    if constexpr (P::kSoftcap) {
      const float capped = tanhf(score * scale);
      derivative = 1.f - capped * capped;
      exponent = softcap * capped;
      if constexpr (P::kAlibi) exponent -= slope * fabsf(float(m + shift - key));
      exponent -= row.lse;
    } else if constexpr (P::kAlibi) {
      exponent = fmaf(score, scale, -slope * fabsf(float(m + shift - key))) - row.lse;
    } else {
      exponent = fmaf(score, scale, -row.lse);
    }
    score = hidden ? 0.f : ptx::ex2(exponent * kLog2e);
    if constexpr (P::kDropout) gradient = kept ? gradient * dropout.scale : 0.f;
    gradient = score * (gradient - row.delta);
    if constexpr (P::kSoftcap) gradient *= derivative;
    if constexpr (P::kDropout) score = kept ? score : 0.f;
  }
};

// A warp's cells of S and dP. A line is a row of q, or a key where the block owns keys.
template <class P>
struct WarpCells {
  using Shape = TensorPassShape<P>;
  using Sums = float[Shape::kSlabs][Shape::kPieces][4];
  static constexpr int kLines = 2 * Shape::kSlabs;  // lines a lane shares
  // whether a line may have hidden cells before its visible ones, and after them; keys end somewhere in any case
  static constexpr bool kHidesFirst = P::kOwnsKeys || MaskOf<P>::kHasBegin;
  static constexpr bool kHidesLast = !P::kOwnsKeys || MaskOf<P>::kHasBegin;

  const Lane& lane;
  const ScoreGradient<P>& gradient;
  const MaskOf<P>& mask;
  const RowStats* stats;  // of the lane's lines, or of the columns
  int line, column;       // the warp's first ones

  static __device__ __forceinline__ int place(int i) { return i / 2 * 16 + i % 2 * 8; }

  // The visible cells of a line, counted from this lane's first column.
  __device__ __forceinline__ Band::Columns visible(int i) const {
    const int at = line + place(i) + lane.row;
    if constexpr (!P::kOwnsKeys) return mask.band.visible_columns(at, column, lane.column);
    const int first = column + lane.column;
    return {at < mask.band.seqlen_k ? at - mask.band.last - first : kFar, at - mask.band.first + 1 - first};
  }
  // The bounds of a key; keys past the last are hidden by the band.
  __device__ __forceinline__ HiddenRows hidden_at(int key) const {
    return mask.intervals.at(min(key, mask.intervals.last_key));
  }

  // P from S, dS from dP.
  template <bool kMasked>
  __device__ __forceinline__ void differentiate(Sums& scores, Sums& gradients) const {
    CellDropout<P::kOwnsKeys, Shape::kPieces % 4 == 0, Shape::kSlabs> dropout;
    Band::Columns seen[kLines];
    HiddenRows hidden_lines[kLines];  // of keys
    if constexpr (kMasked) {
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
        seen[i] = visible(i);
        if constexpr (P::kOwnsKeys && MaskOf<P>::kIntervals) hidden_lines[i] = hidden_at(line + place(i) + lane.row);
      }
    }
#pragma unroll
    for (int n = 0; n < Shape::kPieces; ++n) {
      if constexpr (P::kDropout)
        dropout.load(gradient.dropout, lane, P::kOwnsKeys ? column : line, P::kOwnsKeys ? line : column, n);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int offset = n * 8 + e, at = column + lane.column + offset;
        HiddenRows hidden_column;  // of a key
        if constexpr (kMasked && !P::kOwnsKeys && MaskOf<P>::kIntervals) hidden_column = hidden_at(at);
        RowStats of_column;
        if constexpr (P::kOwnsKeys) of_column = stats[lane.column + offset];
#pragma unroll
        for (int i = 0; i < kLines; ++i) {
          const int of_line = line + place(i) + lane.row;
          const int m = P::kOwnsKeys ? at : of_line, key = P::kOwnsKeys ? of_line : at;
          bool hidden = false, kept = true;
          if constexpr (kMasked) {
            if constexpr (kHidesFirst) hidden = offset < seen[i].begin;
            if constexpr (kHidesLast) hidden |= offset >= seen[i].end;
            if constexpr (MaskOf<P>::kIntervals) hidden |= (P::kOwnsKeys ? hidden_lines[i] : hidden_column).contains(m);
          }
          if constexpr (P::kDropout) kept = dropout.kept(i, n, e);
          float &score = scores[i / 2][n][i % 2 * 2 + e], &of_weight = gradients[i / 2][n][i % 2 * 2 + e];
          gradient.apply(score, of_weight, P::kOwnsKeys ? of_column : stats[i], m, key, hidden, kept);
        }
      }
    }
  }
};

}  // namespace fagen
