// Keys and values from the cache to shared memory: a warp copies its own kWarpKeys keys of each tile.
#pragma once
#include "fagen/sm80/copy.cuh"
#include "fagen/sm80/decode/place.cuh"
#include "fagen/sm80/decode/shape.cuh"

namespace fagen {

// The pages of the keys that a warp copies. Its lanes read the table for several tiles at once, one such read ahead, so
// that no copy waits for the table, and K and V share what was read.
template <class C>
struct PagesAhead {
  static constexpr int kKeys = DecodeShape<C>::kWarpKeys;
  static constexpr int kPageKeys = C::kPageSize < kKeys ? C::kPageSize : kKeys;  // keys of a tile that share an entry
  static constexpr int kEntries = kKeys / kPageKeys;  // of a tile
  static constexpr int kTiles = 32 / kEntries;  // of one read
  static_assert(kKeys % kPageKeys == 0 && kEntries <= 32 && 32 % kEntries == 0, "lanes hold the pages of whole tiles");

  const int32_t* table;
  unsigned last_page;  // of the cache: no entry leads out of it
  int first_key, begin, end;  // the warp's first key of the split; the keys that are there
  int held, ahead;  // this lane's entries

  __device__ __forceinline__ PagesAhead(const fagen_decode_params& p, const DecodeTile<C>& tile, int first_key)
      : table(static_cast<const int32_t*>(p.page_table.data) + tile.batch * p.page_table.stride[0]),
        last_page(p.pages - 1),
        first_key(first_key),
        begin(tile.begin),
        end(tile.end),
        held(0),
        ahead(read(0)) {}

  // This lane's entry from tile `tile` of the split on.
  __device__ __forceinline__ int read(int tile) const {
    const int lane = threadIdx.x % 32;
    const int key = first_key + (tile + lane / kEntries) * C::kTileN + lane % kEntries * kPageKeys;
    return key < end && key + kPageKeys > begin ? min(unsigned(table[unsigned(key) / C::kPageSize]), last_page) : 0;
  }
  // Call for every tile, in order, before its pages are asked for.
  __device__ __forceinline__ void move_to(int tile) {
    if (tile % kTiles == 0) {
      held = ahead;
      ahead = read(tile + kTiles);
    }
  }
  __device__ __forceinline__ int page_of(int tile, int row) const {
    return __shfl_sync(~0u, held, tile % kTiles * kEntries + row / kPageKeys);
  }
};

// Keys follow each other.
template <class C>
struct NoPages {
  __device__ __forceinline__ NoPages(const fagen_decode_params&, const DecodeTile<C>&, int) {}
  __device__ __forceinline__ void move_to(int) {}
  __device__ __forceinline__ int page_of(int, int) const { return 0; }
};
template <class C, bool kPaged = (C::kPageSize > 0)>
struct SelectPages {
  using Type = NoPages<C>;
};
template <class C>
struct SelectPages<C, true> {
  using Type = PagesAhead<C>;
};

// Up to 16 bytes of a row that may start anywhere, Unit by Unit.
template <class Unit>
__device__ __forceinline__ uint4 gather_bytes(const unsigned char* from, int bytes) {
  constexpr int kUnits = 16 / sizeof(Unit);
  union {
    Unit unit[kUnits];
    uint4 all;
  } piece;
  piece.all = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < kUnits; ++i)
    if (i * int(sizeof(Unit)) < bytes) piece.unit[i] = reinterpret_cast<const Unit*>(from)[i];
  return piece.all;
}

// K or V of one kv head, and this lane's part of each copy: a column of 16-byte pieces, and every kRowsAtOnce-th row.
template <class C, class Tile>
struct CacheLane {
  static constexpr int kKeys = DecodeShape<C>::kWarpKeys;
  static constexpr int kItemBytes = DecodeShape<C>::kItemBytes;
  static constexpr int kColumns = Tile::kChunks < 32 ? Tile::kChunks : 32;  // of pieces that a warp copies at once
  static constexpr int kRowsAtOnce = kColumns > 16 ? 1 : kColumns > 8 ? 2 : kColumns > 4 ? 4 : kColumns > 2 ? 8 : 16;
  static constexpr int kPage = C::kPageSize > 0 ? C::kPageSize : 1 << 30;  // keys that follow each other in memory
  static_assert(kRowsAtOnce <= kPage || kPage == 1, "a lane's row of a page is the same in every copy");

