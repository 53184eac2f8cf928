// The warp that feeds the others: it walks over the tiles, and one lane of it talks to the copy engine.
#pragma once
#include "fagen/sm90/layout.cuh"
#include "fagen/sm90/rows.cuh"

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
  __device__ __forceinline__ void load_v(int key, int kv_head, int batch) {
    load<Shape<C>::kSlabsV, C::kTileN>(launch.v, rings.v, key, kv_head, batch, [] {});
  }
  // The walk's present tile, whose first key is returned; the walk goes on.
  template <class Tiles>
  __device__ __forceinline__ int load_k(const Rows<C>& rows, Tiles& tiles) {
    const int key = tiles.key();
    const auto load = [&](auto note) {
      this->template load<Shape<C>::kSlabs, C::kTileN>(launch.k, rings.k, key, rows.kv_head, rows.work.batch, note);
    };
    if constexpr (C::kMask == Mask::intervals) {
      const Telling<C> telling(tiles);
      load([&] { telling.say(rings.told_place()); });
    } else {
      load([] {});
    }
    tiles.advance();
    return key;
  }

  // The next tile of rows that sees any key; row_tile is -1 if there is none. The consumers are told.
  __device__ __forceinline__ Work find(int next) {
    for (;;) {
      const int index = __shfl_sync(~0u, next, 0);
      Letter letter = {{-1, 0, 0}, 0, 0, 0, 0};
      bool found = true;
      if (index < launch.tiles) {
        const Rows<C> rows(p, launch, band, take<C>(p, launch, index));
        letter = {rows.work, rows.m0, rows.m1, rows.span.cut, rows.span.whole};
        found = rows.see_any();
      }
      if (found) {
        rings.mail.send(letter);
        return letter.work;
      }
      next = share.next(launch);
    }
  }

  // Keys run one tile ahead of values, as they are needed, from one tile of rows to the next as well. That one is
  // looked for, and its first tile of keys, while the rings are full.
  __device__ __forceinline__ void run() {
    if (C::kMask == Mask::intervals) ptx::wait_for_previous_kernel();
    Work work = find(blockIdx.x);
    if (work.row_tile < 0) return;
    Rows<C> rows(p, launch, band, work);
    auto tiles = rows.tiles(band);
    int key = -1, kv_head = 0, batch = 0;  // of the keys whose values are next
    const auto step = [&] {
      const int more = load_k(rows, tiles);
      if (key >= 0) load_v(key, kv_head, batch);
      key = more, kv_head = rows.kv_head, batch = rows.work.batch;
    };
    for (;;) {
      const int next = share.next(launch);
      step();
      load_q(rows);
      if (tiles.valid()) step();
      work = find(next);
      const Rows<C> next_rows(p, launch, band, work);
      const auto next_tiles = next_rows.tiles(band);
      while (tiles.valid()) step();
      if (work.row_tile < 0) break;
      rows = next_rows, tiles = next_tiles;
    }
    load_v(key, kv_head, batch);
  }
};
