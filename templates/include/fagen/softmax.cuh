// Online softmax over the rows that one thread shares with the three other lanes of its quad.
#pragma once
#include <math.h>

#include "fagen/ptx/math.cuh"

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Scores come in raw; `scale_log2` takes them to the base-2 logarithm inside the exponential's one FMA.
// `reference` is what is subtracted before the exponential: the rows' maximum, or one that is near enough below it.
// The sum stays per thread until the end. Any reference gives the same O / sum, so keeping an old one is exact.
//
// The FMA subtracts reference * scale as rounded to float32. The rounding multiplies all weights of a row alike and
// cancels in O / sum, unless it is of whole powers of two: from |reference * scale| = 2^24 on. `too_large` tells of that
// long before. From then on the reference is taken from the scores first, which is exact near it, with no offset left
// for the FMA; and a slack that every tile outgrows brings each of them to where that is done.
template <int kRows, bool kDeferred>
struct OnlineSoftmax {
  // a weight may grow to 2^8 before a deferred reference moves: exact in float32, safe in 16 bits
  static constexpr float kSlack_log2 = 8.f;
  // an offset up to here rounds by no more than 2^-10
  static constexpr float kLargest_log2 = 16384.f;

  float reference[kRows], sum[kRows], offset[kRows];
  float scale_log2, slack;

  __device__ __forceinline__ explicit OnlineSoftmax(float scale_log2) : scale_log2(scale_log2) { begin(); }

  // Rows that have seen no key yet.
  __device__ __forceinline__ void begin() {
    slack = kSlack_log2 / scale_log2;
#pragma unroll
    for (int r = 0; r < kRows; ++r) reference[r] = -INFINITY, sum[r] = 0.f;
  }

  // Whether a row of this thread has outgrown its reference by the slack.
  __device__ __forceinline__ bool outgrown(const float (&tile_max)[kRows]) const {
    bool grown = !kDeferred;
#pragma unroll
    for (int r = 0; r < kRows; ++r) grown |= tile_max[r] - reference[r] >= slack;  // no: NaN, where both are -inf
    return grown;
  }

  // Move the references to the rows' maxima; O is to be multiplied by `factor`, as the sums are here.
  __device__ __forceinline__ void move(const float (&row_max)[kRows], float (&factor)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float next = fmaxf(reference[r], row_max[r]);
      // a row that has seen nothing yet has no weight to rescale: 2^-inf = 0 once it has, and 0 * 0 until then
      factor[r] = next == -INFINITY ? 0.f : ptx::ex2((reference[r] - next) * scale_log2);
      reference[r] = next;
      sum[r] *= factor[r];
    }
  }

  // The reference, or 0 where no key has been seen yet.
  __device__ __forceinline__ float finite_reference(int r) const {
    return reference[r] == -INFINITY ? 0.f : reference[r];
  }
  // What is added to the scaled scores.
  __device__ __forceinline__ void settle() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) offset[r] = -finite_reference(r) * scale_log2;
  }
  __device__ __forceinline__ float weight(float score, int r) const {
    return ptx::ex2(fmaf(score, scale_log2, offset[r]));
  }

  __device__ __forceinline__ bool too_large() const {
    bool large = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) large |= fabsf(offset[r]) > kLargest_log2;
    return large;
  }
  // Instead of `settle`, where references are taken from the scores themselves.
  __device__ __forceinline__ void settle_taken() {
    slack = -INFINITY;
#pragma unroll
    for (int r = 0; r < kRows; ++r) offset[r] = 0.f;
  }

  // log sum exp of row r in natural logarithm, given the whole row's sum
  __device__ __forceinline__ float lse(int r, float row_sum) const {
    return row_sum == 0.f ? -INFINITY : reference[r] * scale_log2 * 0.69314718056f + logf(row_sum);
  }
};
