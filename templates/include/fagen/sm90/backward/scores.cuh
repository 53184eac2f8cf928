// From scores to P, and from dP to dS, on the accumulators of a tile: keys down, rows of q across.
#pragma once
#include "fagen/common/dropout.cuh"
#include "fagen/common/element.cuh"
#include "fagen/common/exp2.cuh"
#include "fagen/ptx/math.cuh"
#include "fagen/ptx/shared.cuh"
#include "fagen/sm90/backward/walk.cuh"

namespace fagen {

// A thread's place in an accumulator piece of 16 rows and 8 columns: it holds rows `row` and `row` + 8, columns
// `column` and `column` + 1.
struct Place {
  int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
};

// Exponents of P in base 2: a scaled score, changed by softcap and ALiBi, less the row's LSE.
template <class C>
struct ScoreChange {
  static constexpr float kLog2e = 1.4426950408889634f;
  float scale, cap_log2, slope_log2;
  int shift;
  Dropout dropout;

  __device__ __forceinline__ explicit ScoreChange(const fagen_backward_params& p)
      : scale(C::kSoftcap ? p.scale / p.softcap : p.scale * kLog2e),
        cap_log2(p.softcap * kLog2e),
        slope_log2(0.f),
        shift(p.seqlen_k - p.seqlen_q) {
    if constexpr (C::kDropout) dropout = make_uniform(Dropout::of(p, 0, 0));
  }
  __device__ __forceinline__ void set_head(const fagen_backward_params& p, int batch, int head) {
    if constexpr (C::kAlibi)
      slope_log2 = static_cast<const float*>(p.alibi_slopes.data)[batch * p.alibi_slopes.stride[0] + head] * kLog2e;
    if constexpr (C::kDropout) dropout.plane = batch * p.heads + head;
  }
  // The exponent, and under softcap the derivative of what softcap did.
  __device__ __forceinline__ float exponent(float score, float lse_log2, int distance, float& derivative) const {
    if constexpr (C::kSoftcap) {
      const float t = ptx::tanh_approx(score * scale);
      derivative = 1.f - t * t;
      score = t * cap_log2;
      if constexpr (C::kAlibi) score -= slope_log2 * fabsf(float(distance));
      return score - lse_log2;
    } else if constexpr (C::kAlibi) {
      return fmaf(score, scale, -slope_log2 * fabsf(float(distance))) - lse_log2;
    } else {
      return fmaf(score, scale, -lse_log2);
    }
  }
};

// Whether intervals can hide other rows than the first and the last of those that see a key.
template <class C>
constexpr bool kHidesWithin = MaskOf<C>::kIntervals && (C::kLTE >= 0 || C::kUTS >= 0);

// The rows of q that see a thread's two keys.
template <class C>
struct SeenRows {
  int begin[2], end[2];
  HiddenRows hidden[kHidesWithin<C> ? 2 : 1];

  __device__ __forceinline__ SeenRows(const RowBand& band, int key, uint32_t bounds) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      begin[r] = band.begin(key + r * 8), end[r] = band.end(key + r * 8);
      if constexpr (MaskOf<C>::kIntervals) {
        const uint4 x = ptx::ld_shared_16(bounds + r * 8 * 16);
        if constexpr (kHidesWithin<C>)
          hidden[r] = {int(x.x), int(x.y), int(x.z), int(x.w)};
        else
          begin[r] = max(begin[r], int(x.w)), end[r] = min(end[r], int(x.x));
      }
    }
  }
  __device__ __forceinline__ bool contains(int m, int r) const {
    bool seen = m >= begin[r] && m < end[r];
    if constexpr (kHidesWithin<C>) seen &= !hidden[r].contains(m);
    return seen;
  }
};

// The LSE, or delta, of a thread's rows. Loads from shared memory wait for the products that were started before them,
// so that the LSE comes before those where registers are left for it. Delta takes its place while dP is awaited.
template <class C, bool kSeeded = false>
struct RowStats {
  static constexpr bool kEarly = !kSeeded && C::kTileM == 64 && C::kWarpgroups < 3 && !kHidesWithin<C>;
  uint32_t from;
  float2 held[kEarly ? C::kTileM / 8 : 1];

  __device__ __forceinline__ explicit RowStats(uint32_t from) : from(from) {
#pragma unroll
    for (int j = 0; kEarly && j < C::kTileM / 8; ++j) held[j] = ptx::ld_shared_8(from + j * 32);
  }
  // of the rows that the thread has of a piece
  __device__ __forceinline__ float2 of(int piece) const {
    if (kSeeded) return float2();  // it is in the accumulators
    return kEarly ? held[kEarly ? piece : 0] : ptx::ld_shared_8(from + piece * 32);
  }
};

