// A consumer warpgroup. Where the two share columns of O, each has the scores and the softmax of half of the keys; they
// exchange row maxima and the weights P through shared memory, so that both keep the same reference for each row. Where
// they share rows, neither knows of the other; with shared scores each exchanges the same with its peer in the other
// block.
#pragma once
#include "fagen/common/element.cuh"
#include "fagen/common/row_state.cuh"
#include "fagen/ptx/barrier.cuh"
#include "fagen/sm90/forward_large/peer.cuh"
#include "fagen/sm90/forward_large/producer.cuh"
#include "fagen/sm90/operand.cuh"

namespace fagen {

template <class C, class Element>
struct LargeConsumer {
  using L = LargeLayout<C>;
  using State = RowState<C, 1, L::kGroupKeys, L::kGroupColumns>;
  using Scores = typename State::Scores;  // [1][keys / 8][4]

  static constexpr int kExchangeBarrier = 1;
  static constexpr int kWeightSteps = L::kGroupKeys / 16;  // 16 keys each

  const fagen_forward_params& p;
  const LargeTask<C>& task;
  const int group, row,
      warp_row;  // warpgroup among the consumers; the warp's first row of q, and of the warpgroup's 64
  const uint32_t q_tile, weight_tile, exchange_tile;
  float* const exchange;  // a number a row from each warpgroup
  LargeRing<C> ring, held;  // the next chunk to read; the oldest one that is not free yet
  int chunks_held = 0;
  Peer peer;
  State state;

  __device__ __forceinline__ LargeConsumer(const fagen_forward_params& p, const LargeTask<C>& task,
                                           const LargeRing<C>& ring, uint32_t smem, float* exchange, int group)
      : p(p),
        task(task),
        group(group),
        row(task.first_row + (L::kRowsApart ? group * kGroupRows : 0) + threadIdx.x / 32 % 4 * 16),
        warp_row(threadIdx.x / 32 % 4 * 16),
        q_tile(smem + (L::kRowsApart ? group * kGroupRows * kRowBytes : 0)),
        weight_tile(smem + L::kWeights + (L::kRowsApart ? group * L::kWeightBytes : 0)),
        exchange_tile(smem + L::kExchange),
        exchange(exchange),
        ring(ring),
        held(ring),
        peer(smem + L::kPeerBarriers, threadIdx.x / 32),
        state(p) {}

  // the warpgroup's part of the block's keys and columns, and of the tile's keys
  __device__ __forceinline__ int part() const { return L::kRowsApart ? 0 : group; }
  __device__ __forceinline__ int key_part() const { return L::kPeers ? task.rank() : part(); }
  // Wait for all who read what this warp has stored: rows are a warp's own, unless both warpgroups have all of them.
  __device__ __forceinline__ static void wait_for_all() {
    if constexpr (L::kRowsApart)
      __syncwarp();
    else
      ptx::barrier_sync(kExchangeBarrier, L::kConsumers);
  }

  // ---- products, chunk by chunk

  // Start the products of the next chunk, a group of their own.
  template <class Start>
  __device__ __forceinline__ void start_chunk(Start start) {
    ring.wait();
    ptx::wgmma_fence();
    start(ring.tile());
    ptx::wgmma_commit();
    ring.advance();
    ++chunks_held;
  }
  // Wait for the products of all chunks but the newest ones, and free those.
  template <int kNewest>
  __device__ __forceinline__ void free_chunks() {
    ptx::wgmma_wait<kNewest>();
    for (; chunks_held > kNewest; --chunks_held) held.release();
  }

