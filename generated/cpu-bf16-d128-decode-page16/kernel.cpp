// A kernel for attention decode, made by fagen. It needs a C++17 compiler and nothing else: no torch, no Python.
//
// problem:  decode/bf16/d128/none/page16, its config chosen for b4/h32-8/q1-k1024
// config:   tile_n=64 tile_rows=32 block_rows=4 packing=direct prefetch=True pieces=32 least_keys=256 (the family's default)
// made by:  fagen emit --target cpu --op decode --dtype bf16 --head-dim 128 --mask none --seqlen-q=1 --seqlen-k=1024 --batch 4 --heads 32 --kv-heads 8 --page 16 --family cpu_decode --config '{"block_rows": 4, "least_keys": 256, "packing": "direct", "pieces": 32, "prefetch": true, "tile_n": 64, "tile_rows": 32}' --out DIR
// build:    g++ -std=c++17 -O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -fno-exceptions -shared -fPIC -o kernel.so kernel.cpp
// call:     fagen_launch(), declared in kernel.h beside this file

// cpu_decode: attention decode for decode/bf16/d128/none/page16 on cpu
//
// Symbols: m rows of q, n keys; S = scale * Q K^T the scores, P = exp(S - max) the weights, O = P V / sum P.
// Names: kCamel is known at compile time, snake_case at run time; *_log2 lives in the base-2 logarithm.
//
// Config: tile_n=64 tile_rows=32 block_rows=4 packing=direct prefetch=True pieces=32 least_keys=256

namespace fagen {

enum class Mask { none, causal, window, intervals };
enum class Packing { direct, tile };

struct Config {
  static constexpr int kHeadDim = 128;  // of q and k, padded
  static constexpr int kHeadDimV = 128;  // of v and o, padded
  static constexpr Mask kMask = Mask::none;  // which cells are visible
  static constexpr bool kSoftcap = false;  // s -> softcap * tanh(s / softcap)
  static constexpr bool kSinks = false;  // each head has a logit without a value
  static constexpr bool kAligned = true;  // rows are whole, aligned 16-byte pieces
  static constexpr bool kFp8Cache = false;  // k and v are e4m3, else of the dtype of q
  static constexpr int kPageSize = 16;  // rows of a page, 0: the cache is not paged
  static constexpr bool kSharedKv = false;  // v is the first columns of k
  static constexpr int kTileN = 64;  // keys of a tile
  static constexpr int kTileRows = 32;  // rows of q, of all heads of a group, that share a tile of keys
  static constexpr int kBlockRows = 4;  // rows of a register block
  static constexpr Packing kPacking = Packing::direct;  // k and v as float32 in scratch, once a tile
  static constexpr bool kPrefetch = true;  // a tile's values are fetched while its scores are computed
  static constexpr int kPieces = 32;  // pieces of work of a call, about
  static constexpr int kLeastKeys = 256;  // keys of a split, at least
};

// Sizes that fagen derived from the config before compiling; the kernel asserts that it agrees.
struct Derived {
  static constexpr int scratch_bytes = 108800;
};

}  // namespace fagen

using namespace fagen;  // the kernel is this one file

#include <string.h>

#include <atomic>
#include <type_traits>

// ---- fagen/cpu/decode/pieces.h ---------------------------------------------------------------------------
// How the work is cut: a piece is some rows of a kv head of a sequence against some of its keys. Where a sequence's
// keys are split, the pieces leave what they found in the workspace, and their sum is made after all of them.
// ---- fagen/cpu/decode/rows.h -----------------------------------------------------------------------------
// The online softmax of rows whose keys lie along lanes, and the state of a row: sums of exp(score - max).
// ---- fagen/cpu/math.h ------------------------------------------------------------------------------------
// Vector functions that the softmax needs, to about one unit in the last place.
#include <float.h>
#include <math.h>

// ---- fagen/cpu/simd.h ------------------------------------------------------------------------------------
// Vectors as wide as the machine compiled for. GCC/Clang vector extensions, so one source serves every ISA.
#include <stdint.h>

namespace fagen {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kMaxLanes = 16;  // buffers are sized for the widest, so that their sizes do not depend on the machine

typedef float vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t ivec __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef vec any_vec __attribute__((aligned(4), may_alias));  // in memory at any float's address

#define FAGEN_INLINE inline __attribute__((always_inline))

FAGEN_INLINE vec load(const float* p) { return *reinterpret_cast<const any_vec*>(p); }
// Into a register to stay: GCC else repeats the load in each of up to four instructions that use it.
FAGEN_INLINE vec load_once(const float* p) { return *reinterpret_cast<const volatile any_vec*>(p); }
FAGEN_INLINE void store(float* p, vec x) { *reinterpret_cast<any_vec*>(p) = x; }
FAGEN_INLINE vec broadcast(float x) { return x - vec{}; }
FAGEN_INLINE ivec broadcast(int32_t x) { return x - ivec{}; }

// The larger; y if one of them is NaN.
FAGEN_INLINE vec max(vec x, vec y) { return x > y ? x : y; }

FAGEN_INLINE bool any(ivec mask) {
  int32_t bits = 0;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) bits |= mask[i];
  return bits != 0;
}

FAGEN_INLINE ivec lane_index() {
  ivec lane{};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane;
}

