// The producer warp: loads the parts of key tiles in the order in which they become free, page by page.
#pragma once
#include "fagen/ptx/mbarrier.cuh"
#include "fagen/ptx/tma.cuh"
#include "fagen/sm90/key_boxes.cuh"
#include "fagen/sm90/mla/layout.cuh"

namespace fagen {

// Load a part of tile `index` of the split, once the last pair's is read. Blocks that share keys load half of its boxes
// each, to both.
template <class C>
__device__ __forceinline__ void load_part(const KeyPart<C>& part, const CUtensorMap& map, const KeyBoxes<C>& boxes,
                                          int index, bool shared) {
  using Boxes = KeyBoxes<C>;
  const int count = boxes.end(index);  // no mask hides first keys
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
