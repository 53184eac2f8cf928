// A consumer warpgroup on fp8 numbers: 64 rows of q against key tile after key tile, row tile by row tile. Products,
// turns and stores follow each other as those of sm90/forward/consumer.cuh do, but the exponentials of a tile may run
// under the product with the values of the one before: products are twice as fast here, and exponentials are not.
#pragma once
#include "fagen/sm90/forward/epilogue.cuh"
#include "fagen/sm90/forward/row_tile.cuh"
#include "fagen/sm90/forward/turns.cuh"
#include "fagen/sm90/forward/visibility.cuh"
#include "fagen/sm90/forward_fp8/softmax.cuh"
#include "fagen/sm90/forward_fp8/sums.cuh"
#include "fagen/sm90/forward_fp8/weights.cuh"

namespace fagen {

// The factor of a tensor's numbers of a head, in a block of rows where each has its own.
__device__ __forceinline__ float descale(const fagen_tensor& t, int batch, int head, int block = 0) {
  const float* factors = static_cast<const float*>(t.data);
  return factors ? factors[batch * t.stride[0] + head * t.stride[1] + block * t.stride[2]] : 1.f;
}

// The state of two rows that a thread carries from key tile to key tile: O, unnormalised, and the softmax.
template <class C>
struct Fp8RowState {
  Lane lane;
  float o[1][C::kHeadDimV / 8][4];
  Fp8Softmax<C> softmax;
};

template <class C, class Element>
struct Fp8Consumer {
  using L = BlockLayout<C>;
  using Scores = float[1][C::kTileN / 8][4];
  using Mod = ScoreMod<C>;
  using Skipped = SkippedTiles<C>;

  static constexpr int kPieces = C::kTileN / 8;  // 8 keys each
  static constexpr bool kBlocks = C::kScaleBlock > 0, kIntervals = MaskOf<C>::kIntervals;
  static_assert(!kBlocks || C::kScaleBlock % C::kTileN == 0, "a key tile has no more than two descales");

  const fagen_forward_fp8_params& given;
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
  Fp8RowState<C> state;
  Scores s_acc;
  Fp8Weights<C> weights;
  ValueSums<C> sums;
  float of_rows[2];  // blocks: what takes scores of the row tile to logarithms, but for the descale of k
  float of_values;   // the descale of v, of the row tile that was visited last

  __device__ __forceinline__ Fp8Consumer(const fagen_forward_fp8_params& given, const LaunchArgs& launch, uint32_t smem,
                                         int group)
      : given(given),
        p(given.forward),
        launch(launch),
        pipelines(smem),
        band(p),
        packing(launch),
        group(group),
        turns{group} {}

  // ---- products: start, wait

  // S = Q K^T
  __device__ __forceinline__ void start_scores() {
    const Operand q = Operand::of_rows(pipelines.q.tile() + group * kGroupRows * kRowBytes);
    const Operand k = Operand::of_rows(pipelines.k.tile());
    pin(s_acc[0]);
    ptx::wgmma_fence();
#pragma unroll
    for (int d = 0; d < (C::kHeadDim + 31) / 32; ++d) {
      const uint32_t within = d % 4 * 32;  // bytes into a slab's row
      ptx::wgmma_e4m3_shared<C::kTileN>(s_acc[0], q.at(d / 4 * C::kTileM * kRowBytes + within),
                                        k.at(d / 4 * C::kTileN * kRowBytes + within), d > 0);
    }
    ptx::wgmma_commit();
  }
  // O += P V
  __device__ __forceinline__ void start_values() {
    pipelines.v.wait();
    auto& target = sums.target(state.o[0]);
    pin(target);
    weights.start_product(target, operand_of_values(pipelines.v.tile()), sums.more());
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
    pin(sums.target(state.o[0]));
    pipelines.v.release();
  }

  // ---- softmax

  // Take the maxima of a tile into the softmax: true if O must be multiplied by `factor`, once it is at rest.
  // References follow every growth of a maximum: the largest weight of a row is then 1, which e4m3 does not round.
  __device__ __forceinline__ bool update_max(float (&factor)[2]) {
    constexpr int kChains = 4;  // comparisons side by side, since each waits for the one before
    auto& softmax = state.softmax;
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
    const bool moved = C::kRescale == Rescale::each || __any_sync(~0u, softmax.must_move(row_max));
    if (moved) {
      for (float& x : row_max) x = quad_max(x);
      softmax.set_reference(row_max, factor);
    }
    softmax.refresh_offset();
    if (moved)
      while (__any_sync(~0u, softmax.offset_rounds()))  // once; as a loop it stays out of the common tile's way
        softmax.subtract_references(s_acc[0], row_max);
    return moved;
  }
  // S becomes the weights times kWeightScale, and so do their sums.
  __device__ __forceinline__ void exponentiate() {
    auto& softmax = state.softmax;
#pragma unroll
    for (int n = 0; n < kPieces; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s_acc[0][n][i];
        x = (n * 4 + i) % 8 < C::kExpOnFma ? softmax.template exponentiate<true>(x, i / 2)
                                           : softmax.template exponentiate<false>(x, i / 2);
        softmax.sum[i / 2] += x;
      }
  }

  // ---- scores

