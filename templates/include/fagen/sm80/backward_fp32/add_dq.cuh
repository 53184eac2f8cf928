// dQ of the rows that pass by, where blocks own keys: each adds its part in float32, in no order.
#pragma once
#include "fagen/ptx/reduce.cuh"
#include "fagen/sm80/backward_fp32/cells.cuh"
#include "fagen/simt/tile_copy.cuh"

namespace fagen {

// Add to those of four neighbours that lie before column `columns`; x[0] is for that of `column`.
template <bool kAligned>
__device__ __forceinline__ void add_to_columns(float* row, int column, int columns, const float (&x)[4]) {
  if (kAligned && ptx::kReduceWidth == 4) {
    if (column < columns) ptx::reduce_add_4(row + column, x);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (column + j < columns) ptx::reduce_add(row + column + j, x[j]);
  }
}

// The present tile's dS goes through shared memory, since a row's sum takes the cells of all warps. A warp then has 16
// rows and 32 columns of dQ at a time.
template <class P>
struct DqSums {
  using Shape = TensorPassShape<P>;
  using Rows = typename Shape::ScoreRows;
  static constexpr int kRowSlabs = P::kTileOther / 16;

  const Lane& lane;
  float* cells;
  const float* keys;  // the block's

  // Keys lie 1 bank apart, rows 8: of the 32 lanes two store to a bank, and none of those that load meet.
  __device__ __forceinline__ void store_cells(const typename WarpCells<P>::Sums& gradients, int first_key) const {
#pragma unroll
    for (int s = 0; s < Shape::kSlabs; ++s)
#pragma unroll
      for (int n = 0; n < Shape::kPieces; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = n * 8 + lane.column + i % 2, key = first_key + s * 16 + i / 2 * 8 + lane.row;
          cells[row * Shape::kCellPitch + key] = gradients[s][n][i];
        }
  }
  // dQ += scale dS K, of the rows of `dq` from `first` on.
  __device__ __forceinline__ void add(const Matrix<float>& dq, int first, float scale) const {
    for (int part = threadIdx.x / 32; part < kRowSlabs * Shape::kScoreGroups; part += P::kWarps) {
      const int slab = part % kRowSlabs * 16, column = part / kRowSlabs * 32;
      if (column >= dq.cols) break;
      float sums[1][4][4] = {};
#pragma unroll 1
      for (int key = 0; key < P::kTileOwn; key += 32) {
        const CellOperands<1, 4> operands(cells + slab * Shape::kCellPitch + key, Shape::kCellPitch, lane);
        add_rows<Rows>(sums, lane, operands, keys + key * Rows::kPitch + column, 32);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first + slab + half * 8 + lane.row;
        if (row >= dq.rows) continue;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float x[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) x[j] = sums[0][j][half * 2 + e] * scale;
          add_to_columns<P::kAligned>(dq.row(row), column + (lane.column + e) * 4, dq.cols, x);
        }
      }
    }
  }
};

}  // namespace fagen
