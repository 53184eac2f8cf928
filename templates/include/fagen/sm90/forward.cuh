// The forward kernel for Hopper: one warp feeds the copy engine, one to three warpgroups compute 64 rows of q each.
//
// A block works through tiles of rows without a pause: the product that ends one tile, its O on the way to memory, and
// the first scores of the next are under way together.
#pragma once
#include "fagen/sm90/epilogue.cuh"
#include "fagen/sm90/layout.cuh"
#include "fagen/sm90/rows.cuh"

// Every register of a fragment stays where it is, and is written, before what follows.
template <class X, int kPieces>
__device__ __forceinline__ void pin(X (&fragment)[kPieces][4]) {
#pragma unroll
  for (int i = 0; i < kPieces * 4; ++i) ptx::pin(fragment[i / 4][i % 4]);
}

// ---- the producer: one warp walks the tiles, one lane of it talks to the copy engine

template <class C>
struct Producer {
  const fagen_params& p;
  const Launch& launch;
  Rings<C> rings;
  const Band band;
  Share<C> share;

  // One tile of `kSlabs` slabs, `kRows` rows each; note() is called when its place is free.
  template <int kSlabs, int kRows, class Ring, class Note>
  __device__ __forceinline__ void load(const CUtensorMap& map, Ring& ring, int row, int head, int batch,
                                       Note note) const {
    if (threadIdx.x % 32 == 0) {
      ring.acquire();
      note();
      ring.announce();
      for (int slab = 0; slab < kSlabs; ++slab)
        ptx::tma_load(ring.tile() + slab * kRows * 128, &map, ring.full(), slab * 64, row, head, batch);
    }
    ring.advance();
  }
  __device__ __forceinline__ void load_q(const Rows<C>& rows) {
    load<Shape<C>::kSlabs, C::kTileM>(launch.q, rings.q, rows.m0, rows.work.head, rows.work.batch, [] {});
  }
  __device__ __forceinline__ void load_v(const Rows<C>& rows, int tile) {
    load<Shape<C>::kSlabsV, C::kTileN>(launch.v, rings.v, tile * C::kTileN, rows.kv_head, rows.work.batch, [] {});
  }
  // The walk's present tile, which is returned; the walk goes on.
  template <class Walk>
  __device__ __forceinline__ int load_k(const Rows<C>& rows, Walk& walk) {
    const int tile = walk.tile;
    const bool partial = needs_mask(walk, rows.range);
    walk.advance();
    load<Shape<C>::kSlabs, C::kTileN>(launch.k, rings.k, tile * C::kTileN, rows.kv_head, rows.work.batch, [&] {
      if constexpr (C::kMask == Mask::intervals) rows.tell(rings.told_place(), tile, partial, !walk.valid());
    });
    return tile;
  }

  // The next tile of rows that sees any key; row_tile is -1 if there is none.
  __device__ __forceinline__ Work find(int next) {
    for (;;) {
      const int index = __shfl_sync(~0u, next, 0);
      if (index >= launch.tiles) return {-1, 0, 0};
      const Work work = take<C>(p, launch, index);
      if (Rows<C>(p, launch, band, work).see_any()) return work;
      next = share.next(launch);
    }
  }

  // Keys run one tile ahead of values, as they are needed; the next tile of rows is looked for while the rings are
  // full.
  __device__ __forceinline__ void run() {
    if (C::kMask == Mask::intervals) ptx::wait_for_previous_kernel();
    Work work = find(blockIdx.x);
    rings.mail.send(work);
    while (work.row_tile >= 0) {
      const int next = share.next(launch);
      const Rows<C> rows(p, launch, band, work);
      auto walk = rows.first_tile();
      int tile = load_k(rows, walk);
      load_q(rows);
      work = find(next);
      rings.mail.send(work);
      while (walk.valid()) {
        const int v_tile = tile;
        tile = load_k(rows, walk);
        load_v(rows, v_tile);
      }
      load_v(rows, tile);
    }
  }
};

// ---- the consumers: what a warpgroup does

template <class C, class Element>
struct Consumer {
  using S = Shape<C>;
  using State = Attend<C, 1, C::kTileN, C::kHeadDimV, Element, void, void, void>;
  using Scores = typename State::Scores;    // [1][keys / 8][4]
  using Weights = typename State::Weights;  // [keys / 16][1][4]

  static constexpr int kPieces = C::kTileN / 8;  // of 8 keys

  const fagen_params& p;
  const Launch& launch;
  Rings<C> rings;
  const Band band;
  const int group;  // of warps, from 0
  Rows<C> rows;
  Told first;  // intervals: about the first tile of keys
  State state;
  Scores s_acc;
  Weights p_frag;

  __device__ __forceinline__ Consumer(const fagen_params& p, const Launch& launch, uint32_t smem, int group)
      : p(p), launch(launch), rings(smem), band(p), group(group), state(p) {}

