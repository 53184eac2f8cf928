// The forward kernel for Hopper on fp8 numbers: a block's entry, which gives its warps their roles.
//
//   warpgroups 0 .. kGroups - 1   consumers: 64 rows of q each                           consumer.cuh
//   the last one, warp 0          finds the next row tile, loads q and keys              sm90/forward/producer.cuh
//                 warp 1          loads values                                           here
//                 warp 2          intervals: writes the masks of the key tiles           sm90/forward/producer.cuh
//                 warp 3          stores the rows that see no key                        sm90/forward/epilogue.cuh
//
// A kernel before it sets a counter, or plans the visits of intervals: sm90/forward/prologue.cuh. The host's part:
// launch.cuh.
#pragma once
#include "fagen/abi/forward_fp8.h"
#include "fagen/sm90/forward_fp8/layout.cuh"
#include "fagen/sm90/forward/epilogue.cuh"
#include "fagen/sm90/forward/producer.cuh"
#include "fagen/sm90/forward_fp8/consumer.cuh"

namespace fagen {

template <class C>
struct Fp8Producer : Producer<C> {
  // One warp loads values: the blocks of a tile's keys are one box.
  __device__ __forceinline__ void run_value_producer() {
    this->follow([&](const RowTile<C>& row_tile, const auto& walk) {
      auto& pipe = this->pipelines.v;
      if (threadIdx.x % 32 == 0) {
        pipe.acquire();
        pipe.expect_bytes();
        ptx::tma_load_packed(pipe.tile(), &this->launch.v, pipe.full(), 0, walk.key / kBlockKeys, row_tile.kv_head,
                             row_tile.coord.batch);
      }
      pipe.advance();
    });
  }
};

template <class C, class Element>
__device__ __forceinline__ void run_block(const fagen_forward_fp8_params& given, const LaunchArgs& launch,
                                          unsigned char* shared) {
  using L = BlockLayout<C>;
  const fagen_forward_params& p = given.forward;
  const uint32_t smem = (ptx::shared_address(shared) + kSmemAlignment - 1) & ~uint32_t(kSmemAlignment - 1);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // warp-uniform for the compiler as well
  if (threadIdx.x == 0) {
    ptx::prefetch_map(&launch.q);
    ptx::prefetch_map(&launch.k);
    ptx::prefetch_map(&launch.v);
    Pipelines<C>(smem).init();
  }
  __syncthreads();
  ptx::start_next_kernel();
  if (!has_prologue<C>(launch)) ptx::wait_for_previous_kernel();
  if (group == L::kGroups) {
    ptx::fewer_registers<L::kProducerRegisters>();
    Fp8Producer<C> producer{{p, launch, Pipelines<C>(smem), Band(p)}};
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
    Fp8Consumer<C, Element>(given, launch, smem, group).run();
  }
}

}  // namespace fagen
