#pragma once
#include <cuda_runtime.h>

namespace fagen::ptx {

template <class Registers>
inline void st_global(void* to, Registers x) {
  if (uintptr_t(to) % sizeof(Registers)) emulator::fail("a store is not aligned");
  *static_cast<Registers*>(to) = x;
}

}  // namespace fagen::ptx
