// A block's share of the work: a tile of rows of one head, its matrices, its mask, and the copies of their tiles.
#pragma once
#include "fagen/mask/mask.cuh"
#include "fagen/schedule/tile_order.cuh"
#include "fagen/simt/tile_copy.cuh"
#include "fagen/sm80/forward_fp32/shape.cuh"

namespace fagen {

// Start copying rows [first, first + kRows) to shared memory, all threads together. What is outside of the matrix reads
// as 0. A thread moves 16 bytes at a time where rows are aligned, else one number.
template <class Layout, int kRows, int kThreads, bool kAligned>
__device__ __forceinline__ void copy_rows(float* to, const Matrix<float>& from, int first) {
  constexpr int kPiece = kAligned ? 4 : 1, kPerRow = Layout::kColumns / kPiece;
  const auto copy = [&](const float* source, int row, int column, bool there) {
    const uint32_t place = ptx::shared_address(to + Layout::offset(row, column / 4) + column % 4);
    if constexpr (kAligned)
      ptx::cp_async_16(place, there ? source : from.base, there);
    else
      ptx::cp_async_4(place, there ? source : from.base, there);
  };
  if constexpr (kThreads % kPerRow == 0) {  // a thread stays in its columns
    constexpr int kStep = kThreads / kPerRow;
    const int column = threadIdx.x % kPerRow * kPiece;
    int row = threadIdx.x / kPerRow;
    const float* source = from.row(first + row) + column;
    const int end = column < from.cols ? from.rows - first : 0;
#pragma unroll
    for (int i = 0; i < (kRows + kStep - 1) / kStep; ++i) {
      if (kRows % kStep == 0 || row < kRows) copy(source, row, column, row < end);
      row += kStep, source += kStep * from.stride;
    }
  } else {
#pragma unroll 2
    for (int i = threadIdx.x; i < kRows * kPerRow; i += kThreads) {
      const int row = i / kPerRow, column = i % kPerRow * kPiece;
      copy(from.row(first + row) + column, row, column, first + row < from.rows && column < from.cols);
    }
  }
}

template <class C>
struct Block {
  using Shape = ForwardShape<C>;

  const fagen_forward_params& p;
  TileCoord coord;
  int first_row;
  float* shared;
  Matrix<float> q, k, v, o;
  MaskOf<C> mask;
  TileRange range;  // of tiles of keys that the rows see

  __device__ __forceinline__ Block(const fagen_forward_params& p, const GridArgs& grid, unsigned char* bytes)
      : p(p),
        coord(tile_at<C::kBlockOrder>(p, blockIdx.x, grid.row_tiles, grid.heads_at_once)),
        first_row(coord.row_tile * C::kTileM),
        shared(reinterpret_cast<float*>(bytes)),
        mask(p) {
    const int kv_head = coord.head / (p.heads / p.kv_heads);
    q = head_of<float>(p.q, coord.batch, coord.head, p.seqlen_q, p.head_dim);
    k = head_of<float>(p.k, coord.batch, kv_head, p.seqlen_k, p.head_dim);
    v = head_of<float>(p.v, coord.batch, kv_head, p.seqlen_k, p.head_dim_v);
    o = head_of<float>(p.o, coord.batch, coord.head, p.seqlen_q, p.head_dim_v);
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

  __device__ __forceinline__ float* keys(int stage) const {
    return shared + Shape::kStagesBegin + stage * Shape::kStageFloats;
  }
  __device__ __forceinline__ float* values(int stage) const { return keys(stage) + Shape::kKeyFloats; }

  // ---- copies: each is one part of a group that the caller commits
  __device__ __forceinline__ void copy_q() const {
    copy_rows<typename Shape::RowsOfQ, C::kTileM, Shape::kThreads, C::kAligned>(shared, q, first_row);
  }
  __device__ __forceinline__ void copy_keys(int stage, int tile) const {
    copy_rows<typename Shape::RowsOfK, C::kTileN, Shape::kThreads, C::kAligned>(keys(stage), k, tile * C::kTileN);
  }
  __device__ __forceinline__ void copy_values(int stage, int tile) const {
    copy_rows<typename Shape::RowsOfV, C::kTileN, Shape::kThreads, C::kAligned>(values(stage), v, tile * C::kTileN);
  }
  // Wait until all copies of the block but each thread's newest kPending groups have landed.
  template <int kPending>
  __device__ __forceinline__ void wait_copies() const {
    ptx::cp_async_wait<kPending>();
    __syncthreads();
  }
};

}  // namespace fagen
