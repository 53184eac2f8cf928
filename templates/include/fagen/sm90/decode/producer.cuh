// The producer warps: load tiles of keys and values, page by page. Pages of a few rows are many small copies, more than
// a warp starts while a tile is computed: two warps share those of keys, two those of values.
#pragma once
#include "fagen/ptx/tma.cuh"
#include "fagen/sm90/decode/layout.cuh"
#include "fagen/sm90/key_boxes.cuh"

namespace fagen {

// Load share `share` of tile `index` of the split to the ring's next stage, once that is empty: every other box, or
// every other slab where a tile is one.
template <int kSlabs, class Ring, class C>
__device__ __forceinline__ void load_share(Ring& ring, const CUtensorMap& map, const KeyBoxes<C>& boxes, int index,
                                           int share) {
  using Boxes = KeyBoxes<C>;
  constexpr bool kByBox = Boxes::kOfTile > 1;
  const int first = boxes.first(index), end = boxes.end(index);
  const int mine = kByBox ? (end - first + 1 - share) / kLoaders * kSlabs : (kSlabs + 1 - share) / kLoaders;  // copies
  const bool leader = threadIdx.x % 32 == 0;
  if (leader) {
    ptx::mbarrier_wait(ring.empty(), ring.phase ^ 1);
    ptx::mbarrier_arrive_expect(ring.full(), mine * Boxes::kKeys * kRowBytes);
  }
  for (int box = first + (kByBox ? share : 0); box < end; box += kByBox ? kLoaders : 1) {
    const int page = boxes.page_of(index, box), row = boxes.row_of(index, box);
    if (leader)
      for (int slab = kByBox ? 0 : share; slab < kSlabs; slab += kByBox ? 1 : kLoaders)
        ptx::tma_load(ring.tile() + (slab * C::kTileN + box * Boxes::kKeys) * kRowBytes, &map, ring.full(),
                      slab * kSlabColumns, row, boxes.tile.kv_head, page);
  }
  ring.advance();
}

// The work of producer warp `warp` of the four.
template <class C>
__device__ __forceinline__ void load_keys(const fagen_decode_params& p, const CUtensorMap& k, const CUtensorMap& v,
                                          const DecodeTile<C>& tile, const DecodeSplit<C>& split, uint32_t smem,
                                          int warp) {
  using L = DecodeLayout<C>;
  KeyBoxes<C> boxes(p, tile, split.first);
  DecodeRings<C> rings(smem);
#pragma unroll 1
  for (int index = 0; index < split.end - split.first; ++index) {
    boxes.move_to(index);
    if (warp < kLoaders)
      load_share<L::kSlabs>(rings.k, k, boxes, index, warp);
    else
      load_share<L::kSlabsV>(rings.v, v, boxes, index, warp - kLoaders);
  }
}

}  // namespace fagen
