// A block of the backward kernel: its shared memory, threads and registers, and who of its warpgroups computes what.
#pragma once
#include "fagen/sm90/pipeline.cuh"
#include "fagen/sm90/smem_layout.cuh"

namespace fagen {

constexpr int kGroupKeys = 64;      // a warpgroup's keys
constexpr int kPieceBytes = 2048;   // a piece of 8 columns of 64 rows of dQ, float32: 16 bytes a thread

// How the consumers share the product dQ = dS K, in row chunks of 64 and slabs of 64 columns: by rows where each can
// have as many chunks as the others, else by slabs.
template <class C>
struct DqShare {
  static constexpr int kGroups = C::kTileN / kGroupKeys;
  static constexpr int kOwners = C::kDqOwner == DqOwner::all ? kGroups : 1;
  static constexpr int kRowChunks = C::kTileM / 64, kAllSlabs = slabs(C::kHeadDim);
  static constexpr bool kByRows = kRowChunks % kOwners == 0;
  static constexpr int kChunks = kByRows ? kRowChunks / kOwners : kRowChunks;  // one after another
  static constexpr int kSlabs = kByRows ? kAllSlabs : (kAllSlabs + kOwners - 1) / kOwners;
  static constexpr int kColumns = kByRows ? C::kHeadDim : kSlabs * kSlabColumns;
  static constexpr int kChunkPieces = C::kHeadDim / 8;  // of all columns
  static constexpr int kTileFloats = C::kTileM * C::kHeadDim;
  static constexpr int kStageBytes = C::kDqSink == DqSink::bulk ? kColumns / 8 * kPieceBytes : 0;

  const int group;
  __device__ __forceinline__ int first_slab() const { return kByRows ? 0 : group * kSlabs; }
  __device__ __forceinline__ int first_chunk() const { return kByRows ? group * kChunks : 0; }
  // with a part for every group there is nothing to ask
  static constexpr bool kEach = kOwners == kGroups && (kByRows || (kOwners - 1) * kSlabs < kAllSlabs);
  __device__ __forceinline__ bool owns() const { return kEach || (group < kOwners && first_slab() < kAllSlabs); }
  // how many pieces there are of the group's columns
  __device__ __forceinline__ int pieces() const { return min(kColumns / 8, kChunkPieces - first_slab() * 8); }
  // where the group's part of a chunk begins in the float32 tile of dQ, which is in the order of fragments
  __device__ __forceinline__ int offset(int chunk) const {
    return ((first_chunk() + chunk) * kChunkPieces + first_slab() * 8) * (kPieceBytes / 4);
  }
};

template <class C>
struct BackwardLayout {
  using Dq = DqShare<C>;
  static constexpr int kGroups = C::kTileN / kGroupKeys;  // consumer warpgroups
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kSlabs = slabs(C::kHeadDim), kSlabsV = slabs(C::kHeadDimV);
  static constexpr int kKBytes = C::kTileN * kRowBytes * kSlabs, kVBytes = C::kTileN * kRowBytes * kSlabsV;
  static constexpr int kQBytes = C::kTileM * kRowBytes * kSlabs, kDoutBytes = C::kTileM * kRowBytes * kSlabsV;
  static constexpr int kDsSlabBytes = C::kTileM * kRowBytes, kDsBytes = kGroups * kDsSlabBytes;
  static constexpr int kStatBytes = C::kTileM * 4;  // the LSE, or delta, of a row tile
  static constexpr bool kIntervals = C::kMask == Mask::intervals;
  static constexpr int kBoundBytes = kIntervals ? C::kTileN * 16 : 0, kExtentBytes = kIntervals ? 32 : 0;

  // Offsets: k, v, the stages of q, of dO and of dS, the owners' parts of dQ, the LSE of each stage of q, delta of each
  // stage of dO, the bounds of the keys' intervals and their extents, barriers.
  static constexpr int kK = 0, kV = kK + kKBytes, kQ = kV + kVBytes, kDout = kQ + C::kQStages * kQBytes;
  static constexpr int kDs = kDout + C::kDoutStages * kDoutBytes, kDq = kDs + C::kDsStages * kDsBytes;
  static constexpr int kLse = kDq + Dq::kOwners * Dq::kStageBytes, kDelta = kLse + C::kQStages * kStatBytes;
  static constexpr int kBounds = kDelta + C::kDoutStages * kStatBytes, kExtents = kBounds + kBoundBytes;
  static constexpr int kBarriers = kExtents + kExtentBytes;
  static constexpr int kBarrierPairs = 2 + C::kQStages + C::kDoutStages + kGroups;
  static constexpr int kSmemBytes = kBarriers + kBarrierPairs * kBarrierBytes + kSmemAlignment;  // room to align

  // Registers of a thread: those that the block is compiled for, and how the roles divide them.
  static constexpr int kRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kGroups == 3 ? 32 : 40;
  static constexpr int kConsumerShare = ((kGroups + 1) * kRegisters - kProducerRegisters) / kGroups / 8 * 8;
  static constexpr int kConsumerRegisters = kConsumerShare > 240 ? 240 : kConsumerShare;

  static_assert(C::kTileM % 64 == 0 && C::kTileN % kGroupKeys == 0, "a product is 64 rows or 64 keys at least");
  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
  static_assert(kConsumerRegisters == Derived::registers, "Python and CUDA disagree about the registers of a thread");
};

// The barriers and tiles of a block, as one warp sees them. A row tile's q comes with its LSE, dO with its delta.
template <class C>
struct BackwardPipelines {
  using L = BackwardLayout<C>;
  Pipeline<1, L::kKBytes> k;
  Pipeline<1, L::kVBytes> v;
  Pipeline<C::kQStages, L::kQBytes> q;
  Pipeline<C::kDoutStages, L::kDoutBytes> dout;
  Pipeline<1, L::Dq::kStageBytes> dq;  // of one owner: filled by its four warps, emptied by a warp that adds it to memory
  uint32_t smem;
  int ds_stage = 0;

  __device__ __forceinline__ BackwardPipelines(uint32_t smem, int owner)
      : k{smem + L::kK, barrier(smem, 0)},
        v{smem + L::kV, barrier(smem, 1)},
        q{smem + L::kQ, barrier(smem, 2)},
        dout{smem + L::kDout, barrier(smem, 2 + C::kQStages)},
        dq{smem + L::kDq + owner * L::Dq::kStageBytes, barrier(smem, 2 + C::kQStages + C::kDoutStages + owner)},
        smem(smem) {}
  static __device__ __forceinline__ uint32_t barrier(uint32_t smem, int index) {
    return smem + L::kBarriers + index * kBarrierBytes;
  }
  __device__ __forceinline__ uint32_t lse() const { return smem + L::kLse + q.stage * L::kStatBytes; }
  __device__ __forceinline__ uint32_t delta() const { return smem + L::kDelta + dout.stage * L::kStatBytes; }
  __device__ __forceinline__ uint32_t ds() const { return smem + L::kDs + ds_stage * L::kDsBytes; }

  __device__ __forceinline__ void init() const {
    k.init(1), v.init(1);
    q.init(L::kGroups * 4);
    dout.init(L::kGroups * 4);
    for (int owner = 0; owner < L::kGroups; ++owner) BackwardPipelines(smem, owner).dq.init(1, 4);
    ptx::fence_mbarrier_init();
  }
};

}  // namespace fagen