// Begin accumulators with a value a row.
template <int kPieces>
__device__ __forceinline__ void seed(float (&c)[kPieces][4], uint32_t from) {
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const float2 stat = ptx::ld_shared_8(from + j * 32);
    c[j][0] = c[j][2] = stat.x, c[j][1] = c[j][3] = stat.y;
  }
}

// 2^x for x <= 0, and 1 beyond: a weight is at most 1, however large scores round. The special-function unit takes 16
// cycles for a weight of each of two warps, which would wait for it alone: some weights are computed by the FMA pipe.
template <class C>
__device__ __forceinline__ float weight_of(float x, int piece) {
  const bool on_fma = piece * C::kExpOnFma % 8 < C::kExpOnFma;
  return on_fma ? exp2_on_fma(x) : ptx::ex2(fminf(x, 0.f));
}

// P in place of the scores. `key` is the thread's first key, `m` its first row of q. Under softcap `derivatives` keeps
// those of its scores.
template <class C, bool kMasked, int kPieces>
__device__ __forceinline__ void exponentiate(float (&s)[kPieces][4], float (&derivatives)[kPieces][4],
                                             const ScoreChange<C>& change, const RowBand& band, int key, int m,
                                             const RowStats<C>& lse, uint32_t bounds) {
  const SeenRows<C> rows(band, key, bounds);
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const float2 lse_log2 = lse.of(j);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i / 2, e = i % 2, row = m + j * 8 + e;
      const float x = change.exponent(s[j][i], e ? lse_log2.y : lse_log2.x, row + change.shift - (key + r * 8),
                                      derivatives[C::kSoftcap ? j : 0][i]);
      const float weight = weight_of<C>(x, j);
      s[j][i] = !kMasked || rows.contains(row, r) ? weight : 0.f;
    }
  }
}

// ---- dropout

// The numbers of a thread's weights of 16 lines, which are rows of q, or keys if kTransposed, and of `kPieces` pieces
// of 8 columns. They are drawn while S is computed, or with three warpgroups, which have no registers for that, when it
// has come. Nothing where no weights are dropped.
template <class C, bool kTransposed, int kPieces, bool kDropout = C::kDropout>
struct DrawnWeights {
  template <bool kEarly>
  __device__ __forceinline__ void draw(const Dropout& dropout, int row, int key) {}
  __device__ __forceinline__ uint32_t factors(const Dropout& dropout, int i, int n) const { return 0; }
};

template <class C, bool kTransposed, int kPieces>
struct DrawnWeights<C, kTransposed, kPieces, true> {
  static constexpr int kCallBlocks = kPieces % 4 == 0 ? 2 : 1, kCalls = kPieces / 2 / kCallBlocks;

  uint32_t words[kCalls][2][2];

  // The first row of q and the first key of the warp are given, both multiples of 16.
  template <bool kEarly>
  __device__ __forceinline__ void draw(const Dropout& dropout, int row, int key) {
    if constexpr (kEarly == (C::kWarpgroups < 3)) draw(dropout, row, key);
  }
  // Factors of two weights of line i of piece n.
  __device__ __forceinline__ uint32_t factors(const Dropout& dropout, int i, int n) const {
    const uint32_t (&block)[2] = words[n / 2 / kCallBlocks][n / 2 % kCallBlocks];
    return kept_factors(dropout, block[kTransposed ? n % 2 : i], kTransposed ? i : n % 2);
  }

 private:
  __device__ __forceinline__ void draw(const Dropout& dropout, int row, int key) {
    const Place place;
    const bool odd = place.row % 2;
    const uint32_t lines = place.row / 2, columns = place.column / 2 + (kCallBlocks == 2 && odd ? 4 : 0);
    const uint32_t rows = row / 4 + (kTransposed ? columns : lines), keys = key / 4 + (kTransposed ? lines : columns);
#pragma unroll
    for (int i = 0; i < kCalls; ++i) {
      const uint32_t next = i * kCallBlocks * 4;
      draw_blocks<kTransposed, kCallBlocks == 2>(dropout, dropout.of_row(rows + (kTransposed ? next : 0)),
                                                 dropout.of_key(keys + (kTransposed ? 0 : next)), odd, words[i]);
#pragma unroll
      for (int block = 0; block < kCallBlocks; ++block) ptx::pin(words[i][block][0]), ptx::pin(words[i][block][1]);
    }
  }
};

__device__ __forceinline__ float2 halves_of(uint32_t pair) {
  __half2 halves;
  memcpy(&halves, &pair, 4);
  return __half22float2(halves);
}

// dS of a weight and its dP, which may be less delta already. With dropout dS and delta are divided by what makes up
// for dropped weights: `gradient_scale` has it.
template <class C>
__device__ __forceinline__ float gradient_of_score(float weight, float dp, float delta, float factor) {
  if constexpr (C::kDropout) return weight * fmaf(dp, factor, -delta);
  return weight * (kSeedsDp<C> ? dp : dp - delta);
}

}  // namespace fagen
