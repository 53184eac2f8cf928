// A kernel for attention forward, made by fagen. It needs a C++17 compiler and nothing else: no torch, no Python.
//
// problem:  forward/fp32/d64/causal, its config chosen for b1/h16-16/q1024-k1024
// config:   tile_m=64 tile_n=256 loop_order=q_outer schedule=dynamic block_rows=6 block_vectors=4 packing=direct (the family's default)
// made by:  fagen emit --target cpu --dtype fp32 --head-dim 64 --mask causal --seqlen 1024 --batch 1 --heads 16 --kv-heads 16 --family cpu_forward --config '{"block_rows": 6, "block_vectors": 4, "loop_order": "q_outer", "packing": "direct", "schedule": "dynamic", "tile_m": 64, "tile_n": 256}' --out DIR
// build:    g++ -std=c++17 -O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -fno-exceptions -shared -fPIC -o kernel.so kernel.cpp
// call:     fagen_launch(), declared in kernel.h beside this file

// cpu_forward: attention forward for forward/fp32/d64/causal on cpu
//
// Symbols: m rows of q, n keys; S = scale * Q K^T the scores, P = exp(S - max) the weights, O = P V / sum P.
// Names: kCamel is known at compile time, snake_case at run time; *_log2 lives in the base-2 logarithm.
//
// Config: tile_m=64 tile_n=256 loop_order=q_outer schedule=dynamic block_rows=6 block_vectors=4 packing=direct

namespace fagen {

enum class Mask { none, causal, window, intervals };
enum class LoopOrder { q_outer, kv_outer };
enum class Schedule { blocked, dynamic, longest };
enum class Packing { direct, tile, head };

struct Config {
  static constexpr int kHeadDim = 64;  // of q and k, padded
  static constexpr int kHeadDimV = 64;  // of v and o, padded
  static constexpr Mask kMask = Mask::causal;  // which cells are visible
  static constexpr bool kSoftcap = false;  // s -> softcap * tanh(s / softcap)
  static constexpr bool kAlibi = false;  // s -> s - slope * distance from the diagonal
  static constexpr bool kDropout = false;  // weights are dropped at random
  static constexpr bool kAligned = true;  // rows are whole, aligned 16-byte pieces
  static constexpr int kIntervalColumns = 0;  // bounds a key carries
  static constexpr int kLTS = -1;  // column of LTS in intervals, -1: absent
  static constexpr int kLTE = -1;  // column of LTE in intervals, -1: absent
  static constexpr int kUTS = -1;  // column of UTS in intervals, -1: absent
  static constexpr int kUTE = -1;  // column of UTE in intervals, -1: absent
  static constexpr int kTileM = 64;  // rows of q that share each tile of k and v
  static constexpr int kTileN = 256;  // keys of a tile
  static constexpr LoopOrder kLoopOrder = LoopOrder::q_outer;  // whose tiles the outer loop walks
  static constexpr Schedule kSchedule = Schedule::dynamic;  // how threads share tiles of rows
  static constexpr int kBlockRows = 6;  // keys, or columns of v, of a register block
  static constexpr int kBlockVectors = 4;  // vectors of queries of a register block
  static constexpr Packing kPacking = Packing::direct;  // k and v as contiguous float32
};

// Sizes that fagen derived from the config before compiling; the kernel asserts that it agrees.
struct Derived {
  static constexpr int tile_bytes = 33280;
  static constexpr int scratch_bytes = 99456;
};

}  // namespace fagen

using namespace fagen;  // the kernel is this one file

// ---- fagen/cpu/element.h ---------------------------------------------------------------------------------
// Input and output elements: float, bfloat16 and IEEE half, converted by bit arithmetic that every machine has.
#include <string.h>

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

// ---- fagen/cpu/head.h ------------------------------------------------------------------------------------
// One batch and head: where its rows, its masks and its parts of the workspace are.
// ---- fagen/cpu/layout.h ----------------------------------------------------------------------------------
// Memory layout: the state of a row tile, a thread's scratch, the parts of the workspace.
// ---- fagen/abi/forward.h ---------------------------------------------------------------------------------
// The arguments of a forward kernel: the one struct that a caller passes. Plain C; no torch, no CUDA header.
// ---- fagen/abi/tensor.h ----------------------------------------------------------------------------------
// A tensor that a kernel reads or writes, as every op passes it. Plain C; no torch, no CUDA header.
#include <stdint.h>

typedef struct fagen_tensor {
  void* data;         // null if the call has none
  int64_t stride[3];  // in elements; the op says of which dimensions. The last dimension is contiguous.
} fagen_tensor;

// Strides of q, k, v and o are those of batch, row and head. A batch stride of 0 broadcasts.
typedef struct fagen_forward_params {
  fagen_tensor q;             // (batch, seqlen_q, heads, head_dim)
  fagen_tensor k;             // (batch, seqlen_k, kv_heads, head_dim)
  fagen_tensor v;             // (batch, seqlen_k, kv_heads, head_dim_v)
  fagen_tensor o;             // (batch, seqlen_q, heads, head_dim_v), written
  fagen_tensor intervals;     // int32 (batch, mask_heads, seqlen_k, columns); strides: batch (or 0), mask head, key
  fagen_tensor alibi_slopes;  // float (batch, heads); strides: batch (or 0), the others unused
  float* lse;                 // (batch, heads, seqlen_q) contiguous, natural log; null if not wanted
  void* workspace;            // fagen_workspace_bytes() bytes, 256-byte aligned; null if that is 0
  int32_t batch, heads, kv_heads, mask_heads;
  int32_t seqlen_q, seqlen_k;
  int32_t head_dim, head_dim_v;       // as the caller has them; the kernel works on padded sizes
  int32_t window_left, window_right;  // the band around the bottom-right aligned diagonal; -1: unbounded
  float scale;                        // multiplies q.k before the softmax
  float softcap;                      // s -> softcap * tanh(s / softcap); 0: off
  float dropout;                      // probability that a weight is dropped; read by kernels with dropout
  const uint64_t* rng;                // seed and offset of the random numbers, where the kernel reads; null without
} fagen_forward_params;

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

