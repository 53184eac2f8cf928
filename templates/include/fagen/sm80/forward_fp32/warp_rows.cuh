// A warp's rows: their products on the tensor cores, and the state that they carry from tile to tile.
#pragma once
#include "fagen/common/cell_dropout.cuh"
#include "fagen/common/dropout.cuh"
#include "fagen/common/softmax.cuh"
#include "fagen/simt/exact_softmax.cuh"
#include "fagen/simt/scores.cuh"
#include "fagen/sm80/forward_fp32/block.cuh"
#include "fagen/sm80/forward_fp32/operands.cuh"

namespace fagen {

// A lane's place in an accumulator of 16 x 8: rows `row` and `row` + 8, columns `column` and `column` + 1.
struct Lane {
  int id = threadIdx.x % 32;
  int row = id / 4, column = id % 4 * 2;
};

// The tensor cores' sums are cut to 24 bits, not rounded, and long ones would lean towards 0. So a sum that starts from
// 0 takes few products, and is added to the scores or to O by a float32 addition, which rounds.
//
// The order of a sum's terms is free: a lane reads numbers that lie side by side, and they count as those that its
// place in the operands stands for. Sums over columns of q and k: lane 4 g + t has columns 4 t ... 4 t + 3 of 16, two a
// product. Sums over keys: keys 2 t and 2 t + 1 of 8, as the accumulators of S have them.
template <class C>
struct WarpRows {
  using Shape = ForwardShape<C>;
  static constexpr bool kSplit = C::kProducts == Products::split;
  static constexpr int kSlabs = Shape::kSlabs, kRows = 2 * kSlabs;
  static constexpr int kKeyPieces = C::kTileN / 8;                   // of a tile
  static constexpr int kAtOnce = kSlabs == 1 && kKeyPieces % 4 == 0 ? 4 : 2;  // whose sums are under way together
  static constexpr int kVector = Shape::kVector;
  using Scores = float[kSlabs][kKeyPieces][4];
  using Weights = Fragment<kSplit, 4>[kKeyPieces][kSlabs];

  const Block<C>& block;
  Lane lane;
  int first_row;  // in the block's tile
  ExactSoftmax<kRows> softmax;
  ExactScoreMod<C> mod;
  float o[kSlabs][Shape::kGroups * kVector][4];  // unnormalised; columns as `multiply_values` has them

  __device__ __forceinline__ explicit WarpRows(const Block<C>& block)
      : block(block),
        first_row(__shfl_sync(~0u, threadIdx.x / 32, 0) * Shape::kWarpRows),  // warp-uniform for the compiler as well
        softmax(ExactScoreMod<C>::softmax_scale(block.p)),
        mod(block.p, block.coord.batch, block.coord.head) {
#pragma unroll
    for (auto& slab : o)
#pragma unroll
      for (auto& piece : slab) piece[0] = piece[1] = piece[2] = piece[3] = 0.f;
  }
  // The row in the block's tile of a lane's row r: r % 2 is its half of slab r / 2.
  __device__ __forceinline__ int row(int r) const { return first_row + r / 2 * 16 + r % 2 * 8 + lane.row; }

