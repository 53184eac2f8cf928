// A kernel for attention backward, made by fagen. It needs a C++17 compiler and nothing else: no torch, no Python.
//
// problem:  backward/fp32/d64/causal, its config chosen for b1/h8-8/q1024-k1024
// config:   tile_m=128 tile_n=128 loop_order=q_outer parts=16 schedule=dynamic block_rows=6 block_vectors=4 packing=direct (the family's default)
// made by:  fagen emit --target cpu --op backward --dtype fp32 --head-dim 64 --mask causal --seqlen 1024 --batch 1 --heads 8 --kv-heads 8 --family cpu_backward --config '{"block_rows": 6, "block_vectors": 4, "loop_order": "q_outer", "packing": "direct", "parts": 16, "schedule": "dynamic", "tile_m": 128, "tile_n": 128}' --out DIR
// build:    g++ -std=c++17 -O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -fno-exceptions -shared -fPIC -o kernel.so kernel.cpp
// call:     fagen_launch(), declared in kernel.h beside this file

// cpu_backward: attention backward for backward/fp32/d64/causal on cpu
//
// Symbols: m rows of q, n keys; S = scale * Q K^T the scores, P = exp(S - max) the weights, O = P V / sum P.
// Names: kCamel is known at compile time, snake_case at run time; *_log2 lives in the base-2 logarithm.
//
// Config: tile_m=128 tile_n=128 loop_order=q_outer parts=16 schedule=dynamic block_rows=6 block_vectors=4 packing=direct

namespace fagen {

enum class Mask { none, causal, window, intervals };
enum class LoopOrder { q_outer, kv_outer };
enum class Schedule { blocked, dynamic };
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
  static constexpr bool kDeterministic = false;  // bitwise
  static constexpr int kTileM = 128;  // rows of q and dout of a tile
  static constexpr int kTileN = 128;  // keys of a tile
  static constexpr LoopOrder kLoopOrder = LoopOrder::q_outer;  // whose gradients are complete at once
  static constexpr int kParts = 16;  // pieces of work at least
  static constexpr Schedule kSchedule = Schedule::dynamic;  // how threads share the parts
  static constexpr int kBlockRows = 6;  // rows of a register block
  static constexpr int kBlockVectors = 4;  // vectors of a register block
  static constexpr Packing kPacking = Packing::direct;  // k and v as contiguous float32
};

// Sizes that fagen derived from the config before compiling; the kernel asserts that it agrees.
struct Derived {
  static constexpr int rows_bytes = 156672;
  static constexpr int scratch_bytes = 342272;
};

}  // namespace fagen

using namespace fagen;  // the kernel is this one file

#include <type_traits>

// ---- fagen/cpu/backward/tile.h ---------------------------------------------------------------------------
// A tile of rows against a tile of keys: the five products, and between them P and dS.
// ---- fagen/cpu/backward/head.h ---------------------------------------------------------------------------
// One batch and head: where its rows, its masks and its parts of the workspace are.
// ---- fagen/cpu/backward/layout.h -------------------------------------------------------------------------
// Memory layout: the tiles, a thread's scratch, the parts of the workspace, how heads are cut into parts.
// ---- fagen/abi/backward.h --------------------------------------------------------------------------------
// The arguments of a backward kernel: the one struct that a caller passes. Plain C; no torch, no CUDA header.
// ---- fagen/abi/tensor.h ----------------------------------------------------------------------------------
// A tensor that a kernel reads or writes, as every op passes it. Plain C; no torch, no CUDA header.
#include <stdint.h>

typedef struct fagen_tensor {
  void* data;         // null if the call has none
  int64_t stride[3];  // in elements; the op says of which dimensions. The last dimension is contiguous.
} fagen_tensor;

// Strides of q, k, v, o and their gradients are those of batch, row and head. A batch stride of 0 broadcasts.
typedef struct fagen_backward_params {
  fagen_tensor q;     // (batch, seqlen_q, heads, head_dim)
  fagen_tensor k;     // (batch, seqlen_k, kv_heads, head_dim)
  fagen_tensor v;     // (batch, seqlen_k, kv_heads, head_dim_v)
  fagen_tensor o;     // (batch, seqlen_q, heads, head_dim_v), what forward made
  fagen_tensor dout;  // its gradient
  fagen_tensor dq;    // written: each like its own
  fagen_tensor dk;
  fagen_tensor dv;
  fagen_tensor intervals;     // int32 (batch, mask_heads, seqlen_k, columns); strides: batch (or 0), mask head, key
  fagen_tensor alibi_slopes;  // float (batch, heads); strides: batch (or 0), the others unused
  const float* lse;    // (batch, heads, seqlen_q) contiguous, natural log, made by forward; -inf: sees nothing
  const float* dlse; // its gradient, contiguous; null if the call has none
  void* workspace;     // fagen_workspace_bytes() bytes, 256-byte aligned; null if that is 0
  int32_t batch, heads, kv_heads, mask_heads;
  int32_t seqlen_q, seqlen_k;
  int32_t head_dim, head_dim_v;       // as the caller has them; the kernel works on padded sizes
  int32_t window_left, window_right;  // the band around the bottom-right aligned diagonal; -1: unbounded
  float scale;                        // multiplies q.k before the softmax
  float softcap;                      // s -> softcap * tanh(s / softcap); 0: off
  float dropout;                      // probability that a weight is dropped; read by kernels with dropout
  const uint64_t* rng;                // seed and offset of the random numbers, where the kernel reads; null without
} fagen_backward_params;

