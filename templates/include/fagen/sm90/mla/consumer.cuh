// A consumer warpgroup of the two. Of each pair of key tiles it computes the scores and weights of its own, and adds
// both tiles' values to its half of the columns of O, those of tile 0 first. While one warpgroup is at its softmax the
// other's products go on, and tile 0 is free for the next pair while tile 1 is at work:
//
//   warpgroup 0   S0 = Q K0^T | softmax, store P0 | O_left += P0 V0 ...................... | O_left += P1 V1, next S0
//   warpgroup 1   .............. S1 = Q K1^T ..... | O_right += P0 V0 | softmax, store P1 | O_right += P1 V1
//
// Both refer their weights to the same maxima: those after tile 0 come with P0, those after tile 1 with P1.
#pragma once
#include "fagen/common/row_state.cuh"
#include "fagen/ptx/barrier.cuh"
#include "fagen/ptx/cp_async.cuh"
#include "fagen/ptx/mbarrier.cuh"
#include "fagen/ptx/mma_sync.cuh"
#include "fagen/sm90/decode/store.cuh"
#include "fagen/sm90/mla/cluster_merge.cuh"
#include "fagen/sm90/mla/layout.cuh"
#include "fagen/sm90/operand.cuh"

namespace fagen {

template <class C, class Element, int kGroup>
struct MlaConsumer {
  using L = MlaLayout<C>;
  static constexpr int kOther = 1 - kGroup;
  static constexpr int kPieces = C::kTileN / 8, kSteps = C::kTileN / 16;

  const DecodeTile<C>& tile;
  const uint32_t smem;
  const Lane lane;
  const int warp_row = threadIdx.x / 32 % 4 * 16;  // the warp's first row
  OnlineSoftmax<2, C::kRescale == Rescale::deferred> softmax;
  float s_acc[kPieces][4];
  float o[L::kHalf / 8][4];
  uint32_t weights[kSteps][4], q_rotary[4][4];

  __device__ __forceinline__ MlaConsumer(const DecodeTile<C>& tile, float scale_log2, uint32_t smem)
      : tile(tile), smem(smem), softmax(scale_log2) {
    clear(o);
  }
  __device__ __forceinline__ int row_of(int r) const { return warp_row + r * 8 + lane.row; }

  // ---- products

