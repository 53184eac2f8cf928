// FlashMask's intervals: which tiles of keys a tile of rows sees, in which order it visits them, and what consumers are
// told of each. Here a tile of keys may begin anywhere: a tile of rows begins with the first key it sees.
#pragma once
#include "fagen/mask.cuh"
#include "fagen/sm90/layout.cuh"

// A key is hidden from all of rows [m0, m1), by one of its two intervals.
__device__ __forceinline__ bool hides_all(const Hidden& hidden, int m0, int m1) {
  return (m0 >= hidden.ls && m1 <= hidden.le) || (m0 >= hidden.us && m1 <= hidden.ue);
}

__device__ __forceinline__ bool alike(const Hidden& a, const Hidden& b) {
  return a.ls == b.ls && a.le == b.le && a.us == b.us && a.ue == b.ue;
}

// One tile of keys against one of rows.
template <class C>
struct IntervalTile {
  Extent ls, le, us, ue;  // of its keys' bounds; from two tiles of the extents where it lies across them

  __device__ __forceinline__ IntervalTile(const Intervals<C>& intervals, int first) {
    const int tile = first / C::kTileN, next = min((first + C::kTileN - 1) / C::kTileN, intervals.last_key / C::kTileN);
    const auto both = [](Extent a, Extent b) { return Extent{min(a.low, b.low), max(a.high, b.high)}; };
    ls = both(intervals.template extent<C::kLTS>(tile, kFar), intervals.template extent<C::kLTS>(next, kFar));
    le = both(intervals.template extent<C::kLTE>(tile, kFar), intervals.template extent<C::kLTE>(next, kFar));
    us = both(intervals.template extent<C::kUTS>(tile, -kFar), intervals.template extent<C::kUTS>(next, -kFar));
    ue = both(intervals.template extent<C::kUTE>(tile, -kFar), intervals.template extent<C::kUTE>(next, -kFar));
  }
  // all is hidden from rows [m0, m1); or any may be
  __device__ __forceinline__ bool empty(int m0, int m1) const {
    return (m0 >= ls.high && m1 <= le.low) || (m0 >= us.high && m1 <= ue.low);
  }
  __device__ __forceinline__ bool touched(int m0, int m1) const {
    return (m0 < le.high && m1 > ls.low) || (m0 < ue.high && m1 > us.low);
  }
};

// A part of a walk: of 32 neighbouring tiles of keys those of a kind, a bit each. A tile is cut by the band, at least;
// by intervals only; or whole.
struct Part {
  uint32_t word;  // the first key of the 32, the kind
  uint32_t tiles;

  enum Kind { kBanded, kCut, kWhole, kKinds };

  __device__ __forceinline__ int key() const { return word >> 2; }
  __device__ __forceinline__ Kind kind() const { return Kind(word & 3); }
};

// The tiles of keys that a tile of rows sees, kind by kind, so that the consumers have a loop for the cut ones and one
// for the whole ones; those of a kind from the last to the first.
template <class C>
struct IntervalTiles {
  const Part* parts;
  unsigned next;  // of them
  Part part;  // the present one, and which tiles of it are still to visit
  int key;  // the present tile's first

  __device__ __forceinline__ IntervalTiles(const Part* parts, unsigned first) : parts(parts), next(first), part{0, 0} {}

