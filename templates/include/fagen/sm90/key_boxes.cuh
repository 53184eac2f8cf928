// The places of a block's keys in the cache, page by page, for the copy engine.
#pragma once
#include "fagen/sm80/decode/place.cuh"

namespace fagen {

// The boxes of the keys of a split. A box of the copy engine is the keys of a tile that follow each other in the cache;
// lanes hold the pages of the next boxes, and read those behind them ahead.
template <class C>
struct KeyBoxes {
  static constexpr bool kPaged = C::kPageSize > 0;
  static constexpr int kKeys = kPaged && C::kPageSize < C::kTileN ? C::kPageSize : C::kTileN;  // of a box
  static constexpr int kOfTile = C::kTileN / kKeys;
  static constexpr int kTilesHeld = 32 / kOfTile;
  static_assert(C::kTileN % kKeys == 0 && 32 % kOfTile == 0, "a tile is whole boxes, lanes hold whole tiles");

  const fagen_decode_params& p;
  const DecodeTile<C>& tile;
  int first_tile;  // of the split
  int held = 0, ahead;

  __device__ __forceinline__ KeyBoxes(const fagen_decode_params& p, const DecodeTile<C>& tile, int first_tile)
      : p(p), tile(tile), first_tile(first_tile), ahead(read(0)) {}

  __device__ __forceinline__ int key(int index, int box) const {
    return (first_tile + index) * C::kTileN + box * kKeys;
  }
  // No entry, and no index, leads out of the cache.
  __device__ __forceinline__ int read(int index) const {
    const int lane = threadIdx.x % 32;
    if constexpr (kPaged) {
      const int32_t* table = static_cast<const int32_t*>(p.page_table.data) + tile.batch * p.page_table.stride[0];
      const int first = key(index + lane / kOfTile, lane % kOfTile);
      const bool seen = first < tile.end && first + kKeys > tile.begin;
      return seen ? min(unsigned(table[unsigned(first) / C::kPageSize]), unsigned(p.pages - 1)) : 0;
    } else {
      return p.cache_batch_idx ? min(unsigned(p.cache_batch_idx[tile.batch]), unsigned(p.pages - 1)) : tile.batch;
    }
  }
  // Call for every tile, in order, before its pages are asked for.
  __device__ __forceinline__ void move_to(int index) {
    if (index % kTilesHeld == 0) held = ahead, ahead = read(index + kTilesHeld);
  }
  __device__ __forceinline__ int page_of(int index, int box) const {
    return __shfl_sync(~0u, held, index % kTilesHeld * kOfTile + box);
  }
  __device__ __forceinline__ int row_of(int index, int box) const {
    return kPaged ? unsigned(key(index, box)) % (kPaged ? C::kPageSize : 1) : key(index, box);
  }
  // The boxes of a tile that have keys which some row sees. The others are not loaded.
  __device__ __forceinline__ int first(int index) const { return max(0, (tile.begin - key(index, 0)) / kKeys); }
  __device__ __forceinline__ int end(int index) const {
    return min(kOfTile, (tile.end - key(index, 0) + kKeys - 1) / kKeys);
  }
};

}  // namespace fagen
