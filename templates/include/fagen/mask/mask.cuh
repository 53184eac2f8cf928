// A mask as a type: which elements of a row are visible, and the walk over the key tiles that a row tile sees.
//
//   BandMask       none, causal, window: one range of keys a row
//   IntervalMask   column intervals, within a band
#pragma once
#include "fagen/mask/band.cuh"
#include "fagen/mask/intervals.cuh"

namespace fagen {

template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};

template <class C>
struct BandMask {
  static constexpr bool kIntervals = false;
  static constexpr bool kHasBegin = C::kMask == Mask::window;  // rows may not see the first keys
  static constexpr bool kHasEnd = C::kMask != Mask::none;      // nor the last ones
  Band band;

  // The walk over a row tile's key tiles, and its present one.
  struct Walk {
    int tile, begin;

    __device__ __forceinline__ bool valid() const { return tile >= begin; }
    __device__ __forceinline__ bool partial(const TileRange& range) const {
      return tile < range.full_begin || tile >= range.full_end;
    }
    __device__ __forceinline__ void advance() { --tile; }

    // Call visit(tile, partial) for the rest of the walk, with a loop of its own for tiles that need no mask.
    template <class Visit>
    __device__ __forceinline__ void visit_rest(const TileRange& range, Visit visit) {
      for (; valid() && tile >= range.full_end; advance()) visit(tile, Constant<true>{});
      for (; tile >= range.full_begin; advance()) visit(tile, Constant<false>{});
      if constexpr (kHasBegin)
        for (; valid(); advance()) visit(tile, Constant<true>{});
    }
  };

  __device__ __forceinline__ explicit BandMask(const fagen_forward_params& p) : band(p) {}
  __device__ __forceinline__ Walk walk(const TileRange& range, int, int) const { return {range.end - 1, range.begin}; }
};

template <class C>
struct IntervalMask {
  static constexpr bool kIntervals = true, kHasBegin = true, kHasEnd = true;
  Band band;
  Intervals<C> intervals;

  // The same walk. The lanes of a warp classify 32 tiles at once; the visible ones are then taken from the last to the
  // first.
  struct Walk {
    const Intervals<C>& intervals;
    TileRange range;
    int m0, m1, group;      // tiles [group, group + 32) are classified
    uint32_t seen, hidden;  // bits of tiles still to visit, and of those that need the mask
    int tile;               // present tile, or -1

    __device__ __forceinline__ Walk(const Intervals<C>& intervals, TileRange range, int m0, int m1)
        : intervals(intervals), range(range), m0(m0), m1(m1), group(range.end), seen(0), hidden(0) {
      advance();
    }
    __device__ __forceinline__ bool valid() const { return tile >= 0; }
    __device__ __forceinline__ bool partial(const TileRange&) const {
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
    template <class Visit>
    __device__ __forceinline__ void visit_rest(const TileRange&, Visit visit) {
      for (; valid(); advance()) partial(range) ? visit(tile, Constant<true>{}) : visit(tile, Constant<false>{});
    }
  };

  __device__ __forceinline__ explicit IntervalMask(const fagen_forward_params& p) : band(p) {}
  __device__ __forceinline__ Walk walk(const TileRange& range, int m0, int m1) const {
    return Walk(intervals, range, m0, m1);
  }
};

// The config's mask.
template <class C, bool kIntervals = C::kMask == Mask::intervals>
struct SelectMask {
  using Type = BandMask<C>;
};
template <class C>
struct SelectMask<C, true> {
  using Type = IntervalMask<C>;
};
template <class C>
using MaskOf = typename SelectMask<C>::Type;

}  // namespace fagen
