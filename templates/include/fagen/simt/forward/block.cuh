// A block's share of the work: a tile of rows of one head, its matrices and its mask.
#pragma once
#include "fagen/mask/mask.cuh"
#include "fagen/schedule/tile_order.cuh"
#include "fagen/simt/forward/shape.cuh"
#include "fagen/simt/tile_copy.cuh"

namespace fagen {

template <class C, class Element>
struct Block {
  using Shape = ForwardShape<C>;

  const fagen_forward_params& p;
  TileCoord coord;
  int first_row;
  float* shared;
  Matrix<Element> q, k, v, o;
  MaskOf<C> mask;
  TileRange range;  // of tiles of keys that the rows see

  __device__ __forceinline__ Block(const fagen_forward_params& p, const GridArgs& grid, unsigned char* bytes)
      : p(p),
        coord(tile_at<C::kBlockOrder>(p, blockIdx.x, grid.row_tiles, grid.heads_at_once)),
        first_row(coord.row_tile * C::kTileM),
        shared(reinterpret_cast<float*>(bytes)),
        mask(p) {
    const int kv_head = coord.head / (p.heads / p.kv_heads);
    q = head_of<Element>(p.q, coord.batch, coord.head, p.seqlen_q, p.head_dim);
    k = head_of<Element>(p.k, coord.batch, kv_head, p.seqlen_k, p.head_dim);
    v = head_of<Element>(p.v, coord.batch, kv_head, p.seqlen_k, p.head_dim_v);
    o = head_of<Element>(p.o, coord.batch, coord.head, p.seqlen_q, p.head_dim_v);
    range = TileRange::of<C::kTileN>(mask.band, first_row, end_row());
    if constexpr (MaskOf<C>::kIntervals) {
      const int head = p.mask_heads == 1 ? 0 : kv_head;
      mask.intervals.bounds = bounds_of(p, coord.batch, head);
      mask.intervals.stride = p.intervals.stride[2];
      mask.intervals.extents =
          grid.extents + int64_t(coord.batch * p.mask_heads + head) * grid.key_tiles * C::kIntervalColumns;
      mask.intervals.last_key = p.seqlen_k - 1;
    }
  }

  __device__ __forceinline__ int end_row() const { return min(first_row + C::kTileM, p.seqlen_q); }
  // The walk over the tiles of keys, from the last to the first.
  __device__ __forceinline__ typename MaskOf<C>::Walk walk() const { return mask.walk(range, first_row, end_row()); }
};

}  // namespace fagen