// Columns become rows. Interleaving the two halves of the rows log2(kLanes) times moves every element home.
FAGEN_INLINE void transpose(vec (&x)[kLanes]) {
  const ivec lane = lane_index();
  const ivec low = lane / 2 + lane % 2 * kLanes, high = low + kLanes / 2;
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
    vec y[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = __builtin_shuffle(x[i], x[i + kLanes / 2], low);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
}

}  // namespace fagen

namespace fagen {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct Exp2Parts {
  vec power;   // 2^n, n the integer nearest to the exponent y
  vec excess;  // 2^(y - n) - 1
};

// For y = x * factor in [-127, 127]. The product is never rounded. 2^-127 comes out as 0.
FAGEN_INLINE Exp2Parts exp2_parts(vec x, float factor) {
  constexpr float kRound = 0x1.8p23f + 127;  // adding it leaves n + 127 in the low bits: the exponent of 2^n
  const vec shifted = x * factor + kRound;
  const vec f = x * factor - (shifted - kRound);
  // minimax fit of (2^f - 1) / f on [-0.5, 0.5]; relative error of 2^f 2.0e-9
  vec p = f * 0x1.41fbbcp-13f + 0x1.5f3e52p-10f;
  p = p * f + 0x1.3b2d4cp-7f;
  p = p * f + 0x1.c6aee8p-5f;
  p = p * f + 0x1.ebfbdcp-3f;
  p = p * f + 0x1.62e430p-1f;
  return {(vec)((ivec)shifted << 23), p * f};
}

// 2^(factor * x), 0 where the exponent is below -127 (so for -inf); it must not be above 127. A NaN stays one.
struct ScaledExp2 {
  float factor, lowest;

  explicit ScaledExp2(float factor) : factor(factor), lowest(fmaxf(-127.0f / factor, -FLT_MAX)) {}

  FAGEN_INLINE vec operator()(vec x) const {
    const Exp2Parts e = exp2_parts(max(broadcast(lowest), x), factor);
    return e.power + e.power * e.excess;
  }
};

// (e^2x - 1) / (e^2x + 1), from e^2x - 1 so that nothing cancels near 0.
FAGEN_INLINE vec tanh(vec x) {
  const vec bounded = -max(broadcast(-20.0f), -max(broadcast(-20.0f), x));
  const Exp2Parts e = exp2_parts(bounded, 2 * kLog2E);
  const vec m = (e.power - 1.0f) + e.power * e.excess;
  return m / (m + 2.0f);
}

}  // namespace fagen

namespace fagen {

FAGEN_INLINE float lane_max(vec x) {
  float found = x[0];
#pragma GCC unroll 16
  for (int i = 1; i < kLanes; ++i) found = x[i] > found ? x[i] : found;
  return found;
}

FAGEN_INLINE float lane_sum(vec x) {
  float found = x[0];
#pragma GCC unroll 16
  for (int i = 1; i < kLanes; ++i) found += x[i];
  return found;
}

// The state of a row: o is the sum of weight * v over the keys seen so far, and a weight is exp(score - max).
struct RowState {
  float max, sum;
};

template <int kHeadDimV>
inline void scale_row(float* o, float by) {
  for (int d = 0; d < kHeadDimV; d += kLanes) store(o + d, load(o + d) * by);
}

// Scores of whole vectors of keys become weights, in place. A row that sees none of them keeps its state.
template <int kHeadDimV>
inline void soften(float* scores, int keys, RowState& row, float* o) {
  vec top = load(scores);
  for (int key = kLanes; key < keys; key += kLanes) top = max(load(scores + key), top);
  const float most = lane_max(top);
  if (most > row.max) {
    const float shrink = expf(row.max - most);  // 0 for the first keys that it sees
    if (row.sum != 0) scale_row<kHeadDimV>(o, shrink);
    row = {most, row.sum * shrink};
  }
  const float base = row.max == -INFINITY ? 0.0f : row.max;
  const ScaledExp2 exp2(kLog2E);
  vec sum{};
  for (int key = 0; key < keys; key += kLanes) {
    const vec weight = exp2(load(scores + key) - base);
    store(scores + key, weight);
    sum += weight;
  }
  row.sum += lane_sum(sum);
}

// Another part's keys join a row's. Either may have seen nothing.
template <int kHeadDimV>
inline void join(RowState& row, float* o, const RowState& part, const float* of_part) {
  if (part.sum == 0) return;
  const float most = fmaxf(row.max, part.max);
  const float mine = row.sum == 0 ? 0.0f : expf(row.max - most), theirs = expf(part.max - most);
  for (int d = 0; d < kHeadDimV; d += kLanes) store(o + d, load(o + d) * mine + load(of_part + d) * theirs);
  row = {most, row.sum * mine + part.sum * theirs};
}

// A logit that has no value joins. Returns what o has to be multiplied by.
inline float join_sink(RowState& row, float sink) {
  if (sink == -INFINITY) return 1.0f;
  const float most = fmaxf(row.max, sink), mine = row.sum == 0 ? 0.0f : expf(row.max - most);
  row = {most, row.sum * mine + expf(sink - most)};
  return mine;
}

}  // namespace fagen

// ---- fagen/cpu/decode/sequence.h -------------------------------------------------------------------------
// One sequence of a batch: its rows, its keys, what its rows see, and where its keys lie in the cache.
// ---- fagen/abi/decode.h ----------------------------------------------------------------------------------
// The arguments of a decode kernel: few query rows a sequence on a cache of keys. Plain C; no torch, no CUDA header.
// ---- fagen/abi/tensor.h ----------------------------------------------------------------------------------
// A tensor that a kernel reads or writes, as every op passes it. Plain C; no torch, no CUDA header.
#include <stdint.h>

