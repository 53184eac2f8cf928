// A block of the backward kernel: its shared memory, threads and registers, and who of its warpgroups computes what.
#pragma once
#include "fagen/sm90/pipeline.cuh"
#include "fagen/sm90/smem_layout.cuh"

namespace fagen {

constexpr int kGroupKeys = 64;      // a warpgroup's keys
constexpr int kPieceBytes = 2048;   // a piece of 8 columns of 64 rows of dQ, float32: 16 bytes a thread

template <class C>
constexpr bool kSharedOperands = C::kOperands == Operands::shared;
template <class C>
constexpr bool kSeedsDp = C::kSeeds == Seeds::delta;  // accumulators of dP begin with -delta

// The warpgroup that loads tiles computes dQ as well: consumers hand dS over to it.
template <class C>
constexpr bool kLoaderHasDq = C::kDqOwner == DqOwner::loader;

// Consumers add dQ to memory themselves, when a warp tells them that it is the block's turn.
template <class C>
constexpr bool kRedInTurns = C::kDeterministic && C::kDqSink == DqSink::red;

// How the consumers share the product dQ = dS K, in chunks one after another. A chunk is 64 rows of some slabs of
// columns: by rows where each consumer can have as many chunks as the others, else by slabs. With P and dS in shared
// memory there are 64 rows, and a chunk is one slab, since registers are few. The loader has fewer still: half a slab.
template <class C>
struct DqShare {
  static constexpr int kGroups = C::kWarpgroups;
  static constexpr int kOwners = C::kDqOwner == DqOwner::all ? kGroups : 1;
  static constexpr int kRowChunks = C::kTileM / 64, kAllSlabs = slabs(C::kHeadDim);
  static constexpr bool kByHalf = kLoaderHasDq<C>, kBySlab = kSharedOperands<C>;
  static constexpr bool kByRows = !kByHalf && !kBySlab && kRowChunks % kOwners == 0;
  static constexpr int kHalves = (C::kHeadDim + kSlabColumns / 2 - 1) / (kSlabColumns / 2);
  static constexpr int kOwnSlabs = (kAllSlabs + kOwners - 1) / kOwners;  // where the slabs are shared
  static constexpr int kChunks = kByHalf   ? kRowChunks * kHalves
                                 : kBySlab ? kOwnSlabs
                                 : kByRows ? kRowChunks / kOwners
                                           : kRowChunks;
  static constexpr int kColumns = kByHalf   ? kSlabColumns / 2
                                  : kBySlab ? kSlabColumns
                                  : kByRows ? C::kHeadDim
                                            : kOwnSlabs * kSlabColumns;
  static constexpr int kChunkPieces = C::kHeadDim / 8;  // of all columns
  static constexpr int kTileFloats = C::kTileM * C::kHeadDim;
  static constexpr int kStageBytes = C::kDqSink == DqSink::bulk ? kColumns / 8 * kPieceBytes : 0;
  static constexpr bool kWhole = kByRows || ((kByHalf || kBySlab) && C::kHeadDim % kColumns == 0);  // all are full
  // every group has all of its chunks: there is nothing to ask
  static constexpr bool kEach =
      kByHalf ||
      kOwners == kGroups && (kByRows || (kBySlab ? kAllSlabs % kOwners == 0 : (kOwners - 1) * kOwnSlabs < kAllSlabs));

