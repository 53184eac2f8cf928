// Sizes that follow from the config; Python derives the same ones, and the asserts below hold the two together.
#pragma once
#include "fagen/mask/intervals.cuh"
#include "fagen/simt/thread_grid.cuh"

namespace fagen {

// Shared memory holds, in floats: q (unless it is loaded anew with every chunk of K), the stages, the weights P, and
// two numbers a row. A stage holds a chunk of K, kChunkD columns of all keys of a tile, or one of V, kChunkKeys whole
// rows. Rows that a warp reads side by side are 4 floats longer than a multiple of 32 bytes, so that they lie in other
// banks.
template <class C>
struct ForwardShape {
  static constexpr int kThreads = C::kWarps * 32;
  using ScoreGrid = ThreadGrid<kThreads, C::kTileM, C::kScoreRows>;    // over rows and keys, for S
  using OutputGrid = ThreadGrid<kThreads, C::kTileM, C::kOutputRows>;  // over rows and columns of v, for O
  static constexpr int kScoreKeys = C::kTileN / ScoreGrid::kLanes;     // keys of a thread
  static constexpr int kQuadStep = 4 * OutputGrid::kLanes;  // columns from a thread's four to its next four
  static constexpr int kQuads = (C::kHeadDimV + kQuadStep - 1) / kQuadStep;

  static constexpr int kKeyChunks = (C::kHeadDim + C::kChunkD - 1) / C::kChunkD;
  static constexpr int kValueChunks = C::kTileN / C::kChunkKeys;
  static constexpr bool kQStreamed = C::kQSource == QSource::streamed;

  static constexpr int kStrideK = C::kChunkD + 4;
  static constexpr int kStrideQ = kQStreamed ? kStrideK : C::kHeadDim + 4;
  static constexpr int kStrideV = kQuads * kQuadStep;
  static constexpr int kStrideP = C::kTileN + 8;
  static constexpr int kKeyFloats = C::kTileN * kStrideK, kQFloats = C::kTileM * kStrideQ;
  static constexpr int kKeyStage = kKeyFloats + (kQStreamed ? kQFloats : 0), kValueStage = C::kChunkKeys * kStrideV;
  static constexpr int kStageFloats = kKeyStage > kValueStage ? kKeyStage : kValueStage;

  static constexpr int kStagesBegin = kQStreamed ? 0 : kQFloats;
  static constexpr int kWeights = kStagesBegin + C::kStages * kStageFloats;
  static constexpr int kFactors = kWeights + C::kTileM * kStrideP;  // a row's factor of its O so far
  static constexpr int kSums = kFactors + C::kTileM;  // at the end: of its weights
  static constexpr int kSmemBytes = 4 * (kSums + C::kTileM);

  static_assert(C::kTileN % ScoreGrid::kLanes == 0 && C::kTileN % 32 == 0, "threads share the keys evenly");
  static_assert(C::kChunkD % 8 == 0 && C::kTileN % C::kChunkKeys == 0, "chunks divide the tiles");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
};

// Computed once on the host for a launch.
struct GridArgs {
  int row_tiles;  // per head
  int key_tiles;
  int heads_at_once;  // sectioned order
  Extent* extents;  // intervals: of each key tile
};

}  // namespace fagen
