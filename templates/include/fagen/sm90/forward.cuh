// The forward kernel for Hopper: one warp feeds the copy engine, one to three warpgroups compute 64 rows of q each.
#pragma once
#include "fagen/sm90/layout.cuh"

struct Launch {
  CUtensorMap q, k, v;
  int row_tiles, key_tiles;  // tiles of a head
  int heads_at_once;         // sectioned order
  Extent* extents;           // of the intervals, tile by tile
};

// Call visit(tile, masked) for the rest of the walk, with a loop of its own for tiles that need no mask.
template <class C, class Walk, class Visit>
__device__ __forceinline__ void visit_tiles(Walk& walk, const TileRange& range, Visit visit) {
  if constexpr (C::kMask == Mask::intervals) {
    for (; walk.valid(); walk.advance()) walk.partial() ? visit(walk.tile, True{}) : visit(walk.tile, False{});
  } else {
    for (; walk.valid() && walk.tile >= range.full_end; walk.advance()) visit(walk.tile, True{});
    for (; walk.tile >= range.full_begin; walk.advance()) visit(walk.tile, False{});
    if constexpr (C::kMask == Mask::window)
      for (; walk.valid(); walk.advance()) visit(walk.tile, True{});
  }
}

// Every register of a fragment stays where it is, and is written, before what follows.
template <class X, int kPieces>
__device__ __forceinline__ void pin(X (&fragment)[kPieces][4]) {
#pragma unroll
  for (int i = 0; i < kPieces * 4; ++i) ptx::pin(fragment[i / 4][i % 4]);
}

template <class C, class Element>
struct Block {
  using S = Shape<C>;
  using State = Attend<C, 1, C::kTileN, C::kHeadDimV, Element, void, void, void>;
  using Scores = typename State::Scores;    // [1][keys / 8][4]
  using Weights = typename State::Weights;  // [keys / 16][1][4]

  const fagen_params& p;
  const Launch& launch;
  uint32_t smem;
  Work work;
  int m0, m1, kv_head;
  Band band;
  TileRange range;
  Intervals<C> intervals;

  __device__ __forceinline__ Block(const fagen_params& p, const Launch& launch, uint32_t smem)
      : p(p),
        launch(launch),
        smem(smem),
        work(take_work<C::kBlockOrder>(p, blockIdx.x, launch.row_tiles, launch.heads_at_once)),
        band(p) {
    m0 = work.row_tile * C::kTileM;
    m1 = min(m0 + C::kTileM, p.seqlen_q);
    kv_head = work.head / (p.heads / p.kv_heads);
    range = TileRange::of<C::kTileN>(band, m0, m1);
    if constexpr (C::kMask == Mask::intervals) {
      const int head = p.mask_heads == 1 ? 0 : kv_head;
      intervals.bounds = p.intervals + work.batch * p.intervals_stride[0] + head * p.intervals_stride[1];
      intervals.stride = p.intervals_stride[2];
      intervals.extents =
          launch.extents + int64_t(work.batch * p.mask_heads + head) * launch.key_tiles * C::kIntervalColumns;
      intervals.last_key = p.seqlen_k - 1;
    }
  }

  __device__ __forceinline__ auto first_tile() const {
    if constexpr (C::kMask == Mask::intervals)
      return IntervalWalk<C>(intervals, range, m0, m1);
    else
      return RangeWalk{range.end - 1, range.begin};
  }
  __device__ __forceinline__ uint32_t q_barrier() const { return smem + S::kBarriers; }
  __device__ __forceinline__ Ring k_ring() const {
    const uint32_t first = q_barrier() + 8;
    return {first, first + C::kStages * 8};
  }
  __device__ __forceinline__ Ring v_ring() const {
    const uint32_t first = q_barrier() + 8 + 2 * C::kStages * 8;
    return {first, first + C::kStages * 8};
  }

  // Consumers give a stage back with one arrival a warp.
  __device__ __forceinline__ void init_barriers() const {
    ptx::mbarrier_init(q_barrier(), 1);
    for (int stage = 0; stage < C::kStages; ++stage) {
      ptx::mbarrier_init(k_ring().full + stage * 8, 1);
      ptx::mbarrier_init(v_ring().full + stage * 8, 1);
      ptx::mbarrier_init(k_ring().empty + stage * 8, S::kGroups * 4);
      ptx::mbarrier_init(v_ring().empty + stage * 8, S::kGroups * 4);
    }
    ptx::fence_mbarrier_init();
  }

  // ---- producer: one warp walks the tiles, one lane of it talks to the copy engine

