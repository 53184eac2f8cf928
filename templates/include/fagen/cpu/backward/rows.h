// The rows of a tile as the products of backward read them, and dQ on its way back to memory.
#pragma once
#include <math.h>

#include "fagen/cpu/math.h"
#include "fagen/cpu/pack.h"

namespace fagen {

// Rows of q and dout in both orders: along lanes for S and dP, along the head dimension for dK and dV.
template <int kHeadDim, int kHeadDimV, int kRows>
struct RowTile {
  // rows of memory are one cache line longer than the tile, so that a column does not fall into few cache sets
  static constexpr int kWidth = kRows + kMaxLanes, kStride = kHeadDim + kMaxLanes, kStrideV = kHeadDimV + kMaxLanes;

  alignas(64) float q_lanes[kHeadDim][kWidth];  // times the sign of the scale
  float dout_lanes[kHeadDimV][kWidth];
  float q[kRows][kStride];
  float dout[kRows][kStrideV];
  float lse_log2[kRows];  // +inf where a row sees nothing: its weights are 0
  float delta[kRows];     // the part of dS that is the same in all columns
};

// Some rows of one head in memory, and what forward made of them.
template <class Element>
struct RowSource {
  const Element *q, *o, *dout;
  int64_t q_stride, o_stride, dout_stride;
  const float *lse, *dlse;
  int count, head_dim, head_dim_v;
  float sign;
};

// Rows that see nothing are 0, whatever lies there: they have no part in any gradient.
template <int kWidth, int kRows, int kStride, class Element>
inline void load_rows(float (*lanes)[kWidth], float (&rows)[kRows][kStride], const Element* from, int64_t stride,
                      int count, int columns, const float* lse, float sign) {
  for (int row = 0; row < kRows; row += kLanes)
    for (int d = 0; d < columns; d += kLanes) {
      vec x[kLanes];
      load_square(x, from + row * stride + d, stride, count - row, columns - d);
      for (int i = 0; i < kLanes; ++i) {
        if (row + i < count && lse[row + i] == -INFINITY) x[i] = vec{};
        store(&rows[row + i][d], x[i]);
      }
      transpose(x);
      for (int i = 0; i < kLanes; ++i) store(&lanes[d + i][row], x[i] * sign);
    }
}

template <class Element>
inline float dot(const Element* a, const Element* b, int count) {
  vec sum{};
  int d = 0;
  for (; d + kLanes <= count; d += kLanes) sum += load(a + d) * load(b + d);
  if (d < count) sum += load_some(a + d, count - d) * load_some(b + d, count - d);
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  return total;
}

template <int kHeadDim, int kHeadDimV, int kRows, class Element>
inline void open_rows(RowTile<kHeadDim, kHeadDimV, kRows>& tile, const RowSource<Element>& from) {
  const auto& s = from;
  load_rows(tile.q_lanes, tile.q, s.q, s.q_stride, s.count, s.head_dim, s.lse, s.sign);
  load_rows(tile.dout_lanes, tile.dout, s.dout, s.dout_stride, s.count, s.head_dim_v, s.lse, 1.0f);
  for (int row = 0; row < kRows; ++row) {
    const bool sees = row < s.count && s.lse[row] != -INFINITY;
    tile.lse_log2[row] = sees ? s.lse[row] * kLog2E : INFINITY;
    tile.delta[row] = sees ? dot(s.dout + row * s.dout_stride, s.o + row * s.o_stride, s.head_dim_v) : 0;
    if (sees && s.dlse) tile.delta[row] -= s.dlse[row];
  }
}

// dQ, summed over parts that lie `part` floats apart and times the scale, transposed back.
template <int kWidth, class Element>
inline void store_query_gradient(Element* dq, int64_t stride, const float (*lanes)[kWidth], int parts, int64_t part,
                                 float scale, int count, int head_dim) {
  for (int row = 0; row < count; row += kLanes)
    for (int d = 0; d < head_dim; d += kLanes) {
      vec x[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        x[i] = load(&lanes[d + i][row]);
        for (int k = 1; k < parts; ++k) x[i] += load(&lanes[d + i][row] + k * part);
        x[i] *= scale;
      }
      transpose(x);
      store_square(dq + row * stride + d, stride, x, count - row, head_dim - d);
    }
}

// Rows of dK or dV, likewise.
template <class Element>
inline void store_key_gradient(Element* to, int64_t stride, const float* from, int64_t from_stride, int parts,
                               int64_t part, float scale, int count, int columns) {
  for (int row = 0; row < count; ++row)
    for (int d = 0; d < columns; d += kLanes) {
      const float* p = from + row * from_stride + d;
      vec x = load(p);
      for (int k = 1; k < parts; ++k) x += load(p + k * part);
      Element* const at = to + row * stride + d;
      columns - d >= kLanes ? store(at, x * scale) : store_some(at, x * scale, columns - d);
    }
}

}  // namespace fagen