// ---- fagen/cpu/backward/rows.h ---------------------------------------------------------------------------
// The rows of a tile as the products of backward read them, and dQ on its way back to memory.
#include <math.h>

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

// ---- fagen/cpu/pack.h ------------------------------------------------------------------------------------
// Between memory and tiles: squares of rows, keys and values made contiguous floats.
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

// Rows of q and dout in both orders: along lanes for S and dP, along the head dimension for dK and dV.
template <int kHeadDim, int kHeadDimV, int kRows>
struct RowTile {
  // rows of memory are one cache line longer than the tile, so that a column does not fall into few cache sets
  static constexpr int kWidth = kRows + kMaxLanes, kStride = kHeadDim + kMaxLanes, kStrideV = kHeadDimV + kMaxLanes;

  alignas(64) float q_lanes[kHeadDim][kWidth];  // times the sign of the scale
  float dout_lanes[kHeadDimV][kWidth];
  float q[kRows][kStride];
  float dout[kRows][kStrideV];
  float lse_log2[kRows];  // +inf where a row sees nothing: its weights are 0
  float delta[kRows];     // the part of dS that is the same in all columns
};

// Some rows of one head in memory, and what forward made of them.
template <class Element>
struct RowSource {
  const Element *q, *o, *dout;
  int64_t q_stride, o_stride, dout_stride;
  const float *lse, *dlse;
  int count, head_dim, head_dim_v;
  float sign;
};

// Rows that see nothing are 0, whatever lies there: they have no part in any gradient.
template <int kWidth, int kRows, int kStride, class Element>
inline void load_rows(float (*lanes)[kWidth], float (&rows)[kRows][kStride], const Element* from, int64_t stride,
                      int count, int columns, const float* lse, float sign) {
  for (int row = 0; row < kRows; row += kLanes)
    for (int d = 0; d < columns; d += kLanes) {
      vec x[kLanes];
      load_square(x, from + row * stride + d, stride, count - row, columns - d);
      for (int i = 0; i < kLanes; ++i) {
        if (row + i < count && lse[row + i] == -INFINITY) x[i] = vec{};
        store(&rows[row + i][d], x[i]);
      }
      transpose(x);
      for (int i = 0; i < kLanes; ++i) store(&lanes[d + i][row], x[i] * sign);
    }
}

template <class Element>
inline float dot(const Element* a, const Element* b, int count) {
  vec sum{};
  int d = 0;
  for (; d + kLanes <= count; d += kLanes) sum += load(a + d) * load(b + d);
  if (d < count) sum += load_some(a + d, count - d) * load_some(b + d, count - d);
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  return total;
}

template <int kHeadDim, int kHeadDimV, int kRows, class Element>
inline void open_rows(RowTile<kHeadDim, kHeadDimV, kRows>& tile, const RowSource<Element>& from) {
  const auto& s = from;
  load_rows(tile.q_lanes, tile.q, s.q, s.q_stride, s.count, s.head_dim, s.lse, s.sign);
  load_rows(tile.dout_lanes, tile.dout, s.dout, s.dout_stride, s.count, s.head_dim_v, s.lse, 1.0f);
  for (int row = 0; row < kRows; ++row) {
    const bool sees = row < s.count && s.lse[row] != -INFINITY;
    tile.lse_log2[row] = sees ? s.lse[row] * kLog2E : INFINITY;
    tile.delta[row] = sees ? dot(s.dout + row * s.dout_stride, s.o + row * s.o_stride, s.head_dim_v) : 0;
    if (sees && s.dlse) tile.delta[row] -= s.dlse[row];
  }
}

// dQ, summed over parts that lie `part` floats apart and times the scale, transposed back.
template <int kWidth, class Element>
inline void store_query_gradient(Element* dq, int64_t stride, const float (*lanes)[kWidth], int parts, int64_t part,
                                 float scale, int count, int head_dim) {
  for (int row = 0; row < count; row += kLanes)
    for (int d = 0; d < head_dim; d += kLanes) {
      vec x[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        x[i] = load(&lanes[d + i][row]);
        for (int k = 1; k < parts; ++k) x[i] += load(&lanes[d + i][row] + k * part);
        x[i] *= scale;
      }
      transpose(x);
      store_square(dq + row * stride + d, stride, x, count - row, head_dim - d);
    }
}

// Rows of dK or dV, likewise.
template <class Element>
inline void store_key_gradient(Element* to, int64_t stride, const float* from, int64_t from_stride, int parts,
                               int64_t part, float scale, int count, int columns) {
  for (int row = 0; row < count; ++row)
    for (int d = 0; d < columns; d += kLanes) {
      const float* p = from + row * from_stride + d;
      vec x = load(p);
      for (int k = 1; k < parts; ++k) x += load(p + k * part);
      Element* const at = to + row * stride + d;
      columns - d >= kLanes ? store(at, x * scale) : store_some(at, x * scale, columns - d);
    }
}

}  // namespace fagen

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

