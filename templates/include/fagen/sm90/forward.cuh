// The forward kernel for Hopper: two warps feed the copy engine, one to three warpgroups compute 64 rows of q each.
//
// A block works through tiles of rows without a pause: the product that ends one tile, its O on the way to memory, and
// the first scores of the next are under way together.
#pragma once
#include "fagen/sm90/epilogue.cuh"
#include "fagen/sm90/layout.cuh"
#include "fagen/sm90/producer.cuh"
#include "fagen/sm90/rows.cuh"
#include "fagen/sm90/weights.cuh"

// What a warpgroup that computes does.
template <class C, class Element>
struct Consumer {
  using S = Shape<C>;
  using State = Attend<C, 1, C::kTileN, C::kHeadDimV, Element, void, void, void>;
  using Scores = typename State::Scores;  // [1][keys / 8][4]

  static constexpr int kPieces = C::kTileN / 8;  // of 8 keys

  const fagen_params& p;
  const Launch& launch;
  Rings<C> rings;
  const Band band;
  const Packing<C> packing;
  const int group;  // of warps, from 0
  Rows<C> rows;
  int unseen;  // tiles of keys to let pass
  Told told;   // intervals: about the tile of keys whose scores are under way
  State state;
  Scores s_acc;
  WeightOperand<C> weights;

  __device__ __forceinline__ Consumer(const fagen_params& p, const Launch& launch, uint32_t smem, int group)
      : p(p), launch(launch), rings(smem), band(p), packing(launch), group(group), state(p) {
    weights.tile = smem + S::kWeights + group * S::kWeightBytes;
  }

