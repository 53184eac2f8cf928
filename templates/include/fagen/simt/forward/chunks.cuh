// The chunks of K and V that pass through the stages: of each tile of keys all of K, then all of V.
#pragma once
#include "fagen/simt/chunk_stream.cuh"
#include "fagen/simt/forward/block.cuh"

namespace fagen {

template <class C, class Element>
struct KeyChunks {
  using Shape = ForwardShape<C>;
  static constexpr bool kAsync = C::kCopies == Copies::cp_async;
  template <int kRows, int kColumns, int kStride>
  using Copy = TileCopy<Element, kRows, kColumns, kStride, Shape::kThreads, C::kAligned>;
  using CopyQ = Copy<C::kTileM, Shape::kQStreamed ? C::kChunkD : C::kHeadDim, Shape::kStrideQ>;
  using CopyK = Copy<C::kTileN, C::kChunkD, Shape::kStrideK>;
  using CopyV = Copy<C::kChunkKeys, Shape::kStrideV, Shape::kStrideV>;

  const Block<C, Element>& block;
  typename MaskOf<C>::Walk walk;  // of the chunk that is loaded next
  int index = 0;                  // in its tile
  // pieces on their way through registers
  typename CopyQ::Piece held_q[!kAsync && Shape::kQStreamed ? CopyQ::kEach : 1];
  typename CopyK::Piece held_k[kAsync ? 1 : CopyK::kEach];
  typename CopyV::Piece held_v[kAsync ? 1 : CopyV::kEach];
  bool holds_keys = false, holds_values = false;

  __device__ __forceinline__ explicit KeyChunks(const Block<C, Element>& block) : block(block), walk(block.walk()) {}

  // All of q, where it does not pass by with K. It is there when the first chunk is.
  __device__ __forceinline__ void load_q() const {
    if constexpr (!Shape::kQStreamed) {
      if constexpr (kAsync)
        CopyQ::start(block.shared, block.q, block.first_row, 0);
      else
        CopyQ::copy(block.shared, block.q, block.first_row, 0);
    }
  }
  __device__ __forceinline__ void load(float* to) {
    if (!walk.valid()) return;
    const int first_key = walk.tile * C::kTileN;
    if (index < Shape::kKeyChunks)
      load_keys(to, first_key, index * C::kChunkD);
    else
      load_values(to, first_key + (index - Shape::kKeyChunks) * C::kChunkKeys);
    if (++index == Shape::kKeyChunks + Shape::kValueChunks) index = 0, walk.advance();
  }
  __device__ __forceinline__ void store(float* to) {
    if (holds_keys) {
      CopyK::store(to, held_k);
      if constexpr (Shape::kQStreamed) CopyQ::store(to + Shape::kKeyFloats, held_q);
    }
    if (holds_values) CopyV::store(to, held_v);
    holds_keys = holds_values = false;
  }

 private:
  __device__ __forceinline__ void load_keys(float* to, int key, int column) {
    if constexpr (kAsync) {
      CopyK::start(to, block.k, key, column);
      if constexpr (Shape::kQStreamed) CopyQ::start(to + Shape::kKeyFloats, block.q, block.first_row, column);
    } else {
      CopyK::load(held_k, block.k, key, column), holds_keys = true;
      if constexpr (Shape::kQStreamed) CopyQ::load(held_q, block.q, block.first_row, column);
    }
  }
  __device__ __forceinline__ void load_values(float* to, int key) {
    if constexpr (kAsync)
      CopyV::start(to, block.v, key, 0);
    else
      CopyV::load(held_v, block.v, key, 0), holds_values = true;
  }
};

template <class C, class Element>
using Chunks =
    ChunkStream<KeyChunks<C, Element>, C::kStages, ForwardShape<C>::kStageFloats, KeyChunks<C, Element>::kAsync>;

}  // namespace fagen
