// A consumer warpgroup of large head dims, where a thread cannot hold 64 keys of dK and dV. Of a row tile's scores it
// computes some keys' columns; P and dS go by shared memory, and of dK^T, dV^T and dQ each warpgroup has some of the
// columns of a head.
#pragma once
#include "fagen/ptx/barrier.cuh"
#include "fagen/sm90/backward/dq.cuh"
#include "fagen/sm90/backward/scores.cuh"
#include "fagen/sm90/backward/split_sums.cuh"
#include "fagen/sm90/operand.cuh"

namespace fagen {

template <class C, class Element>
struct SharedConsumer {
  using L = BackwardLayout<C>;
  using Dq = DqShare<C>;
  static constexpr int kKeys = C::kTileN / L::kGroups, kPieces = kKeys / 8;  // of the scores of this group
  static constexpr int kDkChunks = (L::kSlabs + L::kGroups - 1) / L::kGroups;  // slabs of 64 columns of a head
  static constexpr int kDvChunks = (L::kSlabsV + L::kGroups - 1) / L::kGroups;
  static constexpr bool kDvFirst = C::kDvStart == DvStart::after_store;  // before all have stored dS
  static constexpr int kBarrier = 1;  // of all consumers; two more, and one for each group
  using Scores = float[kPieces][4];
  using DqPart = float[Dq::kColumns / 8][4];
  using Factors = uint32_t[kPieces][2];  // of pairs of weights, which dropout makes 0
  using Drawn = DrawnWeights<C, false, kPieces>;
  using Gradient = float[C::kTileN / 8][4];  // 64 columns of a head down, keys across

  const fagen_backward_params& p;
  const BackwardLaunch& launch;
  const KeyTile<C>& keys;
  const RowBand& band;
  const int group;
  const Dq share;
  BackwardPipelines<C> pipelines;
  ScoreChange<C> change;
  Gradient dk[kDkChunks], dv[kDvChunks];

  __device__ __forceinline__ SharedConsumer(const fagen_backward_params& p, const BackwardLaunch& launch,
                                            const KeyTile<C>& keys, const RowBand& band, uint32_t smem, int group)
      : p(p), launch(launch), keys(keys), band(band), group(group), share{group}, pipelines(smem, group), change(p) {}

  // A slab of this group's columns. Where the slabs do not go round the last one is computed twice, and stored once.
  template <int kSlabs>
  __device__ __forceinline__ int slab_of(int chunk) const {
    constexpr bool kEven = kSlabs % L::kGroups == 0;
    const int slab = chunk * L::kGroups + group;
    return kEven ? slab : min(slab, kSlabs - 1);
  }
  __device__ __forceinline__ uint32_t weights() const { return pipelines.ds(); }
  __device__ __forceinline__ uint32_t ds() const { return pipelines.ds() + L::kDsTileBytes; }

  // ---- products: each starts, and is waited for later

  template <int kDepth, bool kSeeded>
  __device__ __forceinline__ void start_scores(Scores& c, uint32_t of_rows, uint32_t of_keys) const {
    const Operand a = Operand::of_rows(of_rows), b = Operand::of_rows(of_keys + group * kKeys * kRowBytes);
    pin(c);
    ptx::wgmma_fence();
#pragma unroll
    for (int d = 0; d < kDepth / 16; ++d) {
      const int within = d % 4 * 32;  // bytes into a slab's row
      ptx::wgmma<kKeys, false, false>(c, a.at(d / 4 * C::kTileM * kRowBytes + within),
                                      b.at(d / 4 * C::kTileN * kRowBytes + within), kSeeded || d > 0);
    }
    ptx::wgmma_commit();
  }
  // dV^T += dO^T P, or dK^T += Q^T dS: chunks from kFirst on, `kSome` of them
  template <int kSlabs, int kFirst, int kSome, int kChunks>
  __device__ __forceinline__ void start_gradient(Gradient (&c)[kChunks], uint32_t of_columns, uint32_t weights) const {
    const Operand b = Operand::of_columns(weights, L::kDsSlabBytes);
#pragma unroll
    for (int chunk = kFirst; chunk < kFirst + kSome; ++chunk) pin(c[chunk]);
    ptx::wgmma_fence();
#pragma unroll
    for (int chunk = kFirst; chunk < kFirst + kSome; ++chunk) {
      const Operand a = Operand::of_columns(of_columns + slab_of<kSlabs>(chunk) * C::kTileM * kRowBytes, 0);
#pragma unroll
      for (int n = 0; n < C::kTileM / 16; ++n)
        ptx::wgmma<C::kTileN, true, true>(c[chunk], a.at(n * 2048), b.at(n * 2048), true);
    }
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void start_dv() {
    start_gradient<L::kSlabsV, 0, kDvChunks>(dv, pipelines.dout.tile(), weights());
  }
  template <int kFirst = 0, int kSome = kDkChunks>
  __device__ __forceinline__ void start_dk() {
    start_gradient<L::kSlabs, kFirst, kSome>(dk, pipelines.q.tile(), ds());
  }
  // dQ = dS K
  __device__ __forceinline__ void start_dq(DqPart& dq, int chunk) const {
    const Operand a = Operand::of_rows(ds());
    const Operand b = Operand::of_columns(pipelines.k.tile() + share.slab(chunk) * C::kTileN * kRowBytes, 0);
    pin(dq);
    ptx::wgmma_fence();
#pragma unroll
    for (int n = 0; n < C::kTileN / 16; ++n)
      ptx::wgmma<Dq::kColumns, false, true>(dq, a.at(n / 4 * L::kDsSlabBytes + n % 4 * 32), b.at(n * 2048), n > 0);
    ptx::wgmma_commit();
  }
  template <int kChunks>
  static __device__ __forceinline__ void pin_all(Gradient (&c)[kChunks]) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) pin(c[chunk]);
  }

