// A decode launch on the host: the tensor maps of the cache, the plan of splits, both kernels.
#pragma once
#include "fagen/host/prepare.cuh"
#include "fagen/sm80/decode/plan.cuh"
#include "fagen/sm90/decode/kernel.cuh"
#include "fagen/sm90/map_cache.cuh"

namespace fagen {

using DecodeKernel = void (*)(fagen_decode_params, DecodeGrid, CUtensorMap, CUtensorMap);
using MergeKernel = void (*)(fagen_decode_params, DecodeGrid);

template <class C>
static cudaError_t launch_decode(const fagen_decode_params& p, int resident, CUtensorMapDataType type,
                                 cudaStream_t stream, DecodeKernel decode, MergeKernel merge) {
  using L = DecodeLayout<C>;
  DecodePlan<C> plan(p, resident);
  const int64_t blocks = plan.tiles * plan.grid.splits;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX || plan.tiles > INT32_MAX / merge_blocks<C>(p, plan.grid.splits))
    return cudaErrorInvalidConfiguration;
  plan.assign(p.workspace);
  CUtensorMap k, v;
  if (const cudaError_t e = map_cache<C>(&k, type, p, p.k, p.head_dim)) return e;
  if (const cudaError_t e = map_cache<C>(&v, type, p, p.v, p.head_dim_v)) return e;
  decode<<<unsigned(blocks), L::kThreads, L::kSmemBytes, stream>>>(p, plan.grid, k, v);
  if (plan.grid.splits > 1)
    return launch_kernel(merge, int(plan.tiles) * merge_blocks<C>(p, plan.grid.splits), kCombineThreads, 0, stream, p,
                         plan.grid);
  return cudaGetLastError();
}

}  // namespace fagen
