// A consumer warpgroup: half of the cells of each visit, and half of the block's columns of the gradient. The two
// exchange cells through shared memory, once a visit, and with a peer through that of both blocks.
#pragma once
#include "fagen/common/element.cuh"
#include "fagen/ptx/barrier.cuh"
#include "fagen/ptx/cluster_store.cuh"
#include "fagen/sm90/backward/rows.cuh"
#include "fagen/sm90/backward_large/cells.cuh"
#include "fagen/sm90/backward_large/pipelines.cuh"
#include "fagen/sm90/operand.cuh"

namespace fagen {

template <class P, class Element>
struct PassConsumer {
  using L = PassLayout<P>;
  static constexpr int kPieces = L::kGroupOther / 8;     // 8 columns of cells each
  static constexpr int kCellSteps = L::kGroupOther / 16;  // 16 each
  static constexpr int kBarrier = 1;                      // and the next one
  using GroupCells = Cells<P, kPieces>;
  using Sums = typename GroupCells::Sums;

  const PassShare<P>& share;
  const int group;
  const uint32_t own_tile, cell_tile;
  PassPipelines<P> pipelines;
  int chunks_held = 0;  // the newest ones, which are not free yet
  float gradient[L::kGroupColumns / 8][4];

  __device__ __forceinline__ PassConsumer(const PassShare<P>& share, const PassPipelines<P>& pipelines, uint32_t smem,
                                          int group)
      : share(share), group(group), own_tile(smem), cell_tile(smem + L::kCells), pipelines(pipelines) {
#pragma unroll
    for (auto& piece : gradient) piece[0] = piece[1] = piece[2] = piece[3] = 0.f;
  }

  static __device__ __forceinline__ int warp_row() { return threadIdx.x / 32 % 4 * 16; }
  __device__ __forceinline__ int own_line() const { return share.own + warp_row() + Place().row; }

  // ---- products, chunk by chunk

  // Start the products of the next chunk, a group of their own.
  template <class Start>
  __device__ __forceinline__ void start_chunk(Start start) {
    pipelines.chunks.wait();
    ptx::wgmma_fence();
    start(pipelines.chunks.tile());
    ptx::wgmma_commit();
    pipelines.chunks.advance();
    ++chunks_held;
  }
  __device__ __forceinline__ auto oldest() const {
    auto chunk = pipelines.chunks;
    chunk.stage -= chunks_held;
    if (chunk.stage < 0) chunk.stage += P::kStages;
    return chunk;
  }
  // Wait for the products of all chunks but the newest ones, and free those.
  template <int kNewest>
  __device__ __forceinline__ void free_chunks() {
    ptx::wgmma_wait<kNewest>();
    for (; chunks_held > kNewest; --chunks_held) oldest().release();
  }

  // S or dP += own rows times visited ones, over one chunk's columns
  template <bool kStay>
  __device__ __forceinline__ void start_columns(Sums& sums, uint32_t own, int chunk) {
    start_chunk([&](uint32_t tile) {
      const Operand a = Operand::of_rows(kStay ? own + chunk * L::kOwnChunkBytes : tile);
      const Operand b = Operand::of_rows(tile + (kStay ? 0 : L::kOwnChunkBytes) + group * L::kGroupOther * kRowBytes);
#pragma unroll
      for (int step = 0; step < L::kChunkSlabs * 4; ++step)
        ptx::wgmma_shared<L::kGroupOther>(sums, a.at(step / 4 * L::kOwnSlabBytes + step % 4 * 32),
                                          b.at(step / 4 * L::kOtherSlabBytes + step % 4 * 32), chunk > 0 || step > 0);
    });
  }
  __device__ __forceinline__ void start_scores(Sums& scores, int chunk) {
    start_columns<L::kScoresStay>(scores, own_tile, chunk);
  }
  __device__ __forceinline__ void start_dp(Sums& dp, int chunk) {
    start_columns<L::kWeightsStay>(dp, own_tile + L::kOwnWeights, chunk);
  }
  // The gradient += cells times visited rows
  __device__ __forceinline__ void add_rows() {
    auto& first = reinterpret_cast<float (&)[L::kFirstColumns / 8][4]>(gradient[0]);
    pin(gradient);
#pragma unroll 1
    for (int chunk = 0; chunk < L::kSumChunks; ++chunk) {
      if (L::kPeers && chunk == L::kSumChunks / 2) pipelines.cells.wait();
      start_chunk([&](uint32_t tile) {
        const Operand cells = Operand::of_rows(cell_tile);
        const Operand rows = Operand::of_columns(tile + group * L::kGroupSlabs * L::kSumSlabBytes, L::kSumSlabBytes);
#pragma unroll
        for (int step = 0; step < L::kSumRows / 16; ++step) {
          const int at = share.sum_chunk(chunk) * (L::kSumRows / 16) + step;  // 16 rows of the tile
          const uint64_t a = cells.at(at / 4 * L::kCellSlabBytes + at % 4 * 32);
          ptx::wgmma_shared_columns<L::kFirstColumns>(first, a, rows.at(step * 2048));
          if constexpr (L::kSecondColumns > 0) {
            auto& second = reinterpret_cast<float (&)[L::kSecondColumns / 8][4]>(gradient[L::kFirstColumns / 8]);
            constexpr int kBefore = L::kFirstColumns / kSlabColumns * L::kSumSlabBytes;
            ptx::wgmma_shared_columns<L::kSecondColumns>(second, a, rows.at(kBefore + step * 2048));
          }
        }
      });
      free_chunks<P::kInFlight>();
    }
  }

