// A consumer warpgroup: 64 rows of q against key tile after key tile, row tile by row tile without a pause. The product
// that ends one row tile, the store of its O, and the first scores of the next are under way together.
#pragma once
#include "fagen/common/element.cuh"
#include "fagen/common/row_state.cuh"
#include "fagen/sm90/forward/epilogue.cuh"
#include "fagen/sm90/forward/row_tile.cuh"
#include "fagen/sm90/forward/turns.cuh"
#include "fagen/sm90/forward/visibility.cuh"
#include "fagen/sm90/forward/weights.cuh"
#include "fagen/sm90/operand.cuh"

namespace fagen {

template <class C, class Element>
struct Consumer {
  using L = BlockLayout<C>;
  using M = MaskOf<C>;
  using State = RowState<C, 1, C::kTileN, C::kHeadDimV>;
  using Scores = typename State::Scores;  // [1][keys / 8][4]
  using Skipped = SkippedTiles<C>;

  static constexpr int kPieces = C::kTileN / 8;  // 8 keys each

  const fagen_forward_params& p;
  const LaunchArgs& launch;
  Pipelines<C> pipelines;
  const Band band;
  const HeadPacking<C> packing;
  const int group;  // among the consumers
  const Turns<C> turns;
  RowTile<C> row_tile;
  Skipped skipped;
  TileMask tile_mask;  // intervals: of the key tile whose scores are under way
  State state;
  Scores s_acc;
  WeightOperand<C> weights;
  // With intervals row tiles begin anywhere.
  TileDropout<C, Element, 1, C::kTileN % 32 == 0, !M::kIntervals> dropout;

  __device__ __forceinline__ Consumer(const fagen_forward_params& p, const LaunchArgs& launch, uint32_t smem, int group)
      : p(p), launch(launch), pipelines(smem), band(p), packing(launch), group(group), turns{group}, state(p) {
    weights.tile = smem + L::kWeights + group * L::kWeightBytes;
  }

  // ---- products: start, wait

  // S = Q K^T
  __device__ __forceinline__ void start_scores() {
    const Operand q = Operand::of_rows(pipelines.q.tile() + group * kGroupRows * kRowBytes);
    const Operand k = Operand::of_rows(pipelines.k.tile());
    pin(s_acc[0]);
    ptx::wgmma_fence();
#pragma unroll
    for (int d = 0; d < C::kHeadDim / 16; ++d) {
      const uint32_t within = d % 4 * 32;  // bytes into a slab's row
      ptx::wgmma_shared<C::kTileN>(s_acc[0], q.at(d / 4 * C::kTileM * kRowBytes + within),
                                   k.at(d / 4 * C::kTileN * kRowBytes + within), d > 0);
    }
    ptx::wgmma_commit();
  }
  // O += P V
  __device__ __forceinline__ void start_values() {
    pipelines.v.wait();
    const Operand v = Operand::of_columns(pipelines.v.tile(), C::kTileN * kRowBytes);
    pin(state.o[0]);
    weights.start_product(state.o[0], v);
    ptx::wgmma_commit();
  }
  // Each waits while up to kPending younger products go on, and frees the stage that the product has read.
  template <int kPending>
  __device__ __forceinline__ void wait_scores() {
    ptx::wgmma_wait<kPending>();
    pin(s_acc[0]);
    pipelines.k.release();
  }
  template <int kPending>
  __device__ __forceinline__ void wait_values() {
    ptx::wgmma_wait<kPending>();
    pin(state.o[0]);
    pipelines.v.release();
  }

  // ---- softmax

  // Take the maxima of a tile into the softmax: true if O must be multiplied by `factor`, once it is at rest.
  __device__ __forceinline__ bool update_max(float (&factor)[2]) {
    constexpr int kChains = 4;  // comparisons side by side, since each waits for the one before
    float row_max[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float chain[kChains];
#pragma unroll
      for (int n = 0; n < kPieces; ++n) {
        const float pair = fmaxf(s_acc[0][n][r * 2], s_acc[0][n][r * 2 + 1]);
        chain[n % kChains] = n < kChains ? pair : fmaxf(chain[n % kChains], pair);
      }
      row_max[r] = fmaxf(fmaxf(chain[0], chain[1]), fmaxf(chain[2], chain[3]));
    }
    const bool moved = C::kRescale == Rescale::each || __any_sync(~0u, state.softmax.exceeds_slack(row_max));
    if (moved) {
      for (float& x : row_max) x = quad_max(x);
      state.set_reference(s_acc, row_max, factor);
    } else {
      state.softmax.refresh_offset();
    }
    return moved;
  }
  // S becomes the weights, and these, less what is dropped, an operand.
  __device__ __forceinline__ void exponentiate() {
#pragma unroll
    for (int n = 0; n < kPieces; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s_acc[0][n][i];
        x = state.softmax.exponentiate(x, i / 2);
        state.softmax.sum[i / 2] += x;
      }
    weights.store([&](int n, int i) {
      const float* pair = &s_acc[0][2 * n + i / 2][i % 2 * 2];
      return dropout.kept(pack<Element>(pair[0], pair[1]), 0, n, i);
    });
  }

