// A consumer warpgroup: 64 keys against row tile after row tile. Scores are computed with keys down, so that P^T and
// dS^T are operands of dV += P^T dO and dK += dS^T Q where they are, in registers. Only dQ = dS K, which sums over the
// keys of all warpgroups, has its dS from shared memory.
#pragma once
#include "fagen/ptx/barrier.cuh"
#include "fagen/ptx/mma_sync.cuh"
#include "fagen/sm90/backward/dq.cuh"
#include "fagen/sm90/backward/scores.cuh"
#include "fagen/sm90/backward/split_sums.cuh"
#include "fagen/sm90/operand.cuh"

namespace fagen {

template <class C, class Element>
struct BackwardConsumer {
  using L = BackwardLayout<C>;
  using Dq = DqShare<C>;
  static constexpr int kPieces = C::kTileM / 8;  // 8 rows each
  static constexpr int kSteps = C::kTileM / 16;  // 16 rows each
  static constexpr int kBarrier = 1;
  using Scores = float[kPieces][4];
  using Fragments = uint32_t[kSteps][4];
  using DqPart = float[Dq::kColumns / 8][4];
  using Lse = RowStats<C>;
  using Delta = RowStats<C, kSeedsDp<C>>;
  using Drawn = DrawnWeights<C, true, kPieces>;

  const fagen_backward_params& p;
  const BackwardLaunch& launch;
  const KeyTile<C>& keys;
  const RowBand& band;
  const int group;
  const Dq share;
  BackwardPipelines<C> pipelines;
  ScoreChange<C> change;
  float dk[C::kHeadDim / 8][4], dv[C::kHeadDimV / 8][4];
  static constexpr bool kVInRegisters = C::kVSource == VSource::registers;
  uint32_t v[kVInRegisters ? C::kHeadDimV / 16 : 1][4];  // this group's keys as an operand

  __device__ __forceinline__ BackwardConsumer(const fagen_backward_params& p, const BackwardLaunch& launch,
                                              const KeyTile<C>& keys, const RowBand& band, uint32_t smem, int group)
      : p(p), launch(launch), keys(keys), band(band), group(group), share{group}, pipelines(smem, group), change(p) {}

  // ---- products: each starts, and is waited for later

  // The product of two operands whose rows are `kDepth` long, of this group's keys and a row tile; added to what the
  // accumulators hold if they are `kSeeded`.
  template <int kDepth, bool kSeeded>
  __device__ __forceinline__ void start_scores(Scores& c, uint32_t of_keys, uint32_t of_rows) const {
    const Operand a = Operand::of_rows(of_keys + group * kGroupKeys * kRowBytes), b = Operand::of_rows(of_rows);
    pin(c);
    ptx::wgmma_fence();
#pragma unroll
    for (int d = 0; d < kDepth / 16; ++d) {
      const int within = d % 4 * 32;  // bytes into a slab's row
      ptx::wgmma<C::kTileM, false, false>(c, a.at(d / 4 * C::kTileN * kRowBytes + within),
                                          b.at(d / 4 * C::kTileM * kRowBytes + within), kSeeded || d > 0);
    }
    ptx::wgmma_commit();
  }
  // dP^T = V dO^T
  __device__ __forceinline__ void start_dp(Scores& dp) {
    if constexpr (kVInRegisters) {
      const Operand b = Operand::of_rows(pipelines.dout.tile());
      pin(dp), pin(v);
      ptx::wgmma_fence();
#pragma unroll
      for (int d = 0; d < C::kHeadDimV / 16; ++d)
        ptx::wgmma<C::kTileM, false>(dp, v[d], b.at(d / 4 * C::kTileM * kRowBytes + d % 4 * 32), kSeedsDp<C> || d > 0);
      ptx::wgmma_commit();
    } else {
      start_scores<C::kHeadDimV, kSeedsDp<C>>(dp, pipelines.v.tile(), pipelines.dout.tile());
    }
  }
  // A lane names a row of V and the swizzled place of its half of 16 columns.
  __device__ __forceinline__ void load_v() {
    const int lane = threadIdx.x % 32, row = group * kGroupKeys + threadIdx.x / 32 % 4 * 16 + lane % 16;
    const uint32_t place = pipelines.v.tile() + row * kRowBytes + ((lane / 16 ^ lane % 8) << 4);
#pragma unroll
    for (int d = 0; d < C::kHeadDimV / 16; ++d)
      ptx::ldmatrix_x4(v[d], (place ^ d % 4 * 32) + d / 4 * C::kTileN * kRowBytes);
  }
  // dV += P^T dO, or dK += dS^T Q
  template <int kColumns>
  __device__ __forceinline__ void start_gradient(float (&c)[kColumns / 8][4], Fragments& a, uint32_t rows) {
    const Operand b = Operand::of_columns(rows, C::kTileM * kRowBytes);
    pin(c), pin(a);
    ptx::wgmma_fence();
#pragma unroll
    for (int n = 0; n < kSteps; ++n) ptx::wgmma<kColumns, true>(c, a[n], b.at(n * 2048), true);
    ptx::wgmma_commit();
  }

