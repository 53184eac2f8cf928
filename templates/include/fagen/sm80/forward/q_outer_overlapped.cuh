// FlashAttention 2's order with FlashAttention 3's overlap inside a warp: the scores of the next tile are computed
// under the softmax of this one, so keys are needed one tile earlier than values.
#pragma once
#include "fagen/sm80/forward/epilogue.cuh"

namespace fagen {

template <class C, class Element>
__device__ __forceinline__ void run_q_outer_overlapped(const Block<C, Element>& block) {
  using Scores = typename Block<C, Element>::State::Scores;
  static_assert(!C::kOverlap || C::kStages > 1, "the next keys need a stage of their own");
  typename Block<C, Element>::State state(block.p, block.coord.batch, block.coord.head);
  const int row_tile = block.coord.row_tile;
  const int m0 = row_tile * C::kTileM, m1 = min(m0 + C::kTileM, block.p.seqlen_q);
  const TileRange range = TileRange::of<C::kTileN>(block.mask.band, m0, m1);
  auto walk = block.mask.walk(range, m0, m1);   // the tile whose scores are next
  auto ahead = block.mask.walk(range, m0, m1);  // the next tile of keys to be loaded

  // A group of copies: the keys of one tile, and the values of the tile before it.
  int k_slot = 0, v_slot = 0, v_ahead = -1;
  const auto load_next = [&] {
    if (v_ahead >= 0) {
      block.load_v(v_slot, v_ahead);
      v_slot = next_stage<C>(v_slot);
    }
    v_ahead = -1;
    if (ahead.valid()) {
      block.load_k(k_slot, ahead.tile);
      k_slot = next_stage<C>(k_slot);
      v_ahead = ahead.tile;
      ahead.advance();
    }
    ptx::cp_async_commit();
  };

  block.load_q(block.smem, row_tile);
  if constexpr (C::kQSource == QSource::registers) {
    ptx::cp_async_commit();
    block.template wait_copies<0>();
    state.load_q_registers(block.smem, block.first_row);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < C::kStages; ++i) load_next();

  int stage = 0;
  const auto modify = [&](Scores& s_acc, int tile, auto masked) {
    state.template modify<decltype(masked)::value>(s_acc, block.mod, block.mask, m0 + block.first_row,
                                                   tile * C::kTileN + block.first_key);
  };
  Scores s_acc;
  if (walk.valid()) {
    block.template wait_copies<C::kStages - 1>();
    state.compute_scores(s_acc, block.smem, block.first_row, block.k_tile(0), block.first_key, [](int) {});
    walk.partial(range) ? modify(s_acc, walk.tile, Constant<true>{}) : modify(s_acc, walk.tile, Constant<false>{});
    walk.advance();
  } else {
    store_rows(block, state, row_tile);
    return;
  }
  // S of `tile` is computed while the tile before it goes through softmax and second product.
  const auto visit = [&](int tile, auto masked) {
    const int next = next_stage<C>(stage);
    state.update_max(s_acc);
    block.template wait_copies<C::kStages - 2>();
    load_next();
    Scores s_next;
    state.add_values_under_scores(s_acc, block.v_tile(stage), s_next, block.smem, block.first_row, block.k_tile(next),
                                  block.first_key);
    modify(s_next, tile, masked);
#pragma unroll
    for (int s = 0; s < BlockShape<C>::kSlabs; ++s)
#pragma unroll
      for (int n = 0; n < BlockShape<C>::kWarpKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s_acc[s][n][i] = s_next[s][n][i];
    stage = next;
  };
  walk.visit_rest(range, visit);
  block.template wait_copies<0>();
  state.add_values(s_acc, block.v_tile(stage), block.first_key);
  store_rows(block, state, row_tile);
}

}  // namespace fagen