typedef struct fagen_tensor {
  void* data;         // null if the call has none
  int64_t stride[3];  // in elements; the op says of which dimensions. The last dimension is contiguous.
} fagen_tensor;

// Row i of a sequence with n rows and m keys stands at key m - n + i. Lengths are read where the kernel runs; those on
// the host are upper bounds. What lies in the cache behind a sequence's keys, and entries of the page table behind its
// pages, may hold anything: NaN, and no page at all. With cu_seqlens_q the rows of all sequences lie one behind the
// other: q is (rows, heads, head_dim), its batch stride unused, o is like it, the LSE (heads, rows).
//
// The LSE of a row that sees nothing is its sink, or -inf. num_splits = -n: n keys a block, counted from key 0,
// whatever the sizes are, so that a sequence's result does not depend on the others.
typedef struct fagen_decode_params {
  fagen_tensor q;           // (batch, seqlen_q, heads, head_dim); strides: batch, row, head
  fagen_tensor k;           // cache (pages, page_size, kv_heads, head_dim); strides: page, row, head
  fagen_tensor v;           // cache (pages, page_size, kv_heads, head_dim_v)
  fagen_tensor o;           // like q, with head_dim_v; written
  fagen_tensor page_table;  // int32 (batch, pages of a sequence); stride: batch; null where the cache is not paged
  fagen_tensor k_scale;     // float (batch, kv_heads): multiplies an fp8 cache; strides: batch, kv head; null: 1
  fagen_tensor v_scale;
  const int32_t* seqlens_k;        // (batch): keys of each sequence
  const int32_t* cu_seqlens_q;     // (batch + 1): first row of each sequence; null: seqlen_q rows each
  const int32_t* cache_batch_idx;  // (batch): a sequence's page where the cache is not paged; null: its own index
  const float* sinks;              // (heads): a logit that takes weight and has no value; null: none
  float* lse;                      // (batch, heads, seqlen_q) contiguous, natural log; null if not wanted
  void* workspace;                 // fagen_workspace_bytes() bytes, 256-byte aligned; null if that is 0
  int32_t batch, heads, kv_heads;
  int32_t rows;                       // of q in all
  int32_t seqlen_q, seqlen_k;         // most rows and most keys of a sequence
  int32_t pages, page_size;           // of the cache; rows of a page
  int32_t head_dim, head_dim_v;       // as the caller has them; the kernel works on padded sizes
  int32_t window_left, window_right;  // the band around each sequence's bottom-right aligned diagonal; -1: unbounded
  int32_t num_splits;                 // blocks that share a sequence's keys; 0: chosen by the sizes here
  float scale;                        // multiplies q.k before the softmax
  float softcap;                      // s -> softcap * tanh(s / softcap); 0: off
} fagen_decode_params;

// ---- fagen/cpu/mask.h ------------------------------------------------------------------------------------
// Masks: the keys that a range of rows sees, the tiles that are visited, and the arithmetic for partial tiles.

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

// ---- fagen/cpu/decode/products.h -------------------------------------------------------------------------
// Both products of decode. Columns of head_dim lie along the lanes, so that each element of the cache is loaded, and
// converted, once for a few rows of q; rows and keys are blocked in registers.
// ---- fagen/cpu/element.h ---------------------------------------------------------------------------------
// Input and output elements: float, bfloat16 and IEEE half, converted by bit arithmetic that every machine has.
#include <string.h>


