// The host's part of the forward kernel for large head dims: workspace, tensor maps, grid.
#pragma once
#include "fagen/host/launch.cuh"
#include "fagen/host/prepare.cuh"
#include "fagen/host/tensor_map.cuh"
#include "fagen/sm90/forward_large/kernel.cuh"

namespace fagen {

constexpr int64_t kSectionBytes = 32 << 20;  // keys and values of a section of heads: what stays in L2

// The workspace: with intervals, the extents of all tiles of keys.
template <class C>
static uint64_t large_workspace(const fagen_forward_params& p) {
  if (!MaskOf<C>::kIntervals) return 0;
  const uint64_t tiles = ceil_div(p.seqlen_k, C::kTileN);
  return align_workspace(sizeof(Extent) * tiles * p.batch * p.mask_heads * C::kIntervalColumns);
}

// Maps of q, k and v, as wide as the caller's rows are: what lies beyond is filled with zeros. Without keys there is
// nothing to map, and nothing is loaded.
template <class C>
static cudaError_t make_large_maps(const fagen_forward_params& p, CUtensorMapDataType type, LargeLaunch& launch) {
  using L = LargeLayout<C>;
  if (p.seqlen_k == 0) return cudaSuccess;
  const auto make = [&](CUtensorMap* map, const fagen_tensor& t, int columns, int length, int heads, int box) {
    const Dimension rows = {length, t.stride[1], box};
    return make_map(map, type, t.data, columns, {rows, {heads, t.stride[2], 1}, {p.batch, t.stride[0], 1}});
  };
  if (const cudaError_t e = make(&launch.q, p.q, p.head_dim, p.seqlen_q, p.heads, L::kRows)) return e;
  if (const cudaError_t e = make(&launch.k, p.k, p.head_dim, p.seqlen_k, p.kv_heads, L::kBlockKeys / C::kCluster))
    return e;
  return make(&launch.v, p.v, p.head_dim_v, p.seqlen_k, p.kv_heads, L::kValueKeys);
}

using LargeKernel = void (*)(fagen_forward_params, LargeLaunch);

template <class C, class Element>
static cudaError_t launch_large(const fagen_forward_params& p, cudaStream_t stream, CUtensorMapDataType type,
                                LargeKernel extents, LargeKernel forward) {
  using L = LargeLayout<C>;
  int ready;
  const auto prepare = [&](int, int&) {
    return cudaFuncSetAttribute(forward, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kSmemBytes);
  };
  if (const cudaError_t e = once_per_device(&ready, prepare)) return e;
  if (p.batch == 0 || p.seqlen_q == 0) return cudaSuccess;
  LargeLaunch launch;
  if (const cudaError_t e = make_large_maps<C>(p, type, launch)) return e;
  const int heads = p.heads * p.batch, group = p.heads / p.kv_heads;
  launch.row_tiles = ceil_div(p.seqlen_q, LargeTask<C>::kClusterRows);
  launch.key_tiles = ceil_div(p.seqlen_k, C::kTileN);
  launch.extents = static_cast<Extent*>(p.workspace);
  const int64_t head_bytes = int64_t(p.seqlen_k) * (p.head_dim + p.head_dim_v) * sizeof(Element);
  const int64_t fit = head_bytes > 0 ? kSectionBytes / head_bytes : heads;
  const int64_t at_once = (fit < 1 ? 1 : fit) * group;
  launch.heads_at_once = at_once < heads ? int(at_once) : heads;
  if (MaskOf<C>::kIntervals && launch.key_tiles > 0) {
    const int64_t warps = int64_t(launch.key_tiles) * p.batch * p.mask_heads;
    if (const cudaError_t e = launch_kernel<1, false>(extents, int(ceil_div(warps, 8)), 256, 0, stream, p, launch))
      return e;
  }
  const int clusters = launch.row_tiles * heads * (L::kPeers ? 1 : C::kOutputSplits);
  return launch_kernel<L::kClusterBlocks, false>(forward, clusters * L::kClusterBlocks, L::kThreads, L::kSmemBytes,
                                                 stream, p, launch);
}

}  // namespace fagen