// ---- fagen/cpu/softmax.h ---------------------------------------------------------------------------------
// The online softmax over queries that lie along lanes: every step is vertical.
// ---- fagen/cpu/math.h ------------------------------------------------------------------------------------
// Vector functions that the softmax needs, to about one unit in the last place.
#include <float.h>
#include <math.h>


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

// Some of a group's queries, as whole vectors: pointers to the first ones.
template <int kWidth>
struct Columns {
  float *q, *o, *max, *sum;
};

// The state of a group of kWidth queries while key tiles pass. A weight is
// 2^(factor * (score - max)), so the scale costs nothing and rounds neither q nor k.
template <int kHeadDim, int kHeadDimV, int kWidth>
struct GroupState {
  alignas(64) float q[kHeadDim][kWidth];
  float o[kHeadDimV][kWidth];  // sum of weight * v
  float max[kWidth];           // the scores' maximum, or less by at most the slack
  float sum[kWidth];           // the sum of the weights

  Columns<kWidth> from(int lane) { return {q[0] + lane, o[0] + lane, max + lane, sum + lane}; }
};

// Scores may exceed the maximum by this much before O is rescaled: weights then stay below 2^8, safe in float32.
constexpr float kSlackLog2 = 8;

// A row that has seen no key has a maximum of -inf; subtracting 0 instead keeps its weights at 0 and not NaN.
FAGEN_INLINE vec finite(vec max) { return max == broadcast(-INFINITY) ? vec{} : max; }

template <int kVectors, int kWidth>
FAGEN_INLINE void rescale(Columns<kWidth> rows, const vec (&top)[kVectors], ScaledExp2 exp2, int head_dim_v) {
  vec shrink[kVectors];
  ivec begun{};
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    const vec old = load(rows.max + v * kLanes);
    begun |= old != broadcast(-INFINITY);
    shrink[v] = exp2(old - finite(top[v]));
    store(rows.max + v * kLanes, top[v]);
    store(rows.sum + v * kLanes, load(rows.sum + v * kLanes) * shrink[v]);
  }
  if (!any(begun)) return;  // O is still 0
  for (int d = 0; d < head_dim_v; ++d)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      float* at = rows.o + d * kWidth + v * kLanes;
      store(at, load(at) * shrink[v]);
    }
}

// Turn scores into weights, in place. `finish(x, v, key)` makes a score of a raw product: softcap, bias, mask.
template <int kVectors, bool kFinish, int kWidth, class Finish>
FAGEN_INLINE void softmax(Columns<kWidth> rows, float* scores, int keys, ScaledExp2 exp2, int head_dim_v,
                          Finish finish) {
  vec top[kVectors];
  ivec grown{};
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) top[v] = load(rows.max + v * kLanes);
  for (int key = 0; key < keys; ++key)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      float* at = scores + key * kWidth + v * kLanes;
      vec x = load(at);
      if constexpr (kFinish) store(at, x = finish(x, v, key));
      top[v] = fagen::max(x, top[v]);
    }
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) grown |= (top[v] - load(rows.max + v * kLanes)) * exp2.factor > kSlackLog2;
  if (any(grown)) rescale<kVectors>(rows, top, exp2, head_dim_v);

  vec max[kVectors], sum[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    max[v] = finite(load(rows.max + v * kLanes));
    sum[v] = load(rows.sum + v * kLanes);
  }
  for (int key = 0; key < keys; ++key)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      float* at = scores + key * kWidth + v * kLanes;
      const vec weight = exp2(load(at) - max[v]);
      store(at, weight);
      sum[v] += weight;
    }
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) store(rows.sum + v * kLanes, sum[v]);
}

}  // namespace fagen

namespace fagen {

template <class Config>
struct Layout {
  static constexpr int kGroup = Config::kBlockVectors * kLanes;  // queries that advance together
  static constexpr int kGroups = Config::kTileM / kGroup;
  static constexpr bool kQOuter = Config::kLoopOrder == decltype(Config::kLoopOrder)::q_outer;
  static constexpr bool kPackTile = Config::kPacking == decltype(Config::kPacking)::tile;
  static constexpr bool kPackHead = Config::kPacking == decltype(Config::kPacking)::head;
  static constexpr bool kIntervals = Config::kIntervalColumns > 0;
  // packed rows are one cache line longer than the row, so that a column of v does not fall into few cache sets
  static constexpr int kStrideK = Config::kHeadDim + kMaxLanes, kStrideV = Config::kHeadDimV + kMaxLanes;

  using Group = GroupState<Config::kHeadDim, Config::kHeadDimV, kGroup>;

  // A thread's own memory, on its stack.
  struct Scratch {
    alignas(64) float scores[Config::kTileN * Config::kBlockVectors * kMaxLanes];
    float keys[kPackTile ? Config::kTileN : 1][kStrideK];
    float values[kPackTile ? Config::kTileN : 1][kStrideV];
    Group groups[kQOuter ? kGroups : 1];
  };

