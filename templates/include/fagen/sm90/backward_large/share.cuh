// A block's share of a pass: the rows that it owns, the columns of their gradient that it adds up, what it visits.
#pragma once
#include <cuda.h>

#include "fagen/schedule/tile_order.cuh"
#include "fagen/sm90/backward_large/layout.cuh"

namespace fagen {

// A row's logsumexp in base 2, and delta = sum of dO * O, less the gradient of the logsumexp. Rows that see nothing,
// and those past the last, have an infinite logsumexp: their weights are 0.
struct RowStats {
  float lse_log2, delta;
};

// Computed once on the host for a pass.
struct PassLaunch {
  CUtensorMap own_scores, own_weights;  // q or k, dO or v: of the side that owns
  CUtensorMap scores, weights, rows;    // of the other side; rows: of what the cells are multiplied with
  fagen_forward_params forward;         // the forward call as masks read it, with as many heads as the owners have
  const RowStats* stats;                // (batch, heads, stats_rows)
  const Extent* extents;                // intervals, for dQ: of each tile of keys
  int stats_rows, key_tiles;            // of a head
  int own_tiles, heads_at_once;         // of a head, those of a cluster count as one; sectioned order
};

template <class P>
struct PassShare {
  using L = PassLayout<P>;
  using Walk = typename SelectWalk<P>::Type;

  const fagen_backward_params& p;
  const PassLaunch& launch;
  int batch, head, kv_head;  // head: of q, for dQ; else the first of the group
  int first, own;            // the first row or key of the cluster, and of the block
  int first_column;
  int part;  // of the cells, among peers
  MaskOf<P> mask;

  // Tiles that have most to do come first where the order says so: the last rows, or the first keys.
  __device__ __forceinline__ PassShare(const fagen_backward_params& p, const PassLaunch& launch)
      : p(p), launch(launch), mask(launch.forward) {
    constexpr bool kLongestFirst =
        P::kBlockOrder == BlockOrder::longest_first || P::kBlockOrder == BlockOrder::sectioned;
    const int cluster = blockIdx.x / P::kCluster, split = cluster % L::kSplits;
    const TileCoord coord =
        tile_at<P::kBlockOrder>(launch.forward, cluster / L::kSplits, launch.own_tiles, launch.heads_at_once);
    const int tile = P::kOwnsKeys && kLongestFirst ? launch.own_tiles - 1 - coord.row_tile : coord.row_tile;
    const int group = p.heads / p.kv_heads;
    batch = coord.batch;
    head = P::kOwnsKeys ? coord.head * group : coord.head;
    kv_head = P::kOwnsKeys ? coord.head : coord.head / group;
    first = tile * P::kTileOwn, own = first + rank() * kGroupRows;
    first_column = split * L::kBlockColumns;
    part = L::kPeers ? split : 0;
    if constexpr (MaskOf<P>::kIntervals) {
      const int of_mask = p.mask_heads == 1 ? 0 : kv_head;
      mask.intervals.bounds = bounds_of(launch.forward, batch, of_mask);
      mask.intervals.stride = p.intervals.stride[2];
      mask.intervals.extents =
          launch.extents + int64_t(batch * p.mask_heads + of_mask) * launch.key_tiles * P::kIntervalColumns;
      mask.intervals.last_key = p.seqlen_k - 1;
    }
  }

  static __device__ __forceinline__ int rank() { return blockIdx.x % P::kCluster; }  // in the cluster
  // The chunk of rows that is the n-th: a peer begins with those whose cells it has computed itself.
  __device__ __forceinline__ int sum_chunk(int n) const {
    return L::kPeers ? (n + part * (L::kSumChunks / 2)) % L::kSumChunks : n;
  }
  __device__ __forceinline__ const RowStats* stats_of(int head) const {
    return launch.stats + (int64_t(batch) * p.heads + head) * launch.stats_rows;
  }
  __device__ __forceinline__ const fagen_tensor& gradient() const {
    return P::kOf == Gradient::dq ? p.dq : P::kOf == Gradient::dk ? p.dk : p.dv;
  }
};

}  // namespace fagen
