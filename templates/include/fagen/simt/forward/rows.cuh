// The state that a thread's rows carry from tile to tile: the online softmax, and a rectangle of O.
#pragma once
#include "fagen/common/dropout.cuh"
#include "fagen/simt/chunk_stream.cuh"
#include "fagen/simt/exact_softmax.cuh"
#include "fagen/simt/forward/block.cuh"
#include "fagen/simt/scores.cuh"

namespace fagen {

// The rows of a thread in the grid over scores: it turns the scores of a tile into weights in shared memory, with a
// factor for what O has so far.
template <class C, class Element>
struct ScoreRows {
  using Shape = ForwardShape<C>;
  using Grid = typename Shape::ScoreGrid;
  static constexpr int kRows = Grid::kRows, kKeys = Shape::kScoreKeys;
  using Scores = float[kRows][kKeys];

  const Block<C, Element>& block;
  Grid grid;
  ExactSoftmax<kRows> softmax;
  ExactScoreMod<C> mod;
  WeightDropout<C> dropout;

  __device__ __forceinline__ explicit ScoreRows(const Block<C, Element>& block)
      : block(block),
        softmax(ExactScoreMod<C>::softmax_scale(block.p)),
        mod(block.p, block.coord.batch, block.coord.head),
        dropout(block.p, block.coord.batch, block.coord.head) {}

  // S = Q K^T of a tile.
  template <class AllChunks>
  __device__ __forceinline__ void multiply(Scores& scores, AllChunks& chunks) const {
    multiply_all<C::kHeadDim, C::kChunkD>(
        scores, chunks, [&](Scores& sums, const float* chunk, int column, auto depth) {
          const float* q = Shape::kQStreamed ? chunk + Shape::kKeyFloats : block.shared + column;
          multiply_rows<decltype(depth)::value, Grid::kRowStep * Shape::kStrideQ, Grid::kLanes * Shape::kStrideK>(
              sums, q + grid.row(0) * Shape::kStrideQ, chunk + grid.lane * Shape::kStrideK);
        });
  }

  __device__ __forceinline__ void exponentiate(Scores& scores, int tile, bool partial) {
    const int key = tile * C::kTileN;
    apply_mod<C>(scores, grid, mod, block.first_row, key);
    if (partial) hide_scores<C>(scores, grid, block.mask, block.first_row, key);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float tile_max = scores[i][0];
#pragma unroll
      for (float score : scores[i]) tile_max = fmaxf(tile_max, score);
      const float factor = softmax.set_reference(i, Grid::max_over_lanes(tile_max));
#pragma unroll
      for (float& score : scores[i]) softmax.sum[i] += score = softmax.exponentiate(score, i);
      if (grid.lane == 0) block.shared[Shape::kFactors + grid.row(i)] = factor;
    }
    dropout.template each<Grid, kKeys>(grid, block.first_row, key, [&](int i, int j, bool kept) {
      if (!kept) scores[i][j] = 0.f;
    });
    float* weights = block.shared + Shape::kWeights + grid.row(0) * Shape::kStrideP + grid.lane;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kKeys; ++j) weights[i * Grid::kRowStep * Shape::kStrideP + j * Grid::kLanes] = scores[i][j];
  }

  // At the end: the LSE, and what O is to be divided by.
  __device__ __forceinline__ void store_stats() {
    const fagen_forward_params& p = block.p;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float sum = Grid::sum_over_lanes(softmax.sum[i]);
      const int row = block.first_row + grid.row(i);
      if (grid.lane != 0) continue;
      block.shared[Shape::kSums + grid.row(i)] = sum == 0.f ? 1.f : sum;
      if (p.lse && row < p.seqlen_q)
        p.lse[(int64_t(block.coord.batch) * p.heads + block.coord.head) * p.seqlen_q + row] = softmax.lse(i, sum);
    }
  }
};

// The rows of a thread in the grid over O.
template <class C, class Element>
struct OutputRows {
  using Shape = ForwardShape<C>;
  using Grid = typename Shape::OutputGrid;
  static constexpr int kRows = Grid::kRows;

  const Block<C, Element>& block;
  Grid grid;
  float o[kRows][4 * Shape::kQuads];

  __device__ __forceinline__ explicit OutputRows(const Block<C, Element>& block) : block(block) { clear(o); }

  // Take O to the rows' new references.
  __device__ __forceinline__ void rescale() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float factor = block.shared[Shape::kFactors + grid.row(i)];
#pragma unroll
      for (float& x : o[i]) x *= factor;
    }
  }
  // Divide by the rows' sums.
  __device__ __forceinline__ void normalize() {
    const float up = scale_up<C>(block.p, 1.f);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float sum = block.shared[Shape::kSums + grid.row(i)], inverse = __fdividef(1.f, sum);
#pragma unroll
      for (float& x : o[i]) {
        x = quotient(x, sum, inverse);
        if constexpr (C::kDropout) x *= up;
      }
    }
  }
  // Add the products with a chunk of V's rows, from row `key` of the tile on.
  __device__ __forceinline__ void multiply(const float* chunk, int key) {
    multiply_columns<C::kChunkKeys, Grid::kRowStep * Shape::kStrideP, Shape::kStrideV, Shape::kQuadStep>(
        o, block.shared + Shape::kWeights + grid.row(0) * Shape::kStrideP + key, chunk + 4 * grid.lane);
  }
  __device__ __forceinline__ void store() const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = block.first_row + grid.row(i);
      if (row >= block.p.seqlen_q) continue;
#pragma unroll
      for (int q = 0; q < Shape::kQuads; ++q)
        store_columns<C::kAligned>(block.o.row(row), q * Shape::kQuadStep + 4 * grid.lane, block.o.cols,
                                   reinterpret_cast<const float (&)[4]>(o[i][4 * q]));
    }
  }
};

}  // namespace fagen
