// A decode launch on the host: the kernels of a plan.
#pragma once
#include "fagen/host/launch.cuh"
#include "fagen/host/prepare.cuh"
#include "fagen/sm80/decode/finish.cuh"
#include "fagen/sm80/decode/plan.cuh"

namespace fagen {

using DecodeKernel = void (*)(fagen_decode_params, DecodeGrid);

template <class C>
static cudaError_t launch_decode(const fagen_decode_params& p, int resident, cudaStream_t stream, DecodeKernel decode,
                                 DecodeKernel combine) {
  DecodePlan<C> plan(p, resident);
  const int64_t blocks = plan.tiles * plan.grid.splits;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  plan.assign(p.workspace);
  if (plan.arrived_bytes)
    if (const cudaError_t e = cudaMemsetAsync(plan.grid.arrived, 0, plan.arrived_bytes, stream)) return e;
  using S = DecodeShape<C>;
  if (plan.grid.clustered && plan.grid.splits > 1)  // the splits of a tile
    return launch_clusters(plan.grid.splits, false, decode, int(blocks), S::kThreads, S::kSmemBytes, stream, p,
                           plan.grid);
  decode<<<unsigned(blocks), S::kThreads, S::kSmemBytes, stream>>>(p, plan.grid);
  if (C::kMergedBy != MergedBy::last_block && plan.grid.splits > 1) {
    if constexpr (Derived::early)
      return launch_kernel(combine, int(plan.tiles), kCombineThreads, 0, stream, p, plan.grid);
    else
      combine<<<unsigned(plan.tiles), kCombineThreads, 0, stream>>>(p, plan.grid);
  }
  return cudaGetLastError();
}

}  // namespace fagen
