// A block's tiles and a warp's share of them: sizes, shared memory, copies. Both loop orders use it.
#pragma once
#include "fagen/common/warp_products.cuh"
#include "fagen/ptx/barrier.cuh"
#include "fagen/schedule/tile_order.cuh"
#include "fagen/sm80/copy.cuh"
#include "fagen/sm80/smem_tile.cuh"

namespace fagen {

constexpr int larger(int a, int b) { return a > b ? a : b; }

// Sizes that follow from the config; Python derives the same ones, and the asserts below hold the two together.
template <class C>
struct BlockShape {
  static constexpr int kThreads = C::kWarps * 32;
  static constexpr bool kSplitKeys = C::kPartition == Partition::split_k;
  static constexpr bool kPairs = C::kPartition == Partition::pairs;
  // a warp's share: rows of q, keys of a tile (for S), columns of v (for O)
  static constexpr int kWarpRows = kSplitKeys ? C::kTileM : C::kTileM / C::kWarps * (kPairs ? 2 : 1);
  static constexpr int kWarpKeys = kSplitKeys ? C::kTileN / C::kWarps : C::kTileN / (kPairs ? 2 : 1);
  static constexpr int kWarpColumns = C::kHeadDimV / (kPairs ? 2 : 1);
  static constexpr int kSlabs = kWarpRows / 16;
  static_assert(kWarpRows % 16 == 0 && kWarpKeys % 16 == 0 && kWarpColumns % 16 == 0,
                "a warp's share is made of 16 x 16 pieces");

  static constexpr bool kSwizzled = C::kSmemLayout == SmemLayout::swizzled;
  using TileQ = SmemTile<C::kTileM, C::kHeadDim, kSwizzled>;
  using TileK = SmemTile<C::kTileN, C::kHeadDim, kSwizzled>;
  using TileV = SmemTile<C::kTileN, C::kHeadDimV, kSwizzled>;
  using TileO = SmemTile<C::kTileM, C::kHeadDimV, kSwizzled>;

  // q held in registers passes through the stages before the first keys arrive, so it needs no room of its own
  static constexpr bool kQAliasesStages = C::kLoopOrder == LoopOrder::q_outer && C::kQSource == QSource::registers;
  static constexpr int kStageBytes = TileK::kBytes + TileV::kBytes;
  static constexpr int kStagesBegin = kQAliasesStages ? 0 : TileQ::kBytes;  // the stages of K and V
  static constexpr int kStagesEnd = kStagesBegin + C::kStages * kStageBytes;
  // pairs: the weights that two warps exchange, and their rows' maxima and sums
  using TileP = SmemTile<C::kTileM, C::kTileN, kSwizzled>;
  static constexpr int kPairStats = kStagesEnd + (kPairs ? TileP::kBytes : 0);
  static constexpr int kPairEnd = kPairStats + (kPairs ? 2 * C::kTileM * 4 : 0);
  static constexpr int kMergeStats = C::kTileM * C::kHeadDimV * 4;  // split_k: sums of O, then maxima and sums
  static constexpr int kMergeBytes = kSplitKeys ? kMergeStats + C::kWarps * C::kTileM * 8 : 0;
  static constexpr int kSmemBytes = larger(larger(kPairEnd, TileQ::kBytes), larger(TileO::kBytes, kMergeBytes));

  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
};

// Computed once on the host for a launch.
struct GridArgs {
  int row_tiles;       // per head
  int blocks_of_rows;  // blocks a head gets: row_tiles, or fewer when a block loops over rows
  int key_tiles;
  int heads_at_once;   // sectioned order
  Extent* extents;     // intervals: of each key tile
  float4* state;       // kv_outer: O, maxima and sums between the passes
};

template <class C, class Element>
struct Block {
  using S = BlockShape<C>;
  using State = WarpProducts<C, Element, typename S::TileQ, typename S::TileK, typename S::TileV, S::kSlabs,
                             S::kWarpKeys, S::kWarpColumns>;

