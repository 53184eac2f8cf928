// Two warps share rows: each computes the scores of half of the keys and half of the columns of O. A warp then holds
// twice the rows for the same registers, so that every operand it reads from shared memory feeds twice the products.
// The price: the weights, and now and then the maxima, pass through shared memory.
#pragma once
#include "fagen/sm80/forward/block.cuh"

namespace fagen {

template <class C, class Element>
struct Pair {
  using B = Block<C, Element>;
  using S = BlockShape<C>;
  using State = typename B::State;
  using TileP = typename S::TileP;
  static constexpr int kRows = State::kRows, kPieces = S::kWarpKeys / 16;

  const B& block;
  const Lane lane;
  int barrier = 1 + block.warp / 2;
  uint32_t p_tile = block.smem + S::kStagesEnd;
  float* mine = reinterpret_cast<float*>(block.smem_bytes + S::kPairStats) + block.warp * S::kWarpRows;
  const float* partner = reinterpret_cast<float*>(block.smem_bytes + S::kPairStats) + (block.warp ^ 1) * S::kWarpRows;

  __device__ __forceinline__ static int row(const Lane& lane, int r) { return r / 2 * 16 + r % 2 * 8 + lane.row; }

  // Exchange one number a row with the partner.
  __device__ __forceinline__ void exchange(const float (&sent)[kRows], float (&received)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (lane.id % 4 == 0) mine[row(lane, r)] = sent[r];
    ptx::barrier_sync(barrier, 64);
#pragma unroll
    for (int r = 0; r < kRows; ++r) received[r] = partner[row(lane, r)];
  }

  // Both warps keep the same references: they move together or not at all.
  __device__ __forceinline__ void update_max(State& state, typename State::Scores& s_acc) const {
    float row_max[kRows], other[kRows], factor[kRows];
    state.thread_maxima(s_acc, row_max);
    if (ptx::barrier_any(barrier, 64, state.softmax.exceeds_slack(row_max))) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) row_max[r] = quad_max(row_max[r]);
      exchange(row_max, other);
#pragma unroll
      for (int r = 0; r < kRows; ++r) row_max[r] = fmaxf(row_max[r], other[r]);
      state.set_reference(s_acc, row_max, factor);
      state.rescale(factor);
    } else {
      state.softmax.refresh_offset();
    }
  }

  // Softmax of this warp's half of the keys, O += P V of all of them for its half of the columns.
  __device__ __forceinline__ void add_values(State& state, typename State::Scores& s_acc, uint32_t v_tile) const {
    update_max(state, s_acc);  // its barrier also says that the partner has read the weights of the tile before
    typename State::Weights own_weights;
#pragma unroll
    for (int n = 0; n < kPieces; ++n)
#pragma unroll
      for (int s = 0; s < S::kSlabs; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          state.exponentiate(s_acc, own_weights, s, n, i);
          const int chunk = (block.first_key + n * 16) / 8 + i / 2;
          ptx::st_shared_4(p_tile + TileP::offset(block.first_row + row(lane, s * 2 + i % 2), chunk) + lane.column * 2,
                           own_weights[n][s][i]);
        }
    const uint32_t v_lane =
        S::TileV::step(row_major_address<typename S::TileV>(lane, v_tile, 0), 0, block.first_column / 16);
#pragma unroll
    for (int n = 0; n < kPieces; ++n)
      state.value_step(own_weights[n], v_lane + (block.first_key + n * 16) * S::TileV::kPitch);
    ptx::barrier_sync(barrier, 64);  // the partner's weights are there
    const int other_key = block.first_key ^ S::kWarpKeys;
    const uint32_t p_lane = row_major_address<TileP>(lane, p_tile, block.first_row);
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      uint32_t other_weights[S::kSlabs][4];
#pragma unroll
      for (int s = 0; s < S::kSlabs; ++s)
        ptx::ldmatrix_x4(other_weights[s], TileP::step(p_lane, s * 16, other_key / 16 + n));
      state.value_step(other_weights, v_lane + (other_key + n * 16) * S::TileV::kPitch);
    }
  }
};

}  // namespace fagen
