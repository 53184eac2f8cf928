// One sequence of a batch: its rows, its keys, what its rows see, and where its keys lie in the cache.
#pragma once
#include "fagen/abi/decode.h"
#include "fagen/cpu/mask.h"

namespace fagen {

// Lengths are cut to the bounds of the params, whatever the tensors hold. `good`: nothing had to be.
template <class Config>
struct Sequence {
  static constexpr bool kBanded = Config::kMask != decltype(Config::kMask)::none;

  int64_t index, first_row;  // the first of its rows among all rows of q
  int rows, keys;
  int left, right;  // the band, -1: unbounded
  bool good;

  Sequence(const fagen_decode_params& p, int64_t index) : index(index), left(p.window_left), right(p.window_right) {
    const int32_t* starts = p.cu_seqlens_q;
    first_row = starts ? bounded(starts[index], p.rows) : index * p.seqlen_q;
    const int64_t end = starts ? bounded(starts[index + 1], p.rows) : first_row + p.seqlen_q;
    rows = bounded(end - first_row, p.seqlen_q);
    const int32_t length = p.seqlens_k ? p.seqlens_k[index] : p.seqlen_k;
    keys = bounded(length, p.seqlen_k);
    good = keys == length && (!starts || (starts[index] == first_row && starts[index + 1] - first_row == rows));
  }

  static int bounded(int64_t x, int most) { return x < 0 ? 0 : x > most ? most : int(x); }

  // The keys that some rows see: those of each row, from the first one's first to the last one's last.
  Range keys_of(Range some) const {
    if constexpr (!kBanded) return {0, keys};
    const int shift = keys - rows;
    const int begin = left < 0 ? 0 : shift + some.begin - left, end = right < 0 ? keys : shift + some.end + right;
    const Range seen = intersect({0, keys}, {begin, end});
    return seen.empty() ? Range{0, 0} : seen;
  }
  Range keys_of(int row) const { return keys_of({row, row + 1}); }
};

// The keys, or the values, of a sequence and kv head.
template <class Config, class Element>
struct Cache {
  const Element* head;  // page 0
  int64_t page_stride, row_stride;
  const int32_t* pages;  // of the sequence, where the cache is paged
  int32_t page_count;    // of the cache

  Cache(const fagen_decode_params& p, const fagen_tensor& t, int64_t sequence, int kv_head)
      : head(static_cast<const Element*>(t.data) + kv_head * t.stride[2]),
        page_stride(t.stride[0]),
        row_stride(t.stride[1]),
        pages(nullptr),
        page_count(p.pages) {
    if constexpr (Config::kPageSize > 0)
      pages = static_cast<const int32_t*>(p.page_table.data) + sequence * p.page_table.stride[0];
    else
      head += (p.cache_batch_idx ? p.cache_batch_idx[sequence] : sequence) * page_stride;
  }

  // Where some keys lie; the last one once more up to whole vectors of keys. False if a page is none of the cache's.
  bool locate(Range keys, const Element** found) const {
    int at = 0;
    if constexpr (Config::kPageSize > 0) {
      for (int key = keys.begin; key < keys.end;) {
        const int32_t page = pages[key / Config::kPageSize], row = key % Config::kPageSize;
        if (page < 0 || page >= page_count) return false;
        const Element* p = head + page * page_stride + row * row_stride;
        const int rest = Config::kPageSize - row, count = rest < keys.end - key ? rest : keys.end - key;
        for (int i = 0; i < count; ++i, p += row_stride) found[at++] = p;
        key += count;
      }
    } else {
      const Element* p = head + keys.begin * row_stride;
      for (; at < keys.size(); p += row_stride) found[at++] = p;
    }
    for (const Element* last = found[at - 1]; at % kMaxLanes != 0;) found[at++] = last;
    return true;
  }
};

}  // namespace fagen
