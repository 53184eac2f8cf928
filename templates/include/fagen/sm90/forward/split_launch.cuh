// The host's part of a forward kernel whose blocks share keys: how many parts, the workspace, both kernels.
#pragma once
#include "fagen/sm90/forward/launch.cuh"
#include "fagen/sm90/forward/split_keys.cuh"

namespace fagen {

constexpr int kMostParts = 128;

// The number of parts with the least cycles, by a model: the SM with the most blocks works through their key tiles,
// each block costs its start and, of several parts, a store of O in float32, which the merge reads again. Row tiles
// that fill the SMs are not split.
template <class C>
static int choose_parts(int row_tiles, int key_tiles, int resident) {
  constexpr int kStart = 1500, kMerge = 3000, kMostBlocks = 8;
  constexpr int kVisit = C::kTileM * C::kTileN / 64 * (C::kHeadDim + C::kHeadDimV) / 24 + 200;
  constexpr int kBytesPerCycle = 32;  // that an SM writes to L2 or reads from it
  constexpr int kPart = 2 * C::kTileM * C::kHeadDimV * 4 / kBytesPerCycle;
  const int sms = resident / C::kBlocksPerSm, most = key_tiles < kMostParts ? key_tiles : kMostParts;
  if (row_tiles >= sms) return 1;
  int best = 1;
  int64_t least = int64_t(key_tiles) * kVisit + kStart;
  for (int blocks = 1; blocks <= kMostBlocks; ++blocks) {  // on an SM
    const int fit = blocks * sms / row_tiles, parts = fit < most ? fit : most;
    const int64_t cycles = blocks * (int64_t(ceil_div(key_tiles, parts)) * kVisit + kStart + kPart) + kMerge;
    if (cycles < least) best = parts, least = cycles;
  }
  return best;
}

// The parts of a launch, and their place in the workspace.
template <class C>
struct SplitPlan {
  int row_tiles;                  // of all heads
  int first_tile, key_tiles = 0;  // that any row sees
  int part_tiles = 1, parts = 1;
  uint64_t stats_bytes = 0, sums_bytes = 0;

  SplitPlan(const fagen_forward_params& p, int resident) {
    row_tiles = count_row_tiles<C>(p) * (p.heads >> packed_heads<C>(p)) * p.batch;
    const int first_key = p.seqlen_k - p.seqlen_q - p.window_left;  // of the first row
    first_tile = MaskOf<C>::kHasBegin && p.window_left >= 0 && first_key > 0 ? first_key / C::kTileN : 0;
    if (p.seqlen_k > first_tile * C::kTileN) key_tiles = ceil_div(p.seqlen_k, C::kTileN) - first_tile;
    if (key_tiles == 0 || row_tiles == 0) return;
    part_tiles = ceil_div(key_tiles, choose_parts<C>(row_tiles, key_tiles, resident));
    parts = ceil_div(key_tiles, part_tiles);  // all of them hold keys
    if (parts == 1) return;
    const uint64_t rows = uint64_t(row_tiles) * parts * C::kTileM;
    stats_bytes = align_workspace(rows * sizeof(float2));
    sums_bytes = align_workspace(rows * C::kHeadDimV * sizeof(float));
  }
  uint64_t bytes() const { return stats_bytes + sums_bytes; }
};

template <class C>
static cudaError_t make_args(const fagen_forward_params& p, const SplitPlan<C>& plan, CUtensorMapDataType type,
                             SplitLaunchArgs& launch) {
  launch.packed = packed_heads<C>(p);
  launch.row_tiles = count_row_tiles<C>(p), launch.tiles = plan.row_tiles;
  const int heads = p.heads >> launch.packed;
  launch.order = TileOrder::of<C::kBlockOrder>(launch.row_tiles, heads, p.batch, heads);
  launch.heads_per_kv_head = Divisor(heads / p.kv_heads);
  launch.first_tile = plan.first_tile, launch.part_tiles = plan.part_tiles;
  launch.stats = static_cast<float2*>(p.workspace);
  launch.sums = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + plan.stats_bytes);
  return plan.key_tiles > 0 ? make_maps<C>(p, type, launch) : cudaSuccess;
}

using SplitKernel = void (*)(fagen_forward_params, SplitLaunchArgs);
using MergeKernel = void (*)(fagen_forward_params, SplitLaunchArgs, int);

// Each kernel may begin before the one before it in the stream has ended, and waits for that itself.
template <class C>
static cudaError_t launch_split_forward(const fagen_forward_params& p, cudaStream_t stream, CUtensorMapDataType type,
                                        int resident, SplitKernel forward, MergeKernel merge) {
  using L = BlockLayout<C>;
  const SplitPlan<C> plan(p, resident);
  if (plan.row_tiles == 0) return cudaSuccess;
  SplitLaunchArgs launch;
  if (const cudaError_t e = make_args<C>(p, plan, type, launch)) return e;
  if (plan.key_tiles > 0) {
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    const dim3 grid(plan.row_tiles, plan.parts);
    const cudaLaunchConfig_t config = {grid, dim3(L::kThreads), size_t(L::kSmemBytes), stream, &early, 1};
    if (const cudaError_t e = cudaLaunchKernelEx(&config, forward, p, launch)) return e;
    if (plan.parts == 1) return cudaSuccess;
  }
  return launch_kernel(merge, plan.row_tiles * kMergeBlocks<C>, kMergeThreads, 0, stream, p, launch, plan.parts);
}

}  // namespace fagen
