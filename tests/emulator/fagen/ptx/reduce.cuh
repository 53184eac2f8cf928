#pragma once
#include <cuda_runtime.h>

namespace fagen::ptx {

constexpr int kReduceWidth = 4;
inline void reduce_add(float* to, float x) { *to += x; }
inline void reduce_add_4(float* to, const float (&x)[4]) {
  if (uintptr_t(to) % 16) emulator::fail("four sums are not aligned");
  for (int i = 0; i < 4; ++i) to[i] += x[i];
}

}  // namespace fagen::ptx
