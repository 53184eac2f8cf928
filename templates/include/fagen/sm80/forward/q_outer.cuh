// FlashAttention 2's order: a block keeps one tile of rows, and the keys pass by.
#pragma once
#include "fagen/sm80/forward/epilogue.cuh"

namespace fagen {

template <class C, class Element>
__device__ __forceinline__ void run_q_outer(const Block<C, Element>& block) {
  using S = BlockShape<C>;
  typename Block<C, Element>::State state(block.p, block.coord.batch, block.coord.head);
  const int row_tile = block.coord.row_tile;
  const int m0 = row_tile * C::kTileM, m1 = min(m0 + C::kTileM, block.p.seqlen_q);
  const TileRange range = TileRange::of<C::kTileN>(block.mask.band, m0, m1);

  auto walk = block.mask.walk(range, m0, m1);   // the tile that is computed
  auto ahead = block.mask.walk(range, m0, m1);  // the next tile to be loaded

  block.load_q(block.smem, row_tile);
  if constexpr (C::kQSource == QSource::registers) {
    ptx::cp_async_commit();
    block.template wait_copies<0>();
    state.load_q_registers(block.smem, block.first_row);
    __syncthreads();
  }
  if constexpr (C::kStages == 1) {
    if (ahead.valid()) block.load_k(0, ahead.tile);
    ptx::cp_async_commit();
  } else {
#pragma unroll
    for (int stage = 0; stage < C::kStages - 1; ++stage) {
      if (ahead.valid()) {
        block.load_k(stage, ahead.tile);
        block.load_v(stage, ahead.tile);
        ahead.advance();
      }
      ptx::cp_async_commit();
    }
  }

  int stage = 0, free_stage = C::kStages - 1;
  const auto visit = [&](int tile, auto masked) {
    constexpr bool kMasked = decltype(masked)::value;
    const int key = tile * C::kTileN + block.first_key;
    typename Block<C, Element>::State::Scores s_acc;
    if constexpr (C::kStages == 1) {  // V lands while S is computed, the next K while O is
      block.template wait_copies<0>();
      block.load_v(0, tile);
      ptx::cp_async_commit();
    } else {  // the stage that everyone left a tile ago takes the newest tile
      block.template wait_copies<C::kStages - 2>();
      if (ahead.valid()) {
        block.load_k(free_stage, ahead.tile);
        block.load_v(free_stage, ahead.tile);
        ahead.advance();
      }
      ptx::cp_async_commit();
    }
    state.compute_scores(s_acc, block.smem, block.first_row, block.k_tile(stage), block.first_key, [](int) {});
    state.template modify<kMasked>(s_acc, block.mod, block.mask, m0 + block.first_row, key);
    if constexpr (C::kStages == 1) {
      block.template wait_copies<0>();
      ahead.advance();
      if (ahead.valid()) block.load_k(0, ahead.tile);
      ptx::cp_async_commit();
    }
    if constexpr (S::kPairs)
      Pair<C, Element>{block, state.lane}.add_values(state, s_acc, block.v_tile(stage));
    else
      state.add_values(s_acc, block.v_tile(stage), block.first_key);
    if constexpr (C::kStages > 1) {
      free_stage = stage;
      stage = next_stage<C>(stage);
    }
  };

  walk.visit_rest(range, visit);
  store_rows(block, state, row_tile);
}

}  // namespace fagen
