// A block's share of the work: some rows of a head, some columns of their O, the tiles of keys that they visit.
#pragma once
#include <cuda.h>

#include "fagen/mask/mask.cuh"
#include "fagen/schedule/tile_order.cuh"
#include "fagen/sm90/forward_large/layout.cuh"

namespace fagen {

// Computed once on the host for a launch.
struct LargeLaunch {
  CUtensorMap q, k, v;
  int row_tiles;      // of a head; those of a cluster count as one
  int key_tiles;      // of a head
  int heads_at_once;  // sectioned order
  Extent* extents;    // intervals: of each tile of keys
};

// The blocks of a cluster take neighbouring tiles of rows. They load each tile of keys together, and so all visit what
// any of them sees. Peers that share scores have the same rows.
template <class C>
struct LargeTask {
  using L = LargeLayout<C>;
  static constexpr int kClusterRows = L::kRows * C::kCluster;

  TileCoord coord;
  int kv_head, first_row, first_column;
  int m0, m1;  // rows of the cluster
  MaskOf<C> mask;
  TileRange range;  // tiles of keys

  __device__ __forceinline__ LargeTask(const fagen_forward_params& p, const LargeLaunch& launch) : mask(p) {
    const int cluster = blockIdx.x / L::kClusterBlocks;
    const int tile = L::kPeers ? cluster : cluster / C::kOutputSplits;
    const int columns = L::kPeers ? rank() : cluster % C::kOutputSplits;
    coord = tile_at<C::kBlockOrder>(p, tile, launch.row_tiles, launch.heads_at_once);
    kv_head = coord.head / (p.heads / p.kv_heads);
    m0 = coord.row_tile * kClusterRows, m1 = min(m0 + kClusterRows, p.seqlen_q);
    first_row = m0 + rank() % C::kCluster * L::kRows;
    first_column = columns * L::kBlockColumns;
    range = TileRange::of<C::kTileN>(mask.band, m0, m1);
    if constexpr (MaskOf<C>::kIntervals) {
      const int head = p.mask_heads == 1 ? 0 : kv_head;
      mask.intervals.bounds = bounds_of(p, coord.batch, head);
      mask.intervals.stride = p.intervals.stride[2];
      const int64_t plane = int64_t(coord.batch) * p.mask_heads + head;
      mask.intervals.extents = launch.extents + plane * launch.key_tiles * C::kIntervalColumns;
      mask.intervals.last_key = p.seqlen_k - 1;
    }
  }

  static __device__ __forceinline__ int rank() { return blockIdx.x % L::kClusterBlocks; }  // in the cluster
  // The chunk of V that is the n-th: a peer begins with the keys whose weights it has computed itself.
  static __device__ __forceinline__ int value_chunk(int n) {
    return L::kPeers ? (n + rank() * (L::kValueChunks / 2)) % L::kValueChunks : n;
  }
  // The walk over the tiles of keys, from the last to the first.
  __device__ __forceinline__ typename MaskOf<C>::Walk walk() const { return mask.walk(range, m0, m1); }
};

}  // namespace fagen
