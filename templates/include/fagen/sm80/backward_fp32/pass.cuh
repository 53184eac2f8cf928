// A pass: a block owns a tile of rows or keys, a warp 16 or 32 of them with their gradients in registers, and the tiles
// of the other side pass by. S and dP are computed with the own rows as lines, so that the cells that a lane has are
// its operands of the sums. S and dP are computed anew in each pass: no block adds to what another one computes, and
// the gradients are the same bits each time; unless dQ is added up by the blocks that own keys.
#pragma once
#include "fagen/ptx/warpgroup.cuh"
#include "fagen/sm80/backward_fp32/add_dq.cuh"
#include "fagen/sm80/backward_fp32/cells.cuh"
#include "fagen/sm80/backward_fp32/stages.cuh"

namespace fagen {

// Rows of the other side that are added up in registers, before the sums are added to those in memory and start anew:
// each addition rounds to the size that its sum has reached, so that one long sum loses more than many short ones.
inline constexpr int kRowsOfSum = 1024;

template <class P>
struct WarpPass {
  using Shape = TensorPassShape<P>;
  using Cells = WarpCells<P>;
  using Walk = typename SelectWalk<P>::Type;
  static constexpr int kSlabs = Shape::kSlabs;
  static constexpr int kTilesOfSum = kRowsOfSum / P::kTileOther;

  const PassBlock<P, float>& block;
  const TensorGradientArgs& args;
  Lane lane;
  int first;  // the warp's first row in the block's tile
  RowStats stats[Cells::kLines];  // of its rows
  float score_sums[kSlabs][P::kAddsGradients ? 4 * Shape::kScoreGroups : 1][4];  // dQ or dK
  float value_sums[kSlabs][P::kAddsWeights ? 4 * Shape::kValueGroups : 1][4];  // dV

  __device__ __forceinline__ WarpPass(const PassBlock<P, float>& block, const TensorGradientArgs& args)
      : block(block), args(args), first(__shfl_sync(~0u, threadIdx.x / 32, 0) * Shape::kWarpRows) {
    clear(score_sums);
    clear(value_sums);
    if constexpr (!P::kOwnsKeys) {
      const int64_t head = int64_t(block.batch) * block.p.heads + block.head;
#pragma unroll
      for (int i = 0; i < Cells::kLines; ++i) stats[i] = args.stats[head * args.stats_rows + row(i)];
    }
  }
  // The row in the matrix of a lane's line.
  __device__ __forceinline__ int row(int i) const { return block.first + first + Cells::place(i) + lane.row; }

  __device__ __forceinline__ void run() {
    Walk walk(block);
    OtherStages<P> stages(block, args, walk);
    write<false>();  // zeros, to which the same thread adds its sums, in order
    int tiles = 0;
    for (; walk.valid(); walk.advance()) {
      if (tiles > 0 && tiles % kTilesOfSum == 0) {
        write<true>();
        clear(score_sums);
        clear(value_sums);
      }
      ++tiles;
      add_tile(walk, stages);
    }
    ptx::cp_async_wait<0>();
    write<true>();
  }

 private:
  __device__ __forceinline__ void add_tile(const Walk& walk, OtherStages<P>& stages) {
    stages.wait();
    typename Cells::Sums scores, gradients;
    const float* own_scores = block.shared + first * Shape::ScoreRows::kPitch;
    const float* own_values = block.shared + Shape::kOwnValues + first * Shape::ValueRows::kPitch;
    multiply_rows<P, typename Shape::ScoreRows>(scores, lane, own_scores, stages.scores());
    if constexpr (P::kAddsGradients)
      multiply_rows<P, typename Shape::ValueRows>(gradients, lane, own_values, stages.values());
    else
      clear(gradients);
    differentiate(scores, gradients, walk, stages.stats());
    if constexpr (P::kAddsWeights)
      add_rows<typename Shape::ValueRows>(value_sums, lane, CellOperands(scores), stages.values(), block.p.head_dim_v);
    if constexpr (P::kAddsGradients)
      add_rows<typename Shape::ScoreRows>(score_sums, lane, CellOperands(gradients), stages.scores(), block.p.head_dim);
    if constexpr (P::kAddsDq) add_dq(gradients, walk);
    stages.advance();
  }
  // The next tile's cells are stored behind the barrier of its stage.
  __device__ __forceinline__ void add_dq(const typename Cells::Sums& gradients, const Walk& walk) const {
    const DqSums<P> sums{lane, block.shared + Shape::kCells, block.shared};
    sums.store_cells(gradients, first);
    __syncthreads();
    const auto dq = head_of<float>(block.p.dq, block.batch, walk.head, block.p.seqlen_q, block.p.head_dim);
    sums.add(dq, walk.tile() * P::kTileOther, block.p.scale);
  }

