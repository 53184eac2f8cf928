// The sizes of a decode block: a warp's share of a tile, shared memory.
#pragma once
#include "fagen/common/warp_products.cuh"
#include "fagen/sm80/smem_tile.cuh"

namespace fagen {

// A config as the shared headers ask for it. A step of an fp8 product takes 32 columns.
template <class Base>
struct DecodeConfig : Base {
  static constexpr int kStep = Base::kFp8Cache ? 32 : 16;
  static constexpr int kHeadDim = (Base::kHeadDim + kStep - 1) / kStep * kStep;
  static constexpr int kHeadDimV = (Base::kHeadDimV + kStep - 1) / kStep * kStep;
  static constexpr int kIntervalColumns = 0;
  static constexpr bool kAlibi = false, kDropout = false;
  static constexpr bool kCompact = false;  // blocks of packed rows: of every tile that there may be
  static constexpr bool kMergesInCluster = Base::kMergedBy == MergedBy::cluster;
  static constexpr bool kMergesInLastBlock = Base::kMergedBy == MergedBy::last_block;
};

// The rows of a tile are query tokens x heads of a group. The warps split its keys: each has its own ring of stages,
// and O, maxima and sums of its own (keys); or they share one ring, each has all keys' weights and some columns of O
// (columns). In both a warp copies the same kWarpKeys keys of a tile and computes their scores.
template <class C>
struct DecodeShape {
  static constexpr bool kSplitColumns = C::kPartition == Partition::columns;
  static constexpr int kThreads = C::kWarps * 32;
  static constexpr int kSlabs = C::kTileM / 16;
  static constexpr int kWarpKeys = C::kTileN / C::kWarps;
  static constexpr int kWarpColumns = kSplitColumns ? C::kHeadDimV / C::kWarps : C::kHeadDimV;
  static constexpr int kItemBytes = C::kFp8Cache ? 1 : 2;  // of an element of the cache
  static_assert(C::kTileM % 16 == 0 && kWarpKeys % 16 == 0 && kWarpColumns % C::kStep == 0,
                "a warp's share is made of whole products");

  static constexpr int kRingRows = kSplitColumns ? C::kTileN : kWarpKeys;
  static constexpr int kRings = kSplitColumns ? 1 : C::kWarps;
  using TileQ = SmemTile<C::kTileM, C::kHeadDim, true>;
  using TileK = SmemTile<kRingRows, C::kHeadDim * kItemBytes / 2, true>;  // columns in units of 16 bits
  // v: the first columns of the tile of k, or a tile of its own
  using TileV = SmemTile<kRingRows, (C::kSharedKv ? C::kHeadDim : C::kHeadDimV) * kItemBytes / 2, true>;
  using TileP = SmemTile<C::kTileM, C::kTileN, true>;

  static constexpr int kValues = C::kSharedKv ? 0 : TileK::kBytes;  // of a stage
  static constexpr int kStageBytes = kValues + TileV::kBytes;
  static constexpr int kRingBytes = C::kStages * kStageBytes;
  static constexpr int kRingsBegin = TileQ::kBytes;
  static constexpr int kRingsEnd = kRingsBegin + kRings * kRingBytes;
  // columns: the weights of a tile, and each warp's row maxima
  static constexpr int kMaxima = kRingsEnd + (kSplitColumns ? TileP::kBytes : 0);
  static constexpr int kLoopBytes = kMaxima + (kSplitColumns ? C::kWarps * C::kTileM * 4 : 0);

  // After the loop, over all of it: parts of O in float32, then (warp, row): reference, sum. The part of the block
  // takes the place of the first.
  static constexpr int kParts = kSplitColumns ? 1 : C::kWarps;
  static constexpr int kPartPitch = C::kHeadDimV + 8;  // floats; rows fall into different banks
  static constexpr int kPartFloats = C::kTileM * kPartPitch;
  static constexpr int kStats = kParts * kPartFloats * 4;
  static constexpr int kOwnStats = kStats + C::kWarps * C::kTileM * 8;  // of the block's part, for its cluster
  static constexpr int kMergeBytes = kOwnStats + (C::kMergedBy == MergedBy::cluster ? C::kTileM * 8 : 0);
  static constexpr int kSmemBytes = kLoopBytes > kMergeBytes ? kLoopBytes : kMergeBytes;

  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
};

}  // namespace fagen