  // S += Q K^T over one chunk's columns
  __device__ __forceinline__ void start_score_chunk(Scores& scores, int chunk) {
    start_chunk([&](uint32_t tile) {
      const Operand q = Operand::of_rows(q_tile + chunk * L::kChunkSlabs * L::kQSlabBytes);
      const Operand k = Operand::of_rows(tile + part() * L::kGroupKeys * kRowBytes);
#pragma unroll
      for (int step = 0; step < L::kChunkSlabs * 4; ++step)
        ptx::wgmma_shared<L::kGroupKeys>(scores[0], q.at(step / 4 * L::kQSlabBytes + step % 4 * 32),
                                         k.at(step / 4 * L::kKeySlabBytes + step % 4 * 32), chunk > 0 || step > 0);
    });
  }
  // The chunks of S from `first` on, each freed when the products of the next ones are under way.
  __device__ __forceinline__ void multiply_scores(Scores& scores, int first) {
#pragma unroll 1
    for (int chunk = first; chunk < L::kKeyChunks; ++chunk) {
      start_score_chunk(scores, chunk);
      free_chunks<C::kInFlight>();
    }
  }
  // O += P V, all chunks of a tile of keys. One goes on under the next, whatever kInFlight says: with more of them nvcc
  // 13.0 makes all products of the kernel wait for each other.
  __device__ __forceinline__ void multiply_values() {
    auto& first = reinterpret_cast<float (&)[L::kFirstColumns / 8][4]>(state.o[0][0]);
    pin(state.o[0]);
#pragma unroll 1
    for (int chunk = 0; chunk < L::kValueChunks; ++chunk) {
      if (L::kPeers && chunk == L::kValueChunks / 2) peer.wait_for_weights();
      start_chunk([&](uint32_t tile) {
        const Operand weights = Operand::of_rows(weight_tile);
        const Operand v = Operand::of_columns(tile + part() * L::kGroupSlabs * L::kValueSlabBytes, L::kValueSlabBytes);
#pragma unroll
        for (int step = 0; step < L::kValueKeys / 16; ++step) {
          const int at = task.value_chunk(chunk) * (L::kValueKeys / 16) + step;  // 16 keys of the tile
          const uint64_t a = weights.at(at / 4 * L::kWeightSlabBytes + at % 4 * 32);
          ptx::wgmma_shared_columns<L::kFirstColumns>(first, a, v.at(step * 2048));
          if constexpr (L::kSecondColumns > 0) {
            auto& second = reinterpret_cast<float (&)[L::kSecondColumns / 8][4]>(state.o[0][L::kFirstColumns / 8]);
            constexpr int kBefore = L::kFirstColumns / kSlabColumns * L::kValueSlabBytes;
            ptx::wgmma_shared_columns<L::kSecondColumns>(second, a, v.at(kBefore + step * 2048));
          }
        }
      });
      free_chunks<1>();
    }
  }

  // ---- softmax

  // Whether a row's scores are divided, and its number of the other half, of the thread's two rows. All lanes of a quad
  // have the same.
  static constexpr bool kDivided = L::kPeers || !L::kRowsApart;
  __device__ __forceinline__ void swap_rows(const float (&mine)[2], float (&other)[2]) {
    const int place = warp_row + state.lane.row, from = L::kPeers ? group : 1 - group;
    const bool sends = state.lane.id % 4 == 0;
    if constexpr (L::kPeers) {
      peer.send(mine, exchange_tile + (group * kGroupRows + place) * 4, sends, 1 - task.rank());
      peer.wait_for_numbers();
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (sends) exchange[group * kGroupRows + place + r * 8] = mine[r];
      wait_for_all();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) other[r] = exchange[from * kGroupRows + place + r * 8];
  }

  // Both who have scores of a row take the same maxima into their softmax; O follows.
  __device__ __forceinline__ void update_max(Scores& scores) {
    float row_max[2], other[2], factor[2];
    state.thread_maxima(scores, row_max);
    for (float& x : row_max) x = quad_max(x);
    if constexpr (kDivided) {
      swap_rows(row_max, other);
#pragma unroll
      for (int r = 0; r < 2; ++r) row_max[r] = fmaxf(row_max[r], other[r]);
    }
    if (__any_sync(~0u, state.softmax.exceeds_slack(row_max))) {
      state.set_reference(scores, row_max, factor);
      state.rescale(factor);
    } else {
      state.softmax.refresh_offset();
    }
  }
  // S becomes the weights, in shared memory. Nobody reads the last ones any more: the other warpgroup gave its maxima.
  __device__ __forceinline__ void store_weights(Scores& scores) {
#pragma unroll
    for (auto& piece : scores[0])
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        piece[i] = state.softmax.exponentiate(piece[i], i / 2);
        state.softmax.sum[i / 2] += piece[i];
      }
    // a lane's row, and the swizzled place of its half of 16 keys
    const int lane = state.lane.id;
    const uint32_t place = weight_tile + (warp_row + lane % 16) * kRowBytes + ((lane / 16 ^ lane % 8) << 4);
#pragma unroll
    for (int n = 0; n < kWeightSteps; ++n) {
      const int at = key_part() * kWeightSteps + n;
      const auto word = [&](int i) {
        const float* pair = &scores[0][2 * n + i / 2][i % 2 * 2];
        return pack<Element>(pair[0], pair[1]);
      };
      ptx::stmatrix_x4((place ^ at % 4 * 32) + at / 4 * L::kWeightSlabBytes, {word(0), word(1), word(2), word(3)});
    }
    ptx::fence_shared_writes();
    wait_for_all();
    if constexpr (L::kPeers)
      peer.send_weights(weight_tile + key_part() * L::kWeightSlabBytes + warp_row * kRowBytes, 1 - task.rank());
  }

