// The chunks of a pass: of each pair of tiles the columns of q and k, then those of dout and v, then the rows that the
// gradient is made of.
#pragma once
#include "fagen/simt/backward/block.cuh"
#include "fagen/simt/chunk_stream.cuh"

namespace fagen {

template <class P, class Element>
struct PassChunks {
  using Shape = PassShape<P>;
  using Tensor = Matrix<Element>;
  static constexpr bool kAsync = P::kCopies == Copies::cp_async;
  template <int kRows, int kColumns, int kStride>
  using Copy = TileCopy<Element, kRows, kColumns, kStride, Shape::kThreads, P::kAligned>;
  using CopyOwn = Copy<P::kTileOwn, P::kChunkD, Shape::kStrideD>;
  using CopyOther = Copy<P::kTileOther, P::kChunkD, Shape::kStrideD>;
  using CopyRows = Copy<P::kChunkRows, Shape::kStrideSum, Shape::kStrideSum>;

  const PassBlock<P, Element>& block;
  typename SelectWalk<P>::Type walk;  // of the chunk that is loaded next
  int index = 0;                      // in its pair of tiles
  // pieces on their way through registers
  typename CopyOwn::Piece held_own[kAsync ? 1 : CopyOwn::kEach];
  typename CopyOther::Piece held_other[kAsync ? 1 : CopyOther::kEach];
  typename CopyRows::Piece held_rows[kAsync ? 1 : CopyRows::kEach];
  bool holds_pair = false, holds_rows = false;

  __device__ __forceinline__ explicit PassChunks(const PassBlock<P, Element>& block) : block(block), walk(block) {}

  __device__ __forceinline__ void load(float* to) {
    if (!walk.valid()) return;
    const int after = index - Shape::kScoreChunks - Shape::kWeightChunks;
    if (index < Shape::kScoreChunks)
      load_pair(to, block.q(walk.head), block.k(), index * P::kChunkD);
    else if (after < 0)
      load_pair(to, block.dout(walk.head), block.v(), (index - Shape::kScoreChunks) * P::kChunkD);
    else
      load_rows(to, walk.tile() * P::kTileOther + after * P::kChunkRows);
    if (++index == Shape::kScoreChunks + Shape::kWeightChunks + Shape::kSumChunks) index = 0, walk.advance();
  }
  __device__ __forceinline__ void store(float* to) {
    if (holds_pair) CopyOwn::store(to, held_own), CopyOther::store(to + Shape::kOwnFloats, held_other);
    if (holds_rows) CopyRows::store(to, held_rows);
    holds_pair = holds_rows = false;
  }

 private:
  // Columns of a tensor of rows and of one of keys.
  __device__ __forceinline__ void load_pair(float* to, const Tensor& of_rows, const Tensor& of_keys, int column) {
    const Tensor &own = P::kOwnsKeys ? of_keys : of_rows, &other = P::kOwnsKeys ? of_rows : of_keys;
    const int first_other = walk.tile() * P::kTileOther;
    if constexpr (kAsync) {
      CopyOwn::start(to, own, block.first, column);
      CopyOther::start(to + Shape::kOwnFloats, other, first_other, column);
    } else {
      CopyOwn::load(held_own, own, block.first, column);
      CopyOther::load(held_other, other, first_other, column);
      holds_pair = true;
    }
  }
  // Whole rows of the other side: dQ is made of K, dK of Q, dV of dout.
  __device__ __forceinline__ void load_rows(float* to, int row) {
    const Tensor from = P::kOf == Gradient::dq   ? block.k()
                        : P::kOf == Gradient::dk ? block.q(walk.head)
                                                 : block.dout(walk.head);
    if constexpr (kAsync)
      CopyRows::start(to, from, row, 0);
    else
      CopyRows::load(held_rows, from, row, 0), holds_rows = true;
  }
};

}  // namespace fagen
