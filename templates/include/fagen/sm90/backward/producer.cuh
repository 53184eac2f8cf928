// The producer warps: one loads k and q with its LSE and delta, one loads v and dO. One lane of each talks to the copy
// engine.
#pragma once
#include "fagen/ptx/bulk.cuh"
#include "fagen/ptx/tma.cuh"
#include "fagen/sm90/backward/dq.cuh"
#include "fagen/sm90/backward/walk.cuh"

namespace fagen {

template <class C>
struct BackwardProducer {
  using L = BackwardLayout<C>;

  const fagen_backward_params& p;
  const BackwardLaunch& launch;
  const KeyTile<C>& keys;
  BackwardPipelines<C> pipelines;

  template <int kSlabs, int kRows>
  __device__ __forceinline__ void load(const CUtensorMap& map, uint32_t to, uint32_t barrier, int row, int head) const {
    for (int slab = 0; slab < kSlabs; ++slab)
      ptx::tma_load(to + slab * kRows * kRowBytes, &map, barrier, slab * kSlabColumns, row, head, keys.batch);
  }
  __device__ __forceinline__ void load_keys() const {
    ptx::mbarrier_arrive_expect(pipelines.k.full(), L::kKBytes);
    load<L::kSlabs, C::kTileN>(launch.k, pipelines.k.tile(), pipelines.k.full(), keys.n0, keys.kv_head);
  }
  __device__ __forceinline__ void load_values() const {
    ptx::mbarrier_arrive_expect(pipelines.v.full(), L::kVBytes);
    load<L::kSlabsV, C::kTileN>(launch.v, pipelines.v.tile(), pipelines.v.full(), keys.n0, keys.kv_head);
  }
  __device__ __forceinline__ void load_q(const RowTileVisit& at) {
    pipelines.q.acquire();
    ptx::mbarrier_arrive_expect(pipelines.q.full(), L::kQBytes + 2 * L::kStatBytes);
    load<L::kSlabs, C::kTileM>(launch.q, pipelines.q.tile(), pipelines.q.full(), at.tile * C::kTileM, at.head);
    const int64_t tile = row_tile_index<C>(p, launch, keys.batch, at.head, at.tile);
    ptx::bulk_load(pipelines.lse(), launch.lse + tile * C::kTileM, L::kStatBytes, pipelines.q.full());
    ptx::bulk_load(pipelines.delta(), launch.delta + tile * C::kTileM, L::kStatBytes, pipelines.q.full());
    pipelines.q.advance();
  }
  __device__ __forceinline__ void load_dout(const RowTileVisit& at) {
    pipelines.dout.acquire();
    ptx::mbarrier_arrive_expect(pipelines.dout.full(), L::kDoutBytes);
    load<L::kSlabsV, C::kTileM>(launch.dout, pipelines.dout.tile(), pipelines.dout.full(), at.tile * C::kTileM,
                                at.head);
    pipelines.dout.advance();
  }

  // Each is one lane's work.
  __device__ __forceinline__ void run_q() {
    load_keys();
    ptx::wait_for_previous_kernel();  // for the LSE and delta
    keys.walk(p, [&](const RowTileVisit& at) { load_q(at); });
  }
  __device__ __forceinline__ void run_dout() {
    load_values();
    keys.walk(p, [&](const RowTileVisit& at) { load_dout(at); });
  }
  __device__ __forceinline__ void run_both() {
    load_keys(), load_values();
    ptx::wait_for_previous_kernel();
    keys.walk(p, [&](const RowTileVisit& at) { load_q(at), load_dout(at); });
  }
};

}  // namespace fagen
