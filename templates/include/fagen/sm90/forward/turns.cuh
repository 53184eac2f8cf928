// Turns of the consumer warpgroups, and the key tiles that a warpgroup skips.
#pragma once
#include "fagen/ptx/barrier.cuh"
#include "fagen/ptx/warpgroup.cuh"
#include "fagen/sm90/forward/row_tile.cuh"

namespace fagen {

// With ping_pong, warpgroups take turns at starting products, so that the softmax of one runs under the products of the
// others.
template <class C>
struct Turns {
  const int group;

  __device__ __forceinline__ void wait() const {
    if constexpr (C::kPingPong) ptx::barrier_sync(1 + group, 256);
  }
  __device__ __forceinline__ void pass() const {
    constexpr int kGroups = BlockLayout<C>::kGroups;
    if constexpr (C::kPingPong) ptx::barrier_arrive(1 + (group + 1 == kGroups ? 0 : group + 1), 256);
  }
};

// A block walks over the key tiles that any of its rows sees. The last of them may be hidden from all rows of a
// warpgroup, and of the last row tile there may be no rows left for it: it skips those key tiles.
template <class C>
struct SkippedTiles {
  static constexpr bool kIdles = BlockLayout<C>::kGroups > 1;
  static constexpr bool kClips = kIdles && !MaskOf<C>::kIntervals && MaskOf<C>::kHasEnd;
  int count;

  static __device__ __forceinline__ bool idle(const RowTile<C>& row_tile, int group) {
    return kIdles && row_tile.m0 + group * kGroupRows >= row_tile.m1;
  }

  // Clip the row tile's keys to those that the warpgroup's rows see.
  __device__ __forceinline__ void clip_keys(RowTile<C>& row_tile, const Band& band, const HeadPacking<C>& packing,
                                            int group) {
    count = idle(row_tile, group) ? row_tile.key_tiles() : 0;
    if constexpr (kClips) {
      if (idle(row_tile, group)) return;
      const int first_row = row_tile.m0 + group * kGroupRows;
      const TileRange block = row_tile.range, mine = packing.range(band, first_row, first_row + kGroupRows);
      const int end = max(block.begin + 1, min(mine.end, block.end));
      row_tile.range = {block.begin, end, max(mine.full_begin, block.begin), min(mine.full_end, end)};
      count = block.end - end;
    }
  }
  // Skip them as if they were visited, the keys of one tile and the values of the one before, so that their stages
  // become empty. The first one's turn may have been used already.
  __device__ __forceinline__ void skip(const Turns<C>& turns, Pipelines<C>& pipelines, bool turn_used) const {
    if constexpr (kIdles)
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        if (i > 0 || !turn_used) {
          turns.wait();
          turns.pass();
        }
        if (i > 0) skip_values(pipelines);
        pipelines.k.wait();
        pipelines.k.release();
      }
  }
  static __device__ __forceinline__ void skip_values(Pipelines<C>& pipelines) {
    pipelines.v.wait();
    pipelines.v.release();
  }
};

}  // namespace fagen