template <class Config>
struct Layout {
  using Params = fagen_backward_params;
  using Rows = RowTile<Config::kHeadDim, Config::kHeadDimV, Config::kTileM>;
  static constexpr int kTileM = Config::kTileM, kTileN = Config::kTileN;
  static constexpr int kGroup = Config::kBlockVectors * kLanes;  // queries of a register block
  static constexpr int kWidth = Rows::kWidth, kStride = Rows::kStride, kStrideV = Rows::kStrideV;
  static constexpr bool kQOuter = Config::kLoopOrder == decltype(Config::kLoopOrder)::q_outer;
  static constexpr bool kPackTile = Config::kPacking == decltype(Config::kPacking)::tile;
  static constexpr bool kPackHead = Config::kPacking == decltype(Config::kPacking)::head;
  static constexpr bool kIntervals = Config::kIntervalColumns > 0;

  typedef float QueryGradient[Config::kHeadDim][kWidth];  // of a tile of rows, along lanes

  // S and then P, dP and then dS of a tile: queries along lanes.
  struct Cells {
    alignas(64) float weights[kTileN][kWidth];
    float gradients[kTileN][kWidth];
  };

  // A thread's own memory, on its stack. The gradients of the inner loop's side are in the workspace.
  struct Scratch {
    Cells cells;
    float keys[kPackTile ? kTileN : 1][kStride];
    float values[kPackTile ? kTileN : 1][kStrideV];
    alignas(64) char rows[kQOuter ? sizeof(Rows) : 1];
    alignas(64) float dq[kQOuter ? Config::kHeadDim : 1][kWidth];
    float dk[kQOuter ? 1 : kTileN][kStride];
    float dv[kQOuter ? 1 : kTileN][kStrideV];
  };

  // The outer loop of all heads of a kv head is cut into parts that threads share. Each sums into gradients of its own,
  // which are added in the order of the parts: the result does not depend on the threads.
  static int64_t outer_tiles(const Params& p) {
    return kQOuter ? p.heads / p.kv_heads * ceil_div(p.seqlen_q, kTileM) : ceil_div(p.seqlen_k, kTileN);
  }
  static int parts(const Params& p) {
    const int64_t wanted = ceil_div(Config::kParts, int64_t(p.batch) * p.kv_heads), tiles = outer_tiles(p);
    return wanted < tiles ? wanted : tiles;
  }

  // Offsets in bytes; a part that the config does not need is empty.
  struct Workspace {
    uint64_t bounds, keys, values, rows, dq, dk, dv, total = 0;

    explicit Workspace(const Params& p) {
      const uint64_t rows_k = uint64_t(p.batch) * p.kv_heads * p.seqlen_k, all_parts = parts(p);
      const uint64_t tiles_q = uint64_t(p.batch) * p.heads * ceil_div(p.seqlen_q, kTileM);
      bounds =
          take(kIntervals ? uint64_t(p.batch) * p.mask_heads * ceil_div(p.seqlen_k, kTileN) : 0, sizeof(HiddenBounds));
      keys = take(kPackHead ? rows_k : 0, kStride * sizeof(float));
      values = take(kPackHead ? rows_k : 0, kStrideV * sizeof(float));
      rows = take(kQOuter ? 0 : tiles_q, sizeof(Rows));
      dq = take(kQOuter ? 0 : tiles_q * all_parts, sizeof(QueryGradient));
      dk = take(kQOuter ? rows_k * all_parts : 0, kStride * sizeof(float));
      dv = take(kQOuter ? rows_k * all_parts : 0, kStrideV * sizeof(float));
    }