  // Score mods and the mask on the scores of a key tile.
  __device__ __forceinline__ void modify(const ScoreMod<C>& mod, int row0, const KeyTiles<C>& keys, bool partial) {
    int key;  // the first
    if constexpr (M::kIntervals)
      key = tile_mask.key();
    else
      key = keys.tile * C::kTileN;
    dropout.set_place(row0 + state.lane.row, key + state.lane.column);
    state.apply_score_mod(s_acc, mod, row0, key);
    if (!partial || (M::kIntervals && tile_mask.hides_nothing())) return;
    Visibility<C> visibility;
    if (M::kIntervals && !tile_mask.by_band())
      visibility.show_all();
    else
      visibility.set_band(band, packing, row0, key);
    if constexpr (M::kIntervals) visibility.clear_intervals(tile_mask, row_tile.intervals, row0);
    visibility.apply(s_acc);
  }

  // ---- a row tile

  // The next row tile, if there is one.
  __device__ __forceinline__ bool next() {
    const TileAssignment assignment = pipelines.assignments.pop();
    if (assignment.coord.row_tile < 0) return false;
    row_tile = RowTile<C>(p, launch, band, assignment);
    skipped.clip_keys(row_tile, band, packing, group);
    return true;
  }

  // Intervals: the mask of a tile of k that is there, where it is needed.
  __device__ __forceinline__ void load_tile_mask(bool partial) {
    if constexpr (M::kIntervals)
      if (partial || ScoreMod<C>::kActive || C::kDropout) tile_mask = TileMask::load(pipelines.tile_mask());
  }

  // S of a row tile's first keys
  __device__ __forceinline__ void start_first_scores() {
    pipelines.q.wait();
    pipelines.k.wait();
    load_tile_mask(true);
    start_scores();
  }

  // All key tiles of a row tile. Its first scores are under way already; its last product still is at the end.
  __device__ __forceinline__ void visit_keys() {
    const int row0 = row_tile.m0 + group * kGroupRows + threadIdx.x / 32 % 4 * 16;
    const ScoreMod<C> mod(p, row_tile.coord.batch, row_tile.coord.head);
    dropout.set_head(p, row_tile.coord.batch, row_tile.coord.head);
    KeyTiles<C> keys(row_tile);
    float factor[2];
    clear(state.o[0]);
    state.softmax.reset();
    if (keys.last()) pipelines.q.release();  // q has been read once the scores of the last tile are there
    keys.partial() ? modify(mod, row0, keys, true) : modify(mod, row0, keys, false);
    update_max(factor);  // O is still zero: nothing to rescale
    exponentiate();
    if (Skipped::kClips && skipped.count > 0) Skipped::skip_values(pipelines);  // the last skipped tile's
    keys.advance();
    keys.visit_rest([&](bool partial) {
      turns.wait();
      pipelines.k.wait();
      load_tile_mask(partial);
      start_scores();
      start_values();
      turns.pass();
      wait_scores<C::kOverlap ? 1 : 0>();  // with overlap, O += P V goes on under the maxima of this tile
      if (keys.last()) pipelines.q.release();
      modify(mod, row0, keys, partial);
      const bool moved = update_max(factor);
      pipelines.v.wait();  // it has long been there; without this branch ptxas keeps the pipelines' state lane by lane
      wait_values<0>();
      if (moved) state.rescale(factor);
      exponentiate();
    });
  }

  // ---- all row tiles

  __device__ __forceinline__ void store(const PendingTile& pending) {
    int early = 0;
    if constexpr (kLoadsEarly<C>)
      early = launch.v_early.of(launch.heads_per_kv_head.quotient(pending.head), pending.batch);
    store_rows<C, Element>(p, packing, state, pending, group, early);
  }
  // The last product of a row tile in a turn of its own, and the store.
  __device__ __forceinline__ void finish_alone(const PendingTile& pending) {
    turns.wait();
    start_values();
    turns.pass();
    wait_values<0>();
    store(pending);
  }
  // The same together with the first scores of the next row tile, whose turn this is.
  __device__ __forceinline__ void finish_joined(const PendingTile& pending) {
    start_values();
    start_first_scores();
    turns.pass();
    wait_values<1>();
    store(pending);
    wait_scores<0>();
  }

  // Not joined if the next row tile skips its first key tile: the pending product takes that turn instead. A turn is
  // also taken where there is no product, so that all warpgroups take as many.
  __device__ __forceinline__ void run() {
    if (C::kPingPong && group == L::kGroups - 1) turns.pass();  // the first warpgroup begins
    bool begun = false;  // the last row tile's last product is still to start
    bool idled = false;  // the last row tile had no rows for this warpgroup
    PendingTile pending;
    for (;;) {
      const bool more = !(C::kSchedule == Schedule::single && (begun || idled)) && next();
      const bool alone = begun && (!more || (Skipped::kIdles && skipped.count > 0));
      if (alone) {
        finish_alone(pending);
        begun = false;
      }
      if (!more) {
        if (idled) turns.wait(), turns.pass();
        return;
      }
      skipped.skip(turns, pipelines, alone);
      idled = Skipped::idle(row_tile, group);
      if (idled) {
        Skipped::skip_values(pipelines);
        pipelines.q.wait();
        pipelines.q.release();
        continue;
      }
      turns.wait();
      if (begun) {
        finish_joined(pending);
      } else {
        start_first_scores();
        turns.pass();
        wait_scores<0>();
      }
      visit_keys();
      pending = {row_tile.m0, row_tile.m1, row_tile.coord.head, row_tile.coord.batch};
      begun = true;
    }
  }
};

}  // namespace fagen
