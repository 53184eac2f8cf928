// Sizes that follow from the config; Python derives the same ones, and the asserts below hold the two together.
#pragma once
#include "fagen/mask/intervals.cuh"

namespace fagen {

// Rows of q or k in shared memory. Lanes 4 g + t read 16 bytes each, piece t of four of row g: eight of them, those of
// two rows, are served together. So odd rows exchange their halves of 128 bytes, unless the rows' length does that.
template <int kCount>
struct ScoreRowsLayout {
  static constexpr int kColumns = kCount, kPitch = kCount;
  static constexpr bool kSwizzled = kCount % 32 == 0;

  // In floats, of four neighbouring columns.
  static __device__ __forceinline__ int offset(int row, int piece) {
    return row * kPitch + ((kSwizzled ? piece ^ row % 2 * 4 : piece) << 2);
  }
};

// Rows of v. Lanes 4 g + t read columns of piece g of row 2 t: rows 2 apart lie 8 banks apart.
template <int kCount>
struct ValueRowsLayout {
  static constexpr int kColumns = kCount, kPitch = kCount + 4;
  static_assert(kPitch % 16 == 4, "rows of v begin in other banks");

  static __device__ __forceinline__ int offset(int row, int piece) { return row * kPitch + piece * 4; }
};

// Shared memory holds, in floats: q, then the stages of K and V.
template <class C>
struct ForwardShape {
  static constexpr int kThreads = C::kWarps * 32;
  static constexpr int kWarpRows = C::kTileM / C::kWarps, kSlabs = kWarpRows / 16;
  static_assert(kWarpRows % 16 == 0 && C::kTileN % 16 == 0, "a warp's share is made of pieces of 16 x 8");

  using RowsOfQ = ScoreRowsLayout<C::kHeadDim>;
  using RowsOfK = ScoreRowsLayout<C::kHeadDim>;
  using RowsOfV = ValueRowsLayout<C::kHeadDimV>;
  // columns of v that a lane loads at once: four where registers are left for their sums
  static constexpr int kVector = C::kHeadDimV % 32 == 0 && C::kHeadDimV <= 128 && kSlabs == 1 ? 4 : 2;
  static constexpr int kGroups = C::kHeadDimV / (8 * kVector);  // of columns that a warp loads so

  static constexpr int kStagesBegin = C::kTileM * RowsOfQ::kPitch;
  static constexpr int kKeyFloats = C::kTileN * RowsOfK::kPitch;
  static constexpr int kStageFloats = kKeyFloats + C::kTileN * RowsOfV::kPitch;
  static constexpr int kSmemBytes = 4 * (kStagesBegin + C::kStages * kStageFloats);
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
};

// Computed once on the host for a launch.
struct GridArgs {
  int row_tiles;  // per head
  int key_tiles;
  int heads_at_once;  // sectioned order
  Extent* extents;    // intervals: of each key tile
};

}  // namespace fagen
