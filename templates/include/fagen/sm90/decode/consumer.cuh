// A consumer warpgroup: 64 rows of q against the key tiles of a split. The scores of a tile are under way together with
// the product of the tile before, which goes on under the maxima.
#pragma once
#include "fagen/sm90/decode/layout.cuh"
#include "fagen/sm90/decode/store.cuh"
#include "fagen/sm90/operand.cuh"

namespace fagen {

template <class C, class Element>
struct DecodeConsumer {
  using L = DecodeLayout<C>;
  using M = MaskOf<C>;
  using State = RowState<C, 1, C::kTileN, C::kHeadDimV>;
  static constexpr int kPieces = C::kTileN / 8, kSteps = C::kTileN / 16;

  const DecodeTile<C>& tile;
  const DecodeSplit<C>& split;
  const uint32_t smem;
  const int group;
  const int warp_row;  // the warp's first row of the tile
  DecodeRings<C> rings;
  ScoreMod<C> mod;
  int begin[2], end[2];  // keys that this thread's rows see
  State state;
  typename State::Scores s_acc;
  uint32_t weights[kSteps][4];

  __device__ __forceinline__ DecodeConsumer(const fagen_forward_params& scores, const DecodeTile<C>& tile,
                                            const DecodeSplit<C>& split, uint32_t smem, int group)
      : tile(tile),
        split(split),
        smem(smem),
        group(group),
        warp_row(group * kGroupRows + threadIdx.x / 32 % 4 * 16),
        rings(smem),
        mod(scores, 0, 0),
        state(scores) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = tile.token(tile.first_row + row_of(r));
      begin[r] = tile.begin_of(token), end[r] = tile.end_of(token);
    }
  }
  __device__ __forceinline__ int row_of(int r) const { return warp_row + r * 8 + state.lane.row; }

  // ---- products: start, wait

  // S = Q K^T
  __device__ __forceinline__ void start_scores() {
    rings.k.wait();
    const Operand q = Operand::of_rows(smem + group * kGroupRows * kRowBytes);
    const Operand k = Operand::of_rows(rings.k.tile());
    pin(s_acc[0]);
    ptx::wgmma_fence();
#pragma unroll
    for (int d = 0; d < C::kHeadDim / 16; ++d) {
      const int within = d % 4 * 32;  // bytes into a slab's row
      ptx::wgmma<C::kTileN, false, false>(s_acc[0], q.at(d / 4 * C::kTileM * kRowBytes + within),
                                          k.at(d / 4 * C::kTileN * kRowBytes + within), d > 0);
    }
    ptx::wgmma_commit();
  }
  // O += P V. `key`: the first of the tile.
  __device__ __forceinline__ void start_values(int key) {
    rings.v.wait();
    clear_hidden_rows(key);
    const Operand v = Operand::of_columns(rings.v.tile(), C::kTileN * kRowBytes);
    pin(state.o[0]);
    pin(weights);
    ptx::wgmma_fence();
#pragma unroll
    for (int n = 0; n < kSteps; ++n)
      ptx::wgmma<C::kHeadDimV, true>(state.o[0], weights[n], v.at(n * 16 * kRowBytes), true);
    ptx::wgmma_commit();
  }
  // Each waits while up to kPending younger products go on, and frees the stage that the product has read.
  template <int kPending>
  __device__ __forceinline__ void wait_scores() {
    ptx::wgmma_wait<kPending>();
    pin(s_acc[0]);
    rings.k.release();
  }
  __device__ __forceinline__ void wait_values() {
    ptx::wgmma_wait<0>();
    pin(state.o[0]);
    rings.v.release();
  }

  // Rows of the cache that nobody sees may hold anything, and 0 times that need not be 0: clear them in the tile of
  // values. Every warpgroup does.
  __device__ __forceinline__ void clear_hidden_rows(int key) const {
    const int first = tile.begin - key, last = tile.end - key;
    if (first <= 0 && last >= C::kTileN) return;
    for (int i = threadIdx.x % 128; i < C::kTileN * 8; i += 128) {
      if (i / 8 >= first && i / 8 < last) continue;
#pragma unroll
      for (int slab = 0; slab < L::kSlabsV; ++slab)
        ptx::st_shared_16(rings.v.tile() + slab * C::kTileN * kRowBytes + i * 16, make_uint4(0, 0, 0, 0));
    }
    ptx::fence_shared_writes();
    ptx::barrier_sync(kRowsCleared + group, 128);
  }

  // ---- softmax

  // Softcap, and the mask on tiles that some row does not see in full. `key`: the first of the tile.
  __device__ __forceinline__ void modify(int key) {
    state.apply_score_mod(s_acc, mod, 0, 0);
    if (key >= tile.full_begin && key + C::kTileN <= tile.full_end) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int from = begin[r] - key - state.lane.column, to = end[r] - key - state.lane.column;
#pragma unroll
      for (int n = 0; n < kPieces; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          bool hidden = n * 8 + e >= to;
          if constexpr (M::kHasBegin) hidden |= n * 8 + e < from;
          if (hidden) s_acc[0][n][r * 2 + e] = -INFINITY;
        }
    }
  }
  // Take the maxima of a tile into the softmax: true if O must be multiplied by `factor`, once it is at rest.
  __device__ __forceinline__ bool update_max(float (&factor)[2]) {
    float row_max[2];
    state.thread_maxima(s_acc, row_max);
    const bool moved = __any_sync(~0u, state.softmax.exceeds_slack(row_max));
    if (moved) {
      for (float& x : row_max) x = quad_max(x);
      state.set_reference(s_acc, row_max, factor);
    } else {
      state.softmax.refresh_offset();
    }
    return moved;
  }
  // S becomes the weights, an operand.
  __device__ __forceinline__ void exponentiate() {
#pragma unroll
    for (auto& piece : s_acc[0])
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        piece[i] = state.softmax.exponentiate(piece[i], i / 2);
        state.softmax.sum[i / 2] += piece[i];
      }
#pragma unroll
    for (int n = 0; n < kSteps; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &s_acc[0][2 * n + i / 2][i % 2 * 2];
        weights[n][i] = pack<Element>(pair[0], pair[1]);
      }
  }

  __device__ __forceinline__ void visit_keys() {
    if (split.first >= split.end) return;
    float factor[2];
    int key = split.first * C::kTileN;
    start_scores();
    wait_scores<0>();
    modify(key);
    update_max(factor);  // O is still zero: nothing to rescale
    exponentiate();
#pragma unroll 1
    for (int i = split.first + 1; i < split.end; ++i) {
      start_scores();
      start_values(key);
      wait_scores<1>();
      key += C::kTileN;
      modify(key);
      const bool moved = update_max(factor);
      wait_values();
      if (moved) state.rescale(factor);
      exponentiate();
    }
    start_values(key);
    wait_values();
  }

  __device__ __forceinline__ void finish(const DecodeOutput<C, Element>& output, const DecodeGrid& grid, int index) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      store_row(output, grid, index, split.used == 1, state.o[0], r, row_of(r), 0, state.softmax.reference[r],
                quad_sum(state.softmax.sum[r]));
  }
};

}  // namespace fagen
