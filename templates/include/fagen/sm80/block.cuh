// What one block works on and where its tiles lie: shapes, shared memory, the warp's share. Shared by both loop orders.
#pragma once
#include "fagen/attend.cuh"
#include "fagen/copy.cuh"
#include "fagen/schedule.cuh"
#include "fagen/walk.cuh"

constexpr int larger(int a, int b) { return a > b ? a : b; }

struct True {
  static constexpr bool value = true;
};
struct False {
  static constexpr bool value = false;
};

// Sizes that follow from the config; Python derives the same ones, and the asserts below hold the two together.
template <class C>
struct Shape {
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
  using TileQ = SharedTile<C::kTileM, C::kHeadDim, kSwizzled>;
  using TileK = SharedTile<C::kTileN, C::kHeadDim, kSwizzled>;
  using TileV = SharedTile<C::kTileN, C::kHeadDimV, kSwizzled>;
  using TileO = SharedTile<C::kTileM, C::kHeadDimV, kSwizzled>;

  // q held in registers passes through the ring before the first keys arrive, so it needs no room of its own
  static constexpr bool kQAliasesRing = C::kLoopOrder == LoopOrder::q_outer && C::kQSource == QSource::registers;
  static constexpr int kStageBytes = TileK::kBytes + TileV::kBytes;
  static constexpr int kRing = kQAliasesRing ? 0 : TileQ::kBytes;  // where the ring of K and V stages begins
  static constexpr int kRingEnd = kRing + C::kStages * kStageBytes;
  // pairs: the weights that two warps show each other, and their rows' maxima and sums
  using TileP = SharedTile<C::kTileM, C::kTileN, kSwizzled>;
  static constexpr int kPairStats = kRingEnd + (kPairs ? TileP::kBytes : 0);
  static constexpr int kPairEnd = kPairStats + (kPairs ? 2 * C::kTileM * 4 : 0);
  static constexpr int kMergeStats = C::kTileM * C::kHeadDimV * 4;  // split_k: sums of O, then maxima and sums
  static constexpr int kMergeBytes = kSplitKeys ? kMergeStats + C::kWarps * C::kTileM * 8 : 0;
  static constexpr int kSmemBytes = larger(larger(kPairEnd, TileQ::kBytes), larger(TileO::kBytes, kMergeBytes));

  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
};

// Computed once on the host for a launch.
struct Launch {
  int row_tiles;  // tiles of rows of a head
  int blocks_of_rows;  // blocks a head gets: row_tiles, or fewer when a block loops over rows
  int key_tiles;
  int heads_at_once;  // sectioned order
  Extent* extents;  // of the intervals, tile by tile
  float4* state;  // kv_outer: O, maxima and sums between the passes
};

template <class C, class Element>
struct Block {
  using S = Shape<C>;
  using State = Attend<C, S::kSlabs, S::kWarpKeys, S::kWarpColumns, Element, typename S::TileQ, typename S::TileK,
                       typename S::TileV>;

  const fagen_params& p;
  const Launch& launch;
  Work work;
  int warp, first_row, first_key, first_column;  // of the warp's share in the tiles
  uint32_t smem;
  unsigned char* smem_bytes;
  Rows<Element> q, k, v;
  Band band;
  ScoreMod<C> mod;
  Intervals<C> intervals;

