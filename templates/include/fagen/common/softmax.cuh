// Online softmax of the rows that a thread shares with the three other lanes of its quad.
#pragma once
#include <math.h>

#include "fagen/ptx/math.cuh"

namespace fagen {

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Scores come in raw; `scale_log2` takes them to the base-2 logarithm inside the exponential's one FMA.
// `reference` is subtracted before the exponential: the row's maximum, or a value near enough below it.
// The sum stays per thread until the end. Any reference gives the same O / sum, so keeping an old one is exact.
//
// The FMA subtracts reference * scale as rounded to float32. The rounding multiplies all weights of a row alike and
// cancels in O / sum, unless it is of whole powers of two: from |reference * scale| = 2^24 on. Long before that,
// references count as too large for the FMA: they are subtracted from the scores first, which is exact near them. Such
// rows, like those that have seen no key, have no limit, so every tile takes the path where references move.
template <int kRows, bool kDeferred>
struct OnlineSoftmax {
  // a weight may grow to 2^8 before a deferred reference moves: exact in float32, safe in 16 bits
  static constexpr float kSlackLog2 = 8.f;
  // an offset up to here rounds by no more than 2^-10
  static constexpr float kLargestLog2 = 16384.f;
  // the reference of rows that have seen no key: finite, so that no tile has to ask; scores below it count as hidden
  static constexpr float kNoKeys = -1e30f;

  float reference[kRows], limit[kRows], offset[kRows], sum[kRows];
  float scale_log2;

  __device__ __forceinline__ explicit OnlineSoftmax(float scale_log2) : scale_log2(scale_log2) { reset(); }

  // Rows that have seen no key.
  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) reference[r] = kNoKeys, limit[r] = -INFINITY, sum[r] = 0.f;
  }

  // True if a row of this thread is above its reference by more than the slack.
  __device__ __forceinline__ bool exceeds_slack(const float (&tile_max)[kRows]) const {
    bool exceeds = !kDeferred;
#pragma unroll
    for (int r = 0; r < kRows; ++r) exceeds |= tile_max[r] > limit[r];
    return exceeds;
  }

  // Raise the references to the rows' maxima; the caller multiplies O by `factor`, as the sums are here.
  __device__ __forceinline__ void set_reference(const float (&row_max)[kRows], float (&factor)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float next = fmaxf(reference[r], row_max[r]);
      factor[r] = ptx::ex2((reference[r] - next) * scale_log2);
      reference[r] = next;
      sum[r] *= factor[r];
    }
    refresh_limit();
  }

  // Compute offsets and limits from the references.
  __device__ __forceinline__ void refresh_limit() {
    refresh_offset();
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      limit[r] = fabsf(offset[r]) > kLargestLog2 ? -INFINITY : reference[r] + kSlackLog2 / scale_log2;
  }
  // The offset is added to the scaled scores.
  __device__ __forceinline__ void refresh_offset() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) offset[r] = -reference[r] * scale_log2;
  }
  __device__ __forceinline__ bool offset_too_large() const {
    bool large = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) large |= fabsf(offset[r]) > kLargestLog2 && reference[r] != kNoKeys;
    return large;
  }

  // The weight of a score of row r.
  __device__ __forceinline__ float exponentiate(float score, int r) const {
    return ptx::ex2(fmaf(score, scale_log2, offset[r]));
  }

  // Log-sum-exp of row r, natural, given the whole row's sum.
  __device__ __forceinline__ float lse(int r, float row_sum) const {
    return row_sum == 0.f ? -INFINITY : reference[r] * scale_log2 * 0.69314718056f + logf(row_sum);
  }
};

}  // namespace fagen
