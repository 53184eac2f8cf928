#pragma once
#include <cuda.h>

namespace fagen::ptx {

// Nothing is copied, but the box must lie in the tensor: what is fetched ahead is to be read.
inline void tma_prefetch(const CUtensorMap* map, int column, int row, int head, int batch) {
  const int at[4] = {column, row, head, batch};
  if (map->rank != 4) emulator::fail("a map has another number of dimensions");
  for (int i = 0; i < 4; ++i)
    if (at[i] < 0 || uint64_t(at[i]) >= map->size[i])
      emulator::fail("a box that is fetched ahead is not in the tensor");
}

}  // namespace fagen::ptx
