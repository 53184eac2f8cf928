// The host's part of a forward kernel for Hopper whose blocks share keys.
#pragma once
#include "fagen/host/split_keys.cuh"
#include "fagen/sm90/forward/launch.cuh"
#include "fagen/sm90/forward/split_keys.cuh"

namespace fagen {

template <class C>
static SplitPlan<C> plan_split(const fagen_forward_params& p, int resident) {
  constexpr int kMacsPerCycle = 1500;
  const int row_tiles = count_row_tiles<C>(p) * (p.heads / packed_heads<C>(p)) * p.batch;
  return SplitPlan<C>(p, row_tiles, resident / C::kBlocksPerSm, kMacsPerCycle);
}

template <class C>
static LaunchArgs split_args(const fagen_forward_params& p, int row_tiles) {
  LaunchArgs launch;
  const int packed = packed_heads<C>(p);
  launch.packed = Divisor(packed), launch.tile_rows = C::kTileM / packed * packed;
  launch.row_tiles = count_row_tiles<C>(p), launch.tiles = row_tiles;
  const int heads = p.heads / packed;
  launch.order = TileOrder::of<C::kBlockOrder>(launch.row_tiles, heads, p.batch, heads);
  launch.heads_per_kv_head = Divisor(heads / p.kv_heads);
  return launch;
}

using MergeKernel = void (*)(fagen_forward_params, LaunchArgs, int);

// Each kernel may begin before the one before it in the stream has ended, and waits for that itself.
template <class C>
static cudaError_t launch_split_forward(const fagen_forward_params& p, cudaStream_t stream, CUtensorMapDataType type,
                                        int resident, Kernel forward, MergeKernel merge) {
  using L = BlockLayout<C>;
  const SplitPlan<C> plan = plan_split<C>(p, resident);
  if (plan.row_tiles == 0) return cudaSuccess;
  LaunchArgs launch = split_args<C>(p, plan.row_tiles);
  if (p.seqlen_k > 0) {
    if (const cudaError_t e = make_maps<C>(p, type, launch)) return e;
    if (const cudaError_t e = plan.template launch<true>(forward, L::kThreads, L::kSmemBytes, stream, p, launch))
      return e;
    if (plan.parts == 1) return cudaSuccess;
  }
  return launch_kernel(merge, plan.row_tiles * kMergeBlocks<C>, kMergeThreads, 0, stream, p, launch, plan.parts);
}

}  // namespace fagen
