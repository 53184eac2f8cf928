// Sizes of a pass, which computes one of the three gradients; Python derives the same ones.
#pragma once
#include "fagen/abi/backward.h"
#include "fagen/mask/intervals.cuh"
#include "fagen/simt/thread_grid.cuh"

namespace fagen {

enum class Gradient { dq, dk, dv };

// A block of a pass owns a tile of the gradient's rows, and visits tiles of the other side: for dQ it owns rows and
// visits keys, for dK and dV the other way round.
template <class C, Gradient kGradient>
struct PassConfig : C {
  static constexpr Gradient kOf = kGradient;
  static constexpr bool kOwnsKeys = kGradient != Gradient::dq;
  static constexpr int kTileM = kOwnsKeys ? C::kTileOther : C::kTileOwn;
  static constexpr int kTileN = kOwnsKeys ? C::kTileOwn : C::kTileOther;
};

// Shared memory holds, in floats, the stages and the cells: P or dS of a pair of tiles. A stage holds a chunk of
// columns of both tiles, for S or dP, or a chunk of whole rows of the other side, for the gradient.
template <class P>
struct PassShape {
  static constexpr int kThreads = P::kWarps * 32;
  using CellGrid = ThreadGrid<kThreads, P::kTileOwn, P::kCellRows>;  // over own and other rows
  using SumGrid = ThreadGrid<kThreads, P::kTileOwn, P::kSumRows>;    // over own rows and the gradient's columns
  static constexpr int kCellColumns = P::kTileOther / CellGrid::kLanes;
  static constexpr int kColumns = P::kOf == Gradient::dv ? P::kHeadDimV : P::kHeadDim;
  static constexpr int kQuadStep = 4 * SumGrid::kLanes, kQuads = (kColumns + kQuadStep - 1) / kQuadStep;

  static constexpr int kScoreChunks = (P::kHeadDim + P::kChunkD - 1) / P::kChunkD;
  static constexpr int kWeightChunks = P::kOf == Gradient::dv ? 0 : (P::kHeadDimV + P::kChunkD - 1) / P::kChunkD;
  static constexpr int kSumChunks = P::kTileOther / P::kChunkRows;

  static constexpr int kStrideD = P::kChunkD + 4;  // rows lie in other banks
  static constexpr int kStrideSum = kQuads * kQuadStep;
  static constexpr int kStrideCells = P::kTileOther + 8;
  static constexpr int kOwnFloats = P::kTileOwn * kStrideD, kPairFloats = kOwnFloats + P::kTileOther * kStrideD;
  static constexpr int kSumFloats = P::kChunkRows * kStrideSum;
  static constexpr int kStageFloats = kPairFloats > kSumFloats ? kPairFloats : kSumFloats;
  static constexpr int kCells = P::kStages * kStageFloats;
  static constexpr int kSmemBytes = 4 * (kCells + P::kTileOwn * kStrideCells);

  static_assert(P::kTileOther % CellGrid::kLanes == 0, "threads share the cells evenly");
  static_assert(P::kChunkD % 8 == 0 && P::kTileOther % P::kChunkRows == 0, "chunks divide the tiles");
  static_assert(kSmemBytes == (P::kOf == Gradient::dv ? Derived::dv_smem_bytes : Derived::smem_bytes),
                "Python and CUDA disagree about shared memory");
};

// Computed once on the host for a launch.
struct GradientArgs {
  fagen_forward_params forward;  // the forward call as masks and scores read it
  float* delta;                  // (batch, heads, seqlen_q)
  Extent* extents;               // intervals: of each key tile that the pass for dQ visits
  int key_tiles;                 // of these
};

}  // namespace fagen
