// The exchange of a consumer warp with the same warp of its peer, the block with the other half of the scores of its
// rows: a number a row, and its 16 rows of a slab of weights.
#pragma once
#include "fagen/ptx/cluster_store.cuh"
#include "fagen/ptx/mbarrier.cuh"
#include "fagen/sm90/smem_layout.cuh"

namespace fagen {

// Two barriers: one completes when 16 numbers are here, one when the weights are. Each side sends its numbers of a tile
// after it has multiplied the weights of the tile before, and its weights after it has read the other's numbers: so
// nothing is overwritten before it has been read.
struct Peer {
  static constexpr int kNumberBytes = 16 * 4, kWeightBytes = 16 * kRowBytes;

  uint32_t numbers, weights;
  int number_phase = 0, weight_phase = 0;

  __device__ __forceinline__ Peer(uint32_t barriers, int warp)
      : numbers(barriers + warp * kBarrierBytes), weights(numbers + 8) {}
  __device__ __forceinline__ void init() const {
    ptx::mbarrier_init(numbers, 1);
    ptx::mbarrier_init(weights, 1);
  }

  // Send this lane's numbers of two rows, if it has any to send, to where they stand in the peer.
  __device__ __forceinline__ void send(const float (&mine)[2], uint32_t to, bool sends, int rank) const {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive_expect(numbers, kNumberBytes);
    if (!sends) return;
    ptx::store_to_block(to, mine[0], numbers, rank);
    ptx::store_to_block(to + 8 * 4, mine[1], numbers, rank);
  }
  __device__ __forceinline__ void wait_for_numbers() {
    ptx::mbarrier_wait(numbers, number_phase);
    number_phase ^= 1;
  }
  // Send the warp's rows of weights, which are visible to copies, to the same place.
  __device__ __forceinline__ void send_weights(uint32_t rows, int rank) const {
    if (threadIdx.x % 32 != 0) return;
    ptx::mbarrier_arrive_expect(weights, kWeightBytes);
    ptx::copy_to_block(rows, kWeightBytes, weights, rank);
  }
  __device__ __forceinline__ void wait_for_weights() {
    ptx::mbarrier_wait(weights, weight_phase);
    weight_phase ^= 1;
  }
};

}  // namespace fagen