  const int group;
  __device__ __forceinline__ int slab(int chunk) const {
    return kByHalf ? chunk % kHalves / 2 : kByRows ? 0 : group * kOwnSlabs + (kBySlab ? chunk : 0);
  }
  __device__ __forceinline__ int row_chunk(int chunk) const {
    return kByHalf ? chunk / kHalves : kBySlab ? 0 : kByRows ? group * kChunks + chunk : chunk;
  }
  __device__ __forceinline__ bool owns(int chunk = 0) const {
    return kEach || (group < kOwners && slab(chunk) < kAllSlabs);
  }
  // The chunk begins in the middle of its slab.
  __device__ __forceinline__ int half(int chunk) const { return kByHalf ? chunk % kHalves % 2 : 0; }
  // A chunk's columns in pieces of 8: the first one, and how many there are.
  __device__ __forceinline__ int first_piece(int chunk) const { return slab(chunk) * 8 + half(chunk) * 4; }
  __device__ __forceinline__ int pieces(int chunk) const {
    if constexpr (kWhole) return kColumns / 8;
    return min(kColumns / 8, kChunkPieces - first_piece(chunk));
  }
  // where a chunk begins in the float32 tile of dQ, which is in the order of fragments
  __device__ __forceinline__ int offset(int chunk) const {
    return (row_chunk(chunk) * kChunkPieces + first_piece(chunk)) * (kPieceBytes / 4);
  }
};

template <class C>
struct BackwardLayout {
  using Dq = DqShare<C>;
  static constexpr int kGroups = C::kWarpgroups;  // consumers
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kSlabs = slabs(C::kHeadDim), kSlabsV = slabs(C::kHeadDimV);
  static constexpr int kKBytes = C::kTileN * kRowBytes * kSlabs, kVBytes = C::kTileN * kRowBytes * kSlabsV;
  static constexpr int kQBytes = C::kTileM * kRowBytes * kSlabs, kDoutBytes = C::kTileM * kRowBytes * kSlabsV;
  // dS, and before it P if that goes by shared memory, in slabs of 64 keys
  static constexpr int kDsSlabBytes = C::kTileM * kRowBytes, kDsTileBytes = slabs(C::kTileN) * kDsSlabBytes;
  static constexpr int kDsBytes = kDsTileBytes * (kSharedOperands<C> ? 2 : 1);
  static constexpr int kStatBytes = C::kTileM * 4;  // the LSE, or delta, of a row tile
  static constexpr bool kIntervals = MaskOf<C>::kIntervals;
  static constexpr int kBoundBytes = kIntervals ? C::kTileN * 16 : 0, kExtentBytes = kIntervals ? 32 : 0;

  static constexpr bool kRoundsDq = C::kDqRounding == DqRounding::last_block;

  // Offsets: k, v, the stages of q, of dO and of dS, the owners' parts of dQ, the LSE and delta of each stage of q, the
  // bounds of the keys' intervals and their extents, barriers.
  static constexpr int kK = 0, kV = kK + kKBytes, kQ = kV + kVBytes, kDout = kQ + C::kQStages * kQBytes;
  static constexpr int kDs = kDout + C::kDoutStages * kDoutBytes, kDq = kDs + C::kDsStages * kDsBytes;
  static constexpr int kLse = kDq + Dq::kOwners * Dq::kStageBytes, kDelta = kLse + C::kQStages * kStatBytes;
  static constexpr int kBounds = kDelta + C::kQStages * kStatBytes, kExtents = kBounds + kBoundBytes;
  static constexpr int kBarriers = kExtents + kExtentBytes;
  static constexpr int kDqBarriers = 2 + C::kQStages + C::kDoutStages;  // behind those of k, v, q and dO
  static constexpr int kBarrierPairs = kDqBarriers + (kLoaderHasDq<C> ? C::kDsStages : kGroups * (kRoundsDq ? 2 : 1));
  static constexpr int kSmemBytes = kBarriers + kBarrierPairs * kBarrierBytes + kSmemAlignment;  // room to align

  // Registers of a thread: those that the block is compiled for, and how the roles divide them.
  static constexpr int kRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kGroups == 3                                        ? 32
                                            : kLoaderHasDq<C> || (kRoundsDq && C::kTileM == 64) ? 56
                                                                                                : 40;
  static constexpr int kConsumerShare = ((kGroups + 1) * kRegisters - kProducerRegisters) / kGroups / 8 * 8;
  static constexpr int kConsumerRegisters = kConsumerShare > 240 ? 240 : kConsumerShare;

