// FlashMask's intervals: which tiles of keys a tile of rows sees, in which order it visits them, and what the producer
// tells the consumers of each. Here a tile of keys may begin anywhere: a tile of rows begins with the first key it
// sees.
#pragma once
#include "fagen/mask.cuh"
#include "fagen/sm90/layout.cuh"

// A tile of rows is [m0, m1). The keys that it sees lie in [first, end). Taken in tiles from the first on, something is
// hidden of `cut` of them and nothing of `whole`; others it does not see.
struct Span {
  int m0, m1, first, end, cut, whole;
};

// A key is hidden from all rows [m0, m1), by one of its two intervals.
__device__ __forceinline__ bool hides_all(const Hidden& hidden, int m0, int m1) {
  return (m0 >= hidden.ls && m1 <= hidden.le) || (m0 >= hidden.us && m1 <= hidden.ue);
}

// One tile of keys against one of rows.
template <class C>
struct IntervalTile {
  Extent ls, le, us, ue;  // of its keys' bounds; from two tiles of the extents where it lies across them
  int first;              // key

  __device__ __forceinline__ IntervalTile(const Intervals<C>& intervals, int first) : first(first) {
    const int tile = first / C::kTileN, next = min((first + C::kTileN - 1) / C::kTileN, intervals.last_key / C::kTileN);
    const auto both = [](Extent a, Extent b) { return Extent{min(a.low, b.low), max(a.high, b.high)}; };
    ls = both(intervals.template extent<C::kLTS>(tile, kFar), intervals.template extent<C::kLTS>(next, kFar));
    le = both(intervals.template extent<C::kLTE>(tile, kFar), intervals.template extent<C::kLTE>(next, kFar));
    us = both(intervals.template extent<C::kUTS>(tile, -kFar), intervals.template extent<C::kUTS>(next, -kFar));
    ue = both(intervals.template extent<C::kUTE>(tile, -kFar), intervals.template extent<C::kUTE>(next, -kFar));
  }
  // all is hidden from rows [m0, m1); any may be; or all keys have the same bounds
  __device__ __forceinline__ bool empty(int m0, int m1) const {
    return (m0 >= ls.high && m1 <= le.low) || (m0 >= us.high && m1 <= ue.low);
  }
  __device__ __forceinline__ bool touched(int m0, int m1) const {
    return (m0 < le.high && m1 > ls.low) || (m0 < ue.high && m1 > us.low);
  }
  __device__ __forceinline__ bool same() const {
    return ls.low == ls.high && le.low == le.high && us.low == us.high && ue.low == ue.high;
  }
  // the band hides something of it
  __device__ __forceinline__ bool banded(const Band& band, int m0, int m1) const {
    return first + C::kTileN > band.end(m0) || first < band.begin(m1 - 1);
  }
};

// The tiles of keys that rows [m0, m1) see, the cut ones first and then the whole ones, so that the consumers have a
// loop for each; either from the last to the first. The lanes of a warp look at 32 at once.
template <class C>
struct IntervalTiles {
  Intervals<C> intervals;
  Band band;
  int m0, m1, first, count;  // of all tiles: the first key, and how many
  int group;                 // tiles [group, group + 32) were looked at
  uint32_t seen;             // bits of those still to visit
  bool cut;                  // whether these are the cut ones
  int tile;                  // the present one, or -1

  __device__ __forceinline__ IntervalTiles(const Intervals<C>& intervals, const Band& band, Span span)
      : intervals(intervals),
        band(band),
        m0(span.m0),
        m1(span.m1),
        first(span.first),
        count((span.end - span.first + C::kTileN - 1) / C::kTileN),
        group(count),
        seen(0),
        cut(true) {}

  // Bits of the tiles [group, group + 32) that are cut, or whole.
  __device__ __forceinline__ uint32_t look(int group, bool cut) const {
    const int mine = group + int(threadIdx.x % 32);
    bool mask = false;
    if (mine >= 0 && mine < count) {
      const IntervalTile<C> tile(intervals, first + mine * C::kTileN);
      mask = !tile.empty(m0, m1) && (tile.touched(m0, m1) || tile.banded(band, m0, m1)) == cut;
    }
    return __ballot_sync(~0u, mask);
  }

