// The matrix product of both halves of attention, blocked in registers.
//
//   c[row][lane] (+)= sum over step of a(row, step) * b[step][lane]
//
// Queries lie along the lanes of b and c; a is K or V as it lies in memory, read one element at a time and broadcast.
// So neither K nor V is ever transposed, and the softmax needs no sum across lanes.
#pragma once
#include "fagen/cpu/simd.h"

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