  __device__ __forceinline__ void differentiate(typename Cells::Sums& scores, typename Cells::Sums& gradients,
                                                const Walk& walk, const RowStats* of_columns) const {
    const ScoreGradient<P> gradient(block.p, block.batch, walk.head);
    const Cells cells{lane,
                      gradient,
                      block.mask,
                      P::kOwnsKeys ? of_columns : stats,
                      block.first + first,
                      walk.tile() * P::kTileOther};
    walk.partial() ? cells.template differentiate<true>(scores, gradients)
                   : cells.template differentiate<false>(scores, gradients);
  }

  // Store the sums, or add them to what was stored.
  template <bool kAdds>
  __device__ __forceinline__ void write() const {
    if constexpr (P::kAddsGradients) write<kAdds>(score_sums, block.gradient(), block.p.scale);
    if constexpr (P::kAddsWeights) {
      const auto dv = head_of<float>(block.p.dv, block.batch, block.kv_head, block.p.seqlen_k, block.p.head_dim_v);
      write<kAdds>(value_sums, dv, scale_up<P>(block.p, 1.f));
    }
  }
  // Four lanes have 128 bytes of a row side by side. The compiler does not know pinned numbers to be the same each
  // time, so it computes addresses here and keeps none through the loop over tiles. Rows that are outside have no
  // columns: with a branch for them ptxas spills.
  template <bool kAdds, int kPieces>
  __device__ __forceinline__ void write(const float (&sums)[kSlabs][kPieces][4], const Matrix<float>& to,
                                        float factor) const {
    unsigned first_row = row(0), first_column = lane.column * 4;
    ptx::pin(first_row);
    ptx::pin(first_column);
#pragma unroll
    for (int i = 0; i < Cells::kLines; ++i) {
      const int row = first_row + Cells::place(i), columns = row < to.rows ? to.cols : 0;
#pragma unroll
      for (int q = 0; q < kPieces / 4; ++q)
#pragma unroll
        for (int e = 0; e < 2; ++e) {  // four columns of the lane
          const int column = q * 32 + first_column + e * 4;
          float x[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) x[j] = sums[i / 2][q * 4 + j][i % 2 * 2 + e] * factor;
          if constexpr (kAdds)
            add_to_columns<P::kAligned>(to.row(row), column, columns, x);
          else
            store_columns<P::kAligned>(to.row(row), column, columns, x);
        }
    }
  }
};

// The stats of a row, a warp together, and zeros for dQ if blocks will add to it. Rows count those that fill up the
// last tile of each head.
template <bool kAddsDq>
__device__ __forceinline__ void store_stats(const fagen_backward_params& p, const TensorGradientArgs& args) {
  const int64_t at = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (at >= int64_t(p.batch) * p.heads * args.stats_rows) return;
  const int64_t head = at / args.stats_rows;
  const int row = at % args.stats_rows, lane = threadIdx.x % 32;
  RowStats stats = {INFINITY, 0.f};
  if (row < p.seqlen_q && p.lse[head * p.seqlen_q + row] != -INFINITY) {
    const float* o = head_of<float>(p.o, head / p.heads, head % p.heads, p.seqlen_q, p.head_dim_v).row(row);
    const float* dout = head_of<float>(p.dout, head / p.heads, head % p.heads, p.seqlen_q, p.head_dim_v).row(row);
    float sum = 0.f;
    for (int i = lane; i < p.head_dim_v; i += 32) sum += o[i] * dout[i];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    const int64_t of_row = head * p.seqlen_q + row;
    stats = {p.lse[of_row], p.dlse ? sum - p.dlse[of_row] : sum};
  }
  if (lane == 0) args.stats[at] = stats;
  if constexpr (kAddsDq) {
    const Matrix<float> dq = head_of<float>(p.dq, head / p.heads, head % p.heads, p.seqlen_q, p.head_dim);
    for (int i = lane; row < dq.rows && i < dq.cols; i += 32) dq.row(row)[i] = 0.f;
  }
}

}  // namespace fagen
