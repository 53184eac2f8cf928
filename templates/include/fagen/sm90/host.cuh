// From a call to a launch: tensor maps, grid, workspace.
#pragma once
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include "fagen/sm90/forward.cuh"
#include "fagen/sm90/plan.cuh"

// The workspace: a counter; and for intervals their extents, what the tiles of rows see of them, and in which order
// these are taken.
// With intervals, tiles of rows may end early where a document does: there is room for some more of them.
template <class C>
static int count_row_tiles(const fagen_params& p) {
  const int tiles = (p.seqlen_q + C::kTileM - 1) / C::kTileM;
  return C::kMask == Mask::intervals ? tiles + tiles / 8 + 1 : tiles;
}

template <class C>
struct Workspace {
  static constexpr bool kCounter = C::kSchedule == Schedule::dynamic, kExtents = C::kMask == Mask::intervals;
  uint64_t extents, spans, counted, order, end;  // where each begins

  explicit Workspace(const fagen_params& p) {
    const auto tiles = [](int length, int tile) { return uint64_t(length + tile - 1) / tile; };
    const auto next = [](uint64_t begin, uint64_t bytes) { return (begin + bytes + 255) / 256 * 256; };
    const uint64_t planes = kExtents ? uint64_t(p.batch) * p.mask_heads : 0;
    const uint64_t rows = planes * count_row_tiles<C>(p);
    extents = kCounter ? 256 : 0;
    spans = next(extents, planes * tiles(p.seqlen_k, C::kTileN) * C::kIntervalColumns * sizeof(Extent));
    counted = next(spans, rows * sizeof(Span));
    order = next(counted, planes * sizeof(unsigned));
    end = next(order, rows * sizeof(int));
  }
};

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

// The number of SMs; and, once a device, more shared memory than the default.
template <class C, class Forward>
static cudaError_t prepare(Forward forward, int* sms) {
  constexpr int kDevices = 64;
  static int known[kDevices];
  static volatile bool ready[kDevices];
  int index = 0;
  if (const cudaError_t e = cudaGetDevice(&index)) return e;
  if (index >= kDevices) return cudaErrorInvalidDevice;
  if (!ready[index]) {  // two threads may both come here; both write the same
    if (const cudaError_t e = cudaDeviceGetAttribute(&known[index], cudaDevAttrMultiProcessorCount, index)) return e;
    if (const cudaError_t e =
            cudaFuncSetAttribute(forward, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape<C>::kSmemBytes))
      return e;
    ready[index] = true;
  }
  *sms = known[index];
  return cudaSuccess;
}

// Of the sectioned order: as many heads at once as their keys and values leave room for, whole groups of heads that
// share them, and such that the last section is not much smaller than the others, since it ends the kernel.
static int section(int heads, int group, int64_t fit) {
  const int groups = heads / group;
  const int most = fit < 1 ? 1 : fit < groups ? int(fit) : groups;
  int best = most;
  for (int n = most; 2 * n >= most && n > 0; --n) {
    const auto left = [&](int at_once) { return (at_once - groups % at_once) % at_once * best; };  // short of whole
    if (left(n) < left(best)) best = n;
  }
  return best * group;
}

// Start a kernel; it may begin before the last one of this launch has ended, and waits for that itself.
template <class... Parameters, class... Arguments>
static cudaError_t start(void (*kernel)(Parameters...), int blocks, int threads, int smem, cudaStream_t stream,
                         bool early, const Arguments&... arguments) {
  cudaLaunchAttribute overlap = {cudaLaunchAttributeProgrammaticStreamSerialization};
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {dim3(blocks), dim3(threads), size_t(smem), stream};
  config.attrs = &overlap;
  config.numAttrs = early;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

using Body = void (*)(fagen_params, Launch);  // of a kernel

template <class C, class Element>
static int launch_forward(const fagen_params& p, cudaStream_t stream, CUtensorMapDataType type, Body begin, Body rank,
                          Body forward) {
  int sms;
  if (const cudaError_t e = prepare<C>(forward, &sms)) return e;
  Launch launch;
  if (p.batch == 0 || p.seqlen_q == 0) return cudaSuccess;
  if (p.seqlen_k == 0) return start(begin, sms, 256, 0, stream, false, p, launch);
  if (const cudaError_t e =
          make_map(&launch.q, type, p.q, p.q_stride, p.head_dim, p.seqlen_q, p.heads, p.batch, C::kTileM))
    return e;
  if (const cudaError_t e =
          make_map(&launch.k, type, p.k, p.k_stride, p.head_dim, p.seqlen_k, p.kv_heads, p.batch, C::kTileN))
    return e;
  if (const cudaError_t e =
          make_map(&launch.v, type, p.v, p.v_stride, p.head_dim_v, p.seqlen_k, p.kv_heads, p.batch, C::kTileN))
    return e;
  const int heads = p.heads * p.batch, planes = p.batch * p.mask_heads;
  launch.row_tiles = count_row_tiles<C>(p);
  launch.tiles = launch.row_tiles * heads;
  launch.key_tiles = (p.seqlen_k + C::kTileN - 1) / C::kTileN;
  const int64_t head_bytes = int64_t(p.seqlen_k) * (p.head_dim + p.head_dim_v) * sizeof(Element);
  launch.heads_at_once = section(heads, p.heads / p.kv_heads, (int64_t(C::kSectionMb) << 20) / head_bytes);

  using W = Workspace<C>;
  const W places(p);
  char* workspace = static_cast<char*>(p.workspace);
  launch.taken = reinterpret_cast<unsigned*>(workspace);
  launch.extents = reinterpret_cast<Extent*>(workspace + places.extents);
  launch.spans = reinterpret_cast<Span*>(workspace + places.spans);
  launch.counted = reinterpret_cast<unsigned*>(workspace + places.counted);
  launch.order = reinterpret_cast<int*>(workspace + places.order);
  if (W::kCounter || W::kExtents) {
    const int64_t warps = W::kExtents ? int64_t(launch.key_tiles) * planes : 1;
    if (const cudaError_t e = start(begin, int((warps + 7) / 8), 256, 0, stream, false, p, launch)) return e;
  }
  if (W::kExtents)
    if (const cudaError_t e = start(rank, planes * ((launch.row_tiles + 7) / 8), 256, 0, stream, true, p, launch))
      return e;

  const int resident = sms * C::kBlocksPerSm;
  const int blocks = C::kSchedule == Schedule::single || launch.tiles < resident ? launch.tiles : resident;
  return start(forward, blocks, Shape<C>::kThreads, Shape<C>::kSmemBytes, stream, W::kCounter || W::kExtents, p,
               launch);
}