  // Start a part of S = Q K^T of the own tile, slab by slab as they come, a group each: first that of the own columns,
  // which is the first to be free, then the other.
  template <bool kOwn>
  __device__ __forceinline__ void start_scores(int phase) {
    const uint32_t smem = __shfl_sync(~0u, this->smem, 0);  // or descriptors of all products are kept for the next pair
    const KeyPart<C> part{smem, kGroup, kOwn ? kGroup : kOther};
    pin(s_acc);
#pragma unroll
    for (int i = 0; i < L::kHalfSlabs + !kOwn; ++i) {
      const int slab = part.slab(i);
      if (slab == L::kRotary) pin(q_rotary);
      const Operand q = Operand::of_rows(smem + slab * L::kSlabBytes);
      const Operand k = Operand::of_rows(part.tile() + slab * L::kSlabBytes);
      ptx::mbarrier_wait(part.full(slab), phase);
      ptx::wgmma_fence();
#pragma unroll
      for (int d = 0; d < kSlabColumns / 16; ++d)
        if (slab == L::kRotary)
          ptx::wgmma<C::kTileN, false>(s_acc, q_rotary[d], k.at(d * 32), true);
        else
          ptx::wgmma<C::kTileN, false, false>(s_acc, q.at(d * 32), k.at(d * 32), !kOwn || i + d > 0);
      ptx::wgmma_commit();
    }
  }
  __device__ __forceinline__ void start_all_scores(int phase) { start_scores<true>(phase), start_scores<false>(phase); }
  template <int kPending>
  __device__ __forceinline__ void wait_scores() {
    ptx::wgmma_wait<kPending>();
    pin(s_acc);
  }
  __device__ __forceinline__ Operand values(const KeyPart<C>& part) const {
    return Operand::of_columns(part.tile() + part.slab(0) * L::kSlabBytes, L::kSlabBytes);
  }
  // Start O += P V of the own tile, P in registers; of the other warpgroup's tile, P in shared memory.
  __device__ __forceinline__ void start_own_values() {
    const Operand v = values({smem, kGroup, kGroup});
    pin(o);
    pin(weights);
    ptx::wgmma_fence();
#pragma unroll
    for (int n = 0; n < kSteps; ++n) ptx::wgmma<L::kHalf, true>(o, weights[n], v.at(n * 16 * kRowBytes), true);
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void start_other_values() {
    const KeyPart<C> part{smem, kOther, kGroup};
    const Operand v = values(part), p = Operand::of_rows(weights_of(kOther));
    pin(o);
    ptx::wgmma_fence();
#pragma unroll
    for (int n = 0; n < kSteps; ++n) ptx::wgmma<L::kHalf, false, true>(o, p.at(n * 32), v.at(n * 16 * kRowBytes), true);
    ptx::wgmma_commit();
  }
  // The rotary columns of q, which lie in shared memory, in registers: products of them read half as much there.
  __device__ __forceinline__ void keep_rotary_q() {
    const int row = warp_row + lane.id % 16;
    const uint32_t from = smem + L::kRotary * L::kSlabBytes + row * kRowBytes + ((lane.id / 16 ^ lane.id % 8) << 4);
#pragma unroll
    for (int n = 0; n < 4; ++n) ptx::ldmatrix_x4(q_rotary[n], from ^ n * 32);
  }
  // Wait for the values of tile `buffer`, behind which kPending groups of products may be under way, and free the part
  // that they have read.
  template <int kPending = 0>
  __device__ __forceinline__ void wait_values(int buffer) {
    ptx::wgmma_wait<kPending>();
    pin(o);
    KeyPart<C>{smem, buffer, kGroup}.release();
  }

  // ---- softmax

  // Hide the keys from each row's end on. `key`: the first of the tile.
  __device__ __forceinline__ void hide(int key) {
    if (key + C::kTileN <= tile.full_end) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int to = tile.end_of(tile.token(tile.first_row + row_of(r))) - key - lane.column;
#pragma unroll
      for (int n = 0; n < kPieces; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (n * 8 + e >= to) s_acc[n][r * 2 + e] = -INFINITY;
    }
  }
  // Take the maxima of the own tile into the softmax: true if O must be multiplied by `factor`.
  __device__ __forceinline__ bool update_max(float (&factor)[2]) {
    float row_max[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_max[r] = -INFINITY;
#pragma unroll
      for (const auto& piece : s_acc) row_max[r] = fmaxf(row_max[r], fmaxf(piece[r * 2], piece[r * 2 + 1]));
      factor[r] = 1.f;
    }
    const bool moved = __any_sync(~0u, softmax.exceeds_slack(row_max));
    if (moved) {
      for (float& x : row_max) x = quad_max(x);
      softmax.set_reference(row_max, factor);
    } else {
      softmax.refresh_offset();
    }
    return moved;
  }
  // Leave the references after the own tile to the other warpgroup.
  __device__ __forceinline__ void share_references() const {
    if (lane.id % 4 == 0)
#pragma unroll
      for (int r = 0; r < 2; ++r) ptx::st_shared_4(references(kGroup, r), __float_as_uint(softmax.reference[r]));
  }
  // Take those after the other one's tile: true if O must be multiplied by `factor`.
  __device__ __forceinline__ bool adopt_references(float (&factor)[2]) {
    float next[2];
    bool moved = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      next[r] = __uint_as_float(ptx::ld_shared_4(references(kOther, r)));
      moved |= next[r] != softmax.reference[r];
      factor[r] = 1.f;
    }
    if (!__any_sync(~0u, moved)) return false;
    softmax.set_reference(next, factor);
    return true;
  }
  __device__ __forceinline__ uint32_t references(int group, int r) const {
    return smem + L::kReferences + (group * C::kTileM + row_of(r)) * 4;
  }
  // S becomes the weights. References that are too large for the exponential's FMA are subtracted first.
  __device__ __forceinline__ void exponentiate() {
    if (__any_sync(~0u, softmax.offset_too_large())) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (auto& piece : s_acc) piece[r * 2] -= softmax.reference[r], piece[r * 2 + 1] -= softmax.reference[r];
        softmax.offset[r] = 0.f;
      }
    }
#pragma unroll
    for (auto& piece : s_acc)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        piece[i] = softmax.exponentiate(piece[i], i / 2);
        softmax.sum[i / 2] += piece[i];
      }
#pragma unroll
    for (int n = 0; n < kSteps; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &s_acc[2 * n + i / 2][i % 2 * 2];
        weights[n][i] = pack<Element>(pair[0], pair[1]);
      }
  }
  __device__ __forceinline__ uint32_t weights_of(int group) const {
    return smem + (group ? L::kRotary * L::kSlabBytes : L::kWeights);
  }
  __device__ __forceinline__ void store_weights() const {
    const int row = warp_row + lane.id % 16;
    const uint32_t to = weights_of(kGroup) + row * kRowBytes + ((lane.id / 16 ^ lane.id % 8) << 4);
#pragma unroll
    for (int n = 0; n < kSteps; ++n) ptx::stmatrix_x4(to ^ n * 32, weights[n]);
    ptx::fence_shared_writes();
  }
  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (auto& piece : o)
