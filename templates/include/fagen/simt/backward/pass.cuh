// A pass: one gradient, tile by tile of the other side. S and dP are computed anew in each, so that no block adds to
// what another one computes, and the gradients are the same bits each time.
#pragma once
#include <math.h>

#include "fagen/common/philox.h"
#include "fagen/ptx/math.cuh"
#include "fagen/simt/backward/chunks.cuh"

namespace fagen {

// A row's logsumexp and delta = sum of dO * O, less the gradient of the logsumexp. Rows that see nothing, and those
// past the last, have an infinite logsumexp: their weights are 0.
struct RowStats {
  float lse, delta;

  static __device__ __forceinline__ RowStats of(const fagen_backward_params& p, const float* delta, int batch, int head,
                                                int row) {
    if (row >= p.seqlen_q) return {INFINITY, 0.f};
    const int64_t at = (int64_t(batch) * p.heads + head) * p.seqlen_q + row;
    return p.lse[at] == -INFINITY ? RowStats{INFINITY, 0.f} : RowStats{p.lse[at], delta[at]};
  }
};

// From a score of a head to its weight, and from the weight's gradient to that of scale * q.k.
template <class P>
struct CellGradient {
  static constexpr float kLog2e = 1.4426950408889634f;
  float scale, softcap, slope;
  int shift;
  Dropout dropout;

  __device__ __forceinline__ CellGradient(const fagen_backward_params& p, int batch, int head)
      : scale(P::kSoftcap ? p.scale / p.softcap : p.scale), softcap(p.softcap), shift(p.seqlen_k - p.seqlen_q) {
    const float* slopes = static_cast<const float*>(p.alibi_slopes.data);
    slope = P::kAlibi ? slopes[batch * p.alibi_slopes.stride[0] + head] : 0.f;
    if constexpr (P::kDropout) dropout = Dropout::of(p, batch, head);
  }

  // The cell of the gradient's product: dS, or for dV the weight less what dropout drops.
  __device__ __forceinline__ float operator()(float score, float of_weight, const RowStats& stats, int row,
                                              int key) const {
    float exponent, up = 1.f, derivative = 1.f;
    if constexpr (P::kSoftcap) {
      const float capped = tanhf(score * scale);
      derivative = 1.f - capped * capped;
      exponent = softcap * capped;
      if constexpr (P::kAlibi) exponent -= slope * fabsf(float(row + shift - key));
      exponent -= stats.lse;
    } else if constexpr (P::kAlibi) {
      exponent = fmaf(score, scale, -slope * fabsf(float(row + shift - key))) - stats.lse;
    } else {
      exponent = fmaf(score, scale, -stats.lse);
    }
    const float weight = ptx::ex2(exponent * kLog2e);
    if constexpr (P::kDropout) up = dropout.keeps_weight(row, key) ? dropout.scale : 0.f;
    return P::kOf == Gradient::dv ? weight * up : weight * (of_weight * up - stats.delta) * derivative;
  }
};

template <class P, class Element>
struct Pass {
  using Shape = PassShape<P>;
  using Grid = typename Shape::CellGrid;
  using SumGrid = typename Shape::SumGrid;
  using Chunks = ChunkStream<PassChunks<P, Element>, P::kStages, Shape::kStageFloats, PassChunks<P, Element>::kAsync>;
  using Products = float[Grid::kRows][Shape::kCellColumns];

  const PassBlock<P, Element>& block;
  Grid grid;
  SumGrid sum_grid;
  float sums[SumGrid::kRows][4 * Shape::kQuads];

  __device__ __forceinline__ explicit Pass(const PassBlock<P, Element>& block) : block(block) { clear(sums); }

  __device__ __forceinline__ void run() {
    Chunks chunks(PassChunks<P, Element>(block), block.shared);
    for (typename SelectWalk<P>::Type walk(block); walk.valid(); walk.advance()) {
      Products scores, of_weights;
      multiply<P::kHeadDim>(scores, chunks);
      if constexpr (P::kOf != Gradient::dv) multiply<P::kHeadDimV>(of_weights, chunks);
      store_cells(scores, of_weights, walk);
      add_rows(chunks);
    }
    chunks.finish();
    store();
  }

 private:
  // Products of all own and other rows of a pair of tiles.
  template <int kSize>
  __device__ __forceinline__ void multiply(Products& products, Chunks& chunks) const {
    multiply_all<kSize, P::kChunkD>(products, chunks, [&](Products& some, const float* chunk, int, auto depth) {
      multiply_rows<decltype(depth)::value, Grid::kRowStep * Shape::kStrideD, Grid::kLanes * Shape::kStrideD>(
          some, chunk + grid.row(0) * Shape::kStrideD, chunk + Shape::kOwnFloats + grid.lane * Shape::kStrideD);
    });
  }

