// Online softmax of the two rows that a thread shares with the three other lanes of its quad. It is that of
// common/softmax.cuh but for the unit of references, which are base-2 logarithms here: where blocks of q and k have
// descales of their own, the scale of a score differs from row to row and from key tile to key tile.
#pragma once
#include "fagen/common/exp2.cuh"
#include "fagen/common/softmax.cuh"
#include "fagen/sm90/forward_fp8/weights.cuh"

namespace fagen {

// `scale` takes the products of the present key tile to base-2 logarithms; with score mods these do that themselves.
// References are at or above all scores of their rows: weights are at most 1.
//
// The largest weight of a row must be 1, which e4m3 does not round, or nearly. Where logarithms are so large that they
// round, scores of a tile are first taken relative to its own maximum, which is exact near it.
template <class C>
struct Fp8Softmax {
  static constexpr bool kScales = !(C::kSoftcap || C::kAlibi);
  static constexpr int kFactors = C::kScaleBlock > 0 ? 2 : 1;  // one of both rows, unless they may differ
  // a logarithm up to here rounds by no more than 2^-10
  static constexpr float kLargestLog2 = 16384.f;
  // the reference of rows that have seen no key: finite, so that no tile has to ask; scores below it count as hidden
  static constexpr float kNoKeys = -1e30f;

  float reference[2], sum[2];
  float offset[2];  // of the present key tile: added to a score's logarithm, it makes that of the weight
  float scale[kFactors];

  __device__ __forceinline__ float scale_of_products(int r) const { return scale[r % kFactors]; }
  __device__ __forceinline__ float scale_of(int r) const { return kScales ? scale_of_products(r) : 1.f; }
  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int r = 0; r < 2; ++r) reference[r] = kNoKeys, sum[r] = 0.f;
  }

  // The logarithm of a row's largest score, and no less: a reference below it would be a weight above 1.
  __device__ __forceinline__ float log2_of_max(float score, int r) const {
    return kScales ? __fmul_ru(score, scale_of(r)) : score;
  }
  // True if a row's reference must rise, or is one of those that round.
  __device__ __forceinline__ bool must_move(const float (&row_max)[2]) const {
    bool moves = false;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      moves |= log2_of_max(row_max[r], r) > reference[r] || (kScales && fabsf(reference[r]) > kLargestLog2);
    return moves;
  }
  // Raise the references to the rows' maxima; the caller multiplies O by `factor`, as the sums are here.
  __device__ __forceinline__ void set_reference(const float (&row_max)[2], float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float next = fmaxf(reference[r], log2_of_max(row_max[r], r));
      factor[r] = ptx::ex2(reference[r] - next);
      reference[r] = next;
      sum[r] *= factor[r];
    }
  }
  __device__ __forceinline__ void refresh_offset() {
#pragma unroll
    for (int r = 0; r < 2; ++r) offset[r] = kWeightScaleLog2 - reference[r];
  }
  __device__ __forceinline__ bool offset_rounds() const {
    bool rounds = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) rounds |= kScales && fabsf(offset[r]) > kLargestLog2 && reference[r] != kNoKeys;
    return rounds;
  }
  // The scores relative to their reference, as the tile's maximum tells that: exactly where it is its own.
  template <int kPieces>
  __device__ __forceinline__ void subtract_references(float (&scores)[kPieces][4], const float (&row_max)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float below = __fdividef(reference[r] - log2_of_max(row_max[r], r), scale_of(r));
      const float subtracted = row_max[r] == -INFINITY ? 0.f : row_max[r] + below;
#pragma unroll
      for (auto& piece : scores) piece[2 * r] -= subtracted, piece[2 * r + 1] -= subtracted;
      offset[r] = kWeightScaleLog2;
    }
  }

  // The weight of a score of row r, times kWeightScale.
  template <bool kOnFma>
  __device__ __forceinline__ float exponentiate(float score, int r) const {
    if constexpr (kOnFma)
      return exp2_on_fma(fmaf(score, scale_of(r), offset[r] - kWeightScaleLog2)) * kWeightScale;
    else
      return ptx::ex2(fmaf(score, scale_of(r), offset[r]));
  }

  // Log-sum-exp of row r, natural, given the whole row's sum.
  __device__ __forceinline__ float lse(int r, float row_sum) const {
    return row_sum == 0.f ? -INFINITY : reference[r] * 0.69314718056f + logf(row_sum);
  }
};

}  // namespace fagen