#pragma unroll
      for (int i = 0; i < 4; ++i) piece[i] *= factor[i / 2];
  }

  // Rows of the cache that nobody sees may hold anything, and 0 times that need not be 0: clear them in this
  // warpgroup's half of a tile. `key`: the first of the tile.
  __device__ __forceinline__ void clear_hidden_rows(int buffer, int key) const {
    const int first = tile.end - key;
    if (first >= C::kTileN) return;
    const KeyPart<C> part{smem, buffer, kGroup};
    for (int i = first * 8 + threadIdx.x % 128; i < C::kTileN * 8; i += 128)
#pragma unroll
      for (int slab = 0; slab < L::kHalfSlabs; ++slab)
        ptx::st_shared_16(part.tile() + part.slab(slab) * L::kSlabBytes + i * 16, make_uint4(0, 0, 0, 0));
    ptx::fence_shared_writes();
    ptx::barrier_sync(kOfGroup + kGroup, 128);
  }

  // ---- a pair of tiles, the last one perhaps without the second

  // Weights from the scores of the own tile: true if O must be multiplied by `factor`.
  __device__ __forceinline__ bool weigh(int key, float (&factor)[2]) {
    hide(key);
    const bool moved = update_max(factor);
    share_references();
    exponentiate();
    store_weights();
    return moved;
  }
  // Warpgroup 0, whose scores of the pair are there; with kMore those of the next one are there at the end.
  template <bool kPair, bool kMore>
  __device__ __forceinline__ void visit_first(int key, int phase) {
    float factor[2];
    const bool moved = weigh(key, factor);
    ptx::barrier_arrive(kFirstWeights, L::kGroups * 128);
    if (moved) rescale(factor);
    if constexpr (!kPair) clear_hidden_rows(0, key);
    start_own_values();
    wait_values(0);
    if constexpr (kPair) {
      ptx::barrier_sync(kSecondWeights, L::kGroups * 128);
      if (adopt_references(factor)) rescale(factor);
      clear_hidden_rows(1, key + C::kTileN);
      start_other_values();
      if constexpr (kMore) {  // the tensor cores go from one to the other
        start_scores<true>(phase ^ 1);
        wait_values<L::kHalfSlabs>(1);
        start_scores<false>(phase ^ 1);
        wait_scores<0>();
      } else {
        wait_values(1);
      }
    }
  }
  template <bool kPair>
  __device__ __forceinline__ void visit_second(int key, int phase) {
    float factor[2];
    if constexpr (kPair) start_all_scores(phase);
    ptx::barrier_sync(kFirstWeights, L::kGroups * 128);
    if (adopt_references(factor)) rescale(factor);
    if constexpr (!kPair) clear_hidden_rows(0, key);
    start_other_values();
    if constexpr (kPair) {
      wait_scores<1>();  // the values of tile 0 go on under the softmax of tile 1
      const bool moved = weigh(key + C::kTileN, factor);
      ptx::barrier_arrive(kSecondWeights, L::kGroups * 128);
      wait_values(0);
      if (moved) rescale(factor);
      clear_hidden_rows(1, key + C::kTileN);
      start_own_values();
    }
    wait_values(kPair);
  }

  __device__ __forceinline__ void visit_keys(const DecodeSplit<C>& split) {
    const auto key = [](int tile) { return tile * C::kTileN; };
    int phase = 0, i = split.first;
    if constexpr (kGroup == 0) {
      if (i >= split.end) return;
      start_all_scores(phase);
      wait_scores<0>();
#pragma unroll 1
      for (; i + 2 < split.end; i += 2, phase ^= 1) visit_first<true, true>(key(i), phase);
      i + 1 < split.end ? visit_first<true, false>(key(i), phase) : visit_first<false, false>(key(i), phase);
    } else {
#pragma unroll 1
      for (; i + 1 < split.end; i += 2, phase ^= 1) visit_second<true>(key(i), phase);
      if (i < split.end) visit_second<false>(key(i), phase);
    }
  }

  // ---- the end

  // Write the rows, or leave the split's part of them to the merge.
  __device__ __forceinline__ void finish(const DecodeOutput<C, Element>& output, const DecodeGrid& grid, int split,
                                         bool alone) {
    const uint32_t sums = smem + L::kSums;
    float sum[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = quad_sum(softmax.sum[r]);
      if (lane.id % 4 == 0) ptx::st_shared_4(sums + (kGroup * C::kTileM + row_of(r)) * 4, __float_as_uint(sum[r]));
    }
    ptx::barrier_sync(kRowsSummed, L::kGroups * 128);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = 0.f;
#pragma unroll
      for (int group = 0; group < L::kGroups; ++group)
        sum[r] += __uint_as_float(ptx::ld_shared_4(sums + (group * C::kTileM + row_of(r)) * 4));
    }
    if (merges_in_cluster(grid, alone)) {
      const ClusterMerge<C, kGroup> merge{smem, split, {row_of(0), row_of(1)}, output.scale_log2};
      if (!merge.run(o, softmax.reference, sum)) return;
      alone = true;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
      store_row(output, grid, split, alone, o, r, row_of(r), kGroup * L::kHalf, softmax.reference[r], sum[r]);
  }
};

}  // namespace fagen