  // Offsets in bytes; a part that the config does not need is empty.
  struct Workspace {
    uint64_t bounds, keys, values, groups, total = 0;

    explicit Workspace(const fagen_forward_params& p) {
      const uint64_t rows_k = uint64_t(p.batch) * p.kv_heads * p.seqlen_k;
      const uint64_t tiles = uint64_t(p.batch) * p.mask_heads * ceil_div(p.seqlen_k, Config::kTileN);
      bounds = take(kIntervals ? tiles * sizeof(HiddenBounds) : 0);
      keys = take(kPackHead ? rows_k * kStrideK * sizeof(float) : 0);
      values = take(kPackHead ? rows_k * kStrideV * sizeof(float) : 0);
      groups = take(kQOuter ? 0 : uint64_t(p.batch) * p.heads * ceil_div(p.seqlen_q, kGroup) * sizeof(Group));
    }

   private:
    uint64_t take(uint64_t bytes) {
      const uint64_t begin = total;
      total += (bytes + 255) / 256 * 256;
      return begin;
    }
  };
};

}  // namespace fagen

// ---- fagen/cpu/dropout.h ---------------------------------------------------------------------------------
// Dropout of a tile of weights: which cells are kept, a byte each, in the order of the weights.
// ---- fagen/common/philox.h -------------------------------------------------------------------------------
// The weights that dropout drops: random numbers by Philox4x32-7, for device and host alike. Plain C++.
//
// A weight's number depends on the seed, the offset, its head, row and key alone: never on tiles, warps or the kernel.
// One call of Philox gives 16 bytes, a byte a weight. They belong to rows 2 a, 2 a + 1, 2 a + 8, 2 a + 9 of a block of
// 16 rows, and to keys 2 b, 2 b + 1, 2 b + 8, 2 b + 9 of a block of 16 keys. Word 2 * (row % 2) + row / 8 has a row,
// and byte 2 * (key / 8) + key % 2 of it a key. Rows and keys are alike in that, and so are the threads of mma.sync and
// wgmma: whether the lines of a matrix are rows or keys, a lane and its neighbour of the next line share a call in each
// block. Each makes that of one of two blocks, and they exchange halves.
//
// ops/attention/dropout.py is the same in Python.
#include <stdint.h>

#ifdef __CUDACC__
#define FAGEN_SHARED __host__ __device__ __forceinline__
#else
#define FAGEN_SHARED inline
#endif

namespace fagen {

struct RandomWords {
  uint32_t word[4];
};

// The keys of the rounds, that follow from a 64-bit key.
constexpr int kRounds = 7;
struct RoundKeys {
  uint32_t key[kRounds][2];

  static FAGEN_SHARED RoundKeys of(uint64_t first) {
    RoundKeys keys;
    for (int round = 0; round < kRounds; ++round) {
      keys.key[round][0] = uint32_t(first) + round * 0x9E3779B9u;
      keys.key[round][1] = uint32_t(first >> 32) + round * 0xBB67AE85u;
    }
    return keys;
  }
};

struct WideProduct {
  uint32_t high, low;
};
FAGEN_SHARED WideProduct multiply_wide(uint32_t a, uint32_t b) {
  const uint64_t product = uint64_t(a) * b;
  return {uint32_t(product >> 32), uint32_t(product)};
}
constexpr uint32_t kFactorA = 0xD2511F53u, kFactorB = 0xCD9E8D57u;  // of the first and the third counter

// Philox4x32-7 of a 64-bit key and a 128-bit counter. `from`: rounds that were done before.
FAGEN_SHARED RandomWords philox(const RoundKeys& keys, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                int from = 0) {
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = from; round < kRounds; ++round) {
    const WideProduct a = multiply_wide(kFactorA, c0), b = multiply_wide(kFactorB, c2);
    c0 = b.high ^ c1 ^ keys.key[round][0], c1 = b.low;
    c2 = a.high ^ c3 ^ keys.key[round][1], c3 = a.low;
  }
  return {{c0, c1, c2, c3}};
}

// The first rounds of a row alone, and of a key alone: a thread computes them once where its calls have a row, or a
// key, in common.
struct RowPart {
  uint32_t low[2];  // of products of the first two rounds
  WideProduct third;  // of the third round
};
struct KeyPart {
  WideProduct second;
};

// The dropout of one head: bytes below `kept` keep their weight; `scale` makes up for the dropped ones.
struct Dropout {
  RoundKeys keys;
  uint32_t offset, plane, kept;
  float scale;
  uint32_t lower_bits, sign_bits;  // of 256 - kept, in each byte
  uint32_t limits, above;  // two half floats 1024 + kept; four of the upper bytes of 1024 to 1279

  // The rate is rounded to 1/256; only 0 drops nothing, and only 1 all.
  static FAGEN_SHARED uint32_t kept_of(float rate) {
    const int nearest = int((1.f - rate) * 256.f + 0.5f);
    if (rate <= 0.f || rate >= 1.f) return rate <= 0.f ? 256 : 0;
    return nearest < 1 ? 1 : nearest > 255 ? 255 : nearest;
  }
  static FAGEN_SHARED float scale_of(uint32_t kept) { return kept ? 256.f / float(kept) : 0.f; }

  template <class Params>
  static FAGEN_SHARED Dropout of(const Params& p, int64_t batch, int64_t head) {
    const uint32_t kept = kept_of(p.dropout), least = 256 - kept;
    const uint32_t lower = kept ? (least & 127) * 0x01010101u : 0x80808080u, sign = (least & 384) ? 0x80808080u : 0;
    return {RoundKeys::of(p.rng[0]),
            uint32_t(p.rng[1]),
            uint32_t(batch * p.heads + head),
            kept,
            scale_of(kept),
            lower,
            sign,
            (0x6400 + kept) * 0x10001u,
            0x64646464u};
  }

