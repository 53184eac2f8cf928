// The producer warp: loads the parts of key tiles in the order in which they become free, page by page.
#pragma once
#include "fagen/ptx/mbarrier.cuh"
#include "fagen/ptx/tma.cuh"
#include "fagen/sm80/decode/place.cuh"
#include "fagen/sm90/mla/layout.cuh"

namespace fagen {

// Where the keys of a split lie. A box of the copy engine is the keys of a tile that follow each other in the cache;
// lanes hold the pages of the next boxes, and read those behind them ahead.
template <class C>
struct KeyBoxes {
  static constexpr bool kPaged = C::kPageSize > 0;
  static constexpr int kMost = C::kTileN / C::kCluster;
  static constexpr int kKeys = kPaged && C::kPageSize < kMost ? C::kPageSize : kMost;  // of a box
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
      return first < tile.end ? min(unsigned(table[unsigned(first) / C::kPageSize]), unsigned(p.pages - 1)) : 0;
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
  // How many boxes of a tile have keys that some row sees. The others are not loaded.
  __device__ __forceinline__ int count(int index) const {
    return min(kOfTile, (tile.end - key(index, 0) + kKeys - 1) / kKeys);
  }
};

// Load a part of tile `index` of the split, once the last pair's is read. Blocks that share keys load half of its boxes
// each, to both.
template <class C>
__device__ __forceinline__ void load_part(const KeyPart<C>& part, const CUtensorMap& map, const KeyBoxes<C>& boxes,
                                          int index, bool shared) {
  using Boxes = KeyBoxes<C>;
  const int count = boxes.count(index);
  const bool leader = threadIdx.x % 32 == 0;
  if (leader) {
    ptx::mbarrier_wait(part.empty(), index / 2 % 2 ^ 1);
    ptx::mbarrier_arrive_expect(part.full(), part.slabs() * count * Boxes::kKeys * kRowBytes);
  }
  for (int box = 0; box < count; ++box) {
    const int page = boxes.page_of(index, box), row = boxes.row_of(index, box);
    if (!leader || (shared && box / (Boxes::kOfTile / C::kCluster) != blockIdx.x % C::kCluster)) continue;
    for (int i = 0; i < part.slabs(); ++i) {
      const int slab = part.slab(i), column = slab * kSlabColumns;
      const uint32_t to = part.tile() + slab * MlaLayout<C>::kSlabBytes + box * Boxes::kKeys * kRowBytes;
      if (shared)
        ptx::tma_load_to_all(to, &map, part.full(), column, row, boxes.tile.kv_head, page, (1 << C::kCluster) - 1);
      else
        ptx::tma_load(to, &map, part.full(), column, row, boxes.tile.kv_head, page);
    }
  }
}

template <class C>
__device__ __forceinline__ void load_keys(const fagen_decode_params& p, const CUtensorMap& map,
                                          const DecodeTile<C>& tile, const DecodeSplit<C>& split, uint32_t smem,
                                          bool shared) {
  KeyBoxes<C> boxes(p, tile, split.first);
  const int tiles = split.end - split.first;
#pragma unroll 1
  for (int index = 0; index < tiles; index += 2) {
    boxes.move_to(index);
    const bool pair = index + 1 < tiles;
    load_part<C>({smem, 0, 0}, map, boxes, index, shared);
    if (pair) load_part<C>({smem, 1, 1}, map, boxes, index + 1, shared);
    load_part<C>({smem, 0, 1}, map, boxes, index, shared);
    if (pair) load_part<C>({smem, 1, 0}, map, boxes, index + 1, shared);
  }
}

}  // namespace fagen
