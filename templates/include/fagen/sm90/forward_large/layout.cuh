// A block of the forward kernel for large head dims: its warpgroups, its shared memory, the chunks that pass through it.
//
// A block has 64 rows of q. Its two consumer warpgroups share each tile of keys: each computes the scores of half of the
// keys, and each adds up half of O's columns. K passes by in chunks of columns, V in chunks of keys, both through one
// ring of stages. Only q is kept whole, so that beside it nothing in shared memory grows with the head dims.
#pragma once
#include "fagen/sm90/smem_layout.cuh"

namespace fagen {

template <class C>
struct LargeLayout {
  static constexpr int kGroups = 2;  // consumer warpgroups
  static constexpr int kThreads = (kGroups + 1) * 128, kConsumers = kGroups * 128;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

  // scores: keys of a warpgroup; chunks of K, and their slabs of 64 columns
  static constexpr int kGroupKeys = C::kTileN / kGroups;
  static constexpr int kSlabs = slabs(C::kHeadDim), kChunkSlabs = C::kChunkD / kSlabColumns;
  static constexpr int kKeyChunks = kSlabs / kChunkSlabs;

  // O: columns of a warpgroup and of a block, products side by side; chunks of V, and their keys
  static constexpr int kBlockSlabs = (slabs(C::kHeadDimV) + C::kColumnSplits - 1) / C::kColumnSplits;
  static constexpr int kGroupSlabs = (kBlockSlabs + kGroups - 1) / kGroups;
  static constexpr int kGroupColumns = kGroupSlabs * kSlabColumns, kBlockColumns = kGroups * kGroupColumns;
  static constexpr int kParts = (kGroupSlabs + 3) / 4;  // a product has at most 256 columns
  static constexpr int kFirstColumns = (kGroupSlabs + kParts - 1) / kParts * kSlabColumns;
  static constexpr int kSecondColumns = kGroupColumns - kFirstColumns;
  static constexpr int kValueKeys = Derived::value_keys, kValueChunks = C::kTileN / kValueKeys;

  static constexpr int kQSlabBytes = kGroupRows * kRowBytes;
  static constexpr int kKeySlabBytes = C::kTileN * kRowBytes, kKeyBytes = kChunkSlabs * kKeySlabBytes;
  static constexpr int kValueSlabBytes = kValueKeys * kRowBytes, kValueBytes = kGroups * kGroupSlabs * kValueSlabBytes;
  static constexpr int kStageBytes = kKeyBytes > kValueBytes ? kKeyBytes : kValueBytes;
  static constexpr int kWeightSlabBytes = kGroupRows * kRowBytes;

  // Offsets, in this order: q, the stages, the weights P, the barriers of q and of the stages, a number a row from each
  // warpgroup for the other one.
  static constexpr int kStage0 = kSlabs * kQSlabBytes, kWeights = kStage0 + C::kStages * kStageBytes;
  static constexpr int kBarriers = kWeights + slabs(C::kTileN) * kWeightSlabBytes;
  static constexpr int kExchange = kBarriers + kBarrierBytes * (1 + C::kStages);
  static constexpr int kEnd = kExchange + kGroups * kGroupRows * 4;
  static constexpr int kSmemBytes = kEnd + kSmemAlignment;  // room to align

  static_assert(kKeyChunks * kChunkSlabs == kSlabs, "chunks of K are whole");
  static_assert(kValueChunks * kValueKeys == C::kTileN && kValueKeys % 16 == 0, "chunks of V are whole products");
  static_assert(C::kTileN % 32 == 0 && C::kTileN / C::kCluster % 8 == 0, "keys of a product, and of a block's part");
  static_assert(kParts <= 2 && kSecondColumns % kSlabColumns == 0, "a warpgroup has one or two products on V");
  static_assert(C::kStages >= C::kChunksAhead + 2 && C::kChunksAhead <= kKeyChunks, "stages held while V passes by");
  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
  static_assert(kConsumerRegisters == Derived::registers, "Python and CUDA disagree about the registers of a thread");
  static_assert(kGroupColumns == Derived::group_columns, "Python and CUDA disagree about the columns of O");
};

}  // namespace fagen
