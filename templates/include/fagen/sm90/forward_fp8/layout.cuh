// A block of the fp8 forward kernel: its shared memory, threads and registers, where the headers of sm90/forward look
// for them. Rows of q and k lie in slabs of 128 columns of a byte, swizzled as slabs of 64 columns are there.
#pragma once
#include "fagen/mask/mask.cuh"
#include "fagen/sm90/forward_fp8/value_order.cuh"
#include "fagen/sm90/smem_layout.cuh"

namespace fagen {

// The config, and what it cannot ask for.
template <class Config>
struct Fp8 : Config {
  static constexpr int kCluster = 1;
  static constexpr bool kSharedWeights = false, kPackHeads = false;
};

template <class Config>
struct BlockLayout<Fp8<Config>> {
  using C = Fp8<Config>;
  static constexpr int kGroups = C::kTileM / kGroupRows;  // consumer warpgroups
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kSlabs = slabs(C::kHeadDim / 2);
  static constexpr int kQBytes = C::kTileM * kRowBytes * kSlabs, kKBytes = C::kTileN * kRowBytes * kSlabs;
  static constexpr int kVBytes = C::kTileN * C::kHeadDimV;

  // Offsets, in this order: tiles of q, of k, of v, the barriers of q, k and v, the assignment queue with its own, with
  // intervals the masks of the key tiles.
  static constexpr int kQ = 0, kK = kQ + C::kQStages * kQBytes, kV = kK + C::kStages * kKBytes;
  static constexpr int kBarriers = kV + C::kStages * kVBytes;
  static constexpr int kQueue = kBarriers + kBarrierBytes * (C::kQStages + 2 * C::kStages);
  static constexpr int kTileMasks = kQueue + kQueueBytes;
  static constexpr int kEnd = kTileMasks + (MaskOf<C>::kIntervals ? kMasksPerStage * kTileMaskBytes * C::kStages : 0);
  static constexpr int kSmemBytes = kEnd + kSmemAlignment;  // room to align

  // Registers of a thread: those that the block is compiled for, and how the roles divide them. To write the masks of
  // intervals takes more than to load tiles.
  static constexpr int kRegisters = 65536 / (C::kBlocksPerSm * kThreads) / 8 * 8;
  static constexpr int kProducerRegisters = kGroups == 3 ? 32 : kGroups == 2 && !MaskOf<C>::kIntervals ? 24 : 40;
  static constexpr int kConsumerShare = ((kGroups + 1) * kRegisters - kProducerRegisters) / kGroups / 8 * 8;
  static constexpr int kConsumerRegisters = kConsumerShare > 240 ? 240 : kConsumerShare;

  static_assert(C::kTileM % 64 == 0 && C::kTileN % kBlockKeys == 0, "a warpgroup's product is 64 rows, 32 keys deep");
  static_assert(C::kHeadDim % 16 == 0 && C::kHeadDimV % 16 == 0, "rows are whole 16-byte pieces");
  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
  static_assert(kConsumerRegisters == Derived::registers, "Python and CUDA disagree about the registers of a thread");
};

}  // namespace fagen
