// sm80_forward: attention forward for forward/bf16/d64/intervals-lower1 on sm_90
//
// Symbols: m rows of q, n keys; S = scale * Q K^T the scores, P = exp(S - max) the weights, O = P V / sum P.
// Names: kCamel is known at compile time, snake_case at run time; *_log2 lives in the base-2 logarithm.
//
// Config: tile_m=128 tile_n=64 warps=4 partition=split_q loop_order=q_outer stages=2 overlap=False q_source=shared smem_layout=swizzled blocks_per_sm=2 rescale=deferred block_order=longest_first splits=none

namespace fagen {

enum class Mask { none, causal, window, intervals };
enum class Partition { split_q, split_k, pairs };
enum class LoopOrder { q_outer, kv_outer };
enum class QSource { shared, registers };
enum class SmemLayout { swizzled, padded };
enum class Rescale { each, deferred };
enum class BlockOrder { ascending, descending, longest_first, sectioned };

struct Config {
  static constexpr int kHeadDim = 64;  // of q and k, padded
  static constexpr int kHeadDimV = 64;  // of v and o, padded
  static constexpr Mask kMask = Mask::intervals;  // which cells are visible
  static constexpr bool kSoftcap = false;  // s -> softcap * tanh(s / softcap)
  static constexpr bool kAlibi = false;  // s -> s - slope * distance from the diagonal
  static constexpr bool kDropout = false;  // weights are dropped at random
  static constexpr bool kAligned = true;  // rows are whole, aligned 16-byte pieces
  static constexpr int kIntervalColumns = 1;  // bounds a key carries
  static constexpr int kLTS = 0;  // column of LTS in intervals, -1: absent
  static constexpr int kLTE = -1;  // column of LTE in intervals, -1: absent
  static constexpr int kUTS = -1;  // column of UTS in intervals, -1: absent
  static constexpr int kUTE = -1;  // column of UTE in intervals, -1: absent
  static constexpr int kTileM = 128;  // rows of q a block works on
  static constexpr int kTileN = 64;  // keys a block loads at a time
  static constexpr int kWarps = 4;  // warps of a block
  static constexpr Partition kPartition = Partition::split_q;  // what the warps of a block divide
  static constexpr LoopOrder kLoopOrder = LoopOrder::q_outer;  // what stays while the other passes by
  static constexpr int kStages = 2;  // tiles of keys in shared memory
  static constexpr bool kOverlap = false;  // compute the next tile's scores under this one's softmax
  static constexpr QSource kQSource = QSource::shared;  // where q waits for its products
  static constexpr SmemLayout kSmemLayout = SmemLayout::swizzled;  // how shared memory avoids bank conflicts
  static constexpr int kBlocksPerSm = 2;  // blocks the register budget is cut for
  static constexpr Rescale kRescale = Rescale::deferred;  // when O follows a grown maximum
  static constexpr BlockOrder kBlockOrder = BlockOrder::longest_first;  // order of row tiles and heads
};

// Sizes that fagen derived from the config before compiling; the kernel asserts that it agrees.
struct Derived {
  static constexpr int threads = 128;
  static constexpr int smem_bytes = 49152;
};

}  // namespace fagen

using namespace fagen;  // the kernel is this one file

#include <cuda_runtime.h>

#include "fagen/abi/forward.h"
#include "fagen/host/launch.cuh"
#include "fagen/host/prepare.cuh"
#include "fagen/sm80/forward/q_outer.cuh"
#include "fagen/sm80/forward/q_outer_overlapped.cuh"
#include "fagen/sm80/forward/kv_outer.cuh"

namespace fagen {

using Element = bfloat_t;
using Shape = BlockShape<Config>;

// One block takes one row tile of one head (q_outer), or a run of them (kv_outer).
__global__ void __launch_bounds__(Shape::kThreads, Config::kBlocksPerSm)
forward_kernel(const __grid_constant__ fagen_forward_params p, const __grid_constant__ GridArgs grid) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const Block<Config, Element> block(p, grid, shared);
  if constexpr (Config::kLoopOrder == LoopOrder::kv_outer)
    run_kv_outer(block);
  else if constexpr (Config::kOverlap)
    run_q_outer_overlapped(block);
  else
    run_q_outer(block);
}

__global__ void extents_kernel(const __grid_constant__ fagen_forward_params p, Extent* extents, int tiles) {
  find_extents<Config>(p, extents, tiles);
}

// ---- host ----------------------------------------------------------------------------------------------------------

static uint64_t extents_bytes(const fagen_forward_params& p) {
  if (!MaskOf<Config>::kIntervals) return 0;
  const uint64_t tiles = ceil_div(p.seqlen_k, Config::kTileN);
  return align_workspace(sizeof(Extent) * tiles * p.batch * p.mask_heads * Config::kIntervalColumns);
}

