#pragma once
#include <cuda_runtime.h>

namespace fagen::ptx {

inline uint32_t shared_address(const void* pointer) {
  const uint32_t offset = static_cast<const unsigned char*>(pointer) - emulator::dynamic_shared();
  return emulator::now->block->rank << 24 | (offset + emulator::shared_base);
}
inline void cp_async_16(uint32_t to, const void* from, bool valid) {
  uint4* place = &emulator::shared_at<uint4>(to);
  emulator::now->copies.open.push_back(
      [=] { *place = valid ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0); });
}
// Copies land when they are waited for, or at once.
inline void cp_async_commit() {
  emulator::now->copies.commit();
  if (emulator::chance(2)) emulator::now->copies.finish(0);
}
template <int kPending>
void cp_async_wait() {
  emulator::now->copies.finish(kPending);
}
inline void st_shared_16(uint32_t to, uint4 value) { emulator::shared_at<uint4>(to) = value; }
inline uint4 ld_shared_16(uint32_t from) { return emulator::shared_at<uint4>(from); }
inline void st_shared_4(uint32_t to, uint32_t value) { emulator::shared_at<uint32_t>(to) = value; }

}  // namespace fagen::ptx
