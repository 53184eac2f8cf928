// Between memory and tiles: squares of rows, keys and values made contiguous floats.
#pragma once
#include "fagen/cpu/element.h"

namespace fagen {

// `count` <= kLanes rows from p, columns d ... d + kLanes - 1; what lies outside is 0.
template <class Element>
FAGEN_INLINE void load_square(vec (&x)[kLanes], const Element* p, int64_t stride, int count, int columns) {
  for (int i = 0; i < kLanes; ++i)
    x[i] = i >= count ? vec{} : columns >= kLanes ? load(p + i * stride) : load_some(p + i * stride, columns);
}

// The rows back to memory, of them `count` and of each `columns`, where the square has more.
template <class Element>
FAGEN_INLINE void store_square(Element* p, int64_t stride, const vec (&x)[kLanes], int count, int columns) {
  for (int i = 0; i < kLanes && i < count; ++i)
    columns >= kLanes ? store(p + i * stride, x[i]) : store_some(p + i * stride, x[i], columns);
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
