// How the work is cut: a piece is some rows of a kv head of a sequence against some of its keys. Where a sequence's
// keys are split, the pieces leave what they found in the workspace, and their sum is made after all of them.
#pragma once
#include "fagen/cpu/decode/rows.h"
#include "fagen/cpu/decode/sequence.h"

namespace fagen {

struct Piece {
  int64_t sequence, index;
  int kv_head, tile, split, splits;
};

// The cut depends on sizes alone, not on the number of threads. With a fixed split it does not depend on other
// sequences either.
template <class Config>
struct Pieces {
  static constexpr int kTileRows = Config::kTileRows, kHeadDimV = Config::kHeadDimV;

  const fagen_decode_params& p;
  int group;
  int64_t* first;     // piece of each sequence, and their number
  int32_t* splits;    // of each sequence
  float* partial;     // o of each piece's rows, then their states
  int64_t size;       // keys of a split

  explicit Pieces(const fagen_decode_params& p) : p(p), group(p.heads / p.kv_heads), size(0) {
    char* const memory = static_cast<char*>(p.workspace);
    first = reinterpret_cast<int64_t*>(memory);
    splits = reinterpret_cast<int32_t*>(memory + table_bytes(sizeof(int64_t)));
    partial = reinterpret_cast<float*>(memory + table_bytes(sizeof(int64_t)) + table_bytes(sizeof(int32_t)));
  }

  // ---- sizes of the workspace, from upper bounds -----------------------------------------------------------------

  uint64_t table_bytes(uint64_t entry) const { return (entry * (uint64_t(p.batch) + 1) + 63) / 64 * 64; }
  int64_t most_tiles() const { return ceil_div(int64_t(p.seqlen_q) * group, kTileRows); }
  int64_t piece_rows() const { return most_tiles() > 1 ? kTileRows : int64_t(p.seqlen_q) * group; }
  int64_t piece_floats() const { return (piece_rows() * (kHeadDimV + 2) + 15) / 16 * 16; }

  // A split begins at a multiple of its size, so that keys in a band may touch one split more than they fill.
  int64_t most_pieces() const {
    const int64_t whole = p.batch * most_tiles() * p.kv_heads;
    if (p.num_splits == 0) return Config::kPieces + 2 * whole;
    if (p.num_splits < 0) return whole * ceil_div(p.seqlen_k, -int64_t(p.num_splits));
    const int64_t tiles = ceil_div(p.seqlen_k, Config::kTileN);  // a split is whole tiles
    return whole * ((p.num_splits < tiles ? p.num_splits : tiles) + 2);
  }
  uint64_t workspace_bytes() const {
    const uint64_t partials = sizeof(float) * uint64_t(most_pieces() * piece_floats());
    return table_bytes(sizeof(int64_t)) + table_bytes(sizeof(int32_t)) + partials;
  }

  // ---- the cut ---------------------------------------------------------------------------------------------------

  int tiles(const Sequence<Config>& s) const { return int(ceil_div(int64_t(s.rows) * group, kTileRows)); }

  static int64_t whole_tiles(int64_t keys) { return ceil_div(keys, Config::kTileN) * Config::kTileN; }

  // False if a length is beyond its bound, or a sequence's place is none of the cache's.
  bool cut() {
    bool good = true;
    int64_t work = 0;
    for (int64_t b = 0; b < p.batch && p.num_splits == 0; ++b) {
      const Sequence<Config> s(p, b);
      work += int64_t(s.keys_of({0, s.rows}).size()) * tiles(s) * p.kv_heads;
    }
    const int64_t fair = whole_tiles(ceil_div(work, Config::kPieces));
    size = p.num_splits < 0 ? -int64_t(p.num_splits) : fair > Config::kLeastKeys ? fair : int64_t(Config::kLeastKeys);
    first[0] = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence<Config> s(p, b);
      splits[b] = splits_of(s);
      good &= s.good && (!p.cache_batch_idx || (p.cache_batch_idx[b] >= 0 && p.cache_batch_idx[b] < p.pages));
      first[b + 1] = first[b] + int64_t(tiles(s)) * splits[b] * p.kv_heads;
    }
    return good;
  }

  // Keys of a split of this sequence.
  int64_t split_keys(const Sequence<Config>& s) const {
    if (p.num_splits <= 0) return size;
    const int64_t keys = s.keys_of({0, s.rows}).size();
    return keys == 0 ? Config::kTileN : whole_tiles(ceil_div(keys, p.num_splits));
  }
  int splits_of(const Sequence<Config>& s) const {
    const Range seen = s.keys_of({0, s.rows});
    const int64_t keys = split_keys(s);
    return seen.empty() ? 1 : int(ceil_div(seen.end, keys) - seen.begin / keys);
  }

  Piece operator[](int64_t index) const {
    int64_t low = 0, high = p.batch;  // the sequence whose first piece is the last one up to `index`
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first[middle] <= index ? low : high) = middle;
    }
    const int64_t rest = index - first[low];
    const int count = splits[low];
    return {low, index, int(rest % p.kv_heads), int(rest / p.kv_heads / count), int(rest / p.kv_heads % count), count};
  }
  // The same rows' piece of another split.
  int64_t sibling(const Piece& piece, int split) const {
    return piece.index + int64_t(split - piece.split) * p.kv_heads;
  }

  Range rows_of(const Sequence<Config>& s, const Piece& piece) const {
    const int64_t begin = int64_t(piece.tile) * kTileRows, end = int64_t(s.rows) * group;
    return {int(begin), int(begin + kTileRows < end ? begin + kTileRows : end)};
  }
  Range keys_of(const Sequence<Config>& s, const Piece& piece, Range rows) const {
    const int64_t keys = split_keys(s), begin = (s.keys_of({0, s.rows}).begin / keys + piece.split) * keys;
    const int64_t end = begin + keys < s.keys ? begin + keys : s.keys;
    const Range seen = s.keys_of({rows.begin / group, (rows.end - 1) / group + 1});
    return intersect(seen, {int(begin < s.keys ? begin : s.keys), int(end)});
  }

  float* o_of(int64_t piece) const { return partial + piece * piece_floats(); }
  RowState* states_of(int64_t piece) const {
    return reinterpret_cast<RowState*>(o_of(piece) + piece_rows() * kHeadDimV);
  }
};

}  // namespace fagen
