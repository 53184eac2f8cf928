// The producer warp: loads the parts of key tiles in the order in which they become free, page by page.
#pragma once
#include "fagen/ptx/mbarrier.cuh"
#include "fagen/ptx/tma.cuh"
#include "fagen/ptx/tma_hinted.cuh"
#include "fagen/sm90/key_boxes.cuh"
#include "fagen/sm90/mla/layout.cuh"

namespace fagen {

// Load a part of tile `index` of the split, once the last pair's is read. Row tiles of a sequence read the same keys at
// the same time, and nobody reads them again.
template <class C>
__device__ __forceinline__ void load_part(const KeyPart<C>& part, const CUtensorMap& map, const KeyBoxes<C>& boxes,
                                          int index) {
  using Boxes = KeyBoxes<C>;
  const int end = boxes.end(index);
  int pages[Boxes::kOfTile];
#pragma unroll
  for (int box = 0; box < Boxes::kOfTile; ++box) pages[box] = boxes.page_of(index, box);
  if (threadIdx.x % 32 > 0) return;
  const uint64_t once = ptx::evict_first();
  ptx::mbarrier_wait(part.empty(), index / 2 % 2 ^ 1);
  for (int i = 0; i < part.slabs(); ++i) {
    const int slab = part.slab(i);
    const uint32_t to = part.tile() + slab * MlaLayout<C>::kSlabBytes;
    ptx::mbarrier_arrive_expect(part.full(slab), end * Boxes::kKeys * kRowBytes);
#pragma unroll
    for (int box = 0; box < Boxes::kOfTile; ++box)
      if (box < end)
        ptx::tma_load_hinted(to + box * Boxes::kKeys * kRowBytes, &map, part.full(slab), slab * kSlabColumns,
                             boxes.row_of(index, box), boxes.tile.kv_head, pages[box], once);
  }
}

template <class C>
__device__ __forceinline__ void load_keys(const fagen_decode_params& p, const CUtensorMap& map,
                                          const DecodeTile<C>& tile, const DecodeSplit<C>& split, uint32_t smem) {
  KeyBoxes<C> boxes(p, tile, split.first);
  const int tiles = split.end - split.first;
#pragma unroll 1
  for (int index = 0; index < tiles; index += 2) {
    boxes.move_to(index);
    load_part<C>({smem, 0, 0}, map, boxes, index);
    load_part<C>({smem, 0, 1}, map, boxes, index);
    if (index + 1 == tiles) return;
    load_part<C>({smem, 1, 1}, map, boxes, index + 1);
    load_part<C>({smem, 1, 0}, map, boxes, index + 1);
  }
}

}  // namespace fagen