static uint64_t state_bytes(const fagen_forward_params& p) {
  if (Config::kLoopOrder != LoopOrder::kv_outer) return 0;
  const uint64_t tiles = ceil_div(p.seqlen_q, Config::kTileM);
  return align_workspace(sizeof(float4) * StoredState<Config, Element>::kFloat4s * tiles * p.batch * p.heads);
}

struct Device {
  int units, l2_bytes;
};

// Asks the device for its numbers, and for more shared memory than the default.
static cudaError_t prepare(int index, Device& device) {
  if (const cudaError_t e = cudaDeviceGetAttribute(&device.units, cudaDevAttrMultiProcessorCount, index)) return e;
  if (const cudaError_t e = cudaDeviceGetAttribute(&device.l2_bytes, cudaDevAttrL2CacheSize, index)) return e;
  return cudaFuncSetAttribute(forward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSmemBytes);
}

static cudaError_t launch_forward(const fagen_forward_params& p, cudaStream_t stream) {
  Device device;
  if (const cudaError_t e = once_per_device(&device, prepare)) return e;
  const int heads = p.heads * p.batch;
  GridArgs grid;
  grid.row_tiles = ceil_div(p.seqlen_q, Config::kTileM);
  grid.key_tiles = ceil_div(p.seqlen_k, Config::kTileN);
  grid.blocks_of_rows = grid.row_tiles;
  if (Config::kLoopOrder == LoopOrder::kv_outer) {  // as few blocks a head as still fill the machine
    const int wanted = ceil_div(device.units * Config::kBlocksPerSm, heads);
    grid.blocks_of_rows = wanted < grid.row_tiles ? wanted : grid.row_tiles;
  }
  // as many heads at once as fit half of L2 with their keys and values, whole groups of heads that share them
  const int64_t head_bytes = int64_t(p.seqlen_k) * (p.head_dim + p.head_dim_v) * sizeof(Element);
  const int64_t fit = device.l2_bytes / 2 / head_bytes;
  const int64_t at_once = (fit < 1 ? 1 : fit) * (p.heads / p.kv_heads);
  grid.heads_at_once = at_once < heads ? int(at_once) : heads;
  grid.extents = static_cast<Extent*>(p.workspace);
  grid.state = reinterpret_cast<float4*>(static_cast<char*>(p.workspace) + extents_bytes(p));
  if constexpr (MaskOf<Config>::kIntervals) {
    const int64_t warps = int64_t(grid.key_tiles) * p.batch * p.mask_heads;
    extents_kernel<<<unsigned(ceil_div(warps, 8)), 256, 0, stream>>>(p, grid.extents, grid.key_tiles);
  }
  forward_kernel<<<unsigned(grid.blocks_of_rows) * heads, Shape::kThreads, Shape::kSmemBytes, stream>>>(p, grid);
  return cudaGetLastError();
}

}  // namespace fagen

extern "C" uint64_t fagen_workspace_bytes(const fagen_forward_params* p) {
  return fagen::extents_bytes(*p) + fagen::state_bytes(*p);
}

extern "C" const char* fagen_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

extern "C" int fagen_launch(const fagen_forward_params* p, void* stream) {
  return fagen::launch_forward(*p, static_cast<cudaStream_t>(stream));
}

// Name, offset and size of every field of the params, as this compiler laid them out.
#include <stddef.h>
#include <stdio.h>

extern "C" const char* fagen_params_layout(void) {
  static char text[943];
  static const char* const told = [] {
    char* end = text;
#define FAGEN_FIELD(field) \
  end += snprintf(end, text + sizeof text - end, "%s %zu %zu; ", #field, offsetof(fagen_forward_params, field), \
                  sizeof(fagen_forward_params::field))
    FAGEN_FIELD(q.data); FAGEN_FIELD(q.stride); FAGEN_FIELD(k.data); FAGEN_FIELD(k.stride); FAGEN_FIELD(v.data);
    FAGEN_FIELD(v.stride); FAGEN_FIELD(o.data); FAGEN_FIELD(o.stride); FAGEN_FIELD(intervals.data);
    FAGEN_FIELD(intervals.stride); FAGEN_FIELD(alibi_slopes.data); FAGEN_FIELD(alibi_slopes.stride);
    FAGEN_FIELD(lse); FAGEN_FIELD(workspace); FAGEN_FIELD(batch); FAGEN_FIELD(heads); FAGEN_FIELD(kv_heads);
    FAGEN_FIELD(mask_heads); FAGEN_FIELD(seqlen_q); FAGEN_FIELD(seqlen_k); FAGEN_FIELD(head_dim);
    FAGEN_FIELD(head_dim_v); FAGEN_FIELD(window_left); FAGEN_FIELD(window_right); FAGEN_FIELD(scale);
    FAGEN_FIELD(softcap); FAGEN_FIELD(dropout); FAGEN_FIELD(rng);
#undef FAGEN_FIELD
    snprintf(end, text + sizeof text - end, "sizeof %zu", sizeof(fagen_forward_params));
    return text;
  }();
  return told;
}
