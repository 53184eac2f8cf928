// One batch and head: where its rows, its masks and its parts of the workspace are.
#pragma once
#include "fagen/cpu/layout.h"
#include "fagen/cpu/dropout.h"
#include "fagen/cpu/score.h"

namespace fagen {

template <class Config, class Element>
struct Head {
  using At = Layout<Config>;
  // a band known before run time: none has no bound, causal has the diagonal
  using Mask = decltype(Config::kMask);
  static constexpr bool kFixedBand = Config::kMask == Mask::none || Config::kMask == Mask::causal;
  static constexpr int kFixedRight = Config::kMask == Mask::causal ? 0 : -1;

  const fagen_forward_params& p;
  typename At::Workspace workspace;
  int64_t batch, head, kv_head, mask_head;
  Scale<Config> scale;
  Band band;
  Intervals<Config> intervals{};
  Dropout dropout;

  Head(const fagen_forward_params& p, int64_t batch, int64_t head)
      : p(p),
        workspace(p),
        batch(batch),
        head(head),
        kv_head(head / (p.heads / p.kv_heads)),
        mask_head(At::kIntervals ? head / (p.heads / p.mask_heads) : 0),
        scale(p),
        band(p, kFixedBand ? -1 : p.window_left, kFixedBand ? kFixedRight : p.window_right),
        dropout(Config::kDropout ? Dropout::of(p, batch, head) : Dropout{}) {
    if (At::kIntervals) intervals = {at<const int32_t>(p.intervals, mask_head, 0), p.intervals.stride[2]};
  }

  const Element* q(int row) const { return at<const Element>(p.q, row, head); }
  const Element* k(int row) const { return at<const Element>(p.k, row, kv_head); }
  const Element* v(int row) const { return at<const Element>(p.v, row, kv_head); }
  Element* o(int row) const { return at<Element>(p.o, row, head); }
  float* lse(int row) const { return p.lse ? p.lse + (batch * p.heads + head) * p.seqlen_q + row : nullptr; }

  float* packed_k(int row) const { return part<float>(workspace.keys) + packed_row(row) * At::kStrideK; }
  float* packed_v(int row) const { return part<float>(workspace.values) + packed_row(row) * At::kStrideV; }
  HiddenBounds& bounds(int key) const {
    const int64_t tiles = ceil_div(p.seqlen_k, Config::kTileN);
    return part<HiddenBounds>(workspace.bounds)[(batch * p.mask_heads + mask_head) * tiles + key / Config::kTileN];
  }
  typename At::Group* groups(int row) const {
    const int64_t first = (batch * p.heads + head) * ceil_div(p.seqlen_q, At::kGroup);
    return part<typename At::Group>(workspace.groups) + first + row / At::kGroup;
  }

  Range all_keys() const { return {0, p.seqlen_k}; }
  Range all_rows() const { return {0, p.seqlen_q}; }
  Range keys_for(Range rows) const { return intersect(all_keys(), band.seen_by_any(rows)); }

  template <bool kMasked>
  Score<Config, kMasked> score() const {
    const float slope = Config::kAlibi ? at<const float>(p.alibi_slopes, 0, 0)[head] : 0;
    return {band, intervals, scale.inner, p.softcap, slope, p.seqlen_k - p.seqlen_q};
  }

 private:
  template <class T>
  T* at(const fagen_tensor& t, int64_t i, int64_t j) const {  // of this batch
    return static_cast<T*>(t.data) + batch * t.stride[0] + i * t.stride[1] + j * t.stride[2];
  }
  template <class T>
  T* part(uint64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(p.workspace) + offset);
  }
  int64_t packed_row(int row) const { return (batch * p.kv_heads + kv_head) * p.seqlen_k + row; }
};

}  // namespace fagen
