// How the tiles of a block lie in shared memory: columns in slabs of 64, rows of 128 bytes, exchanged as the copy
// engine and the tensor cores both expect (128-byte swizzle). And the rings that the tiles go round in.
#pragma once
#include "fagen/attend.cuh"
#include "fagen/schedule.cuh"

template <class C>
struct Shape {
  static constexpr int kGroups = C::kTileM / 64;  // warpgroups that compute, each 64 rows of q
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kSlabs = (C::kHeadDim + 63) / 64, kSlabsV = (C::kHeadDimV + 63) / 64;
  static constexpr int kQBytes = C::kTileM * 128 * kSlabs;
  static constexpr int kKBytes = C::kTileN * 128 * kSlabs, kVBytes = C::kTileN * 128 * kSlabsV;
  static constexpr int kWeightSlab = 64 * 128;  // of a warpgroup's 64 rows
  static constexpr int kWeightBytes = C::kSharedWeights ? (C::kTileN + 63) / 64 * kWeightSlab : 0;

  // in this order: tiles of q, of k, of v, of each warpgroup's weights, a full and an empty barrier for each, the mail
  // with its own, and what is told of each tile of k
  static constexpr int kQ = 0, kK = kQ + C::kQStages * kQBytes, kV = kK + C::kStages * kKBytes;
  static constexpr int kWeights = kV + C::kStages * kVBytes, kBarriers = kWeights + kGroups * kWeightBytes;
  static constexpr int kMail = kBarriers + 16 * (C::kQStages + 2 * C::kStages);
  static constexpr int kTold = kMail + 96;
  static constexpr int kSmemBytes = kTold + 96 * C::kStages + 1024;  // and room to align

  // Registers of a thread: what the block is compiled for, and how the roles divide them.
  static constexpr int kEach = 65536 / (C::kBlocksPerSm * kThreads) / 8 * 8;
  static constexpr int kProducerRegisters = kGroups == 3 ? 32 : 40;
  static constexpr int kShare = ((kGroups + 1) * kEach - kProducerRegisters) / kGroups / 8 * 8;
  static constexpr int kConsumerRegisters = kShare > 240 ? 240 : kShare;

  static_assert(C::kTileM % 64 == 0 && C::kTileN % 16 == 0, "a warpgroup's product is 64 rows, 16 keys deep");
  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
  static_assert(kConsumerRegisters == Derived::registers, "Python and CUDA disagree about the registers of a thread");
};

// A wgmma operand in shared memory: where it begins, and how it goes on from there.
struct Operand {
  uint32_t low, high;

  static constexpr uint32_t kSwizzle128 = 1u << 30, kGroupOf8Rows = 1024 >> 4;
  static constexpr uint32_t kOwn = 0x3ffff;  // of an address: without the block's rank in its cluster, which is above

  // 16 elements of k lie in a row (q, k); slabs are separate operands
  static __device__ __forceinline__ Operand of_rows(uint32_t address) {
    return {(address & kOwn) >> 4 | 1u << 16, kSwizzle128 | kGroupOf8Rows};
  }
  // columns lie in a row, 16 rows deep in k (v); slabs `slab_bytes` apart
  static __device__ __forceinline__ Operand of_columns(uint32_t address, int slab_bytes) {
    return {(address & kOwn) >> 4 | uint32_t(slab_bytes >> 4) << 16, kSwizzle128 | kGroupOf8Rows};
  }
  // the one that begins so many bytes later
  __device__ __forceinline__ uint64_t at(int bytes) const { return uint64_t(high) << 32 | (low + (bytes >> 4)); }
};

// A ring of tiles, each with a barrier that says it is full and one that says it is empty. The producer and the
// consumers each step through it on their own. Blocks of a cluster that share tiles each load a part of all: then the
// place of a tile is free when the consumers of all of them have read it.
template <int kStages, int kBytes, int kSharers = 1>
struct Ring {
  uint32_t tiles, barriers;  // of stage 0; the empty barrier lies behind the full one
  int stage = 0, phase = 0;

  static constexpr int kBlocks = kSharers;