  // Before the first keys of a tile of rows.
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& piece : state.o[0]) piece[0] = piece[1] = piece[2] = piece[3] = 0.f;
#pragma unroll
    for (int r = 0; r < 2; ++r) state.softmax.reference[r] = -INFINITY, state.softmax.sum[r] = 0.f;
  }

  // Warpgroups take turns at starting products, so that the softmax of one runs under the products of the others.
  __device__ __forceinline__ void await_turn() const {
    if constexpr (C::kPingPong) ptx::barrier_sync(1 + group, 256);
  }
  __device__ __forceinline__ void pass_turn() const {
    if constexpr (C::kPingPong) ptx::barrier_arrive(1 + (group + 1 == S::kGroups ? 0 : group + 1), 256);
  }

  // S = Q K^T, started
  __device__ __forceinline__ void start_scores() {
    const Operand q = Operand::of_rows(rings.q.tile() + group * 64 * 128), k = Operand::of_rows(rings.k.tile());
    pin(s_acc[0]);
    ptx::wgmma_fence();
#pragma unroll
    for (int d = 0; d < C::kHeadDim / 16; ++d) {
      const uint32_t within = d % 4 * 32;  // of a slab's 128-byte rows
      ptx::wgmma_shared<C::kTileN>(s_acc[0], q.at(d / 4 * C::kTileM * 128 + within),
                                   k.at(d / 4 * C::kTileN * 128 + within), d > 0);
    }
  }
  // O += P V, started
  __device__ __forceinline__ void start_values() {
    const Operand v = Operand::of_columns(rings.v.tile(), C::kTileN * 128);
    pin(state.o[0]);
#pragma unroll
    for (auto& piece : p_frag) pin(piece);
    ptx::wgmma_fence();
#pragma unroll
    for (int n = 0; n < C::kTileN / 16; ++n)
      ptx::wgmma_registers<C::kHeadDimV>(state.o[0], p_frag[n][0], v.at(n * 2048));
  }
  // Either is there, while up to kPending younger products go on; its tile may be overwritten.
  template <int kPending>
  __device__ __forceinline__ void wait_scores() {
    ptx::wgmma_wait<kPending>();
    pin(s_acc[0]);
    rings.k.release();
  }
  template <int kPending>
  __device__ __forceinline__ void wait_values() {
    ptx::wgmma_wait<kPending>();
    pin(state.o[0]);
    rings.v.release();
  }

  // Hide what the band hides of a tile: the columns from `key` on, of which each row sees [begin, end).
  __device__ __forceinline__ void hide(int row0, int key) {
    const Lane lane;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row0 + r * 8 + lane.row, first = key + lane.column;
      // of the thread's columns, two a piece of 8, how many lie before x
      const auto before = [&](int x) { return x <= 0 ? 0 : x / 8 * 2 + min(x % 8, 2); };
      const int begin = before(band.begin(row) - first), end = before(band.end(row) - first);
#pragma unroll
      for (int word = 0; word < kPieces * 2; word += 32) {
        const auto bits = [&](int n) { return n <= word ? 0u : n >= word + 32 ? ~0u : (1u << (n - word)) - 1u; };
        uint32_t seen = bits(end);
        if (C::kMask == Mask::window || C::kMask == Mask::intervals) seen &= ~bits(begin);
#pragma unroll
        for (int j = 0; j < 32 && word + j < kPieces * 2; ++j) {
          float& x = s_acc[0][(word + j) / 2][r * 2 + j % 2];
          x = seen & 1u << j ? x : -INFINITY;
        }
      }
    }
  }
  // And what intervals hide of it.
  __device__ __forceinline__ void hide(int row0, const Told& told) {
    if (told.cut() == Told::rows) {
      const Hidden bounds = told.hidden();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const bool hidden = bounds.hides(row0 + r * 8 + Lane().row);
#pragma unroll
        for (int n = 0; n < kPieces * 2; ++n) {
          float& x = s_acc[0][n / 2][r * 2 + n % 2];
          x = hidden ? -INFINITY : x;
        }
      }
    } else if (told.cut() == Told::cells) {
      state.hide_intervals(s_acc, rows.intervals, row0, told.tile() * C::kTileN);
    }
  }

  // Take the maxima of a tile into the softmax: true if O must follow by `factor`, once it is at rest.
  __device__ __forceinline__ bool observe(float (&factor)[2]) {
    constexpr int kChains = 4;  // of comparisons side by side, since each waits for the one before
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
    const bool moved = C::kRescale == Rescale::each || __any_sync(~0u, state.softmax.outgrown(row_max));
    if (moved) {
      for (float& x : row_max) x = quad_max(x);
      state.softmax.move(row_max, factor);
    }
    state.softmax.settle();
    return moved;
  }
  // S becomes the weights.
  __device__ __forceinline__ void weigh() {
#pragma unroll
    for (int n = 0; n < kPieces; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s_acc[0][n][i];
        x = state.softmax.weight(x, i / 2);
        state.softmax.sum[i / 2] += x;
      }
  }
  // The weights as an operand. Registers of an operand may not change while any product is under way.
  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int n = 0; n < C::kTileN / 16; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &s_acc[0][2 * n + i / 2][i % 2 * 2];
        p_frag[n][0][i] = pack<Element>(pair[0], pair[1]);
      }
  }

  // S of a tile of rows' first keys, started
  __device__ __forceinline__ void start_first_scores() {
    rings.q.wait();
    rings.k.wait();
    if constexpr (C::kMask == Mask::intervals) first = Told::hear(rings.told_place());
    start_scores();
    ptx::wgmma_commit();
  }

  // The next tile of rows, if there is one.
  __device__ __forceinline__ bool next() {
    const Work work = rings.mail.receive();
    if (work.row_tile < 0) return false;
    rows = Rows<C>(p, launch, band, work);
    return true;
  }

  // The walk over the keys, beginning with the tile whose scores are under way.
  __device__ __forceinline__ auto keys() {
    if constexpr (C::kMask == Mask::intervals)
      return ToldWalk<Rings<C>>{rings, first};
    else
      return rows.first_tile();
  }

  // All keys of a tile of rows. Its first scores are under way already, its last product still is at the end.
  __device__ __forceinline__ void attend() {
    const int row0 = rows.m0 + group * 64 + threadIdx.x / 32 % 4 * 16;
    const ScoreMod<C> mod(p, rows.work.batch, rows.work.head);
    const auto modify = [&](int tile, const auto& about) {
      if constexpr (ScoreMod<C>::kActive)
        state.template modify<false>(s_acc, mod, band, rows.intervals, row0, tile * C::kTileN);
      if (about.partial()) {
        hide(row0, tile * C::kTileN);
        if constexpr (C::kMask == Mask::intervals) hide(row0, about);
      }
    };
    // q has been read for the last time once the scores of the last tile are there
    const auto release_q = [&](int tile, const auto& about) {
      bool last = tile == rows.range.begin;
      if constexpr (C::kMask == Mask::intervals) last = about.last();
      if (last) rings.q.release();
    };
    auto walk = keys();
    float factor[2];
    clear();
    if constexpr (C::kMask == Mask::intervals) {
      release_q(walk.told.tile(), walk.told);
      modify(walk.told.tile(), walk.told);
    } else {
      release_q(walk.tile, True{});
      needs_mask(walk, rows.range) ? modify(walk.tile, True{}) : modify(walk.tile, False{});
    }
    observe(factor);  // O is still zero: nothing to rescale
    weigh();
    pack_weights();
    walk.advance();
    rows.visit_tiles(walk, [&](int tile, const auto& about) {
      await_turn();
      rings.k.wait();
      start_scores();
      ptx::wgmma_commit();
      rings.v.wait();
      start_values();
      ptx::wgmma_commit();
      pass_turn();
      wait_scores<C::kOverlap ? 1 : 0>();  // with overlap, O += P V goes on under the maxima of this tile
      release_q(tile, about);
      modify(tile, about);
      const bool moved = observe(factor);
      rings.v.wait();  // it has long been there; without this branch ptxas keeps the rings' state lane by lane
      wait_values<0>();
      if (moved) state.rescale(factor);
      weigh();
      pack_weights();
    });
  }

  // Tile of rows by tile of rows: the last product of one, its way out, and the first scores of the next go together.
  __device__ __forceinline__ void run() {
    if (C::kPingPong && group == S::kGroups - 1) pass_turn();  // the first warpgroup begins
    bool begun = false;
    Work done;
    while (next()) {
      await_turn();
      if (begun) {
        rings.v.wait();
        start_values();
        ptx::wgmma_commit();
        start_first_scores();
        pass_turn();
        wait_values<1>();
        store_rows<C, Element>(p, state, done, group);
        wait_scores<0>();
      } else {
        start_first_scores();
        pass_turn();
        wait_scores<0>();
      }
      attend();
      done = rows.work;
      begun = true;
      if (C::kSchedule == Schedule::single) break;
    }
    if (!begun) return;
    await_turn();
    rings.v.wait();
    start_values();
    ptx::wgmma_commit();
    pass_turn();
    wait_values<0>();
    store_rows<C, Element>(p, state, done, group);
  }
};

template <class C, class Element>
__device__ __forceinline__ void attend(const fagen_params& p, const Launch& launch, unsigned char* shared) {
  using S = Shape<C>;
  const uint32_t smem = (ptx::shared_address(shared) + 1023) & ~1023u;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // warp-uniform for the compiler as well; the last produces
  if (threadIdx.x == 0) {
    ptx::prefetch_map(&launch.q);
    ptx::prefetch_map(&launch.k);
    ptx::prefetch_map(&launch.v);
    Rings<C>(smem).init();
  }
  __syncthreads();
  if (group == S::kGroups) {
    ptx::fewer_registers<S::kProducerRegisters>();
    const int warp = __shfl_sync(~0u, threadIdx.x % 128 / 32, 0);
    if (warp == 0) Producer<C>{p, launch, Rings<C>(smem), Band(p)}.run();
    if (warp == 1 && C::kMask != Mask::none) store_nothing<C, Element>(p, launch);
  } else {
    ptx::more_registers<S::kConsumerRegisters>();
    Consumer<C, Element>(p, launch, smem, group).run();
  }
}