  // ---- between products

  template <bool kMasked>
  __device__ __forceinline__ void exponentiate(Scores& s, Scores& derivatives, const Lse& lse, const RowTileVisit& at) {
    const Place place;
    const int key = group * kGroupKeys + threadIdx.x / 32 % 4 * 16 + place.row;
    fagen::exponentiate<C, kMasked>(s, derivatives, change, band, keys.n0 + key, at.tile * C::kTileM + place.column,
                                    lse, pipelines.smem + L::kBounds + key * 16);
  }
  // dS in place of dP
  __device__ __forceinline__ void form_ds(const Scores& s, Scores& dp, const Scores& derivatives, const Delta& delta,
                                          const Drawn& drawn) const {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const uint32_t factors[2] = {drawn.factors(change.dropout, 0, j), drawn.factors(change.dropout, 1, j)};
      form_piece(s, dp, derivatives, delta, factors, j);
    }
  }
  // The same with P as it counts for dV, step by step: factors of dropped weights are made once, and are not held.
  __device__ __forceinline__ void form_both(Fragments& weights, const Scores& s, Scores& dp, const Scores& derivatives,
                                            const Delta& delta, const Drawn& drawn) const {
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
      uint32_t factors[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) factors[i / 2][i % 2] = drawn.factors(change.dropout, i % 2, 2 * n + i / 2);
#pragma unroll
      for (int j = 0; j < 2; ++j) form_piece(s, dp, derivatives, delta, factors[j], 2 * n + j);
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[n][i] = multiply_factors<Element>(pair_of(s, n, i), factors[i / 2][i % 2]);
    }
  }
  __device__ __forceinline__ void form_piece(const Scores& s, Scores& dp, const Scores& derivatives, const Delta& delta,
                                             const uint32_t (&factors)[2], int j) const {
    const float2 of_rows = delta.of(j);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 halves = halves_of(factors[i / 2]);
      dp[j][i] = gradient_of_score<C>(s[j][i], dp[j][i], i % 2 ? of_rows.y : of_rows.x, i % 2 ? halves.y : halves.x);
      if constexpr (C::kSoftcap) dp[j][i] *= derivatives[j][i];
    }
  }
  static __device__ __forceinline__ uint32_t pair_of(const Scores& c, int n, int i) {
    const float* pair = &c[2 * n + i / 2][i % 2 * 2];
    return pack<Element>(pair[0], pair[1]);
  }
  static __device__ __forceinline__ void pack_operand(Fragments& operand, const Scores& c) {
#pragma unroll
    for (int n = 0; n < kSteps; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) operand[n][i] = pair_of(c, n, i);
  }
  // P as it counts for dV.
  __device__ __forceinline__ void pack_weights(Fragments& weights, const Scores& s, const Drawn& drawn) const {
    pack_operand(weights, s);
#pragma unroll
    for (int i = 0; C::kDropout && i < kSteps * 4; ++i) {
      uint32_t& pair = weights[i / 4][i % 4];
      pair = multiply_factors<Element>(pair, drawn.factors(change.dropout, i % 2, i / 4 * 2 + i % 4 / 2));
    }
  }
  // dS, rows of q down, this group's keys in a slab of their own. The others may read it after a fence and a barrier.
  __device__ __forceinline__ void store_ds(const Fragments& ds) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const uint32_t tile = kLoaderHasDq<C> ? pipelines.handed_ds.tile() : pipelines.ds();
    const uint32_t row = tile + group * L::kDsSlabBytes + (lane / 16 * 8 + lane % 8) * kRowBytes;
    const uint32_t place = row + ((warp * 2 + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
    for (int n = 0; n < kSteps; ++n) ptx::stmatrix_x4_trans(place + n * 16 * kRowBytes, ds[n]);
  }

  // ---- a row tile

  // All of it lies in one branch, so that the exponentials mix with what follows them: alone they would wait for the
  // special-function unit.
  template <bool kMasked>
  __device__ __forceinline__ void visit(const RowTileVisit& at) {
    Scores s, dp, derivatives;  // of this visit alone, or their registers would be held between visits
    Fragments weights, ds;      // P^T and dS^T
    if (C::kAlibi || C::kDropout) change.set_head(p, keys.batch, at.head);
    pipelines.q.wait();
    const uint32_t of_lse = pipelines.lse() + Place().column * 4, of_delta = pipelines.delta() + Place().column * 4;
    const Lse lse(of_lse);
    if constexpr (kSeedsDp<C>) seed(dp, of_delta), pin(dp);
    start_scores<C::kHeadDim, false>(s, pipelines.k.tile(), pipelines.q.tile());
    pipelines.dout.wait();
    start_dp(dp);
    Drawn drawn;
    const int first_key = keys.n0 + group * kGroupKeys + threadIdx.x / 32 % 4 * 16;
    drawn.template draw<true>(change.dropout, at.tile * C::kTileM, first_key);
    ptx::wgmma_wait<1>();
    pin(s);
    exponentiate<kMasked>(s, derivatives, lse, at);
    drawn.template draw<false>(change.dropout, at.tile * C::kTileM, first_key);
    const Delta delta(of_delta);
    if constexpr (C::kDvStart == DvStart::before_ds) {
      pack_weights(weights, s, drawn);
      start_gradient<C::kHeadDimV>(dv, weights, pipelines.dout.tile());
    }
    ptx::wgmma_wait<(C::kDvStart == DvStart::before_ds ? 1 : 0)>();
    pin(dp);
    if constexpr (C::kDropout && C::kDvStart != DvStart::before_ds) {
      form_both(weights, s, dp, derivatives, delta, drawn);
    } else {
      form_ds(s, dp, derivatives, delta, drawn);
      if constexpr (C::kDvStart != DvStart::before_ds) pack_weights(weights, s, drawn);
    }
    pack_operand(ds, dp);
    if constexpr (C::kDvStart == DvStart::after_ds) start_gradient<C::kHeadDimV>(dv, weights, pipelines.dout.tile());
    wait_for_ds();
    store_ds(ds);
    if constexpr (C::kDvStart == DvStart::after_store) start_gradient<C::kHeadDimV>(dv, weights, pipelines.dout.tile());
    hand_ds_over();
    if (!kLoaderHasDq<C> && share.owns())
      finish_with_dq(ds, at);
    else
      finish(ds);
    pipelines.q.release();
    if (++pipelines.ds_stage == C::kDsStages) pipelines.ds_stage = 0;
  }

  // The place of this visit's dS is free: all have read the one before.
  __device__ __forceinline__ void wait_for_ds() const {
    if constexpr (kLoaderHasDq<C>)
      pipelines.handed_ds.acquire();
    else if constexpr (C::kDsStages == 1)
      ptx::barrier_sync(kBarrier + 1, L::kGroups * 128);
  }
  // dS may be read: by the loader, or by all consumers when all of them are here.
  __device__ __forceinline__ void hand_ds_over() {
    ptx::fence_shared_writes();
    if constexpr (kLoaderHasDq<C>) {
      __syncwarp();
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(pipelines.handed_ds.full());
      pipelines.handed_ds.advance();
    } else {
      ptx::barrier_sync(kBarrier, L::kGroups * 128);
    }
  }

  __device__ __forceinline__ void sink(const DqPart& dq, int chunk, const RowTileVisit& at) {
    if (launch.one_key_tile)
      store_dq<C, Element>(p, dq, share, chunk, keys.batch, at);
    else
      sink_dq<C>(dq, share, chunk, pipelines,
                 dq_sums<C>(launch, row_tile_index<C>(p, launch, keys.batch, at.head, at.tile)));
  }
  // dV is under way, dS is there: dK, and dQ where this group has a part of it.
  __device__ __forceinline__ void finish(Fragments& ds) {
    start_gradient<C::kHeadDim>(dk, ds, pipelines.q.tile());
    ptx::wgmma_wait<1>();
    pin(dv);
    pipelines.dout.release();
    ptx::wgmma_wait<0>();
    pin(dk);
  }
  __device__ __forceinline__ void finish_with_dq(Fragments& ds, const RowTileVisit& at) {
    DqPart dq;
    start_dq<C>(dq, share, 0, pipelines.ds(), pipelines.k.tile());
    ptx::wgmma_wait<1>();
    pin(dv);
    pipelines.dout.release();
    start_gradient<C::kHeadDim>(dk, ds, pipelines.q.tile());
    ptx::wgmma_wait<1>();
    pin(dq);
    sink(dq, 0, at);
    ptx::wgmma_wait<0>();
    pin(dk);
#pragma unroll
    for (int chunk = 1; chunk < Dq::kChunks; ++chunk) {
      start_dq<C>(dq, share, chunk, pipelines.ds(), pipelines.k.tile());
      ptx::wgmma_wait<0>();
      pin(dq);
      sink(dq, chunk, at);
    }
  }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (auto& piece : dk) piece[0] = piece[1] = piece[2] = piece[3] = 0.f;
#pragma unroll
    for (auto& piece : dv) piece[0] = piece[1] = piece[2] = piece[3] = 0.f;
    pipelines.k.wait();
    pipelines.v.wait();
    if constexpr (kVInRegisters) load_v();
    keys.walk(p, [&](const RowTileVisit& at) {
      if (at.partial)
        visit<true>(at);
      else
        visit<false>(at);
    });
    const float dk_scale = gradient_scale<C>(p), dv_scale = scale_up_pairs<C, Element>(p, 1.f);
    if (kMostSplits<C> > 1 && keys.splits > 1) {
      const SplitSums<C> sums{pipelines.smem, keys.split, keys.splits, group};
      ptx::barrier_sync(kBarrier, SplitSums<C>::kReaders);  // no tile is read any more
      put<C::kHeadDim>(sums, 0, dk);
      put<C::kHeadDimV>(sums, kDkUnits<C>, dv);
      sums.finish([&](int unit) {
        float c[4][4];
        sums.sum(unit, c);
        if (unit < kDkUnits<C>)
          store<C::kHeadDim, 1>(p.dk, p.head_dim, dk_scale, unit * 4, 4, values_of(c));
        else
          store<C::kHeadDimV, 1>(p.dv, p.head_dim_v, dv_scale, (unit - kDkUnits<C>)*4, 4, values_of(c));
      });
    } else {
      store<C::kHeadDim, (C::kHeadDim + 31) / 32>(p.dk, p.head_dim, dk_scale, 0, C::kHeadDim / 8, values_of(dk));
      store<C::kHeadDimV, (C::kHeadDimV + 31) / 32>(p.dv, p.head_dim_v, dv_scale, 0, C::kHeadDimV / 8, values_of(dv));
    }
  }

  // Units of 4 pieces, the last one of fewer.
  template <int kColumns>
  __device__ __forceinline__ void put(const SplitSums<C>& sums, int first, const float (&c)[kColumns / 8][4]) const {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) sums.put(first + n / 4, n % 4, c[n]);
  }
  template <class Pieces>
  static __device__ __forceinline__ auto values_of(const Pieces& c) {
    return [&c](int n) { return make_float4(c[n][0], c[n][1], c[n][2], c[n][3]); };
  }
  // Store 64 keys of a gradient, `pieces` of 8 columns.
  template <int kColumns, int kUnroll, class Load>
  __device__ __forceinline__ void store(const fagen_tensor& to, int columns, float scale, int first_piece, int pieces,
                                        Load load) const {
    const int key = keys.n0 + group * kGroupKeys + threadIdx.x / 32 % 4 * 16 + Place().row;
    store_rows<Element, kUnroll>(to, keys.batch, keys.kv_head, key, p.seqlen_k, columns, first_piece,
                                 min(pieces, kColumns / 8 - first_piece), scale, load);
  }
};

}  // namespace fagen
