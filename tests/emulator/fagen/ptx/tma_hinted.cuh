#pragma once
#include "fagen/ptx/tma.cuh"

namespace fagen::ptx {

inline uint64_t evict_first() { return 0; }
inline void tma_load_hinted(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row, int head,
                            int batch, uint64_t) {
  tma_load(to, map, barrier, column, row, head, batch);
}

}  // namespace fagen::ptx
