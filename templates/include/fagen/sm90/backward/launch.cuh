// The host's part of the backward kernel: workspace, tensor maps, grids.
#pragma once
#include "fagen/host/launch.cuh"
#include "fagen/host/prepare.cuh"
#include "fagen/host/tensor_map.cuh"
#include "fagen/sm90/backward/epilogue.cuh"
#include "fagen/sm90/backward/kernel.cuh"
#include "fagen/sm90/backward/prologue.cuh"

namespace fagen {

constexpr int kMostSplits = 8;  // blocks of a cluster on every GPU
// Bytes that blocks may read and add to at a time: more than L2 has, since some are not needed yet or no longer.
constexpr int64_t kCachedBytes = 64 << 20;

// Bytes of a head's rows of q, dO and dQ.
static int64_t bytes_of_head(const fagen_backward_params& p) {
  return ((p.head_dim + p.head_dim_v) * int64_t(2) + p.head_dim * int64_t(sizeof(float))) * p.seqlen_q;
}

// How many blocks share the query heads of a kv head: the fewest that divide them evenly, give all SMs work and keep in
// L2 what the blocks of all SMs read and add to. Each goes through its heads at a pace of its own, so that all heads of
// the kv heads at work count. With shared operands dK and dV are in no order that could be summed.
template <class C>
static int group_splits(const fagen_backward_params& p) {
  const int group = p.kv_heads > 0 ? p.heads / p.kv_heads : 1;
  int sms = 0;
  const auto find = [](int device, int& count) {
    return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  };
  if (!BackwardLayout<C>::kSplitsGroups || group == 1 || once_per_device(&sms, find)) return 1;
  const int64_t all = int64_t(p.kv_heads) * p.batch, key_tiles = ceil_div(p.seqlen_k, C::kTileN);
  const auto enough = [&](int splits) {
    const int64_t at_work = ceil_div<int64_t>(sms, key_tiles * splits);
    const bool in_cache = (at_work < all ? at_work : all) * group * bytes_of_head(p) <= kCachedBytes;
    return all * key_tiles * splits * 2 >= sms * 3 && in_cache;
  };
  int splits = 1;
  for (int more = 2; more <= group && more <= kMostSplits && !enough(splits); ++more)
    if (group % more == 0) splits = more;
  return splits;
}

// The heads of a section (sectioned order): as many as leave room for their rows of q, dO and dQ, in sections of about
// the same size, since a small last one would begin its longest blocks late. Blocks of the same kv head go through its
// query heads together, so that one of them counts, or one for each split.
template <class C>
static int heads_of_section(const fagen_backward_params& p, int splits) {
  const int64_t all = int64_t(p.kv_heads) * p.batch, fit = (int64_t(C::kSectionMb) << 20) / (bytes_of_head(p) * splits);
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
  launch.one_key_tile = launch.key_tiles == 1 && !L::kIntervals && !kSharedOperands<C> && !kLoaderHasDq<C>;
  const int splits = group_splits<C>(p);
  launch.splits = Divisor(splits);
  launch.order = TileOrder::of<C::kBlockOrder>(launch.key_tiles, p.kv_heads, p.batch, heads_of_section<C>(p, splits));
  BackwardWorkspace<C>(p).assign(static_cast<char*>(p.workspace), launch);
  const int rows = launch.row_tiles * p.heads * p.batch, blocks = launch.key_tiles * p.kv_heads * p.batch * splits;
  if (const cudaError_t e = launch_kernel(kernels.prologue, rows, kPrologueThreads, 0, stream, p, launch)) return e;
  // the blocks that share the query heads of a kv head are a cluster
  if (const cudaError_t e =
          launch_clusters(splits, true, kernels.backward, blocks, L::kThreads, L::kSmemBytes, stream, p, launch))
    return e;
  if (BackwardLayout<C>::kRoundsDq || launch.one_key_tile) return cudaSuccess;
  return launch_kernel(kernels.epilogue, rows * DqShare<C>::kRowChunks, 128, 0, stream, p, launch);
}

}  // namespace fagen