  __device__ __forceinline__ void init(int consumers, int producers = 1) const {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(barriers + s * 16, producers);
      ptx::mbarrier_init(barriers + s * 16 + 8, consumers * kSharers);
    }
  }
  __device__ __forceinline__ uint32_t tile() const { return tiles + stage * kBytes; }
  __device__ __forceinline__ uint32_t full() const { return barriers + stage * 16; }
  __device__ __forceinline__ uint32_t empty() const { return barriers + stage * 16 + 8; }
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }

  // for the producer: the next tile's place is free; and its bytes are announced
  __device__ __forceinline__ void acquire() const { ptx::mbarrier_wait(empty(), phase ^ 1); }
  __device__ __forceinline__ void announce() const { ptx::mbarrier_arrive_expect(full(), kBytes); }
  // for consumers: the tile is there; and has been read by this warp
  __device__ __forceinline__ void wait() const { ptx::mbarrier_wait(full(), phase); }
  __device__ __forceinline__ void release() {
    if constexpr (kSharers == 1) {
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty());
    } else {
      if (threadIdx.x % 32 < kSharers) ptx::mbarrier_arrive_at(empty(), threadIdx.x % 32);
    }
    advance();
  }
};

// With intervals: rows [m0, m1). Of so many tiles of keys that they see, something is hidden of `cut` and nothing of
// `whole`.
struct alignas(16) Span {
  int m0, m1, cut, whole;
};

// Which tile of rows comes next: the warp that finds it tells the others. A row_tile of -1 is the end.
struct Letter {
  Work work;
  int kv_head;
  Span span;
};

// A ring of two.
template <bool kIntervals>
struct Mail {
  uint32_t places, barriers;
  int count = 0;  // of letters so far, which says all: some that hear them have no register to spare

  __device__ __forceinline__ Ring<2, 32> ring() const { return {places, barriers, count % 2, count / 2 % 2}; }

  __device__ __forceinline__ void send(const Letter& letter) {
    if (threadIdx.x % 32 == 0) {
      const auto place = ring();
      place.acquire();
      ptx::st_shared_16(place.tile(),
                        make_uint4(letter.work.row_tile, letter.work.head, letter.work.batch, letter.kv_head));
      const Span& span = letter.span;
      if (kIntervals) ptx::st_shared_16(place.tile() + 16, make_uint4(span.m0, span.m1, span.cut, span.whole));
      ptx::mbarrier_arrive(place.full());
    }
    ++count;
  }
  __device__ __forceinline__ Letter receive() {
    auto place = ring();
    place.wait();
    const uint4 work = ptx::ld_shared_16(place.tile());
    const uint4 seen = kIntervals ? ptx::ld_shared_16(place.tile() + 16) : make_uint4(0, 0, 0, 0);
    __syncwarp();  // every lane has read before the first one gives the place back
    place.release();
    ++count;
    // broadcast, so that the compiler as well knows it to be the same in all lanes
    const auto uniform = [](uint32_t x) { return int(__shfl_sync(~0u, x, 0)); };
    return {{uniform(work.x), uniform(work.y), uniform(work.z)},
            uniform(work.w),
            {uniform(seen.x), uniform(seen.y), uniform(seen.z), uniform(seen.w)}};
  }
};

template <class C>
struct Rings {
  using S = Shape<C>;
  Ring<C::kQStages, S::kQBytes> q;
  Ring<C::kStages, S::kKBytes, C::kCluster> k;
  Ring<C::kStages, S::kVBytes, C::kCluster> v;
  Mail<C::kMask == Mask::intervals> mail;
  uint32_t told;  // places for what is told: two a stage of k, so that one outlives its tile until the softmax is done

  __device__ __forceinline__ explicit Rings(uint32_t smem)
      : q{smem + S::kQ, smem + S::kBarriers},
        k{smem + S::kK, smem + S::kBarriers + 16 * C::kQStages},
        v{smem + S::kV, smem + S::kBarriers + 16 * (C::kQStages + C::kStages)},
        mail{smem + S::kMail, smem + S::kMail + 64},
        told(smem + S::kTold) {}

  __device__ __forceinline__ uint32_t told_place() const { return told + (k.stage + k.phase * C::kStages) * 48; }

  // A tile, or a letter, is given back with one arrival a warp. With intervals there is a warp that tells of tiles of
  // keys. It hears of tiles of rows, as the one does that loads values.
  __device__ __forceinline__ void init() const {
    constexpr bool kTold = C::kMask == Mask::intervals;
    q.init(S::kGroups * 4);
    k.init(S::kGroups * 4, 1 + kTold);
    v.init(S::kGroups * 4);
    mail.ring().init(S::kGroups * 4 + 1 + kTold);
    ptx::fence_mbarrier_init();
  }
};
