// Blocks of the backward kernel that prepare rows or round dQ, where no kernels of their own do (sections.cuh).
#pragma once
#include "fagen/sm90/backward/epilogue.cuh"
#include "fagen/sm90/backward/prologue.cuh"

namespace fagen {

template <class C, class Element>
struct Helper {
  using L = BackwardLayout<C>;

  const fagen_backward_params& p;
  const BackwardLaunch& launch;
  const Sections& sections;

  // A block's waits and counts: one thread's, for all.
  static __device__ __forceinline__ void wait(const unsigned* counter, unsigned number) {
    if (threadIdx.x == 0) ptx::wait_for_count(counter, number);
    __syncthreads();
  }
  static __device__ __forceinline__ void count(unsigned* counter) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) ptx::count(counter, 1);
  }

  __device__ __forceinline__ void prepare(uint32_t section, uint32_t first, uint32_t end) const {
    if (section >= Sections::kPlaces && !launch.one_key_tile)
      wait(sections.rounded(section - Sections::kPlaces), sections.helpers);
    for (uint32_t tile = first; tile < end; ++tile) prepare_rows<C, Element, L::kThreads>(p, launch, tile);
    count(sections.prepared(section));
  }
  __device__ __forceinline__ void round(uint32_t section, uint32_t first, uint32_t end) const {
    constexpr int kChunks = DqShare<C>::kRowChunks;
    wait(sections.finished(section), sections.key_tiles_of(section) * DqShare<C>::kAdders);
    for (uint32_t chunk = first * kChunks + threadIdx.x / 128; chunk < end * kChunks; chunk += L::kThreads / 128)
      round_rows<C, Element>(p, launch, chunk);
    count(sections.rounded(section));
  }
  __device__ __forceinline__ void run(const Step& step) const {
    const uint32_t begin = step.section * sections.row_tiles,
                   end = min(begin + sections.row_tiles, sections.all_row_tiles);
    const uint32_t first = begin + step.index * Sections::kHelperTiles, last = min(first + Sections::kHelperTiles, end);
    if (step.task == Task::prepare) prepare(step.section, first, last);
    if (step.task == Task::round && !launch.one_key_tile) round(step.section, first, last);
  }
};

}  // namespace fagen
