// The row tiles that a block works through, and the key tiles that each of them visits.
#pragma once
#include "fagen/mask/mask.cuh"
#include "fagen/schedule/tile_order.cuh"
#include "fagen/schedule/tile_scheduler.cuh"
#include "fagen/sm90/forward/visits.cuh"
#include "fagen/sm90/pipeline.cuh"

namespace fagen {

// Memory is read in sectors of 32 bytes, 16 elements. A head that begins in the middle of one is loaded from 8 columns
// before its first, which the copy engine fills with zeros as outside of the row. Bits of 8: of the first element, and
// of the steps to the next sequence and the next head.
struct EarlyColumns {
  int base = 0, batch = 0, head = 0;

  __device__ __forceinline__ int of(int head_index, int batch_index) const {
    return (base + head * head_index + batch * batch_index) & 8;
  }
};

constexpr bool is_power_of_two(int n) { return (n & (n - 1)) == 0; }
// Kernels for head dims of a power of two, which nearly all heads have, spend nothing on it.
template <class C>
constexpr bool kLoadsEarly = !is_power_of_two(C::kHeadDim) && !is_power_of_two(C::kHeadDimV);

// Computed once on the host for a launch.
struct LaunchArgs {
  CUtensorMap q, k, v;
  Divisor packed;               // heads of q whose rows lie side by side in a tile
  int tile_rows;                // of a tile that are there: whole rows of q of all of them
  int row_tiles, key_tiles;     // per head
  int tiles;                    // row tiles in all
  TileOrder order;
  Divisor heads_per_kv_head;
  Extent* extents;              // intervals: the extents of each key tile,
  RowTileVisits* visits;        // how many key tiles each row tile visits,
  VisitBits* visit_bits;        // which,
  int* ranks;                   // and the row tiles by their visits, the most first
  unsigned* next_tile_counter;  // dynamic schedule: row tiles taken, beside each cluster's first
  EarlyColumns k_early, v_early;  // of q's columns as of k's, and of O's as of v's
};

// True if a prologue kernel runs before this one. It begins when all kernels before it have ended.
template <class C>
__device__ __forceinline__ bool has_prologue(const LaunchArgs& launch) {
  return MaskOf<C>::kIntervals || (C::kSchedule == Schedule::dynamic && launch.tiles > cluster_count<C>());
}

// With intervals the last row tile need not be the longest: they are ranked by their visits.
template <class C>
constexpr bool kRanked =
    MaskOf<C>::kIntervals && (C::kBlockOrder == BlockOrder::longest_first || C::kBlockOrder == BlockOrder::sectioned);

// Intervals may differ by batch and by kv head.
__device__ __forceinline__ int mask_head(const fagen_forward_params& p, int kv_head) {
  return p.mask_heads == 1 ? 0 : kv_head;
}
__device__ __forceinline__ int64_t mask_plane(const fagen_forward_params& p, int batch, int kv_head) {
  return int64_t(batch) * p.mask_heads + mask_head(p, kv_head);
}

// The index of a row tile in `visits` and `ranks`, and of its first entry in `visit_bits`.
__device__ __forceinline__ int visits_index(const fagen_forward_params& p, const LaunchArgs& launch, int batch,
                                            int kv_head, int tile) {
  return mask_plane(p, batch, kv_head) * launch.row_tiles + tile;
}
__device__ __forceinline__ unsigned visit_bits_index(const LaunchArgs& launch, int visits_index) {
  return unsigned(visits_index) * VisitBits::kKinds * ((launch.key_tiles + 31) / 32);
}

template <class C>
__device__ __forceinline__ Intervals<C> intervals_of(const fagen_forward_params& p, const LaunchArgs& launch, int batch,
                                                     int head) {
  Intervals<C> intervals;
  intervals.bounds = bounds_of(p, batch, head);
  intervals.stride = p.intervals.stride[2];
  intervals.extents = launch.extents + (int64_t(batch) * p.mask_heads + head) * launch.key_tiles * C::kIntervalColumns;
  intervals.last_key = p.seqlen_k - 1;
  return intervals;
}

// Heads of q that share keys may be packed: n of them count as one head, with n packed rows to a row of q, a head each.
// A tile has whole rows of q: where n does not divide it, its last rows are nobody's.
template <class C>
struct HeadPacking {
  Divisor heads;
  int of_tile;

