// A launch of latent decode on the host: the tensor map of the cache, the plan of splits, both kernels.
#pragma once
#include "fagen/host/prepare.cuh"
#include "fagen/sm80/decode/plan.cuh"
#include "fagen/sm90/map_cache.cuh"
#include "fagen/sm90/mla/kernel.cuh"

namespace fagen {

using MlaKernel = void (*)(fagen_decode_params, DecodeGrid, CUtensorMap);
using MergeKernel = void (*)(fagen_decode_params, DecodeGrid);

// Two splits, if so many are the kernel's own choice, are a cluster, which needs no workspace.
template <class C>
struct LatentPlan : DecodePlan<C> {
  LatentPlan(const fagen_decode_params& p, int sms) : DecodePlan<C>(p, sms) {
    this->grid.clustered = p.num_splits == 0 && this->grid.splits == 2;
    if (this->grid.clustered) this->stats_bytes = this->sums_bytes = 0;
  }
};

template <class C>
static cudaError_t launch_latent(const fagen_decode_params& p, int sms, CUtensorMapDataType type, cudaStream_t stream,
                                 MlaKernel decode, MergeKernel merge) {
  using L = MlaLayout<C>;
  LatentPlan<C> plan(p, sms);
  const int64_t blocks = plan.tiles * plan.grid.splits;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX || plan.tiles > INT32_MAX / merge_blocks<C>(p, plan.grid.splits))
    return cudaErrorInvalidConfiguration;
  plan.assign(p.workspace);
  CUtensorMap map;
  if (const cudaError_t e = map_cache<C>(&map, type, p, p.k, C::kHeadDim)) return e;
  const int cluster = plan.grid.clustered ? plan.grid.splits : 1;
  const cudaError_t e =
      launch_clusters(cluster, false, decode, int(blocks), L::kThreads, L::kSmemBytes, stream, p, plan.grid, map);
  if (e || plan.grid.splits == cluster) return e;
  return launch_kernel(merge, int(plan.tiles) * merge_blocks<C>(p, plan.grid.splits), kCombineThreads, 0, stream, p,
                       plan.grid);
}

}  // namespace fagen
