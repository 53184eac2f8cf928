// The host's choice of a decode launch: how many splits, and their workspace.
#pragma once
#include "fagen/host/launch.cuh"
#include "fagen/sm80/decode/place.cuh"

namespace fagen {

constexpr int kMostSplits = 256;
constexpr int kMostOfCluster = 8;  // blocks, on every GPU that has clusters
constexpr int kCombineThreads = 256;

// Key tiles that a row tile can see at most, by the largest lengths. A window may begin amid a tile.
template <class C>
static int most_key_tiles(const fagen_decode_params& p) {
  const int all = ceil_div(p.seqlen_k, C::kTileN);
  if (!MaskOf<C>::kHasBegin || p.window_left < 0) return all;
  const int right = p.window_right < p.seqlen_q ? p.window_right : p.seqlen_q;
  const int64_t seen = int64_t(p.window_left) + p.seqlen_q + (right > 0 ? right : 0);
  const int64_t tiles = ceil_div(seen, C::kTileN) + 1;
  return tiles < all ? int(tiles) : all;
}

// The kernel's own number of splits. Blocks run in waves; a block costs its keys, what starting it costs (about as much
// as kStart keys), and each further split what it adds to the merge. Lengths on the device have no part in this, so
// that a CUDA graph serves all of them.
template <class C>
static int choose_splits(int64_t row_tiles, int key_tiles, int resident) {
  constexpr int kStart = 128, kMerge = 128, kMergeInCluster = 32, kMergeOfSplit = 4;
  if (row_tiles > INT32_MAX / kMostSplits) return 1;  // below, divisions of 32 bits: this is asked at every launch
  const int most = ceil_div(key_tiles * C::kTileN, C::kSplitKeys);
  int best = 1;
  int64_t least = 0;
  for (int splits = 1; splits <= most && splits <= kMostSplits; ++splits) {
    const int64_t waves = ceil_div(int(row_tiles) * splits, resident);
    const int keys = ceil_div(key_tiles, splits) * C::kTileN;
    const bool clustered = C::kMergesInCluster && splits <= kMostOfCluster;
    const int merge = (clustered ? kMergeInCluster : kMerge) + splits * kMergeOfSplit;
    const int64_t cost = waves * (keys + kStart) + (splits > 1 ? merge : 0);
    if (splits == 1 || cost < least) best = splits, least = cost;
  }
  return best;
}

// Splits, and the parts of the workspace where there are several.
template <class C>
struct DecodePlan {
  DecodeGrid grid = {};
  int64_t tiles, rows;  // row tiles of the launch; rows of all parts
  uint64_t arrived_bytes = 0, stats_bytes = 0, sums_bytes = 0;

  DecodePlan(const fagen_decode_params& p, int resident) {
    grid.row_tiles = ceil_div(int64_t(p.seqlen_q) * (p.heads / p.kv_heads), C::kTileM);
    tiles = int64_t(grid.row_tiles) * p.kv_heads * p.batch;
    if (C::kCompact && p.cu_seqlens_q) {  // as many as rows need, and one a sequence that is not whole
      const int64_t most = (ceil_div(int64_t(p.rows) * (p.heads / p.kv_heads), C::kTileM) + p.batch) * p.kv_heads;
      tiles = most < tiles ? most : tiles;
    }
    const int key_tiles = most_key_tiles<C>(p);
    grid.least_tiles = 1;
    if (p.num_splits > 0) {
      const int most = key_tiles < kMostSplits ? key_tiles : kMostSplits;
      grid.splits = p.num_splits < most ? p.num_splits : most;
    } else if (p.num_splits < 0) {
      grid.split_tiles = ceil_div(-int64_t(p.num_splits), C::kTileN);
      grid.splits = ceil_div(key_tiles, grid.split_tiles) + MaskOf<C>::kHasBegin;
    } else {
      grid.splits = choose_splits<C>(tiles, key_tiles, resident);
      grid.least_tiles = ceil_div(C::kSplitKeys, C::kTileN);
    }
    grid.clustered = C::kMergesInCluster && grid.splits <= kMostOfCluster;
    if (grid.splits == 1 || grid.clustered) return;
    rows = tiles * grid.splits * C::kTileM;
    arrived_bytes = C::kMergesInLastBlock ? align_workspace(tiles * sizeof(unsigned)) : 0;
    stats_bytes = align_workspace(rows * sizeof(float2));
    sums_bytes = align_workspace(rows * C::kHeadDimV * sizeof(float));
  }
  uint64_t bytes() const { return arrived_bytes + stats_bytes + sums_bytes; }

  void assign(void* workspace) {
    char* at = static_cast<char*>(workspace);
    grid.arrived = reinterpret_cast<unsigned*>(at);
    grid.stats = reinterpret_cast<float2*>(at + arrived_bytes);
    grid.sums = reinterpret_cast<float4*>(at + arrived_bytes + stats_bytes);
  }
};

}  // namespace fagen
