// Memory and time of the device that the program is compiled for: a GPU, or the CPU.
#pragma once
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __CUDACC__
#include <cuda_runtime.h>

inline void must(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  exit(1);
}
inline void* allocate(size_t bytes) {
  void* memory = nullptr;
  must(cudaMalloc(&memory, bytes ? bytes : 1), "cudaMalloc");
  return memory;
}
inline void release(void* memory) { must(cudaFree(memory), "cudaFree"); }
inline void copy(void* to, const void* from, size_t bytes) {
  must(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "cudaMemcpy");
}
inline void finish() { must(cudaDeviceSynchronize(), "the kernel"); }
#else
inline void* allocate(size_t bytes) {
  void* memory = aligned_alloc(256, (bytes / 256 + 1) * 256);
  if (memory) return memory;
  fprintf(stderr, "no memory: %zu bytes\n", bytes);
  exit(1);
}
inline void release(void* memory) { free(memory); }
inline void copy(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
inline void finish() {}
#endif
