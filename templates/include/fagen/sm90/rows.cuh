// The tiles of rows that a block works through, and the keys that each of them sees.
#pragma once
#include "fagen/mask.cuh"
#include "fagen/schedule.cuh"
#include "fagen/sm90/intervals.cuh"
#include "fagen/sm90/layout.cuh"
#include "fagen/walk.cuh"

struct Launch {
  CUtensorMap q, k, v;
  int packed;                // log2 of the heads of q whose rows lie side by side in a tile
  int row_tiles, key_tiles;  // tiles of a head
  int tiles;                 // tiles of rows in all
  int heads_at_once;         // sectioned order
  Extent* extents;           // of the intervals, tile by tile
  Span* spans;               // of each mask head, by tile of rows: the tiles of keys it sees,
  int* order;                // and which tile of rows sees the most, the next most, ...
  unsigned* taken;           // dynamic schedule: tiles of rows that blocks have come for, beside each one's first
};

// Blocks of a cluster are a team: they take neighbouring tiles of rows together, which count as one.
template <class C>
__device__ __forceinline__ int team() {
  return blockIdx.x / C::kCluster;
}
template <class C>
__device__ __forceinline__ int teams() {
  return gridDim.x / C::kCluster;
}

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
      return round * teams<C>() + (round % 2 ? teams<C>() - 1 - team<C>() : team<C>());
    } else {
      if (launch.tiles <= teams<C>()) return launch.tiles;  // there is no counter
      if (round++ == 0) ptx::wait_for_previous_kernel();   // which sets it to zero
      return teams<C>() + (threadIdx.x % 32 == 0 ? atomicAdd(launch.taken, 1) : 0);
    }
  }
};

// With intervals, the longest tile of rows is not simply the last: they are counted and ranked.
template <class C>
constexpr bool kRanked = C::kMask == Mask::intervals &&
                         (C::kBlockOrder == BlockOrder::longest_first || C::kBlockOrder == BlockOrder::sectioned);

// Intervals may differ by batch and by kv head.
__device__ __forceinline__ int mask_head(const fagen_params& p, int kv_head) { return p.mask_heads == 1 ? 0 : kv_head; }
__device__ __forceinline__ int64_t mask_plane(const fagen_params& p, int batch, int kv_head) {
  return int64_t(batch) * p.mask_heads + mask_head(p, kv_head);
}

template <class C>
__device__ __forceinline__ Intervals<C> intervals_of(const fagen_params& p, const Launch& launch, int batch, int head) {
  Intervals<C> intervals;
  intervals.bounds = p.intervals + batch * p.intervals_stride[0] + head * p.intervals_stride[1];
  intervals.stride = p.intervals_stride[2];
  intervals.extents = launch.extents + (int64_t(batch) * p.mask_heads + head) * launch.key_tiles * C::kIntervalColumns;
  intervals.last_key = p.seqlen_k - 1;
  return intervals;
}

// Heads of q that share keys may be packed: 2^n of them count as one head, with as many rows to a row of q. That many
// of the last bits of a row are its head's.
template <class C>
struct Packing {
  int log2;

  __device__ __forceinline__ explicit Packing(const Launch& launch) : log2(C::kPackHeads ? launch.packed : 0) {}
  __device__ __forceinline__ int heads(int heads) const { return heads >> log2; }
  __device__ __forceinline__ int rows(int rows) const { return rows << log2; }
  // of a packed head and row: which they are in q
  __device__ __forceinline__ int head(int head, int m) const { return head << log2 | (m & ((1 << log2) - 1)); }
  __device__ __forceinline__ int row(int m) const { return m >> log2; }
  // the tiles of keys that packed rows [m0, m1) see
  __device__ __forceinline__ TileRange range(const Band& band, int m0, int m1) const {
    if constexpr (C::kMask == Mask::none)
      return {0, (band.seqlen_k + C::kTileN - 1) / C::kTileN, 0, band.seqlen_k / C::kTileN};
    TileRange range = TileRange::of<C::kTileN>(band, row(m0), row(m1 - 1) + 1);
    if (C::kMask == Mask::causal) range.begin = range.full_begin = 0;
    return range;
  }
};

