// Both products of decode. Columns of head_dim lie along the lanes, so that each element of the cache is loaded, and
// converted, once for a few rows of q; rows and keys are blocked in registers.
#pragma once
#include "fagen/cpu/element.h"

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
