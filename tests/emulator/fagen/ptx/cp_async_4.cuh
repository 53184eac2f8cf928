#pragma once
#include "fagen/ptx/cp_async.cuh"

namespace fagen::ptx {

inline void cp_async_4(uint32_t to, const void* from, bool valid) {
  uint32_t* place = &emulator::shared_at<uint32_t>(to);
  emulator::now->copies.open.push_back([=] { *place = valid ? *static_cast<const uint32_t*>(from) : 0; });
}

}  // namespace fagen::ptx
