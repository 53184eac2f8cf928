// Blocks that share the keys of a row tile: the walk over this block's part of them, and the store of O.
#pragma once
#include "fagen/common/split_keys.cuh"
#include "fagen/sm80/forward/epilogue.cuh"

namespace fagen {

template <class Base>
struct BandPartMask : BandMask<SplitKeys<Base>> {
  using Whole = BandMask<SplitKeys<Base>>;

  struct Walk : Whole::Walk {
    // The full tiles of the range may end before this part does, or begin after it.
    template <class Visit>
    __device__ __forceinline__ void visit_rest(const TileRange& range, Visit visit) {
      for (; this->valid() && this->tile >= range.full_end; this->advance()) visit(this->tile, Constant<true>{});
      for (; this->valid() && this->tile >= range.full_begin; this->advance()) visit(this->tile, Constant<false>{});
      if constexpr (Whole::kHasBegin)
        for (; this->valid(); this->advance()) visit(this->tile, Constant<true>{});
    }
  };

  using Whole::Whole;
  __device__ __forceinline__ Walk walk(const TileRange& range, int, int) const {
    const TileRange mine = key_parts<Base>(this->band, gridDim.y).clip(range);
    return {{mine.end - 1, mine.begin}};
  }
};

template <class Base>
struct IntervalPartMask : IntervalMask<SplitKeys<Base>> {
  using Whole = IntervalMask<SplitKeys<Base>>;
  using Whole::Whole;
  __device__ __forceinline__ typename Whole::Walk walk(const TileRange& range, int m0, int m1) const {
    return {this->intervals, key_parts<Base>(this->band, gridDim.y).clip(range), m0, m1};
  }
};

template <class Base>
struct SelectMask<SplitKeys<Base>, false> {
  using Type = BandPartMask<Base>;
};
template <class Base>
struct SelectMask<SplitKeys<Base>, true> {
  using Type = IntervalPartMask<Base>;
};

// Store this block's part of a warp's rows, or, where it is the only one, O and LSE.
template <class Base, class Element>
__device__ __forceinline__ void store_rows(const Block<SplitKeys<Base>, Element>& block,
                                           typename Block<SplitKeys<Base>, Element>::State& state, int row_tile) {
  using B = Block<SplitKeys<Base>, Element>;
  static_assert(Base::kPartition == Partition::split_q && Base::kLoopOrder == LoopOrder::q_outer,
                "a warp holds all columns of O for its rows, once");
  if (gridDim.y == 1) return store_rows<SplitKeys<Base>, Element>(block, state, row_tile);
  const StoredParts<Base> stored(block.grid.state, gridDim.x, gridDim.y);
  const int rows = block.p.seqlen_q - row_tile * Base::kTileM;
  ptx::cp_async_wait<0>();  // where the part has no keys, q may still be on its way to a block that ends
#pragma unroll
  for (int r = 0; r < B::State::kRows; ++r) {
    const int row = block.first_row + r / 2 * 16 + r % 2 * 8 + state.lane.row;
    const float sum = quad_sum(state.softmax.sum[r]);
    if (row < rows) stored.store(state, r, row, sum);
  }
}

// The second kernel.
template <class Base, class Element>
__device__ __forceinline__ void merge_row_tiles(const fagen_forward_params& p, const GridArgs& grid, int parts) {
  const MergePlace<Base> place;
  if (place.row >= Base::kTileM) return;
  const TileCoord coord = tile_at<Base::kBlockOrder>(p, place.row_tile, grid.row_tiles, grid.heads_at_once);
  const int m0 = coord.row_tile * Base::kTileM, m = m0 + place.row;
  if (m >= p.seqlen_q) return;
  const TileRange range = TileRange::of<Base::kTileN>(Band(p), m0, min(m0 + Base::kTileM, p.seqlen_q));
  const StoredParts<Base> stored(grid.state, gridDim.x / kMergeBlocks<Base>, parts);
  merge_row<Base, Element>(p, stored, place, range, coord.batch, coord.head, m);
}

}  // namespace fagen
