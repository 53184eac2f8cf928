#pragma once
#include <cuda.h>

#include "fagen/ptx/mbarrier.cuh"

namespace fagen::ptx {

inline void prefetch_map(const CUtensorMap*) {}
inline void tma_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row, int head, int batch) {
  emulator::copy(to, map, barrier, {column, row, head, batch}, 0);
}
inline void tma_load_to_all(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row, int head,
                            int batch, uint16_t blocks) {
  emulator::copy(to, map, barrier, {column, row, head, batch}, blocks);
}
inline void tma_load_packed(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row, int head,
                            int batch) {
  emulator::copy(to, map, barrier, {column, 0, row, head, batch}, 0);
}

}  // namespace fagen::ptx