  // ---- cells

  // This warpgroup's cells to shared memory, where both read them.
  __device__ __forceinline__ void store_cells(const Sums& cells) {
    if constexpr (L::kMayOvertake) ptx::barrier_sync(kBarrier + 1, L::kConsumers);  // both have read the last ones
    if constexpr (L::kPeers) pipelines.cells.acquire();  // so has the peer, and they have left
    const int lane = threadIdx.x % 32;
    const uint32_t place = cell_tile + (warp_row() + lane % 16) * kRowBytes + ((lane / 16 ^ lane % 8) << 4);
#pragma unroll
    for (int n = 0; n < kCellSteps; ++n) {
      const int at = (share.part * L::kGroups + group) * kCellSteps + n;
      const auto word = [&](int i) {
        const float* pair = &cells[2 * n + i / 2][i % 2 * 2];
        return pack<Element>(pair[0], pair[1]);
      };
      ptx::stmatrix_x4((place ^ at % 4 * 32) + at / 4 * L::kCellSlabBytes, {word(0), word(1), word(2), word(3)});
    }
    ptx::fence_shared_writes();
    ptx::barrier_sync(kBarrier, L::kConsumers);
    if (L::kPeers && threadIdx.x == 0) send_cells();
  }
  // To the same place in the peer, from where as many come.
  __device__ __forceinline__ void send_cells() const {
    pipelines.cells.expect_bytes();
    ptx::copy_to_block(cell_tile + share.part * L::kPeerBytes, L::kPeerBytes, pipelines.cells.full(), 1 - share.part);
  }
  // The peer may send the next ones.
  __device__ __forceinline__ void free_cells() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive_at(pipelines.cells.empty(), 1 - share.part);
    pipelines.cells.advance();
  }

  // ---- a visit

  __device__ __forceinline__ void visit(const typename PassShare<P>::Walk& walk) {
    Sums scores, dp, derivatives;
    pin(scores);
#pragma unroll 1
    for (int chunk = 0; chunk < L::kScoreChunks; ++chunk) {
      start_scores(scores, chunk);
      free_chunks<P::kInFlight>();
    }
    if constexpr (L::kChunksUnder > 0) pin(dp);
#pragma unroll
    for (int chunk = 0; chunk < L::kChunksUnder; ++chunk) start_dp(dp, chunk);
    free_chunks<L::kChunksUnder>();
    pin(scores);
    pipelines.stats.wait();
    const int other = (share.part * L::kGroups + group) * L::kGroupOther + Place().column;
    const int first_row = P::kOwnsKeys ? other : warp_row() + Place().row;
    const uint32_t stats = pipelines.stats.tile() + first_row * int(sizeof(RowStats));
    const GroupCells cells{share.mask, own_line(), walk.tile() * P::kTileOther + other};
    const ScoreChange<P> change(share.p, share.batch, walk.head);
    if (walk.partial())
      cells.template weigh<true>(scores, derivatives, change, CellStats<P>(stats));
    else
      cells.template weigh<false>(scores, derivatives, change, CellStats<P>(stats));
    if constexpr (!L::kOfWeights) {
      if constexpr (L::kChunksUnder == 0) pin(dp);
#pragma unroll 1
      for (int chunk = L::kChunksUnder; chunk < L::kWeightChunks; ++chunk) {
        start_dp(dp, chunk);
        free_chunks<P::kInFlight>();
      }
      free_chunks<0>();
      pin(dp);
      cells.differentiate(scores, dp, derivatives, CellStats<P>(stats));
    }
    if constexpr (P::kOwnsKeys) {
      __syncwarp();  // every lane has read before the first one frees the stage
      pipelines.stats.release();
    }
    store_cells(scores);
    add_rows();
    free_chunks<0>();
    if constexpr (L::kPeers) free_cells();
    pin(gradient);
  }

  __device__ __forceinline__ void run() {
    typename PassShare<P>::Walk walk(share);
    if (L::kScoresStay && walk.valid()) pipelines.own.wait();
    for (; walk.valid(); walk.advance()) visit(walk);
    store();
  }

  __device__ __forceinline__ void store() const {
    const fagen_backward_params& p = share.p;
    const int columns = L::kOfWeights ? p.head_dim_v : p.head_dim;
    const int head = P::kOwnsKeys ? share.kv_head : share.head, rows = P::kOwnsKeys ? p.seqlen_k : p.seqlen_q;
    store_rows<Element, L::kGroupColumns / 32>(
        share.gradient(), share.batch, head, own_line(), rows, columns,
        (share.first_column + group * L::kGroupColumns) / 8, L::kGroupColumns / 8, L::kOfWeights ? 1.f : p.scale,
        [&](int n) { return make_float4(gradient[n][0], gradient[n][1], gradient[n][2], gradient[n][3]); });
  }
};

}  // namespace fagen
