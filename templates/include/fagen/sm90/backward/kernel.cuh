// The backward kernel for Hopper: a block has one tile of keys, and visits the row tiles that see them.
//
//   warpgroups 0 .. kGroups - 1   consumers: 64 keys each                                 consumer.cuh
//                               or, with shared operands, some columns of a head        shared_consumer.cuh
//   the last one, warp 0          loads k, and q with its LSE and delta                   producer.cuh
//                 warp 1          loads v and dO (with three consumers warp 0 loads       producer.cuh
//                                 these as well)
//                 its last warps  bulk sink: one a consumer, adds its dQ to memory        dq.cuh
//                                 deterministic: waits for its turn to do so, or for the consumer's
//                 or all of it    computes dQ                                             dq_loader.cuh
//
// A kernel before it computes delta; where no block rounds dQ, that one sets it to zero, and one after it rounds it:
// prologue.cuh, epilogue.cuh. The host's part: launch.cuh.
#pragma once
#include "fagen/sm90/backward/consumer.cuh"
#include "fagen/sm90/backward/dq_loader.cuh"
#include "fagen/sm90/backward/producer.cuh"
#include "fagen/sm90/backward/shared_consumer.cuh"

namespace fagen {

template <class C, class Element, bool kShared = kSharedOperands<C>>
struct SelectedConsumer {
  using Type = BackwardConsumer<C, Element>;
};
template <class C, class Element>
struct SelectedConsumer<C, Element, true> {
  using Type = SharedConsumer<C, Element>;
};
template <class C, class Element>
using SelectConsumer = typename SelectedConsumer<C, Element>::Type;

template <class C, class Element>
__device__ __forceinline__ void run_backward_block(const fagen_backward_params& p, const BackwardLaunch& launch,
                                                   unsigned char* shared) {
  using L = BackwardLayout<C>;
  const uint32_t smem = (ptx::shared_address(shared) + kSmemAlignment - 1) & ~uint32_t(kSmemAlignment - 1);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // warp-uniform for the compiler as well
  const int warp = __shfl_sync(~0u, threadIdx.x % 128 / 32, 0);
  if (threadIdx.x == 0) {
    ptx::prefetch_map(&launch.q);
    ptx::prefetch_map(&launch.k);
    ptx::prefetch_map(&launch.v);
    ptx::prefetch_map(&launch.dout);
    BackwardPipelines<C>(smem, 0).init();
  }
  ptx::start_next_kernel();
  // k, v and dO were there before the first kernel began: each warp waits for that one where it reads what it writes
  if (L::kIntervals && threadIdx.x < 32) load_intervals<C>(p, launch, smem, blockIdx.x);
  __syncthreads();
  const RowBand band(p);
  const KeyTile<C> keys(launch, band, smem, blockIdx.x);
  if (group == L::kGroups) {
    ptx::fewer_registers<L::kProducerRegisters>();
    BackwardProducer<C> producer{p, launch, keys, BackwardPipelines<C>(smem, 0)};
    if constexpr (kLoaderHasDq<C>) return DqLoader<C, Element>{producer, warp}.run();
    const int owner = warp - (4 - L::kGroups);
    const bool first_lane = threadIdx.x % 32 == 0;
    if (warp == 0) {
      if (first_lane) L::kGroups == 3 ? producer.run_both() : producer.run_q();
    } else if (L::kGroups < 3 && warp == 1) {
      if (first_lane) producer.run_dout();
    } else if ((C::kDqSink == DqSink::bulk || kRedInTurns<C>) && owner >= 0 && DqShare<C>{owner}.owns()) {
      ptx::wait_for_previous_kernel();
      const BackwardPipelines<C> of_owner(smem, owner);
      if constexpr (C::kDqSink == DqSink::bulk)
        DqDrain<C, Element>{p, launch, keys, band, {owner}, of_owner}.run();
      else if constexpr (kRedInTurns<C>)
        DqTurns<C>{p, launch, keys, band, {owner}, of_owner}.run();
    }
    if (kMostSplits<C> > 1 && keys.splits > 1) SplitSums<C>::attend();
  } else {
    ptx::more_registers<L::kConsumerRegisters>();
    ptx::wait_for_previous_kernel();
    SelectConsumer<C, Element>(p, launch, keys, band, smem, group).run();
  }
}

}  // namespace fagen
