// Chunks of tiles that pass through stages of shared memory, in one order for all threads of a block.
#pragma once
#include "fagen/ptx/cp_async.cuh"
#include "fagen/simt/products.cuh"

namespace fagen {

// next() and done() come once a chunk: between them the chunk is in shared memory. Since next() waits for all threads,
// whatever was written to shared memory before it can be read behind it, and what was read before it may be written.
//
// The source knows the order: load(to) loads its next chunk, if there is one, by cp.async or into registers; store(to)
// brings there what is in registers.
template <class Source, int kStages, int kStageFloats, bool kAsync>
struct ChunkStream {
  Source source;
  float* stages;
  int stage = 0;  // of the chunk that next() returns
  float* free_stage = nullptr;

  __device__ __forceinline__ ChunkStream(const Source& first, float* stages) : source(first), stages(stages) {
    for (int i = 0; i < kStages - 1; ++i) {
      load(i);
      done();
    }
  }

  // Wait for the next chunk, and start loading the one that takes the place of the last.
  __device__ __forceinline__ const float* next() {
    if constexpr (kAsync) ptx::cp_async_wait<kStages - 2>();
    __syncthreads();
    const float* chunk = stages + stage * kStageFloats;
    load(stage == 0 ? kStages - 1 : stage - 1);
    stage = stage == kStages - 1 ? 0 : stage + 1;
    return chunk;
  }
  __device__ __forceinline__ void done() {
    if constexpr (!kAsync) source.store(free_stage);
  }
  __device__ __forceinline__ void finish() const {
    if constexpr (kAsync) ptx::cp_async_wait<0>();
  }

 private:
  __device__ __forceinline__ void load(int to) {
    free_stage = stages + to * kStageFloats;
    source.load(free_stage);
    if constexpr (kAsync) ptx::cp_async_commit();
  }
};

template <int kValue>
struct Depth {
  static constexpr int value = kValue;
};

// Call multiply(sums, chunk, its first column, its depth) for kCount chunks from the `first` one on. kLastDepth: of the
// last one, if that is less.
template <int kCount, int kChunkD, int kLastDepth, class Sums, class Chunks, class Multiply>
__device__ __forceinline__ void multiply_some(Sums& sums, Chunks& chunks, int first, Multiply multiply) {
  constexpr bool kLast = kLastDepth < kChunkD;
#pragma unroll 1
  for (int i = 0; i < kCount - kLast; ++i) {
    multiply(sums, chunks.next(), (first + i) * kChunkD, Depth<kChunkD>{});
    chunks.done();
  }
  if constexpr (kLast) {
    multiply(sums, chunks.next(), (first + kCount - 1) * kChunkD, Depth<kLastDepth>{});
    chunks.done();
  }
}

// The sums over a dimension of kSize, chunk after chunk. Long ones are made of short ones, which round less.
template <int kSize, int kChunkD, class Sums, class Chunks, class Multiply>
__device__ __forceinline__ void multiply_all(Sums& sums, Chunks& chunks, Multiply multiply) {
  constexpr int kCount = (kSize + kChunkD - 1) / kChunkD, kLastDepth = kSize - (kCount - 1) * kChunkD;
  constexpr int kPart = 256 / kChunkD;  // chunks of a short sum
  clear(sums);
  if constexpr (kCount <= kPart) {
    multiply_some<kCount, kChunkD, kLastDepth>(sums, chunks, 0, multiply);
  } else {
    constexpr int kLast = (kCount - 1) % kPart + 1;
    Sums part;
#pragma unroll 1
    for (int first = 0; first < kCount - kLast; first += kPart) {
      clear(part);
      multiply_some<kPart, kChunkD, kChunkD>(part, chunks, first, multiply);
      add(sums, part);
    }
    clear(part);
    multiply_some<kLast, kChunkD, kLastDepth>(part, chunks, kCount - kLast, multiply);
    add(sums, part);
  }
}

}  // namespace fagen
