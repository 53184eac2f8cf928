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
  static constexpr int kEntries = kKeys / kPageKeys;                            // of a tile
  static constexpr int kTiles = 32 / kEntries;                                  // of one read
  static_assert(kKeys % kPageKeys == 0 && kEntries <= 32 && 32 % kEntries == 0, "lanes hold the pages of whole tiles");

  const int32_t* table;
  int first_key, begin, end;  // the warp's first key of the split; the keys that are there
  int held, ahead;            // this lane's entries

  __device__ __forceinline__ PagesAhead(const int32_t* table, int first_key, int begin, int end)
      : table(table), first_key(first_key), begin(begin), end(end), held(0), ahead(read(0)) {}

  // This lane's entry from tile `tile` of the split on.
  __device__ __forceinline__ int read(int tile) const {
    const int lane = threadIdx.x % 32;
    const int key = first_key + (tile + lane / kEntries) * C::kTileN + lane % kEntries * kPageKeys;
    return key < end && key + kPageKeys > begin ? table[unsigned(key) / C::kPageSize] : 0;
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
struct NoPages {
  __device__ __forceinline__ NoPages(const int32_t*, int, int, int) {}
  __device__ __forceinline__ void move_to(int) {}
  __device__ __forceinline__ int page_of(int, int) const { return 0; }
};
template <class C, bool kPaged = (C::kPageSize > 0)>
struct SelectPages {
  using Type = NoPages;
};
template <class C>
struct SelectPages<C, true> {
  using Type = PagesAhead<C>;
};

// K or V of one kv head, in bytes.
struct CacheHead {
  const unsigned char* base;
  int64_t page_stride, row_stride;
  int row_bytes;
};

// Up to 16 bytes of rows that may start anywhere, Unit by Unit.
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

template <class C>
struct CacheReader {
  using S = DecodeShape<C>;
  static constexpr int kKeys = S::kWarpKeys;
  static constexpr unsigned kPage = C::kPageSize > 0 ? C::kPageSize : 1;

  CacheHead k, v;
  int first_key, begin, end;
  typename SelectPages<C>::Type pages;

  // `first_tile`: of the split. Keys outside [begin, end) are never read.
  __device__ __forceinline__ CacheReader(const fagen_decode_params& p, const DecodeTile<C>& tile, int first_tile,
                                         int warp)
      : first_key(first_tile * C::kTileN + warp * kKeys),
        begin(tile.begin),
        end(tile.end),
        pages(static_cast<const int32_t*>(p.page_table.data) + tile.batch * p.page_table.stride[0], first_key, begin,
              end) {
    const int64_t row = C::kPageSize > 0 ? 0 : p.cache_batch_idx ? p.cache_batch_idx[tile.batch] : tile.batch;
    k = head(p.k, row, tile.kv_head, p.head_dim);
    v = head(p.v, row, tile.kv_head, p.head_dim_v);
  }
  static __device__ __forceinline__ CacheHead head(const fagen_tensor& t, int64_t page, int kv_head, int columns) {
    const unsigned char* data = static_cast<const unsigned char*>(t.data);
    return {data + (page * t.stride[0] + kv_head * t.stride[2]) * S::kItemBytes, t.stride[0] * S::kItemBytes,
            t.stride[1] * S::kItemBytes, columns * S::kItemBytes};
  }

  // Start copying the warp's keys of tile `tile` of the split; rows of the stage begin at `row`.
  __device__ __forceinline__ void copy(int tile, uint32_t stage, int row) {
    pages.move_to(tile);
    copy_rows<typename S::TileK>(k, tile, stage, row);
    copy_rows<typename S::TileV>(v, tile, stage + S::TileK::kBytes, row);
  }

  template <class Tile>
  __device__ __forceinline__ void copy_rows(const CacheHead& from, int tile, uint32_t to, int first_row) const {
    constexpr int kChunks = Tile::kChunks, kAll = kKeys * kChunks;
    const int lane = threadIdx.x % 32, key = first_key + tile * C::kTileN;
    const int in_page = C::kPageSize >= kKeys ? unsigned(key) % kPage : 0;  // where the page holds the whole tile
#pragma unroll
    for (int first = 0; first < kAll; first += 32) {
      const int row = (first + lane) / kChunks, chunk = (first + lane) % kChunks;
      const int page = pages.page_of(tile, min(row, kKeys - 1));  // all lanes take part
      if (kAll % 32 && row >= kKeys) continue;
      const bool there = key + row < end && key + row >= begin && chunk * 16 < from.row_bytes;
      const int row_of_page = C::kPageSize == 0 ? key + row : C::kPageSize >= kKeys ? in_page + row : row % kPage;
      const int64_t offset = page * from.page_stride + row_of_page * from.row_stride + chunk * 16;
      const unsigned char* source = from.base + (there ? offset : 0);
      const uint32_t at = to + Tile::offset(first_row + row, chunk);
      if constexpr (C::kAligned)
        ptx::cp_async_16(at, source, there);
      else if constexpr (C::kFp8Cache)
        ptx::st_shared_16(at, gather_bytes<uint8_t>(source, there ? from.row_bytes - chunk * 16 : 0));
      else
        ptx::st_shared_16(at, gather_bytes<uint16_t>(source, there ? from.row_bytes - chunk * 16 : 0));
    }
  }
};

}  // namespace fagen
