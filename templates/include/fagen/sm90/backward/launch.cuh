// The host's part of the backward kernel: workspace, tensor maps, grids.
#pragma once
#include "fagen/host/launch.cuh"
#include "fagen/host/prepare.cuh"
#include "fagen/host/tensor_map.cuh"
#include "fagen/sm90/backward/epilogue.cuh"
#include "fagen/sm90/backward/kernel.cuh"
#include "fagen/sm90/backward/prologue.cuh"

namespace fagen {

// How many blocks share the query heads of a kv head, so that all SMs have work: the fewest that divide them evenly.
// With shared operands dK and dV are in no order that could be summed.
template <class C>
static int group_splits(const fagen_backward_params& p) {
  const int group = p.kv_heads > 0 ? p.heads / p.kv_heads : 1;
  int sms = 0;
  const auto find = [](int device, int& count) {
    return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  };
  if (kSharedOperands<C> || group == 1 || once_per_device(&sms, find)) return 1;
  const int64_t blocks = int64_t(ceil_div(p.seqlen_k, C::kTileN)) * p.kv_heads * p.batch;
  int splits = 1;
  while (splits < group && (group % splits || blocks * splits * 2 < sms * 3)) ++splits;
  return splits;
}

// The workspace: dQ in float32, the LSE and delta of every row, turns, what splits have of dK and dV.
template <class C>
struct BackwardWorkspace {
  uint64_t lse, delta, turns, partial, end;

  BackwardWorkspace(const fagen_backward_params& p, int splits) {
    const uint64_t tiles = uint64_t(ceil_div(p.seqlen_q, C::kTileM)) * p.heads * p.batch;
    const auto next = [&](uint64_t begin, uint64_t bytes_a_tile) { return align_workspace(begin + tiles * bytes_a_tile); };
    lse = next(0, DqShare<C>::kTileFloats * sizeof(float));
    delta = next(lse, C::kTileM * sizeof(float));
    turns = next(delta, C::kTileM * sizeof(float));
    partial = next(turns, C::kDeterministic || BackwardLayout<C>::kRoundsDq ? DqShare<C>::kGroups * sizeof(unsigned) : 0);
    const uint64_t keys = uint64_t(ceil_div(p.seqlen_k, C::kTileN)) * C::kTileN * p.kv_heads * p.batch;
    const uint64_t gradients = keys * (C::kHeadDim + C::kHeadDimV) * sizeof(float);
    end = align_workspace(partial + (splits > 1 ? splits * gradients : 0));
  }
  void assign(char* workspace, BackwardLaunch& launch) const {
    launch.dq = reinterpret_cast<float*>(workspace);
    launch.lse = reinterpret_cast<float*>(workspace + lse);
    launch.delta = reinterpret_cast<float*>(workspace + delta);
    launch.turns = reinterpret_cast<unsigned*>(workspace + turns);
    launch.partial = reinterpret_cast<float*>(workspace + partial);
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

// The heads of a section (sectioned order): as many as leave room for their rows of q, dO and dQ, in sections of about
// the same size, since a small last one would begin its longest blocks late. Blocks of the same kv head go through its
// query heads together, so that one of them counts.
template <class C, class Element>
static int heads_of_section(const fagen_backward_params& p, int heads) {
  const int64_t row = (p.head_dim + p.head_dim_v) * int64_t(sizeof(Element)) + p.head_dim * int64_t(sizeof(float));
  const int64_t all = int64_t(heads) * p.batch, fit = (int64_t(C::kSectionMb) << 20) / (row * p.seqlen_q);
  const int64_t sections = ceil_div<int64_t>(all, fit < 1 ? 1 : fit);
  return int(ceil_div(all, sections));
}

using BackwardKernel = void (*)(fagen_backward_params, BackwardLaunch);

struct BackwardKernels {
  BackwardKernel prologue, backward, epilogue, sum_groups, zero;
};

template <class C, class Element>
static int launch_backward(const fagen_backward_params& p, cudaStream_t stream, CUtensorMapDataType type,
                           const BackwardKernels& kernels) {
  using L = BackwardLayout<C>;
  int ready;
  const auto prepare = [&](int, int& done) {
    done = 1;
    return cudaFuncSetAttribute(kernels.backward, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kSmemBytes);
  };
  if (const cudaError_t e = once_per_device(&ready, prepare)) return e;
  BackwardLaunch launch;
  if (p.batch == 0) return cudaSuccess;
  if (p.seqlen_q == 0 || p.seqlen_k == 0) return launch_kernel(kernels.zero, 128, 256, 0, stream, p, launch);
  if (const cudaError_t e = make_maps<C>(p, type, launch)) return e;
  launch.row_tiles = ceil_div(p.seqlen_q, C::kTileM), launch.key_tiles = ceil_div(p.seqlen_k, C::kTileN);
  const int splits = group_splits<C>(p), heads = p.kv_heads * splits;
  launch.splits = Divisor(splits);
  launch.order = TileOrder::of<C::kBlockOrder>(launch.key_tiles, heads, p.batch, heads_of_section<C, Element>(p, heads));
  BackwardWorkspace<C>(p, splits).assign(static_cast<char*>(p.workspace), launch);
  const int rows = launch.row_tiles * p.heads * p.batch, keys = launch.key_tiles * heads * p.batch;
  if (const cudaError_t e = launch_kernel(kernels.prologue, rows, kPrologueThreads, 0, stream, p, launch)) return e;
  if (const cudaError_t e = launch_kernel(kernels.backward, keys, L::kThreads, L::kSmemBytes, stream, p, launch)) return e;
  if (splits > 1) {
    const int sums = launch.key_tiles * C::kWarpgroups * p.kv_heads * p.batch * GroupSums<C>::kBlocks;
    if (const cudaError_t e = launch_kernel(kernels.sum_groups, sums, 128, 0, stream, p, launch)) return e;
  }
  if (L::kRoundsDq) return cudaSuccess;
  return launch_kernel(kernels.epilogue, rows * DqShare<C>::kRowChunks, 128, 0, stream, p, launch);
}

}  // namespace fagen
