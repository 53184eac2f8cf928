// A warp's products on tensor cores, S = Q K^T and O += P V by ldmatrix and mma, on top of its row state.
#pragma once
#include "fagen/common/dropout.cuh"
#include "fagen/common/element.cuh"
#include "fagen/common/row_state.cuh"
#include "fagen/ptx/mma_sync.cuh"

namespace fagen {

// This lane's address of a 16 x 16 piece for ldmatrix, rows down, pieces across: q, and v transposed on the way.
template <class Tile>
__device__ __forceinline__ uint32_t row_major_address(const Lane& lane, uint32_t tile, int row) {
  return tile + Tile::offset(row + lane.id % 16, lane.id / 16);
}
// The same of a 16 x 16 piece whose rows are the product's columns: k.
template <class Tile>
__device__ __forceinline__ uint32_t column_major_address(const Lane& lane, uint32_t tile, int row) {
  return tile + Tile::offset(row + lane.id / 16 * 8 + lane.id % 8, lane.id / 8 % 2);
}

template <class C, class Element, class TileQ, class TileK, class TileV, int kSlabs, int kKeys, int kColumns>
struct WarpProducts : RowState<C, kSlabs, kKeys, kColumns> {
  using State = RowState<C, kSlabs, kKeys, kColumns>;
  using Scores = typename State::Scores;
  using Weights = uint32_t[kKeys / 16][kSlabs][4];
  using State::lane;
  using State::o;
  using State::softmax;
  static constexpr int kDepth = C::kHeadDim / 16;
  static constexpr bool kQInRegisters = C::kQSource == QSource::registers;

  uint32_t q_registers[kSlabs][kQInRegisters ? kDepth : 1][4];
  TileDropout<C, Element, kSlabs, kKeys % 32 == 0> dropout;

  __device__ __forceinline__ WarpProducts(const fagen_forward_params& p, int batch, int head) : State(p) {
    dropout.set_head(p, batch, head);
  }

  // Score mods and the mask on the scores of a tile, whose place in the matrix is known from then on.
  template <bool kMasked>
  __device__ __forceinline__ void modify(Scores& s_acc, const ScoreMod<C>& mod, const MaskOf<C>& mask, int m, int key) {
    State::template modify<kMasked>(s_acc, mod, mask, m, key);
    dropout.set_place(m + lane.row, key + lane.column);
  }

  __device__ __forceinline__ void load_q_registers(uint32_t q_tile, int first_row) {
    if constexpr (kQInRegisters) {
#pragma unroll
      for (int s = 0; s < kSlabs; ++s)
#pragma unroll
        for (int d = 0; d < kDepth; ++d)
          ptx::ldmatrix_x4(q_registers[s][d],
                           TileQ::step(row_major_address<TileQ>(lane, q_tile, first_row), s * 16, d));
    }
  }

  // One step of S = Q K^T: the 16 columns of q and k that start at 16 d.
  template <class Between>
  __device__ __forceinline__ void score_step(Scores& s_acc, uint32_t q_lane, uint32_t k_lane, int d, Between between) {
    uint32_t q_frag[kSlabs][4];
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      if constexpr (kQInRegisters)
        for (int i = 0; i < 4; ++i) q_frag[s][i] = q_registers[s][d][i];
      else
        ptx::ldmatrix_x4(q_frag[s], TileQ::step(q_lane, s * 16, d));
    }
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      uint32_t k_frag[4];
      ptx::ldmatrix_x4(k_frag, TileK::step(k_lane, n * 16, d));
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) {
        ptx::mma_m16n8k16<Element>(s_acc[s][2 * n], q_frag[s], k_frag[0], k_frag[1]);
        ptx::mma_m16n8k16<Element>(s_acc[s][2 * n + 1], q_frag[s], k_frag[2], k_frag[3]);
      }
      between(d * (kKeys / 16) + n);
    }
  }

  // S = Q K^T for the warp's rows and the kKeys keys that start at row `first_key` of the tile. `between` is called
  // kDepth * kKeys / 16 times with its number, to fill the gaps between products.
  template <class Between>
  __device__ __forceinline__ void compute_scores(Scores& s_acc, uint32_t q_tile, int first_row, uint32_t k_tile,
                                                 int first_key, Between between) {
    const uint32_t q_lane = row_major_address<TileQ>(lane, q_tile, first_row);
    const uint32_t k_lane = column_major_address<TileK>(lane, k_tile, first_key);
#pragma unroll
    for (auto& slab : s_acc)
#pragma unroll
      for (auto& piece : slab) piece[0] = piece[1] = piece[2] = piece[3] = 0.f;
#pragma unroll
    for (int d = 0; d < kDepth; ++d) score_step(s_acc, q_lane, k_lane, d, between);
  }

  // One register of P = exp(S - reference): two columns of row i % 2 of piece 2 n + i / 2. The accumulator of S already
  // has the order of P's operand.
  __device__ __forceinline__ void exponentiate(const Scores& s_acc, Weights& p_frag, int s, int n, int i) {
    const float* pair = &s_acc[s][2 * n + i / 2][i % 2 * 2];
    const int r = s * 2 + i % 2;
    const float first = softmax.exponentiate(pair[0], r), second = softmax.exponentiate(pair[1], r);
    softmax.sum[r] += first + second;
    p_frag[n][s][i] = dropout.kept(pack<Element>(first, second), s, n, i);
  }

  // O += P V for 16 keys: `p_frag` their weights, `v_lane` this lane's address of their first 16 columns of v.
  __device__ __forceinline__ void value_step(const uint32_t (&p_frag)[kSlabs][4], uint32_t v_lane) {
#pragma unroll
    for (int d = 0; d < kColumns / 16; ++d) {
      uint32_t v_frag[4];
      ptx::ldmatrix_x4_trans(v_frag, TileV::step(v_lane, 0, d));
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) {
        ptx::mma_m16n8k16<Element>(o[s][2 * d], p_frag[s], v_frag[0], v_frag[1]);
        ptx::mma_m16n8k16<Element>(o[s][2 * d + 1], p_frag[s], v_frag[2], v_frag[3]);
      }
    }
  }

  // The whole softmax and second product of a tile.
  __device__ __forceinline__ void add_values(Scores& s_acc, uint32_t v_tile, int first_key) {
    this->update_max(s_acc);
    const uint32_t v_lane = row_major_address<TileV>(lane, v_tile, first_key);
    Weights p_frag;
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
#pragma unroll
      for (int s = 0; s < kSlabs; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) exponentiate(s_acc, p_frag, s, n, i);
      value_step(p_frag[n], v_lane + n * 16 * TileV::kPitch);
    }
  }

  // O += P V of one tile while S of the next is computed: the exponentials fill the gaps between its products.
  __device__ __forceinline__ void add_values_under_scores(const Scores& s_acc, uint32_t v_tile, Scores& s_next,
                                                          uint32_t q_tile, int first_row, uint32_t k_next,
                                                          int first_key) {
    constexpr int kWeights = kKeys / 16 * kSlabs * 4, kGaps = kDepth * (kKeys / 16);
    Weights p_frag;
    compute_scores(s_next, q_tile, first_row, k_next, first_key, [&](int gap) {
#pragma unroll
      for (int w = gap * kWeights / kGaps; w < (gap + 1) * kWeights / kGaps; ++w)
        exponentiate(s_acc, p_frag, w / 4 % kSlabs, w / 4 / kSlabs, w % 4);
    });
    const uint32_t v_lane = row_major_address<TileV>(lane, v_tile, first_key);
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) value_step(p_frag[n], v_lane + n * 16 * TileV::kPitch);
  }
};

}  // namespace fagen
