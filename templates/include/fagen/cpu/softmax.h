// The online softmax over queries that lie along lanes: every step is vertical.
#pragma once
#include "fagen/cpu/math.h"

namespace fagen {

// Some of a group's queries, as whole vectors: pointers to the first ones.
template <int kWidth>
struct Columns {
  float *q, *o, *max, *sum;
};

// The state of a group of kWidth queries while key tiles pass. A weight is
// 2^(factor * (score - max)), so the scale costs nothing and rounds neither q nor k.
template <int kHeadDim, int kHeadDimV, int kWidth>
struct GroupState {
  alignas(64) float q[kHeadDim][kWidth];
  float o[kHeadDimV][kWidth];  // sum of weight * v
  float max[kWidth];           // the scores' maximum, or less by at most the slack
  float sum[kWidth];           // the sum of the weights

  Columns<kWidth> from(int lane) { return {q[0] + lane, o[0] + lane, max + lane, sum + lane}; }
};

// Scores may exceed the maximum by this much before O is rescaled: weights then stay below 2^8, safe in float32.
constexpr float kSlackLog2 = 8;

// A row that has seen no key has a maximum of -inf; subtracting 0 instead keeps its weights at 0 and not NaN.
FAGEN_INLINE vec finite(vec max) { return max == broadcast(-INFINITY) ? vec{} : max; }

template <int kVectors, int kWidth>
FAGEN_INLINE void rescale(Columns<kWidth> rows, const vec (&top)[kVectors], ScaledExp2 exp2, int head_dim_v) {
  vec shrink[kVectors];
  ivec begun{};
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    const vec old = load(rows.max + v * kLanes);
    begun |= old != broadcast(-INFINITY);
    shrink[v] = exp2(old - finite(top[v]));
    store(rows.max + v * kLanes, top[v]);
    store(rows.sum + v * kLanes, load(rows.sum + v * kLanes) * shrink[v]);
  }
  if (!any(begun)) return;  // O is still 0
  for (int d = 0; d < head_dim_v; ++d)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      float* at = rows.o + d * kWidth + v * kLanes;
      store(at, load(at) * shrink[v]);
    }
}

// Turn scores into weights, in place. `finish(x, v, key)` makes a score of a raw product: softcap, bias, mask.
template <int kVectors, bool kFinish, int kWidth, class Finish>
FAGEN_INLINE void softmax(Columns<kWidth> rows, float* scores, int keys, ScaledExp2 exp2, int head_dim_v,
                          Finish finish) {
  vec top[kVectors];
  ivec grown{};
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) top[v] = load(rows.max + v * kLanes);
  for (int key = 0; key < keys; ++key)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      float* at = scores + key * kWidth + v * kLanes;
      vec x = load(at);
      if constexpr (kFinish) store(at, x = finish(x, v, key));
      top[v] = fagen::max(x, top[v]);
    }
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) grown |= (top[v] - load(rows.max + v * kLanes)) * exp2.factor > kSlackLog2;
  if (any(grown)) rescale<kVectors>(rows, top, exp2, head_dim_v);

  vec max[kVectors], sum[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    max[v] = finite(load(rows.max + v * kLanes));
    sum[v] = load(rows.sum + v * kLanes);
  }
  for (int key = 0; key < keys; ++key)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      float* at = scores + key * kWidth + v * kLanes;
      const vec weight = exp2(load(at) - max[v]);
      store(at, weight);
      sum[v] += weight;
    }
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) store(rows.sum + v * kLanes, sum[v]);
}

}  // namespace fagen
