// The warps that feed the others: each walks over the tiles on its own, and loads keys, or values, or tells of them.
// One lane of it talks to the copy engine.
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

  // One tile of `kSlabs` slabs, `kRows` rows each, or this block's part of it, to all that share it.
  template <int kSlabs, int kRows, bool kPacked = false, class Ring>
  __device__ __forceinline__ void load(const CUtensorMap& map, Ring& ring, int row, int head, int batch) const {
    if (threadIdx.x % 32 == 0) {
      ring.acquire();
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
                                                     rows.work.batch);
  }
  __device__ __forceinline__ void load_k(const Rows<C>& rows, int key) {
    load<Shape<C>::kSlabs, C::kTileN>(launch.k, rings.k, key, rows.kv_head, rows.work.batch);
  }
  __device__ __forceinline__ void load_v(const Rows<C>& rows, int key) {
    load<Shape<C>::kSlabsV, C::kTileN>(launch.v, rings.v, key, rows.kv_head, rows.work.batch);
  }

  // The next tile of rows that sees any key; row_tile is -1 if there is none.
  __device__ __forceinline__ Letter find(int next) {
    for (;;) {
      const int index = __shfl_sync(~0u, next, 0);
      if (index >= launch.tiles) return {{-1, 0, 0}, 0, {0, 0, 0, 0}};
      const Letter letter = take<C>(p, launch, index);
      if (Rows<C>(p, launch, band, letter).count() > 0) return letter;
      next = share.next(launch);
    }
  }

  // One warp takes tiles of rows, and loads q and keys. The next is taken and looked for when few keys of the present
  // one are left, so that who is done first gets what is next, and yet while the rings are full. The others hear of the
  // first when its q and first keys are on their way, since values would only delay those.
  __device__ __forceinline__ void run_keys() {
    if (C::kMask == Mask::intervals) ptx::wait_for_previous_kernel();
    Letter letter = find(team<C>());
    bool told = false;
    while (letter.work.row_tile >= 0) {
      const Rows<C> rows(p, launch, band, letter);
      auto tiles = rows.tiles();
      const auto load_next = [&] {
        tiles.advance();
        load_k(rows, tiles.key);
      };
      load_next();
      load_q(rows);
      if (!told) rings.mail.send(letter);
      told = true;
      int left = rows.count() - 1;
#pragma unroll 1
      for (bool found = false; left > 0 || !found;) {
        if (left > 0) load_next(), --left;
        if (!found && left <= kLate) {
          letter = find(share.next(launch));
          rings.mail.send(letter);
          found = true;
        }
      }
    }
    if (!told) rings.mail.send(letter);
  }

  // Others hear of them, and visit the same tiles of keys.
  template <class Visit>
  __device__ __forceinline__ void follow(Visit visit) {
    if (C::kMask == Mask::intervals) ptx::wait_for_previous_kernel();
    for (;;) {
      const Letter letter = rings.mail.receive();
      if (letter.work.row_tile < 0) return;
      const Rows<C> rows(p, launch, band, letter);
      auto tiles = rows.tiles();
#pragma unroll 1
      for (int left = rows.count(); left > 0; --left) {
        tiles.advance();
        visit(rows, tiles);
      }
    }
  }
  // One loads values, whose places become free at other times than those of keys.
  __device__ __forceinline__ void run_values() {
    follow([&](const Rows<C>& rows, const auto& tiles) { load_v(rows, tiles.key); });
  }
  // And with intervals one tells the consumers which keys these are, and what is hidden of them.
  __device__ __forceinline__ void run_telling() {
    if constexpr (C::kMask == Mask::intervals)
      follow([&](const Rows<C>& rows, const auto& tiles) {
        const Telling<C> telling(rows.intervals, rows.m0, rows.m1, tiles.key, tiles.part.kind());
        rings.k.acquire();
        telling.say(rings.told_place());
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(rings.k.full());
        rings.k.advance();
      });
  }
};