  // Before the first keys of a tile of rows.
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& piece : state.o[0]) piece[0] = piece[1] = piece[2] = piece[3] = 0.f;
    state.softmax.begin();
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
    weights.start_product(state.o[0], v);
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

  // Which scores of the thread are seen, a bit each: of each of its two rows, two of every piece of 8 keys.
  static constexpr int kSeenWords = (kPieces + 15) / 16;
  using Seen = uint32_t[2][kSeenWords];

  // By the band: of the keys from `key` on, row m sees [begin(m), end(m)).
  __device__ __forceinline__ void see_band(Seen& seen, int row0, int key) const {
    const Lane lane;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = packing.row(row0 + r * 8 + lane.row), first = key + lane.column;
      // of the thread's columns, how many lie before x
      const auto before = [&](int x) { return x <= 0 ? 0 : x / 8 * 2 + min(x % 8, 2); };
      const int begin = before(band.begin(row) - first);
      const int end = before((C::kMask == Mask::none ? band.seqlen_k : band.end(row)) - first);
#pragma unroll
      for (int w = 0; w < kSeenWords; ++w) {
        const auto bits = [&](int n) { return n <= w * 32 ? 0u : n >= w * 32 + 32 ? ~0u : (1u << (n - w * 32)) - 1u; };
        seen[r][w] = bits(end);
        if (C::kMask == Mask::window || C::kMask == Mask::intervals) seen[r][w] &= ~bits(begin);
      }
    }
  }
  // By the intervals, as told.
  __device__ __forceinline__ void see_intervals(Seen& seen, int row0) const {
    const Lane lane;
    const Cut cut = told.cut();
    if (cut == kColumns) {
#pragma unroll
      for (int w = 0; w < kSeenWords; ++w) {
        const uint32_t columns = told.columns(w, lane.column / 2);
        seen[0][w] &= columns, seen[1][w] &= columns;
      }
    } else if (cut == kRows) {
      const Hidden bounds = told.rows();
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (bounds.hides(row0 + r * 8 + lane.row))
          for (int w = 0; w < kSeenWords; ++w) seen[r][w] = 0;
    } else if (cut == kCells) {
#pragma unroll
      for (int w = 0; w < kSeenWords; ++w)
#pragma unroll 1
        for (int bit = 0; bit < 32 && w * 32 + bit < kPieces * 2; ++bit) {
          const int key = told.key() + (w * 16 + bit / 2) * 8 + lane.column + bit % 2;
          const Hidden bounds = rows.intervals.at(min(key, rows.intervals.last_key));
#pragma unroll
          for (int r = 0; r < 2; ++r)
            if (bounds.hides(row0 + r * 8 + lane.row)) seen[r][w] &= ~(1u << bit);
        }
    }
    __syncwarp();  // every lane has read what was told before the first one gives a later tile back
  }
  __device__ __forceinline__ void hide_others(const Seen& seen) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int bit = 0; bit < kPieces * 2; ++bit) {
        float& x = s_acc[0][bit / 2][r * 2 + bit % 2];
        x = seen[r][bit / 32] & 1u << bit % 32 ? x : -INFINITY;
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
      state.move(s_acc, row_max, factor);
    } else {
      state.softmax.set_offsets();
    }
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
  // The weights as an operand.
  __device__ __forceinline__ void pack_weights() {
    weights.put([&](int n, int i) {
      const float* pair = &s_acc[0][2 * n + i / 2][i % 2 * 2];
      return pack<Element>(pair[0], pair[1]);
    });
  }

  // S of a tile of rows' first keys, started
  __device__ __forceinline__ void start_first_scores() {
    rings.q.wait();
    rings.k.wait();
    hear(true);
    start_scores();
    ptx::wgmma_commit();
  }

  // What this warpgroup's rows see of the keys that the block walks over. The last tiles may lie behind all of it. And
  // of the last rows there may be none left for it.
  static constexpr bool kNarrows = S::kGroups > 1 && (C::kMask == Mask::causal || C::kMask == Mask::window);
  static constexpr bool kIdles = S::kGroups > 1;

  __device__ __forceinline__ bool idle() const { return kIdles && rows.m0 + group * 64 >= rows.m1; }

  __device__ __forceinline__ void narrow() {
    unseen = idle() ? rows.count() : 0;
    if constexpr (kNarrows) {
      if (idle()) return;
      const int first_row = rows.m0 + group * 64;
      const TileRange block = rows.range, mine = packing.range(band, first_row, first_row + 64);
      const int end = max(block.begin + 1, min(mine.end, block.end));
      rows.range = {block.begin, end, max(mine.full_begin, block.begin), min(mine.full_end, end)};
      unseen = block.end - end;
    }
  }
  // It lets those pass as if it visited them, the keys of one and the values of the one before, so that their places
  // become free. The first one's turn may have been used already.
  __device__ __forceinline__ void let_pass(bool turn_used) {
    if constexpr (kIdles)
#pragma unroll 1
      for (int i = 0; i < unseen; ++i) {
        if (i > 0 || !turn_used) {
          await_turn();
          pass_turn();
        }
        if (i > 0) pass_values();
        rings.k.wait();
        rings.k.release();
      }
  }
  __device__ __forceinline__ void pass_values() {
    rings.v.wait();
    rings.v.release();
  }

  // The next tile of rows, if there is one.
  __device__ __forceinline__ bool next() {
    const Letter letter = rings.mail.receive();
    if (letter.work.row_tile < 0) return false;
    rows = Rows<C>(p, launch, band, letter);
    narrow();
    return true;
  }

  // What is told of a tile of k that is there, where anybody asks.
  __device__ __forceinline__ void hear(bool partial) {
    if constexpr (C::kMask == Mask::intervals)
      if (partial || ScoreMod<C>::kActive) told = Told::hear(rings.told_place());
  }

  // What score changes and mask make of the scores of a tile of keys.
  __device__ __forceinline__ void modify(const ScoreMod<C>& mod, int row0, const Keys<C>& keys, bool partial) {
    constexpr bool kIntervals = C::kMask == Mask::intervals;
    int key;  // the first
    if constexpr (kIntervals)
      key = told.key();
    else
      key = keys.tile * C::kTileN;
    if constexpr (ScoreMod<C>::kActive) state.template modify<false>(s_acc, mod, band, rows.intervals, row0, key);
    if (!partial || (kIntervals && told.hides_nothing())) return;
    Seen seen;
    if (kIntervals && !told.banded())
      for (auto& row : seen)
        for (uint32_t& word : row) word = ~0u;
    else
      see_band(seen, row0, key);
    if constexpr (kIntervals) see_intervals(seen, row0);
    hide_others(seen);
  }

  // All keys of a tile of rows. Its first scores are under way already, its last product still is at the end.
  __device__ __forceinline__ void attend() {
    const int row0 = rows.m0 + group * 64 + threadIdx.x / 32 % 4 * 16;
    const ScoreMod<C> mod(p, rows.work.batch, rows.work.head);
    Keys<C> keys(rows);
    float factor[2];
    clear();
    if (keys.last()) rings.q.release();  // q has been read once the scores of the last tile are there
    keys.partial() ? modify(mod, row0, keys, true) : modify(mod, row0, keys, false);
    observe(factor);  // O is still zero: nothing to rescale
    weigh();
    pack_weights();
    if (kNarrows && unseen > 0) pass_values();  // of the last tile that was let pass
    keys.advance();
    keys.visit_rest([&](bool partial) {
      await_turn();
      rings.k.wait();
      hear(partial);
      start_scores();
      ptx::wgmma_commit();
      rings.v.wait();
      start_values();
      ptx::wgmma_commit();
      pass_turn();
      wait_scores<C::kOverlap ? 1 : 0>();  // with overlap, O += P V goes on under the maxima of this tile
      if (keys.last()) rings.q.release();
      modify(mod, row0, keys, partial);
      const bool moved = observe(factor);
      rings.v.wait();  // it has long been there; without this branch ptxas keeps the rings' state lane by lane
      wait_values<0>();
      if (moved) state.rescale(factor);
      weigh();
      pack_weights();
    });
  }

  // Tile of rows by tile of rows: the last product of one, its way out, and the first scores of the next go together.
  // They do not where the next rows' first tile of keys is not seen: then that tile's turn is the last product's. A
  // turn is also taken where there is no product, so that all warpgroups take as many.
  __device__ __forceinline__ void run() {
    if (C::kPingPong && group == S::kGroups - 1) pass_turn();  // the first warpgroup begins
    bool begun = false, idled = false;
    Done done;
    for (;;) {
      const bool more = !(C::kSchedule == Schedule::single && (begun || idled)) && next();
      const bool apart = begun && (!more || (kIdles && unseen > 0));
      if (apart) {
        await_turn();
        rings.v.wait();
        start_values();
        ptx::wgmma_commit();
        pass_turn();
        wait_values<0>();
        store_rows<C, Element>(p, packing, state, done, group);
        begun = false;
      }
      if (!more) {
        if (idled) await_turn(), pass_turn();
        return;
      }
      let_pass(apart);
      idled = idle();
      if (idled) {
        pass_values();
        rings.q.wait();
        rings.q.release();
        continue;
      }
      await_turn();
      if (begun) {
        rings.v.wait();
        start_values();
        ptx::wgmma_commit();
        start_first_scores();
        pass_turn();
        wait_values<1>();
        store_rows<C, Element>(p, packing, state, done, group);
        wait_scores<0>();
      } else {
        start_first_scores();
        pass_turn();
        wait_scores<0>();
      }
      attend();
      done = {rows.m0, rows.m1, rows.work.head, rows.work.batch};
      begun = true;
    }
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
  C::kCluster > 1 ? ptx::cluster_sync() : __syncthreads();
  ptx::start_next_kernel();
  if (!prepared<C>(launch)) ptx::wait_for_previous_kernel();
  if (group == S::kGroups) {
    ptx::fewer_registers<S::kProducerRegisters>();
    Producer<C> producer{p, launch, Rings<C>(smem), Band(p)};
    switch (__shfl_sync(~0u, threadIdx.x % 128 / 32, 0)) {
      case 0:
        producer.run_keys();
        break;
      case 1:
        producer.run_values();
        break;
      case 2:
        producer.run_telling();
        break;
      default:
        if (C::kMask != Mask::none) store_nothing<C, Element>(p, launch);
    }
  } else {
    ptx::more_registers<S::kConsumerRegisters>();
    Consumer<C, Element>(p, launch, smem, group).run();
  }
  if (C::kCluster > 1) ptx::cluster_sync();  // none ends while another fills its tiles or arrives at its barriers
}
