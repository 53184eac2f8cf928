// A warp's products of float32 numbers on the tensor cores, from rows in shared memory.
//
// The tensor cores' sums are cut to 24 bits, not rounded, and long ones would lean towards 0. So a sum that starts from
// 0 takes few products, and is added to the others by a float32 addition, which rounds. Of sums over rows, those of
// 1024 rows (kRowsOfSum) are added up so; then they are added to what lies in memory.
//
// The order of a sum's terms is free: a lane reads numbers that lie side by side, and they count as those that its
// place in the operands stands for. Sums over columns: lane 4 g + t has columns 4 t ... 4 t + 3 of 16, two a product.
// Sums over rows: rows 2 t and 2 t + 1 of 8, as the accumulators of the cells have them.
#pragma once
#include "fagen/sm80/backward_fp32/shape.cuh"
#include "fagen/sm80/forward_fp32/operands.cuh"

namespace fagen {

// A lane's place in an accumulator of 16 x 8: rows `row` and `row` + 8, columns `column` and `column` + 1.
struct Lane {
  int id = threadIdx.x % 32;
  int row = id / 4, column = id % 4 * 2;
};

template <int kSlabs, int kPieces>
__device__ __forceinline__ void clear(float (&sums)[kSlabs][kPieces][4]) {
#pragma unroll
  for (auto& slab : sums)
#pragma unroll
    for (auto& piece : slab) piece[0] = piece[1] = piece[2] = piece[3] = 0.f;
}

__device__ __forceinline__ float4 load_4(const float* from) { return *reinterpret_cast<const float4*>(from); }

// Add the products of 16 columns to kAtOnce pieces from piece n on.
template <int kSlabs, int kPieces, int kAtOnce>
__device__ __forceinline__ void add_columns(float (&sums)[kSlabs][kPieces][4], int n,
                                            const Fragment<true, 4> (&a)[kSlabs][2],
                                            const Fragment<true, 2> (&b)[kAtOnce][2]) {
  float some[kSlabs][kAtOnce][4] = {};
#pragma unroll
  for (int step = 0; step < 4; ++step)  // the small products first, so that little is cut from them
#pragma unroll
    for (int s = 0; s < kSlabs; ++s)
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        step < 2 ? multiply_low(some[s][j], a[s][step % 2], b[j][step % 2])
                 : multiply_high(some[s][j], a[s][step % 2], b[j][step % 2]);
#pragma unroll
  for (int s = 0; s < kSlabs; ++s)
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[s][n + j][i] += some[s][j][i];
}

// sums = A B^T: A the warp's kSlabs x 16 rows from `own` on, B kPieces x 8 rows from `other` on, both laid out as Rows.
template <class P, class Rows, int kSlabs, int kPieces>
__device__ __forceinline__ void multiply_rows(float (&sums)[kSlabs][kPieces][4], const Lane& lane, const float* own,
                                              const float* other) {
  constexpr int kAtOnce = P::kScorePieces;
  const int turn = Rows::turn(lane.row), place = lane.row * Rows::kPitch + (lane.id % 4 ^ turn % 4) * 4;
  clear(sums);
#pragma unroll P::kScoreSteps
  for (int c = 0; c < Rows::kColumns / 16; ++c) {
    const int column = place + (c ^ turn / 4) * 16;
    Fragment<true, 4> a[kSlabs][2];
#pragma unroll
    for (int r = 0; r < 2 * kSlabs; ++r) {
      const float4 x = load_4(own + column + r * 8 * Rows::kPitch);
      a[r / 2][0].set(r % 2, x.x), a[r / 2][0].set(r % 2 + 2, x.y);
      a[r / 2][1].set(r % 2, x.z), a[r / 2][1].set(r % 2 + 2, x.w);
    }
#pragma unroll
    for (int n = 0; n < kPieces; n += kAtOnce) {
      Fragment<true, 2> b[kAtOnce][2];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const float4 x = load_4(other + column + (n + j) * 8 * Rows::kPitch);
        b[j][0].set(0, x.x), b[j][0].set(1, x.y);
        b[j][1].set(0, x.z), b[j][1].set(1, x.w);
      }
      add_columns(sums, n, a, b);
    }
  }
}

// A warp's cells as the first operand of sums over the other side's rows.
template <int kSlabs, int kPieces>
struct CellOperands {
  Fragment<true, 4> pieces[kPieces][kSlabs];

  __device__ __forceinline__ explicit CellOperands(const float (&cells)[kSlabs][kPieces][4]) {
#pragma unroll
    for (int n = 0; n < kPieces; ++n)
#pragma unroll
      for (int s = 0; s < kSlabs; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) pieces[n][s].set(i / 2 + i % 2 * 2, cells[s][n][i]);
  }
  // The same from lines of shared memory.
  __device__ __forceinline__ CellOperands(const float* lines, int pitch, const Lane& lane) {
#pragma unroll
    for (int n = 0; n < kPieces; ++n)
#pragma unroll
      for (int r = 0; r < 2 * kSlabs; ++r) {
        const float* from = lines + (r * 8 + lane.row) * pitch + n * 8 + lane.column;
        const float2 x = *reinterpret_cast<const float2*>(from);
        pieces[n][r / 2].set(r % 2, x.x), pieces[n][r / 2].set(r % 2 + 2, x.y);
      }
  }
};

// sums += X B: X the warp's cells, B the other side's rows. Piece 4 q + j of the sums has columns 32 q + 4 m + j,
// m = 0 ... 7: those that lanes load at once. The loop ends with the columns of the tensor; without that branch ptxas
// loads ahead for more products than there are registers.
template <class Rows, int kSlabs, int kPieces, int kSumPieces>
__device__ __forceinline__ void add_rows(float (&sums)[kSlabs][kSumPieces][4], const Lane& lane,
                                         const CellOperands<kSlabs, kPieces>& cells, const float* other, int columns) {
  const float* rows[2];  // 2 t and 2 t + 1
#pragma unroll
  for (int i = 0; i < 2; ++i) rows[i] = other + Rows::offset(lane.column + i, lane.row);
#pragma unroll
  for (int q = 0; q < kSumPieces / 4; ++q) {
    if (q > 0 && q * 32 >= columns) break;
    float high[kSlabs][4][4] = {}, low[kSlabs][4][4] = {};
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      Fragment<true, 2> b[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 x = load_4(rows[i] + n * 8 * Rows::kPitch + q * 32);
        b[0].set(i, x.x), b[1].set(i, x.y), b[2].set(i, x.z), b[3].set(i, x.w);
      }
#pragma unroll
      for (int s = 0; s < kSlabs; ++s)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          multiply_high(high[s][j], cells.pieces[n][s], b[j]);
          multiply_low(low[s][j], cells.pieces[n][s], b[j]);
        }
    }
#pragma unroll
    for (int s = 0; s < kSlabs; ++s)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[s][q * 4 + j][i] += high[s][j][i] + low[s][j][i];
  }
}

}  // namespace fagen
