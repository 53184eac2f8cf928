// The forward kernel for Hopper: a block's entry, which gives its warps their roles.
//
//   warpgroups 0 .. kGroups - 1   consumers: 64 rows of q each                           consumer.cuh
//   the last one, warp 0          finds the next row tile, loads q and keys              producer.cuh
//                 warp 1          loads values                                           producer.cuh
//                 warp 2          intervals: writes the masks of the key tiles           producer.cuh, tile_mask.cuh
//                 warp 3          stores the rows that see no key                        epilogue.cuh
//
// A kernel before it sets a counter, or plans the visits of intervals: prologue.cuh. The host's part: launch.cuh.
#pragma once
#include "fagen/sm90/forward/consumer.cuh"
#include "fagen/sm90/forward/epilogue.cuh"
#include "fagen/sm90/forward/producer.cuh"

namespace fagen {

template <class C, class Element>
__device__ __forceinline__ void run_block(const fagen_forward_params& p, const LaunchArgs& launch,
                                          unsigned char* shared) {
  using L = BlockLayout<C>;
  const uint32_t smem = (ptx::shared_address(shared) + kSmemAlignment - 1) & ~uint32_t(kSmemAlignment - 1);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // warp-uniform for the compiler as well
  if (threadIdx.x == 0) {
    ptx::prefetch_map(&launch.q);
    ptx::prefetch_map(&launch.k);
    ptx::prefetch_map(&launch.v);
    Pipelines<C>(smem).init();
  }
  C::kCluster > 1 ? ptx::cluster_sync() : __syncthreads();
  ptx::start_next_kernel();
  if (!has_prologue<C>(launch)) ptx::wait_for_previous_kernel();
  if (group == L::kGroups) {
    ptx::fewer_registers<L::kProducerRegisters>();
    Producer<C> producer{p, launch, Pipelines<C>(smem), Band(p)};
    switch (__shfl_sync(~0u, threadIdx.x % 128 / 32, 0)) {
      case 0:
        producer.run_key_producer();
        break;
      case 1:
        producer.run_value_producer();
        break;
      case 2:
        producer.run_mask_producer();
        break;
      default:
        if (MaskOf<C>::kHasEnd) store_empty_rows<C, Element>(p, launch);
    }
  } else {
    ptx::more_registers<L::kConsumerRegisters>();
    Consumer<C, Element>(p, launch, smem, group).run();
  }
  if (C::kCluster > 1) ptx::cluster_sync();  // none ends while another fills its tiles or arrives at its barriers
}

}  // namespace fagen
