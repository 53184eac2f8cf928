// A block's shared memory, threads and registers. Tiles lie in slabs of 64 columns, rows of 128 bytes, swizzled as the
// copy engine and the tensor cores both expect (128-byte swizzle).
#pragma once
#include <stdint.h>

namespace fagen {

constexpr int kSlabColumns = 64, kRowBytes = 128;       // a slab's row
constexpr int kGroupRows = 64;                          // a warpgroup's rows of q
constexpr int kBarrierBytes = 16;                       // a stage's full and its empty barrier
constexpr int kQueueStages = 2, kAssignmentBytes = 32;  // the assignment queue
constexpr int kQueueBytes = kQueueStages * (kAssignmentBytes + kBarrierBytes);
constexpr int kTileMaskBytes = 48;                      // intervals: the mask of one key tile
constexpr int kMasksPerStage = 2;                       // a mask outlives its key tile until the softmax is done
constexpr int kSmemAlignment = 1024;

constexpr int slabs(int columns) { return (columns + kSlabColumns - 1) / kSlabColumns; }

template <class C>
struct BlockLayout {
  static constexpr int kGroups = C::kTileM / kGroupRows;  // consumer warpgroups
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kSlabs = slabs(C::kHeadDim), kSlabsV = slabs(C::kHeadDimV);
  static constexpr int kQBytes = C::kTileM * kRowBytes * kSlabs;
  static constexpr int kKBytes = C::kTileN * kRowBytes * kSlabs, kVBytes = C::kTileN * kRowBytes * kSlabsV;
  static constexpr int kWeightSlabBytes = kGroupRows * kRowBytes;
  static constexpr int kWeightBytes = C::kSharedWeights ? slabs(C::kTileN) * kWeightSlabBytes : 0;

  // Offsets, in this order: tiles of q, of k, of v, each warpgroup's weights, the barriers of q, k and v, the
  // assignment queue with its own, the masks of the key tiles.
  static constexpr int kQ = 0, kK = kQ + C::kQStages * kQBytes, kV = kK + C::kStages * kKBytes;
  static constexpr int kWeights = kV + C::kStages * kVBytes, kBarriers = kWeights + kGroups * kWeightBytes;
  static constexpr int kQueue = kBarriers + kBarrierBytes * (C::kQStages + 2 * C::kStages);
  static constexpr int kTileMasks = kQueue + kQueueBytes;
  static constexpr int kEnd = kTileMasks + kMasksPerStage * kTileMaskBytes * C::kStages;
  static constexpr int kSmemBytes = kEnd + kSmemAlignment;  // room to align

  // Registers of a thread: those that the block is compiled for, and how the roles divide them.
  static constexpr int kRegisters = 65536 / (C::kBlocksPerSm * kThreads) / 8 * 8;
  static constexpr int kProducerRegisters = kGroups == 3 ? 32 : 40;
  static constexpr int kConsumerShare = ((kGroups + 1) * kRegisters - kProducerRegisters) / kGroups / 8 * 8;
  static constexpr int kConsumerRegisters = kConsumerShare > 240 ? 240 : kConsumerShare;

  static_assert(C::kTileM % 64 == 0 && C::kTileN % 16 == 0, "a warpgroup's product is 64 rows, 16 keys deep");
  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
  static_assert(kConsumerRegisters == Derived::registers, "Python and CUDA disagree about the registers of a thread");
};

}  // namespace fagen
