// A block of the forward kernel for large head dims: its warpgroups, its shared memory, the chunks that pass through
// it.
//
// Two consumer warpgroups share the work of a block, and K and V pass by in chunks, through one ring of stages: K in
// chunks of columns, V in chunks of keys. Only q is kept whole, so that beside it nothing in shared memory grows with
// the head dims.
//
//   GroupsShare::columns  64 rows of q; a warpgroup computes the scores of half of the keys, and half of O's columns
//   GroupsShare::rows     128 rows of q; a warpgroup has 64 of them to itself, with all keys and columns
//
// With shared scores the two blocks that share O's columns are a cluster: each computes the scores of half of the keys
// for all of its 128 rows, and gets the weights of the other half from its peer.
#pragma once
#include "fagen/sm90/smem_layout.cuh"

namespace fagen {

template <class C>
struct LargeLayout {
  static constexpr int kGroups = 2;  // consumer warpgroups
  static constexpr int kThreads = (kGroups + 1) * 128, kConsumers = kGroups * 128;
  static constexpr bool kRowsApart = C::kGroupsShare == GroupsShare::rows;
  static constexpr bool kPeers = C::kShareScores;  // two blocks that exchange weights
  static constexpr int kClusterBlocks = kPeers ? 2 : C::kCluster;
  static constexpr int kRows = kRowsApart ? kGroups * kGroupRows : kGroupRows;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

  // scores: keys of a warpgroup; chunks of K, and their slabs of 64 columns
  static constexpr int kBlockKeys = kPeers ? C::kTileN / 2 : C::kTileN;
  static constexpr int kGroupKeys = kRowsApart ? kBlockKeys : kBlockKeys / kGroups;
  static constexpr int kSlabs = slabs(C::kHeadDim), kChunkSlabs = C::kChunkD / kSlabColumns;
  static constexpr int kKeyChunks = kSlabs / kChunkSlabs;

  // O: columns of a warpgroup and of a block, products side by side; chunks of V, and their keys
  static constexpr int kBlockSlabs = (slabs(C::kHeadDimV) + C::kOutputSplits - 1) / C::kOutputSplits;
  static constexpr int kGroupSlabs = kRowsApart ? kBlockSlabs : (kBlockSlabs + kGroups - 1) / kGroups;
  static constexpr int kValueSlabs = kRowsApart ? kGroupSlabs : kGroups * kGroupSlabs;  // of a block
  static constexpr int kGroupColumns = kGroupSlabs * kSlabColumns, kBlockColumns = kValueSlabs * kSlabColumns;
  static constexpr int kParts = (kGroupSlabs + 3) / 4;  // a product has at most 256 columns
  static constexpr int kFirstColumns = (kGroupSlabs + kParts - 1) / kParts * kSlabColumns;
  static constexpr int kSecondColumns = kGroupColumns - kFirstColumns;
  static constexpr int kValueKeys = Derived::value_keys, kValueChunks = C::kTileN / kValueKeys;

  static constexpr int kQSlabBytes = kRows * kRowBytes;
  static constexpr int kKeySlabBytes = kBlockKeys * kRowBytes, kKeyBytes = kChunkSlabs * kKeySlabBytes;
  static constexpr int kValueSlabBytes = kValueKeys * kRowBytes, kValueBytes = kValueSlabs * kValueSlabBytes;
  static constexpr int kStageBytes = kKeyBytes > kValueBytes ? kKeyBytes : kValueBytes;
  static constexpr int kWeightSlabBytes = kGroupRows * kRowBytes;
  static constexpr int kWeightBytes = slabs(C::kTileN) * kWeightSlabBytes;  // of 64 rows

  // Offsets, in this order: q, the stages, the weights P, the barriers of q and of the stages, each warp's barriers of
  // what comes from the peer, a number a row from each warpgroup for the other one, or from the peer's.
  static constexpr int kStage0 = kSlabs * kQSlabBytes, kWeights = kStage0 + C::kStages * kStageBytes;
  static constexpr int kBarriers = kWeights + kRows / kGroupRows * kWeightBytes;
  static constexpr int kPeerBarriers = kBarriers + kBarrierBytes * (1 + C::kStages);
  static constexpr int kExchange = kPeerBarriers + (kPeers ? kConsumers / 32 * kBarrierBytes : 0);
  static constexpr int kEnd = kExchange + kGroups * kGroupRows * 4;
  static constexpr int kSmemBytes = kEnd + kSmemAlignment;  // room to align

  static_assert(kKeyChunks * kChunkSlabs == kSlabs, "chunks of K are whole");
  static_assert(kValueChunks * kValueKeys == C::kTileN && kValueKeys % 16 == 0, "chunks of V are whole products");
  static_assert(C::kTileN % 32 == 0 && C::kTileN / C::kCluster % 8 == 0, "keys of a product, and of a block's part");
  static_assert(!kPeers || (kRowsApart && C::kOutputSplits == 2 && C::kCluster == 1),
                "two blocks have 128 rows together");
  static_assert(!kPeers || C::kTileN == 2 * kSlabColumns, "a block's weights are a slab, which is copied as it lies");
  static_assert(kParts <= 2 && kSecondColumns % kSlabColumns == 0, "a warpgroup has one or two products on V");
  static_assert(C::kStages > C::kChunksAhead + C::kInFlight, "stages held while V passes by");
  static_assert(C::kChunksAhead <= kKeyChunks, "chunks of the next K alone");
  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
  static_assert(kConsumerRegisters == Derived::registers, "Python and CUDA disagree about the registers of a thread");
  static_assert(kGroupColumns == Derived::group_columns, "Python and CUDA disagree about the columns of O");
};

}  // namespace fagen
