// Operands of a warpgroup's products (wgmma): descriptors of tiles in shared memory, and fragments in registers.
#pragma once
#include <stdint.h>

#include "fagen/ptx/warpgroup.cuh"

namespace fagen {

// A descriptor: where the operand begins, and how it goes on from there.
struct Operand {
  uint32_t low, high;

  static constexpr uint32_t kSwizzle128 = 1u << 30, kGroupOf8Rows = 1024 >> 4;
  static constexpr uint32_t kInBlock = 0x3ffff;  // an address without the block's rank in its cluster, which is above

  // 16 elements of k lie in a row (q, k); slabs are separate operands
  static __device__ __forceinline__ Operand of_rows(uint32_t address) {
    return {(address & kInBlock) >> 4 | 1u << 16, kSwizzle128 | kGroupOf8Rows};
  }
  // columns lie in a row, 16 rows deep in k (v); slabs `slab_bytes` apart
  static __device__ __forceinline__ Operand of_columns(uint32_t address, int slab_bytes) {
    return {(address & kInBlock) >> 4 | uint32_t(slab_bytes >> 4) << 16, kSwizzle128 | kGroupOf8Rows};
  }
  // the operand that begins so many bytes later
  __device__ __forceinline__ uint64_t at(int bytes) const { return uint64_t(high) << 32 | (low + (bytes >> 4)); }
};

// Every register of a fragment stays where it is, and is written, before what follows.
template <class X, int kPieces>
__device__ __forceinline__ void pin(X (&fragment)[kPieces][4]) {
#pragma unroll
  for (int i = 0; i < kPieces * 4; ++i) ptx::pin(fragment[i / 4][i % 4]);
}

}  // namespace fagen