  // The present key tile's first key.
  __device__ __forceinline__ int first_key(const KeyTiles<C>& keys) const {
    if constexpr (kIntervals)
      return tile_mask.key();
    else
      return keys.tile * C::kTileN;
  }
  // Intervals: the mask of a tile of k that is there, where it is needed.
  __device__ __forceinline__ void load_tile_mask(bool partial) {
    if constexpr (kIntervals)
      if (partial || kBlocks) tile_mask = TileMask::load(pipelines.tile_mask());
  }
  // The descale of k that keys from `key` on have.
  __device__ __forceinline__ float descale_of_keys(int key) const {
    return descale(given.descale_k, row_tile.coord.batch, row_tile.kv_head, min(key, p.seqlen_k - 1) / C::kScaleBlock);
  }
  // Blocks: a key tile's descale becomes part of the scale of its scores. May be called while products are under way.
  __device__ __forceinline__ void load_key_scale(int key) {
    if constexpr (kBlocks) {
      const float of_keys = descale_of_keys(key);
#pragma unroll
      for (int r = 0; r < 2; ++r) state.softmax.scale[r] = of_rows[r] * of_keys;
    }
  }
  // Blocks and intervals: keys of a second block, which a key tile that begins anywhere may have, get the scale of the
  // first one's.
  __device__ __forceinline__ void join_blocks(int key) {
    const int first_piece = (C::kScaleBlock - key % C::kScaleBlock) / 8;  // of the second block
    if (first_piece >= kPieces) return;
    const float factor = descale_of_keys(key + first_piece * 8) / descale_of_keys(key);
#pragma unroll
    for (int n = 0; n < kPieces; ++n)
      if (n >= first_piece)
        for (float& x : s_acc[0][n]) x *= factor;
  }
  // Score mods and the mask on the scores of a key tile.
  __device__ __forceinline__ void modify(const Mod& mod, int row0, int key, bool partial) {
    if constexpr (kBlocks && kIntervals) join_blocks(key);
    if constexpr (Mod::kActive) {
#pragma unroll
      for (auto& piece : s_acc[0])
#pragma unroll
        for (int i = 0; i < 4; ++i)
          piece[i] = mod.cap_log2 * ptx::tanh_approx(piece[i] * state.softmax.scale_of_products(i / 2));
    }
    if (!partial || (kIntervals && tile_mask.hides_nothing())) return;
    Visibility<C> visibility;
    if (kIntervals && !tile_mask.by_band())
      visibility.show_all();
    else
      visibility.set_band(band, packing, row0, key);
    if constexpr (kIntervals) visibility.clear_intervals(tile_mask, row_tile.intervals, row0);
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
  // S of a row tile's first keys
  __device__ __forceinline__ void start_first_scores() {
    pipelines.q.wait();
    pipelines.k.wait();
    load_tile_mask(true);
    start_scores();
  }
  // The descales of a row tile go where a factor of its scores, and of its O, is used anyway.
  __device__ __forceinline__ void load_descales(const Mod& mod, int row0) {
    const int batch = row_tile.coord.batch, kv_head = row_tile.kv_head;
    of_values = descale(given.descale_v, batch, kv_head);
    if constexpr (kBlocks) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = min(row0 + r * 8 + state.lane.row, p.seqlen_q - 1);
        of_rows[r] = mod.scale * descale(given.descale_q, batch, row_tile.coord.head, row / C::kScaleBlock);
      }
    } else {
      state.softmax.scale[0] =
          mod.scale * descale(given.descale_q, batch, kv_head) * descale(given.descale_k, batch, kv_head);
    }
  }

  // All key tiles of a row tile. Its first scores are under way already; its last product still is at the end.
  __device__ __forceinline__ void visit_keys() {
    const int row0 = row_tile.m0 + group * kGroupRows + threadIdx.x / 32 % 4 * 16;
    const Mod mod(p, row_tile.coord.batch, row_tile.coord.head);
    KeyTiles<C> keys(row_tile);
    float factor[2];
    load_descales(mod, row0);
    load_key_scale(first_key(keys));
    sums.begin(state.o[0]);
    state.softmax.reset();
    if (keys.last()) pipelines.q.release();  // q has been read once the scores of the last tile are there
    keys.partial() ? modify(mod, row0, first_key(keys), true) : modify(mod, row0, first_key(keys), false);
    update_max(factor);  // O is still zero: nothing to rescale
    exponentiate();
    weights.store(s_acc[0]);
    if (Skipped::kClips && skipped.count > 0) Skipped::skip_values(pipelines);  // the last skipped tile's
    keys.advance();
    keys.visit_rest([&](bool partial) {
      turns.wait();
      pipelines.k.wait();
      load_tile_mask(partial);
      start_scores();
      start_values();
      turns.pass();
      load_key_scale(first_key(keys));
      wait_scores<C::kOverlap == Overlap::nothing ? 0 : 1>();  // with overlap, O += P V goes on under what follows
      if (keys.last()) pipelines.q.release();
      modify(mod, row0, first_key(keys), partial);
      const bool moved = update_max(factor);
      if (C::kOverlap == Overlap::softmax) exponentiate();
      pipelines.v.wait();  // it has long been there; without this branch ptxas keeps the pipelines' state lane by lane
      wait_values<0>();
      sums.take(state.o[0], factor, moved);
      if (C::kOverlap != Overlap::softmax) exponentiate();
      weights.store(s_acc[0]);
    });
  }

  // The last product of a row tile is there.
  __device__ __forceinline__ void store(const PendingTile& pending) {
    sums.finish(state.o[0]);
    const float factor = of_values / kWeightScale;
    multiply_rows(state.o[0], {factor, factor});
    for (float& sum : state.softmax.sum) sum *= 1.f / kWeightScale;
    store_rows<C, Element>(p, packing, state, pending, group);
  }

  // ---- all row tiles

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