  __device__ __forceinline__ void load(const CUtensorMap& map, Ring& ring, uint32_t first, int bytes, int slabs,
                                       int tile, bool elected) const {
    if (elected) {
      ptx::mbarrier_wait(ring.empty_barrier(), ring.phase ^ 1);
      ptx::mbarrier_arrive_expect(ring.full_barrier(), bytes);
      for (int slab = 0; slab < slabs; ++slab)
        ptx::tma_load(first + ring.stage * bytes + slab * C::kTileN * 128, &map, ring.full_barrier(), slab * 64,
                      tile * C::kTileN, kv_head, work.batch);
    }
    ring.advance<C::kStages>();
  }

  __device__ __forceinline__ void produce() const {
    const bool elected = threadIdx.x % 32 == 0;
    Ring k = k_ring(), v = v_ring();
    if (elected) {
      ptx::mbarrier_arrive_expect(q_barrier(), C::kTileM * 128 * S::kSlabs);
      for (int slab = 0; slab < S::kSlabs; ++slab)
        for (int group = 0; group < S::kGroups; ++group)
          ptx::tma_load(smem + (slab * C::kTileM + group * 64) * 128, &launch.q, q_barrier(), slab * 64,
                        m0 + group * 64, work.head, work.batch);
    }
    // keys run one tile ahead of values, as they are needed
    int v_tile = -1;
    for (auto walk = first_tile(); walk.valid(); walk.advance()) {
      load(launch.k, k, smem + S::kK, S::kKBytes, S::kSlabs, walk.tile, elected);
      if (v_tile >= 0) load(launch.v, v, smem + S::kV, S::kVBytes, S::kSlabsV, v_tile, elected);
      v_tile = walk.tile;
    }
    if (v_tile >= 0) load(launch.v, v, smem + S::kV, S::kVBytes, S::kSlabsV, v_tile, elected);
  }

  // ---- consumers: what a warpgroup does

  __device__ __forceinline__ void release(const Ring& ring) const {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(ring.empty_barrier());
  }
  // S = Q K^T, started
  __device__ __forceinline__ void start_scores(Scores& s_acc, int group, const Ring& ring) const {
    pin(s_acc[0]);
    ptx::wgmma_fence();
#pragma unroll
    for (int d = 0; d < C::kHeadDim / 16; ++d) {
      const uint32_t within = d % 4 * 32;  // of a slab's 128-byte rows
      const uint32_t q = smem + (d / 4 * C::kTileM + group * 64) * 128 + within;
      const uint32_t k = smem + S::kK + ring.stage * S::kKBytes + d / 4 * C::kTileN * 128 + within;
      ptx::wgmma_shared<C::kTileN>(s_acc[0], rows_operand(q), rows_operand(k), d > 0);
    }
    ptx::wgmma_commit();
  }
  // O += P V, started
  __device__ __forceinline__ void start_values(State& state, Weights& p_frag, const Ring& ring) const {
    pin(state.o[0]);
#pragma unroll
    for (auto& piece : p_frag) pin(piece);
    ptx::wgmma_fence();
    const uint32_t v = smem + S::kV + ring.stage * S::kVBytes;
#pragma unroll
    for (int n = 0; n < C::kTileN / 16; ++n)
      ptx::wgmma_registers<C::kHeadDimV>(state.o[0], p_frag[n][0], columns_operand(v + n * 2048, C::kTileN * 128));
    ptx::wgmma_commit();
  }
  template <int kPending>
  __device__ __forceinline__ void wait_scores(Scores& s_acc) const {
    ptx::wgmma_wait<kPending>();
    pin(s_acc[0]);
  }
  __device__ __forceinline__ void wait_values(State& state) const {
    ptx::wgmma_wait<0>();
    pin(state.o[0]);
  }

  // Softmax of a tile: S becomes the weights, and O must follow by `factor`, once it is at rest, if this returns true.
  __device__ __forceinline__ bool weigh(State& state, Scores& s_acc, float (&factor)[2]) const {
    float row_max[2];
    state.tile_maxima(s_acc, row_max);
    const bool moved = __any_sync(~0u, state.softmax.outgrown(row_max));
    if (moved) {
      for (float& x : row_max) x = quad_max(x);
      state.softmax.move(row_max, factor);
    }
    state.softmax.settle();
#pragma unroll
    for (int n = 0; n < C::kTileN / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s_acc[0][n][i];
        x = state.softmax.weight(x, i / 2);
        state.softmax.sum[i / 2] += x;
      }
    return moved;
  }
  // The weights as an operand. Registers of an operand may not change while any product is under way.
  __device__ __forceinline__ void pack_weights(const Scores& s_acc, Weights& p_frag) const {
#pragma unroll
    for (int n = 0; n < C::kTileN / 16; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &s_acc[0][2 * n + i / 2][i % 2 * 2];
        p_frag[n][0][i] = pack<Element>(pair[0], pair[1]);
      }
  }

