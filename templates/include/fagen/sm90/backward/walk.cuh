// The key tile of a block, and the row tiles that it visits: those of all heads of q that share the keys.
#pragma once
#include "fagen/abi/backward.h"
#include "fagen/mask/intervals.cuh"
#include "fagen/ptx/cp_async.cuh"
#include "fagen/ptx/mbarrier.cuh"
#include "fagen/schedule/tile_order.cuh"
#include "fagen/sm90/backward/layout.cuh"

namespace fagen {

// Computed once on the host for a launch.
struct BackwardLaunch {
  CUtensorMap q, k, v, dout;
  int row_tiles, key_tiles;  // per head
  bool one_key_tile;         // that all rows visit, or none at all: what its block has of dQ is no part of a sum
  TileOrder order;           // of key tiles
  Divisor splits;            // blocks that share the visits of a key tile: a cluster
  float* lse;                // (batch, heads, row_tiles * kTileM): base 2, +inf where a row sees nothing or is none
  float* delta;              // the same of the sums of dO O - dLSE, negated where dP begins with it
  float* dq;        // (batch, heads, row_tiles), tiles of float32 in the order of fragments
  unsigned* turns;  // (batch, heads, row_tiles, kGroups): how many blocks have added their part
  // Deterministic, with intervals: (batch, mask_heads, row_tiles, seen_words), a bit for each key tile that a row tile
  // sees. Only those have a turn.
  unsigned* seen;
  int seen_words;
};

// Whether turns are told by which key tiles a row tile sees: without intervals the band tells.
template <class C>
constexpr bool kTurnsBySeen = C::kDeterministic && MaskOf<C>::kIntervals;

// The sums of dQ of the `index`-th row tile of all heads.
template <class C>
__device__ __forceinline__ float* dq_sums(const BackwardLaunch& launch, int64_t index) {
  return launch.dq + index * DqShare<C>::kTileFloats;
}

// The band around the diagonal by columns: key n is seen by rows [n - last, n - first].
struct RowBand {
  int first, last, seqlen_q, seqlen_k;

  __host__ __device__ __forceinline__ explicit RowBand(const fagen_backward_params& p)
      : seqlen_q(p.seqlen_q), seqlen_k(p.seqlen_k) {
    const int shift = p.seqlen_k - p.seqlen_q;
    first = p.window_left < 0 ? -kFar : shift - p.window_left;
    last = p.window_right < 0 ? kFar : shift + p.window_right;
  }
  // the first row that sees key n, and one past the last; none sees a key that is not there
  __host__ __device__ __forceinline__ int begin(int n) const { return max(0, n - last); }
  __host__ __device__ __forceinline__ int end(int n) const {
    return n < seqlen_k ? max(0, min(seqlen_q, n - first + 1)) : 0;
  }
  // the key tiles that a row tile sees, first and last; the last is before the first where it sees none
  template <class C>
  __device__ __forceinline__ void key_tiles(int row_tile, int& first_tile, int& last_tile) const {
    const int m0 = row_tile * C::kTileM, m1 = min(m0 + C::kTileM, seqlen_q);
    const int first_key = max(0, m0 + first), last_key = min(seqlen_k - 1, m1 - 1 + last);
    first_tile = first_key / C::kTileN, last_tile = last_key < first_key ? first_tile - 1 : last_key / C::kTileN;
  }
};

// The least and the greatest bounds of the intervals of a tile's keys.
struct KeyBounds {
  Extent ls, le, us, ue;

  // Rows [m0, m1): no key is visible to them, or one of them may be hidden from some key.
  __device__ __forceinline__ bool hide(int m0, int m1) const {
    return (m0 >= ls.high && m1 <= le.low) || (m0 >= us.high && m1 <= ue.low);
  }
  __device__ __forceinline__ bool touch(int m0, int m1) const {
    return (m0 < le.high && m1 > ls.low) || (m0 < ue.high && m1 > us.low);
  }
};

struct RowTileVisit {
  int head, tile;
  bool partial;  // something may be hidden
};

// The key tiles that a row tile sees, as bits.
template <class C>
__device__ __forceinline__ unsigned* seen_by(const fagen_backward_params& p, const BackwardLaunch& launch, int batch,
                                             int kv_head, int row_tile) {
  const int64_t plane = int64_t(batch) * p.mask_heads + (p.mask_heads == 1 ? 0 : kv_head);
  return launch.seen + (plane * launch.row_tiles + row_tile) * launch.seen_words;
}

template <class C>
struct KeyTile {
  static constexpr bool kIntervals = MaskOf<C>::kIntervals;
  static constexpr bool kLastFirst = C::kBlockOrder == BlockOrder::descending;

  int tile, kv_head, split, batch, n0;
  int begin, end;  // row tiles that see any of its keys, by the band
  int full_begin, full_end;  // rows that see all of them
  int splits;
  // Intervals. Where those of its keys' bounds are: read anew, since registers are few. Unless what they hide is the
  // first and the last rows alone, as with packed sequences: then the bounds above say it all.
  uint32_t extents;
  bool scattered = false;

