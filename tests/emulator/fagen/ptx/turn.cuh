#pragma once
#include <cuda_runtime.h>

namespace fagen::ptx {

inline void wait_for_turn(const unsigned* counter, unsigned turn) {
  while (*counter != turn) emulator::wait({counter, *counter, ~0u, "turn", turn});
}
inline void pass_turn(unsigned* counter) { ++*counter; }

}  // namespace fagen::ptx
