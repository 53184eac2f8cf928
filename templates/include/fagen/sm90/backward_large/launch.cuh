// The host's part of the backward kernels for large head dims: workspace, tensor maps, grids.
#pragma once
#include "fagen/host/launch.cuh"
#include "fagen/host/prepare.cuh"
#include "fagen/host/tensor_map.cuh"
#include "fagen/sm90/backward_large/kernel.cuh"
#include "fagen/sm90/backward_large/prologue.cuh"

namespace fagen {

constexpr int64_t kSectionBytes = 32 << 20;  // what the blocks of a section of heads visit: what stays in L2

// The workspace: the stats of all rows, in whole tiles of those who own rows and of those who visit them; with
// intervals, the extents of all tiles of keys.
template <class C>
struct LargeWorkspace {
  int stats_rows, key_tiles;
  uint64_t stats, extents;  // bytes of each

  static int rows_of(int seqlen_q) {
    constexpr int kOwn = ClusterConfig<C>::kTileOwn, kOther = C::kTileOther;
    const int owned = ceil_div(seqlen_q, kOwn) * kOwn, visited = ceil_div(seqlen_q, kOther) * kOther;
    return owned > visited ? owned : visited;
  }
  explicit LargeWorkspace(const fagen_backward_params& p)
      : stats_rows(rows_of(p.seqlen_q)),
        key_tiles(ceil_div(p.seqlen_k, C::kTileOther)),
        stats(align_workspace(sizeof(RowStats) * p.batch * p.heads * stats_rows)),
        extents(0) {
    if (MaskOf<C>::kIntervals)
      extents = align_workspace(sizeof(Extent) * key_tiles * p.batch * p.mask_heads * C::kIntervalColumns);
  }
};

// Masks are those of the forward call.
static fagen_forward_params forward_of(const fagen_backward_params& p) {
  fagen_forward_params f = {};
  f.intervals = p.intervals, f.mask_heads = p.mask_heads;
  f.batch = p.batch, f.heads = p.heads, f.kv_heads = p.kv_heads, f.seqlen_q = p.seqlen_q, f.seqlen_k = p.seqlen_k;
  f.window_left = p.window_left, f.window_right = p.window_right;
  return f;
}

// Maps as wide as the caller's rows are: what lies beyond is filled with zeros. Without rows or keys there is nothing
// to map, and nothing is loaded.
template <class P>
static cudaError_t make_pass_maps(const fagen_backward_params& p, CUtensorMapDataType type, PassLaunch& launch) {
  using L = PassLayout<P>;
  if (p.seqlen_q == 0 || p.seqlen_k == 0) return cudaSuccess;
  const auto make = [&](CUtensorMap* map, const fagen_tensor& t, int columns, bool keys, int box) {
    const Dimension rows = {keys ? p.seqlen_k : p.seqlen_q, t.stride[1], box};
    const Dimension heads = {keys ? p.kv_heads : p.heads, t.stride[2], 1};
    return make_map(map, type, t.data, columns, {rows, heads, {p.batch, t.stride[0], 1}});
  };
  constexpr bool kKeys = P::kOwnsKeys;
  constexpr int kPart = L::kBlockOther / P::kCluster;
  const fagen_tensor& rows = P::kOf == Gradient::dq ? p.k : P::kOf == Gradient::dk ? p.q : p.dout;
  const int columns = L::kOfWeights ? p.head_dim_v : p.head_dim;
  if (const cudaError_t e = make(&launch.own_scores, kKeys ? p.k : p.q, p.head_dim, kKeys, kGroupRows)) return e;
  if (const cudaError_t e = make(&launch.own_weights, kKeys ? p.v : p.dout, p.head_dim_v, kKeys, kGroupRows)) return e;
  if (const cudaError_t e = make(&launch.scores, kKeys ? p.q : p.k, p.head_dim, !kKeys, kPart)) return e;
  if (const cudaError_t e = make(&launch.weights, kKeys ? p.dout : p.v, p.head_dim_v, !kKeys, kPart)) return e;
  return make(&launch.rows, rows, columns, !kKeys, L::kSumRows);
}

using PassKernel = void (*)(fagen_backward_params, PassLaunch);

// A pass over all rows or keys. Rows that share keys visit the same ones.
template <class P>
static cudaError_t launch_pass(PassKernel kernel, const fagen_backward_params& p, PassLaunch launch,
                               CUtensorMapDataType type, cudaStream_t stream) {
  using L = PassLayout<P>;
  int ready;
  const auto prepare = [&](int, int& done) {
    done = 1;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kSmemBytes);
  };
  if (const cudaError_t e = once_per_device(&ready, prepare)) return e;
  if (const cudaError_t e = make_pass_maps<P>(p, type, launch)) return e;
  const int group = p.heads / p.kv_heads;
  launch.forward.heads = P::kOwnsKeys ? p.kv_heads : p.heads;
  launch.own_tiles = ceil_div(P::kOwnsKeys ? p.seqlen_k : p.seqlen_q, P::kTileOwn);
  const int heads = launch.forward.heads * p.batch;
  const int64_t visited = (P::kOwnsKeys ? int64_t(p.seqlen_q) * group : p.seqlen_k) * (p.head_dim + p.head_dim_v) * 2;
  const int64_t fit = visited > 0 ? kSectionBytes / visited : heads;
  const int64_t at_once = (fit < 1 ? 1 : fit) * (P::kOwnsKeys ? 1 : group);
  launch.heads_at_once = at_once < heads ? int(at_once) : heads;
  const int blocks = launch.own_tiles * heads * L::kSplits * P::kCluster;
  if (blocks == 0) return cudaSuccess;
  return launch_kernel<L::kClusterBlocks, false>(kernel, blocks, L::kThreads, L::kSmemBytes, stream, p, launch);
}