  // S = Q K^T of the tile in a stage.
  __device__ __forceinline__ void compute_scores(Scores& scores, const float* keys) const {
    const int own = lane.id % 4 * 4, odd = Shape::RowsOfK::kSwizzled ? lane.row % 2 : 0;
    const float* q_lane = block.shared + (first_row + lane.row) * Shape::RowsOfQ::kPitch + own;
    const float* k_lane = keys + lane.row * Shape::RowsOfK::kPitch + own;
#pragma unroll
    for (auto& slab : scores)
#pragma unroll
      for (auto& piece : slab) piece[0] = piece[1] = piece[2] = piece[3] = 0.f;
#pragma unroll C::kScoreSteps
    for (int c = 0; c < C::kHeadDim / 16; ++c) {
      const int column = (c ^ odd) * 16;
      Fragment<kSplit, 4> q[kSlabs][2];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 x = load_4(q_lane + column + (r / 2 * 16 + r % 2 * 8) * Shape::RowsOfQ::kPitch);
        q[r / 2][0].set(r % 2, x.x), q[r / 2][0].set(r % 2 + 2, x.y);
        q[r / 2][1].set(r % 2, x.z), q[r / 2][1].set(r % 2 + 2, x.w);
      }
#pragma unroll
      for (int n = 0; n < kKeyPieces; n += kAtOnce) {
        Fragment<kSplit, 2> k[kAtOnce][2];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const float4 x = load_4(k_lane + column + (n + j) * 8 * Shape::RowsOfK::kPitch);
          k[j][0].set(0, x.x), k[j][0].set(1, x.y);
          k[j][1].set(0, x.z), k[j][1].set(1, x.w);
        }
        add_products(scores, n, q, k);
      }
    }
  }

  // O = O * factor + P V of the tile in a stage. Piece kVector q + j of O has columns 8 kVector q + kVector m + j,
  // m = 0 ... 7: those of v that lanes load at once. The loops end with the columns of v and with the last key; without
  // these branches the compiler would load ahead for more products than it has registers for.
  __device__ __forceinline__ void multiply_values(const Weights& weights, const float (&factor)[kRows],
                                                  const float* values, int tile) {
    const int keys = block.k.rows - tile * C::kTileN;
    const float* v_lane = values + lane.column * Shape::RowsOfV::kPitch + lane.row * kVector;
#pragma unroll
    for (int q = 0; q < Shape::kGroups; ++q) {
      if (q > 0 && q * 8 * kVector >= block.v.cols) break;
      float high[kSlabs][kVector][4] = {}, low[kSlabs][kVector][4] = {};
#pragma unroll
      for (int n = 0; n < kKeyPieces; ++n) {
        if (n % C::kValueSteps == 0 && n > 0 && n * 8 >= keys) break;
        Fragment<kSplit, 2> v[kVector];
        load_values(v, v_lane + n * 8 * Shape::RowsOfV::kPitch + q * 8 * kVector);
#pragma unroll
        for (int s = 0; s < kSlabs; ++s)
#pragma unroll
          for (int j = 0; j < kVector; ++j) {
            multiply_high(high[s][j], weights[n][s], v[j]);
            multiply_low(low[s][j], weights[n][s], v[j]);
          }
      }
#pragma unroll
      for (int s = 0; s < kSlabs; ++s)
#pragma unroll
        for (int j = 0; j < kVector; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& sum = o[s][q * kVector + j][i];
            sum = fmaf(sum, factor[2 * s + i / 2], high[s][j][i] + low[s][j][i]);
          }
    }
  }

  // Softcap and ALiBi, and the mask if `kMasked`, on the scores of a tile.
  template <bool kMasked>
  __device__ __forceinline__ void modify(Scores& scores, int tile) const {
    if constexpr (!kMasked && !ExactScoreMod<C>::kActive) return;
    const int key = tile * C::kTileN;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int m = block.first_row + row(r);
      const Band::Columns visible = block.mask.band.visible_columns(m, key, lane.column);
#pragma unroll
      for (int n = 0; n < kKeyPieces; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[r / 2][n][r % 2 * 2 + e];
          if constexpr (ExactScoreMod<C>::kActive) score = mod(score, m, key + lane.column + n * 8 + e);
          if constexpr (kMasked) {
            bool hidden = n * 8 + e >= visible.end;
            if constexpr (MaskOf<C>::kHasBegin) hidden |= n * 8 + e < visible.begin;
            if (hidden) score = -INFINITY;
          }
        }
    }
    if constexpr (kMasked && MaskOf<C>::kIntervals) hide_intervals(scores, key);
  }

  // Scores to weights, with the factors of what O and the sums have so far.
  __device__ __forceinline__ void exponentiate(Scores& scores, Weights& weights, float (&factor)[kRows], int tile) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float row_max = -INFINITY;
#pragma unroll
      for (const auto& piece : scores[r / 2]) row_max = fmaxf(row_max, fmaxf(piece[r % 2 * 2], piece[r % 2 * 2 + 1]));
      factor[r] = softmax.set_reference(r, quad_max(row_max));
    }
#pragma unroll
    for (int n = 0; n < kKeyPieces; ++n)
#pragma unroll
      for (int s = 0; s < kSlabs; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& weight = scores[s][n][i];
          weight = softmax.exponentiate(weight, 2 * s + i / 2);
          softmax.sum[2 * s + i / 2] += weight;
        }
    drop(scores, tile * C::kTileN);
#pragma unroll
    for (int n = 0; n < kKeyPieces; ++n)
