// The producer warp: loads the parts of key tiles in the order in which they become free, page by page.
#pragma once
#include "fagen/ptx/mbarrier.cuh"
#include "fagen/ptx/tma.cuh"
#include "fagen/ptx/tma_prefetch.cuh"
#include "fagen/sm90/key_boxes.cuh"
#include "fagen/sm90/mla/layout.cuh"

namespace fagen {

// The boxes of a tile that this block loads: all, or half of them where two blocks share keys.
template <class C>
struct BoxShare {
  using Boxes = KeyBoxes<C>;
  int first, end;

  __device__ __forceinline__ BoxShare(const Boxes& boxes, int index, bool shared) : first(0), end(boxes.end(index)) {
    if (shared) {
      constexpr int kHalf = Boxes::kOfTile / C::kCluster;
      first = blockIdx.x % C::kCluster * kHalf, end = min(end, first + kHalf);
    }
  }
};

// Load a part of tile `index` of the split, once the last pair's is read. Blocks that share keys load half of its boxes
// each, to both.
template <class C>
__device__ __forceinline__ void load_part(const KeyPart<C>& part, const CUtensorMap& map, const KeyBoxes<C>& boxes,
                                          int index, bool shared) {
  using Boxes = KeyBoxes<C>;
  const BoxShare<C> share(boxes, index, shared);
  int pages[Boxes::kOfTile];
#pragma unroll
  for (int box = 0; box < Boxes::kOfTile; ++box) pages[box] = boxes.page_of(index, box);
  if (threadIdx.x % 32 > 0) return;
  ptx::mbarrier_wait(part.empty(), index / 2 % 2 ^ 1);
  for (int i = 0; i < part.slabs(); ++i) {
    const int slab = part.slab(i), column = slab * kSlabColumns;
    const uint32_t to = part.tile() + slab * MlaLayout<C>::kSlabBytes;
    ptx::mbarrier_arrive_expect(part.full(slab), boxes.end(index) * Boxes::kKeys * kRowBytes);
#pragma unroll
    for (int box = 0; box < Boxes::kOfTile; ++box) {
      if (box < share.first || box >= share.end) continue;
      const int row = boxes.row_of(index, box);
      if (shared)
        ptx::tma_load_to_all(to + box * Boxes::kKeys * kRowBytes, &map, part.full(slab), column, row,
                             boxes.tile.kv_head, pages[box], (1 << C::kCluster) - 1);
      else
        ptx::tma_load(to + box * Boxes::kKeys * kRowBytes, &map, part.full(slab), column, row, boxes.tile.kv_head,
                      pages[box]);
    }
  }
}

// Start bringing a tile that comes `on` tiles later to L2.
template <class C>
__device__ __forceinline__ void prefetch_tile(const CUtensorMap& map, const KeyBoxes<C>& boxes, int index, int on,
                                              bool shared) {
  const BoxShare<C> share(boxes, index + on, shared);
  for (int box = share.first; box < share.end; ++box) {
    const int page = boxes.page_of(index, box, on), row = boxes.row_of(index + on, box);
    for (int slab = threadIdx.x % 32; slab < MlaLayout<C>::kSlabs; slab += 32)
      ptx::tma_prefetch(&map, slab * kSlabColumns, row, boxes.tile.kv_head, page);
  }
}

template <class C>
__device__ __forceinline__ void load_keys(const fagen_decode_params& p, const CUtensorMap& map,
                                          const DecodeTile<C>& tile, const DecodeSplit<C>& split, uint32_t smem,
                                          bool shared) {
  static_assert(2 * C::kPrefetch + 1 < KeyBoxes<C>::kTilesHeld, "lanes hold the pages of tiles that are fetched ahead");
  KeyBoxes<C> boxes(p, tile, split.first);
  const int tiles = split.end - split.first;
#pragma unroll 1
  for (int index = 0; index < tiles; index += 2) {
    boxes.move_to(index);
    load_part<C>({smem, 0, 0}, map, boxes, index, shared);
    for (int on = 2 * C::kPrefetch; C::kPrefetch > 0 && on < 2 * C::kPrefetch + 2 && index + on < tiles; ++on)
      prefetch_tile(map, boxes, index, on, shared);
    load_part<C>({smem, 0, 1}, map, boxes, index, shared);
    if (index + 1 == tiles) return;
    load_part<C>({smem, 1, 0}, map, boxes, index + 1, shared);
    load_part<C>({smem, 1, 1}, map, boxes, index + 1, shared);
  }
}

}  // namespace fagen
