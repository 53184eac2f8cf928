// The softmax, its logarithm and their gradients: the reduction along a line, then a function of each element.
#pragma once
#include <math.h>

#include "fagen/ptx/math.cuh"

namespace fagen {

constexpr float kLog2E = 1.4426950408889634f;

// The maximum of some elements and the sum of exp(x - maximum). Of no element, or of -inf alone: -inf and 0.
// NaN is no maximum, but makes the sum NaN; so does +inf.
struct SoftmaxState {
  float max = -INFINITY, sum = 0.f;
};

template <class Config, int kWidth>
struct ForwardSoftmax {
  static constexpr int kInputs = 1;
  static constexpr float kFill = -INFINITY;  // of elements outside: it changes no maximum, and its exponential is 0
  using State = SoftmaxState;

  // exp(x - max). The scale by log2 e follows the difference, or is folded into one multiply-add. The folded maximum is
  // rounded: all that is made of it must use the same rounded number, so that it cancels in the quotient.
  __device__ static float weight(float x, float max) {
    return ptx::ex2(Config::kFoldScale ? fmaf(x, kLog2E, -__fmul_rn(max, kLog2E)) : (x - max) * kLog2E);
  }
  // The factor of a sum whose maximum becomes another one.
  __device__ static float shrink(float from, float to) {
    return Config::kFoldScale ? ptx::ex2(__fmul_rn(from, kLog2E) - __fmul_rn(to, kLog2E)) : weight(from, to);
  }
  // The number to subtract: a maximum of -inf would give NaN for elements that others will outweigh.
  __device__ static float reference(float max) { return max == -INFINITY ? 0.f : max; }

  __device__ static void add_max(State& s, const float (&x)[1][kWidth]) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) s.max = fmaxf(s.max, x[0][i]);
  }
  __device__ static void add_sum(State& s, const float (&x)[1][kWidth]) {
    const float subtracted = reference(s.max);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) s.sum += weight(x[0][i], subtracted);
  }
  // Online: the sum follows the maximum.
  __device__ static void add(State& s, const float (&x)[1][kWidth]) {
    const float before = s.max;
    add_max(s, x);
    if (s.max > before) s.sum *= shrink(before, s.max);
    add_sum(s, x);
  }
  __device__ static void merge(State& s, State other) {
    const float top = fmaxf(s.max, other.max), subtracted = reference(top);
    s.sum = s.sum * shrink(s.max, subtracted) + other.sum * shrink(other.max, subtracted);
    s.max = top;
  }
  template <class Team>
  __device__ static void share_max(State& s, Team& team) {
    s.max = team.reduce_max(s.max);
  }
  template <class Team>
  __device__ static void share(State& s, Team& team) {
    const float mine = s.max;
    share_max(s, team);
    s.sum = team.reduce_sum(s.sum * shrink(mine, reference(s.max)));
  }

  float max, factor;  // 1 / sum, or its logarithm

  __device__ explicit ForwardSoftmax(State s) : max(s.max), factor(Config::kLog ? logf(s.sum) : 1.f / s.sum) {}
  __device__ float operator()(const float (&x)[1]) const {
    return Config::kLog ? x[0] - max - factor : weight(x[0], max) * factor;
  }
};

template <class Config, int kWidth>
struct BackwardSoftmax {
  static constexpr int kInputs = 2;  // what forward made, and its gradient
  static constexpr float kFill = 0.f;
  struct State {
    float sum = 0.f;
  };

  __device__ static void add(State& s, const float (&x)[2][kWidth]) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) s.sum = Config::kLog ? s.sum + x[1][i] : fmaf(x[0][i], x[1][i], s.sum);
  }
  __device__ static void merge(State& s, State other) { s.sum += other.sum; }
  template <class Team>
  __device__ static void share(State& s, Team& team) {
    s.sum = team.reduce_sum(s.sum);
  }

  float sum;

  __device__ explicit BackwardSoftmax(State s) : sum(s.sum) {}
  __device__ float operator()(const float (&x)[2]) const {
    return Config::kLog ? x[1] - ptx::ex2(x[0] * kLog2E) * sum : x[0] * (x[1] - sum);
  }
};

}  // namespace fagen
