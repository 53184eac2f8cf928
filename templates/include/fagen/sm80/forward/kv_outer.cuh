// FlashAttention 1's order: a block keeps one tile of keys and the rows pass by; O, maxima and sums wait in device
// memory between two visits. A block owns a run of row tiles, so nothing is shared between blocks.
#pragma once
#include "fagen/sm80/forward/epilogue.cuh"

namespace fagen {

// A row tile's state as its threads hold it: 16 bytes a thread at a time, neighbours side by side.
template <class C, class Element>
struct StoredState {
  using State = typename Block<C, Element>::State;
  static constexpr int kColumnPieces = BlockShape<C>::kWarpColumns / 8;
  static constexpr int kPieces = BlockShape<C>::kSlabs * kColumnPieces, kStats = BlockShape<C>::kSlabs;
  static constexpr int kFloat4s = (kPieces + kStats) * BlockShape<C>::kThreads;  // per row tile

  static __device__ __forceinline__ void save(float4* to, const State& state) {
    to += threadIdx.x;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const float (&x)[4] = state.o[i / kColumnPieces][i % kColumnPieces];
      to[i * BlockShape<C>::kThreads] = make_float4(x[0], x[1], x[2], x[3]);
    }
#pragma unroll
    for (int i = 0; i < kStats; ++i)
      to[(kPieces + i) * BlockShape<C>::kThreads] =
          make_float4(state.softmax.reference[2 * i], state.softmax.reference[2 * i + 1], state.softmax.sum[2 * i],
                      state.softmax.sum[2 * i + 1]);
  }
  static __device__ __forceinline__ void restore(const float4* from, State& state) {
    from += threadIdx.x;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      float (&x)[4] = state.o[i / kColumnPieces][i % kColumnPieces];
      const float4 value = from[i * BlockShape<C>::kThreads];
      x[0] = value.x, x[1] = value.y, x[2] = value.z, x[3] = value.w;
    }
#pragma unroll
    for (int i = 0; i < kStats; ++i) {
      const float4 value = from[(kPieces + i) * BlockShape<C>::kThreads];
      state.softmax.reference[2 * i] = value.x, state.softmax.reference[2 * i + 1] = value.y;
      state.softmax.sum[2 * i] = value.z, state.softmax.sum[2 * i + 1] = value.w;
    }
    state.softmax.refresh_limit();
  }
};

template <class C, class Element>
__device__ __forceinline__ void run_kv_outer(const Block<C, Element>& block) {
  using S = BlockShape<C>;
  using Stored = StoredState<C, Element>;
  const GridArgs& grid = block.grid;
  const int per_block = (grid.row_tiles + grid.blocks_of_rows - 1) / grid.blocks_of_rows;
  const int first_tile = block.coord.row_tile * per_block, end_tile = min(first_tile + per_block, grid.row_tiles);
  if (first_tile >= end_tile) return;
  const int64_t head = int64_t(block.coord.batch) * block.p.heads + block.coord.head;
  const auto stored = [&](int row_tile) { return grid.state + (head * grid.row_tiles + row_tile) * Stored::kFloat4s; };
  const auto range_of = [&](int first, int end) {
    return TileRange::of<C::kTileN>(block.mask.band, first * C::kTileM, min(end * C::kTileM, block.p.seqlen_q));
  };
  typename Block<C, Element>::State state(block.p, block.coord.batch, block.coord.head);
  for (int row_tile = first_tile; row_tile < end_tile; ++row_tile) Stored::save(stored(row_tile), state);

  const TileRange keys = range_of(first_tile, end_tile);
  for (int tile = keys.begin; tile < keys.end; ++tile) {
    block.template wait_copies<0>();  // everyone is done with the previous keys, and no copy of theirs is under way
    block.load_k(0, tile);
    block.load_v(0, tile);
    ptx::cp_async_commit();
    for (int row_tile = first_tile; row_tile < end_tile; ++row_tile) {
      const int m0 = row_tile * C::kTileM, m1 = min(m0 + C::kTileM, block.p.seqlen_q);
      const TileRange range = range_of(row_tile, row_tile + 1);
      bool skip = tile < range.begin || tile >= range.end;
      bool partial = tile < range.full_begin || tile >= range.full_end;
      if constexpr (MaskOf<C>::kIntervals) {
        bool empty, hidden;
        block.mask.intervals.classify(tile, m0, m1, empty, hidden);
        skip |= empty;
        partial |= hidden;
      }
      if (skip) continue;
      __syncthreads();  // and with the previous rows
      block.load_q(block.smem, row_tile);
      ptx::cp_async_commit();
      Stored::restore(stored(row_tile), state);
      block.template wait_copies<0>();
      state.load_q_registers(block.smem, block.first_row);
      const auto visit = [&](auto masked) {
        constexpr bool kMasked = decltype(masked)::value;
        typename Block<C, Element>::State::Scores s_acc;
        state.compute_scores(s_acc, block.smem, block.first_row, block.k_tile(0), block.first_key, [](int) {});
        state.template modify<kMasked>(s_acc, block.mod, block.mask, m0 + block.first_row,
                                       tile * C::kTileN + block.first_key);
        state.add_values(s_acc, block.v_tile(0), block.first_key);
      };
      partial ? visit(Constant<true>{}) : visit(Constant<false>{});
      Stored::save(stored(row_tile), state);
    }
  }
  for (int row_tile = first_tile; row_tile < end_tile; ++row_tile) {
    Stored::restore(stored(row_tile), state);
    store_rows(block, state, row_tile);
    __syncthreads();  // the next tile's O goes through the same shared memory
  }
}

}  // namespace fagen
