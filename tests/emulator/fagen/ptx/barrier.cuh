#pragma once
#include <cuda_runtime.h>

namespace fagen::ptx {
inline void barrier_sync(int id, int threads) {
  emulator::meet(emulator::now->block->meetings[id], threads, "named barrier", id);
}
inline bool barrier_any(int id, int threads, bool vote) {
  auto& block = *emulator::now->block;
  const unsigned turn = block.meetings[id].generation;
  bool& any = block.votes[id][turn % 3];
  any |= vote;
  block.votes[id][(turn + 1) % 3] = false;
  barrier_sync(id, threads);
  return any;
}
}  // namespace fagen::ptx