  const unsigned char* base;
  int64_t page_stride, row_stride;
  int row_bytes, row, column;

  __device__ __forceinline__ CacheLane(const fagen_tensor& t, int64_t page, int kv_head, int head_dim)
      : page_stride(t.stride[0] * kItemBytes), row_stride(t.stride[1] * kItemBytes), row_bytes(head_dim * kItemBytes) {
    const int lane = threadIdx.x % 32;
    row = lane / kColumns, column = lane % kColumns;
    base = static_cast<const unsigned char*>(t.data) + page * page_stride + kv_head * t.stride[2] * kItemBytes +
           row % kPage * row_stride + column * 16;
  }

  // Start copying the keys from `key` on to rows `first_row` and on of a tile; those outside [begin, end) become 0.
  template <class Pages>
  __device__ __forceinline__ void copy(const Pages& pages, int tile, int key, int begin, int end, uint32_t to,
                                       int first_row) const {
    constexpr bool kOnePage = kPage >= kKeys;
    const unsigned char* first = base;
    if constexpr (kOnePage) {
      const int in_page = C::kPageSize > 0 ? unsigned(key) % kPage : key;
      first += pages.page_of(tile, 0) * page_stride + in_page * row_stride;
    }
    const bool mine = row < kRowsAtOnce;
    const uint32_t lane_offset = Tile::offset(first_row + (mine ? row : 0), column);
#pragma unroll
    for (int across = 0; across < Tile::kChunks; across += kColumns) {
      const int bytes = mine && across + column < Tile::kChunks ? row_bytes - (across + column) * 16 : 0;
      const int rows_end = bytes > 0 ? end - key - row : 0;
#pragma unroll
      for (int down = 0; down < kKeys; down += kRowsAtOnce) {
        const unsigned char* from = first + across * 16;
        if constexpr (kOnePage)
          from += down * row_stride;
        else  // all lanes take part
          from += pages.page_of(tile, down + row % kRowsAtOnce) * page_stride + down % kPage * row_stride;
        bool there = down < rows_end;
        if constexpr (MaskOf<C>::kHasBegin) there &= key + row + down >= begin;
        // rows that are kRowsAtOnce apart: the exchange of columns in a tile changes by a constant
        const uint32_t exchanged = Tile::offset(down, 0) - down * Tile::kPitch;
        const uint32_t at = to + (lane_offset ^ exchanged) + down * Tile::kPitch + across * 16;
        if (!mine || across + column >= Tile::kChunks) continue;
        if constexpr (C::kAligned)
          ptx::cp_async_16(at, from, there);
        else if constexpr (C::kFp8Cache)
          ptx::st_shared_16(at, gather_bytes<uint8_t>(from, there ? bytes : 0));
        else
          ptx::st_shared_16(at, gather_bytes<uint16_t>(from, there ? bytes : 0));
      }
    }
  }
};

template <class C>
struct CacheReader {
  using S = DecodeShape<C>;

  int first_key, begin, end;
  typename SelectPages<C>::Type pages;
  CacheLane<C, typename S::TileK> k;
  CacheLane<C, typename S::TileV> v;

  // `first_tile`: of the split. Keys outside [begin, end) are never read.
  __device__ __forceinline__ CacheReader(const fagen_decode_params& p, const DecodeTile<C>& tile, int first_tile,
                                         int warp)
      : first_key(first_tile * C::kTileN + warp * S::kWarpKeys),
        begin(tile.begin),
        end(tile.end),
        pages(p, tile, first_key),
        k(p.k, row_of(p, tile.batch), tile.kv_head, p.head_dim),
        v(p.v, row_of(p, tile.batch), tile.kv_head, p.head_dim_v) {}

  // A sequence's row of a cache without pages.
  static __device__ __forceinline__ int64_t row_of(const fagen_decode_params& p, int batch) {
    if (C::kPageSize > 0) return 0;
    return p.cache_batch_idx ? min(unsigned(p.cache_batch_idx[batch]), unsigned(p.pages - 1)) : batch;
  }

  // Start copying the warp's keys of tile `tile` of the split; they are rows `row` and on of the stage.
  __device__ __forceinline__ void copy(int tile, uint32_t stage, int row) {
    const int key = first_key + tile * C::kTileN;
    pages.move_to(tile);
    k.copy(pages, tile, key, begin, end, stage, row);
    if constexpr (!C::kSharedKv) v.copy(pages, tile, key, begin, end, stage + S::kValues, row);
  }
};

}  // namespace fagen
