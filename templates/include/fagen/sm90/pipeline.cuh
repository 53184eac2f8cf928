// Pipelines between the warps of a block: stages of shared memory that producers fill and consumers free.
#pragma once
#include "fagen/mask/mask.cuh"
#include "fagen/ptx/cp_async.cuh"
#include "fagen/ptx/mbarrier.cuh"
#include "fagen/schedule/tile_order.cuh"
#include "fagen/sm90/smem_layout.cuh"

namespace fagen {

// A ring of tiles. Each stage has a barrier that completes when the tile is full and one that completes when it is
// empty. Producer and consumers step through the stages on their own. Blocks of a cluster that share tiles each load a
// part of all: a stage is then empty when the consumers of all of them have read it.
template <int kStages, int kBytes, int kSharingBlocks = 1>
struct Pipeline {
  uint32_t tiles, barriers;  // stage 0's; the empty barrier lies behind the full one
  int stage = 0, phase = 0;

  static constexpr int kBlocks = kSharingBlocks;

  __device__ __forceinline__ void init(int consumers, int producers = 1) const {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(barriers + s * kBarrierBytes, producers);
      ptx::mbarrier_init(barriers + s * kBarrierBytes + 8, consumers * kBlocks);
    }
  }
  __device__ __forceinline__ uint32_t tile() const { return tiles + stage * kBytes; }
  __device__ __forceinline__ uint32_t full() const { return barriers + stage * kBarrierBytes; }
  __device__ __forceinline__ uint32_t empty() const { return barriers + stage * kBarrierBytes + 8; }
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }

  // for the producer: wait until the stage is empty; announce the tile's bytes
  __device__ __forceinline__ void acquire() const { ptx::mbarrier_wait(empty(), phase ^ 1); }
  __device__ __forceinline__ void expect_bytes() const { ptx::mbarrier_arrive_expect(full(), kBytes); }
  // for consumers: wait until the tile is full; free its stage, one arrival a warp
  __device__ __forceinline__ void wait() const { ptx::mbarrier_wait(full(), phase); }
  __device__ __forceinline__ void release() {
    if constexpr (kBlocks == 1) {
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty());
    } else {
      if (threadIdx.x % 32 < kBlocks) ptx::mbarrier_arrive_at(empty(), threadIdx.x % 32);
    }
    advance();
  }
};

// With intervals: rows [m0, m1), and how many key tiles they visit. Something may be hidden of the partial ones.
struct alignas(16) RowTileVisits {
  int m0, m1, partial, full;
};

// The next row tile of a block, as the producer of keys found it. A row_tile of -1 is the end.
struct TileAssignment {
  TileCoord coord;
  int kv_head;
  RowTileVisits visits;
};

// A pipeline of assignments.
template <bool kIntervals>
struct AssignmentQueue {
  uint32_t tiles, barriers;
  int count = 0;  // assignments popped so far; stage and phase derive from it to save registers

  __device__ __forceinline__ Pipeline<kQueueStages, kAssignmentBytes> pipeline() const {
    return {tiles, barriers, count % kQueueStages, count / kQueueStages % 2};
  }

  __device__ __forceinline__ void push(const TileAssignment& assignment) {
    if (threadIdx.x % 32 == 0) {
      const auto stage = pipeline();
      stage.acquire();
      const TileCoord& coord = assignment.coord;
      ptx::st_shared_16(stage.tile(), make_uint4(coord.row_tile, coord.head, coord.batch, assignment.kv_head));
      const RowTileVisits& visits = assignment.visits;
      if (kIntervals)
        ptx::st_shared_16(stage.tile() + 16, make_uint4(visits.m0, visits.m1, visits.partial, visits.full));
      ptx::mbarrier_arrive(stage.full());
    }
    ++count;
  }
  __device__ __forceinline__ TileAssignment pop() {
    auto stage = pipeline();
    stage.wait();
    const uint4 coord = ptx::ld_shared_16(stage.tile());
    const uint4 visits = kIntervals ? ptx::ld_shared_16(stage.tile() + 16) : make_uint4(0, 0, 0, 0);
    __syncwarp();  // every lane has read before the first one frees the stage
    stage.release();
    ++count;
    // broadcast, so that the compiler as well knows it to be the same in all lanes
    const auto uniform = [](uint32_t x) { return int(__shfl_sync(~0u, x, 0)); };
    return {{uniform(coord.x), uniform(coord.y), uniform(coord.z)},
            uniform(coord.w),
            {uniform(visits.x), uniform(visits.y), uniform(visits.z), uniform(visits.w)}};
  }
};

// The pipelines of a block, as one warp sees them.
template <class C>
struct Pipelines {
  static constexpr bool kIntervals = MaskOf<C>::kIntervals;
  using L = BlockLayout<C>;
  Pipeline<C::kQStages, L::kQBytes> q;
  Pipeline<C::kStages, L::kKBytes, C::kCluster> k;
  Pipeline<C::kStages, L::kVBytes, C::kCluster> v;
  AssignmentQueue<kIntervals> assignments;
  uint32_t tile_masks;  // intervals: kMasksPerStage for each stage of k

  __device__ __forceinline__ explicit Pipelines(uint32_t smem)
      : q{smem + L::kQ, smem + L::kBarriers},
        k{smem + L::kK, smem + L::kBarriers + kBarrierBytes * C::kQStages},
        v{smem + L::kV, smem + L::kBarriers + kBarrierBytes * (C::kQStages + C::kStages)},
        assignments{smem + L::kQueue, smem + L::kQueue + kQueueStages * kAssignmentBytes},
        tile_masks(smem + L::kTileMasks) {}

  // The mask of the present tile of k.
  __device__ __forceinline__ uint32_t tile_mask() const {
    return tile_masks + (k.stage + k.phase * C::kStages) * kTileMaskBytes;
  }

  // A tile or an assignment is freed with one arrival a warp. With intervals a warp writes the masks of the key tiles:
  // a tile of k is full when that is done as well, and that warp pops assignments, as the producer of values does.
  __device__ __forceinline__ void init() const {
    q.init(L::kGroups * 4);
    k.init(L::kGroups * 4, 1 + kIntervals);
    v.init(L::kGroups * 4);
    assignments.pipeline().init(L::kGroups * 4 + 1 + kIntervals);
    ptx::fence_mbarrier_init();
  }
};

}  // namespace fagen
