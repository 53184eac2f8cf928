// Latent attention (MLA): a key is kHeadDimV latent columns, which are its value as well, and a slab of rotary ones. A
// block has 64 rows of q. Two warpgroups share them: each computes the scores of every other key tile, and owns half of
// the columns of O.
#pragma once
#include "fagen/ptx/mbarrier.cuh"
#include "fagen/sm80/decode/place.cuh"
#include "fagen/sm90/smem_layout.cuh"

namespace fagen {

// A config as the decode headers ask for it.
template <class Base>
struct MlaConfig : Base {
  static constexpr int kTileM = kGroupRows, kTileN = 64, kBlocksPerSm = 1;
  static constexpr bool kCompact = false;  // blocks of packed rows: of every tile that there may be
  static constexpr bool kMergesInCluster = false, kMergesInLastBlock = false;
};

template <class C>
struct MlaLayout {
  static constexpr int kGroups = 2;  // consumer warpgroups
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kBuffers = 2;  // key tiles in shared memory: one of each warpgroup
  static constexpr int kHalf = C::kHeadDimV / 2;  // columns of O of a warpgroup
  static constexpr int kHalfSlabs = kHalf / kSlabColumns, kSlabs = 2 * kHalfSlabs + 1;  // the last one is rotary
  static constexpr int kRotary = kSlabs - 1;
  static constexpr int kSlabBytes = C::kTileN * kRowBytes, kTileBytes = kSlabs * kSlabBytes;  // of q and of keys alike
  static_assert(C::kTileM == C::kTileN && C::kHeadDim == kSlabs * kSlabColumns && kHalf % kSlabColumns == 0,
                "a key is two halves of whole slabs, and a slab of rotary columns");
  static_assert(C::kSharedKv && !C::kFp8Cache && C::kAligned,
                "values are columns of keys, which the copy engine takes");

  // Offsets: the tile of q, the key tiles, the weights of warpgroup 0, (warpgroup, row): reference, sum, the barriers
  // of the slabs of key tiles, of their parts. The weights of warpgroup 1 come where the rotary columns of q were,
  // which both keep in registers.
  static constexpr int kTiles = kTileBytes, kWeights = kTiles + kBuffers * kTileBytes;
  static constexpr int kReferences = kWeights + kSlabBytes;
  static constexpr int kSums = kReferences + kGroups * C::kTileM * 4, kFull = kSums + kGroups * C::kTileM * 4;
  static constexpr int kEmpty = kFull + kBuffers * kSlabs * 8, kEnd = kEmpty + kBuffers * kGroups * 8;
  static constexpr int kSmemBytes = kEnd + kSmemAlignment;  // room to align

  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;  // of 168 each

  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
  static_assert(kConsumerRegisters == Derived::registers, "Python and CUDA disagree about the registers of a thread");
};

// Whether the blocks of a tile's splits merge them among themselves. `alone`: one of them has all keys.
__device__ __forceinline__ bool merges_in_cluster(const DecodeGrid& grid, bool alone) {
  return grid.clustered && !alone;
}

// Named barriers; 0 is __syncthreads.
enum MlaBarrier {
  kRowsLoaded = 1,
  kFirstWeights,
  kSecondWeights,
  kRowsSummed,
  kOfGroup  // and the next one: each warpgroup's own
};

// A part of a key tile: the slabs that the same warpgroup is the last to read, and frees. Of tile i of a pair warpgroup
// i computes the scores, slab by slab as they come.
template <class C>
struct KeyPart {
  using L = MlaLayout<C>;
  uint32_t smem;
  int buffer, group;

  __device__ __forceinline__ uint32_t tile() const { return smem + L::kTiles + buffer * L::kTileBytes; }
  __device__ __forceinline__ uint32_t full(int slab) const { return smem + L::kFull + (buffer * L::kSlabs + slab) * 8; }
  __device__ __forceinline__ uint32_t empty() const { return smem + L::kEmpty + (buffer * L::kGroups + group) * 8; }
  // Free it: one arrival a warp.
  __device__ __forceinline__ void release() const {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty());
  }
  __device__ __forceinline__ bool has_rotary() const { return buffer != group; }
  // Slab i of the part; of kHalfSlabs, and of the rotary one behind them if it has that.
  __device__ __forceinline__ int slab(int i) const {
    return i < L::kHalfSlabs ? group * L::kHalfSlabs + i : L::kRotary;
  }
  __device__ __forceinline__ int slabs() const { return L::kHalfSlabs + has_rotary(); }
};

}  // namespace fagen