namespace fagen {

struct bfloat_t {
  uint16_t bits;
};
struct half_t {
  uint16_t bits;
};

typedef uint16_t hvec __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef hvec any_hvec __attribute__((aligned(2), may_alias));
typedef uint32_t uvec __attribute__((vector_size(kLanes * sizeof(uint32_t))));

FAGEN_INLINE uvec load_bits(const void* p) { return __builtin_convertvector(*static_cast<const any_hvec*>(p), uvec); }

FAGEN_INLINE vec load(const bfloat_t* p) { return (vec)(load_bits(p) << 16); }

FAGEN_INLINE vec load(const half_t* p) {
  const uvec h = load_bits(p);
  const uvec sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
  const vec finite = (vec)magnitude * 0x1p112f;  // moves the exponent's bias, subnormals included
  const uvec special = magnitude | 0x7f800000u;  // infinities and NaN
  return (vec)(sign | (magnitude >= 0x0f800000u ? special : (uvec)finite));
}

FAGEN_INLINE void store_bits(void* p, uvec bits) { *static_cast<any_hvec*>(p) = __builtin_convertvector(bits, hvec); }

// Round to nearest even; a NaN stays one.
FAGEN_INLINE void store(bfloat_t* p, vec x) {
  const uvec bits = (uvec)x;
  const uvec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uvec quiet = (bits >> 16) | 0x40u;
  store_bits(p, (uvec)(x == x ? (ivec)rounded : (ivec)quiet));
}

FAGEN_INLINE void store(half_t* p, vec x) {
  const uvec bits = (uvec)x, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uvec normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const uvec subnormal = (uvec)((vec)magnitude + 0.5f) - 0x3f000000u;  // the addition rounds at 2^-24
  uvec half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? uvec{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? uvec{} + 0x7e00u : half;
  store_bits(p, sign | half);
}

// `count` < kLanes elements; the other lanes are 0.
template <class Element>
FAGEN_INLINE vec load_some(const Element* p, int count) {
  Element all[kLanes] = {};
  memcpy(all, p, count * sizeof(Element));
  return load(all);
}

template <class Element>
FAGEN_INLINE void store_some(Element* p, vec x, int count) {
  Element all[kLanes];
  store(all, x);
  memcpy(p, all, count * sizeof(Element));
}

}  // namespace fagen

namespace fagen {

// Vectors of a row that are loaded together. Two of bfloat16 are pairs of a word: even columns by a shift, odd ones by
// a mask. So they lie in q and o of the scratch as well; `interleave` puts them in order again.
template <class Element>
struct Together {
  static constexpr int kVectors = 1;
  static FAGEN_INLINE void read(const Element* p, vec (&x)[1]) { x[0] = load(p); }
};
struct BfloatPairs {
  static constexpr int kVectors = 2;
  static FAGEN_INLINE void read(const bfloat_t* p, vec (&x)[2]) {
    const uvec words = (uvec)load(reinterpret_cast<const float*>(p));
    x[0] = (vec)(words << 16), x[1] = (vec)(words & 0xffff0000u);
  }
};

// Even and odd columns of two vectors, and back.
FAGEN_INLINE void deinterleave(vec& a, vec& b) {
  const ivec even = lane_index() * 2;
  const vec first = __builtin_shuffle(a, b, even), second = __builtin_shuffle(a, b, even + 1);
  a = first, b = second;
}
FAGEN_INLINE void interleave(vec& even, vec& odd) {
  const ivec lane = lane_index(), low = lane / 2 + lane % 2 * kLanes;
  const vec first = __builtin_shuffle(even, odd, low), second = __builtin_shuffle(even, odd, low + kLanes / 2);
  even = first, odd = second;
}

// Lane i: the sum of all lanes of x[i].
FAGEN_INLINE vec lane_sums(vec (&x)[kLanes]) {
  const ivec lane = lane_index();
#pragma GCC unroll 4
  for (int half = kLanes / 2; half >= 1; half /= 2) {
    const ivec odd = (lane & half) != 0;
    const ivec own = odd ? lane + kLanes : lane, other = odd ? lane + (kLanes - half) : lane + half;
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      x[i] = __builtin_shuffle(x[i], x[i + half], own) + __builtin_shuffle(x[i], x[i + half], other);
  }
  return x[0];
}

// Products of kRows rows of q with kLanes / kRows keys.
template <class Loader, int kRows, int kHeadDim, int kPitch, class Element>
FAGEN_INLINE void score_block(const float* q, const Element* const* k, float* scores) {
  constexpr int kKeys = kLanes / kRows;
  vec sum[kLanes] = {};  // [row][key]
#pragma GCC unroll 1
  for (int d = 0; d < kHeadDim; d += Loader::kVectors * kLanes) {
#pragma GCC unroll 16
    for (int key = 0; key < kKeys; ++key) {
      vec x[Loader::kVectors];
      Loader::read(k[key] + d, x);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int i = 0; i < Loader::kVectors; ++i)
          sum[r * kKeys + key] += x[i] * load(q + r * kHeadDim + d + i * kLanes);
    }
  }
  const vec total = lane_sums(sum);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) __builtin_memcpy(scores + r * kPitch, (const float*)&total + r * kKeys, 4 * kKeys);
}

// scores[row][key] = q[row] . k[key], as many blocks of kRows rows as fit, then smaller ones. Keys come in whole
// vectors. Not inlined: registers are dealt out per function.
template <class Loader, int kRows, int kHeadDim, int kPitch, class Element>
__attribute__((noinline)) void score_product(const float* q, int rows, const Element* const* k, int keys,
                                             float* scores) {
  for (; rows >= kRows; rows -= kRows, q += kRows * kHeadDim, scores += kRows * kPitch)
    for (int key = 0; key < keys; key += kLanes / kRows)
      score_block<Loader, kRows, kHeadDim, kPitch>(q, k + key, scores + key);
  if constexpr (kRows > 1)
    if (rows > 0) score_product<Loader, kRows / 2, kHeadDim, kPitch>(q, rows, k, keys, scores);
}

// Columns of o from `column` on, kVectors of them, of kRows rows.
template <class Loader, int kRows, int kVectors, int kHeadDimV, int kPitch, class Element>
FAGEN_INLINE void output_block(const float* weights, const Element* const* v, int keys, int column, float* o) {
  vec sum[kRows][kVectors] = {};
#pragma GCC unroll 1
  for (int key = 0; key < keys; ++key) {
    const Element* from = v[key] + column;
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i += Loader::kVectors) {
      vec x[Loader::kVectors];
      Loader::read(from + i * kLanes, x);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < Loader::kVectors; ++j) sum[r][i + j] += weights[r * kPitch + key] * x[j];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {  // o is added last: many short sums round less than a long one
      float* const at = o + r * kHeadDimV + column + i * kLanes;
      store(at, load(at) + sum[r][i]);
    }
}

