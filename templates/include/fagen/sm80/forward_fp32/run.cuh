// The loop over tiles of keys: a block keeps its rows, and the keys and values pass by.
#pragma once
#include "fagen/sm80/forward_fp32/warp_rows.cuh"

namespace fagen {

// The copies of K and V ahead of the products. With one stage V lands while S is computed, and the next K while O is.
template <class C>
struct KeyStages {
  static constexpr bool kOne = C::kStages == 1;
  const Block<C>& block;
  typename MaskOf<C>::Walk ahead;  // the next tile to be copied
  int stage = 0;                   // of the present tile

  __device__ __forceinline__ explicit KeyStages(const Block<C>& block) : block(block), ahead(block.walk()) {
    block.copy_q();
    if constexpr (kOne) {
      if (ahead.valid()) block.copy_keys(0, ahead.tile);
      ptx::cp_async_commit();
    } else {
      for (int i = 0; i < C::kStages - 1; ++i) copy_next(i);
    }
  }
  // The keys of `tile` are there; so are its values where they have a stage of their own.
  __device__ __forceinline__ void wait_keys(int tile) {
    if constexpr (kOne) {
      block.template wait_copies<0>();
      block.copy_values(0, tile);
      ptx::cp_async_commit();
    } else {
      block.template wait_copies<C::kStages - 2>();
      copy_next(stage == 0 ? C::kStages - 1 : stage - 1);  // in place of the tile before
    }
  }
  __device__ __forceinline__ void wait_values() {
    if constexpr (kOne) {
      block.template wait_copies<0>();
      ahead.advance();
      if (ahead.valid()) block.copy_keys(0, ahead.tile);
      ptx::cp_async_commit();
    }
  }
  __device__ __forceinline__ void advance() { stage = stage == C::kStages - 1 ? 0 : stage + 1; }

 private:
  __device__ __forceinline__ void copy_next(int to) {
    if (ahead.valid()) {
      block.copy_keys(to, ahead.tile);
      block.copy_values(to, ahead.tile);
      ahead.advance();
    }
    ptx::cp_async_commit();
  }
};

template <class C>
__device__ __forceinline__ void run_forward(const Block<C>& block) {
  KeyStages<C> stages(block);
  WarpRows<C> rows(block);

  const auto visit = [&](int tile, auto masked) {
    typename WarpRows<C>::Scores scores;
    typename WarpRows<C>::Weights weights;
    float factor[WarpRows<C>::kRows];
    stages.wait_keys(tile);
    rows.compute_scores(scores, block.keys(stages.stage));
    rows.template modify<decltype(masked)::value>(scores, tile);
    rows.exponentiate(scores, weights, factor, tile);
    stages.wait_values();
    rows.multiply_values(weights, factor, block.values(stages.stage), tile);
    stages.advance();
  };
  block.walk().visit_rest(block.range, visit);
  ptx::cp_async_wait<0>();
  rows.store();
}

}  // namespace fagen
