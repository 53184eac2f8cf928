// Intervals: the key tiles that a row tile visits, in which order. A key tile may begin at any key here: those of a row
// tile begin with the first key that it sees.
#pragma once
#include "fagen/mask/intervals.cuh"
#include "fagen/sm90/pipeline.cuh"

namespace fagen {

// One key tile against one row tile.
template <class C>
struct IntervalKeyTile {
  Extent ls, le, us, ue;  // its keys' bounds; from two tiles of the extents where it lies across them

  __device__ __forceinline__ IntervalKeyTile(const Intervals<C>& intervals, int first) {
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
  __device__ __forceinline__ bool partial(int m0, int m1) const {
    return (m0 < le.high && m1 > ls.low) || (m0 < ue.high && m1 > us.low);
  }
};

// The visited ones of 32 neighbouring key tiles, of one kind, a bit each.
struct VisitBits {
  uint32_t word;  // the first key of the 32, the kind
  uint32_t tiles;

  // partly hidden by the band, and perhaps by intervals; by intervals only; or full
  enum Kind { kBandPartial, kPartial, kFull, kKinds };

  __device__ __forceinline__ int key() const { return word >> 2; }
  __device__ __forceinline__ Kind kind() const { return Kind(word & 3); }
};

// A row tile's visits for the warps that load its key tiles: kind by kind, so that the consumers have one loop for
// partial tiles and one for full ones, and within a kind from the last to the first.
template <class C>
struct IntervalKeyWalk {
  const VisitBits* visits;
  unsigned next;  // index in `visits`
  VisitBits bits;  // the present ones: tiles still to visit
  int key;  // the present tile's first

  __device__ __forceinline__ IntervalKeyWalk(const VisitBits* visits, unsigned first)
      : visits(visits), next(first), bits{0, 0} {}

  __device__ __forceinline__ void advance() {
    while (bits.tiles == 0) bits = visits[next++];
    const int tile = 31 - __clz(bits.tiles);
    bits.tiles ^= 1u << tile;
    key = bits.key() + tile * C::kTileN;
  }
};

// Rows at which one row tile had better end and the next begin, a bit each: there the rows that whole key tiles are
// hidden from begin or end (with packed documents, a document ends).
constexpr int kMostRows = 1 << 17;  // later rows are not looked at
struct RowTileBoundaries {
  uint32_t bits[kMostRows / 32];

