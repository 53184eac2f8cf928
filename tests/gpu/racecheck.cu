// Kernels without a race, and one with: what does compute-sanitizer's racecheck see of the ways that ours take?
// A producer fills a stage of 1 KB again and again, 128 consumers read it; or two groups of 128 threads share a box.
#include <cstdint>
#include <cstdio>

#include <cuda_runtime.h>

constexpr int kRounds = 8;

__device__ void init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ void wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again_%=;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ void copy(uint32_t to, const float* from, uint32_t barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 1024;" ::"r"(barrier) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 1024, [%2];" ::"r"(to),
               "l"(from), "r"(barrier)
               : "memory");
}

// kEach: every consumer arrives when it has read; else the first lane of a warp, behind __syncwarp().
template <bool kEach, bool kCopies>
__device__ void ring(const float* in, float* out) {
  __shared__ alignas(128) float stage[256];
  __shared__ alignas(8) uint64_t barriers[2];
  const uint32_t full = __cvta_generic_to_shared(barriers), empty = full + 8, tile = __cvta_generic_to_shared(stage);
  if (threadIdx.x == 0) {
    init(full, 1), init(empty, kEach ? 128 : 4);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  float sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    if (threadIdx.x < 128) {
      wait(full, round & 1);
      sum += stage[threadIdx.x] + stage[255 - threadIdx.x];
      if (!kEach) __syncwarp();
      if (kEach || threadIdx.x % 32 == 0) arrive(empty);
    } else if (threadIdx.x == 128) {
      wait(empty, (round & 1) ^ 1);
      if (kCopies) {
        copy(tile, in + round * 256, full);
      } else {
        for (int i = 0; i < 256; ++i) stage[i] = in[round * 256 + i];
        arrive(full);
      }
    }
  }
  if (threadIdx.x < 128) out[threadIdx.x] = sum;
}
extern "C" __global__ void copies_each(const float* in, float* out) { ring<true, true>(in, out); }
extern "C" __global__ void copies_lane(const float* in, float* out) { ring<false, true>(in, out); }
extern "C" __global__ void stores_each(const float* in, float* out) { ring<true, false>(in, out); }
extern "C" __global__ void stores_lane(const float* in, float* out) { ring<false, false>(in, out); }

// One group writes, the other reads. kArrive: who need not wait arrives alone.
template <bool kArrive>
__device__ void box(const float* in, float* out) {
  __shared__ float shared[128];
  const int place = threadIdx.x % 128;
  float sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    if (threadIdx.x < 128) {
      shared[place] = in[round * 128 + place];
      if (kArrive)
        asm volatile("bar.arrive 1, 256;" ::: "memory");
      else
        asm volatile("bar.sync 1, 256;" ::: "memory");
      asm volatile("bar.sync 2, 256;" ::: "memory");
    } else {
      asm volatile("bar.sync 1, 256;" ::: "memory");
      sum += shared[127 - place];
      if (kArrive)
        asm volatile("bar.arrive 2, 256;" ::: "memory");
      else
        asm volatile("bar.sync 2, 256;" ::: "memory");
    }
  }
  if (threadIdx.x >= 128) out[place] = sum;
}
extern "C" __global__ void box_sync(const float* in, float* out) { box<false>(in, out); }
extern "C" __global__ void box_arrive(const float* in, float* out) { box<true>(in, out); }

extern "C" __global__ void raced(const float* in, float* out) {
  __shared__ float shared[128];
  if (threadIdx.x == 128) {
    for (int i = 0; i < 128; ++i) shared[i] = in[i];
  }
  if (threadIdx.x < 128) out[threadIdx.x] = shared[threadIdx.x];
}

int main() {
  float *in, *out;
  cudaMalloc(&in, 1 << 16), cudaMalloc(&out, 4096), cudaMemset(in, 0, 1 << 16);
  for (auto kernel : {copies_each, copies_lane, stores_each, stores_lane, raced}) kernel<<<2, 160>>>(in, out);
  for (auto kernel : {box_sync, box_arrive}) kernel<<<2, 256>>>(in, out);
  const cudaError_t error = cudaDeviceSynchronize();
  printf("%s\n", cudaGetErrorString(error));
  return error != cudaSuccess;
}