  const fagen_forward_params& p;
  const GridArgs& grid;
  TileCoord coord;
  int warp, first_row, first_key, first_column;  // the warp's share of the tiles
  uint32_t smem;
  unsigned char* smem_bytes;
  GlobalMatrix<Element> q, k, v;
  MaskOf<C> mask;
  ScoreMod<C> mod;

  __device__ __forceinline__ Block(const fagen_forward_params& p, const GridArgs& grid, unsigned char* shared)
      : p(p),
        grid(grid),
        coord(tile_at<C::kBlockOrder>(p, blockIdx.x, grid.blocks_of_rows, grid.heads_at_once)),
        warp(__shfl_sync(~0u, threadIdx.x / 32, 0)),  // warp-uniform for the compiler as well
        smem(ptx::shared_address(shared)),
        smem_bytes(shared),
        mask(p),
        mod(p, coord.batch, coord.head) {
    first_row = S::kSplitKeys ? 0 : (S::kPairs ? warp / 2 : warp) * S::kWarpRows;
    first_key = S::kSplitKeys ? warp * S::kWarpKeys : S::kPairs ? warp % 2 * S::kWarpKeys : 0;
    first_column = S::kPairs ? warp % 2 * S::kWarpColumns : 0;
    const int kv_head = coord.head / (p.heads / p.kv_heads);
    q = matrix(p.q.data, p.q.stride, coord.head, p.seqlen_q, p.head_dim);
    k = matrix(p.k.data, p.k.stride, kv_head, p.seqlen_k, p.head_dim);
    v = matrix(p.v.data, p.v.stride, kv_head, p.seqlen_k, p.head_dim_v);
    if constexpr (MaskOf<C>::kIntervals) {
      const int head = p.mask_heads == 1 ? 0 : kv_head;
      mask.intervals.bounds = bounds_of(p, coord.batch, head);
      mask.intervals.stride = p.intervals.stride[2];
      mask.intervals.extents =
          grid.extents + int64_t(coord.batch * p.mask_heads + head) * grid.key_tiles * C::kIntervalColumns;
      mask.intervals.last_key = p.seqlen_k - 1;
    }
  }

  __device__ __forceinline__ GlobalMatrix<Element> matrix(const void* base, const int64_t (&stride)[3], int head,
                                                          int rows, int cols) const {
    const Element* first = static_cast<const Element*>(base) + coord.batch * stride[0] + head * stride[2];
    return {first, stride[1], rows, cols};
  }

  // ---- copies: each is one part of a group that the caller commits
  __device__ __forceinline__ void load_q(uint32_t to, int row_tile) const {
    load_tile<typename S::TileQ, C::kTileM, S::kThreads, C::kAligned>(to, q, row_tile * C::kTileM, threadIdx.x);
  }
  __device__ __forceinline__ uint32_t k_tile(int stage) const {
    return smem + S::kStagesBegin + stage * S::kStageBytes;
  }
  __device__ __forceinline__ uint32_t v_tile(int stage) const { return k_tile(stage) + S::TileK::kBytes; }
  __device__ __forceinline__ void load_k(int stage, int tile) const {
    load_tile<typename S::TileK, C::kTileN, S::kThreads, C::kAligned>(k_tile(stage), k, tile * C::kTileN, threadIdx.x);
  }
  __device__ __forceinline__ void load_v(int stage, int tile) const {
    load_tile<typename S::TileV, C::kTileN, S::kThreads, C::kAligned>(v_tile(stage), v, tile * C::kTileN, threadIdx.x);
  }
  // Wait until all copies of the block but each thread's newest kPending groups have landed.
  template <int kPending>
  __device__ __forceinline__ void wait_copies() const {
    ptx::cp_async_wait<kPending>();
    __syncthreads();
  }
};

template <class C>
__device__ __forceinline__ int next_stage(int stage) {
  return stage == C::kStages - 1 ? 0 : stage + 1;
}

}  // namespace fagen
