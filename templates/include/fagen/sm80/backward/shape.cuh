// Sizes that follow from the config: each warp's share of every product, and the plan of shared memory. Python derives
// the same sizes, and the asserts below hold the two together.
#pragma once
#include "fagen/sm80/smem_tile.cuh"

namespace fagen {

constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int round_up(int a, int unit) { return (a + unit - 1) / unit * unit; }

// The kernel whose blocks own a tile of keys: dK, dV, and unless it has a kernel of its own, dQ.
template <class C>
struct KeyBlockShape {
  static constexpr int kThreads = C::kWarps * 32;
  static constexpr bool kAddsDq = C::kDqRoute == DqRoute::atomics;
  // S and dP are computed as rows x keys and go through shared memory, or as keys x rows and stay in registers
  static constexpr bool kTransposed = C::kWeightsSource == WeightsSource::registers;
  static constexpr bool kVInRegisters = C::kVSource == VSource::registers;

  // the warps of a product make a grid: some share its rows, the others its columns
  static constexpr int kKeyWarps = C::kKeyWarps, kColumnWarps = C::kWarps / kKeyWarps;       // dK, dV
  static constexpr int kDqRowWarps = C::kDqRowWarps, kDqColumnWarps = C::kWarps / kDqRowWarps;  // dQ
  static constexpr int kSplit = kAddsDq ? larger(kColumnWarps, kDqColumnWarps) : kColumnWarps;
  // head dims in shared memory: zeros fill up what the warps could not share evenly
  static constexpr int kD = round_up(C::kHeadDim, 16 * kSplit), kDv = round_up(C::kHeadDimV, 16 * kColumnWarps);

  // S and dP: a warp's lines (rows, or keys if transposed) and its cells of each
  static constexpr int kLines = kTransposed ? C::kTileN / C::kWarps : C::kTileM / C::kRowWarps;
  static constexpr int kCells = kTransposed ? C::kTileM : C::kTileN / (C::kWarps / C::kRowWarps);
  static constexpr int kSlabs = kLines / 16;
  static constexpr int kKeySlabs = C::kTileN / kKeyWarps / 16;
  static constexpr int kDkColumns = kD / kColumnWarps, kDvColumns = kDv / kColumnWarps;
  static constexpr int kDqSlabs = C::kTileM / kDqRowWarps / 16, kDqColumns = kD / kDqColumnWarps;
  static_assert(kLines % 16 == 0 && kCells % 16 == 0 && kDkColumns % 16 == 0 && kDvColumns % 16 == 0,
                "a warp's share is made of 16 x 16 pieces");
  static_assert(!kTransposed || kKeyWarps == C::kWarps, "P and dS in registers are of the warp's own keys");

  static constexpr bool kSwizzled = C::kSmemLayout == SmemLayout::swizzled;
  using TileQ = SmemTile<C::kTileM, kD, kSwizzled>;
  using TileDout = SmemTile<C::kTileM, kDv, kSwizzled>;
  using TileK = SmemTile<C::kTileN, kD, kSwizzled>;
  using TileV = SmemTile<C::kTileN, kDv, kSwizzled>;
  using TileS = SmemTile<kTransposed ? C::kTileN : C::kTileM, kTransposed ? C::kTileM : C::kTileN, kSwizzled>;

  static constexpr int kStatsBytes = C::kTileM * 8;
  static constexpr int kV = TileK::kBytes;
  // v in registers passes through the room of q and dO before they arrive
  static constexpr int kQ = kV + (kVInRegisters ? 0 : TileV::kBytes);
  static constexpr int kDout = kQ + C::kQStages * TileQ::kBytes;
  static constexpr int kStats = kDout + C::kDoutStages * TileDout::kBytes;
  static constexpr int kWeights = kStats + C::kQStages * kStatsBytes;
  static constexpr int kGradients = kWeights + (kTransposed ? 0 : TileS::kBytes);
  static constexpr int kEnd = kGradients + (kTransposed && !kAddsDq ? 0 : TileS::kBytes);
  static constexpr int kSmemBytes = larger(kEnd, kV + TileV::kBytes);  // dK and dV leave through the room of K and V

  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
};

// The kernel whose blocks own a tile of rows: dQ alone. A warp's rows are its own.
template <class C>
struct RowBlockShape {
  static constexpr int kThreads = C::kWarps * 32;
  static constexpr int kTileM = C::kDqTileM, kTileN = C::kDqTileN, kStages = 2;
  static constexpr int kSlabs = kTileM / C::kWarps / 16;
  static_assert(C::kDqRoute == DqRoute::atomics || kTileM % (16 * C::kWarps) == 0, "a warp's rows are slabs of 16");

  static constexpr bool kSwizzled = C::kSmemLayout == SmemLayout::swizzled;
  using TileQ = SmemTile<kTileM, C::kHeadDim, kSwizzled>;
  using TileDout = SmemTile<kTileM, C::kHeadDimV, kSwizzled>;
  using TileK = SmemTile<kTileN, C::kHeadDim, kSwizzled>;
  using TileV = SmemTile<kTileN, C::kHeadDimV, kSwizzled>;

  static constexpr int kDout = TileQ::kBytes;
  static constexpr int kKeys = kDout + TileDout::kBytes;  // the stages of K and V
  static constexpr int kStageBytes = TileK::kBytes + TileV::kBytes;
  static constexpr int kSmemBytes = kKeys + kStages * kStageBytes;
  static_assert(C::kDqRoute == DqRoute::atomics || kSmemBytes == Derived::dq_smem_bytes,
                "Python and CUDA disagree about the shared memory of dQ");
};

}  // namespace fagen
