// The cells of a pair of tiles, from scores to P and from dP to dS, on accumulators: rows that the block owns down,
// those that it visits across.
#pragma once
#include <math.h>

#include "fagen/ptx/math.cuh"
#include "fagen/ptx/shared.cuh"
#include "fagen/sm90/backward_large/share.cuh"

namespace fagen {

// A thread's place in an accumulator piece of 16 rows and 8 columns: it holds rows `row` and `row` + 8, columns
// `column` and `column` + 1.
struct Place {
  int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
};

// A score of a head to its weight.
template <class P>
struct ScoreChange {
  static constexpr float kLog2e = 1.4426950408889634f;
  float scale, cap_log2, slope_log2;
  int shift;

  __device__ __forceinline__ ScoreChange(const fagen_backward_params& p, int batch, int head)
      : scale(P::kSoftcap ? p.scale / p.softcap : p.scale * kLog2e),
        cap_log2(p.softcap * kLog2e),
        slope_log2(0.f),
        shift(p.seqlen_k - p.seqlen_q) {
    if constexpr (P::kAlibi)
      slope_log2 = static_cast<const float*>(p.alibi_slopes.data)[batch * p.alibi_slopes.stride[0] + head] * kLog2e;
  }
  // The weight is at most 1, however large scores round. `derivative`: of what softcap did.
  __device__ __forceinline__ float weight(float score, float lse_log2, int row, int key, float& derivative) const {
    float exponent;
    if constexpr (P::kSoftcap) {
      const float capped = ptx::tanh_approx(score * scale);
      derivative = 1.f - capped * capped;
      exponent = fmaf(capped, cap_log2, -lse_log2);
    } else {
      exponent = fmaf(score, scale, -lse_log2);
    }
    if constexpr (P::kAlibi) exponent -= slope_log2 * fabsf(float(row + shift - key));
    return ptx::ex2(fminf(exponent, 0.f));
  }
};

// The stats of a thread's cells, from shared memory, where its first row's lie: of the two columns of a piece, or where
// rows are owned of its two lines.
template <class P>
struct CellStats {
  uint32_t first;
  float2 two[2];

  __device__ __forceinline__ explicit CellStats(uint32_t first) : first(first) {
    constexpr int kNext = (P::kOwnsKeys ? 1 : 8) * int(sizeof(RowStats));
    two[0] = ptx::ld_shared_8(first), two[1] = ptx::ld_shared_8(first + kNext);
  }
  __device__ __forceinline__ void move_to(int piece) {
    if (P::kOwnsKeys && piece > 0) *this = CellStats(first + 8 * int(sizeof(RowStats)));
  }
  // of the cell of accumulator i
  __device__ __forceinline__ float lse_log2(int i) const { return two[P::kOwnsKeys ? i % 2 : i / 2].x; }
  __device__ __forceinline__ float delta(int i) const { return two[P::kOwnsKeys ? i % 2 : i / 2].y; }
};

// A thread's cells lie in lines `own` and `own` + 8, in columns `other` + 8 j and the next one of each.
template <class P, int kPieces>
struct Cells {
  using Sums = float[kPieces][4];
  // whether a line may have hidden cells before its visible ones, and after them; keys end somewhere in any case
  static constexpr bool kHidesFirst = P::kOwnsKeys || MaskOf<P>::kHasBegin;
  static constexpr bool kHidesLast = !P::kOwnsKeys || MaskOf<P>::kHasBegin;

  const MaskOf<P>& mask;
  int own, other;

  __device__ __forceinline__ int row(int i, int j) const {
    return P::kOwnsKeys ? other + j * 8 + i % 2 : own + i / 2 * 8;
  }
  __device__ __forceinline__ int key(int i, int j) const {
    return P::kOwnsKeys ? own + i / 2 * 8 : other + j * 8 + i % 2;
  }

  // The visible cells of a line, counted from the thread's first column.
  __device__ __forceinline__ Band::Columns visible(int line) const {
    if constexpr (!P::kOwnsKeys) return mask.band.visible_columns(line, other, 0);
    return {line < mask.band.seqlen_k ? line - mask.band.last - other : kFar, line - mask.band.first + 1 - other};
  }

  // S becomes P.
  template <bool kMasked>
  __device__ __forceinline__ void weigh(Sums& s, Sums& derivatives, const ScoreChange<P>& change,
                                        CellStats<P> stats) const {
    const Band::Columns seen[2] = {visible(own), visible(own + 8)};
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      stats.move_to(j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = j * 8 + i % 2;
        s[j][i] = change.weight(s[j][i], stats.lse_log2(i), row(i, j), key(i, j), derivatives[P::kSoftcap ? j : 0][i]);
        if constexpr (kMasked) {
          bool hidden = false;
          if constexpr (kHidesFirst) hidden = column < seen[i / 2].begin;
          if constexpr (kHidesLast) hidden |= column >= seen[i / 2].end;
          if (hidden) s[j][i] = 0.f;
        }
      }
    }
    if constexpr (kMasked && MaskOf<P>::kIntervals) hide(s);
  }
  // Weights of rows that intervals hide are 0.
  __device__ __forceinline__ void hide(Sums& s) const {
    const auto hidden = [&](int n) { return mask.intervals.at(min(n, mask.intervals.last_key)); };
    HiddenRows rows[2];  // of a line's key, or of a column's
    if constexpr (P::kOwnsKeys) rows[0] = hidden(own), rows[1] = hidden(own + 8);
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      if constexpr (!P::kOwnsKeys) rows[0] = hidden(other + j * 8), rows[1] = hidden(other + j * 8 + 1);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (rows[P::kOwnsKeys ? i / 2 : i % 2].contains(row(i, j))) s[j][i] = 0.f;
    }
  }

  // P and dP become dS, in place of P.
  __device__ __forceinline__ void differentiate(Sums& weights, const Sums& dp, const Sums& derivatives,
                                                CellStats<P> stats) const {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      stats.move_to(j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[j][i] *= dp[j][i] - stats.delta(i);
        if constexpr (P::kSoftcap) weights[j][i] *= derivatives[j][i];
      }
    }
  }
};

}  // namespace fagen
