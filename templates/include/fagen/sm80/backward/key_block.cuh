// The main kernel: a block keeps one tile of keys, with dK and dV in registers, and the rows that see it pass by.
#pragma once
#include "fagen/sm80/backward/sums.cuh"

namespace fagen {

// Where a warp's share of dK, dV and dQ begins.
template <class C>
struct KeyBlockShare {
  using S = KeyBlockShape<C>;
  int warp = threadIdx.x / 32;
  int line = (S::kTransposed ? warp : warp % C::kRowWarps) * S::kLines;           // of S and dP
  int cell = S::kTransposed ? 0 : warp / C::kRowWarps * S::kCells;
  int key = warp % S::kKeyWarps * S::kKeySlabs * 16, part = warp / S::kKeyWarps;  // of dK and dV
  int dq_row = warp % S::kDqRowWarps * S::kDqSlabs * 16, dq_part = warp / S::kDqRowWarps;
};

// The block's part of dK and dV, as rows.
template <class C, class Element, int kSlabs, int kDkPieces, int kDvPieces>
__device__ __forceinline__ void store_keys(const fagen_backward_params& p, const Lane& lane,
                                           const KeyBlockShare<C>& share, uint32_t smem, int batch, int kv_head,
                                           int first_key, const float (&dk)[kSlabs][kDkPieces][4],
                                           const float (&dv)[kSlabs][kDvPieces][4]) {
  using S = KeyBlockShape<C>;
  const auto to_dk = matrix<Element>(p.dk, batch, kv_head, p.seqlen_k, p.head_dim);
  const auto to_dv = matrix<Element>(p.dv, batch, kv_head, p.seqlen_k, p.head_dim_v);
  store_part<typename S::TileK, C::kAligned>(lane, smem, share.key, share.part * S::kDkColumns, dk, p.scale, to_dk,
                                             first_key);
  store_part<typename S::TileV, C::kAligned>(lane, smem + S::kV, share.key, share.part * S::kDvColumns, dv,
                                             scale_up<C>(p, 1.f), to_dv, first_key);
}

// One tile of keys: its operands in shared memory, its sums in registers, and one step a tile of rows.
template <class C, class Element>
struct KeyBlock {
  using S = KeyBlockShape<C>;
  using WarpCells = Cells<C, Element, S::kTransposed, S::kSlabs, S::kCells>;
  using DqSums = FragmentSums<S::kThreads, S::kDqSlabs, S::kDqColumns / 8>;
  using DkSums = FragmentSums<S::kThreads, S::kKeySlabs, S::kDkColumns / 8>;
  using DvSums = FragmentSums<S::kThreads, S::kKeySlabs, S::kDvColumns / 8>;
  static constexpr int kVSlabs = S::kTransposed ? S::kSlabs : S::kCells / 16;

  const fagen_backward_params& p;
  const GradientArgs& args;
  BlockCoord coord;  // of a key tile; its head is a kv head where a block works for a whole group
  uint32_t smem;
  unsigned char* smem_bytes;
  int group, kv_head, first_head, heads;  // the heads that this block adds up
  MaskOf<C> mask;
  Lane lane;
  KeyBlockShare<C> share;
  uint32_t v_registers[S::kVInRegisters ? kVSlabs : 1][S::kVInRegisters ? S::kDv / 16 : 1][4];
  typename DkSums::Sums dk;
  typename DvSums::Sums dv;

  __device__ __forceinline__ KeyBlock(const fagen_backward_params& p, const GradientArgs& args, unsigned char* shared)
      : p(p),
        args(args),
        coord(BlockCoord::of<C::kBlockOrder, false>(blockIdx.x, args.key_tiles, args.dk_sum ? p.heads : p.kv_heads,
                                                    p.batch)),
        smem(ptx::shared_address(shared)),
        smem_bytes(shared),
        group(p.heads / p.kv_heads),
        kv_head(args.dk_sum ? coord.head / group : coord.head),
        first_head(args.dk_sum ? coord.head : coord.head * group),
        heads(args.dk_sum ? 1 : group),
        mask(mask_of<C>(args, coord.batch, kv_head, nullptr, 0)) {
    clear(dk);
    clear(dv);
  }

