// A decode block on Hopper: 64 rows of q a consumer warpgroup, rings of key and value tiles, one warp that fills
// them.
#pragma once
#include "fagen/ptx/mbarrier.cuh"
#include "fagen/sm90/smem_layout.cuh"

namespace fagen {

// A config as the shared headers ask for it.
template <class Base>
struct DecodeConfig : Base {
  static constexpr int kIntervalColumns = 0, kCluster = 1;
  static constexpr bool kAlibi = false, kDropout = false;
  static constexpr bool kCompact = true;  // blocks of packed rows: of the tiles that there are
  static constexpr bool kMergesInCluster = false, kMergesInLastBlock = false;
};

template <class C>
struct DecodeLayout {
  static constexpr int kGroups = C::kTileM / kGroupRows;  // consumer warpgroups
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kSlabs = slabs(C::kHeadDim), kSlabsV = slabs(C::kHeadDimV);
  static constexpr int kQBytes = C::kTileM * kRowBytes * kSlabs;
  static constexpr int kKBytes = C::kTileN * kRowBytes * kSlabs, kVBytes = C::kTileN * kRowBytes * kSlabsV;

  // Offsets: the tile of q, the tiles of k, of v, the barriers of both.
  static constexpr int kK = kQBytes, kV = kK + C::kStages * kKBytes, kBarriers = kV + C::kStages * kVBytes;
  static constexpr int kEnd = kBarriers + 2 * C::kStages * kBarrierBytes;
  static constexpr int kSmemBytes = kEnd + kSmemAlignment;  // room to align

  static_assert(C::kTileM % kGroupRows == 0 && C::kTileN % 16 == 0, "a warpgroup's product is 64 rows, 16 keys deep");
  static_assert(!C::kFp8Cache && C::kAligned, "the copy engine takes 16-bit rows of whole 16-byte pieces");
  // Registers of a thread: those that the block is compiled for, and how the roles divide them.
  static constexpr int kRegisters = 65536 / (C::kBlocksPerSm * kThreads) / 8 * 8, kProducerRegisters = 40;
  static constexpr int kConsumerShare = ((kGroups + 1) * kRegisters - kProducerRegisters) / kGroups / 8 * 8;
  static constexpr int kConsumerRegisters = kConsumerShare > 240 ? 240 : kConsumerShare;

  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
  static_assert(kConsumerRegisters == Derived::registers, "Python and CUDA disagree about the registers of a thread");
};

// Named barriers; 0 is __syncthreads.
enum DecodeBarrier {
  kRowsLoaded = 1,
  kRowsCleared  // and those that follow: each warpgroup's
};

constexpr int kLoaders = 2;  // producer warps of a ring

// A ring of tiles, each with a barrier for its bytes and one for its readers, as one warp steps through it.
template <int kStages, int kBytes>
struct TileRing {
  uint32_t tiles, barriers;
  int stage = 0, phase = 0;

  __device__ __forceinline__ void init(int readers) const {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(barriers + s * kBarrierBytes, kLoaders);
      ptx::mbarrier_init(barriers + s * kBarrierBytes + 8, readers);
    }
  }
  __device__ __forceinline__ uint32_t tile() const { return tiles + stage * kBytes; }
  __device__ __forceinline__ uint32_t full() const { return barriers + stage * kBarrierBytes; }
  __device__ __forceinline__ uint32_t empty() const { return full() + 8; }
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
  // for readers: wait until the tile is there; free its stage, one arrival a warp
  __device__ __forceinline__ void wait() const { ptx::mbarrier_wait(full(), phase); }
  __device__ __forceinline__ void release() {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty());
    advance();
  }
};

template <class C>
struct DecodeRings {
  using L = DecodeLayout<C>;
  TileRing<C::kStages, L::kKBytes> k;
  TileRing<C::kStages, L::kVBytes> v;

  __device__ __forceinline__ explicit DecodeRings(uint32_t smem)
      : k{smem + L::kK, smem + L::kBarriers}, v{smem + L::kV, smem + L::kBarriers + C::kStages * kBarrierBytes} {}
  __device__ __forceinline__ void init() const {
    k.init(L::kGroups * 4);
    v.init(L::kGroups * 4);
    ptx::fence_mbarrier_init();
  }
};

}  // namespace fagen
