// Between memory and the state of rows: queries turned into lanes, outputs turned back.
#pragma once
#include <math.h>
#include <string.h>

#include "fagen/cpu/pack.h"
#include "fagen/cpu/softmax.h"

namespace fagen {

// Queries times `sign`, transposed, and the state before the first key.
template <class State, class Element>
inline void open_rows(State& rows, const Element* q, int64_t stride, int count, int head_dim, float sign) {
  constexpr int kWidth = sizeof(rows.sum) / sizeof(float);
  for (int lane = 0; lane < kWidth; lane += kLanes)
    for (int d = 0; d < head_dim; d += kLanes) {
      vec x[kLanes];
      load_square(x, q + lane * stride + d, stride, count - lane, head_dim - d);
      transpose(x);
      for (int i = 0; i < kLanes; ++i) store(&rows.q[d + i][lane], x[i] * sign);
    }
  memset(rows.o, 0, sizeof(rows.o));
  memset(rows.sum, 0, sizeof(rows.sum));
  for (float& max : rows.max) max = -INFINITY;
}

// o / sum times `scale`, transposed back, and the log-sum-exp. Rows that saw nothing give 0 and -inf.
template <class State, class Element>
inline void close_rows(State& rows, Element* o, int64_t stride, float* lse, float factor, float scale, int count,
                       int head_dim_v) {
  for (int lane = 0; lane < count; lane += kLanes) {
    const vec sum = load(rows.sum + lane);
    const vec inverse = sum == vec{} ? vec{} : scale / sum;
    for (int d = 0; d < head_dim_v; d += kLanes) {
      vec x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = load(&rows.o[d + i][lane]) * inverse;
      transpose(x);
      store_square(o + lane * stride + d, stride, x, count - lane, head_dim_v - d);
    }
  }
  if (!lse) return;
  for (int i = 0; i < count; ++i)
    lse[i] = rows.sum[i] == 0 ? -INFINITY : rows.max[i] * (factor * kLn2) + logf(rows.sum[i]);
}

}  // namespace fagen