  __device__ __forceinline__ void advance() {
    while (part.tiles == 0) part = parts[next++];
    const int tile = 31 - __clz(part.tiles);
    part.tiles ^= 1u << tile;
    key = part.key() + tile * C::kTileN;
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

// A warp finds out what rows [m0, m1) see, and writes down their walk. The code is short rather than fast: it comes
// from memory each time, and that is what most of the time goes to.
template <class C>
__device__ __forceinline__ Span find_span(const Intervals<C>& intervals, const Band& band, int m0, int m1,
                                          Part* parts) {
  const int lane = threadIdx.x % 32;
  const int begin = band.begin(m0), end = band.end(m1 - 1);
  const int tiles_end = (end + C::kTileN - 1) / C::kTileN;
  int first = -1, last = -1;  // tiles of the extents
#pragma unroll 1
  for (int group = begin / C::kTileN; group < tiles_end; group += 32) {
    const int mine = group + lane;
    const bool some = mine < tiles_end && !IntervalTile<C>(intervals, mine * C::kTileN).empty(m0, m1);
    const uint32_t seen = __ballot_sync(~0u, some);
    if (seen && first < 0) first = group + __ffs(seen) - 1;
    if (seen) last = group + 31 - __clz(seen);
  }
  Span span = {m0, m1, 0, 0};
  if (first < 0) return span;
  // and the first and last keys in those tiles, if any of theirs is seen after all
  int first_key = first * C::kTileN, last_key = min((last + 1) * C::kTileN, end) - 1;
#pragma unroll 1
  for (const bool ahead : {true, false}) {
    const int key0 = (ahead ? first : last) * C::kTileN;
    int low = INT_MAX, high = -1;
#pragma unroll
    for (int i = 0; i < C::kTileN; i += 32) {
      const int key = key0 + i + lane;
      const Hidden hidden = intervals.at(min(key, intervals.last_key));
      // no && before the load, or each load would wait for the one before
      const bool seen = (i + lane < C::kTileN) & (key >= begin) & (key < end) & !hides_all(hidden, m0, m1);
      low = min(low, seen ? key : INT_MAX), high = seen ? key : high;
    }
    low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
    if (high >= 0) (ahead ? first_key : last_key) = ahead ? low : high;
  }
  // the walk's tiles begin with the first key; the lanes look at 32 of them at once
  constexpr int kGroup = 32 * C::kTileN;
  const int groups = (last_key - first_key) / kGroup + 1;
#pragma unroll 1
  for (int group = groups - 1; group >= 0; --group, ++parts) {
    const int key0 = first_key + group * kGroup, key = key0 + lane * C::kTileN;
    int kind = Part::kKinds;
    if (key <= last_key) {
      const IntervalTile<C> tile(intervals, key);
      const bool banded = key + C::kTileN > band.end(m0) || key < band.begin(m1 - 1);
      if (!tile.empty(m0, m1)) kind = banded ? Part::kBanded : tile.touched(m0, m1) ? Part::kCut : Part::kWhole;
    }
#pragma unroll 1
    for (int i = 0; i < Part::kKinds; ++i) {
      const uint32_t tiles = __ballot_sync(~0u, kind == i);
      (i == Part::kWhole ? span.whole : span.cut) += __popc(tiles);
      if (lane == 0) parts[i * groups] = {uint32_t(key0 << 2 | i), tiles};
    }
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
  __device__ __forceinline__ bool hides_nothing() const { return (word & 7) == kNothing; }
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

// The other side: a warp finds out together, one lane says it.
template <class C>
struct Telling {
  static constexpr int kWords = (C::kTileN + 127) / 128 * 4;
  uint32_t word;
  uint32_t mine;  // of the words that the cut needs, hidden rows or seen columns, one a lane

  // Of the tile of keys from `key` on.
  __device__ __forceinline__ Telling(const Intervals<C>& intervals, int m0, int m1, int key, Part::Kind kind)
      : word(key << 3), mine(0) {
    if (kind == Part::kWhole) return;
    word |= find(intervals, m0, m1, key) | (kind == Part::kBanded ? 4 : 0);
  }

  // A column is hidden from all rows, from some, or from none. Those that are hidden from some must all have the same
  // bounds, or the consumers look for themselves. Nothing may be hidden at all: the walk knows extents only.
  __device__ __forceinline__ Cut find(const Intervals<C>& intervals, int m0, int m1, int key) {
    const int lane = threadIdx.x % 32, lane_column = lane / 2 * 8 + lane % 2;
    const Hidden first = intervals.at(key);
    enum { kSome = 1, kMixed = 2, kDiffer = 4 };
    unsigned found = 0;
#pragma unroll 1
    for (int i = 0; i < kWords; ++i) {
      const int column = i / 4 * 128 + i % 4 * 2 + lane_column;
      const Hidden hidden = intervals.at(min(key + column, intervals.last_key));
      const bool all = hides_all(hidden, m0, m1);
      const bool any = (m0 < hidden.le && m1 > hidden.ls) || (m0 < hidden.ue && m1 > hidden.us);
      if (column < C::kTileN)
        found |= (any ? kSome : 0) | (any != all ? kMixed : 0) | (alike(hidden, first) ? 0 : kDiffer);
      const uint32_t seen = __ballot_sync(~0u, !all);
      mine = lane == i ? seen : mine;
    }
    found = __reduce_or_sync(~0u, found);
    if (!(found & kSome)) return kNothing;
    if (!(found & kMixed)) return kColumns;
    if (found & kDiffer) return kCells;
    mine = lane == 0 ? first.ls : lane == 1 ? first.le : lane == 2 ? first.us : first.ue;
    return kRows;
  }

  __device__ __forceinline__ void say(uint32_t place) const {
    const bool speaks = threadIdx.x % 32 == 0;
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const auto of = [&](int lane) { return __shfl_sync(~0u, mine, i + lane); };
      const uint4 four = make_uint4(of(0), of(1), of(2), of(3));
      if (speaks) ptx::st_shared_16(place + i * 4, four);
    }
    if (speaks) ptx::st_shared_4(place + Told::kWord, word);
  }
};
