#pragma once
#include <cuda_runtime.h>

namespace fagen::ptx {

inline float2 ld_shared_8(uint32_t from) { return emulator::shared_at<float2>(from); }
inline void st_shared_16(uint32_t to, float a, float b, float c, float d) {
  emulator::shared_at<float4>(to) = make_float4(a, b, c, d);
}
inline void stmatrix_x2(uint32_t address, uint32_t a, uint32_t b) {
  const uint64_t* rows = emulator::exchange(address, "stmatrix.x2");
  const int lane = emulator::now->thread.x % 32;
  for (int i = 0; i < 2; ++i)
    emulator::shared_at<uint32_t>(uint32_t(rows[i * 8 + lane / 4]) + lane % 4 * 4) = i ? b : a;
}
inline void stmatrix_x4_trans(uint32_t address, const uint32_t (&r)[4]) {
  const uint64_t* rows = emulator::exchange(address, "stmatrix.trans");
  const int lane = emulator::now->thread.x % 32;
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < 2; ++half)
      emulator::shared_at<uint16_t>(uint32_t(rows[i * 8 + lane % 4 * 2 + half]) + lane / 4 * 2) = r[i] >> half * 16;
}

}  // namespace fagen::ptx