  // ---- between products

  // The rows that a thread has, in the tile.
  static __device__ __forceinline__ int first_row() { return threadIdx.x / 32 % 4 * 16 + Place().row; }

  // The LSE, or delta, of a thread's rows. Loads wait for the products that were started before them.
  static __device__ __forceinline__ void load_stats(float (&stats)[2], uint32_t from) {
#pragma unroll
    for (int r = 0; r < 2; ++r) stats[r] = __uint_as_float(ptx::ld_shared_4(from + (first_row() + r * 8) * 4));
  }

  // Begin accumulators with a value a row.
  static __device__ __forceinline__ void seed(Scores& c, const float (&stats)[2]) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) c[j][0] = c[j][1] = stats[0], c[j][2] = c[j][3] = stats[1];
  }

  // P in place of the scores.
  template <bool kMasked>
  __device__ __forceinline__ void exponentiate(Scores& s, Scores& derivatives, const RowTileVisit& at,
                                               const float (&lse_log2)[2]) {
    const int row0 = at.tile * C::kTileM + first_row(), key0 = keys.n0 + group * kKeys + Place().column;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int m = row0 + r * 8;
      const int begin = max(0, m + band.first) - key0, end = min(band.seqlen_k, m + band.last + 1) - key0;
#pragma unroll
      for (int j = 0; j < kPieces; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[j][r * 2 + e];
          const int key = j * 8 + e;
          const float exponent = change.exponent(x, lse_log2[r], m + change.shift - (key0 + key),
                                                 derivatives[C::kSoftcap ? j : 0][r * 2 + e]);
          x = weight_of<C>(exponent, j);
          if (kMasked && (key < begin || key >= end)) x = 0.f;
        }
    }
    if constexpr (kMasked && MaskOf<C>::kIntervals) clear_hidden(s, row0);
  }
  __device__ __forceinline__ void clear_hidden(Scores& s, int row0) const {
#pragma unroll
    for (int j = 0; j < kPieces; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = group * kKeys + Place().column + j * 8 + e;
        const uint4 x = ptx::ld_shared_16(pipelines.smem + L::kBounds + key * 16);
        const HiddenRows hidden = {int(x.x), int(x.y), int(x.z), int(x.w)};
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if (hidden.contains(row0 + r * 8)) s[j][r * 2 + e] = 0.f;
      }
  }
  __device__ __forceinline__ void form_ds(const Scores& s, Scores& dp, const Scores& derivatives,
                                          const float (&delta)[2], const Factors& factors) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int j = 0; j < kPieces; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = r * 2 + e;
          const float2 both = halves_of(factors[j][r]);
          dp[j][i] = gradient_of_score<C>(s[j][i], dp[j][i], delta[r], e ? both.y : both.x);
          if constexpr (C::kSoftcap) dp[j][i] *= derivatives[j][i];
        }
    }
  }
  // Rows of q down, this group's keys among those of all. kWeights: as they count for dV.
  template <bool kWeights>
  __device__ __forceinline__ void store(uint32_t tile, const Scores& c, const Factors& factors) const {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
    const auto place = [&](int piece) {
      return tile + piece / 8 * L::kDsSlabBytes + row * kRowBytes + ((piece % 8 ^ lane % 8) << 4);
    };
    const auto word = [&](int j, int r) {
      const uint32_t pair = pack<Element>(c[j][r * 2], c[j][r * 2 + 1]);
      if constexpr (C::kDropout && kWeights) return multiply_factors<Element>(pair, factors[j][r]);
      return pair;
    };
    const int first = group * kPieces;
#pragma unroll
    for (int j = 0; j + 1 < kPieces; j += 2)
      ptx::stmatrix_x4(place(first + j + lane / 16), {word(j, 0), word(j, 1), word(j + 1, 0), word(j + 1, 1)});
    if constexpr (kPieces % 2) ptx::stmatrix_x2(place(first + kPieces - 1), word(kPieces - 1, 0), word(kPieces - 1, 1));
  }

  // ---- a row tile

  // All of it lies in one branch, so that the exponentials mix with what follows them.
  template <bool kMasked>
  __device__ __forceinline__ void visit(const RowTileVisit& at) {
    Scores s, dp, derivatives;  // of this visit alone, or their registers would be held between visits
    if (C::kAlibi || C::kDropout) change.set_head(p, keys.batch, at.head);
    pipelines.q.wait();
    float lse[2], delta[2];
    load_stats(lse, pipelines.lse());
    load_stats(delta, pipelines.delta());
    if constexpr (kSeedsDp<C>) seed(dp, delta), pin(dp);
    start_scores<C::kHeadDim, false>(s, pipelines.q.tile(), pipelines.k.tile());
    pipelines.dout.wait();
    start_scores<C::kHeadDimV, kSeedsDp<C>>(dp, pipelines.dout.tile(), pipelines.v.tile());
    Drawn drawn;
    const int first_row = at.tile * C::kTileM + threadIdx.x / 32 % 4 * 16, first_key = keys.n0 + group * kKeys;
    drawn.template draw<true>(change.dropout, first_row, first_key);
    ptx::wgmma_wait<1>();
    pin(s);
    exponentiate<kMasked>(s, derivatives, at, lse);
    drawn.template draw<false>(change.dropout, first_row, first_key);
    Factors factors;
#pragma unroll
    for (int i = 0; i < kPieces * 2; ++i) factors[i / 2][i % 2] = drawn.factors(change.dropout, i % 2, i / 2);
    if constexpr (C::kDsStages == 1) ptx::barrier_sync(kBarrier + 1, L::kGroups * 128);  // all have read the last ones
    if constexpr (C::kDvStart != DvStart::after_ds) store<true>(weights(), s, factors);
    if constexpr (kDvFirst) meet();
    ptx::wgmma_wait<0>();
    pin(dp);
    form_ds(s, dp, derivatives, delta, factors);
    if constexpr (C::kDvStart == DvStart::after_ds) store<true>(weights(), s, factors);
    store<false>(ds(), dp, factors);
    if constexpr (kDvFirst) start_dv();
    meet();
    if constexpr (!Dq::kEach)
      finish_unevenly(at);
    else if constexpr (kDvFirst)
      finish_behind_dv(at);
    else
      finish(at);
    pipelines.q.release();
    if (++pipelines.ds_stage == C::kDsStages) pipelines.ds_stage = 0;
  }

  // All have stored what the others read.
  static __device__ __forceinline__ void meet() {
    ptx::fence_shared_writes();
    ptx::barrier_sync(kBarrier, L::kGroups * 128);
  }
  __device__ __forceinline__ void sink(const DqPart& dq, int chunk, const RowTileVisit& at) {
    sink_dq<C>(dq, share, chunk, pipelines,
               dq_sums<C>(launch, row_tile_index<C>(p, launch, keys.batch, at.head, at.tile)));
  }

  // P and dS are there: dQ, dV and dK. A chunk of dQ leaves while another product is under way.
  __device__ __forceinline__ void finish(const RowTileVisit& at) {
    DqPart dq;
    start_dq(dq, 0);
    start_dv();
    ptx::wgmma_wait<1>();
    pin(dq);
    sink(dq, 0, at);
    if constexpr (Dq::kChunks > 1) start_dq(dq, 1);
    start_dk();
    ptx::wgmma_wait<(Dq::kChunks > 1 ? 2 : 1)>();
    pin_all(dv);
    pipelines.dout.release();
    if constexpr (Dq::kChunks > 1) {
      ptx::wgmma_wait<1>();
      pin(dq);
      sink(dq, 1, at);
    }
    ptx::wgmma_wait<0>();
    pin_all(dk);
    finish_dq<2>(dq, at);
  }
  // The same, dV is under way.
  __device__ __forceinline__ void finish_behind_dv(const RowTileVisit& at) {
    constexpr int kBefore = Dq::kChunks > 1 ? kDkChunks / 2 : 0, kRest = kDkChunks - kBefore;
    DqPart dq;
    start_dq(dq, 0);
    if constexpr (Dq::kChunks == 1) start_dk();
    if constexpr (kBefore > 0) start_dk<0, kBefore>();
    ptx::wgmma_wait<(Dq::kChunks == 1 || kBefore > 0 ? 1 : 0)>();
    pin_all(dv);
    pipelines.dout.release();
    pin(dq);
    sink(dq, 0, at);
    if constexpr (Dq::kChunks > 1) {
      start_dq(dq, 1);
      start_dk<kBefore, kRest>();
      ptx::wgmma_wait<1>();
      pin(dq);
      sink(dq, 1, at);
    }
    ptx::wgmma_wait<0>();
    pin_all(dk);
    finish_dq<2>(dq, at);
  }
  // Not every group has all chunks of dQ.
  __device__ __forceinline__ void finish_unevenly(const RowTileVisit& at) {
    DqPart dq;
    if constexpr (!kDvFirst) start_dv();
    start_dk();
    ptx::wgmma_wait<1>();
    pin_all(dv);
    pipelines.dout.release();
    ptx::wgmma_wait<0>();
    pin_all(dk);
    finish_dq<0>(dq, at);
  }
  template <int kFirst>
  __device__ __forceinline__ void finish_dq(DqPart& dq, const RowTileVisit& at) {
#pragma unroll
    for (int chunk = kFirst; chunk < Dq::kChunks; ++chunk)
      if (share.owns(chunk)) {
        start_dq(dq, chunk);
        ptx::wgmma_wait<0>();
        pin(dq);
        sink(dq, chunk, at);
      }
  }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int i = 0; i < kDkChunks * C::kTileN / 8 * 4; ++i)
      dk[i / (C::kTileN / 2)][i / 4 % (C::kTileN / 8)][i % 4] = 0.f;