// The `index`-th tile of rows in the order of work.
template <class C>
__device__ __forceinline__ Work take(const fagen_params& p, const Launch& launch, int index) {
  fagen_params grid;
  grid.batch = p.batch, grid.heads = Packing<C>(launch).heads(p.heads);
  Work work = take_work<C::kBlockOrder>(grid, index, launch.row_tiles, launch.heads_at_once);
  if constexpr (kRanked<C>) {
    const int* order = launch.order + mask_plane(p, work.batch, work.head / (p.heads / p.kv_heads)) * launch.row_tiles;
    work.row_tile = order[launch.row_tiles - 1 - work.row_tile];
  }
  return work;
}

// The tiles of keys that a band shows to a tile of rows, from the last to the first.
template <class C>
struct BandTiles {
  int tile, begin;
  __device__ __forceinline__ bool valid() const { return tile >= begin; }
  __device__ __forceinline__ int key() const { return tile * C::kTileN; }
  __device__ __forceinline__ void advance() { --tile; }
};

// One tile of rows: [m0, m1) of a head, and its walk over tiles of keys.
template <class C>
struct Rows {
  Work work;
  int m0, m1, kv_head;
  TileRange range;
  Span span;
  Intervals<C> intervals;

  Rows() = default;
  __device__ __forceinline__ Rows(const fagen_params& p, const Launch& launch, const Band& band, const Work& work)
      : work(work) {
    const Packing<C> packing(launch);
    kv_head = work.head / packing.heads(p.heads / p.kv_heads);
    if constexpr (C::kMask == Mask::intervals) {
      const int64_t plane = mask_plane(p, work.batch, kv_head);
      intervals = intervals_of<C>(p, launch, work.batch, mask_head(p, kv_head));
      span = launch.spans[plane * launch.row_tiles + max(work.row_tile, 0)];
      m0 = span.m0, m1 = span.m1;
    } else {
      m0 = (work.row_tile * C::kCluster + blockIdx.x % C::kCluster) * C::kTileM,
      m1 = min(m0 + C::kTileM, packing.rows(p.seqlen_q));
      range = packing.range(band, m0, m1);
    }
  }

  __device__ __forceinline__ bool see_any() const {
    if constexpr (C::kMask == Mask::intervals)
      return span.first < span.end;
    else
      return range.begin < range.end;
  }
  // tiles of keys
  __device__ __forceinline__ int count() const {
    if constexpr (C::kMask == Mask::intervals)
      return span.cut + span.whole;
    else
      return range.end - range.begin;
  }
  // for the producer, at the first one
  __device__ __forceinline__ auto tiles(const Band& band) const {
    if constexpr (C::kMask == Mask::intervals) {
      IntervalTiles<C> tiles(intervals, band, span);
      tiles.advance();
      return tiles;
    } else {
      return BandTiles<C>{range.end - 1, range.begin};
    }
  }
};

// The tiles of keys that a tile of rows sees, as the consumers count them.
template <class C, bool kIntervals = C::kMask == Mask::intervals>
struct Keys {
  const TileRange range;
  int tile;  // the present one

  __device__ __forceinline__ explicit Keys(const Rows<C>& rows) : range(rows.range), tile(range.end - 1) {}
  __device__ __forceinline__ bool last() const { return tile == range.begin; }
  __device__ __forceinline__ bool partial() const { return tile < range.full_begin || tile >= range.full_end; }
  __device__ __forceinline__ void advance() { --tile; }

  // Call visit(partial) for the present tile and the rest, with a loop of its own for tiles that need no mask.
  template <class Visit>
  __device__ __forceinline__ void visit_rest(Visit visit) {
    for (; tile >= range.begin && tile >= range.full_end; advance()) visit(true);
    for (; tile >= range.full_begin; advance()) visit(false);
    if constexpr (C::kMask == Mask::window)
      for (; tile >= range.begin; advance()) visit(true);
  }
};

// Of intervals they know only how many are left; which they are, the producer tells.
template <class C>
struct Keys<C, true> {
  int cut, whole;

  __device__ __forceinline__ explicit Keys(const Rows<C>& rows) : cut(rows.span.cut), whole(rows.span.whole) {}
  __device__ __forceinline__ bool last() const { return cut + whole == 1; }
  __device__ __forceinline__ bool partial() const { return cut > 0; }
  __device__ __forceinline__ void advance() { partial() ? --cut : --whole; }

  template <class Visit>
  __device__ __forceinline__ void visit_rest(Visit visit) {
    for (; cut > 0; --cut) visit(true);
    for (; whole > 0; --whole) visit(false);
  }
};