   private:
    uint64_t take(uint64_t count, uint64_t size) {
      const uint64_t begin = total;
      total += (count * size + 255) / 256 * 256;
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
  using Mask = decltype(Config::kMask);
  static constexpr bool kFixedBand = Config::kMask == Mask::none || Config::kMask == Mask::causal;
  static constexpr int kFixedRight = Config::kMask == Mask::causal ? 0 : -1;

  const typename At::Params& p;
  typename At::Workspace workspace;
  int64_t batch, head, kv_head, mask_head;
  Scale<Config> scale;
  Band band;
  Intervals<Config> intervals{};
  Dropout dropout;

  Head(const typename At::Params& p, int64_t batch, int64_t head)
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

  const Element* k(int row) const { return at<const Element>(p.k, row, kv_head); }
  const Element* v(int row) const { return at<const Element>(p.v, row, kv_head); }
  Element* dq(int row) const { return at<Element>(p.dq, row, head); }
  Element* dk(int row) const { return at<Element>(p.dk, row, kv_head); }
  Element* dv(int row) const { return at<Element>(p.dv, row, kv_head); }

  RowSource<Element> source(Range rows) const {
    const int64_t of_lse = (batch * p.heads + head) * p.seqlen_q + rows.begin;
    return {at<const Element>(p.q, rows.begin, head),
            at<const Element>(p.o, rows.begin, head),
            at<const Element>(p.dout, rows.begin, head),
            p.q.stride[1],
            p.o.stride[1],
            p.dout.stride[1],
            p.lse + of_lse,
            p.dlse ? p.dlse + of_lse : nullptr,
            rows.size(),
            p.head_dim,
            p.head_dim_v,
            scale.sign};
  }

  // ---- Parts of the workspace: of this head, or of its kv head ----
  float* packed_k(int row) const { return part<float>(workspace.keys) + (kv_plane() * p.seqlen_k + row) * At::kStride; }
  float* packed_v(int row) const {
    return part<float>(workspace.values) + (kv_plane() * p.seqlen_k + row) * At::kStrideV;
  }
  HiddenBounds& bounds(int key) const {
    const int64_t tiles = ceil_div(p.seqlen_k, Config::kTileN);
    return part<HiddenBounds>(workspace.bounds)[(batch * p.mask_heads + mask_head) * tiles + key / Config::kTileN];
  }
  typename At::Rows& rows(int row) const { return part<typename At::Rows>(workspace.rows)[row_tile(row)]; }
  typename At::QueryGradient& dq_sum(int row, int64_t index) const {
    return part<typename At::QueryGradient>(workspace.dq)[index * parts_apart_q() + row_tile(row)];
  }
  float* dk_sum(int row, int64_t index) const {
    return part<float>(workspace.dk) + (index * parts_apart_k() + kv_plane() * p.seqlen_k + row) * At::kStride;
  }
  float* dv_sum(int row, int64_t index) const {
    return part<float>(workspace.dv) + (index * parts_apart_k() + kv_plane() * p.seqlen_k + row) * At::kStrideV;
  }
  int64_t parts_apart_q() const { return int64_t(p.batch) * p.heads * ceil_div(p.seqlen_q, Config::kTileM); }
  int64_t parts_apart_k() const { return int64_t(p.batch) * p.kv_heads * p.seqlen_k; }

  Range all_keys() const { return {0, p.seqlen_k}; }
  Range all_rows() const { return {0, p.seqlen_q}; }
  Range keys_for(Range rows) const { return intersect(all_keys(), band.seen_by_any(rows)); }
  Range rows_for(Range keys) const { return intersect(all_rows(), band.rows_that_see(keys)); }

  template <bool kMasked>
  Score<Config, kMasked> score() const {
    const float slope = Config::kAlibi ? static_cast<const float*>(p.alibi_slopes.data)[alibi(p)] : 0;
    return {band, intervals, scale.inner, p.softcap, slope, p.seqlen_k - p.seqlen_q};
  }

 private:
  template <class T>
  T* at(const fagen_tensor& t, int64_t first, int64_t second) const {
    return static_cast<T*>(t.data) + batch * t.stride[0] + first * t.stride[1] + second * t.stride[2];
  }
  template <class T>
  T* part(uint64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(p.workspace) + offset);
  }
  int64_t alibi(const typename At::Params& p) const { return batch * p.alibi_slopes.stride[0] + head; }
  int64_t kv_plane() const { return batch * p.kv_heads + kv_head; }
  int64_t row_tile(int row) const {
    return (batch * p.heads + head) * ceil_div(p.seqlen_q, Config::kTileM) + row / Config::kTileM;
  }
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

namespace fagen {

// 2^y for y up to 0, 0 below -127. A NaN stays one; what rounds to above 0 is 0.
FAGEN_INLINE vec exp2_of_negative(vec y) {
  y = max(broadcast(-127.0f), y);
  const Exp2Parts e = exp2_parts(y > 0 ? vec{} : y, 1.0f);
  return e.power + e.power * e.excess;
}

// `body` is told how many vectors `count` floats take, as a constant; at most kMost.
template <int kMost, class Body>
FAGEN_INLINE void with_vectors(int count, Body body) {
  if constexpr (kMost > 1)
    if (count <= (kMost - 1) * kLanes) return with_vectors<kMost - 1>(count, body);
  body(std::integral_constant<int, kMost>());
}

// Keys and values of a tile, and where the sums of their gradients lie.
struct KeyTile {
  Range keys;
  Tile k, v;
  float *dk, *dv;
};

template <class Config, class Element>
struct TileStep {
  using At = Layout<Config>;
  using Rows = typename At::Rows;
  static constexpr int kBlockRows = Config::kBlockRows, kBlockVectors = Config::kBlockVectors;
  static constexpr int kWidth = At::kWidth;
  static constexpr bool kBanded = Config::kMask != decltype(Config::kMask)::none;
  // keys of a tile at the edge of the band that take the same rows: few, so that little of what is hidden is multiplied
  static constexpr int kEdgeKeys = 2 * kBlockRows;

  const Head<Config, Element>& head;
  typename At::Cells& cells;