#pragma unroll
    for (int i = 0; i < kDvChunks * C::kTileN / 8 * 4; ++i)
      dv[i / (C::kTileN / 2)][i / 4 % (C::kTileN / 8)][i % 4] = 0.f;
    pipelines.k.wait();
    pipelines.v.wait();
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
      put(sums, 0, dk);
      put(sums, kDkChunks, dv);
      sums.finish([&](int unit) {
        const bool of_dk = unit < kDkChunks;
        const int slab = (of_dk ? unit : unit - kDkChunks) * L::kGroups + group;
        if (slab >= (of_dk ? L::kSlabs : L::kSlabsV)) return;
        Gradient c;
        sums.sum(unit, c);
        ptx::barrier_sync(kBarrier + 2 + group, 128);  // others have no use for this unit: its place is free
        if (of_dk)
          store_slab(p.dk, c, sums.place(unit), slab, p.head_dim, dk_scale);
        else
          store_slab(p.dv, c, sums.place(unit), slab, p.head_dim_v, dv_scale);
      });
    } else {
      ptx::barrier_sync(kBarrier, L::kGroups * 128);  // k and v have been read: their places are free
      store_gradient<L::kSlabs>(p.dk, dk, pipelines.k.tile(), p.head_dim, dk_scale);
      store_gradient<L::kSlabsV>(p.dv, dv, pipelines.v.tile(), p.head_dim_v, dv_scale);
    }
  }

  // A chunk is a unit.
  template <int kChunks>
  __device__ __forceinline__ void put(const SplitSums<C>& sums, int first, const Gradient (&c)[kChunks]) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
      for (int n = 0; n < C::kTileN / 8; ++n) sums.put(first + chunk, n, c[chunk][n]);
  }

  template <int kSlabs, int kChunks>
  __device__ __forceinline__ void store_gradient(const fagen_tensor& to, const Gradient (&c)[kChunks], uint32_t place,
                                                 int columns, float scale) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int slab = chunk * L::kGroups + group;
      if (slab < kSlabs) store_slab(to, c[chunk], place + slab * C::kTileN * kRowBytes, slab, columns, scale);
    }
  }
  // Transpose 64 columns into a place that is free, and store rows of 128 bytes.
  __device__ __forceinline__ void store_slab(const fagen_tensor& to, const Gradient& c, uint32_t place, int slab,
                                             int columns, float scale) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, thread = threadIdx.x % 128;
    const uint32_t into = place + (lane / 16 * 8 + lane % 8) * kRowBytes + ((warp * 2 + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
    for (int n = 0; n < C::kTileN / 16; ++n) {
      const auto word = [&](int i) {
        const float* pair = &c[2 * n + i / 2][i % 2 * 2];
        return pack<Element>(pair[0] * scale, pair[1] * scale);
      };
      ptx::stmatrix_x4_trans(into + n * 16 * kRowBytes, {word(0), word(1), word(2), word(3)});
    }
    ptx::barrier_sync(kBarrier + 2 + group, 128);
    const int column = slab * kSlabColumns + thread % 8 * 8;
    Element* out = static_cast<Element*>(to.data) + keys.batch * to.stride[0] + keys.kv_head * to.stride[2] + column;
#pragma unroll 1
    for (int row = thread / 8; row < C::kTileN; row += 16)
      if (keys.n0 + row < p.seqlen_k && column < columns)
        *reinterpret_cast<uint4*>(out + (keys.n0 + row) * to.stride[1]) =
            ptx::ld_shared_16(place + row * kRowBytes + (thread % 8 ^ row % 8) * 16);
  }
};

}  // namespace fagen
