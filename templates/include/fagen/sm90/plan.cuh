// What small kernels find out before the forward one, where it needs anything: extents of the intervals, the order of
// the tiles of rows, a counter at zero. Each starts beside the one before and waits for its end.
#pragma once
#include "fagen/sm90/epilogue.cuh"
#include "fagen/sm90/rows.cuh"

// A block's work: the tiles of rows by how many tiles of keys they see, the most first, later rows first among equals.
__device__ __forceinline__ void put_in_order(const Span* spans, int* order, int row_tiles) {
  constexpr int kAtOnce = 1024;
  __shared__ int seen[kAtOnce];
  const auto count = [&](int i) { return i < row_tiles ? __ldcg(&spans[i].cut) + __ldcg(&spans[i].whole) : -1; };
  for (int first = 0; first < row_tiles; first += blockDim.x) {
    const int mine = first + threadIdx.x, my_count = count(mine);
    int before = 0;
    for (int some = 0; some < row_tiles; some += kAtOnce) {
      __syncthreads();
      for (int i = threadIdx.x; i < kAtOnce; i += blockDim.x) seen[i] = count(some + i);
      __syncthreads();
      const int end = min(kAtOnce, row_tiles - some);
#pragma unroll 8
      for (int i = 0; i < end; ++i) before += seen[i] > my_count || (seen[i] == my_count && some + i > mine);
    }
    if (mine < row_tiles) order[before] = mine;
  }
}

template <class C, class Element>
__device__ __forceinline__ void begin(const fagen_params& p, const Launch& launch) {
  ptx::start_next_kernel();
  if (p.seqlen_k == 0) return store_zeros<Element>(p);
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (C::kSchedule == Schedule::dynamic && thread == 0) *launch.taken = 0;
  if constexpr (C::kMask == Mask::intervals) {
    if (thread < p.batch * p.mask_heads) launch.counted[thread] = 0;
    find_extents<C>(p, launch.extents, launch.key_tiles);
  }
}

// A warp for each tile of rows of a mask head: what it sees. Whichever block of a head comes last puts them in order.
template <class C>
__device__ __forceinline__ void rank(const fagen_params& p, const Launch& launch) {
  constexpr int kWarps = 8;
  ptx::start_next_kernel();
  ptx::wait_for_previous_kernel();
  const int blocks = (launch.row_tiles + kWarps - 1) / kWarps, plane = blockIdx.x / blocks;
  const int row_tile = blockIdx.x % blocks * kWarps + threadIdx.x / 32;
  Span* spans = launch.spans + int64_t(plane) * launch.row_tiles;
  const auto intervals = intervals_of<C>(p, launch, plane / p.mask_heads, plane % p.mask_heads);
  __shared__ Borders borders;
  borders.find(intervals, p.seqlen_q);
  if (row_tile < launch.row_tiles) {
    const int2 rows = borders.rows<C::kTileM>(row_tile, launch.row_tiles, p.seqlen_q);
    Span span = {0, 0, 0, 0, 0, 0};
    if (rows.x < rows.y) span = find_span<C>(intervals, Band(p), rows.x, rows.y);
    if (threadIdx.x % 32 == 0) spans[row_tile] = span;
  }
  if constexpr (kRanked<C>) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(&launch.counted[plane], 1) == blocks - 1;
    __syncthreads();
    __threadfence();
    if (last) put_in_order(spans, launch.order + int64_t(plane) * launch.row_tiles, launch.row_tiles);
  }
}
