// Products of tiles in shared memory, rectangle by rectangle in registers: plain FMAs, 16-byte loads.
#pragma once

namespace fagen {

__device__ __forceinline__ void load_4(float (&x)[4], const float* from) {
  *reinterpret_cast<float4*>(x) = *reinterpret_cast<const float4*>(from);
}

template <int kRows, int kColumns>
__device__ __forceinline__ void clear(float (&sums)[kRows][kColumns]) {
#pragma unroll
  for (auto& row : sums)
#pragma unroll
    for (float& sum : row) sum = 0.f;
}

template <int kRows, int kColumns>
__device__ __forceinline__ void add(float (&sums)[kRows][kColumns], const float (&more)[kRows][kColumns]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) sums[i][j] += more[i][j];
}

// sums[i][j] += row i of a times row j of b, kDepth numbers each. Rows are kStepA and kStepB floats apart.
template <int kDepth, int kStepA, int kStepB, int kRows, int kColumns>
__device__ __forceinline__ void multiply_rows(float (&sums)[kRows][kColumns], const float* a, const float* b) {
  static_assert(kDepth % 4 == 0, "loads are of four numbers");
#pragma unroll 1
  for (int d = 0; d < kDepth; d += 4) {
    alignas(16) float of_a[kRows][4], of_b[4];
#pragma unroll
    for (int i = 0; i < kRows; ++i) load_4(of_a[i], a + i * kStepA + d);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      load_4(of_b, b + j * kStepB + d);
#pragma unroll
      for (int e = 0; e < 4; ++e)
#pragma unroll
        for (int i = 0; i < kRows; ++i) sums[i][j] += of_a[i][e] * of_b[e];
    }
  }
}

// sums[i][4 q + c] += row i of a times column kQuadStep q + c of b, c = 0 ... 3, kDepth numbers each. Rows of a are
// kStepA floats apart, rows of b kStepB.
template <int kDepth, int kStepA, int kStepB, int kQuadStep, int kRows, int kColumns>
__device__ __forceinline__ void multiply_columns(float (&sums)[kRows][kColumns], const float* a, const float* b) {
  static_assert(kDepth % 4 == 0 && kColumns % 4 == 0, "loads are of four numbers");
#pragma unroll 1
  for (int n = 0; n < kDepth; n += 4) {
    alignas(16) float of_a[kRows][4], of_b[4];
#pragma unroll
    for (int i = 0; i < kRows; ++i) load_4(of_a[i], a + i * kStepA + n);
#pragma unroll
    for (int e = 0; e < 4; ++e)
#pragma unroll
      for (int q = 0; q < kColumns / 4; ++q) {
        load_4(of_b, b + (n + e) * kStepB + q * kQuadStep);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int c = 0; c < 4; ++c) sums[i][4 * q + c] += of_a[i][e] * of_b[c];
      }
  }
}

}  // namespace fagen