  // The number that a call counts a row, or a key, by: 4 for each 16.
  static FAGEN_SHARED uint32_t counter(int line) { return uint32_t(line) / 16 * 4 + uint32_t(line) % 8 / 2; }
  FAGEN_SHARED RowPart of_row(uint32_t counter) const {
    const WideProduct a = multiply_wide(kFactorA, counter), of_plane = multiply_wide(kFactorB, plane);
    const WideProduct b = multiply_wide(kFactorB, a.high ^ offset ^ keys.key[0][1]);
    return {{a.low, b.low}, multiply_wide(kFactorA, b.high ^ of_plane.low ^ keys.key[1][0])};
  }
  FAGEN_SHARED KeyPart of_key(uint32_t counter) const {
    const WideProduct of_plane = multiply_wide(kFactorB, plane);
    return {multiply_wide(kFactorA, of_plane.high ^ counter ^ keys.key[0][0])};
  }
  // Philox of the counters of a row and a key, the plane and the offset.
  FAGEN_SHARED RandomWords words(const RowPart& row, const KeyPart& key) const {
    const WideProduct b = multiply_wide(kFactorB, key.second.high ^ row.low[0] ^ keys.key[1][1]);
    return philox(keys, b.high ^ row.low[1] ^ keys.key[2][0], b.low, row.third.high ^ key.second.low ^ keys.key[2][1],
                  row.third.low, 3);
  }
  // The call that has row `row` and key `key`.
  FAGEN_SHARED RandomWords words(int row, int key) const { return words(of_row(counter(row)), of_key(counter(key))); }
  // Whether a byte of a word keeps its weight.
  FAGEN_SHARED bool keeps(uint32_t word, int byte) const { return (word >> (8 * byte) & 255) < kept; }
  // The sign bit of a byte is set where it drops its weight: where 256 - kept, added to it, carries.
  FAGEN_SHARED uint32_t dropped(uint32_t word) const {
    const uint32_t sum = (word & 0x7f7f7f7fu) + lower_bits;
    return (word & sign_bits) | (word & sum) | (sign_bits & sum);
  }

  // Whether a weight is kept: the definition.
  FAGEN_SHARED bool keeps_weight(int row, int key) const {
    return keeps(words(row, key).word[row % 2 * 2 + row / 8 % 2], key / 8 % 2 * 2 + key % 2);
  }
};

}  // namespace fagen



namespace fagen {

// Queries along lanes, as the weights lie.
template <int kKeys, int kRows>
struct KeptWeights {
  static constexpr int kBlockRows = 16, kBlockKeys = 32;  // of the cells that 32 calls of Philox decide

  alignas(64) uint8_t cells[kKeys][kRows];  // 1: kept

  // Decide for some rows and keys; the first row and key are those of cells[0][0].
  void fill(const Dropout& dropout, Range rows, Range keys) {
    const auto floor = [](int at, int size) { return at / size * size; };
    for (int key = floor(keys.begin, kBlockKeys); key < keys.end; key += kBlockKeys)
      for (int row = floor(rows.begin, kBlockRows); row < rows.end; row += kBlockRows)
        fill_block(dropout, row, key, rows, keys);
  }

  FAGEN_INLINE ivec at(int key, int row) const {
    typedef uint8_t bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const bytes*>(&cells[key][row]), ivec) != 0;
  }

  // The weights of these keys become 0 where they are dropped.
  template <int kVectors>
  void drop(float* weights, int keys) const {
    for (int key = 0; key < keys; ++key)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        float* const x = weights + key * kRows + v * kLanes;
        store(x, at(key, v * kLanes) ? load(x) : vec{});
      }
  }

 private:
  void fill_block(const Dropout& dropout, int row, int key, Range rows, Range keys) {
    uint32_t words[4][2][kBlockRows];  // of a pair of keys and a block of 16 of them: the rows' words side by side
    for (int pair = 0; pair < 4; ++pair)
#pragma GCC ivdep
      for (int call = 0; call < 8; ++call) {
        const int block = call / 4, line = call % 4 * 2;
        const RandomWords drawn = dropout.words(row + line, key + block * 16 + pair * 2);
        for (int word = 0; word < 4; ++word) words[pair][block][word % 2 * 8 + line + word / 2] = drawn.word[word];
      }
    const Range some = intersect({key, key + kBlockKeys}, keys), lines = intersect({row, row + kBlockRows}, rows);
    for (int n = some.begin; n < some.end; ++n) {
      const uint32_t* const from = words[n % 8 / 2][n / 16 % 2];
      uint8_t* const to = cells[n - keys.begin] - rows.begin;
      for (int m = lines.begin; m < lines.end; ++m) to[m] = dropout.keeps(from[m % 16], n / 8 % 2 * 2 + n % 2);
    }
  }
};

}  // namespace fagen

// ---- fagen/cpu/score.h -----------------------------------------------------------------------------------
// From q.k to the score: scale, softcap, bias, mask. A step that the config does not need costs nothing.


namespace fagen {

// A weight is exp2(factor * score). Unless softcap or bias needs the true score, the score is the raw product.
template <class Config>
struct Scale {
  static constexpr bool kTrueScore = Config::kSoftcap || Config::kAlibi;

  float sign;    // the scale's, put on q so that a larger product always weighs more
  float inner;   // raw product to the argument of softcap, or to the true score
  float factor;  // score to the base-2 logarithm of its weight