  // Orders that put the longest first take the last index of a head first; of key tiles the first is the longest.
  // `index` counts the tiles of all heads in their order, those of splits side by side.
  __device__ __forceinline__ KeyTile(const BackwardLaunch& launch, const RowBand& band, uint32_t smem, uint32_t index) {
    const uint32_t place = launch.splits.quotient(index);
    const TileCoord coord = launch.order.tile_at<C::kBlockOrder>(place);
    constexpr bool kTurned = C::kBlockOrder == BlockOrder::longest_first || C::kBlockOrder == BlockOrder::sectioned;
    tile = kTurned ? launch.key_tiles - 1 - coord.row_tile : coord.row_tile;
    kv_head = coord.head, split = launch.splits.remainder(index, place), batch = coord.batch, n0 = tile * C::kTileN;
    const int last_key = min(n0 + C::kTileN, band.seqlen_k) - 1;
    const int first_row = band.begin(n0), end_row = band.end(last_key);
    begin = first_row / C::kTileM;
    end = first_row < end_row ? (end_row + C::kTileM - 1) / C::kTileM : begin;
    full_begin = band.begin(last_key);
    full_end = last_key == n0 + C::kTileN - 1 ? band.end(n0) : 0;
    splits = launch.splits.by;
    extents = smem + BackwardLayout<C>::kExtents;
    if constexpr (kIntervals) {
      const KeyBounds of = bounds();
      const bool lower = leaves(of.ls, of.le, band.seqlen_q), upper = leaves(of.us, of.ue, band.seqlen_q);
      scattered = !(lower && upper);
      end = max(begin, end);
    }
  }

  __device__ __forceinline__ KeyBounds bounds() const {
    const uint4 lower = ptx::ld_shared_16(extents), upper = ptx::ld_shared_16(extents + 16);
    return {{int(lower.x), int(lower.y)},
            {int(lower.z), int(lower.w)},
            {int(upper.x), int(upper.y)},
            {int(upper.z), int(upper.w)}};
  }
  // Rows are hidden from `from` to `to`, of each key: narrow the row tiles down to the rest if those are the last rows
  // or the first, and say whether they are.
  __device__ __forceinline__ bool leaves(const Extent& from, const Extent& to, int seqlen_q) {
    if (to.low >= seqlen_q) {
      end = min(end, (max(0, min(from.high, seqlen_q)) + C::kTileM - 1) / C::kTileM);
      full_end = min(full_end, from.low);
      return true;
    }
    if (from.high > 0) return false;
    begin = max(begin, to.low / C::kTileM);
    full_begin = max(full_begin, to.high);
    return true;
  }

  // Rows [m0, m1): no key is visible to them, or some may be hidden.
  __device__ __forceinline__ void classify(int m0, int m1, bool& hidden, bool& partial) const {
    hidden = false, partial = m0 < full_begin || m1 > full_end;
    if (kIntervals && scattered) {
      const KeyBounds of = bounds();
      hidden = of.hide(m0, m1);
      partial |= of.touch(m0, m1);
    }
  }

  // Call visit(RowTileVisit) for every row tile that sees any of the keys, head after head: this split's share of them.
  template <class Visit>
  __device__ __forceinline__ void walk(const fagen_backward_params& p, Visit visit) const {
    const int group = p.heads / p.kv_heads, tiles = end - begin, all = group * tiles;
    const int shift = C::kRowOrder == RowOrder::shifted && tiles > 0 ? tile % tiles : 0;
    int head = kv_head * group, i = 0, visits = all;
    if (splits > 1 && tiles > 0) {
      const int share = (all + splits - 1) / splits, from = split * share, before = from / tiles;  // heads
      head += before, i = from - before * tiles, visits = min(share, all - from);
    }
    const auto look_at = [&](int head, int i) {
      int t = C::kRowOrder == RowOrder::descending ? end - 1 - i : begin + i + shift;
      if (C::kRowOrder == RowOrder::shifted && t >= end) t -= tiles;
      const int m0 = t * C::kTileM, m1 = min(m0 + C::kTileM, p.seqlen_q);
      bool hidden, partial;
      classify(m0, m1, hidden, partial);
      if (!hidden) visit(RowTileVisit{head, t, partial});
    };
    // Consumers that have dQ in registers know much about a head; elsewhere one loop takes fewer registers than two.
    if constexpr (!kLoaderHasDq<C> && !kSharedOperands<C>) {
#pragma unroll 1
      for (; visits > 0; ++head, i = 0) {
        const int stop = min(tiles, i + visits);
        visits -= stop - i;
#pragma unroll 1
        for (; i < stop; ++i) look_at(head, i);
      }
    } else {
#pragma unroll 1
      for (; visits > 0; --visits) {
        look_at(head, i);
        if (++i == tiles) i = 0, ++head;
      }
    }
  }