  __device__ __forceinline__ bool valid() const { return tile >= 0; }
  __device__ __forceinline__ int key() const { return first + tile * C::kTileN; }
  __device__ __forceinline__ void advance() {
    while (seen == 0) {
      if (group <= 0) {
        if (!cut) {
          tile = -1;
          return;
        }
        cut = false, group = count;
      }
      group -= 32;
      seen = look(group, cut);
    }
    const int bit = 31 - __clz(seen);
    seen ^= 1u << bit;
    tile = group + bit;
  }
};

// Rows at which one tile of rows had better end and the next begin, as a bit each: where something begins or ends to be
// hidden of a whole tile of keys (with packed documents, where one ends).
constexpr int kMostRows = 1 << 17;  // more than that are not looked at
struct Borders {
  uint32_t bits[kMostRows / 32];

  // A block's work.
  template <class C>
  __device__ __forceinline__ void find(const Intervals<C>& intervals, int seqlen_q) {
    const int words = min(seqlen_q, kMostRows) / 32 + 1;
    for (int i = threadIdx.x; i < words && i < kMostRows / 32; i += blockDim.x) bits[i] = 0;
    __syncthreads();
    const int extents = (intervals.last_key + C::kTileN) / C::kTileN * C::kIntervalColumns;
    for (int i = threadIdx.x; i < extents; i += blockDim.x) {
      const Extent of = intervals.extents[i];
      if (of.low == of.high && of.low > 0 && of.low < min(seqlen_q, kMostRows))
        atomicOr(&bits[of.low / 32], 1u << of.low % 32);
    }
    __syncthreads();
  }
  // A warp's work: the `index`-th tile of at most `tiles`; {0, 0} if there are fewer.
  template <int kTileM>
  __device__ __forceinline__ int2 rows(int index, int tiles, int seqlen_q) const {
    const auto count = [](int rows) { return (rows + kTileM - 1) / kTileM; };
    const int words = min(seqlen_q, kMostRows) / 32 + 1, lane = threadIdx.x % 32;
    int begin = 0, before = 0;  // the last border, and how many tiles end there or sooner
    for (int word = 0; word < words; word += 32) {
      const uint32_t mine = word + lane < words && word + lane < kMostRows / 32 ? bits[word + lane] : 0;
      for (uint32_t lanes = __ballot_sync(~0u, mine != 0); lanes; lanes &= lanes - 1) {
        const int from = __ffs(lanes) - 1;
        for (uint32_t left = __shfl_sync(~0u, mine, from); left; left &= left - 1) {
          const int border = (word + from) * 32 + __ffs(left) - 1, more = count(border - begin);
          if (before + more + count(seqlen_q - border) > tiles) continue;  // there is no room for this one
          if (index < before + more) {
            const int m0 = begin + (index - before) * kTileM;
            return make_int2(m0, min(m0 + kTileM, border));
          }
          begin = border, before += more;
        }
      }
    }
    const int m0 = begin + (index - before) * kTileM;
    return m0 < seqlen_q ? make_int2(m0, min(m0 + kTileM, seqlen_q)) : make_int2(0, 0);
  }
};

// A warp finds out what rows [m0, m1) see.
template <class C>
__device__ __forceinline__ Span find_span(const Intervals<C>& intervals, const Band& band, int m0, int m1) {
  const int lane = threadIdx.x % 32;
  const int begin = band.begin(m0), end = band.end(m1 - 1);
  const int tiles_end = (end + C::kTileN - 1) / C::kTileN;
  int first = -1, last = -1;  // tiles of the extents
#pragma unroll 4
  for (int group = begin / C::kTileN; group < tiles_end; group += 32) {
    const int mine = group + lane;
    const bool some = mine < tiles_end && !IntervalTile<C>(intervals, mine * C::kTileN).empty(m0, m1);
    const uint32_t seen = __ballot_sync(~0u, some);
    if (seen && first < 0) first = group + __ffs(seen) - 1;
    if (seen) last = group + 31 - __clz(seen);
  }
  Span span = {m0, m1, 0, 0, 0, 0};
  if (first < 0) return span;
  // and the first and last keys in those tiles
  const auto column_seen = [&](int key) {
    const Hidden hidden = intervals.at(min(key, intervals.last_key));
    return key >= begin && key < end && !hides_all(hidden, m0, m1);
  };
  span.first = first * C::kTileN, span.end = min((last + 1) * C::kTileN, end);
#pragma unroll
  for (int i = (C::kTileN - 1) / 32; i >= 0; --i) {
    const uint32_t seen = __ballot_sync(~0u, column_seen(first * C::kTileN + i * 32 + lane));
    if (seen) span.first = first * C::kTileN + i * 32 + __ffs(seen) - 1;
  }
#pragma unroll
  for (int i = 0; i <= (C::kTileN - 1) / 32; ++i) {
    const uint32_t seen = __ballot_sync(~0u, column_seen(last * C::kTileN + i * 32 + lane));
    if (seen) span.end = last * C::kTileN + i * 32 + 32 - __clz(seen);
  }
  const IntervalTiles<C> tiles(intervals, band, span);
#pragma unroll 4
  for (int group = 0; group < tiles.count; group += 32) {
    span.cut += __popc(tiles.look(group, true));
    span.whole += __popc(tiles.look(group, false));
  }
  return span;
}