  template <class Walk>
  __device__ __forceinline__ void store_cells(const Products& scores, const Products& of_weights, const Walk& walk) {
    const CellGradient<P> gradient(block.p, block.batch, walk.head);
    const bool partial = walk.partial();
    const int other = walk.tile() * P::kTileOther;
    const auto own_at = [&](int i) { return block.first + grid.row(i); };
    const auto other_at = [&](int j) { return other + grid.lane + j * Grid::kLanes; };
    constexpr int kStats = P::kOwnsKeys ? Shape::kCellColumns : Grid::kRows;
    RowStats stats[kStats];
#pragma unroll
    for (int s = 0; s < kStats; ++s)
      stats[s] =
          RowStats::of(block.p, block.args.delta, block.batch, walk.head, P::kOwnsKeys ? other_at(s) : own_at(s));
    float* cells = block.shared + Shape::kCells + grid.row(0) * Shape::kStrideCells + grid.lane;
#pragma unroll
    for (int i = 0; i < Grid::kRows; ++i)
#pragma unroll
      for (int j = 0; j < Shape::kCellColumns; ++j) {
        const int row = P::kOwnsKeys ? other_at(j) : own_at(i), key = P::kOwnsKeys ? own_at(i) : other_at(j);
        const float of_weight = P::kOf == Gradient::dv ? 0.f : of_weights[i][j];
        const float cell = gradient(scores[i][j], of_weight, stats[P::kOwnsKeys ? j : i], row, key);
        cells[i * Grid::kRowStep * Shape::kStrideCells + j * Grid::kLanes] = partial && hidden(row, key) ? 0.f : cell;
      }
  }
  __device__ __forceinline__ bool hidden(int row, int key) const {
    const Band& band = block.mask.band;
    bool is = key >= band.end(row);
    if constexpr (MaskOf<P>::kHasBegin) is |= key < band.begin(row);
    if constexpr (MaskOf<P>::kIntervals)
      is |= block.mask.intervals.at(min(key, block.mask.intervals.last_key)).contains(row);
    return is;
  }

  // The cells times the other side's rows, chunk after chunk.
  __device__ __forceinline__ void add_rows(Chunks& chunks) {
    const float* cells = block.shared + Shape::kCells + sum_grid.row(0) * Shape::kStrideCells;
#pragma unroll 1
    for (int i = 0; i < Shape::kSumChunks; ++i) {
      const float* chunk = chunks.next() + 4 * sum_grid.lane;
      multiply_columns<P::kChunkRows, SumGrid::kRowStep * Shape::kStrideCells, Shape::kStrideSum, Shape::kQuadStep>(
          sums, cells + i * P::kChunkRows, chunk);
      chunks.done();
    }
  }

  __device__ __forceinline__ void store() const {
    const Matrix<Element> to = block.gradient();
    const float scale = P::kOf == Gradient::dv ? 1.f : block.p.scale;
#pragma unroll
    for (int i = 0; i < SumGrid::kRows; ++i) {
      const int row = block.first + sum_grid.row(i);
      if (row >= to.rows) continue;
#pragma unroll
      for (int q = 0; q < Shape::kQuads; ++q) {
        const float (&sum)[4 * Shape::kQuads] = sums[i];
        const float scaled[4] = {sum[4 * q] * scale, sum[4 * q + 1] * scale, sum[4 * q + 2] * scale,
                                 sum[4 * q + 3] * scale};
        store_columns<P::kAligned>(to.row(row), q * Shape::kQuadStep + 4 * sum_grid.lane, to.cols, scaled);
      }
    }
  }
};

// delta of a row, a warp together.
template <class Element>
__device__ __forceinline__ void store_delta(const fagen_backward_params& p, float* delta) {
  const int64_t at = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (at >= int64_t(p.batch) * p.heads * p.seqlen_q) return;
  const int row = at % p.seqlen_q, head = at / p.seqlen_q % p.heads, batch = at / p.seqlen_q / p.heads;
  const Element* o = head_of<Element>(p.o, batch, head, p.seqlen_q, p.head_dim_v).row(row);
  const Element* dout = head_of<Element>(p.dout, batch, head, p.seqlen_q, p.head_dim_v).row(row);
  float sum = 0.f;
  for (int i = threadIdx.x % 32; i < p.head_dim_v; i += 32) sum += to_float(o[i]) * to_float(dout[i]);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) delta[at] = p.dlse ? sum - p.dlse[at] : sum;
}

}  // namespace fagen
