// The tiles of rows that a block works through, and the keys that each of them sees.
#pragma once
#include "fagen/mask.cuh"
#include "fagen/schedule.cuh"
#include "fagen/sm90/layout.cuh"
#include "fagen/walk.cuh"

struct Launch {
  CUtensorMap q, k, v;
  int row_tiles, key_tiles;  // tiles of a head
  int tiles;                 // tiles of rows in all
  int heads_at_once;         // sectioned order
  Extent* extents;           // of the intervals, tile by tile
  int* counts;               // and of each mask head, by tile of rows: how many tiles of keys it sees,
  int2* spans;               // between which of them they lie,
  int* order;                // and which tile of rows sees the most, the next most, ...
  unsigned* taken;           // dynamic schedule: tiles of rows that blocks have come for, beside each one's first
};

// Which tile of rows a block takes after its first: none, every so many-th of the order, turning at its ends so that
// all blocks get as much of what is long as of what is short; or the next that nobody has taken.
template <class C>
struct Share {
  int round = 0;

  __device__ __forceinline__ int next(const Launch& launch) {
    if constexpr (C::kSchedule == Schedule::single) {
      return launch.tiles;
    } else if constexpr (C::kSchedule == Schedule::balanced) {
      ++round;
      return round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    } else {
      if (round++ == 0) ptx::wait_for_previous_kernel();  // which sets the counter to zero
      return gridDim.x + (threadIdx.x % 32 == 0 ? atomicAdd(launch.taken, 1) : 0);
    }
  }
};

// With intervals, the longest tile of rows is not simply the last: they are counted and ranked.
template <class C>
constexpr bool kRanked = C::kMask == Mask::intervals &&
                         (C::kBlockOrder == BlockOrder::longest_first || C::kBlockOrder == BlockOrder::sectioned);

struct True {
  static __device__ __forceinline__ constexpr bool partial() { return true; }
};
struct False {
  static __device__ __forceinline__ constexpr bool partial() { return false; }
};

// Intervals may differ by batch and by kv head.
__device__ __forceinline__ int64_t mask_plane(const fagen_params& p, const Work& work) {
  const int head = p.mask_heads == 1 ? 0 : work.head / (p.heads / p.kv_heads);
  return int64_t(work.batch) * p.mask_heads + head;
}

// The `index`-th tile of rows in the order of work.
template <class C>
__device__ __forceinline__ Work take(const fagen_params& p, const Launch& launch, int index) {
  Work work = take_work<C::kBlockOrder>(p, index, launch.row_tiles, launch.heads_at_once);
  if constexpr (kRanked<C>) {
    const int* order = launch.order + mask_plane(p, work) * launch.row_tiles;
    work.row_tile = order[launch.row_tiles - 1 - work.row_tile];
  }
  return work;
}

// One tile of rows: [m0, m1) of a head, and its walk over tiles of keys.
template <class C>
struct Rows {
  Work work;
  int m0, m1, kv_head;
  TileRange range;
  Intervals<C> intervals;

  Rows() = default;
  __device__ __forceinline__ Rows(const fagen_params& p, const Launch& launch, const Band& band, const Work& work)
      : work(work) {
    m0 = work.row_tile * C::kTileM;
    m1 = min(m0 + C::kTileM, p.seqlen_q);
    kv_head = work.head / (p.heads / p.kv_heads);
    range = TileRange::of<C::kTileN>(band, m0, m1);
    if constexpr (C::kMask == Mask::intervals) {
      const int64_t plane = mask_plane(p, work);
      const int head = plane % p.mask_heads;
      intervals.bounds = p.intervals + work.batch * p.intervals_stride[0] + head * p.intervals_stride[1];
      intervals.stride = p.intervals_stride[2];
      intervals.extents = launch.extents + plane * launch.key_tiles * C::kIntervalColumns;
      const int2 span = launch.spans[plane * launch.row_tiles + work.row_tile];
      range.begin = span.x, range.end = span.y;
      intervals.last_key = p.seqlen_k - 1;
    }
  }

  __device__ __forceinline__ bool see_any() const { return range.begin < range.end; }
  __device__ __forceinline__ auto first_tile() const {
    if constexpr (C::kMask == Mask::intervals)
      return IntervalWalk<C>(intervals, range, m0, m1);
    else
      return RangeWalk{range.end - 1, range.begin};
  }

  // What the producer tells the consumers of a tile.
  __device__ __forceinline__ void tell(uint32_t place, int tile, bool partial, bool last) const {
    const Extent ls = intervals.template extent<C::kLTS>(tile, kFar),
                 le = intervals.template extent<C::kLTE>(tile, kFar);
    const Extent us = intervals.template extent<C::kUTS>(tile, -kFar),
                 ue = intervals.template extent<C::kUTE>(tile, -kFar);
    const bool same = ls.low == ls.high && le.low == le.high && us.low == us.high && ue.low == ue.high;
    const bool any = (m0 < le.high && m1 > ls.low) || (m0 < ue.high && m1 > us.low);
    Told::tell(place, tile, partial, last,
               !any   ? Told::none
               : same ? Told::rows
                      : Told::cells,
               {ls.low, le.low, us.low, ue.low});
  }

  // Call visit(tile, about) for the rest of the walk, with a loop of its own for tiles that need no mask.
  template <class Walk, class Visit>
  __device__ __forceinline__ void visit_tiles(Walk& walk, Visit visit) const {
    if constexpr (C::kMask == Mask::intervals) {
      for (; walk.valid(); walk.advance()) visit(walk.told.tile(), walk.told);
    } else {
      for (; walk.valid() && walk.tile >= range.full_end; walk.advance()) visit(walk.tile, True{});
      for (; walk.tile >= range.full_begin; walk.advance()) visit(walk.tile, False{});
      if constexpr (C::kMask == Mask::window)
        for (; walk.valid(); walk.advance()) visit(walk.tile, True{});
    }
  }
};
