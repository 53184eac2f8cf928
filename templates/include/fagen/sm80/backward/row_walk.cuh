// The row tiles that see a tile of keys: forward's walk over keys, the other way round.
#pragma once
#include "fagen/mask/mask.cuh"

namespace fagen {

// Row tiles [begin, end) hold every visible element of keys [n0, n0 + kTileN); those of [full_begin, full_end) hold no
// hidden one, by the band. Rows past the last count as seeing everything: their weights are 0 anyway.
struct RowRange {
  int begin, full_begin, full_end, end;

  template <int kTileM, int kTileN>
  static __device__ __forceinline__ RowRange of(const Band& band, int n0, int seqlen_q) {
    const int n1 = n0 + kTileN;
    const int first_row = max(0, n0 - band.last), last_row = min(seqlen_q, min(n1, band.seqlen_k) - band.first);
    const int full_row = max(0, n1 - 1 - band.last), full_rows_end = max(0, n0 - band.first + 1);
    RowRange r;
    r.end = (max(0, last_row) + kTileM - 1) / kTileM;
    r.begin = min(first_row / kTileM, r.end);
    r.full_begin = n1 > band.seqlen_k ? r.end : min(r.end, max(r.begin, (full_row + kTileM - 1) / kTileM));
    r.full_end = full_rows_end >= seqlen_q ? r.end : min(r.end, full_rows_end / kTileM);
    r.full_end = max(r.full_begin, r.full_end);
    return r;
  }
};

// The mask of one tile of keys: its row tiles, and for intervals the extents of its bounds.
template <class C>
struct KeyTileMask {
  static constexpr bool kIntervals = MaskOf<C>::kIntervals;
  RowRange range;
  int seqlen_q;
  Extent extents[kIntervals ? C::kIntervalColumns : 1];

  __device__ __forceinline__ KeyTileMask(const MaskOf<C>& mask, int n0, int seqlen_q)
      : range(RowRange::of<C::kTileM, C::kTileN>(mask.band, n0, seqlen_q)), seqlen_q(seqlen_q) {
    if constexpr (kIntervals) find(mask.intervals, n0);
  }

  // Every warp looks at all keys of the tile.
  __device__ __forceinline__ void find(const Intervals<C>& intervals, int n0) {
    const int end = min(intervals.last_key + 1, n0 + C::kTileN);
#pragma unroll
    for (int c = 0; c < C::kIntervalColumns; ++c) {
      int low = INT_MAX, high = INT_MIN;
      for (int key = n0 + int(threadIdx.x % 32); key < end; key += 32) {
        const int value = intervals.bounds[key * intervals.stride + c];
        low = min(low, value);
        high = max(high, value);
      }
      extents[c] = {__reduce_min_sync(~0u, low), __reduce_max_sync(~0u, high)};
    }
  }

  // Whether a row tile has no visible element, or some hidden one.
  __device__ __forceinline__ void classify(const MaskOf<C>& mask, int tile, bool& empty, bool& partial) const {
    empty = false, partial = tile < range.full_begin || tile >= range.full_end;
    if constexpr (kIntervals) {
      bool some_hidden;
      Intervals<C> here = mask.intervals;
      here.extents = extents;
      here.classify(0, tile * C::kTileM, min((tile + 1) * C::kTileM, seqlen_q), empty, some_hidden);
      partial |= some_hidden;
    }
  }

  // The first row tile from `tile` on that sees a key; range.end: none does.
  __device__ __forceinline__ int next(const MaskOf<C>& mask, int tile) const {
    if constexpr (kIntervals)
      for (bool empty, partial; tile < range.end; ++tile) {
        classify(mask, tile, empty, partial);
        if (!empty) break;
      }
    return tile;
  }

  // Call visit(tile, partial) for all of them, with a loop of its own for tiles that need no mask.
  template <class Visit>
  __device__ __forceinline__ void visit_all(const MaskOf<C>& mask, Visit visit) const {
    if constexpr (kIntervals) {
      for (int tile = next(mask, range.begin); tile < range.end; tile = next(mask, tile + 1)) {
        bool empty, partial;
        classify(mask, tile, empty, partial);
        partial ? visit(tile, Constant<true>{}) : visit(tile, Constant<false>{});
      }
    } else {
      int tile = range.begin;
      for (; tile < range.full_begin; ++tile) visit(tile, Constant<true>{});
      for (; tile < range.full_end; ++tile) visit(tile, Constant<false>{});
      if constexpr (MaskOf<C>::kHasBegin)
        for (; tile < range.end; ++tile) visit(tile, Constant<true>{});
    }
  }
};

}  // namespace fagen
