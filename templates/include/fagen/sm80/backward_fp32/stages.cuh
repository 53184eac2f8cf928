// The tiles of the other side on their way through shared memory, ahead of the products.
#pragma once
#include "fagen/simt/backward/block.cuh"
#include "fagen/sm80/backward_fp32/shape.cuh"

namespace fagen {

// Four neighbours, of which `count` are inside of the matrix.
template <bool kAligned>
__device__ __forceinline__ void copy_4(float* to, const float* source, int count, const float* inside) {
  const uint32_t place = ptx::shared_address(to);
  if constexpr (kAligned) {
    ptx::cp_async_16(place, count > 0 ? source : inside, count > 0);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) ptx::cp_async_4(place + e * 4, e < count ? source + e : inside, e < count);
  }
}

// Start copying rows [first, first + kRows) to shared memory, all threads together: eight of them 128 bytes of a row.
// What is outside of the matrix reads as 0.
template <class Rows, int kRows, int kThreads, bool kAligned>
__device__ __forceinline__ void copy_rows(float* to, const Matrix<float>& from, int first) {
  constexpr int kStep = kThreads / 8;  // rows at once: a thread's turn is that of its first
  const int piece = threadIdx.x % 8;
  int row = threadIdx.x / 8;
  to += Rows::offset(row, piece);
  const float* source = from.row(first + row) + piece * 4;
#pragma unroll
  for (int i = 0; i < (kRows + kStep - 1) / kStep; ++i) {
    if (kRows % kStep == 0 || row < kRows) {
      const int columns = first + row < from.rows ? from.cols - piece * 4 : 0;
#pragma unroll
      for (int c = 0; c < Rows::kColumns; c += 32) copy_4<kAligned>(to + c, source + c, columns - c, from.base);
    }
    row += kStep, source += kStep * from.stride, to += kStep * Rows::kPitch;
  }
}

template <class P>
struct OtherStages {
  using Shape = TensorPassShape<P>;
  using Tensor = Matrix<float>;
  using Walk = typename SelectWalk<P>::Type;

  const PassBlock<P, float>& block;
  const TensorGradientArgs& args;
  Walk ahead;     // the next tile to be copied
  int stage = 0;  // of the present tile

  __device__ __forceinline__ OtherStages(const PassBlock<P, float>& block, const TensorGradientArgs& args,
                                         const Walk& walk)
      : block(block), args(args), ahead(walk) {
    copy<P::kTileOwn>(block.shared, block.shared + Shape::kOwnValues, P::kOwnsKeys, P::kAddsGradients, block.head,
                      block.first);
    for (int i = 0; i < P::kStages - 1; ++i) copy_next(i);
  }

  __device__ __forceinline__ const float* scores() const { return at(stage); }
  __device__ __forceinline__ const float* values() const { return at(stage) + Shape::kOtherValues; }
  __device__ __forceinline__ const RowStats* stats() const {
    return reinterpret_cast<const RowStats*>(at(stage) + Shape::kStats);
  }

  // The present tile is there, and another one on its way in place of the tile before.
  __device__ __forceinline__ void wait() {
    if constexpr (P::kStages == 1) {
      __syncthreads();
      copy_next(0);
      ptx::cp_async_wait<0>();
      __syncthreads();
    } else {
      ptx::cp_async_wait<P::kStages - 2>();
      __syncthreads();
      copy_next(stage == 0 ? P::kStages - 1 : stage - 1);
    }
  }
  __device__ __forceinline__ void advance() { stage = stage == P::kStages - 1 ? 0 : stage + 1; }

 private:
  __device__ __forceinline__ float* at(int of) const { return block.shared + Shape::kRing + of * Shape::kStageFloats; }

  // Rows of k and v, or of q and dO.
  template <int kRows>
  __device__ __forceinline__ void copy(float* scores, float* values, bool keys, bool both, int head, int first) const {
    constexpr int kThreads = Shape::kThreads;
    copy_rows<typename Shape::ScoreRows, kRows, kThreads, P::kAligned>(scores, keys ? block.k() : block.q(head), first);
    if (both)
      copy_rows<typename Shape::ValueRows, kRows, kThreads, P::kAligned>(values, keys ? block.v() : block.dout(head),
                                                                         first);
  }
  __device__ __forceinline__ void copy_next(int to) {
    if (ahead.valid()) {
      const int first = ahead.tile() * P::kTileOther;
      copy<P::kTileOther>(at(to), at(to) + Shape::kOtherValues, !P::kOwnsKeys, true, ahead.head, first);
      if constexpr (P::kOwnsKeys) copy_stats(at(to) + Shape::kStats, ahead.head, first);
      ahead.advance();
    }
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void copy_stats(float* to, int head, int first) const {
    static_assert(P::kTileOther / 2 <= Shape::kThreads, "one copy a thread");
    const RowStats* from = args.stats + (int64_t(block.batch) * block.p.heads + head) * args.stats_rows + first;
    const int i = threadIdx.x;
    if (i < P::kTileOther / 2) ptx::cp_async_16(ptx::shared_address(to + i * 4), from + i * 2, true);
  }
};

}  // namespace fagen