  __device__ __forceinline__ int first_key() const { return coord.tile * C::kTileN; }
  __device__ __forceinline__ uint32_t q_tile(int stage) const { return smem + S::kQ + stage * S::TileQ::kBytes; }
  __device__ __forceinline__ uint32_t dout_tile(int stage) const {
    return smem + S::kDout + stage * S::TileDout::kBytes;
  }
  __device__ __forceinline__ const RowStats* stats(int stage) const {
    return reinterpret_cast<const RowStats*>(smem_bytes + S::kStats + stage * S::kStatsBytes);
  }

  // ---- copies

  __device__ __forceinline__ void load_keys() {
    const auto k = matrix<Element>(p.k, coord.batch, kv_head, p.seqlen_k, p.head_dim);
    const auto v = matrix<Element>(p.v, coord.batch, kv_head, p.seqlen_k, p.head_dim_v);
    load_tile<typename S::TileK, C::kTileN, S::kThreads, C::kAligned>(smem, k, first_key(), threadIdx.x);
    load_tile<typename S::TileV, C::kTileN, S::kThreads, C::kAligned>(smem + S::kV, v, first_key(), threadIdx.x);
    ptx::cp_async_commit();
    if constexpr (S::kVInRegisters) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      hold_v();
      __syncthreads();  // q and dO may lie over v
    }
  }
  // q with the stats of its rows.
  __device__ __forceinline__ void load_q(int stage, int head, int tile) const {
    const auto q = matrix<Element>(p.q, coord.batch, head, p.seqlen_q, p.head_dim);
    load_tile<typename S::TileQ, C::kTileM, S::kThreads, C::kAligned>(q_tile(stage), q, tile * C::kTileM, threadIdx.x);
    const int64_t row = (int64_t(coord.batch) * p.heads + head) * args.stats_rows + int64_t(tile) * C::kTileM;
    load_stats<C::kTileM, S::kThreads>(smem + S::kStats + stage * S::kStatsBytes, args.stats + row);
  }
  __device__ __forceinline__ void load_dout(int stage, int head, int tile) const {
    const auto dout = matrix<Element>(p.dout, coord.batch, head, p.seqlen_q, p.head_dim_v);
    load_tile<typename S::TileDout, C::kTileM, S::kThreads, C::kAligned>(dout_tile(stage), dout, tile * C::kTileM,
                                                                         threadIdx.x);
  }

  // ---- products

  // V's fragments: it is the A operand of dP transposed, else B.
  __device__ __forceinline__ void hold_v() {
    const uint32_t tile = smem + S::kV;
    const auto v = S::kTransposed ? Operand<typename S::TileV>::rows_first(lane, tile, share.line, 0)
                                  : Operand<typename S::TileV>::columns_first(lane, tile, share.cell, 0);
#pragma unroll
    for (int s = 0; s < kVSlabs; ++s)
#pragma unroll
      for (int d = 0; d < S::kDv / 16; ++d) v.load(v_registers[s][d], s, d);
  }

  // S, or its transpose: head dims lie across in both operands.
  __device__ __forceinline__ void compute_scores(typename WarpCells::Sums& sums, int stage) const {
    using TileA = Select<S::kTransposed, typename S::TileK, typename S::TileQ>;
    using TileB = Select<S::kTransposed, typename S::TileQ, typename S::TileK>;
    const auto a = Operand<TileA>::rows_first(lane, S::kTransposed ? smem : q_tile(stage), share.line, 0);
    const auto b = Operand<TileB>::columns_first(lane, S::kTransposed ? q_tile(stage) : smem, share.cell, 0);
    clear(sums);
    multiply<Element, S::kD / 16>(
        sums, [&](uint32_t (&f)[4], int s, int d) { a.load(f, s, d); },
        [&](uint32_t (&f)[4], int n, int d) { b.load(f, n, d); });
  }

