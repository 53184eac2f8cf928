// A block of a pass: its warpgroups, its shared memory, the chunks that pass through it.
//
// A pass computes one gradient. A block owns 64 rows of it, rows of q for dQ and keys for dK and dV, and visits tiles
// of the other side. Of each it computes the cells, P for dV and dS for the others, which take whole rows of the head
// dims; and adds the cells' product with rows of the other side to its columns of the gradient. Everything passes by in
// chunks, through one ring of stages; what a block owns may stay in shared memory.
//
// Where two blocks share the columns of a gradient, each computes all cells. With shared cells they are a cluster: each
// computes those of half of the other side's rows, and gets the other half from its peer.
#pragma once
#include "fagen/simt/backward/block.cuh"
#include "fagen/sm90/smem_layout.cuh"

namespace fagen {

// The blocks of a cluster own neighbouring rows. They load each chunk of the other side together, and so all visit what
// any of them sees: walks are those of all rows that the cluster owns.
template <class C>
struct ClusterConfig : C {
  static constexpr int kTileOwn = kGroupRows * C::kCluster;
};
template <class C, Gradient kGradient>
using LargePass = PassConfig<ClusterConfig<C>, kGradient>;

template <class P>
struct PassLayout {
  static constexpr int kGroups = 2;  // consumer warpgroups: each has half of the cells, and half of the columns
  static constexpr int kThreads = (kGroups + 1) * 128, kConsumers = kGroups * 128;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr bool kOfWeights = P::kOf == Gradient::dv;  // cells are P; else dS, which takes dP = dO V

  // products of cells: chunks of q and k, and of dO and v, in slabs of 64 columns
  static constexpr int kSlabs = slabs(P::kHeadDim), kSlabsV = slabs(P::kHeadDimV), kChunkSlabs = P::kChunkD / 64;
  static constexpr int kScoreChunks = kSlabs / kChunkSlabs, kWeightChunks = kOfWeights ? 0 : kSlabsV / kChunkSlabs;
  static constexpr int kChunksUnder = kWeightChunks < P::kChunksUnder ? kWeightChunks : P::kChunksUnder;

  // the sum: columns of a block, and of a warpgroup, whose products are one or two side by side; chunks of whole rows
  static constexpr int kColumns = kOfWeights ? P::kHeadDimV : P::kHeadDim;
  static constexpr int kMostSlabs = P::kBlockColumns / kSlabColumns,
                       kSplits = (slabs(kColumns) + kMostSlabs - 1) / kMostSlabs;
  static constexpr int kGroupSlabs = ((slabs(kColumns) + kSplits - 1) / kSplits + kGroups - 1) / kGroups;
  static constexpr int kGroupColumns = kGroupSlabs * kSlabColumns, kBlockColumns = kGroups * kGroupColumns;
  static constexpr int kParts = (kGroupSlabs + 3) / 4;  // a product has at most 256 columns
  static constexpr int kFirstColumns = (kGroupSlabs + kParts - 1) / kParts * kSlabColumns;
  static constexpr int kSecondColumns = kGroupColumns - kFirstColumns;
  static constexpr int kSumRows = kOfWeights ? Derived::dv_sum_rows : Derived::sum_rows;
  static constexpr int kSumChunks = P::kTileOther / kSumRows;

  static constexpr bool kPeers = P::kShareCells && kSplits == 2;
  static constexpr int kClusterBlocks = kPeers ? 2 : P::kCluster;
  static constexpr int kBlockOther = kPeers ? P::kTileOther / 2 : P::kTileOther;  // cells of a line, a block's
  static constexpr int kGroupOther = kBlockOther / kGroups;  // and a warpgroup's
  // A warpgroup is ahead of the other by fewer chunks than there are stages: whether it may have all cells of the next
  // visit while the other still multiplies the last ones.
  static constexpr bool kMayOvertake = kScoreChunks + kWeightChunks < P::kStages;

  // bytes: of slabs, of what stays, of a stage
  static constexpr int kOwnSlabBytes = kGroupRows * kRowBytes, kOtherSlabBytes = kBlockOther * kRowBytes;
  static constexpr int kSumSlabBytes = kSumRows * kRowBytes, kCellSlabBytes = kGroupRows * kRowBytes;
  static constexpr int kOwnChunkBytes = kChunkSlabs * kOwnSlabBytes, kOtherChunkBytes = kChunkSlabs * kOtherSlabBytes;
  static constexpr bool kScoresStay = P::kResident != Resident::none;
  static constexpr bool kWeightsStay = P::kResident == Resident::both;
  static constexpr int kOwnScoreBytes = kScoresStay ? kScoreChunks * kOwnChunkBytes : 0;
  static constexpr int kOwnWeightBytes = kWeightsStay ? kWeightChunks * kOwnChunkBytes : 0;
  static constexpr int kScoreBytes = kOtherChunkBytes + (kScoresStay ? 0 : kOwnChunkBytes);
  static constexpr int kWeightBytes = kOtherChunkBytes + (kWeightsStay ? 0 : kOwnChunkBytes);
  static constexpr int kSumBytes = kGroups * kGroupSlabs * kSumSlabBytes;
  static constexpr int kPairBytes = kWeightChunks > 0 && kWeightBytes > kScoreBytes ? kWeightBytes : kScoreBytes;
  static constexpr int kStageBytes = kPairBytes > kSumBytes ? kPairBytes : kSumBytes;
  static constexpr int kCellBytes = slabs(P::kTileOther) * kCellSlabBytes;
  static constexpr int kPeerBytes = kPeers ? kCellBytes / 2 : 0;  // of the cells, a block's
  static constexpr int kStatBytes = (P::kOwnsKeys ? P::kTileOther : kGroupRows) * 8;  // of rows of q

  // Offsets, in this order: what stays of q or k, and of dO or v; the stages; the cells; the stats of rows; the
  // barriers of what stays, of the stages, of the stats and of the peer's cells.
  static constexpr int kOwnWeights = kOwnScoreBytes, kStage0 = kOwnWeights + kOwnWeightBytes;
  static constexpr int kCells = kStage0 + P::kStages * kStageBytes, kStats = kCells + kCellBytes;
  static constexpr int kBarriers = kStats + kStatBytes;
  static constexpr int kEnd = kBarriers + kBarrierBytes * (2 + P::kStages + kPeers);
  static constexpr int kSmemBytes = kEnd + kSmemAlignment;  // room to align

  static_assert(kSlabs % kChunkSlabs == 0 && kSlabsV % kChunkSlabs == 0, "chunks are whole");
  static_assert(kSumChunks * kSumRows == P::kTileOther && kSumRows % 16 == 0, "chunks of rows are whole products");
  static_assert(P::kTileOther % 32 == 0 && P::kTileOther / P::kCluster % 8 == 0,
                "rows of a product, of a block's part");
  static_assert(!kPeers || (kBlockOther % kSlabColumns == 0 && P::kCluster == 1), "cells are copied as slabs lie");
  static_assert(kParts <= 2 && kSecondColumns % kSlabColumns == 0, "a warpgroup's sum is one or two products");
  static_assert(P::kStages > P::kChunksUnder + P::kInFlight, "stages held while P is formed");
  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == (kOfWeights     ? Derived::dv_smem_bytes
                               : P::kOwnsKeys ? Derived::smem_bytes
                                              : Derived::dq_smem_bytes),
                "Python and CUDA disagree about shared memory");
  static_assert(kConsumerRegisters == Derived::registers, "Python and CUDA disagree about the registers of a thread");
};

}  // namespace fagen