  __device__ __forceinline__ void consume(int group) const {
    const int warp = threadIdx.x / 32 % 4, row0 = m0 + group * 64 + warp * 16;
    State state(p);
    const ScoreMod<C> mod(p, work.batch, work.head);
    Ring k = k_ring(), v = v_ring();
    auto walk = first_tile();
    Scores s_acc;
    Weights p_frag;
    float factor[2];
    const auto modify = [&](int tile, auto masked) {
      state.template modify<decltype(masked)::value>(s_acc, mod, band, intervals, row0, tile * C::kTileN);
    };
    ptx::mbarrier_wait(q_barrier(), 0);
    if (walk.valid()) {
      ptx::mbarrier_wait(k.full_barrier(), k.phase);
      start_scores(s_acc, group, k);
      wait_scores<0>(s_acc);
      release(k);
      k.template advance<C::kStages>();
      needs_mask(walk, range) ? modify(walk.tile, True{}) : modify(walk.tile, False{});
      weigh(state, s_acc, factor);  // O is still zero: nothing to rescale
      pack_weights(s_acc, p_frag);
      walk.advance();
      const auto visit = [&](int tile, auto masked) {
        ptx::mbarrier_wait(k.full_barrier(), k.phase);
        start_scores(s_acc, group, k);
        ptx::mbarrier_wait(v.full_barrier(), v.phase);
        start_values(state, p_frag, v);
        wait_scores<C::kOverlap ? 1 : 0>(s_acc);  // with overlap, O += P V goes on under the softmax of the next tile
        release(k);
        k.template advance<C::kStages>();
        modify(tile, masked);
        const bool moved = weigh(state, s_acc, factor);
        wait_values(state);
        release(v);
        v.template advance<C::kStages>();
        if (moved) state.rescale(factor);
        pack_weights(s_acc, p_frag);
      };
      visit_tiles<C>(walk, range, visit);
      ptx::mbarrier_wait(v.full_barrier(), v.phase);
      start_values(state, p_frag, v);
      wait_values(state);
    }
    store(state, group, warp);
  }

  // Normalise, and store through the warpgroup's own rows of q's place: whole 16-byte pieces of rows.
  __device__ __forceinline__ void store(State& state, int group, int warp) const {
    const Lane lane;
    const int first = group * 64 + warp * 16;
    const auto at = [&](int row, int chunk) {
      return smem + (chunk / 8 * C::kTileM + row) * 128 + ((chunk % 8) ^ (row % 8)) * 16;
    };
    ptx::barrier_sync(1 + group, 128);  // the warpgroup has read its rows of q for the last time
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first + r * 8 + lane.row;
      const float row_sum = quad_sum(state.softmax.sum[r]), inverse = row_sum == 0.f ? 0.f : 1.f / row_sum;
      if (p.lse && lane.id % 4 == 0 && m0 + row < p.seqlen_q)
        p.lse[(int64_t(work.batch) * p.heads + work.head) * p.seqlen_q + m0 + row] = state.softmax.lse(r, row_sum);
#pragma unroll
      for (int n = 0; n < C::kHeadDimV / 8; ++n)
        ptx::st_shared_4(at(row, n) + lane.column * 2,
                         pack<Element>(state.o[0][n][r * 2] * inverse, state.o[0][n][r * 2 + 1] * inverse));
    }
    __syncwarp();  // a warp reads back only the rows it wrote
    Element* out = static_cast<Element*>(p.o) + work.batch * p.o_stride[0] + work.head * p.o_stride[2];
    constexpr int kChunks = C::kHeadDimV / 8;
#pragma unroll 4
    for (int i = lane.id; i < 16 * kChunks; i += 32) {
      const int row = first + i / kChunks, chunk = i % kChunks;
      if (m0 + row < p.seqlen_q && chunk * 8 < p.head_dim_v)
        *reinterpret_cast<uint4*>(out + (m0 + row) * p.o_stride[1] + chunk * 8) = ptx::ld_shared_16(at(row, chunk));
    }
  }
};

template <class C, class Element>
__device__ __forceinline__ void attend(const fagen_params& p, const Launch& launch, unsigned char* shared) {
  using S = Shape<C>;
  const uint32_t smem = (ptx::shared_address(shared) + 1023) & ~1023u;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // warp-uniform for the compiler as well; 0 produces
  const Block<C, Element> block(p, launch, smem);
  if (threadIdx.x == 0) {
    ptx::prefetch_map(&launch.q);
    ptx::prefetch_map(&launch.k);
    ptx::prefetch_map(&launch.v);
    block.init_barriers();
  }
  __syncthreads();
  if (group == 0) {
    ptx::fewer_registers<S::kProducerRegisters>();
    if (threadIdx.x < 32) block.produce();
  } else {
    ptx::more_registers<S::kConsumerRegisters>();
    block.consume(group - 1);
  }
}