  // dP = dO V^T, or its transpose.
  __device__ __forceinline__ void compute_dp(typename WarpCells::Sums& sums, int stage) const {
    using TileA = Select<S::kTransposed, typename S::TileV, typename S::TileDout>;
    using TileB = Select<S::kTransposed, typename S::TileDout, typename S::TileV>;
    const uint32_t v = smem + S::kV, dout = dout_tile(stage);
    const auto a = Operand<TileA>::rows_first(lane, S::kTransposed ? v : dout, share.line, 0);
    const auto b = Operand<TileB>::columns_first(lane, S::kTransposed ? dout : v, share.cell, 0);
    clear(sums);
    multiply<Element, S::kDv / 16>(
        sums,
        [&](uint32_t (&f)[4], int s, int d) {
          if constexpr (S::kVInRegisters && S::kTransposed)
            copy_v(f, s, d);
          else
            a.load(f, s, d);
        },
        [&](uint32_t (&f)[4], int n, int d) {
          if constexpr (S::kVInRegisters && !S::kTransposed)
            copy_v(f, n, d);
          else
            b.load(f, n, d);
        });
  }
  __device__ __forceinline__ void copy_v(uint32_t (&f)[4], int s, int d) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) f[i] = v_registers[s][d][i];
  }

  // sums += X^T B over the rows of the tile: P^T dO is dV, dS^T Q is dK. X waits in registers or at `x_tile`.
  template <class TileB, int kColumns>
  __device__ __forceinline__ void add_over_rows(float (&sums)[S::kKeySlabs][kColumns / 8][4],
                                                const typename WarpCells::Pairs& x, uint32_t x_tile,
                                                uint32_t b_tile) const {
    const auto a = Operand<typename S::TileS>::columns_first(lane, x_tile, 0, share.key / 16);
    const auto b = Operand<TileB>::rows_first(lane, b_tile, 0, share.part * (kColumns / 16));
    multiply<Element, C::kTileM / 16>(
        sums,
        [&](uint32_t (&f)[4], int s, int step) {
          if constexpr (S::kTransposed)
            x.operand(f, s, step);
          else
            a.load_transposed(f, step, s);
        },
        [&](uint32_t (&f)[4], int n, int step) { b.load_transposed(f, step, n); });
  }

  // dQ of a tile of rows += dS K, over this block's keys.
  __device__ __forceinline__ void add_dq(int head, int tile) const {
    using Sums = typename DqSums::Sums;
    using DsOperand = Operand<typename S::TileS>;
    const uint32_t ds = smem + S::kGradients;
    const auto a = S::kTransposed ? DsOperand::columns_first(lane, ds, 0, share.dq_row / 16)
                                  : DsOperand::rows_first(lane, ds, share.dq_row, 0);
    const auto b = Operand<typename S::TileK>::rows_first(lane, smem, 0, share.dq_part * (S::kDqColumns / 16));
    Sums sums;
    clear(sums);
    multiply<Element, C::kTileN / 16>(
        sums,
        [&](uint32_t (&f)[4], int s, int step) {
          if constexpr (S::kTransposed)
            a.load_transposed(f, step, s);
          else
            a.load(f, s, step);
        },
        [&](uint32_t (&f)[4], int n, int step) { b.load_transposed(f, step, n); });
    const int64_t index = (int64_t(coord.batch) * p.heads + head) * args.row_tiles + tile;
    DqSums::add(args.dq_sum + index * DqSums::kFloats, sums);
  }

  // ---- one tile of rows: `load_next` starts the copies that need the room of q and dO

  template <bool kMasked, class LoadNext>
  __device__ __forceinline__ void visit(const ScoreGradient<C>& score, int head, int tile, int parity,
                                        LoadNext load_next) {
    const int q_stage = C::kQStages == 2 ? parity : 0, dout_stage = C::kDoutStages == 2 ? parity : 0;
    const uint32_t weights_tile = smem + S::kWeights, gradients_tile = smem + S::kGradients;
    typename WarpCells::Pairs weights, gradients;
    {
      typename WarpCells::Sums s_acc, dp_acc;
      compute_scores(s_acc, q_stage);
      compute_dp(dp_acc, dout_stage);
      const int row = S::kTransposed ? share.cell : share.line, key = S::kTransposed ? share.line : share.cell;
      const WarpCells cells{lane, score, mask, stats(q_stage) + row, tile * C::kTileM + row, first_key() + key};
      cells.template differentiate<kMasked>(s_acc, dp_acc, weights, gradients);
    }
    if constexpr (!S::kTransposed)
      weights.template store<typename S::TileS>(lane, weights_tile, share.line, share.cell);
    if constexpr (!S::kTransposed || S::kAddsDq)
      gradients.template store<typename S::TileS>(lane, gradients_tile, share.line, share.cell);
    if constexpr (!S::kTransposed) __syncthreads();
    add_over_rows<typename S::TileDout, S::kDvColumns>(dv, weights, weights_tile, dout_tile(dout_stage));
    add_over_rows<typename S::TileQ, S::kDkColumns>(dk, gradients, gradients_tile, q_tile(q_stage));
    load_next();
    if constexpr (S::kAddsDq) add_dq(head, tile);
  }

  // ---- the end: dK and dV

  __device__ __forceinline__ void store() {
    if constexpr (C::kGqa == Gqa::atomics)
      if (args.dk_sum) {
        const int64_t index = (int64_t(coord.batch) * p.kv_heads + kv_head) * args.key_tiles + coord.tile;
        DkSums::add(args.dk_sum + index * DkSums::kFloats, dk);
        DvSums::add(args.dv_sum + index * DvSums::kFloats, dv);
        return;
      }
    ptx::cp_async_wait<0>();
    __syncthreads();  // nobody reads K and V any more
    store_keys<C, Element>(p, lane, share, smem, coord.batch, kv_head, first_key(), dk, dv);
  }
};