  __device__ __forceinline__ explicit HeadPacking(const LaunchArgs& launch)
      : heads(launch.packed), of_tile(launch.tile_rows) {}
  __device__ __forceinline__ int rows(int rows) const { return C::kPackHeads ? rows * int(heads.by) : rows; }
  __device__ __forceinline__ int tile_rows() const { return C::kPackHeads ? of_tile : C::kTileM; }
  // head and row of q for a packed head and row
  __device__ __forceinline__ int head(int head, int m) const {
    return C::kPackHeads ? head * int(heads.by) + int(heads.remainder(m, row(m))) : head;
  }
  __device__ __forceinline__ int row(int m) const { return C::kPackHeads ? int(heads.quotient(m)) : m; }
  // the key tiles that packed rows [m0, m1) see
  __device__ __forceinline__ TileRange range(const Band& band, int m0, int m1) const {
    if constexpr (!MaskOf<C>::kHasEnd)
      return {0, (band.seqlen_k + C::kTileN - 1) / C::kTileN, 0, band.seqlen_k / C::kTileN};
    TileRange range = TileRange::of<C::kTileN>(band, row(m0), row(m1 - 1) + 1);
    if (!MaskOf<C>::kHasBegin) range.begin = range.full_begin = 0;
    return range;
  }
};

// The `index`-th row tile in the order of work.
template <class C>
__device__ __forceinline__ TileAssignment assignment_at(const fagen_forward_params& p, const LaunchArgs& launch,
                                                        int index) {
  TileAssignment assignment;
  TileCoord& coord = assignment.coord = launch.order.tile_at<C::kBlockOrder>(index);
  assignment.kv_head = launch.heads_per_kv_head.quotient(coord.head);
  if constexpr (MaskOf<C>::kIntervals) {
    const int first = visits_index(p, launch, coord.batch, assignment.kv_head, 0);
    if constexpr (kRanked<C>) coord.row_tile = launch.ranks[first + launch.row_tiles - 1 - coord.row_tile];
    assignment.visits = launch.visits[first + coord.row_tile];
  }
  return assignment;
}

// The walk over a row tile's key tiles for the warps that load them: a band's from the last to the first.
template <class C>
struct BandKeyWalk {
  int key;  // the present tile's first
  __device__ __forceinline__ void advance() { key -= C::kTileN; }
};

// Rows [m0, m1) of a head, and the key tiles that they visit.
template <class C>
struct RowTile {
  TileCoord coord;
  int m0, m1, kv_head;
  TileRange range;  // a band's
  // intervals:
  int partial, full;  // how many key tiles
  const VisitBits* visit_bits;
  unsigned first_bits;
  Intervals<C> intervals;

  RowTile() = default;
  __device__ __forceinline__ RowTile(const fagen_forward_params& p, const LaunchArgs& launch, const Band& band,
                                     const TileAssignment& assignment)
      : coord(assignment.coord), kv_head(assignment.kv_head) {
    const HeadPacking<C> packing(launch);
    if constexpr (MaskOf<C>::kIntervals) {
      const RowTileVisits& visits = assignment.visits;
      m0 = visits.m0, m1 = visits.m1, partial = visits.partial, full = visits.full;
      visit_bits = launch.visit_bits;
      first_bits = visit_bits_index(launch, visits_index(p, launch, coord.batch, kv_head, coord.row_tile));
      intervals = intervals_of<C>(p, launch, coord.batch, mask_head(p, kv_head));
    } else {
      m0 = (coord.row_tile * C::kCluster + blockIdx.x % C::kCluster) * packing.tile_rows(),
      m1 = min(m0 + packing.tile_rows(), packing.rows(p.seqlen_q));
      range = packing.range(band, m0, m1);
    }
  }
  __device__ __forceinline__ int key_tiles() const {
    if constexpr (MaskOf<C>::kIntervals)
      return partial + full;
    else
      return range.end - range.begin;
  }
  __device__ __forceinline__ auto walk() const {
    if constexpr (MaskOf<C>::kIntervals)
      return IntervalKeyWalk<C>(visit_bits, first_bits);
    else
      return BandKeyWalk<C>{range.end * C::kTileN};
  }
};

// A row tile's key tiles as the consumers count them. Of a band each has its number.
template <class C, bool kIntervals = MaskOf<C>::kIntervals>
struct KeyTiles {
  const TileRange range;
  int tile;  // the present one

  __device__ __forceinline__ explicit KeyTiles(const RowTile<C>& row_tile)
      : range(row_tile.range), tile(range.end - 1) {}
  __device__ __forceinline__ bool last() const { return tile == range.begin; }
  __device__ __forceinline__ bool partial() const { return tile < range.full_begin || tile >= range.full_end; }
  __device__ __forceinline__ void advance() { --tile; }

  // Call visit(partial) for the present tile and the rest, with a loop of its own for tiles that need no mask.
  template <class Visit>
  __device__ __forceinline__ void visit_rest(Visit visit) {
    for (; tile >= range.begin && tile >= range.full_end; advance()) visit(true);
    for (; tile >= range.full_begin; advance()) visit(false);
    if constexpr (MaskOf<C>::kHasBegin)
      for (; tile >= range.begin; advance()) visit(true);
  }
};

// With intervals they count how many are left; a TileMask says which one is the present.
template <class C>
struct KeyTiles<C, true> {
  int partial_left, full_left;

  __device__ __forceinline__ explicit KeyTiles(const RowTile<C>& row_tile)
      : partial_left(row_tile.partial), full_left(row_tile.full) {}
  __device__ __forceinline__ bool last() const { return partial_left + full_left == 1; }
  __device__ __forceinline__ bool partial() const { return partial_left > 0; }
  __device__ __forceinline__ void advance() { partial() ? --partial_left : --full_left; }

  template <class Visit>
  __device__ __forceinline__ void visit_rest(Visit visit) {
    for (; partial_left > 0; --partial_left) visit(true);
    for (; full_left > 0; --full_left) visit(false);
  }
};

}  // namespace fagen
