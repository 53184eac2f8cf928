// From a call to a launch: tensor maps, grid, workspace.
#pragma once
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include "fagen/sm90/forward.cuh"

template <class C>
static uint64_t extents_bytes(const fagen_params* p) {
  if (C::kMask != Mask::intervals) return 0;
  const uint64_t tiles = (p->seqlen_k + C::kTileN - 1) / C::kTileN;
  return (sizeof(Extent) * tiles * p->batch * p->mask_heads * C::kIntervalColumns + 255) / 256 * 256;
}

// The driver's encoder, found at run time so that nothing links against the driver.
static PFN_cuTensorMapEncodeTiled_v12000 map_encoder() {
  static PFN_cuTensorMapEncodeTiled_v12000 found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return found;
}

// (column, row, head, batch) of q, k or v, in boxes of 64 columns and `rows` rows.
static cudaError_t make_map(CUtensorMap* map, CUtensorMapDataType type, const void* base, const int64_t (&stride)[3],
                            int cols, int rows, int heads, int batch, int box_rows) {
  const auto encode = map_encoder();
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t size[4] = {cuuint64_t(cols), cuuint64_t(rows), cuuint64_t(heads), cuuint64_t(batch)};
  // a dimension of one never steps, and its stride may be anything; the map wants one that is legal
  const auto bytes = [](int64_t elements, int count) { return cuuint64_t(count > 1 ? elements * 2 : 16); };
  const cuuint64_t strides[3] = {bytes(stride[1], rows), bytes(stride[2], heads), bytes(stride[0], batch)};
  const cuuint32_t box[4] = {64, cuuint32_t(box_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(map, type, 4, const_cast<void*>(base), size, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The L2 size, and, once a device, more shared memory than the default.
template <class C, class Forward>
static cudaError_t prepare(Forward forward, int* l2_bytes) {
  constexpr int kDevices = 64;
  static int known[kDevices];
  static volatile bool ready[kDevices];
  int index = 0;
  if (const cudaError_t e = cudaGetDevice(&index)) return e;
  if (index >= kDevices) return cudaErrorInvalidDevice;
  if (!ready[index]) {  // two threads may both come here; both write the same
    if (const cudaError_t e = cudaDeviceGetAttribute(&known[index], cudaDevAttrL2CacheSize, index)) return e;
    if (const cudaError_t e =
            cudaFuncSetAttribute(forward, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape<C>::kSmemBytes))
      return e;
    ready[index] = true;
  }
  *l2_bytes = known[index];
  return cudaSuccess;
}

template <class C, class Element, class Forward, class Extents>
static int launch_forward(const fagen_params& p, cudaStream_t stream, CUtensorMapDataType type, Forward forward,
                          Extents find) {
  int l2_bytes;
  if (const cudaError_t e = prepare<C>(forward, &l2_bytes)) return e;
  Launch launch;
  if (const cudaError_t e = make_map(&launch.q, type, p.q, p.q_stride, p.head_dim, p.seqlen_q, p.heads, p.batch, 64))
    return e;
  if (const cudaError_t e =
          make_map(&launch.k, type, p.k, p.k_stride, p.head_dim, p.seqlen_k, p.kv_heads, p.batch, C::kTileN))
    return e;
  if (const cudaError_t e =
          make_map(&launch.v, type, p.v, p.v_stride, p.head_dim_v, p.seqlen_k, p.kv_heads, p.batch, C::kTileN))
    return e;
  const int heads = p.heads * p.batch;
  launch.row_tiles = (p.seqlen_q + C::kTileM - 1) / C::kTileM;
  launch.key_tiles = (p.seqlen_k + C::kTileN - 1) / C::kTileN;
  // as many heads at once as fit half of L2 with their keys and values, whole groups of heads that share them
  const int64_t head_bytes = int64_t(p.seqlen_k) * (p.head_dim + p.head_dim_v) * sizeof(Element);
  const int64_t fit = l2_bytes / 2 / head_bytes;
  const int64_t at_once = (fit < 1 ? 1 : fit) * (p.heads / p.kv_heads);
  launch.heads_at_once = at_once < heads ? int(at_once) : heads;
  launch.extents = static_cast<Extent*>(p.workspace);
  if constexpr (C::kMask == Mask::intervals) {
    const int64_t warps = int64_t(launch.key_tiles) * p.batch * p.mask_heads;
    find<<<unsigned((warps + 7) / 8), 256, 0, stream>>>(p, launch.extents, launch.key_tiles);
  }
  forward<<<unsigned(launch.row_tiles) * heads, Shape<C>::kThreads, Shape<C>::kSmemBytes, stream>>>(p, launch);
  return cudaGetLastError();
}
