// The producer warps: each walks over the tiles on its own, and loads q and keys, or values, or writes the key tiles'
// masks. One lane of it talks to the copy engine.
#pragma once
#include "fagen/ptx/tma.cuh"
#include "fagen/sm90/forward/row_tile.cuh"
#include "fagen/sm90/forward/tile_mask.cuh"

namespace fagen {

template <class C>
struct Producer {
  static constexpr int kLookAhead = 2;  // key tiles left to load when the next row tile is found

  const fagen_forward_params& p;
  const LaunchArgs& launch;
  Pipelines<C> pipelines;
  const Band band;
  TileScheduler<C> scheduler;

  // Load one tile of `kSlabs` slabs, `kRows` rows each, from some columns early, or this block's part of it to all
  // blocks that share it.
  template <int kSlabs, int kRows, bool kPacked = false, class Pipe>
  __device__ __forceinline__ void load(const CUtensorMap& map, Pipe& pipe, int row, int head, int batch,
                                       int early) const {
    if (threadIdx.x % 32 == 0) {
      pipe.acquire();
      if constexpr (kPacked)
        ptx::mbarrier_arrive_expect(pipe.full(), kSlabs * launch.tile_rows * kRowBytes);
      else
        pipe.expect_bytes();
      constexpr int kPart = kRows / Pipe::kBlocks;
      const int part = Pipe::kBlocks > 1 ? blockIdx.x % Pipe::kBlocks * kPart : 0;
      for (int slab = 0; slab < kSlabs; ++slab) {
        const uint32_t to = pipe.tile() + (slab * kRows + part) * 128;
        if constexpr (Pipe::kBlocks > 1)
          ptx::tma_load_to_all(to, &map, pipe.full(), slab * 64 - early, row + part, head, batch,
                               (1 << Pipe::kBlocks) - 1);
        else if constexpr (kPacked)
          ptx::tma_load_packed(to, &map, pipe.full(), slab * 64 - early, row, head, batch);
        else
          ptx::tma_load(to, &map, pipe.full(), slab * 64 - early, row, head, batch);
      }
    }
    pipe.advance();
  }
  static __device__ __forceinline__ int early(const EarlyColumns& columns, const RowTile<C>& row_tile) {
    return kLoadsEarly<C> ? columns.of(row_tile.kv_head, row_tile.coord.batch) : 0;
  }
  __device__ __forceinline__ void load_q(const RowTile<C>& row_tile) {
    const int row = HeadPacking<C>(launch).row(row_tile.m0);
    load<BlockLayout<C>::kSlabs, C::kTileM, C::kPackHeads>(launch.q, pipelines.q, row, row_tile.coord.head,
                                                           row_tile.coord.batch, early(launch.k_early, row_tile));
  }
  __device__ __forceinline__ void load_k(const RowTile<C>& row_tile, int key) {
    load<BlockLayout<C>::kSlabs, C::kTileN>(launch.k, pipelines.k, key, row_tile.kv_head, row_tile.coord.batch,
                                            early(launch.k_early, row_tile));
  }
  __device__ __forceinline__ void load_v(const RowTile<C>& row_tile, int key) {
    load<BlockLayout<C>::kSlabsV, C::kTileN>(launch.v, pipelines.v, key, row_tile.kv_head, row_tile.coord.batch,
                                             early(launch.v_early, row_tile));
  }

  // The next row tile that sees any key; its row_tile is -1 if there is none.
  __device__ __forceinline__ TileAssignment find(int next) {
    for (;;) {
      const int index = __shfl_sync(~0u, next, 0);
      if (index >= launch.tiles) return {{-1, 0, 0}, 0, {0, 0, 0, 0}};
      const TileAssignment found = assignment_at<C>(p, launch, index);
      if (RowTile<C>(p, launch, band, found).key_tiles() > 0) return found;
      next = next_index();
    }
  }

  __device__ __forceinline__ int next_index() {
    return scheduler.next(launch.tiles, launch.next_tile_counter, has_prologue<C>(launch));
  }

  // One warp takes row tiles, and loads their q and keys. It looks for the next row tile when few keys of the present
  // one are left to load: late, so that the block that is done first gets the next, and yet while the pipelines are
  // full. The first assignment is pushed after the first q and keys are on their way, since values would delay those.
  __device__ __forceinline__ void run_key_producer() {
    if (MaskOf<C>::kIntervals) ptx::wait_for_previous_kernel();
    TileAssignment assignment = find(cluster_index<C>());
    bool pushed = false;
    while (assignment.coord.row_tile >= 0) {
      const RowTile<C> row_tile(p, launch, band, assignment);
      auto walk = row_tile.walk();
      const auto load_next = [&] {
        walk.advance();
        load_k(row_tile, walk.key);
      };
      load_next();
      load_q(row_tile);
      if (!pushed) pipelines.assignments.push(assignment);
      pushed = true;
      int left = row_tile.key_tiles() - 1;
#pragma unroll 1
      for (bool found = false; left > 0 || !found;) {
        if (left > 0) load_next(), --left;
        if (!found && left <= kLookAhead) {
          assignment = find(next_index());
          pipelines.assignments.push(assignment);
          found = true;
        }
      }
    }
    if (!pushed) pipelines.assignments.push(assignment);
  }

  // The other producers pop the assignments, and walk over the same key tiles.
  template <class Visit>
  __device__ __forceinline__ void follow(Visit visit) {
    if (MaskOf<C>::kIntervals) ptx::wait_for_previous_kernel();
    for (;;) {
      const TileAssignment assignment = pipelines.assignments.pop();
      if (assignment.coord.row_tile < 0) return;
      const RowTile<C> row_tile(p, launch, band, assignment);
      auto walk = row_tile.walk();
#pragma unroll 1
      for (int left = row_tile.key_tiles(); left > 0; --left) {
        walk.advance();
        visit(row_tile, walk);
      }
    }
  }
  // One warp loads values, whose stages become free at other times than those of keys.
  __device__ __forceinline__ void run_value_producer() {
    follow([&](const RowTile<C>& row_tile, const auto& walk) { load_v(row_tile, walk.key); });
  }
  // With intervals one warp tells the consumers which keys a tile holds, and what is hidden of them.
  __device__ __forceinline__ void run_mask_producer() {
    if constexpr (MaskOf<C>::kIntervals)
      follow([&](const RowTile<C>& row_tile, const auto& walk) {
        const TileMaskWriter<C> mask(row_tile.intervals, row_tile.m0, row_tile.m1, walk.key, walk.bits.kind());
        pipelines.k.acquire();
        mask.store(pipelines.tile_mask());
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(pipelines.k.full());
        pipelines.k.advance();
      });
  }
};

}  // namespace fagen
