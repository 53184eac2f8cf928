// The online softmax where weights are exact to float32, and its last division.
#pragma once
#include <float.h>
#include <math.h>

#include "fagen/ptx/math.cuh"

namespace fagen {

// The online softmax of kRows rows in float32. The reference is subtracted before the scale: that is exact near it,
// however large the scores are, and what came before a larger one is brought to it without an error of its own.
template <int kRows>
struct ExactSoftmax {
  static constexpr float kLog2e = 1.4426950408889634f;
  float reference[kRows], sum[kRows];
  float scale, scale_log2;

  __device__ __forceinline__ explicit ExactSoftmax(float scale) : scale(scale), scale_log2(scale * kLog2e) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) reference[i] = -FLT_MAX, sum[i] = 0.f;  // finite, so that no tile has to ask
  }
  // Raise a row's reference to a maximum; O is multiplied by what is returned, as the sum is here.
  __device__ __forceinline__ float set_reference(int i, float row_max) {
    const float next = fmaxf(reference[i], row_max), factor = ptx::ex2((reference[i] - next) * scale_log2);
    reference[i] = next;
    sum[i] *= factor;
    return factor;
  }
  __device__ __forceinline__ float exponentiate(float score, int i) const {
    return ptx::ex2((score - reference[i]) * scale_log2);
  }
  // Log-sum-exp of a row, natural, given the whole row's sum.
  __device__ __forceinline__ float lse(int i, float row_sum) const {
    return row_sum == 0.f ? -INFINITY : fmaf(reference[i], scale, logf(row_sum));
  }
};

// x / y, given about 1 / y: rounded once, so that a row whose one weight is 1 is V as it is.
__device__ __forceinline__ float quotient(float x, float y, float inverse) {
  const float near = x * inverse, rest = fmaf(-near, y, x);
  return fabsf(rest) < INFINITY ? fmaf(rest, inverse, near) : near;  // no rest where x is not finite
}

}  // namespace fagen
