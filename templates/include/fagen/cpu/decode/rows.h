// The online softmax of rows whose keys lie along lanes, and the state of a row: sums of exp(score - max).
#pragma once
#include "fagen/cpu/math.h"

namespace fagen {

FAGEN_INLINE float lane_max(vec x) {
  float found = x[0];
#pragma GCC unroll 16
  for (int i = 1; i < kLanes; ++i) found = x[i] > found ? x[i] : found;
  return found;
}

FAGEN_INLINE float lane_sum(vec x) {
  float found = x[0];
#pragma GCC unroll 16
  for (int i = 1; i < kLanes; ++i) found += x[i];
  return found;
}

// The state of a row: o is the sum of weight * v over the keys seen so far, and a weight is exp(score - max).
struct RowState {
  float max, sum;
};

template <int kHeadDimV>
inline void scale_row(float* o, float by) {
  for (int d = 0; d < kHeadDimV; d += kLanes) store(o + d, load(o + d) * by);
}

// Scores of whole vectors of keys become weights, in place. A row that sees none of them keeps its state.
template <int kHeadDimV>
inline void soften(float* scores, int keys, RowState& row, float* o) {
  vec top = load(scores);
  for (int key = kLanes; key < keys; key += kLanes) top = max(load(scores + key), top);
  const float most = lane_max(top);
  if (most > row.max) {
    const float shrink = expf(row.max - most);  // 0 for the first keys that it sees
    if (row.sum != 0) scale_row<kHeadDimV>(o, shrink);
    row = {most, row.sum * shrink};
  }
  const float base = row.max == -INFINITY ? 0.0f : row.max;
  const ScaledExp2 exp2(kLog2E);
  vec sum{};
  for (int key = 0; key < keys; key += kLanes) {
    const vec weight = exp2(load(scores + key) - base);
    store(scores + key, weight);
    sum += weight;
  }
  row.sum += lane_sum(sum);
}

// Another part's keys join a row's. Either may have seen nothing.
template <int kHeadDimV>
inline void join(RowState& row, float* o, const RowState& part, const float* of_part) {
  if (part.sum == 0) return;
  const float most = fmaxf(row.max, part.max);
  const float mine = row.sum == 0 ? 0.0f : expf(row.max - most), theirs = expf(part.max - most);
  for (int d = 0; d < kHeadDimV; d += kLanes) store(o + d, load(o + d) * mine + load(of_part + d) * theirs);
  row = {most, row.sum * mine + part.sum * theirs};
}

// A logit that has no value joins. Returns what o has to be multiplied by.
inline float join_sink(RowState& row, float sink) {
  if (sink == -INFINITY) return 1.0f;
  const float most = fmaxf(row.max, sink), mine = row.sum == 0 ? 0.0f : expf(row.max - most);
  row = {most, row.sum * mine + expf(sink - most)};
  return mine;
}

}  // namespace fagen