struct LargeKernels {
  void (*prologue)(fagen_backward_params, RowStats*, int);
  void (*extents)(fagen_forward_params, Extent*, int);
  PassKernel dq, dk, dv;
};

template <class C>
static int launch_large(const fagen_backward_params& p, cudaStream_t stream, CUtensorMapDataType type,
                        const LargeKernels& kernels) {
  const LargeWorkspace<C> sizes(p);
  PassLaunch launch = {};
  RowStats* stats = static_cast<RowStats*>(p.workspace);
  Extent* extents = reinterpret_cast<Extent*>(static_cast<char*>(p.workspace) + sizes.stats);
  launch.forward = forward_of(p), launch.stats = stats, launch.extents = extents;
  launch.stats_rows = sizes.stats_rows, launch.key_tiles = sizes.key_tiles;
  constexpr int kWarps = kPrologueThreads / 32;
  const auto blocks = [](int64_t warps) { return int(ceil_div(warps, kWarps)); };
  if (const int64_t rows = int64_t(p.batch) * p.heads * sizes.stats_rows)
    if (const cudaError_t e = launch_kernel<1, false>(kernels.prologue, blocks(rows), kPrologueThreads, 0, stream, p,
                                                      stats, sizes.stats_rows))
      return e;
  if (sizes.extents)
    if (const cudaError_t e =
            launch_kernel<1, false>(kernels.extents, blocks(int64_t(sizes.key_tiles) * p.batch * p.mask_heads),
                                    kPrologueThreads, 0, stream, launch.forward, extents, sizes.key_tiles))
      return e;
  if (const cudaError_t e = launch_pass<LargePass<C, Gradient::dq>>(kernels.dq, p, launch, type, stream)) return e;
  if (const cudaError_t e = launch_pass<LargePass<C, Gradient::dk>>(kernels.dk, p, launch, type, stream)) return e;
  return launch_pass<LargePass<C, Gradient::dv>>(kernels.dv, p, launch, type, stream);
}

}  // namespace fagen
