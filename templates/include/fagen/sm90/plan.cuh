// What small kernels find out before the forward one, where it needs anything: extents of the intervals, the order of
// the tiles of rows, a counter at zero. Each starts beside the one before and waits for its end.
#pragma once
#include "fagen/sm90/rows.cuh"

template <class C>
__device__ __forceinline__ void begin(const fagen_params& p, const Launch& launch) {
  ptx::start_next_kernel();
  if (C::kSchedule == Schedule::dynamic && blockIdx.x == 0 && threadIdx.x == 0) *launch.taken = 0;
  if constexpr (C::kMask == Mask::intervals) find_extents<C>(p, launch.extents, launch.key_tiles);
}

// A block for each mask head: which tiles of keys each tile of rows sees, and the order by how many they are.
template <class C>
__device__ __forceinline__ void rank(const fagen_params& p, const Launch& launch) {
  ptx::start_next_kernel();
  ptx::wait_for_previous_kernel();
  const Band band(p);
  const int64_t plane = blockIdx.x;
  Intervals<C> intervals;
  intervals.extents = launch.extents + plane * launch.key_tiles * C::kIntervalColumns;
  int* counts = launch.counts + plane * launch.row_tiles;
  int* order = launch.order + plane * launch.row_tiles;
  for (int row_tile = threadIdx.x; row_tile < launch.row_tiles; row_tile += blockDim.x) {
    const int m0 = row_tile * C::kTileM, m1 = min(m0 + C::kTileM, p.seqlen_q);
    const TileRange range = TileRange::of<C::kTileN>(band, m0, m1);
    int count = 0, first = 0, end = 0;
#pragma unroll 8
    for (int tile = 0; tile < launch.key_tiles; ++tile) {
      bool empty, partial;
      intervals.classify(tile, m0, m1, empty, partial);
      if (tile < range.begin || tile >= range.end || empty) continue;
      if (count++ == 0) first = tile;
      end = tile + 1;
    }
    counts[row_tile] = count;
    launch.spans[plane * launch.row_tiles + row_tile] = make_int2(first, end);
  }
  __syncthreads();
  for (int row_tile = threadIdx.x; row_tile < launch.row_tiles; row_tile += blockDim.x) {
    const int count = counts[row_tile];
    int before = 0;
#pragma unroll 8
    for (int other = 0; other < launch.row_tiles; ++other)
      before += counts[other] > count || (counts[other] == count && other > row_tile);
    order[before] = row_tile;
  }
}