  // How many key tiles visit a row tile, and how many of them before this one: blocks of lower index, in an order that
  // is fixed.
  struct Turn {
    int mine, count;
  };
  __device__ __forceinline__ Turn turn(const RowBand& band, int t) const {
    int first, last;
    band.key_tiles<C>(t, first, last);
    return {kLastFirst ? last - tile : tile - first, last - first + 1};
  }
  // The same by the key tiles that the row tile sees: a warp's work.
  __device__ __forceinline__ Turn turn(const fagen_backward_params& p, const BackwardLaunch& launch, int t) const {
    const unsigned* seen = seen_by<C>(p, launch, batch, kv_head, t);
    int mine = 0, count = 0;
    for (int word = threadIdx.x % 32; word < launch.seen_words; word += 32) {
      const int before = min(max(tile - word * 32, 0), 32);  // bits of tiles below this one
      const unsigned bits = seen[word], low = before == 32 ? bits : bits & ((1u << before) - 1);
      count += __popc(bits), mine += __popc(low);
    }
    mine = __reduce_add_sync(~0u, mine), count = __reduce_add_sync(~0u, count);
    return {kLastFirst ? count - 1 - mine : mine, count};
  }
};

// The bounds of a tile's keys, which `keep(n, bounds)` gets one by one: a warp's work.
template <class C, class Keep>
__device__ __forceinline__ KeyBounds find_bounds(const fagen_backward_params& p, int batch, int kv_head, int n0,
                                                 Keep keep) {
  Intervals<C> intervals;
  intervals.bounds = static_cast<const int32_t*>(p.intervals.data) + batch * p.intervals.stride[0] +
                     (p.mask_heads == 1 ? 0 : kv_head) * p.intervals.stride[1];
  intervals.stride = p.intervals.stride[2];
  intervals.last_key = p.seqlen_k - 1;
  int low[4], high[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) low[i] = INT_MAX, high[i] = INT_MIN;
  for (int n = threadIdx.x % 32; n < C::kTileN; n += 32) {
    const HiddenRows hidden = intervals.at(min(n0 + n, intervals.last_key));
    const int bounds[4] = {hidden.ls, hidden.le, hidden.us, hidden.ue};
    keep(n, bounds);
#pragma unroll
    for (int i = 0; i < 4; ++i) low[i] = min(low[i], bounds[i]), high[i] = max(high[i], bounds[i]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) low[i] = __reduce_min_sync(~0u, low[i]), high[i] = __reduce_max_sync(~0u, high[i]);
  return {{low[0], high[0]}, {low[1], high[1]}, {low[2], high[2]}, {low[3], high[3]}};
}

// Bring the bounds of a key tile's intervals to shared memory, and their extents: one warp's work.
template <class C>
__device__ __forceinline__ void load_intervals(const fagen_backward_params& p, const BackwardLaunch& launch,
                                               uint32_t smem, uint32_t index) {
  using L = BackwardLayout<C>;
  const TileCoord coord = launch.order.tile_at<C::kBlockOrder>(launch.splits.quotient(index));
  constexpr bool kTurned = C::kBlockOrder == BlockOrder::longest_first || C::kBlockOrder == BlockOrder::sectioned;
  const int n0 = (kTurned ? launch.key_tiles - 1 - coord.row_tile : coord.row_tile) * C::kTileN;
  const KeyBounds of = find_bounds<C>(p, coord.batch, coord.head, n0, [&](int n, const int (&bounds)[4]) {
    ptx::st_shared_16(smem + L::kBounds + n * 16, make_uint4(bounds[0], bounds[1], bounds[2], bounds[3]));
  });
  if (threadIdx.x % 32 == 0) {
    ptx::st_shared_16(smem + L::kExtents, make_uint4(of.ls.low, of.ls.high, of.le.low, of.le.high));
    ptx::st_shared_16(smem + L::kExtents + 16, make_uint4(of.us.low, of.us.high, of.ue.low, of.ue.high));
  }
}

// Tell which key tiles a row tile sees: a block's work. KeyTile::walk comes to the same answer.
template <class C>
__device__ __forceinline__ void find_seen(const fagen_backward_params& p, const BackwardLaunch& launch, int batch,
                                          int kv_head, int row_tile, int warps) {
  int first, last;
  RowBand(p).key_tiles<C>(row_tile, first, last);
  const int m0 = row_tile * C::kTileM, m1 = min(m0 + C::kTileM, p.seqlen_q);
  for (int word = threadIdx.x / 32; word < launch.seen_words; word += warps) {
    unsigned bits = 0;
    for (int tile = max(first, word * 32); tile <= min(last, word * 32 + 31); ++tile) {
      const KeyBounds of = find_bounds<C>(p, batch, kv_head, tile * C::kTileN, [](int, const int (&)[4]) {});
      if (!of.hide(m0, m1)) bits |= 1u << (tile - word * 32);
    }
    if (threadIdx.x % 32 == 0) seen_by<C>(p, launch, batch, kv_head, row_tile)[word] = bits;
  }
}

}  // namespace fagen