  // Sums into dq and into the key tile's gradients what the rows and keys of the tiles give each other.
  void operator()(const Rows& tile, Range rows, float (*dq)[kWidth], const KeyTile& keys) const {
    bool whole = true, none = true;
    for (int m = 0; m < rows.size(); m += At::kGroup) {
      const Range block = intersect({rows.begin + m, rows.begin + m + At::kGroup}, rows);
      Range seen = intersect(keys.keys, head.keys_for(block));
      bool masked = false;
      if constexpr (kBanded) {
        const Range by_all = head.band.seen_by_all(block);
        masked = seen.begin < by_all.begin || seen.end > by_all.end;
      }
      if constexpr (At::kIntervals) {
        const HiddenBounds& bounds = head.bounds(keys.keys.begin);
        masked |= bounds.hides_any(block);
        if (bounds.hides_all(block)) seen = {};
      }
      if (seen.empty()) seen = {keys.keys.begin, keys.keys.begin};
      if (seen.size() < keys.keys.size()) {
        whole = false;
        clear({keys.keys.begin, seen.begin}, keys.keys.begin, m);
        clear({seen.end, keys.keys.end}, keys.keys.begin, m);
      }
      if (seen.empty()) continue;
      none = false;
      with_vectors<kBlockVectors>(block.size(), [&](auto vectors) {
        if (kBanded && masked)
          advance<vectors, kBanded>(tile, m, block, seen, dq, keys);
        else
          advance<vectors, false>(tile, m, block, seen, dq, keys);
      });
    }
    if (none) return;
    if (whole) return sum_over_rows(tile, {0, rows.size()}, keys.keys, keys);
    for (int n = keys.keys.begin; n < keys.keys.end; n += kEdgeKeys) {
      const Range some = intersect({n, n + kEdgeKeys}, keys.keys), seeing = intersect(rows, head.rows_for(some));
      if (!seeing.empty()) sum_over_rows(tile, {seeing.begin - rows.begin, seeing.end - rows.begin}, some, keys);
    }
  }

 private:
  // P and dS of one register block of rows, and its dQ.
  template <int kVectors, bool kMasked>
  void advance(const Rows& tile, int m, Range block, Range seen, float (*dq)[kWidth], const KeyTile& keys) const {
    const int first = seen.begin - keys.keys.begin, head_dim = head.p.head_dim, head_dim_v = head.p.head_dim_v;
    float *const weights = &cells.weights[first][m], *const gradients = &cells.gradients[first][m];
    const Tile k = keys.k.from(first), v = keys.v.from(first);
    product<Product::scores, kBlockRows, kVectors, kWidth>(k.data, k.stride, seen.size(), &tile.q_lanes[0][m], head_dim,
                                                           weights);
    product<Product::scores, kBlockRows, kVectors, kWidth>(v.data, v.stride, seen.size(), &tile.dout_lanes[0][m],
                                                           head_dim_v, gradients);
    differentiate<kVectors, kMasked>(tile, m, block.begin, seen);
    product<Product::output, kBlockRows, kVectors, kWidth>(k.data, k.stride, head_dim, gradients, seen.size(),
                                                           &dq[0][m]);
  }

  // P = exp(S - lse) and dS = P (dP - delta), in place. With dropout, dP is less what is dropped, and so is the P that
  // is left for dV.
  template <int kVectors, bool kMasked>
  void differentiate(const Rows& tile, int m, int row, Range seen) const {
    const auto score = head.template score<kMasked>();
    const float factor = head.scale.factor;
    vec lse[kVectors], delta[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      lse[v] = load(tile.lse_log2 + m + v * kLanes);
      delta[v] = load(tile.delta + m + v * kLanes);
    }
    const int tile_begin = seen.begin - seen.begin % At::kTileN;
    KeptWeights<Config::kDropout ? At::kTileN : 1, Config::kDropout ? At::kGroup : kLanes> kept;
    if constexpr (Config::kDropout) kept.fill(head.dropout, {row, row + kVectors * kLanes}, seen);
    for (int key = seen.begin; key < seen.end; ++key)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        float* const weight = &cells.weights[key - tile_begin][m + v * kLanes];
        float* const gradient = &cells.gradients[key - tile_begin][m + v * kLanes];
        vec x = load(weight), slope = broadcast(1.0f);
        if constexpr (Config::kSoftcap) {
          const vec capped = tanh(x * score.inner);
          x = score.softcap * capped;
          slope = 1.0f - capped * capped;
        } else if constexpr (Config::kAlibi) {
          x *= score.inner;
        }
        x = score.biased(x, lane_index() + (row + v * kLanes), key);
        if constexpr (kMasked) x = lse[v] == INFINITY ? broadcast(-INFINITY) : x;
        const vec p = exp2_of_negative(x * factor - lse[v]);
        vec dp = load(gradient), used = p;
        if constexpr (Config::kDropout) {
          const ivec keep = kept.at(key - seen.begin, v * kLanes);
          dp = keep ? dp * head.dropout.scale : vec{};
          used = keep ? p * head.dropout.scale : vec{};
        }
        vec ds = p * (dp - delta[v]);
        if constexpr (Config::kSoftcap) ds *= slope;
        store(weight, used);
        store(gradient, ds);
      }
  }

