#pragma once
#include <cuda_runtime.h>

namespace fagen::ptx {

inline void add_4(float* to, float a, float b, float c, float d) {
  if (uintptr_t(to) % 16) emulator::fail("four sums are not aligned");
  to[0] += a, to[1] += b, to[2] += c, to[3] += d;
}
inline void wait_for_turn(const unsigned* counter, unsigned turn) {
  while (*counter != turn) emulator::wait({counter, *counter, ~0u, "turn", turn});
}
inline void pass_turn(unsigned* counter) { ++*counter; }

}  // namespace fagen::ptx
