// The kernel before the forward one, where that needs anything: it sets a counter to zero, or plans the visits of
// intervals. The forward kernel starts beside it and waits for its end.
#pragma once
#include "fagen/sm90/forward/epilogue.cuh"
#include "fagen/sm90/forward/row_tile.cuh"

namespace fagen {

// One block's work, without intervals.
template <class C, class Element>
__device__ __forceinline__ void prologue(const fagen_forward_params& p, const LaunchArgs& launch) {
  ptx::wait_for_previous_kernel();
  ptx::start_next_kernel();
  if (p.seqlen_k == 0) return store_all_empty<Element>(p);
  if (threadIdx.x == 0) *launch.next_tile_counter = 0;
}

// A mask head is planned by a cluster of blocks, whose warps divide the key tiles among them, then the row tiles.
constexpr int kPlanners = 8, kPlannerThreads = 512;

// The extents of each key tile: one pass over the vectors, a warp a tile.
template <class C>
__device__ __forceinline__ void find_key_extents(const Intervals<C>& intervals, Extent* extents, int key_tiles,
                                                 int warp, int warps) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int tile = warp; tile < key_tiles; tile += warps)
#pragma unroll
    for (int c = 0; c < C::kIntervalColumns; ++c) {
      int low = INT_MAX, high = INT_MIN;
#pragma unroll
      for (int i = lane; i < C::kTileN; i += 32) {
        const int key = min(tile * C::kTileN + i, intervals.last_key);
        const int value = intervals.bounds[key * intervals.stride + c];
        low = min(low, value), high = max(high, value);
      }
      low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
      if (lane == 0) extents[tile * C::kIntervalColumns + c] = {low, high};
    }
}

// Rank the row tiles by the key tiles that they visit, the most first, later rows first among equals. A warp finds the
// rank of a tile by counting those before it.
__device__ __forceinline__ void rank_by_visits(const RowTileVisits* visits, int* ranked, int row_tiles, int warp,
                                               int warps) {
  constexpr int kAtOnce = 8;  // loads of a lane
  const auto count = [&](int i) {
    if (i >= row_tiles) return -1;
    const int2 tiles = __ldcg(reinterpret_cast<const int2*>(&visits[i].partial));
    return tiles.x + tiles.y;
  };
  for (int mine = warp; mine < row_tiles; mine += warps) {
    const int my_count = count(mine);
    int before = 0;
#pragma unroll 1
    for (int some = threadIdx.x % 32; some < row_tiles; some += 32 * kAtOnce) {
      int counts[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) counts[i] = count(some + i * 32);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        before += counts[i] > my_count || (counts[i] == my_count && some + i * 32 > mine);
    }
    before = __reduce_add_sync(~0u, before);
    if (threadIdx.x % 32 == 0) ranked[before] = mine;
  }
}

// Intervals: the extents of the key tiles, the visits of the row tiles, and the row tiles' ranks.
template <class C>
__device__ __forceinline__ void plan(const fagen_forward_params& p, const LaunchArgs& launch) {
  constexpr int kWarps = kPlannerThreads / 32;
  const int plane = blockIdx.x / kPlanners, warp = blockIdx.x % kPlanners * kWarps + threadIdx.x / 32;
  const auto intervals = intervals_of<C>(p, launch, plane / p.mask_heads, plane % p.mask_heads);

  ptx::wait_for_previous_kernel();
  ptx::start_next_kernel();
  if (C::kSchedule == Schedule::dynamic && blockIdx.x == 0 && threadIdx.x == 0) *launch.next_tile_counter = 0;
  find_key_extents(intervals, const_cast<Extent*>(intervals.extents), launch.key_tiles, warp, kPlanners * kWarps);
  ptx::cluster_sync();

  __shared__ RowTileBoundaries boundaries;
  boundaries.find(intervals, p.seqlen_q);
  for (int row_tile = warp; row_tile < launch.row_tiles; row_tile += kPlanners * kWarps) {
    const int2 rows = boundaries.rows<C::kTileM>(row_tile, launch.row_tiles, p.seqlen_q);
    const int index = plane * launch.row_tiles + row_tile;
    RowTileVisits visits = {0, 0, 0, 0};
    if (rows.x < rows.y)
      visits = plan_visits<C>(intervals, Band(p), rows.x, rows.y, launch.visit_bits + visit_bits_index(launch, index));
    if (threadIdx.x % 32 == 0) launch.visits[index] = visits;
  }
  if constexpr (kRanked<C>) {
    ptx::cluster_sync();
    const int first = plane * launch.row_tiles;
    rank_by_visits(launch.visits + first, launch.ranks + first, launch.row_tiles, warp, kPlanners * kWarps);
  }
}

}  // namespace fagen