  // dV += P^T dO and dK += dS^T Q, of some keys, over some rows of the tile.
  void sum_over_rows(const Rows& tile, Range rows, Range some, const KeyTile& keys) const {
    const int n = some.begin - keys.keys.begin;
    const auto sum = [&](auto stride, const float* cells, const float* of_rows, float* to, int columns) {
      for (int d = 0; d < columns; d += At::kGroup)
        with_vectors<kBlockVectors>(columns - d, [&](auto vectors) {
          product<Product::sum, kBlockRows, vectors, stride>(cells, kWidth, some.size(), of_rows + d, rows.size(),
                                                             to + d);
        });
    };
    sum(std::integral_constant<int, At::kStrideV>(), &cells.weights[n][rows.begin], tile.dout[rows.begin],
        keys.dv + int64_t(n) * At::kStrideV, head.p.head_dim_v);
    sum(std::integral_constant<int, At::kStride>(), &cells.gradients[n][rows.begin], tile.q[rows.begin],
        keys.dk + int64_t(n) * At::kStride, head.p.head_dim);
  }

  // Cells that no row of a block sees, where a neighbour does.
  void clear(Range some, int tile_begin, int m) const {
    for (int n = some.begin - tile_begin; n < some.end - tile_begin; ++n)
      for (int v = 0; v < kBlockVectors; ++v) {
        store(&cells.weights[n][m + v * kLanes], vec{});
        store(&cells.gradients[n][m + v * kLanes], vec{});
      }
  }
};

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

using element = float;

constexpr int kTileM = Config::kTileM, kTileN = Config::kTileN;
constexpr bool kBlocked = Config::kSchedule == Schedule::blocked;

using At = Layout<Config>;
using Params = At::Params;
using Rows = At::Rows;
using Scratch = At::Scratch;
using HeadOf = Head<Config, element>;
using Step = TileStep<Config, element>;

static_assert(kTileM % (Config::kBlockVectors * kMaxLanes) == 0, "a tile is whole groups on every machine");
static_assert(sizeof(Rows) == Derived::rows_bytes, "fagen derived another size of a tile of rows");
static_assert(sizeof(Scratch) == Derived::scratch_bytes, "fagen derived another scratch");

// ---- The loops ------------------------------------------------------------------------------------------------------

// All heads of one kv head, and one part of what the outer loop walks.
struct Item {
  const Params& p;
  int64_t batch, kv_head;
  int part, parts;

  int group() const { return p.heads / p.kv_heads; }
  HeadOf head(int index) const { return {p, batch, kv_head * group() + index}; }

