// dQ in a kernel of its own: a block keeps one tile of rows, and the keys pass by as in forward. S and dP are computed
// a second time, and nothing is added across blocks: two runs agree in every bit.
#pragma once
#include "fagen/sm80/backward/sums.cuh"

namespace fagen {

// The config of this kernel's tiles, for the masks.
template <class C>
struct RowBlockConfig : C {
  static constexpr int kTileM = C::kDqTileM, kTileN = C::kDqTileN;
};

template <class C, class Element>
struct RowBlock {
  using S = RowBlockShape<C>;
  using R = RowBlockConfig<C>;
  using WarpCells = Cells<R, Element, false, S::kSlabs, S::kTileN>;

  const fagen_backward_params& p;
  BlockCoord coord;  // of a row tile
  uint32_t smem;
  int kv_head, first_row;  // the warp's first row in the tile
  MaskOf<R> mask;
  ScoreGradient<R> score;
  const RowStats* stats;  // of the warp's first row
  Lane lane;
  float dq[S::kSlabs][C::kHeadDim / 8][4];

  __device__ __forceinline__ RowBlock(const fagen_backward_params& p, const GradientArgs& args, unsigned char* shared)
      : p(p),
        coord(BlockCoord::of<C::kBlockOrder, true>(blockIdx.x, args.row_tiles, p.heads, p.batch)),
        smem(ptx::shared_address(shared)),
        kv_head(coord.head / (p.heads / p.kv_heads)),
        first_row(threadIdx.x / 32 * S::kSlabs * 16),
        mask(mask_of<R>(args, coord.batch, kv_head, args.extents, (p.seqlen_k + S::kTileN - 1) / S::kTileN)),
        score(args.forward, coord.batch, coord.head),
        stats(args.stats + (int64_t(coord.batch) * p.heads + coord.head) * args.stats_rows +
              int64_t(coord.tile) * S::kTileM + first_row) {
    clear(dq);
  }

  __device__ __forceinline__ uint32_t k_tile(int stage) const { return smem + S::kKeys + stage * S::kStageBytes; }
  __device__ __forceinline__ uint32_t v_tile(int stage) const { return k_tile(stage) + S::TileK::kBytes; }

  __device__ __forceinline__ void load_rows() const {
    const auto q = matrix<Element>(p.q, coord.batch, coord.head, p.seqlen_q, p.head_dim);
    const auto dout = matrix<Element>(p.dout, coord.batch, coord.head, p.seqlen_q, p.head_dim_v);
    const int first = coord.tile * S::kTileM;
    load_tile<typename S::TileQ, S::kTileM, S::kThreads, C::kAligned>(smem, q, first, threadIdx.x);
    load_tile<typename S::TileDout, S::kTileM, S::kThreads, C::kAligned>(smem + S::kDout, dout, first, threadIdx.x);
  }
  __device__ __forceinline__ void load_keys(int stage, int tile) const {
    const auto k = matrix<Element>(p.k, coord.batch, kv_head, p.seqlen_k, p.head_dim);
    const auto v = matrix<Element>(p.v, coord.batch, kv_head, p.seqlen_k, p.head_dim_v);
    const int first = tile * S::kTileN;
    load_tile<typename S::TileK, S::kTileN, S::kThreads, C::kAligned>(k_tile(stage), k, first, threadIdx.x);
    load_tile<typename S::TileV, S::kTileN, S::kThreads, C::kAligned>(v_tile(stage), v, first, threadIdx.x);
  }

  // The product of the warp's rows with all keys of a tile, head dims across in both.
  template <class TileA, class TileB, int kSteps>
  __device__ __forceinline__ void row_product(typename WarpCells::Sums& sums, uint32_t rows, uint32_t keys) const {
    const auto a = Operand<TileA>::rows_first(lane, rows, first_row, 0);
    const auto b = Operand<TileB>::columns_first(lane, keys, 0, 0);
    clear(sums);
    multiply<Element, kSteps>(
        sums, [&](uint32_t (&f)[4], int s, int d) { a.load(f, s, d); },
        [&](uint32_t (&f)[4], int n, int d) { b.load(f, n, d); });
  }

  template <bool kMasked>
  __device__ __forceinline__ void visit(int stage, int tile) {
    typename WarpCells::Pairs weights, gradients;
    typename WarpCells::Sums s_acc, dp_acc;
    row_product<typename S::TileQ, typename S::TileK, C::kHeadDim / 16>(s_acc, smem, k_tile(stage));
    row_product<typename S::TileDout, typename S::TileV, C::kHeadDimV / 16>(dp_acc, smem + S::kDout, v_tile(stage));
    const WarpCells cells{lane, score, mask, stats, coord.tile * S::kTileM + first_row, tile * S::kTileN};
    cells.template differentiate<kMasked>(s_acc, dp_acc, weights, gradients);
    const auto b = Operand<typename S::TileK>::rows_first(lane, k_tile(stage), 0, 0);
    multiply<Element, S::kTileN / 16>(
        dq, [&](uint32_t (&f)[4], int s, int step) { gradients.operand(f, s, step); },
        [&](uint32_t (&f)[4], int n, int step) { b.load_transposed(f, step, n); });
  }

  __device__ __forceinline__ void store() const {
    ptx::cp_async_wait<0>();
    __syncthreads();  // nobody reads q any more
    const auto to = matrix<Element>(p.dq, coord.batch, coord.head, p.seqlen_q, p.head_dim);
    store_part<typename S::TileQ, C::kAligned>(lane, smem, first_row, 0, dq, p.scale, to, coord.tile * S::kTileM);
  }
};

template <class C, class Element>
__device__ __forceinline__ void run_row_block(RowBlock<C, Element>& block) {
  using S = RowBlockShape<C>;
  const int m0 = block.coord.tile * S::kTileM, m1 = min(m0 + S::kTileM, block.p.seqlen_q);
  const TileRange range = TileRange::of<S::kTileN>(block.mask.band, m0, m1);
  auto walk = block.mask.walk(range, m0, m1);   // the tile that is computed
  auto ahead = block.mask.walk(range, m0, m1);  // the next tile to be loaded
  int stage = 0;

  block.load_rows();
  if (ahead.valid()) {
    block.load_keys(0, ahead.tile);
    ahead.advance();
  }
  ptx::cp_async_commit();
  walk.visit_rest(range, [&](int tile, auto masked) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody works on the one before
    if (ahead.valid()) {
      block.load_keys(stage ^ 1, ahead.tile);
      ahead.advance();
    }
    ptx::cp_async_commit();
    block.template visit<decltype(masked)::value>(stage, tile);
    stage ^= 1;
  });
  block.store();
}

}  // namespace fagen
