// A block's share of a pass: its own tile, the matrices of both sides, and the walk over the other side's tiles.
#pragma once
#include "fagen/mask/mask.cuh"
#include "fagen/simt/backward/shape.cuh"
#include "fagen/simt/tile_copy.cuh"
#include "fagen/sm80/backward/row_walk.cuh"

namespace fagen {

template <class P, class Element>
struct PassBlock {
  using Shape = PassShape<P>;
  using Tensor = Matrix<Element>;

  const fagen_backward_params& p;
  const GradientArgs& args;
  int batch, head, kv_head;  // head: of q, for dQ; else the first of the group
  int tile, first;           // the own tile, and its first row or key
  float* shared;
  MaskOf<P> mask;

  // The tiles that all rows have most of to do come first: the last rows, or the first keys, of every head.
  __device__ __forceinline__ PassBlock(const fagen_backward_params& p, const GradientArgs& args, unsigned char* bytes)
      : p(p), args(args), shared(reinterpret_cast<float*>(bytes)), mask(args.forward) {
    const int heads = P::kOwnsKeys ? p.kv_heads : p.heads, group = p.heads / p.kv_heads;
    const int all = heads * p.batch, tiles = ((P::kOwnsKeys ? p.seqlen_k : p.seqlen_q) + P::kTileOwn - 1) / P::kTileOwn;
    const int own_head = blockIdx.x % all % heads;
    batch = blockIdx.x % all / heads;
    tile = P::kOwnsKeys ? blockIdx.x / all : tiles - 1 - int(blockIdx.x / all);
    first = tile * P::kTileOwn;
    head = P::kOwnsKeys ? own_head * group : own_head;
    kv_head = P::kOwnsKeys ? own_head : own_head / group;
    if constexpr (MaskOf<P>::kIntervals) {
      const int of_mask = p.mask_heads == 1 ? 0 : kv_head;
      mask.intervals.bounds = bounds_of(args.forward, batch, of_mask);
      mask.intervals.stride = p.intervals.stride[2];
      mask.intervals.extents =
          args.extents + int64_t(batch * p.mask_heads + of_mask) * args.key_tiles * P::kIntervalColumns;
      mask.intervals.last_key = p.seqlen_k - 1;
    }
  }

  // Rows of q and k, whose products are the scores; and of dout and v, whose products are the weights' gradients.
  __device__ __forceinline__ Tensor q(int h) const { return head_of<Element>(p.q, batch, h, p.seqlen_q, p.head_dim); }
  __device__ __forceinline__ Tensor k() const { return head_of<Element>(p.k, batch, kv_head, p.seqlen_k, p.head_dim); }
  __device__ __forceinline__ Tensor v() const {
    return head_of<Element>(p.v, batch, kv_head, p.seqlen_k, p.head_dim_v);
  }
  __device__ __forceinline__ Tensor dout(int h) const {
    return head_of<Element>(p.dout, batch, h, p.seqlen_q, p.head_dim_v);
  }
  __device__ __forceinline__ Tensor gradient() const {
    if constexpr (P::kOf == Gradient::dq) return head_of<Element>(p.dq, batch, head, p.seqlen_q, p.head_dim);
    if constexpr (P::kOf == Gradient::dk) return head_of<Element>(p.dk, batch, kv_head, p.seqlen_k, p.head_dim);
    return head_of<Element>(p.dv, batch, kv_head, p.seqlen_k, p.head_dim_v);
  }
};

// The walk of a block that owns rows, over the tiles of keys that they see.
template <class P>
struct KeyWalk {
  TileRange range;
  typename MaskOf<P>::Walk walk;
  int head;

  template <class Block>
  __device__ __forceinline__ explicit KeyWalk(const Block& block)
      : range(TileRange::of<P::kTileN>(block.mask.band, block.first, end(block))),
        walk(block.mask.walk(range, block.first, end(block))),
        head(block.head) {}
  template <class Block>
  static __device__ __forceinline__ int end(const Block& block) {
    return min(block.first + P::kTileM, block.p.seqlen_q);
  }
  __device__ __forceinline__ int tile() const { return walk.tile; }
  __device__ __forceinline__ bool valid() const { return walk.valid(); }
  __device__ __forceinline__ bool partial() const { return walk.partial(range); }
  __device__ __forceinline__ void advance() { walk.advance(); }
};

// The walk of a block that owns keys, over the tiles of rows that see them, of one head of the group after the other.
template <class P>
struct RowWalk {
  const MaskOf<P>& mask;
  KeyTileMask<P> tiles;
  int head, end_head, row_tile;

  template <class Block>
  __device__ __forceinline__ explicit RowWalk(const Block& block)
      : mask(block.mask),
        tiles(block.mask, block.first, block.p.seqlen_q),
        head(block.head),
        end_head(block.head + block.p.heads / block.p.kv_heads),
        row_tile(tiles.next(mask, tiles.range.begin)) {
    if (row_tile >= tiles.range.end) head = end_head;
  }
  __device__ __forceinline__ int tile() const { return row_tile; }
  __device__ __forceinline__ bool valid() const { return head < end_head; }
  __device__ __forceinline__ bool partial() const {
    bool empty, partly;
    tiles.classify(mask, row_tile, empty, partly);
    return partly;
  }
  __device__ __forceinline__ void advance() {
    row_tile = tiles.next(mask, row_tile + 1);
    if (row_tile >= tiles.range.end) ++head, row_tile = tiles.next(mask, tiles.range.begin);
  }
};

template <class P, bool kOwnsKeys = P::kOwnsKeys>
struct SelectWalk {
  using Type = KeyWalk<P>;
};
template <class P>
struct SelectWalk<P, true> {
  using Type = RowWalk<P>;
};

}  // namespace fagen