  // ---- tiles of keys

  // A tile of keys whose scores are there: softmax, O += P V, and the scores of the next tile, if there is one. The
  // first of its chunks are multiplied under the softmax.
  template <bool kNext>
  __device__ __forceinline__ void visit(Scores& scores, Scores& next, const ScoreMod<C>& mod, int tile, bool partial) {
    if constexpr (kNext && C::kChunksAhead > 0) {
      pin(next[0]);
#pragma unroll
      for (int chunk = 0; chunk < C::kChunksAhead; ++chunk) start_score_chunk(next, chunk);
    }
    const int key = tile * C::kTileN + key_part() * L::kGroupKeys;
    if (partial)
      state.template modify<true>(scores, mod, task.mask, row, key);
    else
      state.template modify<false>(scores, mod, task.mask, row, key);
    update_max(scores);
    store_weights(scores);
    multiply_values();
    if constexpr (kNext) {
      if (C::kChunksAhead == 0) pin(next[0]);
      multiply_scores(next, C::kChunksAhead);
    }
    free_chunks<0>();
    pin(state.o[0]);
    if (kNext) pin(next[0]);
  }

  __device__ __forceinline__ void visit_keys(const Pipeline<1, L::kSlabs * L::kQSlabBytes>& q) {
    auto walk = task.walk();
    if (!walk.valid()) return;
    const ScoreMod<C> mod(p, task.coord.batch, task.coord.head);
    Scores scores, next;
    q.wait();
    pin(next[0]);
    multiply_scores(next, 0);
    free_chunks<0>();
    pin(next[0]);
    for (;;) {
      const int tile = walk.tile;
      const bool partial = walk.partial(task.range);
      if constexpr (C::kChunksAhead > 0) copy(scores, next);
      auto& present = C::kChunksAhead > 0 ? scores : next;
      walk.advance();
      if (!walk.valid()) return visit<false>(present, next, mod, tile, partial);
      visit<true>(present, next, mod, tile, partial);
    }
  }
  static __device__ __forceinline__ void copy(Scores& to, const Scores& from) {
#pragma unroll
    for (int i = 0; i < L::kGroupKeys / 2; ++i) to[0][i / 4][i % 4] = from[0][i / 4][i % 4];
  }

  // ---- the end

  // Neighbouring lanes swap, so that a quad writes 32 whole bytes at once.
  __device__ __forceinline__ void store(const float (&row_sum)[2]) const {
    const bool odd = state.lane.id % 2;
    const int column = odd * 8 + state.lane.id % 4 / 2 * 4;  // in two pieces of 8
    const int first = task.first_column + part() * L::kGroupColumns + column;
    Element* out = static_cast<Element*>(p.o.data) + task.coord.batch * p.o.stride[0] + task.coord.head * p.o.stride[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int m = row + state.lane.row + r * 8;
      const float inverse = row_sum[r] == 0.f ? 0.f : 1.f / row_sum[r];
      const auto word = [&](int n) {
        return pack<Element>(state.o[0][n][r * 2] * inverse, state.o[0][n][r * 2 + 1] * inverse);
      };
      const int columns = m < p.seqlen_q ? p.head_dim_v - first : 0;
      Element* to = out + m * p.o.stride[1] + first;
#pragma unroll
      for (int n = 0; n < L::kGroupColumns / 8; n += 2) {
        const uint32_t mine[2] = {word(n), word(n + 1)};
        const uint32_t other = __shfl_xor_sync(~0u, odd ? mine[0] : mine[1], 1);
        if (n * 8 < columns)
          *reinterpret_cast<uint2*>(to + n * 8) = odd ? make_uint2(other, mine[1]) : make_uint2(mine[0], other);
      }
      if (p.lse && state.lane.id % 4 == 0 && part() == 0 && task.first_column == 0 && m < p.seqlen_q)
        p.lse[(int64_t(task.coord.batch) * p.heads + task.coord.head) * p.seqlen_q + m] =
            state.softmax.lse(r, row_sum[r]);
    }
  }

  __device__ __forceinline__ void run(const Pipeline<1, L::kSlabs * L::kQSlabBytes>& q) {
    visit_keys(q);
    float row_sum[2], other[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) row_sum[r] = quad_sum(state.softmax.sum[r]);
    if constexpr (kDivided) {
      swap_rows(row_sum, other);
#pragma unroll
      for (int r = 0; r < 2; ++r) row_sum[r] += other[r];
    }
    store(row_sum);
  }
};

}  // namespace fagen
