// The tiles of rows that a block works through, and the keys that each of them sees.
#pragma once
#include "fagen/mask.cuh"
#include "fagen/sm90/intervals.cuh"
#include "fagen/sm90/layout.cuh"
#include "fagen/sm90/order.cuh"
#include "fagen/walk.cuh"

struct Launch {
  CUtensorMap q, k, v;
  int packed;                // log2 of the heads of q whose rows lie side by side in a tile
  int row_tiles, key_tiles;  // tiles of a head
  int tiles;                 // tiles of rows in all
  Order order;               // in which they are taken
  Divisor sharers;           // heads of q that share keys
  Extent* extents;           // of the intervals, tile by tile
  Span* spans;               // of each mask head, by tile of rows: how many tiles of keys it sees,
  Part* parts;               // which,
  int* ranks;                // and which tile of rows sees the most, the next most, ...
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

// Whether a small kernel runs before this one. It begins when all kernels before it have ended.
template <class C>
__device__ __forceinline__ bool prepared(const Launch& launch) {
  return C::kMask == Mask::intervals || (C::kSchedule == Schedule::dynamic && launch.tiles > teams<C>());
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
      if (!prepared<C>(launch)) return launch.tiles;      // there is no counter
      if (round++ == 0) ptx::wait_for_previous_kernel();  // which sets it to zero
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

// Which of all that were planned a tile of rows is, and where the walk of one begins.
__device__ __forceinline__ int planned(const fagen_params& p, const Launch& launch, int batch, int kv_head, int tile) {
  return mask_plane(p, batch, kv_head) * launch.row_tiles + tile;
}
__device__ __forceinline__ unsigned walk(const Launch& launch, int planned) {
  return unsigned(planned) * Part::kKinds * ((launch.key_tiles + 31) / 32);
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

// The `index`-th tile of rows in the order of work, and what there is to say of it.
template <class C>
__device__ __forceinline__ Letter take(const fagen_params& p, const Launch& launch, int index) {
  Letter letter;
  Work& work = letter.work = launch.order.take<C::kBlockOrder>(index);
  letter.kv_head = launch.sharers.quotient(work.head);
  if constexpr (C::kMask == Mask::intervals) {
    const int first = planned(p, launch, work.batch, letter.kv_head, 0);
    if constexpr (kRanked<C>) work.row_tile = launch.ranks[first + launch.row_tiles - 1 - work.row_tile];
    letter.span = launch.spans[first + work.row_tile];
  }
  return letter;
}

// The tiles of keys that a band shows to a tile of rows, from the last to the first.
template <class C>
struct BandTiles {
  int key;  // the present tile's first
  __device__ __forceinline__ void advance() { key -= C::kTileN; }
};

// One tile of rows: [m0, m1) of a head, and its walk over tiles of keys.
template <class C>
struct Rows {
  Work work;
  int m0, m1, kv_head;
  TileRange range;
  // with intervals
  int cut, whole;
  const Part* parts;
  unsigned walk_begin;
  Intervals<C> intervals;

  Rows() = default;
  __device__ __forceinline__ Rows(const fagen_params& p, const Launch& launch, const Band& band, const Letter& letter)
      : work(letter.work), kv_head(letter.kv_head) {
    const Packing<C> packing(launch);
    if constexpr (C::kMask == Mask::intervals) {
      m0 = letter.span.m0, m1 = letter.span.m1, cut = letter.span.cut, whole = letter.span.whole;
      parts = launch.parts, walk_begin = walk(launch, planned(p, launch, work.batch, kv_head, work.row_tile));
      intervals = intervals_of<C>(p, launch, work.batch, mask_head(p, kv_head));
    } else {
      m0 = (work.row_tile * C::kCluster + blockIdx.x % C::kCluster) * C::kTileM,
      m1 = min(m0 + C::kTileM, packing.rows(p.seqlen_q));
      range = packing.range(band, m0, m1);
    }
  }
  // tiles of keys
  __device__ __forceinline__ int count() const {
    if constexpr (C::kMask == Mask::intervals)
      return cut + whole;
    else
      return range.end - range.begin;
  }
  // for those that load them, before the first one
  __device__ __forceinline__ auto tiles() const {
    if constexpr (C::kMask == Mask::intervals)
      return IntervalTiles<C>(parts, walk_begin);
    else
      return BandTiles<C>{range.end * C::kTileN};
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

// Of intervals they know only how many are left; which they are, they are told.
template <class C>
struct Keys<C, true> {
  int cut, whole;

  __device__ __forceinline__ explicit Keys(const Rows<C>& rows) : cut(rows.cut), whole(rows.whole) {}
  __device__ __forceinline__ bool last() const { return cut + whole == 1; }
  __device__ __forceinline__ bool partial() const { return cut > 0; }
  __device__ __forceinline__ void advance() { partial() ? --cut : --whole; }

  template <class Visit>
  __device__ __forceinline__ void visit_rest(Visit visit) {
    for (; cut > 0; --cut) visit(true);
    for (; whole > 0; --whole) visit(false);
  }
};
