#pragma once
#include <stdint.h>

namespace fagen::ptx {
inline uint32_t pack_e4m3(float a, float b, float c, float d) {
  const auto byte = [](float x) { return uint32_t(emulator::e4m3_nearest(x)); };
  return byte(a) | byte(b) << 8 | byte(c) << 16 | byte(d) << 24;
}
}  // namespace fagen::ptx
