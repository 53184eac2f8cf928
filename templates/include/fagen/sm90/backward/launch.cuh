// The host's part of the backward kernel: workspace, tensor maps, grids.
#pragma once
#include "fagen/host/launch.cuh"
#include "fagen/host/prepare.cuh"
#include "fagen/host/tensor_map.cuh"
#include "fagen/sm90/backward/epilogue.cuh"
#include "fagen/sm90/backward/kernel.cuh"
#include "fagen/sm90/backward/prologue.cuh"
#include "fagen/sm90/backward/splits.cuh"

namespace fagen {

// The heads of a section (sectioned order): as many as leave room for their rows of q, dO and dQ, in sections of about
// the same size, since a small last one would begin its longest blocks late. Blocks of the same kv head go through its
// query heads together, so that one of them counts; those that share visits are at several, at most at all of them.
template <class C>
static int heads_of_section(const fagen_backward_params& p, int splits) {
  const int64_t all = int64_t(p.kv_heads) * p.batch, group = p.heads / p.kv_heads;
  const int64_t at_once = (splits < group ? splits : group) * int64_t(p.seqlen_q) * kVisitedRowBytes<C>;
  const int64_t fit = (int64_t(C::kSectionMb) << 20) / at_once;
  const int64_t sections = ceil_div<int64_t>(all, fit < 1 ? 1 : fit);
  return int(ceil_div(all, sections));
}

// The workspace: dQ in float32, the LSE and delta of every row, turns, and by which key tiles these go.
template <class C>
struct BackwardWorkspace {
  uint64_t lse, delta, turns, seen, end;
  int seen_words;

  explicit BackwardWorkspace(const fagen_backward_params& p) {
    const uint64_t tiles = uint64_t(ceil_div(p.seqlen_q, C::kTileM)) * p.heads * p.batch;
    const auto next = [&](uint64_t begin, uint64_t bytes_a_tile) {
      return align_workspace(begin + tiles * bytes_a_tile);
    };
    lse = next(0, DqShare<C>::kTileFloats * sizeof(float));
    delta = next(lse, C::kTileM * sizeof(float));
    turns = next(delta, C::kTileM * sizeof(float));
    seen = next(turns, C::kDeterministic || BackwardLayout<C>::kRoundsDq ? DqShare<C>::kGroups * sizeof(unsigned) : 0);
    seen_words = kTurnsBySeen<C> ? ceil_div(ceil_div(p.seqlen_k, C::kTileN), 32) : 0;
    end = next(seen, seen_words * sizeof(unsigned));
  }
  void assign(char* workspace, BackwardLaunch& launch) const {
    launch.dq = reinterpret_cast<float*>(workspace);
    launch.lse = reinterpret_cast<float*>(workspace + lse);
    launch.delta = reinterpret_cast<float*>(workspace + delta);
    launch.turns = reinterpret_cast<unsigned*>(workspace + turns);
    launch.seen = reinterpret_cast<unsigned*>(workspace + seen), launch.seen_words = seen_words;
  }
};

template <class C>
static cudaError_t make_maps(const fagen_backward_params& p, CUtensorMapDataType type, BackwardLaunch& launch) {
  const auto map = [&](CUtensorMap* to, const fagen_tensor& t, int columns, int length, int box, int heads) {
    const Dimension rows = {length, t.stride[1], box};
    return make_map(to, type, t.data, columns, {rows, {heads, t.stride[2], 1}, {p.batch, t.stride[0], 1}});
  };
  if (const cudaError_t e = map(&launch.q, p.q, p.head_dim, p.seqlen_q, C::kTileM, p.heads)) return e;
  if (const cudaError_t e = map(&launch.dout, p.dout, p.head_dim_v, p.seqlen_q, C::kTileM, p.heads)) return e;
  if (const cudaError_t e = map(&launch.k, p.k, p.head_dim, p.seqlen_k, C::kTileN, p.kv_heads)) return e;
  return map(&launch.v, p.v, p.head_dim_v, p.seqlen_k, C::kTileN, p.kv_heads);
}

using BackwardKernel = void (*)(fagen_backward_params, BackwardLaunch);

struct BackwardKernels {
  BackwardKernel prologue, backward, epilogue, zero;
};

template <class C, class Element>
static int launch_backward(const fagen_backward_params& p, cudaStream_t stream, CUtensorMapDataType type,
                           const BackwardKernels& kernels) {
  using L = BackwardLayout<C>;
  ResidentBlocks gpu;
  const auto prepare = [&](int device, ResidentBlocks& found) {
    constexpr auto kSmem = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (const cudaError_t e = cudaFuncSetAttribute(kernels.backward, kSmem, L::kSmemBytes)) return e;
    return count_blocks<C>(kernels.backward, device, found);
  };
  if (const cudaError_t e = once_per_device(&gpu, prepare)) return e;
  BackwardLaunch launch;
  if (p.batch == 0) return cudaSuccess;
  if (p.seqlen_q == 0 || p.seqlen_k == 0) return launch_kernel(kernels.zero, 128, 256, 0, stream, p, launch);
  if (const cudaError_t e = make_maps<C>(p, type, launch)) return e;
  launch.row_tiles = ceil_div(p.seqlen_q, C::kTileM), launch.key_tiles = ceil_div(p.seqlen_k, C::kTileN);
  launch.one_key_tile = launch.key_tiles == 1 && !L::kIntervals && !kSharedOperands<C> && !kLoaderHasDq<C>;
  const int splits = choose_splits<C>(p, gpu);
  launch.splits = Divisor(splits);
  launch.order = TileOrder::of<C::kBlockOrder>(launch.key_tiles, p.kv_heads, p.batch, heads_of_section<C>(p, splits));
  BackwardWorkspace<C>(p).assign(static_cast<char*>(p.workspace), launch);
  const int rows = launch.row_tiles * p.heads * p.batch, blocks = launch.key_tiles * p.kv_heads * p.batch * splits;
  if (const cudaError_t e = launch_kernel(kernels.prologue, rows, kPrologueThreads, 0, stream, p, launch)) return e;
  // the blocks that share the visits of a key tile are a cluster
  if (const cudaError_t e =
          launch_clusters(splits, true, kernels.backward, blocks, L::kThreads, L::kSmemBytes, stream, p, launch))
    return e;
  if (BackwardLayout<C>::kRoundsDq || launch.one_key_tile) return cudaSuccess;
  return launch_kernel(kernels.epilogue, rows * DqShare<C>::kRowChunks, 128, 0, stream, p, launch);
}

}  // namespace fagen
