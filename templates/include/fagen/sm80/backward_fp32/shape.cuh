// Sizes of a pass, which computes dQ, dK, dV, or dK and dV together; Python derives the same ones.
#pragma once
#include "fagen/simt/backward/shape.cuh"

namespace fagen {

template <class C, Gradient kGradient>
struct PassTiles : C {
  static constexpr bool kOfRows = kGradient == Gradient::dq;
  static constexpr int kTileOwn = kOfRows ? C::kDqTileM : C::kTileN, kTileOther = kOfRows ? C::kDqTileN : C::kTileM;
};

// A pass adds up dS times q or k, or P^T dO, or both, over the tiles that it visits.
template <class C, Gradient kGradient>
struct TensorPass : PassConfig<PassTiles<C, kGradient>, kGradient> {
  static constexpr bool kAddsGradients = kGradient != Gradient::dv;
  static constexpr bool kAddsWeights =
      kGradient == Gradient::dv || (kGradient == Gradient::dk && C::kKeyPasses == KeyPasses::one);
  static constexpr bool kAddsDq = kGradient == Gradient::dk && C::kDqRoute == DqRoute::atomics;  // dS K of its keys
};

// Rows in shared memory that are read in two ways, by eight lanes at a time 16 bytes each. For scores lanes 4 g + t
// read piece t of four of row g; for sums piece g of row 2 t, then of row 2 t + 1. Each row exchanges its pieces in an
// order of its own, so that neither way has a bank conflict.
template <int kCount>
struct TurnedRows {
  static constexpr int kColumns = kCount, kPitch = (kCount + 31) / 32 * 32;

  static __device__ __forceinline__ constexpr int turn(int row) { return row % 8 / 2 * 2 ^ row % 2 * 4; }
  // In floats, of four neighbouring columns.
  static __device__ __forceinline__ int offset(int row, int piece) { return row * kPitch + ((piece ^ turn(row)) << 2); }
};

// Shared memory holds, in floats, the own tiles, of k and v or of q and dO, then the stages: tiles of the other side,
// and for keys the stats of their rows; then dS of the present tile, a line a row, where dQ is added up from it.
template <class P>
struct TensorPassShape {
  static constexpr int kThreads = P::kWarps * 32;
  static constexpr int kWarpRows = P::kTileOwn / P::kWarps, kSlabs = kWarpRows / 16, kPieces = P::kTileOther / 8;
  static_assert(kWarpRows % 16 == 0 && P::kTileOther % 16 == 0, "a warp's share is made of pieces of 16 x 8");

  using ScoreRows = TurnedRows<P::kHeadDim>;   // q and k: their products are the scores
  using ValueRows = TurnedRows<P::kHeadDimV>;  // dO and v: theirs are dP
  static constexpr int kScoreGroups = ScoreRows::kPitch / 32, kValueGroups = ValueRows::kPitch / 32;  // of 32 columns

  static constexpr int kOwnValues = P::kTileOwn * ScoreRows::kPitch;
  static constexpr int kRing = kOwnValues + (P::kAddsGradients ? P::kTileOwn * ValueRows::kPitch : 0);
  static constexpr int kOtherValues = P::kTileOther * ScoreRows::kPitch;  // in a stage
  static constexpr int kStats = kOtherValues + P::kTileOther * ValueRows::kPitch;
  static constexpr int kStageFloats = kStats + (P::kOwnsKeys ? 2 * P::kTileOther : 0);
  static constexpr int kCells = kRing + P::kStages * kStageFloats, kCellPitch = P::kTileOwn + 8;
  static constexpr int kSmemBytes = 4 * (kCells + (P::kAddsDq ? P::kTileOther * kCellPitch : 0));
  static_assert(kSmemBytes == (P::kOf == Gradient::dq   ? Derived::dq_smem_bytes
                               : P::kOf == Gradient::dk ? Derived::smem_bytes
                                                        : Derived::dv_smem_bytes),
                "Python and CUDA disagree about shared memory");
};

// A row's logsumexp, and delta = sum of dO * O, less the gradient of the logsumexp. Rows that see nothing, and those
// past the last, have an infinite one: their weights are 0.
struct RowStats {
  float lse, delta;
};

struct TensorGradientArgs : GradientArgs {
  RowStats* stats;  // (batch, heads, stats_rows)
  int stats_rows;  // a head's: whole tiles
};

}  // namespace fagen
