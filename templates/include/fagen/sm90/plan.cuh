// What a small kernel finds out before the forward one, where it needs anything: a counter at zero, or for intervals
// their extents, what each tile of rows sees, and the order of these. The forward kernel starts beside it and waits for
// its end.
#pragma once
#include "fagen/sm90/epilogue.cuh"
#include "fagen/sm90/rows.cuh"

// One block's work, without intervals.
template <class C, class Element>
__device__ __forceinline__ void begin(const fagen_params& p, const Launch& launch) {
  ptx::start_next_kernel();
  if (p.seqlen_k == 0) return store_zeros<Element>(p);
  if (threadIdx.x == 0) *launch.taken = 0;
}

// A mask head is planned by a cluster of blocks, whose warps share out the tiles of keys, then those of rows.
constexpr int kPlanners = 8, kPlannerThreads = 1024;

// The minima and maxima of the bounds in each tile of keys: one pass over the vectors, a warp a tile.
template <class C>
__device__ __forceinline__ void find_key_extents(const Intervals<C>& intervals, Extent* extents, int key_tiles,
                                                 int warp, int warps) {
  const int lane = threadIdx.x % 32;
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

// The tiles of rows by how many tiles of keys they see, the most first, later rows first among equals: where each of
// a block's threads finds its own. Blocks take every so many-th.
__device__ __forceinline__ void put_in_order(const Span* spans, int* order, int row_tiles) {
  constexpr int kAtOnce = 1024;
  __shared__ int seen[kAtOnce];
  const auto count = [&](int i) { return i < row_tiles ? __ldcg(&spans[i].cut) + __ldcg(&spans[i].whole) : -1; };
  const int part = blockIdx.x % kPlanners;
  for (int first = part; first < row_tiles; first += kPlannerThreads * kPlanners) {
    const int mine = first + threadIdx.x * kPlanners, my_count = count(mine);
    int before = 0;
    for (int some = 0; some < row_tiles; some += kAtOnce) {
      __syncthreads();
      for (int i = threadIdx.x; i < kAtOnce; i += kPlannerThreads) seen[i] = count(some + i);
      __syncthreads();
      const int end = min(kAtOnce, row_tiles - some);
#pragma unroll 8
      for (int i = 0; i < end; ++i) before += seen[i] > my_count || (seen[i] == my_count && some + i > mine);
    }
    if (mine < row_tiles) order[before] = mine;
  }
}

template <class C>
__device__ __forceinline__ void plan(const fagen_params& p, const Launch& launch) {
  constexpr int kWarps = kPlannerThreads / 32;
  const int plane = blockIdx.x / kPlanners, warp = blockIdx.x % kPlanners * kWarps + threadIdx.x / 32;
  const auto intervals = intervals_of<C>(p, launch, plane / p.mask_heads, plane % p.mask_heads);
  Span* spans = launch.spans + int64_t(plane) * launch.row_tiles;

  ptx::start_next_kernel();
  if (C::kSchedule == Schedule::dynamic && blockIdx.x == 0 && threadIdx.x == 0) *launch.taken = 0;
  find_key_extents(intervals, const_cast<Extent*>(intervals.extents), launch.key_tiles, warp, kPlanners * kWarps);
  ptx::cluster_sync();

  __shared__ Borders borders;
  borders.find(intervals, p.seqlen_q);
  for (int row_tile = warp; row_tile < launch.row_tiles; row_tile += kPlanners * kWarps) {
    const int2 rows = borders.rows<C::kTileM>(row_tile, launch.row_tiles, p.seqlen_q);
    Span span = {0, 0, 0, 0, 0, 0};
    if (rows.x < rows.y) span = find_span<C>(intervals, Band(p), rows.x, rows.y);
    if (threadIdx.x % 32 == 0) spans[row_tile] = span;
  }
  if constexpr (kRanked<C>) {
    ptx::cluster_sync();
    put_in_order(spans, launch.order + int64_t(plane) * launch.row_tiles, launch.row_tiles);
  }
}