  static_assert(kSharedOperands<C> ? C::kTileM == 64 && C::kTileN % 16 == 0 && C::kTileN / 8 % kGroups == 0
                                   : C::kTileM % 64 == 0 && C::kTileN == kGroups * kGroupKeys,
                "a product is 64 rows or 64 keys");
  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
  static_assert(kConsumerRegisters == Derived::registers, "Python and CUDA disagree about the registers of a thread");
};

// Blocks that share the visits of a key tile add up dK and dV by units, in the place of the tiles. A unit is 32 columns
// of a warpgroup's keys, or with shared operands a slab of its columns of all keys.
template <class C>
struct SplitUnits {
  using L = BackwardLayout<C>;
  static constexpr int kPieces = kSharedOperands<C> ? C::kTileN / 8 : 4, kBytes = kPieces * kPieceBytes;
  static constexpr int of(int columns) {  // of a warpgroup
    return kSharedOperands<C> ? (slabs(columns) + L::kGroups - 1) / L::kGroups : (columns / 8 + 3) / 4;
  }
};
template <class C>
constexpr int kDkUnits = SplitUnits<C>::of(C::kHeadDim);
template <class C>
constexpr int kUnits = kDkUnits<C> + SplitUnits<C>::of(C::kHeadDimV);
// Blocks of a cluster: on every GPU as many as 8 are one.
template <class C>
constexpr int kMostSplits =
    BackwardLayout<C>::kGroups * kUnits<C> * SplitUnits<C>::kBytes <= BackwardLayout<C>::kDq ? 8 : 1;

// The barriers and tiles of a block, as one warp sees them. A row tile's q comes with its LSE and delta.
template <class C>
struct BackwardPipelines {
  using L = BackwardLayout<C>;
  Pipeline<1, L::kKBytes> k;
  Pipeline<1, L::kVBytes> v;
  Pipeline<C::kQStages, L::kQBytes> q;
  Pipeline<C::kDoutStages, L::kDoutBytes> dout;
  // of one owner: filled by its four warps, emptied by a warp that adds it to memory; or no tile, but turns, of which
  // that warp tells the four
  Pipeline<1, L::Dq::kStageBytes> dq;
  Pipeline<C::kDsStages, L::kDsBytes> handed_ds;  // to the loader, where that computes dQ
  uint32_t summed;  // the owner's barrier: the sum of all blocks is there, in the same place
  uint32_t smem;
  int ds_stage = 0;

  __device__ __forceinline__ BackwardPipelines(uint32_t smem, int owner)
      : k{smem + L::kK, barrier(smem, 0)},
        v{smem + L::kV, barrier(smem, 1)},
        q{smem + L::kQ, barrier(smem, 2)},
        dout{smem + L::kDout, barrier(smem, 2 + C::kQStages)},
        dq{smem + L::kDq + owner * L::Dq::kStageBytes, barrier(smem, L::kDqBarriers + owner)},
        handed_ds{smem + L::kDs, barrier(smem, L::kDqBarriers)},
        summed(barrier(smem, L::kDqBarriers + L::kGroups + owner)),
        smem(smem) {}
  static __device__ __forceinline__ uint32_t barrier(uint32_t smem, int index) {
    return smem + L::kBarriers + index * kBarrierBytes;
  }
  __device__ __forceinline__ uint32_t lse() const { return smem + L::kLse + q.stage * L::kStatBytes; }
  __device__ __forceinline__ uint32_t delta() const { return smem + L::kDelta + q.stage * L::kStatBytes; }
  __device__ __forceinline__ uint32_t ds() const { return smem + L::kDs + ds_stage * L::kDsBytes; }

  __device__ __forceinline__ void init() const {
    k.init(1), v.init(1);
    q.init(L::kGroups * 4);
    dout.init(L::kGroups * 4);
    if (kLoaderHasDq<C>) handed_ds.init(4, L::kGroups * 4);
    for (int owner = 0; owner < L::kGroups && !kLoaderHasDq<C>; ++owner) {
      const BackwardPipelines of_owner(smem, owner);
      kRedInTurns<C> ? of_owner.dq.init(4, 1) : of_owner.dq.init(1, 4);
      if (L::kRoundsDq) ptx::mbarrier_init(of_owner.summed, 1);
    }
    ptx::fence_mbarrier_init();
  }
};

}  // namespace fagen