template <class C, class Element>
__device__ __forceinline__ void run_key_block(KeyBlock<C, Element>& block) {
  using S = KeyBlockShape<C>;
  const KeyTileMask<C> tiles(block.mask, block.first_key(), block.p.seqlen_q);
  const int first = tiles.next(block.mask, tiles.range.begin), heads_end = block.first_head + block.heads;
  int parity = 0;  // of the tile: its stage, where there are two

  block.load_keys();
  if (first < tiles.range.end) {
    block.load_q(0, block.first_head, first);
    block.load_dout(0, block.first_head, first);
  }
  ptx::cp_async_commit();

  for (int head = block.first_head; head < heads_end; ++head) {
    const ScoreGradient<C> score(block.args.forward, block.coord.batch, head);
    tiles.visit_all(block.mask, [&](int tile, auto masked) {
      constexpr bool kOneStage = C::kQStages == 1 || C::kDoutStages == 1;
      // the copies are one tile ahead of the products, through all heads of the group
      int next = tiles.next(block.mask, tile + 1), next_head = head;
      if (next >= tiles.range.end) next = first, ++next_head;
      const bool more = next_head < heads_end;
      ptx::cp_async_wait<0>();
      __syncthreads();  // the tile is there, and nobody works on the one before
      if (C::kQStages == 2 && more) block.load_q(parity ^ 1, next_head, next);
      if (C::kDoutStages == 2 && more) block.load_dout(parity ^ 1, next_head, next);
      block.template visit<decltype(masked)::value>(score, head, tile, parity, [&] {
        if constexpr (kOneStage || (S::kTransposed && S::kAddsDq)) __syncthreads();
        if (C::kQStages == 1 && more) block.load_q(0, next_head, next);
        if (C::kDoutStages == 1 && more) block.load_dout(0, next_head, next);
        ptx::cp_async_commit();
      });
      parity ^= 1;
    });
  }
  block.store();
}

}  // namespace fagen
