// A line is what the softmax runs along: a row, or a column. A team of threads walks it, each from `first` to `end` by
// `step`, and all that reads or writes elements is here.
#pragma once
#include "fagen/abi/softmax.h"
#include "fagen/rowwise/vector.cuh"

namespace fagen {

template <class Element>
__device__ __forceinline__ Element* element_at(const fagen_tensor& t, int64_t batch, int64_t row, int64_t column) {
  return static_cast<Element*>(t.data) + batch * t.stride[0] + row * t.stride[1] + column;
}

// How many lines there are, and how many parts each is cut into, of so many steps: vectors, or elements of a column.
struct Grid {
  int64_t lines;
  int parts, part_steps;
};

// A row in vectors that lie at multiples of their size in memory. The first and the last one may lie partly outside.
template <class In, class Out, int kWidth, int kInputs>
struct RowLine {
  const In* from[kInputs];  // the first vector, which may begin before the row
  Out* to;
  int skipped, length;  // elements of the first vector before the row; of the row
  int first, end;       // vectors
  bool whole_loads[kInputs], whole_stores;
  bool whole;  // all vectors are, and none lies partly outside

  __device__ RowLine(const fagen_softmax_params& p, int64_t index, int member, int part, int part_steps) {
    const int64_t batch = p.batch == 1 ? 0 : index / p.rows, row = index - batch * p.rows;
    from[0] = element_at<In>(p.x, batch, row, 0);
    if constexpr (kInputs == 2) from[1] = element_at<In>(p.dout, batch, row, 0);
    to = element_at<Out>(p.out, batch, row, 0);
    skipped = int(reinterpret_cast<uintptr_t>(from[0]) / sizeof(In) % kWidth), length = p.columns;
#pragma unroll
    for (int i = 0; i < kInputs; ++i) {
      from[i] -= skipped;
      whole_loads[i] = reinterpret_cast<uintptr_t>(from[i]) % (sizeof(In) * kWidth) == 0;
    }
    to -= skipped;
    whole_stores = reinterpret_cast<uintptr_t>(to) % kStoreAlignment<Out, kWidth> == 0;
    whole = skipped == 0 && length % kWidth == 0 && whole_loads[0] && whole_loads[kInputs - 1] && whole_stores;
    const int vectors = (skipped + length + kWidth - 1) / kWidth;
    first = part * part_steps + member;
    end = vectors - part * part_steps < part_steps ? vectors : (part + 1) * part_steps;
  }

  // Elements outside of the row are `fill`.
  template <bool kWhole>
  __device__ __forceinline__ Vector<In, kWidth> load(int input, int at, float fill) const {
    const In* p = from[input] + int64_t(at) * kWidth;
    if constexpr (kWhole) return Vector<In, kWidth>::load(p);
    const int begin = at * kWidth - skipped;
    if (whole_loads[input] && begin >= 0 && begin + kWidth <= length) return Vector<In, kWidth>::load(p);
    float x[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = begin + i >= 0 && begin + i < length ? to_float(p[i]) : fill;
    return Vector<In, kWidth>::of(x);
  }

  template <bool kWhole>
  __device__ __forceinline__ void store(int at, const float (&x)[kWidth]) const {
    Out* p = to + int64_t(at) * kWidth;
    if constexpr (kWhole) return store_floats<Out>(p, x);
    const int begin = at * kWidth - skipped;
    if (whole_stores && begin >= 0 && begin + kWidth <= length) return store_floats<Out>(p, x);
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      if (begin + i >= 0 && begin + i < length) p[i] = from_float<Out>(x[i]);
  }
};

// A column, element by element: neighbouring threads have neighbouring columns, so that their loads are coalesced.
template <class In, class Out, int kWidth, int kInputs>
struct ColumnLine {
  static_assert(kWidth == 1, "a column has no vectors");
  static constexpr bool whole = true;

  const In* from[kInputs];
  Out* to;
  int64_t stride[kInputs], out_stride;
  int first, end;  // rows

  __device__ ColumnLine(const fagen_softmax_params& p, int64_t index, int member, int part, int part_steps) {
    const int64_t batch = p.batch == 1 ? 0 : index / p.columns, column = index - batch * p.columns;
    from[0] = element_at<In>(p.x, batch, 0, column), stride[0] = p.x.stride[1];
    if constexpr (kInputs == 2) from[1] = element_at<In>(p.dout, batch, 0, column), stride[1] = p.dout.stride[1];
    to = element_at<Out>(p.out, batch, 0, column), out_stride = p.out.stride[1];
    first = part * part_steps + member;
    end = p.rows - part * part_steps < part_steps ? p.rows : (part + 1) * part_steps;
  }

  template <bool>
  __device__ __forceinline__ Vector<In, 1> load(int input, int at, float) const {
    return Vector<In, 1>::load(from[input] + at * stride[input]);
  }
  template <bool>
  __device__ __forceinline__ void store(int at, const float (&x)[1]) const {
    to[at * out_stride] = from_float<Out>(x[0]);
  }
};

}  // namespace fagen
