// The tiles of keys that a tile of rows visits, from the last to the first, and which of them need mask arithmetic.
#pragma once
#include "fagen/mask.cuh"

// Tiles [begin, end) hold every visible cell of rows [m0, m1); those of [full_begin, full_end) hold no hidden one.
struct TileRange {
  int begin, end, full_begin, full_end;

  template <int kTileN>
  static __device__ __forceinline__ TileRange of(const Band& band, int m0, int m1) {
    TileRange r;
    const int keys_end = band.end(m1 - 1);
    r.end = (keys_end + kTileN - 1) / kTileN;
    r.begin = min(band.begin(m0) / kTileN, r.end);
    r.full_end = max(r.begin, min(band.end(m0), band.seqlen_k) / kTileN);
    r.full_begin = min(r.full_end, max(r.begin, (band.begin(m1 - 1) + kTileN - 1) / kTileN));
    return r;
  }
};

// Band masks: every tile of the range is visited.
struct RangeWalk {
  int tile, begin;
  __device__ __forceinline__ bool valid() const { return tile >= begin; }
  __device__ __forceinline__ void advance() { --tile; }
};
__device__ __forceinline__ bool needs_mask(const RangeWalk& walk, const TileRange& range) {
  return walk.tile < range.full_begin || walk.tile >= range.full_end;
}

// Intervals: the lanes of a warp classify 32 tiles at once; the visible ones are then taken from the top.
template <class Config>
struct IntervalWalk {
  const Intervals<Config>& intervals;
  TileRange range;
  int m0, m1, group;        // tiles [group, group + 32) are classified
  uint32_t seen, hidden;    // bits of tiles still to visit, and of those that need the mask
  int tile;                 // present tile, or -1

  __device__ __forceinline__ IntervalWalk(const Intervals<Config>& intervals, TileRange range, int m0, int m1)
      : intervals(intervals), range(range), m0(m0), m1(m1), group(range.end), seen(0), hidden(0) {
    advance();
  }
  __device__ __forceinline__ bool valid() const { return tile >= 0; }
  __device__ __forceinline__ bool partial() const {
    return tile < range.full_begin || tile >= range.full_end || (hidden >> (tile - group) & 1);
  }
  __device__ __forceinline__ void advance() {
    while (seen == 0) {
      if (group <= range.begin) {
        tile = -1;
        return;
      }
      group -= 32;
      const int mine = group + int(threadIdx.x % 32);
      bool empty = true, partly = false;
      if (mine >= range.begin && mine < range.end) intervals.classify(mine, m0, m1, empty, partly);
      seen = __ballot_sync(~0u, !empty);
      hidden = __ballot_sync(~0u, partly);
    }
    const int bit = 31 - __clz(seen);
    seen ^= 1u << bit;
    tile = group + bit;
  }
};
template <class Config>
__device__ __forceinline__ bool needs_mask(const IntervalWalk<Config>& walk, const TileRange&) {
  return walk.partial();
}
