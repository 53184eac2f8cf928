// The calls of the kernels: their arguments, the tensors of a head, the copies of a block's tiles.
#pragma once
#include "fagen/abi/backward.h"
#include "fagen/ptx/cp_async.cuh"
#include "fagen/sm80/backward/cells.cuh"
#include "fagen/sm80/backward/row_walk.cuh"
#include "fagen/sm80/backward/shape.cuh"
#include "fagen/sm80/copy.cuh"

namespace fagen {

// Computed once on the host for a launch.
struct GradientArgs {
  fagen_forward_params forward;  // the forward call as masks and scores read it
  int row_tiles, key_tiles;
  int stats_rows;     // a head's rows of stats: whole tiles
  RowStats* stats;    // (batch, heads, stats_rows)
  float* dq_sum;      // (batch, heads, row_tiles) tiles of fragments, see sums.cuh; null with a kernel of its own
  float* dk_sum;      // (batch, kv_heads, key_tiles) tiles of fragments; null where blocks own whole groups
  float* dv_sum;
  Extent* extents;    // intervals: of each key tile of the kernel for dQ
  float4* zeros;      // the sums, which the prologue clears
  int64_t zero_count;
};

template <class Element>
__device__ __forceinline__ GlobalMatrix<Element> matrix(const fagen_tensor& t, int batch, int head, int rows,
                                                        int cols) {
  return {static_cast<const Element*>(t.data) + batch * t.stride[0] + head * t.stride[2], t.stride[1], rows, cols};
}

// A head's mask, its intervals included. `extents` are those of (batch, mask_heads, key tiles).
template <class C>
__device__ __forceinline__ MaskOf<C> mask_of(const GradientArgs& args, int batch, int kv_head, const Extent* extents,
                                             int key_tiles) {
  const fagen_forward_params& p = args.forward;
  MaskOf<C> mask(p);
  if constexpr (MaskOf<C>::kIntervals) {
    const int head = p.mask_heads == 1 ? 0 : kv_head;
    mask.intervals.bounds = bounds_of(p, batch, head);
    mask.intervals.stride = p.intervals.stride[2];
    mask.intervals.extents = extents + int64_t(batch * p.mask_heads + head) * key_tiles * C::kIntervalColumns;
    mask.intervals.last_key = p.seqlen_k - 1;
  }
  return mask;
}

// The tile of a block: all of a head side by side, or each tile of all heads, the longest ones first.
struct BlockCoord {
  int tile, head, batch;

  template <BlockOrder kOrder, bool kLongestLast>
  static __device__ __forceinline__ BlockCoord of(unsigned index, int tiles, int heads, int batch) {
    const unsigned all = heads * batch;
    unsigned tile = index % tiles, head = index / tiles;
    if constexpr (kOrder == BlockOrder::longest_first) {
      tile = index / all, head = index % all;
      if constexpr (kLongestLast) tile = tiles - 1 - tile;
    }
    return {int(tile), int(head % heads), int(head / heads)};
  }
};

// Start copying `kRows` rows' stats to shared memory.
template <int kRows, int kThreads>
__device__ __forceinline__ void load_stats(uint32_t to, const RowStats* from) {
  static_assert(kRows / 2 <= kThreads, "one copy a thread");
  const int i = threadIdx.x;
  if (i < kRows / 2) ptx::cp_async_16(to + i * 16, from + i * 2, true);
}

}  // namespace fagen
