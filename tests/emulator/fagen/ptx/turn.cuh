#pragma once
#include <cuda_runtime.h>

namespace fagen::ptx {

inline void wait_for_turn(const unsigned* counter, unsigned turn) {
  while (*counter != turn) emulator::wait({counter, *counter, ~0u, "turn", turn});
}
inline bool claim(unsigned* counter, unsigned claimed) {
  const bool first = !(*counter & claimed);
  *counter |= claimed;
  return first;
}
inline bool has_bit(const unsigned* counter, unsigned bit) { return *counter & bit; }
inline void wait_for_bit(const unsigned* counter, unsigned bit) {
  while (!(*counter & bit)) emulator::wait({counter, *counter, ~0u, "bit", bit});
}
inline unsigned count(unsigned* counter, unsigned number) {
  *counter += number;
  return *counter - number;
}
inline void pass_turn(unsigned* counter) { ++*counter; }

}  // namespace fagen::ptx
