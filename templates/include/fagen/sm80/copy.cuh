// Tiles from global to shared memory, copied by all threads of a block together.
#pragma once
#include <stdint.h>

#include "fagen/ptx/cp_async.cuh"

namespace fagen {

// A matrix in global memory whose rows are `stride` elements apart; rows and columns outside read as zero.
template <class Element>
struct GlobalMatrix {
  const Element* base;
  int64_t stride;
  int rows, cols;  // a tile may be wider
};

template <class Element>
__device__ __forceinline__ uint4 gather_chunk(const Element* from, int count) {
  union {
    Element e[8];
    uint4 all;
  } chunk;
  chunk.all = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) chunk.e[i] = from[i];
  return chunk.all;
}

// Start copying tile rows [first, first + kRows) to shared memory; complete after cp_async_wait and a barrier.
template <class Tile, int kRows, int kThreads, bool kAligned, class Element>
__device__ __forceinline__ void load_tile(uint32_t to, const GlobalMatrix<Element>& from, int first, int thread) {
  constexpr int kChunks = Tile::kChunks;
  constexpr int kCount = kRows * kChunks;
  constexpr bool kSameColumn = kThreads % kChunks == 0;  // each thread stays in one column of chunks
  constexpr int kRowStep = kSameColumn ? kThreads / kChunks : 0;
  if constexpr (kSameColumn && kAligned) {
    const int chunk = thread % kChunks;
    const bool in_columns = chunk * 8 < from.cols;
    int row = thread / kChunks;
    const Element* source = from.base + (first + row) * from.stride + chunk * 8;
#pragma unroll
    for (int i = 0; i < (kRows + kRowStep - 1) / kRowStep; ++i) {
      if (kRows % kRowStep == 0 || row < kRows)
        ptx::cp_async_16(to + Tile::offset(row, chunk), source, in_columns && first + row < from.rows);
      row += kRowStep;
      source += kRowStep * from.stride;
    }
  } else {
#pragma unroll 4
    for (int i = thread; i < kCount; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const bool there = first + row < from.rows && chunk * 8 < from.cols;
      const Element* source = from.base + (there ? (first + row) * from.stride + chunk * 8 : 0);
      const uint32_t at = to + Tile::offset(row, chunk);
      if constexpr (kAligned)
        ptx::cp_async_16(at, source, there);
      else
        ptx::st_shared_16(at, gather_chunk(source, there ? from.cols - chunk * 8 : 0));
    }
  }
}

}  // namespace fagen
