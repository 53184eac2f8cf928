// The tiles of a block and their barriers, as one warp sees them.
#pragma once
#include "fagen/sm90/backward_large/layout.cuh"
#include "fagen/sm90/pipeline.cuh"

namespace fagen {

template <class P>
struct PassPipelines {
  using L = PassLayout<P>;
  Pipeline<1, L::kOwnScoreBytes + L::kOwnWeightBytes> own;    // what stays
  Pipeline<P::kStages, L::kStageBytes, P::kCluster> chunks;
  Pipeline<1, L::kStatBytes> stats;  // of rows of q: of each visit, or of those that are owned
  Pipeline<1, L::kPeerBytes> cells;  // the peer's

  __device__ __forceinline__ explicit PassPipelines(uint32_t smem)
      : own{smem, smem + L::kBarriers},
        chunks{smem + L::kStage0, smem + L::kBarriers + kBarrierBytes},
        stats{smem + L::kStats, smem + L::kBarriers + kBarrierBytes * (1 + P::kStages)},
        cells{smem + L::kCells, smem + L::kBarriers + kBarrierBytes * (2 + P::kStages)} {}

  __device__ __forceinline__ void init() const {
    own.init(1);
    chunks.init(L::kConsumers / 32);
    stats.init(L::kConsumers / 32);
    if constexpr (L::kPeers) cells.init(L::kConsumers / 32);
    ptx::fence_mbarrier_init();
  }
};

}  // namespace fagen