  __device__ __forceinline__ Block(const fagen_params& p, const Launch& launch, unsigned char* shared)
      : p(p),
        launch(launch),
        work(take_work<C::kBlockOrder>(p, blockIdx.x, launch.blocks_of_rows, launch.heads_at_once)),
        warp(__shfl_sync(~0u, threadIdx.x / 32, 0)),  // warp-uniform for the compiler as well
        smem(ptx::shared_address(shared)),
        smem_bytes(shared),
        band(p),
        mod(p, work.batch, work.head) {
    first_row = S::kSplitKeys ? 0 : (S::kPairs ? warp / 2 : warp) * S::kWarpRows;
    first_key = S::kSplitKeys ? warp * S::kWarpKeys : S::kPairs ? warp % 2 * S::kWarpKeys : 0;
    first_column = S::kPairs ? warp % 2 * S::kWarpColumns : 0;
    const int kv_head = work.head / (p.heads / p.kv_heads);
    q = rows(p.q, p.q_stride, work.head, p.seqlen_q, p.head_dim);
    k = rows(p.k, p.k_stride, kv_head, p.seqlen_k, p.head_dim);
    v = rows(p.v, p.v_stride, kv_head, p.seqlen_k, p.head_dim_v);
    if constexpr (C::kMask == Mask::intervals) {
      const int head = p.mask_heads == 1 ? 0 : kv_head;
      intervals.bounds = p.intervals + work.batch * p.intervals_stride[0] + head * p.intervals_stride[1];
      intervals.stride = p.intervals_stride[2];
      intervals.extents =
          launch.extents + int64_t(work.batch * p.mask_heads + head) * launch.key_tiles * C::kIntervalColumns;
      intervals.last_key = p.seqlen_k - 1;
    }
  }

  __device__ __forceinline__ Rows<Element> rows(const void* base, const int64_t (&stride)[3], int head, int count,
                                                int cols) const {
    const Element* first = static_cast<const Element*>(base) + work.batch * stride[0] + head * stride[2];
    return {first, stride[1], count, cols};
  }

  // ---- copies: each is one part of a group that the caller commits
  __device__ __forceinline__ void load_q(uint32_t to, int row_tile) const {
    load_tile<typename S::TileQ, C::kTileM, S::kThreads, C::kAligned>(to, q, row_tile * C::kTileM, threadIdx.x);
  }
  __device__ __forceinline__ uint32_t k_tile(int stage) const { return smem + S::kRing + stage * S::kStageBytes; }
  __device__ __forceinline__ uint32_t v_tile(int stage) const { return k_tile(stage) + S::TileK::kBytes; }
  __device__ __forceinline__ void load_k(int stage, int tile) const {
    load_tile<typename S::TileK, C::kTileN, S::kThreads, C::kAligned>(k_tile(stage), k, tile * C::kTileN, threadIdx.x);
  }
  __device__ __forceinline__ void load_v(int stage, int tile) const {
    load_tile<typename S::TileV, C::kTileN, S::kThreads, C::kAligned>(v_tile(stage), v, tile * C::kTileN, threadIdx.x);
  }
  // All copies of this thread but the newest kPending groups have landed, and so have those of the others.
  template <int kPending>
  __device__ __forceinline__ void arrive() const {
    ptx::cp_async_wait<kPending>();
    __syncthreads();
  }
};

template <class C>
__device__ __forceinline__ int next_stage(int stage) {
  return stage == C::kStages - 1 ? 0 : stage + 1;
}

// The walk over the tiles that rows [m0, m1) see, at its first tile.
template <class C, class Element>
__device__ __forceinline__ auto first_tile(const Block<C, Element>& block, const TileRange& range, int m0, int m1) {
  if constexpr (C::kMask == Mask::intervals)
    return IntervalWalk<C>(block.intervals, range, m0, m1);
  else
    return RangeWalk{range.end - 1, range.begin};
}

// Call visit(tile, masked) for the rest of the walk, with a loop of its own for tiles that need no mask.
template <class C, class Walk, class Visit>
__device__ __forceinline__ void visit_tiles(Walk& walk, const TileRange& range, Visit visit) {
  if constexpr (C::kMask == Mask::intervals) {
    for (; walk.valid(); walk.advance()) walk.partial() ? visit(walk.tile, True{}) : visit(walk.tile, False{});
  } else {
    for (; walk.valid() && walk.tile >= range.full_end; walk.advance()) visit(walk.tile, True{});
    for (; walk.tile >= range.full_begin; walk.advance()) visit(walk.tile, False{});
    if constexpr (C::kMask == Mask::window)
      for (; walk.valid(); walk.advance()) visit(walk.tile, True{});
  }
}