// As many blocks of kVectors as fit into the columns that are left, then smaller ones.
template <class Loader, int kRows, int kVectors, int kHeadDimV, int kPitch, class Element>
FAGEN_INLINE void output_rows(const float* weights, const Element* const* v, int keys, int column, float* o) {
  for (; column + kVectors * kLanes <= kHeadDimV; column += kVectors * kLanes)
    output_block<Loader, kRows, kVectors, kHeadDimV, kPitch>(weights, v, keys, column, o);
  if constexpr (kVectors > Loader::kVectors && kHeadDimV / kLanes % kVectors != 0)
    output_rows<Loader, kRows, kVectors / 2, kHeadDimV, kPitch>(weights, v, keys, column, o);
}

// o[row] += sum over key of weights[row][key] * v[key]
template <class Loader, int kRows, int kHeadDimV, int kPitch, class Element>
__attribute__((noinline)) void output_product(const float* weights, int rows, const Element* const* v, int keys,
                                              float* o) {
  constexpr int kVectors = (kLanes > 8 ? 16 : 8) / kRows;  // half of the registers are sums
  for (; rows >= kRows; rows -= kRows, weights += kRows * kPitch, o += kRows * kHeadDimV)
    output_rows<Loader, kRows, kVectors, kHeadDimV, kPitch>(weights, v, keys, 0, o);
  if constexpr (kRows > 1)
    if (rows > 0) output_product<Loader, kRows / 2, kHeadDimV, kPitch>(weights, rows, v, keys, o);
}

}  // namespace fagen

// ---- fagen/cpu/fp8.h -------------------------------------------------------------------------------------
// Elements of a cache in fp8 e4m3: 4 bits of exponent, 3 of mantissa, no infinity.

namespace fagen {

struct fp8_t {
  uint8_t bits;
};

// Bytes in the upper eight bits of lanes: words of four bytes, each in four lanes, shifted. Compilers widen bytes
// worse.
FAGEN_INLINE uvec load_bytes(const fp8_t* p) {
  const ivec lane = lane_index();
  uvec words{};
#pragma GCC unroll 4
  for (int word = 0; word < kLanes / 4; ++word) {
    uint32_t four;
    memcpy(&four, p + 4 * word, sizeof(four));
    words = lane / 4 == word ? uvec{} + four : words;
  }
  return words << (uvec)(24 - lane % 4 * 8);
}

FAGEN_INLINE vec load(const fp8_t* p) {
  const uvec x = load_bytes(p);
  const uvec sign = x & 0x80000000u, magnitude = x >> 24 & 0x7fu;
  const uvec normal = (x >> 4 & 0x7f00000u) + 0x3c000000u;  // moves the exponent's bias
  // an exponent of 0 has no implicit one: the float with it, minus 2^-6. No float here is subnormal, which is slow.
  const uvec subnormal = (uvec)((vec)(normal + 0x800000u) - 0x1p-6f);
  const uvec finite = magnitude < 8u ? subnormal : normal;
  return (vec)(sign | (magnitude == 0x7fu ? uvec{} + 0x7fc00000u : finite));
}

}  // namespace fagen

// ---- fagen/cpu/pack.h ------------------------------------------------------------------------------------
// Between memory and tiles: squares of rows, keys and values made contiguous floats.

namespace fagen {

// `count` <= kLanes rows from p, columns d ... d + kLanes - 1; what lies outside is 0.
template <class Element>
FAGEN_INLINE void load_square(vec (&x)[kLanes], const Element* p, int64_t stride, int count, int columns) {
  for (int i = 0; i < kLanes; ++i)
    x[i] = i >= count ? vec{} : columns >= kLanes ? load(p + i * stride) : load_some(p + i * stride, columns);
}

// The rows back to memory, of them `count` and of each `columns`, where the square has more.
template <class Element>
FAGEN_INLINE void store_square(Element* p, int64_t stride, const vec (&x)[kLanes], int count, int columns) {
  for (int i = 0; i < kLanes && i < count; ++i)
    columns >= kLanes ? store(p + i * stride, x[i]) : store_some(p + i * stride, x[i], columns);
}

// Rows of keys or values, as floats.
struct Tile {
  const float* data;
  int64_t stride;

  Tile from(int row) const { return {data + row * stride, stride}; }
};

template <class Element>
inline Tile pack(float* to, int64_t to_stride, const Element* from, int64_t stride, int rows, int columns) {
  for (int row = 0; row < rows; ++row) {
    const Element* p = from + row * stride;
    float* q = to + row * to_stride;
    int d = 0;
    for (; d + kLanes <= columns; d += kLanes) store(q + d, load(p + d));
    if (d < columns) store(q + d, load_some(p + d, columns - d));
  }
  return {to, to_stride};
}

}  // namespace fagen

// ---- fagen/cpu/threads.h ---------------------------------------------------------------------------------
// Work shared by the threads, one item at a time.
#include <omp.h>
#include <stdint.h>

namespace fagen {

template <bool kBlocked, class Body>
void share(int64_t items, Body body) {
  if constexpr (kBlocked) {
#pragma omp parallel for schedule(static)
    for (int64_t item = 0; item < items; ++item) body(item);
  } else {
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) body(item);
  }
}

}  // namespace fagen

using element = bfloat_t;
using Cached = bfloat_t;
using Setup = Config;

enum Error { kOk, kNullPointer, kBadSizes, kBadHeadDim, kBadPage, kNoWorkspace, kBadLengths, kBadIndex };

using Rows = Sequence<Setup>;
using AllPieces = Pieces<Setup>;

