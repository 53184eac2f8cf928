// Between memory and tiles: queries turned into lanes, outputs turned back, keys and values made contiguous floats.
#pragma once
#include <math.h>
#include <string.h>

#include "fagen/cpu/element.h"
#include "fagen/cpu/softmax.h"

namespace fagen {

// `count` <= kLanes rows from p, columns d ... d + kLanes - 1; what lies outside is 0.
template <class Element>
FAGEN_INLINE void load_square(vec (&x)[kLanes], const Element* p, int64_t stride, int count, int columns) {
  for (int i = 0; i < kLanes; ++i)
    x[i] = i >= count ? vec{} : columns >= kLanes ? load(p + i * stride) : load_some(p + i * stride, columns);
}

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

// o / sum, transposed back, and the log-sum-exp. Rows that saw nothing give 0 and -inf.
template <class State, class Element>
inline void close_rows(State& rows, Element* o, int64_t stride, float* lse, float factor, int count, int head_dim_v) {
  for (int lane = 0; lane < count; lane += kLanes) {
    const vec sum = load(rows.sum + lane);
    const vec inverse = sum == vec{} ? vec{} : 1.0f / sum;
    for (int d = 0; d < head_dim_v; d += kLanes) {
      vec x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = load(&rows.o[d + i][lane]) * inverse;
      transpose(x);
      for (int i = 0; i < kLanes && lane + i < count; ++i) {
        Element* to = o + (lane + i) * stride + d;
        head_dim_v - d >= kLanes ? store(to, x[i]) : store_some(to, x[i], head_dim_v - d);
      }
    }
  }
  if (!lse) return;
  for (int i = 0; i < count; ++i)
    lse[i] = rows.sum[i] == 0 ? -INFINITY : rows.max[i] * (factor * kLn2) + logf(rows.sum[i]);
}

// Rows of keys or values, as floats.
struct Tile {
  const float* data;
  int64_t stride;

  Tile from(int row) const { return {data + row * stride, stride}; }
};

template <class Element>
inline Tile pack(float* to, int64_t to_stride, const Element* from, int64_t stride, int rows, int columns) {
  for (int row = 0; row < rows; ++row) {
    const Element* p = from + row * stride;
    float* q = to + row * to_stride;
    int d = 0;
    for (; d + kLanes <= columns; d += kLanes) store(q + d, load(p + d));
    if (d < columns) store(q + d, load_some(p + d, columns - d));
  }
  return {to, to_stride};
}

}  // namespace fagen
