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
template <class C>
struct Fp8Softmax {
  static constexpr bool kScales = !(C::kSoftcap || C::kAlibi);
  static constexpr int kFactors = C::kScaleBlock > 0 ? 2 : 1;  // one of both rows, unless they may differ
  // the reference of rows that have seen no key: finite, so that no tile has to ask; scores below it count as hidden
  static constexpr float kNoKeys = -1e30f;

  float reference[2], sum[2];
  float scale[kFactors];

  __device__ __forceinline__ float scale_of(int r) const { return scale[r % kFactors]; }
  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int r = 0; r < 2; ++r) reference[r] = kNoKeys, sum[r] = 0.f;
  }

  // The logarithm of a row's largest score, and no less: a reference below it would be a weight above 1.
  __device__ __forceinline__ float log2_of_max(float score, int r) const {
    return kScales ? __fmul_ru(score, scale_of(r)) : score;
  }
  __device__ __forceinline__ bool exceeds(const float (&max_log2)[2]) const {
    return max_log2[0] > reference[0] || max_log2[1] > reference[1];
  }
  // Raise the references to the rows' maxima; the caller multiplies O by `factor`, as the sums are here.
  __device__ __forceinline__ void set_reference(const float (&max_log2)[2], float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float next = fmaxf(reference[r], max_log2[r]);
      factor[r] = ptx::ex2(reference[r] - next);
      reference[r] = next;
      sum[r] *= factor[r];
    }
  }

  // The weight of a score of row r, times kWeightScale.
  template <bool kOnFma>
  __device__ __forceinline__ float exponentiate(float score, int r) const {
    const float scale = kScales ? scale_of(r) : 1.f;
    if constexpr (kOnFma)
      return exp2_on_fma(fmaf(score, scale, -reference[r])) * kWeightScale;
    else
      return ptx::ex2(fmaf(score, scale, kWeightScaleLog2 - reference[r]));
  }

  // Log-sum-exp of row r, natural, given the whole row's sum.
  __device__ __forceinline__ float lse(int r, float row_sum) const {
    return row_sum == 0.f ? -INFINITY : reference[r] * 0.69314718056f + logf(row_sum);
  }
};

}  // namespace fagen