  template <class Params>
  explicit Scale(const Params& p)
      : sign(kTrueScore ? 1 : int(p.scale > 0) - int(p.scale < 0)),
        inner(Config::kSoftcap ? p.scale / p.softcap : p.scale),
        factor(kTrueScore || p.scale == 0 ? kLog2E : fabsf(p.scale) * kLog2E) {}
};

// Finishes the scores of the vector of rows that starts at `row`, for one key.
template <class Config, bool kMasked>
struct Score {
  static constexpr bool kFinish = kMasked || Scale<Config>::kTrueScore;

  Band band;
  Intervals<Config> intervals;
  float inner, softcap, slope;
  int shift;  // key on row 0's diagonal

  FAGEN_INLINE vec operator()(vec x, ivec row, int key) const {
    if constexpr (Config::kSoftcap)
      x = softcap * tanh(x * inner);
    else if constexpr (Config::kAlibi)
      x *= inner;
    return biased(x, row, key);
  }

  // Bias and mask of a score that is scaled, and capped, already.
  FAGEN_INLINE vec biased(vec x, ivec row, int key) const {
    if constexpr (Config::kAlibi) {
      const ivec distance = row + (shift - key);
      x -= slope * __builtin_convertvector(distance < 0 ? -distance : distance, vec);
    }
    if constexpr (kMasked) {
      ivec sees = band.sees(row, key);
      if constexpr (Config::kIntervalColumns > 0) sees &= intervals.sees(row, key);
      x = sees ? x : broadcast(-INFINITY);
    }
    return x;
  }
};

}  // namespace fagen

namespace fagen {

template <class Config, class Element>
struct Head {
  using At = Layout<Config>;
  // a band known before run time: none has no bound, causal has the diagonal
  using Mask = decltype(Config::kMask);
  static constexpr bool kFixedBand = Config::kMask == Mask::none || Config::kMask == Mask::causal;
  static constexpr int kFixedRight = Config::kMask == Mask::causal ? 0 : -1;

  const fagen_forward_params& p;
  typename At::Workspace workspace;
  int64_t batch, head, kv_head, mask_head;
  Scale<Config> scale;
  Band band;
  Intervals<Config> intervals{};
  Dropout dropout;

  Head(const fagen_forward_params& p, int64_t batch, int64_t head)
      : p(p),
        workspace(p),
        batch(batch),
        head(head),
        kv_head(head / (p.heads / p.kv_heads)),
        mask_head(At::kIntervals ? head / (p.heads / p.mask_heads) : 0),
        scale(p),
        band(p, kFixedBand ? -1 : p.window_left, kFixedBand ? kFixedRight : p.window_right),
        dropout(Config::kDropout ? Dropout::of(p, batch, head) : Dropout{}) {
    if (At::kIntervals) intervals = {at<const int32_t>(p.intervals, mask_head, 0), p.intervals.stride[2]};
  }

  const Element* q(int row) const { return at<const Element>(p.q, row, head); }
  const Element* k(int row) const { return at<const Element>(p.k, row, kv_head); }
  const Element* v(int row) const { return at<const Element>(p.v, row, kv_head); }
  Element* o(int row) const { return at<Element>(p.o, row, head); }
  float* lse(int row) const { return p.lse ? p.lse + (batch * p.heads + head) * p.seqlen_q + row : nullptr; }

  float* packed_k(int row) const { return part<float>(workspace.keys) + packed_row(row) * At::kStrideK; }
  float* packed_v(int row) const { return part<float>(workspace.values) + packed_row(row) * At::kStrideV; }
  HiddenBounds& bounds(int key) const {
    const int64_t tiles = ceil_div(p.seqlen_k, Config::kTileN);
    return part<HiddenBounds>(workspace.bounds)[(batch * p.mask_heads + mask_head) * tiles + key / Config::kTileN];
  }
  typename At::Group* groups(int row) const {
    const int64_t first = (batch * p.heads + head) * ceil_div(p.seqlen_q, At::kGroup);
    return part<typename At::Group>(workspace.groups) + first + row / At::kGroup;
  }

  Range all_keys() const { return {0, p.seqlen_k}; }
  Range all_rows() const { return {0, p.seqlen_q}; }
  Range keys_for(Range rows) const { return intersect(all_keys(), band.seen_by_any(rows)); }

  template <bool kMasked>
  Score<Config, kMasked> score() const {
    const float slope = Config::kAlibi ? at<const float>(p.alibi_slopes, 0, 0)[head] : 0;
    return {band, intervals, scale.inner, p.softcap, slope, p.seqlen_k - p.seqlen_q};
  }

 private:
  template <class T>
  T* at(const fagen_tensor& t, int64_t i, int64_t j) const {  // of this batch
    return static_cast<T*>(t.data) + batch * t.stride[0] + i * t.stride[1] + j * t.stride[2];
  }
  template <class T>
  T* part(uint64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(p.workspace) + offset);
  }
  int64_t packed_row(int row) const { return (batch * p.kv_heads + kv_head) * p.seqlen_k + row; }
};

}  // namespace fagen

// ---- fagen/cpu/product.h ---------------------------------------------------------------------------------
// The matrix product of both halves of attention, blocked in registers.
//
//   c[row][lane] (+)= sum over step of a(row, step) * b[step][lane]
//
// Queries lie along the lanes of b and c; a is K or V as it lies in memory, read one element at a time and broadcast.
// So neither K nor V is ever transposed, and the softmax needs no sum across lanes.