  // The parts take turns, back and forth: under a causal mask each then has about as much to do.
  template <class Body>
  void each_tile(Body body) const {
    const int64_t tiles = At::outer_tiles(p);
    for (int64_t round = 0; round * parts < tiles; ++round) {
      const int64_t tile = round * parts + (round % 2 ? parts - 1 - part : part);
      if (tile < tiles) body(tile);
    }
  }
};

static Range tile_at(int64_t index, int size, Range all) { return intersect({int(index * size), int(index * size) + size}, all); }

// Keys and values of a tile as floats: where they lie, packed now, or packed before.
static KeyTile open_keys(const HeadOf& head, Range keys, Scratch& scratch, float* dk, float* dv) {
  const Params& p = head.p;
  const auto tile_of = [&](const auto* from, int64_t stride, int columns, float* packed, int64_t packed_stride) -> Tile {
    if constexpr (At::kPackTile)
      return pack(packed, packed_stride, from, stride, keys.size(), columns);
    else if constexpr (At::kPackHead)
      return {packed, packed_stride};
    else
      return {from, stride};
  };
  float* const k = At::kPackHead ? head.packed_k(keys.begin) : scratch.keys[0];
  float* const v = At::kPackHead ? head.packed_v(keys.begin) : scratch.values[0];
  return {keys, tile_of(head.k(keys.begin), p.k.stride[1], p.head_dim, k, At::kStride),
          tile_of(head.v(keys.begin), p.v.stride[1], p.head_dim_v, v, At::kStrideV), dk, dv};
}

// Tiles of rows outside: their dQ is complete at once, dK and dV of the part are sums in memory.
static void walk_rows(const Item& item, Scratch& scratch) {
  const Params& p = item.p;
  const HeadOf first = item.head(0);
  memset(first.dk_sum(0, item.part), 0, sizeof(float) * p.seqlen_k * At::kStride);
  memset(first.dv_sum(0, item.part), 0, sizeof(float) * p.seqlen_k * At::kStrideV);
  Rows& tile = *reinterpret_cast<Rows*>(scratch.rows);
  const int64_t tiles = ceil_div(p.seqlen_q, kTileM);
  item.each_tile([&](int64_t index) {
    const HeadOf head = item.head(index / tiles);
    const Range rows = tile_at(index % tiles, kTileM, head.all_rows()), seen = head.keys_for(rows);
    open_rows(tile, head.source(rows));
    memset(scratch.dq, 0, sizeof(scratch.dq));
    for (int n = seen.begin / kTileN * kTileN; n < seen.end; n += kTileN) {
      if (At::kIntervals && head.bounds(n).hides_all(rows)) continue;
      const Range keys = tile_at(n / kTileN, kTileN, head.all_keys());
      const KeyTile there = open_keys(head, keys, scratch, head.dk_sum(n, item.part), head.dv_sum(n, item.part));
      Step{head, scratch.cells}(tile, rows, scratch.dq, there);
    }
    store_query_gradient(head.dq(rows.begin), p.dq.stride[1], scratch.dq, 1, 0, p.scale, rows.size(), p.head_dim);
  });
}

// Tiles of keys outside: their dK and dV are complete at once, dQ of the part is a sum in memory.
static void walk_keys(const Item& item, Scratch& scratch) {
  const Params& p = item.p;
  for (int index = 0; index < item.group(); ++index)
    memset(item.head(index).dq_sum(0, item.part), 0, sizeof(At::QueryGradient) * ceil_div(p.seqlen_q, kTileM));
  item.each_tile([&](int64_t index) {
    const HeadOf first = item.head(0);
    const Range keys = tile_at(index, kTileN, first.all_keys());
    memset(scratch.dk, 0, sizeof(scratch.dk));
    memset(scratch.dv, 0, sizeof(scratch.dv));
    const KeyTile here = open_keys(first, keys, scratch, scratch.dk[0], scratch.dv[0]);
    for (int index = 0; index < item.group(); ++index) {
      const HeadOf head = item.head(index);
      const Range seeing = head.rows_for(keys);
      for (int m = seeing.begin / kTileM * kTileM; m < seeing.end; m += kTileM) {
        const Range rows = tile_at(m / kTileM, kTileM, head.all_rows());
        if (At::kIntervals && head.bounds(keys.begin).hides_all(rows)) continue;
        Step{head, scratch.cells}(head.rows(m), rows, head.dq_sum(m, item.part), here);
      }
    }
    const int count = keys.size();
    store_key_gradient(first.dk(keys.begin), p.dk.stride[1], here.dk, At::kStride, 1, 0, p.scale, count, p.head_dim);
    store_key_gradient(first.dv(keys.begin), p.dv.stride[1], here.dv, At::kStrideV, 1, 0, 1, count, p.head_dim_v);
  });
}

// ---- Before and after -----------------------------------------------------------------------------------------------

// Bounds of the tiles of intervals, packed keys and values.
static void prepare_keys(const Params& p) {
  const int64_t tiles = ceil_div(p.seqlen_k, kTileN);
  share<kBlocked>(tiles * p.batch * p.kv_heads, [&](int64_t item) {
    const int64_t kv_head = item / tiles % p.kv_heads, batch = item / tiles / p.kv_heads;
    const HeadOf head(p, batch, kv_head * (p.heads / p.kv_heads));
    const Range keys = tile_at(item % tiles, kTileN, head.all_keys());
    const int n = keys.begin, count = keys.size();
    if constexpr (At::kPackHead) {
      pack(head.packed_k(n), At::kStride, head.k(n), p.k.stride[1], count, p.head_dim);
      pack(head.packed_v(n), At::kStrideV, head.v(n), p.v.stride[1], count, p.head_dim_v);
    }
    if constexpr (At::kIntervals)  // several kv heads may share a mask head: the first of them makes its bounds
      if (kv_head % (p.kv_heads / p.mask_heads) == 0) head.bounds(n) = head.intervals.bounds(keys);
  });
}

// `body` for every tile of rows of every head.
template <class Body>
static void each_row_tile(const Params& p, Body body) {
  const int64_t tiles = ceil_div(p.seqlen_q, kTileM);
  share<kBlocked>(tiles * p.batch * p.heads, [&](int64_t item) {
    const HeadOf head(p, item / tiles / p.heads, item / tiles % p.heads);
    body(head, tile_at(item % tiles, kTileM, head.all_rows()));
  });
}

// dQ, or dK and dV, from the sums of all parts.
static void add_parts(const Params& p) {
  const int parts = At::parts(p);
  if constexpr (!At::kQOuter) {
    each_row_tile(p, [&](const HeadOf& head, Range rows) {
      const int64_t apart = head.parts_apart_q() * (sizeof(At::QueryGradient) / sizeof(float));
      const int m = rows.begin;
      store_query_gradient(head.dq(m), p.dq.stride[1], head.dq_sum(m, 0), parts, apart, p.scale, rows.size(), p.head_dim);
    });
    return;
  }
  const int64_t tiles = ceil_div(p.seqlen_k, kTileN);
  share<kBlocked>(tiles * p.batch * p.kv_heads, [&](int64_t item) {
    const int64_t kv_head = item / tiles % p.kv_heads, batch = item / tiles / p.kv_heads;
    const HeadOf head(p, batch, kv_head * (p.heads / p.kv_heads));
    const Range keys = tile_at(item % tiles, kTileN, head.all_keys());
    const int n = keys.begin, count = keys.size();
    const int64_t apart = head.parts_apart_k();
    store_key_gradient(head.dk(n), p.dk.stride[1], head.dk_sum(n, 0), At::kStride, parts, apart * At::kStride, p.scale,
                       count, p.head_dim);
    store_key_gradient(head.dv(n), p.dv.stride[1], head.dv_sum(n, 0), At::kStrideV, parts, apart * At::kStrideV, 1,
                       count, p.head_dim_v);
  });
}

static void backward(const Params& p) {
  if constexpr (At::kPackHead || At::kIntervals) prepare_keys(p);
  if constexpr (!At::kQOuter)
    each_row_tile(p, [](const HeadOf& head, Range rows) { open_rows(head.rows(rows.begin), head.source(rows)); });
  const int parts = At::parts(p);
  const int64_t planes = int64_t(p.batch) * p.kv_heads;
  share<kBlocked>(planes * parts, [&](int64_t index) {
    const int64_t plane = index / parts;
    const Item item{p, plane / p.kv_heads, plane % p.kv_heads, int(index % parts), parts};
    Scratch scratch;
    if constexpr (At::kQOuter)
      walk_rows(item, scratch);
    else
      walk_keys(item, scratch);
  });
  add_parts(p);
}

// ---- What a caller links to -----------------------------------------------------------------------------------------

enum Error { kOk, kNullPointer, kBadSizes, kBadHeadDim, kNoWorkspace };

static Error check(const Params& p) {
  const fagen_tensor* const needed[] = {&p.q, &p.k, &p.v, &p.o, &p.dout, &p.dq, &p.dk, &p.dv};
  for (const fagen_tensor* t : needed)
    if (!t->data) return kNullPointer;
  if (!p.lse || (At::kIntervals && !p.intervals.data) || (Config::kAlibi && !p.alibi_slopes.data)) return kNullPointer;
  if (Config::kDropout && !p.rng) return kNullPointer;
  if (p.batch < 1 || p.heads < 1 || p.kv_heads < 1 || p.heads % p.kv_heads) return kBadSizes;
  if (p.seqlen_q < 1 || p.seqlen_k < 1 || p.seqlen_q > Band::kLongest || p.seqlen_k > Band::kLongest) return kBadSizes;
  if (At::kIntervals && (p.mask_heads < 1 || p.kv_heads % p.mask_heads)) return kBadSizes;
  if (p.head_dim < 1 || p.head_dim > Config::kHeadDim) return kBadHeadDim;
  if (p.head_dim_v < 1 || p.head_dim_v > Config::kHeadDimV) return kBadHeadDim;
  return At::Workspace(p).total && !p.workspace ? kNoWorkspace : kOk;
}

extern "C" {

int fagen_launch(const fagen_backward_params* params, void* /*stream*/) {
  const Error error = check(*params);
  if (error == kOk) backward(*params);
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

uint64_t fagen_workspace_bytes(const fagen_backward_params* params) { return At::Workspace(*params).total; }

}  // extern "C"

// Name, offset and size of every field of the params, as this compiler laid them out.
#include <stddef.h>
#include <stdio.h>

extern "C" const char* fagen_params_layout(void) {
  static char text[1231];
  static const char* const told = [] {
    char* end = text;
#define FAGEN_FIELD(field) \
  end += snprintf(end, text + sizeof text - end, "%s %zu %zu; ", #field, offsetof(fagen_backward_params, field), \
                  sizeof(fagen_backward_params::field))
    FAGEN_FIELD(q.data); FAGEN_FIELD(q.stride); FAGEN_FIELD(k.data); FAGEN_FIELD(k.stride); FAGEN_FIELD(v.data);
    FAGEN_FIELD(v.stride); FAGEN_FIELD(o.data); FAGEN_FIELD(o.stride); FAGEN_FIELD(dout.data);
    FAGEN_FIELD(dout.stride); FAGEN_FIELD(dq.data); FAGEN_FIELD(dq.stride); FAGEN_FIELD(dk.data);
    FAGEN_FIELD(dk.stride); FAGEN_FIELD(dv.data); FAGEN_FIELD(dv.stride); FAGEN_FIELD(intervals.data);
    FAGEN_FIELD(intervals.stride); FAGEN_FIELD(alibi_slopes.data); FAGEN_FIELD(alibi_slopes.stride);
    FAGEN_FIELD(lse); FAGEN_FIELD(dlse); FAGEN_FIELD(workspace); FAGEN_FIELD(batch); FAGEN_FIELD(heads);
    FAGEN_FIELD(kv_heads); FAGEN_FIELD(mask_heads); FAGEN_FIELD(seqlen_q); FAGEN_FIELD(seqlen_k);
    FAGEN_FIELD(head_dim); FAGEN_FIELD(head_dim_v); FAGEN_FIELD(window_left); FAGEN_FIELD(window_right);
    FAGEN_FIELD(scale); FAGEN_FIELD(softcap); FAGEN_FIELD(dropout); FAGEN_FIELD(rng);
#undef FAGEN_FIELD
    snprintf(end, text + sizeof text - end, "sizeof %zu", sizeof(fagen_backward_params));
    return text;
  }();
  return told;
}