constexpr int kHeadDim = Setup::kHeadDim, kHeadDimV = Setup::kHeadDimV, kPageSize = Setup::kPageSize;
constexpr int kTileRows = Setup::kTileRows, kTileN = Setup::kTileN;
constexpr bool kPacked = Setup::kPacking == Packing::tile;
// pairs of bfloat16, where rows are whole pairs of vectors
constexpr bool kPairs = std::is_same_v<Cached, bfloat_t> && !kPacked && kHeadDim % (2 * kLanes) == 0 &&
                        kHeadDimV % (2 * kLanes) == 0;
using InPlace = std::conditional_t<kPairs, BfloatPairs, Together<Cached>>;

static_assert(kTileN % kMaxLanes == 0, "a tile is whole vectors of keys on every machine");
static_assert(kHeadDim % kMaxLanes == 0 && kHeadDimV % kMaxLanes == 0, "rows are padded to whole vectors");

// A thread's own memory, on its stack.
struct Scratch {
  alignas(64) float q[kTileRows][kHeadDim];
  float o[kTileRows][kHeadDimV];
  float scores[kTileRows][kTileN];
  float keys[kTileN][kHeadDim], values[kTileN][kHeadDimV];  // packed
  RowState rows[kTileRows];
  const Cached *k[kTileN], *v[kTileN];
  const float *packed_k[kTileN], *packed_v[kTileN];
};
static_assert(sizeof(Scratch) == Derived::scratch_bytes, "fagen derived another scratch");

// ---- One tile of keys -----------------------------------------------------------------------------------------------

// From q.k to the score of a key that a row may see.
struct Finish {
  float inner, softcap;  // product to the score, or to the argument of softcap

  Finish(const fagen_decode_params& p, float k_scale)
      : inner(p.scale * k_scale / (Setup::kSoftcap ? p.softcap : 1.0f)), softcap(p.softcap) {}

  FAGEN_INLINE vec operator()(vec x) const {
    if constexpr (Setup::kSoftcap) return softcap * tanh(x * inner);
    return x * inner;
  }
};

// Scores of whole vectors of keys; those outside of `seen` become -inf.
static void finish(float* scores, int keys, Range seen, Finish score) {
  for (int key = 0; key < keys; key += kLanes) {
    vec x = score(load(scores + key));
    if (key < seen.begin || key + kLanes > seen.end) {
      const ivec at = lane_index() + key;
      x = (at >= seen.begin) & (at < seen.end) ? x : broadcast(-INFINITY);
    }
    store(scores + key, x);
  }
}

// S = Q K^T, P = softmax(S), O += P V
template <class Loader, class Element>
static void advance(const Rows& s, int group, Range rows, Range tile, const Element* const* k, const Element* const* v,
                    Finish score, Scratch& scratch) {
  const int padded = int(ceil_div(tile.size(), kLanes)) * kLanes;
  score_product<Loader, Setup::kBlockRows, kHeadDim, kTileN>(scratch.q[0], rows.size(), k, padded, scratch.scores[0]);
  for (int i = 0; i < rows.size(); ++i) {
    const Range seen = intersect(s.keys_of((rows.begin + i) / group), tile);
    finish(scratch.scores[i], padded, {seen.begin - tile.begin, seen.end - tile.begin}, score);
    soften<kHeadDimV>(scratch.scores[i], padded, scratch.rows[i], scratch.o[i]);
  }
  output_product<Loader, Setup::kBlockRows, kHeadDimV, kTileN>(scratch.scores[0], rows.size(), v, tile.size(),
                                                                scratch.o[0]);
}

template <int kWidth>
static void pack_rows(const Cached* const* from, int rows, int columns, float (*to)[kWidth], const float** found) {
  for (int row = 0; row < rows; ++row) {
    if (columns < kWidth) memset(to[row], 0, sizeof(to[row]));
    pack(to[row], 0, from[row], 0, 1, columns);
    found[row] = to[row];
  }
  for (int row = rows; row % kMaxLanes != 0; ++row) found[row] = to[rows - 1];
}

static void prefetch(const Cached* const* rows, int count, int columns) {
  if constexpr (Setup::kPrefetch)
    for (int i = 0; i < count; ++i)
      for (unsigned d = 0; d < columns * sizeof(Cached); d += 64) __builtin_prefetch((const char*)rows[i] + d);
}

// ---- A piece --------------------------------------------------------------------------------------------------------

static const element* q_of(const fagen_decode_params& p, const Rows& s, int64_t token, int head) {
  const int64_t batch = p.cu_seqlens_q ? 0 : s.index, row = p.cu_seqlens_q ? s.first_row + token : token;
  return static_cast<const element*>(p.q.data) + batch * p.q.stride[0] + row * p.q.stride[1] + head * p.q.stride[2];
}
static element* o_of(const fagen_decode_params& p, const Rows& s, int64_t token, int head) {
  const int64_t batch = p.cu_seqlens_q ? 0 : s.index, row = p.cu_seqlens_q ? s.first_row + token : token;
  return static_cast<element*>(p.o.data) + batch * p.o.stride[0] + row * p.o.stride[1] + head * p.o.stride[2];
}
static float* lse_of(const fagen_decode_params& p, const Rows& s, int64_t token, int head) {
  if (!p.lse) return nullptr;
  if (p.cu_seqlens_q) return p.lse + int64_t(head) * p.rows + s.first_row + token;
  return p.lse + (s.index * p.heads + head) * p.seqlen_q + token;
}
static float scale_of(const fagen_tensor& t, int64_t sequence, int kv_head) {
  return t.data ? static_cast<const float*>(t.data)[sequence * t.stride[0] + kv_head * t.stride[1]] : 1.0f;
}

