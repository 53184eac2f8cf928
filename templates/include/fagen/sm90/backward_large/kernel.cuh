// Gradients of large head dims on Hopper, a pass each for dQ, dK and dV: a block's entry, which gives its warps their
// roles.
//
//   warpgroups 0 and 1    consumers: half of the cells and of the gradient's columns            consumer.cuh
//   the last one, warp 0  loads the block's own rows, and those that it visits, in chunks       producer.cuh
//
// S and dP are computed anew in each pass, so that no block adds to what another one computes: gradients are the same
// bits each time. A kernel before them computes the stats of rows: prologue.cuh. The host's part: launch.cuh.
#pragma once
#include "fagen/sm90/backward_large/consumer.cuh"
#include "fagen/sm90/backward_large/producer.cuh"

namespace fagen {

template <class P, class Element>
__device__ __forceinline__ void run_pass(const fagen_backward_params& p, const PassLaunch& launch,
                                         unsigned char* shared) {
  using L = PassLayout<P>;
  const uint32_t smem = (ptx::shared_address(shared) + kSmemAlignment - 1) & ~uint32_t(kSmemAlignment - 1);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // warp-uniform for the compiler as well
  const PassPipelines<P> pipelines(smem);
  if (threadIdx.x == 0) pipelines.init();
  L::kClusterBlocks > 1 ? ptx::cluster_sync() : __syncthreads();
  const PassShare<P> share(p, launch);
  if (group == L::kGroups) {
    ptx::fewer_registers<L::kProducerRegisters>();
    if (__shfl_sync(~0u, threadIdx.x / 32, 0) == L::kConsumers / 32) PassProducer<P>{launch, share, pipelines}.run();
  } else {
    ptx::more_registers<L::kConsumerRegisters>();
    PassConsumer<P, Element>(share, pipelines, smem, group).run();
  }
  if (L::kClusterBlocks > 1) ptx::cluster_sync();  // none ends while another writes to it or arrives at its barriers
}

}  // namespace fagen
