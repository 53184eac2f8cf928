// The forward kernel for Hopper whose blocks share the keys of a row tile: its key tiles, and the store of O.
#pragma once
#include "fagen/common/split_keys.cuh"
#include "fagen/sm90/forward/kernel.cuh"

namespace fagen {

// Rows see the key tiles of this block's part alone.
template <class Base>
struct HeadPacking<SplitKeys<Base>> : HeadPacking<Base> {
  static_assert(Base::kSchedule == Schedule::single, "blockIdx.x is the row tile");
  static_assert(Base::kBlockOrder == BlockOrder::ascending && Base::kCluster == 1, "Python refuses others");
  static_assert(!MaskOf<Base>::kIntervals, "the visits of intervals are not split");

  using HeadPacking<Base>::HeadPacking;
  __device__ __forceinline__ TileRange range(const Band& band, int m0, int m1) const {
    return key_parts<Base>(band, gridDim.y).clip(HeadPacking<Base>::range(band, m0, m1));
  }
};

// Store this block's part of the 64 rows of a warpgroup, or, where it is the only one, O and LSE.
template <class C, class Element, class State, class Base>
__device__ __forceinline__ void store_rows(const fagen_forward_params& p, const HeadPacking<SplitKeys<Base>>& packing,
                                           State& state, const PendingTile& tile, int group, int) {
  if (gridDim.y == 1)
    return store_rows<Base, Element>(p, static_cast<const HeadPacking<Base>&>(packing), state, tile, group);
  const StoredParts<Base> stored(p.workspace, gridDim.x, gridDim.y);
  const int rows = min(packing.tile_rows(), packing.rows(p.seqlen_q) - tile.m0);
  const int first = group * kGroupRows + threadIdx.x / 32 % 4 * 16 + state.lane.row;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(state.softmax.sum[r]);
    if (first + r * 8 < rows) stored.store(state, r, first + r * 8, sum);
  }
}

// The second kernel. Row tiles of which a block's part had no key were stored as empty before; they are written anew.
template <class Base, class Element>
__device__ __forceinline__ void merge_row_tiles(const fagen_forward_params& p, const LaunchArgs& launch, int parts) {
  ptx::wait_for_previous_kernel();
  ptx::start_next_kernel();
  const MergePlace<Base> place;
  const RowTile<Base> row_tile(p, launch, Band(p), assignment_at<Base>(p, launch, place.row_tile));
  const int m = row_tile.m0 + place.row;
  if (m >= row_tile.m1) return;
  const HeadPacking<Base> packing(launch);
  const StoredParts<Base> stored(p.workspace, launch.tiles, parts);
  merge_row<Base, Element>(p, stored, place, row_tile.range, row_tile.coord.batch, packing.head(row_tile.coord.head, m),
                           packing.row(m));
}

}  // namespace fagen
