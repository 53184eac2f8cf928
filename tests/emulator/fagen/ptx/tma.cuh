#pragma once
#include <cuda.h>

#include "fagen/ptx/mbarrier.cuh"

namespace emulator {

// A box from global memory to the same place of some blocks, at some later moment; their barriers learn of its bytes.
inline void copy(uint32_t to, const CUtensorMap* map, uint32_t barrier_address, const std::vector<int>& begin,
                 unsigned blocks) {
  Team* team = now->block->team;
  const unsigned mask = blocks ? blocks : 1u << now->block->rank;
  const CUtensorMap m = *map;
  if (int(begin.size()) != m.rank) fail("a map has another number of dimensions");
  if (to % 128) fail("a copy goes to a place that is not aligned");
  uint32_t rows = 1;
  for (int i = 1; i < m.rank; ++i) rows *= m.box[i];
  for (unsigned rank = 0; rank < team->blocks.size(); ++rank)
    if (mask >> rank & 1) {
      Block* block = team->blocks[rank].get();
      Barrier* told = &barrier(barrier_address, block);
      block->at(to, 16), block->at(to + rows * 128 - 16, 16);
      team->copies.push_back([=] {
        for (uint32_t row = 0; row < rows; ++row) {
          const unsigned char* from = m.base;
          bool inside = true;
          uint32_t rest = row;
          for (int i = 1; i < m.rank; ++i) {
            const int64_t index = begin[i] + int64_t(rest % m.box[i]);
            rest /= m.box[i];
            inside &= index >= 0 && uint64_t(index) < m.size[i];
            if (inside) from += index * m.stride[i];
          }
          for (uint32_t column = 0; column < m.box[0]; ++column) {
            const int64_t index = begin[0] + int64_t(column);
            uint16_t element = 0;
            if (inside && index >= 0 && uint64_t(index) < m.size[0]) memcpy(&element, from + index * 2, 2);
            memcpy(block->shared.data() + offset_of(swizzled(to + row * 128 + column * 2)), &element, 2);
          }
        }
        told->bytes -= int64_t(rows) * m.box[0] * 2;
        told->settle();
      });
    }
}

}  // namespace emulator

namespace ptx {

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

}  // namespace ptx
