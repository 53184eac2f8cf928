// The chunks of K and V that pass through the stages: of each tile of keys all of K, then all of V.
#pragma once
#include "fagen/simt/forward/block.cuh"

namespace fagen {

// next() and done() come once a chunk: between them the chunk is in shared memory. Since next() waits for all threads,
// whatever was written to shared memory before it can be read behind it, and what was read before it may be written.
template <class C, class Element>
struct Chunks {
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
  int stage = 0;                  // of the chunk that next() returns
  float* free_stage = nullptr;    // where held pieces go
  // pieces on their way through registers
  typename CopyQ::Piece held_q[!kAsync && Shape::kQStreamed ? CopyQ::kEach : 1];
  typename CopyK::Piece held_k[kAsync ? 1 : CopyK::kEach];
  typename CopyV::Piece held_v[kAsync ? 1 : CopyV::kEach];
  bool holds_keys = false, holds_values = false;

  __device__ __forceinline__ explicit Chunks(const Block<C, Element>& block) : block(block), walk(block.walk()) {
    if constexpr (!Shape::kQStreamed) {
      if constexpr (kAsync)
        CopyQ::start(block.shared, block.q, block.first_row, 0);
      else
        CopyQ::copy(block.shared, block.q, block.first_row, 0);
    }
    for (int i = 0; i < C::kStages - 1; ++i) {
      load(stage_at(i));
      if constexpr (!kAsync) store_held();
    }
  }

  // Wait for the next chunk, and start loading the one that takes the place of the last.
  __device__ __forceinline__ const float* next() {
    if constexpr (kAsync) ptx::cp_async_wait<C::kStages - 2>();
    __syncthreads();
    const float* chunk = stage_at(stage);
    load(stage_at(stage == 0 ? C::kStages - 1 : stage - 1));
    stage = stage == C::kStages - 1 ? 0 : stage + 1;
    return chunk;
  }
  __device__ __forceinline__ void done() {
    if constexpr (!kAsync) store_held();
  }
  __device__ __forceinline__ void finish() {
    if constexpr (kAsync) ptx::cp_async_wait<0>();
  }

 private:
  __device__ __forceinline__ float* stage_at(int stage) const {
    return block.shared + Shape::kStagesBegin + stage * Shape::kStageFloats;
  }

  __device__ __forceinline__ void load(float* to) {
    if (walk.valid()) {
      const int first_key = walk.tile * C::kTileN;
      if (index < Shape::kKeyChunks)
        load_keys(to, first_key, index * C::kChunkD);
      else
        load_values(to, first_key + (index - Shape::kKeyChunks) * C::kChunkKeys);
      if (++index == Shape::kKeyChunks + Shape::kValueChunks) index = 0, walk.advance();
    }
    free_stage = to;
    if constexpr (kAsync) ptx::cp_async_commit();
  }
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
  __device__ __forceinline__ void store_held() {
    if (holds_keys) {
      CopyK::store(free_stage, held_k);
      if constexpr (Shape::kQStreamed) CopyQ::store(free_stage + Shape::kKeyFloats, held_q);
    }
    if (holds_values) CopyV::store(free_stage, held_v);
    holds_keys = holds_values = false;
  }
};

}  // namespace fagen
