// Masks: the keys that a range of rows sees, the tiles that are visited, and the arithmetic for partial tiles.
#pragma once
#include "fagen/cpu/simd.h"

namespace fagen {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
  int begin, end;
  bool empty() const { return begin >= end; }
  int size() const { return end - begin; }
};

inline Range intersect(Range a, Range b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

// Row m sees the keys m + first ... m + last.
struct Band {
  int first, last;

  static constexpr int kFar = 1 << 30;
  static constexpr int kLongest = kFar / 2;  // the longest sequence: no sum below overflows

  template <class Params>
  Band(const Params& p, int left, int right) {
    const int shift = p.seqlen_k - p.seqlen_q;
    first = left < 0 || left > kLongest ? -kFar : shift - left;
    last = right < 0 || right > kLongest ? kFar : shift + right;
  }
  Range seen_by_any(Range rows) const { return {rows.begin + first, rows.end + last}; }
  Range seen_by_all(Range rows) const { return {rows.end - 1 + first, rows.begin + last + 1}; }
  Range rows_that_see(Range keys) const { return {keys.begin - last, keys.end - first}; }

  // The keys from `key` on that these rows see alike: all rows see them, or the same vectors of rows see some of them.
  Range piece(int key, Range rows) const {
    const Range whole = seen_by_all(rows);
    if (whole.begin <= key && key < whole.end) return {key, whole.end};
    const bool at_left = key < whole.begin;
    const int edge = at_left ? rows.begin + first : rows.begin + last + 1;
    const int end = key + kLanes - (key - edge) % kLanes;
    return {key, at_left && !whole.empty() && whole.begin < end ? whole.begin : end};
  }
  ivec sees(ivec row, int key) const { return (key - row >= first) & (key - row <= last); }
};

// The rows that a key is hidden from: [lts, lte) and [uts, ute). A bound that a kind of intervals lacks is filled in.
struct Hidden {
  int lts, lte, uts, ute;
};

// The least and greatest of each over a tile of keys.
struct HiddenBounds {
  Hidden least, greatest;

  bool hides_all(Range rows) const {
    return (rows.begin >= greatest.lts && rows.end <= least.lte) ||
           (rows.begin >= greatest.uts && rows.end <= least.ute);
  }
  bool hides_any(Range rows) const {
    return (rows.begin < greatest.lte && rows.end > least.lts) || (rows.begin < greatest.ute && rows.end > least.uts);
  }
  void include(Hidden h) {
    const auto lower = [](int& a, int b) { a = b < a ? b : a; };
    const auto raise = [](int& a, int b) { a = b > a ? b : a; };
    lower(least.lts, h.lts), lower(least.lte, h.lte), lower(least.uts, h.uts), lower(least.ute, h.ute);
    raise(greatest.lts, h.lts), raise(greatest.lte, h.lte), raise(greatest.uts, h.uts), raise(greatest.ute, h.ute);
  }
};

// The interval columns of one batch and mask head.
template <class Config>
struct Intervals {
  const int32_t* columns;
  int64_t stride;

  Hidden operator[](int key) const {
    const int32_t* c = columns + key * stride;
    const auto column = [c](int index, int absent) { return index < 0 ? absent : c[index]; };
    const int lte = column(Config::kLTE, INT32_MAX), ute = column(Config::kUTE, INT32_MIN);
    return {column(Config::kLTS, INT32_MAX), lte, column(Config::kUTS, INT32_MIN), ute};
  }
  HiddenBounds bounds(Range keys) const {
    HiddenBounds all{(*this)[keys.begin], (*this)[keys.begin]};
    for (int key = keys.begin + 1; key < keys.end; ++key) all.include((*this)[key]);
    return all;
  }
  ivec sees(ivec row, int key) const {
    const Hidden h = (*this)[key];
    return ~(((row >= h.lts) & (row < h.lte)) | ((row >= h.uts) & (row < h.ute)));
  }
};

}  // namespace fagen