#pragma unroll
      for (int s = 0; s < kSlabs; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[n][s].set(i / 2 + i % 2 * 2, scores[s][n][i]);
  }

  // Normalise, and store O and the LSE. Four lanes store 128 bytes of a row side by side.
  __device__ __forceinline__ void store() {
    const fagen_forward_params& p = block.p;
    const float up = scale_up<C>(p, 1.f);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float total = quad_sum(softmax.sum[r]), sum = total == 0.f ? 1.f : total;
      const float inverse = __fdividef(1.f, sum);
      const int m = block.first_row + row(r);
      if (m >= p.seqlen_q) continue;
      if (p.lse && lane.id % 4 == 0)
        p.lse[(int64_t(block.coord.batch) * p.heads + block.coord.head) * p.seqlen_q + m] = softmax.lse(r, total);
#pragma unroll
      for (int n = 0; n < C::kHeadDimV / 16; ++n) {  // four columns of the lane
        alignas(16) float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int own = n * 4 + i, q = own / (2 * kVector), e = own / kVector % 2, j = own % kVector;
          x[i] = quotient(o[r / 2][q * kVector + j][r % 2 * 2 + e], sum, inverse);
          if constexpr (C::kDropout) x[i] *= up;
        }
        const int q = n * 4 / (2 * kVector), first = lane.column * kVector + n * 4 % (2 * kVector);
        store_columns<C::kAligned>(block.o.row(m), q * 8 * kVector + first, block.o.cols, x);
      }
    }
  }

 private:
  static __device__ __forceinline__ float4 load_4(const float* from) { return *reinterpret_cast<const float4*>(from); }

  // Add the products of 16 columns of q and k to kAtOnce pieces of the scores from piece n on.
  static __device__ __forceinline__ void add_products(Scores& scores, int n, const Fragment<kSplit, 4> (&q)[kSlabs][2],
                                                      const Fragment<kSplit, 2> (&k)[kAtOnce][2]) {
    float sums[kSlabs][kAtOnce][4] = {};
#pragma unroll
    for (int step = 0; step < 4; ++step)  // the small products first, so that little is cut from them
#pragma unroll
      for (int s = 0; s < kSlabs; ++s)
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j)
          step < 2 ? multiply_low(sums[s][j], q[s][step % 2], k[j][step % 2])
                   : multiply_high(sums[s][j], q[s][step % 2], k[j][step % 2]);
#pragma unroll
    for (int s = 0; s < kSlabs; ++s)
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[s][n + j][i] += sums[s][j][i];
  }

  // Keys `lane.column` and the next of 8, kVector columns each.
  static __device__ __forceinline__ void load_values(Fragment<kSplit, 2> (&v)[kVector], const float* from) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kVector == 4) {
        const float4 x = load_4(from + i * Shape::RowsOfV::kPitch);
        v[0].set(i, x.x), v[1].set(i, x.y), v[2].set(i, x.z), v[3].set(i, x.w);
      } else {
        const float2 x = *reinterpret_cast<const float2*>(from + i * Shape::RowsOfV::kPitch);
        v[0].set(i, x.x), v[1].set(i, x.y);
      }
    }
  }

  __device__ __forceinline__ void hide_intervals(Scores& scores, int key) const {
#pragma unroll
    for (int n = 0; n < kKeyPieces; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const HiddenRows hidden =
            block.mask.intervals.at(min(key + lane.column + n * 8 + e, block.mask.intervals.last_key));
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          if (hidden.contains(block.first_row + row(r))) scores[r / 2][n][r % 2 * 2 + e] = -INFINITY;
      }
  }

  // Dropout: weights that are not kept become 0.
  __device__ __forceinline__ void drop(Scores& weights, int key) const {
    if constexpr (C::kDropout) {
      const Dropout dropout = Dropout::of(block.p, block.coord.batch, block.coord.head);
      CellDropout<false, kKeyPieces % 4 == 0, kSlabs> cells;
#pragma unroll
      for (int n = 0; n < kKeyPieces; ++n) {
        cells.load(dropout, lane, block.first_row + first_row, key, n);
#pragma unroll
        for (int s = 0; s < kSlabs; ++s)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (!cells.kept(2 * s + i / 2, n, i % 2)) weights[s][n][i] = 0.f;
      }
    }
  }
};

}  // namespace fagen