// Whether keys and values become float32 in scratch: by config, or because loads of whole vectors would leave the row.
static bool packs(const fagen_decode_params& p) {
  return kPacked || p.head_dim < kHeadDim || p.head_dim_v < kHeadDimV;
}

// All keys of the piece against its rows, whose state is in the scratch. False if a page is none of the cache's.
static bool attend(const fagen_decode_params& p, const Rows& s, const Piece& piece, Range rows, Range keys,
                   Scratch& scratch) {
  const int group = p.heads / p.kv_heads;
  const Cache<Setup, Cached> k(p, p.k, s.index, piece.kv_head), v(p, p.v, s.index, piece.kv_head);
  const Finish score(p, scale_of(p.k_scale, s.index, piece.kv_head));
  for (int n = keys.begin; n < keys.end;) {
    const Range tile = intersect(keys, {n, (n / kTileN + 1) * kTileN});  // at multiples of its size
    if (!k.locate(tile, scratch.k) || !v.locate(tile, scratch.v)) return false;
    prefetch(scratch.v, tile.size(), p.head_dim_v);
    if (packs(p)) {
      pack_rows(scratch.k, tile.size(), p.head_dim, scratch.keys, scratch.packed_k);
      pack_rows(scratch.v, tile.size(), p.head_dim_v, scratch.values, scratch.packed_v);
      advance<Together<float>>(s, group, rows, tile, scratch.packed_k, scratch.packed_v, score, scratch);
    } else {
      advance<InPlace>(s, group, rows, tile, scratch.k, scratch.v, score, scratch);
    }
    n = tile.end;
  }
  return true;
}

static void close(const fagen_decode_params& p, const Rows& s, const Piece& piece, int row, RowState state, float* o) {
  const int group = p.heads / p.kv_heads, token = row / group, head = piece.kv_head * group + row % group;
  const float shrink = Setup::kSinks ? join_sink(state, p.sinks[head]) : 1.0f;
  const float inverse = state.sum == 0 ? 0.0f : shrink * scale_of(p.v_scale, s.index, piece.kv_head) / state.sum;
  element* to = o_of(p, s, token, head);
  if (kPairs && !packs(p))
    for (int d = 0; d < kHeadDimV; d += 2 * kLanes) {
      vec even = load(o + d), odd = load(o + d + kLanes);
      interleave(even, odd);
      store(o + d, even), store(o + d + kLanes, odd);
    }
  for (int d = 0; d < p.head_dim_v; d += kLanes) {
    const vec x = load(o + d) * inverse;
    d + kLanes <= p.head_dim_v ? store(to + d, x) : store_some(to + d, x, p.head_dim_v - d);
  }
  if (float* lse = lse_of(p, s, token, head)) *lse = state.sum == 0 ? -INFINITY : state.max + logf(state.sum);
}

static bool run(const AllPieces& pieces, int64_t index) {
  const fagen_decode_params& p = pieces.p;
  const Piece piece = pieces[index];
  const Rows s(p, piece.sequence);
  const Range rows = pieces.rows_of(s, piece);
  Scratch scratch;
  for (int i = 0; i < rows.size(); ++i) {
    const int row = rows.begin + i, head = piece.kv_head * pieces.group + row % pieces.group;
    if (p.head_dim < kHeadDim) memset(scratch.q[i], 0, sizeof(scratch.q[i]));
    pack(scratch.q[i], 0, q_of(p, s, row / pieces.group, head), 0, 1, p.head_dim);
    if (kPairs && !packs(p))
      for (int d = 0; d < kHeadDim; d += 2 * kLanes) {
        vec even = load(scratch.q[i] + d), odd = load(scratch.q[i] + d + kLanes);
        deinterleave(even, odd);
        store(scratch.q[i] + d, even), store(scratch.q[i] + d + kLanes, odd);
      }
    scratch.rows[i] = {-INFINITY, 0};
  }
  memset(scratch.o, 0, sizeof(scratch.o[0]) * rows.size());
  if (!attend(p, s, piece, rows, pieces.keys_of(s, piece, rows), scratch)) return false;
  if (piece.splits == 1) {
    for (int i = 0; i < rows.size(); ++i) close(p, s, piece, rows.begin + i, scratch.rows[i], scratch.o[i]);
  } else {
    memcpy(pieces.o_of(index), scratch.o, sizeof(scratch.o[0]) * rows.size());
    memcpy(pieces.states_of(index), scratch.rows, sizeof(RowState) * rows.size());
  }
  return true;
}

// The splits of some rows, in the order of their keys.
static void merge(const AllPieces& pieces, const Piece& first) {
  const Rows s(pieces.p, first.sequence);
  const Range rows = pieces.rows_of(s, first);
  for (int i = 0; i < rows.size(); ++i) {
    float* const o = pieces.o_of(first.index) + int64_t(i) * kHeadDimV;
    RowState state = pieces.states_of(first.index)[i];
    for (int split = 1; split < first.splits; ++split) {
      const int64_t other = pieces.sibling(first, split);
      join<kHeadDimV>(state, o, pieces.states_of(other)[i], pieces.o_of(other) + int64_t(i) * kHeadDimV);
    }
    close(pieces.p, s, first, rows.begin + i, state, o);
  }
}

