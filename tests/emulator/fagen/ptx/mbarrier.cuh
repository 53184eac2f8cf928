#pragma once
#include <cuda_runtime.h>

namespace fagen::ptx {

inline void mbarrier_init(uint32_t barrier, int arrivals) {
  emulator::now->block->at(barrier, 8);
  emulator::now->block->barriers[emulator::offset_of(barrier)] = {arrivals, arrivals, 0, 0};
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint32_t barrier) { emulator::arrive_at(emulator::barrier(barrier)); }
inline void mbarrier_arrive_at(uint32_t barrier, int block) {
  emulator::arrive_at(emulator::barrier(barrier, emulator::now->block->cluster->blocks[block].get()));
}
inline void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  emulator::barrier(barrier).bytes += bytes;
  mbarrier_arrive(barrier);
}
inline void mbarrier_wait(uint32_t barrier, int parity) {
  const emulator::Barrier& found = emulator::barrier(barrier);
  emulator::wait({&found.phase, unsigned(parity), 1, "barrier at", emulator::offset_of(barrier)});
}
inline uint32_t ld_shared_4(uint32_t from) { return emulator::shared_at<uint32_t>(from); }

}  // namespace fagen::ptx
