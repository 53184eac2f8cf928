// The tensor map of a cache, for the copy engine.
#pragma once
#include "fagen/abi/decode.h"
#include "fagen/host/tensor_map.cuh"
#include "fagen/sm90/key_boxes.cuh"

namespace fagen {

template <class C>
static cudaError_t map_cache(CUtensorMap* map, CUtensorMapDataType type, const fagen_decode_params& p,
                             const fagen_tensor& t, int columns) {
  const Dimension dimensions[3] = {
      {p.page_size, t.stride[1], KeyBoxes<C>::kKeys}, {p.kv_heads, t.stride[2], 1}, {p.pages, t.stride[0], 1}};
  return make_map(map, type, t.data, columns, dimensions);
}

}  // namespace fagen