static Error decode(const fagen_decode_params& p) {
  AllPieces pieces(p);
  if (!pieces.cut()) return kBadLengths;
  const int64_t count = pieces.first[p.batch];
  std::atomic<bool> good{true};
  share</*kBlocked=*/false>(count, [&](int64_t index) {
    if (!run(pieces, index)) good = false;
  });
  if (!good) return kBadIndex;
  bool split = false;
  for (int64_t b = 0; b < p.batch; ++b) split |= pieces.splits[b] > 1;
  if (!split) return kOk;
  share</*kBlocked=*/false>(count, [&](int64_t index) {
    const Piece piece = pieces[index];
    if (piece.splits > 1 && piece.split == 0) merge(pieces, piece);
  });
  return kOk;
}

// ---- What a caller links to -----------------------------------------------------------------------------------------

static Error check(const fagen_decode_params& p) {
  if (!p.q.data || !p.k.data || !p.v.data || !p.o.data || !p.seqlens_k) return kNullPointer;
  if ((kPageSize > 0 && !p.page_table.data) || (Config::kSinks && !p.sinks)) return kNullPointer;
  if (p.batch < 1 || p.heads < 1 || p.kv_heads < 1 || p.heads % p.kv_heads || p.rows < 0) return kBadSizes;
  if (p.seqlen_q < 1 || p.seqlen_k < 1 || p.seqlen_q > Band::kLongest || p.seqlen_k > Band::kLongest) return kBadSizes;
  if (int64_t(p.seqlen_q) * (p.heads / p.kv_heads) > Band::kLongest) return kBadSizes;
  if (p.num_splits < -Band::kLongest || p.num_splits > Band::kLongest) return kBadSizes;
  if (p.head_dim < 1 || p.head_dim > kHeadDim || p.head_dim_v < 1 || p.head_dim_v > kHeadDimV) return kBadHeadDim;
  if (kPageSize > 0 ? p.page_size != kPageSize : p.page_size < p.seqlen_k) return kBadPage;
  return p.workspace ? kOk : kNoWorkspace;
}

extern "C" {

int fagen_launch(const fagen_decode_params* params, void* /*stream*/) {
  const Error error = check(*params);
  return error == kOk ? decode(*params) : error;
}

const char* fagen_error(int code) {
  switch (code) {
    case kOk: return "ok";
    case kNullPointer: return "a pointer that this kernel needs is null";
    case kBadSizes: return "sizes must be positive, heads a multiple of kv_heads";
    case kBadHeadDim: return "head_dim or head_dim_v is not one that this kernel was built for";
    case kBadPage: return "pages are not of the size that this kernel was built for, or a cache is shorter than seqlen_k";
    case kNoWorkspace: return "workspace is null";
    case kBadLengths: return "a length is negative or beyond its bound, or cache_batch_idx names no row of the cache";
    case kBadIndex: return "an entry of the page table is no page of the cache";
    default: return "unknown error";
  }
}

uint64_t fagen_workspace_bytes(const fagen_decode_params* params) { return AllPieces(*params).workspace_bytes(); }

}  // extern "C"

// Name, offset and size of every field of the params, as this compiler laid them out.
#include <stddef.h>
#include <stdio.h>

extern "C" const char* fagen_params_layout(void) {
  static char text[1178];
  static const char* const told = [] {
    char* end = text;
#define FAGEN_FIELD(field) \
  end += snprintf(end, text + sizeof text - end, "%s %zu %zu; ", #field, offsetof(fagen_decode_params, field), \
                  sizeof(fagen_decode_params::field))
    FAGEN_FIELD(q.data); FAGEN_FIELD(q.stride); FAGEN_FIELD(k.data); FAGEN_FIELD(k.stride); FAGEN_FIELD(v.data);
    FAGEN_FIELD(v.stride); FAGEN_FIELD(o.data); FAGEN_FIELD(o.stride); FAGEN_FIELD(page_table.data);
    FAGEN_FIELD(page_table.stride); FAGEN_FIELD(k_scale.data); FAGEN_FIELD(k_scale.stride);
    FAGEN_FIELD(v_scale.data); FAGEN_FIELD(v_scale.stride); FAGEN_FIELD(seqlens_k); FAGEN_FIELD(cu_seqlens_q);
    FAGEN_FIELD(cache_batch_idx); FAGEN_FIELD(sinks); FAGEN_FIELD(lse); FAGEN_FIELD(workspace);
    FAGEN_FIELD(batch); FAGEN_FIELD(heads); FAGEN_FIELD(kv_heads); FAGEN_FIELD(rows); FAGEN_FIELD(seqlen_q);
    FAGEN_FIELD(seqlen_k); FAGEN_FIELD(pages); FAGEN_FIELD(page_size); FAGEN_FIELD(head_dim);
    FAGEN_FIELD(head_dim_v); FAGEN_FIELD(window_left); FAGEN_FIELD(window_right); FAGEN_FIELD(num_splits);
    FAGEN_FIELD(scale); FAGEN_FIELD(softcap);
#undef FAGEN_FIELD
    snprintf(end, text + sizeof text - end, "sizeof %zu", sizeof(fagen_decode_params));
    return text;
  }();
  return told;
}