  // A block's work.
  template <class C>
  __device__ __forceinline__ void find(const Intervals<C>& intervals, int seqlen_q) {
    const int words = min(seqlen_q, kMostRows) / 32 + 1;
    for (int i = threadIdx.x; i < words && i < kMostRows / 32; i += blockDim.x) bits[i] = 0;
    __syncthreads();
    const int extents = (intervals.last_key + C::kTileN) / C::kTileN * C::kIntervalColumns;
    for (int i = threadIdx.x; i < extents; i += blockDim.x) {
      const Extent extent = intervals.extents[i];
      if (extent.low == extent.high && extent.low > 0 && extent.low < min(seqlen_q, kMostRows))
        atomicOr(&bits[extent.low / 32], 1u << extent.low % 32);
    }
    __syncthreads();
  }
  // A warp's work: rows of the `index`-th row tile of at most `tiles`; {0, 0} if there are fewer.
  template <int kTileM>
  __device__ __forceinline__ int2 rows(int index, int tiles, int seqlen_q) const {
    const auto count = [](int rows) { return (rows + kTileM - 1) / kTileM; };
    const int words = min(seqlen_q, kMostRows) / 32 + 1, lane = threadIdx.x % 32;
    int begin = 0, before = 0;  // the last boundary, and how many tiles end there or sooner
    for (int word = 0; word < words; word += 32) {
      const uint32_t mine = word + lane < words && word + lane < kMostRows / 32 ? bits[word + lane] : 0;
      for (uint32_t lanes = __ballot_sync(~0u, mine != 0); lanes; lanes &= lanes - 1) {
        const int from = __ffs(lanes) - 1;
        for (uint32_t left = __shfl_sync(~0u, mine, from); left; left &= left - 1) {
          const int boundary = (word + from) * 32 + __ffs(left) - 1, more = count(boundary - begin);
          if (before + more + count(seqlen_q - boundary) > tiles) continue;  // there is no room for this one
          if (index < before + more) {
            const int m0 = begin + (index - before) * kTileM;
            return make_int2(m0, min(m0 + kTileM, boundary));
          }
          begin = boundary, before += more;
        }
      }
    }
    const int m0 = begin + (index - before) * kTileM;
    return m0 < seqlen_q ? make_int2(m0, min(m0 + kTileM, seqlen_q)) : make_int2(0, 0);
  }
};

// Plan the visits of rows [m0, m1) and write their bits; a warp's work. The code is short rather than fast: it comes
// from memory each time, which takes most of the time.
template <class C>
__device__ __forceinline__ RowTileVisits plan_visits(const Intervals<C>& intervals, const Band& band, int m0, int m1,
                                                     VisitBits* bits) {
  const int lane = threadIdx.x % 32;
  const int begin = band.begin(m0), end = band.end(m1 - 1);
  const int tiles_end = (end + C::kTileN - 1) / C::kTileN;
  int first = -1, last = -1;  // tiles of the extents
#pragma unroll 1
  for (int group = begin / C::kTileN; group < tiles_end; group += 32) {
    const int mine = group + lane;
    const bool some = mine < tiles_end && !IntervalKeyTile<C>(intervals, mine * C::kTileN).empty(m0, m1);
    const uint32_t seen = __ballot_sync(~0u, some);
    if (seen && first < 0) first = group + __ffs(seen) - 1;
    if (seen) last = group + 31 - __clz(seen);
  }
  RowTileVisits visits = {m0, m1, 0, 0};
  if (first < 0) return visits;
  // and the first and last keys in those tiles, if any of theirs is seen after all
  int first_key = first * C::kTileN, last_key = min((last + 1) * C::kTileN, end) - 1;
#pragma unroll 1
  for (const bool ahead : {true, false}) {
    const int key0 = (ahead ? first : last) * C::kTileN;
    int low = INT_MAX, high = -1;
#pragma unroll
    for (int i = 0; i < C::kTileN; i += 32) {
      const int key = key0 + i + lane;
      const HiddenRows hidden = intervals.at(min(key, intervals.last_key));
      // no && before the load, or each load would wait for the one before
      const bool seen = (i + lane < C::kTileN) & (key >= begin) & (key < end) & !hidden.covers(m0, m1);
      low = min(low, seen ? key : INT_MAX), high = seen ? key : high;
    }
    low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
    if (high >= 0) (ahead ? first_key : last_key) = ahead ? low : high;
  }
  if constexpr (C::kDropout) first_key &= ~31;  // where the random numbers of neighbouring keys are made together
  // the key tiles begin with the first key; the lanes look at 32 of them at once
  constexpr int kGroup = 32 * C::kTileN;
  const int groups = (last_key - first_key) / kGroup + 1;
#pragma unroll 1
  for (int group = groups - 1; group >= 0; --group, ++bits) {
    const int key0 = first_key + group * kGroup, key = key0 + lane * C::kTileN;
    int kind = VisitBits::kKinds;
    if (key <= last_key) {
      const IntervalKeyTile<C> tile(intervals, key);
      const bool by_band = key + C::kTileN > band.end(m0) || key < band.begin(m1 - 1);
      if (!tile.empty(m0, m1))
        kind = by_band ? VisitBits::kBandPartial : tile.partial(m0, m1) ? VisitBits::kPartial : VisitBits::kFull;
    }
#pragma unroll 1
    for (int i = 0; i < VisitBits::kKinds; ++i) {
      const uint32_t tiles = __ballot_sync(~0u, kind == i);
      (i == VisitBits::kFull ? visits.full : visits.partial) += __popc(tiles);
      if (lane == 0) bits[i * groups] = {uint32_t(key0 << 2 | i), tiles};
    }
  }
  return visits;
}

}  // namespace fagen
