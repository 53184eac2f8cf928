// How the tiles of a block lie in shared memory: columns in slabs of 64, rows of 128 bytes, exchanged as the copy
// engine and the tensor cores both expect (128-byte swizzle).
#pragma once
#include "fagen/attend.cuh"
#include "fagen/schedule.cuh"
#include "fagen/walk.cuh"

constexpr int larger(int a, int b) { return a > b ? a : b; }

struct True {
  static constexpr bool value = true;
};
struct False {
  static constexpr bool value = false;
};

template <class C>
struct Shape {
  static constexpr int kGroups = C::kTileM / 64;  // warpgroups that compute, each 64 rows of q
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kSlabs = (C::kHeadDim + 63) / 64, kSlabsV = (C::kHeadDimV + 63) / 64;
  static constexpr int kQBytes = C::kTileM * 128 * larger(kSlabs, kSlabsV);  // O leaves through the same place
  static constexpr int kKBytes = C::kTileN * 128 * kSlabs, kVBytes = C::kTileN * 128 * kSlabsV;
  static constexpr int kK = kQBytes, kV = kK + C::kStages * kKBytes, kBarriers = kV + C::kStages * kVBytes;
  static constexpr int kSmemBytes = kBarriers + 8 * (1 + 4 * C::kStages) + 1024;  // and room to align the start

  // Registers of a thread: what the block is compiled for, and how the roles divide them.
  static constexpr int kProducerRegisters = kGroups == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kGroups == 1 ? 232 : kGroups == 2 ? 240 : 160;
  static constexpr int kBlocksPerSm = kGroups == 1 ? 2 : 1;

  static_assert(C::kTileM % 64 == 0 && C::kTileN % 16 == 0, "a warpgroup's product is 64 rows, 16 keys deep");
  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
};

// Descriptor of a wgmma operand whose 16 elements of k lie in a row (q, k); slabs are separate operands.
__device__ __forceinline__ uint64_t rows_operand(uint32_t address) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kGroupOf8Rows = uint64_t(1024 >> 4) << 32, kUnused = 1ull << 16;
  return kSwizzle128 | kGroupOf8Rows | kUnused | ((address & 0x3ffff) >> 4);
}
// And of one whose columns lie in a row, 16 rows deep in k (v): slabs `slab_bytes` apart.
__device__ __forceinline__ uint64_t columns_operand(uint32_t address, int slab_bytes) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kGroupOf8Rows = uint64_t(1024 >> 4) << 32;
  return kSwizzle128 | kGroupOf8Rows | uint64_t(slab_bytes >> 4) << 16 | ((address & 0x3ffff) >> 4);
}

// A ring of stages with a full and an empty barrier each; producer and consumers each step through it on their own.
struct Ring {
  uint32_t full, empty;  // of stage 0
  int stage = 0, phase = 0;

  template <int kStages>
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
  __device__ __forceinline__ uint32_t full_barrier() const { return full + stage * 8; }
  __device__ __forceinline__ uint32_t empty_barrier() const { return empty + stage * 8; }
};
