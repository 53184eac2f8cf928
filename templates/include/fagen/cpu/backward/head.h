// One batch and head: where its rows, its masks and its parts of the workspace are.
#pragma once
#include "fagen/cpu/backward/layout.h"
#include "fagen/cpu/dropout.h"
#include "fagen/cpu/score.h"

namespace fagen {

template <class Config, class Element>
struct Head {
  using At = Layout<Config>;
  using Mask = decltype(Config::kMask);
  static constexpr bool kFixedBand = Config::kMask == Mask::none || Config::kMask == Mask::causal;
  static constexpr int kFixedRight = Config::kMask == Mask::causal ? 0 : -1;

  const typename At::Params& p;
  typename At::Workspace workspace;
  int64_t batch, head, kv_head, mask_head;
  Scale<Config> scale;
  Band band;
  Intervals<Config> intervals{};
  Dropout dropout;

  Head(const typename At::Params& p, int64_t batch, int64_t head)
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

  const Element* k(int row) const { return at<const Element>(p.k, row, kv_head); }
  const Element* v(int row) const { return at<const Element>(p.v, row, kv_head); }
  Element* dq(int row) const { return at<Element>(p.dq, row, head); }
  Element* dk(int row) const { return at<Element>(p.dk, row, kv_head); }
  Element* dv(int row) const { return at<Element>(p.dv, row, kv_head); }

  RowSource<Element> source(Range rows) const {
    const int64_t of_lse = (batch * p.heads + head) * p.seqlen_q + rows.begin;
    return {at<const Element>(p.q, rows.begin, head),
            at<const Element>(p.o, rows.begin, head),
            at<const Element>(p.dout, rows.begin, head),
            p.q.stride[1],
            p.o.stride[1],
            p.dout.stride[1],
            p.lse + of_lse,
            p.dlse ? p.dlse + of_lse : nullptr,
            rows.size(),
            p.head_dim,
            p.head_dim_v,
            scale.sign};
  }

  // ---- Parts of the workspace: of this head, or of its kv head ----
  float* packed_k(int row) const { return part<float>(workspace.keys) + (kv_plane() * p.seqlen_k + row) * At::kStride; }
  float* packed_v(int row) const {
    return part<float>(workspace.values) + (kv_plane() * p.seqlen_k + row) * At::kStrideV;
  }
  HiddenBounds& bounds(int key) const {
    const int64_t tiles = ceil_div(p.seqlen_k, Config::kTileN);
    return part<HiddenBounds>(workspace.bounds)[(batch * p.mask_heads + mask_head) * tiles + key / Config::kTileN];
  }
  typename At::Rows& rows(int row) const { return part<typename At::Rows>(workspace.rows)[row_tile(row)]; }
  typename At::QueryGradient& dq_sum(int row, int64_t index) const {
    return part<typename At::QueryGradient>(workspace.dq)[index * parts_apart_q() + row_tile(row)];
  }
  float* dk_sum(int row, int64_t index) const {
    return part<float>(workspace.dk) + (index * parts_apart_k() + kv_plane() * p.seqlen_k + row) * At::kStride;
  }
  float* dv_sum(int row, int64_t index) const {
    return part<float>(workspace.dv) + (index * parts_apart_k() + kv_plane() * p.seqlen_k + row) * At::kStrideV;
  }
  int64_t parts_apart_q() const { return int64_t(p.batch) * p.heads * ceil_div(p.seqlen_q, Config::kTileM); }
  int64_t parts_apart_k() const { return int64_t(p.batch) * p.kv_heads * p.seqlen_k; }

  Range all_keys() const { return {0, p.seqlen_k}; }
  Range all_rows() const { return {0, p.seqlen_q}; }
  Range keys_for(Range rows) const { return intersect(all_keys(), band.seen_by_any(rows)); }
  Range rows_for(Range keys) const { return intersect(all_rows(), band.rows_that_see(keys)); }

  template <bool kMasked>
  Score<Config, kMasked> score() const {
    const float slope = Config::kAlibi ? static_cast<const float*>(p.alibi_slopes.data)[alibi(p)] : 0;
    return {band, intervals, scale.inner, p.softcap, slope, p.seqlen_k - p.seqlen_q};
  }

 private:
  template <class T>
  T* at(const fagen_tensor& t, int64_t first, int64_t second) const {
    return static_cast<T*>(t.data) + batch * t.stride[0] + first * t.stride[1] + second * t.stride[2];
  }
  template <class T>
  T* part(uint64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(p.workspace) + offset);
  }
  int64_t alibi(const typename At::Params& p) const { return batch * p.alibi_slopes.stride[0] + head; }
  int64_t kv_plane() const { return batch * p.kv_heads + kv_head; }
  int64_t row_tile(int row) const {
    return (batch * p.heads + head) * ceil_div(p.seqlen_q, Config::kTileM) + row / Config::kTileM;
  }
};

}  // namespace fagen
