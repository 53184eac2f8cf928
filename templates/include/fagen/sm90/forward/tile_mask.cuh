// Intervals: the mask of one key tile in shared memory. A producer warp writes it, consumers read it.
#pragma once
#include "fagen/sm90/forward/visits.cuh"

namespace fagen {

// Hidden by the intervals: nothing, whole rows, whole columns, or single elements.
enum class Hides { nothing, rows, columns, elements };

// The consumers' side.
struct TileMask {
  uint32_t place;
  uint32_t word;  // the first key, whether the band hides any of it, what the intervals hide

  static constexpr int kWord = 32;  // its offset, behind the hidden rows or the visible columns

  static __device__ __forceinline__ TileMask load(uint32_t place) {
    // read by the lane that frees the key tile
    return {place, __shfl_sync(~0u, threadIdx.x % 32 == 0 ? ptx::ld_shared_4(place + kWord) : 0, 0)};
  }
  __device__ __forceinline__ int key() const { return word >> 3; }
  __device__ __forceinline__ bool by_band() const { return word & 4; }
  __device__ __forceinline__ bool hides_nothing() const { return (word & 7) == unsigned(Hides::nothing); }
  __device__ __forceinline__ Hides hides() const { return Hides(word & 3); }
  // the rows that are hidden
  __device__ __forceinline__ HiddenRows rows() const {
    const uint4 x = ptx::ld_shared_16(place);
    return {int(x.x), int(x.y), int(x.z), int(x.w)};
  }
  // the columns that are visible, as the accumulators of the `quad_lane`-th lane of a quad hold them: a bit for each of
  // two columns of 16 pieces of 8
  __device__ __forceinline__ uint32_t columns(int word, int quad_lane) const {
    return ptx::ld_shared_4(place + word * 16 + quad_lane * 4);
  }
};

// The producer's side: a warp finds the mask together, one lane stores it.
template <class C>
struct TileMaskWriter {
  static constexpr int kWords = (C::kTileN + 127) / 128 * 4;
  static_assert(kWords * 4 <= TileMask::kWord && TileMask::kWord + 4 <= kTileMaskBytes, "a mask fits its place");
  uint32_t word;
  uint32_t mine;  // one a lane of the hidden rows, or of the words of visible columns

  // The mask of the key tile that begins at `key`.
  __device__ __forceinline__ TileMaskWriter(const Intervals<C>& intervals, int m0, int m1, int key,
                                            VisitBits::Kind kind)
      : word(key << 3), mine(0) {
    if (kind == VisitBits::kFull) return;
    word |= unsigned(find(intervals, m0, m1, key)) | (kind == VisitBits::kBandPartial ? 4 : 0);
  }

  // A column is hidden from all rows, from some, or from none. Those that are hidden from some must all have the same
  // bounds, or the consumers read the intervals themselves. Perhaps nothing is hidden: visits are planned by extents.
  __device__ __forceinline__ Hides find(const Intervals<C>& intervals, int m0, int m1, int key) {
    const int lane = threadIdx.x % 32, lane_column = lane / 2 * 8 + lane % 2;
    const HiddenRows first = intervals.at(key);
    enum { kSome = 1, kMixed = 2, kDiffer = 4 };
    unsigned found = 0;
#pragma unroll 1
    for (int i = 0; i < kWords; ++i) {
      const int column = i / 4 * 128 + i % 4 * 2 + lane_column;
      const HiddenRows hidden = intervals.at(min(key + column, intervals.last_key));
      const bool all = hidden.covers(m0, m1);
      const bool any = (m0 < hidden.le && m1 > hidden.ls) || (m0 < hidden.ue && m1 > hidden.us);
      if (column < C::kTileN)
        found |= (any ? kSome : 0) | (any != all ? kMixed : 0) | (hidden.equals(first) ? 0 : kDiffer);
      const uint32_t seen = __ballot_sync(~0u, !all);
      mine = lane == i ? seen : mine;
    }
    found = __reduce_or_sync(~0u, found);
    if (!(found & kSome)) return Hides::nothing;
    if (!(found & kMixed)) return Hides::columns;
    if (found & kDiffer) return Hides::elements;
    mine = lane == 0 ? first.ls : lane == 1 ? first.le : lane == 2 ? first.us : first.ue;
    return Hides::rows;
  }

  __device__ __forceinline__ void store(uint32_t place) const {
    const bool stores = threadIdx.x % 32 == 0;
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const auto word_of = [&](int lane) { return __shfl_sync(~0u, mine, i + lane); };
      const uint4 four = make_uint4(word_of(0), word_of(1), word_of(2), word_of(3));
      if (stores) ptx::st_shared_16(place + i * 4, four);
    }
    if (stores) ptx::st_shared_4(place + TileMask::kWord, word);
  }
};

}  // namespace fagen
