// Elements as vectors of float, the last ones of a run among them; the maximum and the sum of a softmax.
#pragma once
#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "fagen/abi/tensor.h"
#include "fagen/cpu/element.h"
#include "fagen/cpu/math.h"

namespace fagen {

template <class Element>
Element* element_at(const fagen_tensor& t, int64_t batch, int64_t row, int64_t column = 0) {
  return static_cast<Element*>(t.data) + batch * t.stride[0] + row * t.stride[1] + column;
}

using Whole = std::integral_constant<int, kLanes>;  // all lanes hold elements

// Whole vectors; of half by the instructions for it, where there are some.
template <class Element>
FAGEN_INLINE vec load_whole(const Element* p) {
  return load(p);
}
template <class Element>
FAGEN_INLINE void store_whole(Element* p, vec x) {
  store(p, x);
}
#if defined(__AVX512F__)
FAGEN_INLINE vec load_whole(const half_t* p) {
  return (vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FAGEN_INLINE void store_whole(half_t* p, vec x) {
  const __m256i half = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}
#elif defined(__F16C__)
FAGEN_INLINE vec load_whole(const half_t* p) {
  return (vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FAGEN_INLINE void store_whole(half_t* p, vec x) {
  const __m128i half = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// As `store` rounds, in fewer instructions: a NaN becomes all ones, and two halves of a register are packed by one.
FAGEN_INLINE void store_whole(bfloat_t* p, vec x) {
  const uvec bits = (uvec)x;
  const uvec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) | (uvec)(x != x);
  const __m256i kept = (__m256i)(rounded >> 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
#endif

// Lanes behind the last element are -inf: they change no maximum, and their exponential is 0.
template <class Element>
FAGEN_INLINE vec load_lanes(const Element* p, Whole) {
  return load_whole(p);
}
template <class Element>
FAGEN_INLINE vec load_lanes(const Element* p, int count) {
  return lane_index() < count ? load_some(p, count) : broadcast(-INFINITY);
}
// The same with 0, for sums.
template <class Element>
FAGEN_INLINE vec load_zeros(const Element* p, Whole) {
  return load_whole(p);
}
template <class Element>
FAGEN_INLINE vec load_zeros(const Element* p, int count) {
  return load_some(p, count);
}

template <class Element>
FAGEN_INLINE void store_lanes(Element* p, vec x, Whole) {
  store_whole(p, x);
}
template <class Element>
FAGEN_INLINE void store_lanes(Element* p, vec x, int count) {
  store_some(p, x, count);
}

// Calls body(at, lanes, slot) for all elements of a run, whole vectors first. Slots let sums run side by side.
template <int kSlots, class Body>
FAGEN_INLINE void for_vectors(int64_t count, Body body) {
  int64_t at = 0;
  for (; at + kSlots * kLanes <= count; at += kSlots * kLanes)
#pragma GCC unroll 8
    for (int slot = 0; slot < kSlots; ++slot) body(at + slot * kLanes, Whole(), slot);
  for (; at + kLanes <= count; at += kLanes) body(at, Whole(), 0);
  if (at < count) body(at, int(count - at), 0);
}

template <int kSlots>
FAGEN_INLINE float max_of(const vec (&x)[kSlots]) {
  vec all = x[0];
#pragma GCC unroll 8
  for (int i = 1; i < kSlots; ++i) all = max(x[i], all);
  float top = all[0];
#pragma GCC unroll 16
  for (int i = 1; i < kLanes; ++i) top = all[i] > top ? all[i] : top;
  return top;
}

template <int kSlots>
FAGEN_INLINE float sum_of(const vec (&x)[kSlots]) {
  vec all = x[0];
#pragma GCC unroll 8
  for (int i = 1; i < kSlots; ++i) all += x[i];
  float sum = 0.f;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sum += all[i];
  return sum;
}

FAGEN_INLINE vec exp_of(vec x) { return ScaledExp2(kLog2E)(x); }  // of what is at most 0

// The number to subtract: a maximum of -inf would give NaN for elements that others will outweigh.
FAGEN_INLINE float reference_of(float max) { return max == -INFINITY ? 0.f : max; }
FAGEN_INLINE vec reference_of(vec max) { return max == broadcast(-INFINITY) ? vec{} : max; }

// The maximum of some elements and the sum of exp(x - maximum). Of no element, or of -inf alone: -inf and 0.
// NaN is no maximum, but makes the sum NaN; so does +inf.
struct RowStats {
  float max, sum;
};

// Adds up many numbers with the error of a few: what each addition rounds off goes into the next one.
struct CompensatedSum {
  vec total = {}, excess = {};

  FAGEN_INLINE void add(vec x) {
    const vec corrected = x - excess, sum = total + corrected;
    excess = (sum - total) - corrected;
    total = sum;
  }
};

}  // namespace fagen
