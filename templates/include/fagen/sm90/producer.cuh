// The warps that feed the others: each walks over the tiles, and one lane of it talks to the copy engine.
#pragma once
#include "fagen/sm90/layout.cuh"
#include "fagen/sm90/rows.cuh"

template <class C>
struct Producer {
  static constexpr int kLate = 2;  // tiles of keys that are left when the next tile of rows is taken

  const fagen_params& p;
  const Launch& launch;
  Rings<C> rings;
  const Band band;
  Share<C> share;

  // One tile of `kSlabs` slabs, `kRows` rows each, or this block's part of it, to all that share it; note() is called
  // when its place is free.
  template <int kSlabs, int kRows, bool kPacked = false, class Ring, class Note>
  __device__ __forceinline__ void load(const CUtensorMap& map, Ring& ring, int row, int head, int batch,
                                       Note note) const {
    if (threadIdx.x % 32 == 0) {
      ring.acquire();
      note();
      ring.announce();
      constexpr int kPart = kRows / Ring::kBlocks;
      const int part = Ring::kBlocks > 1 ? blockIdx.x % Ring::kBlocks * kPart : 0;
      for (int slab = 0; slab < kSlabs; ++slab) {
        const uint32_t to = ring.tile() + (slab * kRows + part) * 128;
        if constexpr (Ring::kBlocks > 1)
          ptx::tma_load_to_all(to, &map, ring.full(), slab * 64, row + part, head, batch, (1 << Ring::kBlocks) - 1);
        else if constexpr (kPacked)
          ptx::tma_load_packed(to, &map, ring.full(), slab * 64, row, head, batch);
        else
          ptx::tma_load(to, &map, ring.full(), slab * 64, row, head, batch);
      }
    }
    ring.advance();
  }
  __device__ __forceinline__ void load_q(const Rows<C>& rows) {
    load<Shape<C>::kSlabs, C::kTileM, C::kPackHeads>(launch.q, rings.q, Packing<C>(launch).row(rows.m0), rows.work.head,
                                                     rows.work.batch, [] {});
  }
  __device__ __forceinline__ void load_v(const Rows<C>& rows, int key) {
    load<Shape<C>::kSlabsV, C::kTileN>(launch.v, rings.v, key, rows.kv_head, rows.work.batch, [] {});
  }
  // The walk's present tile of keys. The consumers are told of it.
  template <class Tiles>
  __device__ __forceinline__ void load_k(const Rows<C>& rows, const Tiles& tiles) {
    const auto load = [&](auto note) {
      this->template load<Shape<C>::kSlabs, C::kTileN>(launch.k, rings.k, tiles.key(), rows.kv_head, rows.work.batch,
                                                       note);
    };
    if constexpr (C::kMask == Mask::intervals) {
      const Telling<C> telling(tiles);
      load([&] { telling.say(rings.told_place()); });
    } else {
      load([] {});
    }
  }

  // The next tile of rows that sees any key; row_tile is -1 if there is none.
  __device__ __forceinline__ Work find(int next) {
    for (;;) {
      const int index = __shfl_sync(~0u, next, 0);
      if (index >= launch.tiles) return {-1, 0, 0};
      const Rows<C> rows(p, launch, band, take<C>(p, launch, index));
      if (rows.see_any()) return rows.work;
      next = share.next(launch);
    }
  }
  __device__ __forceinline__ void tell(const Work& work) {
    const Rows<C> rows(p, launch, band, work);
    rings.mail.send({work, rows.m0, rows.m1, rows.span.cut, rows.span.whole});
  }

  // One warp takes tiles of rows, and loads q and keys. The next is taken and looked for when few keys of the present
  // one are left, so that who is done first gets what is next, and yet while the rings are full. The others hear of the
  // first when its q and first keys are on their way, since values would only delay those.
  __device__ __forceinline__ void run_keys() {
    if (C::kMask == Mask::intervals) ptx::wait_for_previous_kernel();
    Work work = find(team<C>());
    bool told = false;
    while (work.row_tile >= 0) {
      const Rows<C> rows(p, launch, band, work);
      auto tiles = rows.tiles(band);
      bool first = true;
#pragma unroll 1
      for (int left = rows.count() - 1; left >= 0; --left) {
        load_k(rows, tiles);
        tiles.advance();
        if (first) load_q(rows);
        if (!told) tell(work);
        told = true;
        if (left == kLate || (first && left < kLate)) {
          work = find(share.next(launch));
          tell(work);
        }
        first = false;
      }
    }
    if (!told) tell(work);
  }

  // Another hears of them and loads values. They have a warp of their own since their places become free at other
  // times than those of keys.
  __device__ __forceinline__ void run_values() {
    if (C::kMask == Mask::intervals) ptx::wait_for_previous_kernel();
    for (;;) {
      const Letter letter = rings.mail.receive();
      if (letter.work.row_tile < 0) return;
      const Rows<C> rows(p, launch, band, letter.work);
      auto tiles = rows.tiles(band);
#pragma unroll 1
      for (int left = rows.count(); left > 0; --left) {
        load_v(rows, tiles.key());
        tiles.advance();
      }
    }
  }
};
