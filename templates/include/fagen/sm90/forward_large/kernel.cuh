// The forward kernel for large head dims on Hopper: a block's entry, which gives its warps their roles.
//
//   warpgroups 0 and 1    consumers: half of the scores and of O's columns, or of the rows  consumer.cuh
//   the last one, warp 0  loads q, and keys and values in chunks                            producer.cuh
#pragma once
#include "fagen/sm90/forward_large/consumer.cuh"
#include "fagen/sm90/forward_large/producer.cuh"

namespace fagen {

template <class C, class Element>
__device__ __forceinline__ void run_large_block(const fagen_forward_params& p, const LargeLaunch& launch,
                                                unsigned char* shared) {
  using L = LargeLayout<C>;
  const uint32_t base = ptx::shared_address(shared), smem = (base + kSmemAlignment - 1) & ~uint32_t(kSmemAlignment - 1);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // warp-uniform for the compiler as well
  const Pipeline<1, L::kSlabs * L::kQSlabBytes> q{smem, smem + L::kBarriers};
  const LargeRing<C> ring{smem + L::kStage0, smem + L::kBarriers + kBarrierBytes};
  if (threadIdx.x == 0) {
    q.init(1);
    ring.init(L::kConsumers / 32);
    if (L::kPeers)
      for (int warp = 0; warp < L::kConsumers / 32; ++warp) Peer(smem + L::kPeerBarriers, warp).init();
    ptx::fence_mbarrier_init();
    if (p.seqlen_k > 0) {  // else there are no maps
      ptx::prefetch_map(&launch.q);
      ptx::prefetch_map(&launch.k);
      ptx::prefetch_map(&launch.v);
    }
  }
  L::kClusterBlocks > 1 ? ptx::cluster_sync() : __syncthreads();
  const LargeTask<C> task(p, launch);
  if (group == L::kGroups) {
    ptx::fewer_registers<L::kProducerRegisters>();
    if (__shfl_sync(~0u, threadIdx.x / 32, 0) == L::kConsumers / 32) LargeProducer<C>{launch, task, q, ring}.run();
  } else {
    ptx::more_registers<L::kConsumerRegisters>();
    float* exchange = reinterpret_cast<float*>(shared + (smem - base) + L::kExchange);
    LargeConsumer<C, Element>(p, task, ring, smem, exchange, group).run(q);
  }
  if (L::kClusterBlocks > 1) ptx::cluster_sync();  // none ends while another writes to it or arrives at its barriers
}

}  // namespace fagen