namespace fagen {

enum class Product {
  scores,  // rows are keys, steps go along head_dim: S = K Q^T
  output,  // rows are columns of V, steps are keys: O^T += V^T P
  sum,     // rows are keys, steps are queries: dK += dS^T Q
};

// `stride` is that of a's rows in memory; the other way they are contiguous. Rows of b and c are kWidth apart.
template <Product kProduct, int kRows, int kVectors, int kWidth>
FAGEN_INLINE void product_block(const float* a, int64_t stride, const float* b, int steps, float* c) {
  constexpr bool kScores = kProduct == Product::scores, kAcross = kProduct == Product::output;
  const int64_t row_stride = kAcross ? 1 : stride, step_stride = kAcross ? stride : 1;
  vec sum[kRows][kVectors] = {};
#pragma GCC unroll 1
  for (int step = 0; step < steps; ++step, b += kWidth, a += step_stride) {
    vec lanes[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) lanes[v] = load_once(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] += a[r * row_stride] * lanes[v];
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      float* const at = c + r * kWidth + v * kLanes;
      // c is added last: many short sums round less than a long one
      store(at, kScores ? sum[r][v] : load(at) + sum[r][v]);
    }
}

// As many blocks of kRows as fit, then smaller ones for what is left. Not inlined: registers are dealt out per
// function, and a block needs them all.
template <Product kProduct, int kRows, int kVectors, int kWidth>
__attribute__((noinline)) void product(const float* a, int64_t stride, int rows, const float* b, int steps, float* c) {
  const int64_t row_stride = kProduct == Product::output ? 1 : stride;
  for (; rows >= kRows; rows -= kRows, a += kRows * row_stride, c += kRows * kWidth)
    product_block<kProduct, kRows, kVectors, kWidth>(a, stride, b, steps, c);
  if constexpr (kRows > 1)
    if (rows > 0) product<kProduct, kRows - (kRows > 2 ? 2 : 1), kVectors, kWidth>(a, stride, rows, b, steps, c);
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

// ---- fagen/cpu/tiles.h -----------------------------------------------------------------------------------
// Between memory and the state of rows: queries turned into lanes, outputs turned back.
#include <math.h>
#include <string.h>

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


namespace fagen {

// Queries times `sign`, transposed, and the state before the first key.
template <class State, class Element>
inline void open_rows(State& rows, const Element* q, int64_t stride, int count, int head_dim, float sign) {
  constexpr int kWidth = sizeof(rows.sum) / sizeof(float);
  for (int lane = 0; lane < kWidth; lane += kLanes)
    for (int d = 0; d < head_dim; d += kLanes) {
      vec x[kLanes];
      load_square(x, q + lane * stride + d, stride, count - lane, head_dim - d);
      transpose(x);
      for (int i = 0; i < kLanes; ++i) store(&rows.q[d + i][lane], x[i] * sign);
    }
  memset(rows.o, 0, sizeof(rows.o));
  memset(rows.sum, 0, sizeof(rows.sum));
  for (float& max : rows.max) max = -INFINITY;
}

// o / sum times `scale`, transposed back, and the log-sum-exp. Rows that saw nothing give 0 and -inf.
template <class State, class Element>
inline void close_rows(State& rows, Element* o, int64_t stride, float* lse, float factor, float scale, int count,
                       int head_dim_v) {
  for (int lane = 0; lane < count; lane += kLanes) {
    const vec sum = load(rows.sum + lane);
    const vec inverse = sum == vec{} ? vec{} : scale / sum;
    for (int d = 0; d < head_dim_v; d += kLanes) {
      vec x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = load(&rows.o[d + i][lane]) * inverse;
      transpose(x);
      store_square(o + lane * stride + d, stride, x, count - lane, head_dim_v - d);
    }
  }
  if (!lse) return;
  for (int i = 0; i < count; ++i)
    lse[i] = rows.sum[i] == 0 ? -INFINITY : rows.max[i] * (factor * kLn2) + logf(rows.sum[i]);
}

}  // namespace fagen

using element = float;

constexpr int kTileM = Config::kTileM, kTileN = Config::kTileN;
constexpr bool kBanded = Config::kMask != Mask::none, kBlocked = Config::kSchedule == Schedule::blocked;

using At = Layout<Config>;
using Group = At::Group;
using Vectors = Columns<At::kGroup>;
using Scratch = At::Scratch;
using HeadOf = Head<Config, element>;

static_assert(kTileM % (Config::kBlockVectors * kMaxLanes) == 0, "a tile is whole groups on every machine");
static_assert(sizeof(Group) * At::kGroups == Derived::tile_bytes, "fagen derived another size of a tile of rows");
static_assert(kLanes < kMaxLanes || sizeof(Scratch) == Derived::scratch_bytes, "fagen derived another scratch");
static_assert(sizeof(Scratch) <= Derived::scratch_bytes, "narrower vectors take no more than the widest");

// ---- One tile of keys -----------------------------------------------------------------------------------------------

// `packed` is where the rows lie already if they were packed once a head.
template <class Element>
static Tile tile_of(const Element* from, int64_t stride, int rows, int columns, float* scratch, Tile packed) {
  if constexpr (At::kPackTile)
    return pack(scratch, packed.stride, from, stride, rows, columns);
  else if constexpr (At::kPackHead)
    return packed;
  else
    return {from, stride};
}

// S = K Q^T, P = softmax(S) less what dropout drops, O^T += V^T P: some keys of a tile and kUsed vectors of the rows of
// a group.
template <int kUsed, bool kMasked>
static void advance(const HeadOf& head, Vectors group, Range rows, Range keys, Tile k, Tile v, float* scores) {
  constexpr int kRows = Config::kBlockRows, kWidth = At::kGroup;
  const int head_dim = head.p.head_dim, head_dim_v = head.p.head_dim_v;

  product<Product::scores, kRows, kUsed, kWidth>(k.data, k.stride, keys.size(), group.q, head_dim, scores);

  const auto score = head.template score<kMasked>();
  const auto finish = [&](vec x, int vector, int key) __attribute__((always_inline)) {
    return score(x, lane_index() + (rows.begin + vector * kLanes), keys.begin + key);
  };
  softmax<kUsed, score.kFinish>(group, scores, keys.size(), ScaledExp2(head.scale.factor), head_dim_v, finish);

  if constexpr (Config::kDropout) {  // after the sums, which are of all weights
    KeptWeights<kTileN, kWidth> kept;
    kept.fill(head.dropout, rows, keys);
    kept.template drop<kUsed>(scores, keys.size());
  }

  product<Product::output, kRows, kUsed, kWidth>(v.data, v.stride, head_dim_v, scores, keys.size(), group.o);
}

// As many vectors as hold rows, which the last group of a head and the edge of a band do not fill.
template <bool kMasked, int kUsed = Config::kBlockVectors, class... Rest>
static void advance_used(const HeadOf& head, Vectors group, Range rows, Rest... rest) {
  if constexpr (kUsed > 1)
    if (rows.size() <= (kUsed - 1) * kLanes) return advance_used<kMasked, kUsed - 1>(head, group, rows, rest...);
  advance<kUsed, kMasked>(head, group, rows, rest...);
}

// A group against a tile of keys, in pieces: whole ones without mask arithmetic, and at the edges of the band only
// the vectors that see something.
static void visit(const HeadOf& head, Group& group, Range rows, Range tile, Tile k, Tile v, float* scores) {
  bool hidden = false;
  if constexpr (At::kIntervals) {
    const HiddenBounds& bounds = head.bounds(tile.begin);
    if (bounds.hides_all(rows)) return;
    hidden = bounds.hides_any(rows);
  }
  const Range keys = intersect(tile, head.keys_for(rows)), whole = head.band.seen_by_all(rows);
  for (int n = keys.begin; n < keys.end;) {
    const Range piece = intersect(head.band.piece(n, rows), keys);
    Range seeing = intersect(head.band.rows_that_see(piece), rows);
    seeing.begin -= (seeing.begin - rows.begin) % kLanes;
    const Vectors columns = group.from(seeing.begin - rows.begin);
    const Tile from_k = k.from(n - tile.begin), from_v = v.from(n - tile.begin);
    if (kBanded && (hidden || n < whole.begin || n >= whole.end))
      advance_used<kBanded>(head, columns, seeing, piece, from_k, from_v, scores);
    else
      advance_used</*kMasked=*/false>(head, columns, seeing, piece, from_k, from_v, scores);
    n = piece.end;
  }
}

// ---- The loops ------------------------------------------------------------------------------------------------------

// All keys for a span of rows. q_outer: a span is one tile of rows, its state in scratch. kv_outer: it is a thread's
// share of all rows of the head, their state in memory while tiles of keys pass.
static void attend(const HeadOf& head, Range span, Scratch& scratch) {
  const fagen_forward_params& p = head.p;
  Group* const groups = At::kQOuter ? scratch.groups : head.groups(span.begin);
  const auto each_group = [&](auto&& body) {
    for (int row = span.begin; row < span.end; row += At::kGroup)
      body(groups[(row - span.begin) / At::kGroup], intersect({row, row + At::kGroup}, span));
  };

  each_group([&](Group& group, Range rows) {
    open_rows(group, head.q(rows.begin), p.q.stride[1], rows.size(), p.head_dim, head.scale.sign);
  });

  const Range seen = head.keys_for(span);
  for (int n = seen.begin / kTileN * kTileN; n < seen.end; n += kTileN) {
    if (At::kIntervals && head.bounds(n).hides_all(span)) continue;
    const Range tile = intersect({n, n + kTileN}, head.all_keys());
    const Tile packed_k{head.packed_k(n), At::kStrideK}, packed_v{head.packed_v(n), At::kStrideV};
    const Tile k = tile_of(head.k(n), p.k.stride[1], tile.size(), p.head_dim, scratch.keys[0], packed_k);
    const Tile v = tile_of(head.v(n), p.v.stride[1], tile.size(), p.head_dim_v, scratch.values[0], packed_v);
    each_group([&](Group& group, Range rows) { visit(head, group, rows, tile, k, v, scratch.scores); });
  }

  each_group([&](Group& group, Range rows) {
    float* lse = head.lse(rows.begin);
    const float scale = Config::kDropout ? head.dropout.scale : 1.0f;
    close_rows(group, head.o(rows.begin), p.o.stride[1], lse, head.scale.factor, scale, rows.size(), p.head_dim_v);
  });
}

// Made once, before all rows: the bounds of each tile of intervals, the packed keys and values of each head.
static void prepare(const fagen_forward_params& p) {
  const int64_t tiles = ceil_div(p.seqlen_k, kTileN);
  share<kBlocked>(tiles * p.batch * p.kv_heads, [&](int64_t item) {
    const int64_t n = item % tiles * kTileN, kv_head = item / tiles % p.kv_heads, batch = item / tiles / p.kv_heads;
    const HeadOf head(p, batch, kv_head * (p.heads / p.kv_heads));
    const Range tile = intersect({int(n), int(n) + kTileN}, head.all_keys());
    if constexpr (At::kPackHead) {
      pack(head.packed_k(n), At::kStrideK, head.k(n), p.k.stride[1], tile.size(), p.head_dim);
      pack(head.packed_v(n), At::kStrideV, head.v(n), p.v.stride[1], tile.size(), p.head_dim_v);
    }
    if constexpr (At::kIntervals)  // several kv heads may share a mask head: the first of them makes its bounds
      if (kv_head % (p.kv_heads / p.mask_heads) == 0) head.bounds(n) = head.intervals.bounds(tile);
  });
}

static void forward(const fagen_forward_params& p) {
  if constexpr (At::kPackHead || At::kIntervals) prepare(p);
  const int64_t heads = int64_t(p.batch) * p.heads;
  // kv_outer cuts a head into as many spans as it takes to give every thread one
  const int64_t rows = At::kQOuter ? kTileM : ceil_div(p.seqlen_q, ceil_div(omp_get_max_threads(), heads));
  const int span = ceil_div(rows, kTileM) * kTileM, spans = ceil_div(p.seqlen_q, span);
  share<kBlocked>(heads * spans, [&](int64_t item) {
    constexpr bool kAcross = Config::kSchedule == Schedule::longest;
    const int64_t head = kAcross ? item % heads : item / spans;
    const int from_last = kAcross ? item / heads : item % spans;  // under a causal mask the last rows take longest
    const int row = (spans - 1 - from_last) * span;
    const HeadOf here(p, head / p.heads, head % p.heads);
    Scratch scratch;
    attend(here, intersect({row, row + span}, here.all_rows()), scratch);
  });
}

// ---- What a caller links to -----------------------------------------------------------------------------------------

enum Error { kOk, kNullPointer, kBadSizes, kBadHeadDim, kNoWorkspace };

static Error check(const fagen_forward_params& p) {
  if (!p.q.data || !p.k.data || !p.v.data || !p.o.data) return kNullPointer;
  if ((At::kIntervals && !p.intervals.data) || (Config::kAlibi && !p.alibi_slopes.data)) return kNullPointer;
  if (Config::kDropout && !p.rng) return kNullPointer;
  if (p.batch < 1 || p.heads < 1 || p.kv_heads < 1 || p.heads % p.kv_heads) return kBadSizes;
  if (p.seqlen_q < 1 || p.seqlen_k < 1 || p.seqlen_q > Band::kLongest || p.seqlen_k > Band::kLongest) return kBadSizes;
  if (At::kIntervals && (p.mask_heads < 1 || p.kv_heads % p.mask_heads)) return kBadSizes;
  if (p.head_dim < 1 || p.head_dim > Config::kHeadDim) return kBadHeadDim;
  if (p.head_dim_v < 1 || p.head_dim_v > Config::kHeadDimV) return kBadHeadDim;
  return At::Workspace(p).total && !p.workspace ? kNoWorkspace : kOk;
}

extern "C" {

int fagen_launch(const fagen_forward_params* params, void* /*stream*/) {
  const Error error = check(*params);
  if (error == kOk) forward(*params);
  return error;
}

const char* fagen_error(int code) {
  switch (code) {
    case kOk: return "ok";
    case kNullPointer: return "a pointer that this kernel needs is null";
    case kBadSizes: return "sizes must be positive, heads a multiple of kv_heads, kv_heads a multiple of mask_heads";
    case kBadHeadDim: return "head_dim or head_dim_v is not one that this kernel was built for";
    case kNoWorkspace: return "workspace is null, but fagen_workspace_bytes() is not 0";
    default: return "unknown error";
  }
}

uint64_t fagen_workspace_bytes(const fagen_forward_params* params) { return At::Workspace(*params).total; }

}  // extern "C"

// Name, offset and size of every field of the params, as this compiler laid them out.
#include <stddef.h>
#include <stdio.h>

extern "C" const char* fagen_params_layout(void) {
  static char text[943];
  static const char* const told = [] {
    char* end = text;
#define FAGEN_FIELD(field) \
  end += snprintf(end, text + sizeof text - end, "%s %zu %zu; ", #field, offsetof(fagen_forward_params, field), \
                  sizeof(fagen_forward_params::field))
    FAGEN_FIELD(q.data); FAGEN_FIELD(q.stride); FAGEN_FIELD(k.data); FAGEN_FIELD(k.stride); FAGEN_FIELD(v.data);
    FAGEN_FIELD(v.stride); FAGEN_FIELD(o.data); FAGEN_FIELD(o.stride); FAGEN_FIELD(intervals.data);
    FAGEN_FIELD(intervals.stride); FAGEN_FIELD(alibi_slopes.data); FAGEN_FIELD(alibi_slopes.stride);
    FAGEN_FIELD(lse); FAGEN_FIELD(workspace); FAGEN_FIELD(batch); FAGEN_FIELD(heads); FAGEN_FIELD(kv_heads);
    FAGEN_FIELD(mask_heads); FAGEN_FIELD(seqlen_q); FAGEN_FIELD(seqlen_k); FAGEN_FIELD(head_dim);
    FAGEN_FIELD(head_dim_v); FAGEN_FIELD(window_left); FAGEN_FIELD(window_right); FAGEN_FIELD(scale);
    FAGEN_FIELD(softcap); FAGEN_FIELD(dropout); FAGEN_FIELD(rng);
#undef FAGEN_FIELD
    snprintf(end, text + sizeof text - end, "sizeof %zu", sizeof(fagen_forward_params));
    return text;
  }();
  return told;
}
