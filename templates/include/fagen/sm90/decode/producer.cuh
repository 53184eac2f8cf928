// The producer warp: loads tiles of keys and values, page by page.
#pragma once
#include "fagen/ptx/tma.cuh"
#include "fagen/sm90/decode/layout.cuh"
#include "fagen/sm90/key_boxes.cuh"

namespace fagen {

// Load tile `index` of the split to the ring's next stage, once that is empty.
template <int kSlabs, class Ring, class C>
__device__ __forceinline__ void load_tile(Ring& ring, const CUtensorMap& map, const KeyBoxes<C>& boxes, int index) {
  using Boxes = KeyBoxes<C>;
  const int first = boxes.first(index), end = boxes.end(index);
  const bool leader = threadIdx.x % 32 == 0;
  if (leader) {
    ptx::mbarrier_wait(ring.empty(), ring.phase ^ 1);
    ptx::mbarrier_arrive_expect(ring.full(), kSlabs * (end - first) * Boxes::kKeys * kRowBytes);
  }
  for (int box = first; box < end; ++box) {
    const int page = boxes.page_of(index, box), row = boxes.row_of(index, box);
    if (leader)
      for (int slab = 0; slab < kSlabs; ++slab)
        ptx::tma_load(ring.tile() + (slab * C::kTileN + box * Boxes::kKeys) * kRowBytes, &map, ring.full(),
                      slab * kSlabColumns, row, boxes.tile.kv_head, page);
  }
  ring.advance();
}

template <class C>
__device__ __forceinline__ void load_keys(const fagen_decode_params& p, const CUtensorMap& k, const CUtensorMap& v,
                                          const DecodeTile<C>& tile, const DecodeSplit<C>& split, uint32_t smem) {
  using L = DecodeLayout<C>;
  KeyBoxes<C> boxes(p, tile, split.first);
  DecodeRings<C> rings(smem);
#pragma unroll 1
  for (int index = 0; index < split.end - split.first; ++index) {
    boxes.move_to(index);
    load_tile<L::kSlabs>(rings.k, k, boxes, index);
    load_tile<L::kSlabsV>(rings.v, v, boxes, index);
  }
}

}  // namespace fagen
