// The visible scores of a partial key tile, a bit each of the scores that a thread holds.
#pragma once
#include "fagen/common/row_state.cuh"
#include "fagen/sm90/forward/row_tile.cuh"
#include "fagen/sm90/forward/tile_mask.cuh"

namespace fagen {

// Two bits for every piece of 8 keys, for each of the thread's two rows.
template <class C>
struct Visibility {
  static constexpr int kPieces = C::kTileN / 8, kWords = (kPieces + 15) / 16;
  uint32_t bits[2][kWords];

  __device__ __forceinline__ void show_all() {
    for (auto& row : bits)
      for (uint32_t& word : row) word = ~0u;
  }
  // The band's part: of the keys from `key` on, row m sees [begin(m), end(m)).
  __device__ __forceinline__ void set_band(const Band& band, const HeadPacking<C>& packing, int row0, int key) {
    const Lane lane;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = packing.row(row0 + r * 8 + lane.row), first = key + lane.column;
      // how many of the thread's columns lie before x
      const auto before = [&](int x) { return x <= 0 ? 0 : x / 8 * 2 + min(x % 8, 2); };
      const int begin = before(band.begin(row) - first);
      const int end = before((MaskOf<C>::kHasEnd ? band.end(row) : band.seqlen_k) - first);
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const auto ones = [&](int n) { return n <= w * 32 ? 0u : n >= w * 32 + 32 ? ~0u : (1u << (n - w * 32)) - 1u; };
        bits[r][w] = ones(end);
        if (MaskOf<C>::kHasBegin) bits[r][w] &= ~ones(begin);
      }
    }
  }
  // The intervals' part, as the tile's mask has it.
  __device__ __forceinline__ void clear_intervals(const TileMask& mask, const Intervals<C>& intervals, int row0) {
    const Lane lane;
    const Hides hides = mask.hides();
    if (hides == Hides::columns) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const uint32_t columns = mask.columns(w, lane.column / 2);
        bits[0][w] &= columns, bits[1][w] &= columns;
      }
    } else if (hides == Hides::rows) {
      const HiddenRows hidden = mask.rows();
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (hidden.contains(row0 + r * 8 + lane.row))
          for (int w = 0; w < kWords; ++w) bits[r][w] = 0;
    } else if (hides == Hides::elements) {
#pragma unroll
      for (int w = 0; w < kWords; ++w)
#pragma unroll 1
        for (int bit = 0; bit < 32 && w * 32 + bit < kPieces * 2; ++bit) {
          const int key = mask.key() + (w * 16 + bit / 2) * 8 + lane.column + bit % 2;
          const HiddenRows hidden = intervals.at(min(key, intervals.last_key));
#pragma unroll
          for (int r = 0; r < 2; ++r)
            if (hidden.contains(row0 + r * 8 + lane.row)) bits[r][w] &= ~(1u << bit);
        }
    }
    __syncwarp();  // every lane has read the mask before the first one frees a later tile
  }
  template <class Scores>
  __device__ __forceinline__ void apply(Scores& s_acc) const {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int bit = 0; bit < kPieces * 2; ++bit) {
        float& x = s_acc[0][bit / 2][r * 2 + bit % 2];
        x = bits[r][bit / 32] & 1u << bit % 32 ? x : -INFINITY;
      }
  }
};

}  // namespace fagen