// What is hidden of a tile of keys: by the band or not, and by the intervals nothing, whole rows, whole columns, or
// single cells.
enum Cut { kNothing, kRows, kColumns, kCells };

// How consumers hear it through shared memory.
struct Told {
  uint32_t place;
  uint32_t word;  // the first key, whether the band hides any of it, the cut

  static constexpr int kBytes = 48, kWord = 32;  // of a place; where the word is, behind what the cut needs

  static __device__ __forceinline__ Told hear(uint32_t place) {
    // read by the lane that gives the tile back
    return {place, __shfl_sync(~0u, threadIdx.x % 32 == 0 ? ptx::ld_shared_4(place + kWord) : 0, 0)};
  }
  __device__ __forceinline__ int key() const { return word >> 3; }
  __device__ __forceinline__ bool banded() const { return word & 4; }
  __device__ __forceinline__ Cut cut() const { return Cut(word & 3); }
  // the rows that are hidden
  __device__ __forceinline__ Hidden rows() const {
    const uint4 x = ptx::ld_shared_16(place);
    return {int(x.x), int(x.y), int(x.z), int(x.w)};
  }
  // the columns that are seen, as the accumulators of the `quad_lane`-th lane of a quad hold them: a bit for each of
  // two columns of 16 pieces of 8
  __device__ __forceinline__ uint32_t columns(int word, int quad_lane) const {
    return ptx::ld_shared_4(place + word * 16 + quad_lane * 4);
  }
};

// The producer's side: a warp finds out together, one lane says it.
template <class C>
struct Telling {
  static constexpr int kWords = (C::kTileN + 127) / 128 * 4;
  uint32_t word;
  uint32_t words[kWords];  // hidden rows, or seen columns

  __device__ __forceinline__ explicit Telling(const IntervalTiles<C>& tiles) {
    const int m0 = tiles.m0, m1 = tiles.m1;
    const IntervalTile<C> tile(tiles.intervals, tiles.key());
    Cut cut = kNothing;
    if (tile.touched(m0, m1)) {
      if (tile.same()) {
        cut = kRows;
        words[0] = tile.ls.low, words[1] = tile.le.low, words[2] = tile.us.low, words[3] = tile.ue.low;
      } else {
        cut = columns(tiles.intervals, tile.first, m0, m1) ? kColumns : kCells;
      }
    }
    word = tile.first << 3 | tile.banded(tiles.band, m0, m1) << 2 | cut;
  }

  // Which columns any of the rows sees; false if one of them is seen by some rows only.
  __device__ __forceinline__ bool columns(const Intervals<C>& intervals, int first, int m0, int m1) {
    const int lane = threadIdx.x % 32;
    bool mixed = false;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int column = (i / 4 * 16 + lane / 2) * 8 + i % 4 * 2 + lane % 2;
      const Hidden hidden = intervals.at(min(first + column, intervals.last_key));
      const bool all = hides_all(hidden, m0, m1);
      const bool any = (m0 < hidden.le && m1 > hidden.ls) || (m0 < hidden.ue && m1 > hidden.us);
      mixed |= any != all && column < C::kTileN;
      words[i] = __ballot_sync(~0u, !all);
    }
    return !__any_sync(~0u, mixed);
  }

  __device__ __forceinline__ void say(uint32_t place) const {
    const Cut cut = Cut(word & 3);
    if (cut == kRows || cut == kColumns)
      for (int i = 0; i < kWords; i += 4)
        ptx::st_shared_16(place + i * 4, make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]));
    ptx::st_shared_4(place + Told::kWord, word);
  }
};
