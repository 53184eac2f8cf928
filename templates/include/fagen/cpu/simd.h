// Vectors as wide as the machine compiled for. GCC/Clang vector extensions, so one source serves every ISA.
#pragma once
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
