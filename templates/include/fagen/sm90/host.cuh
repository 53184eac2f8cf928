// From a call to a launch: tensor maps, grid, workspace.
#pragma once
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include "fagen/sm90/forward.cuh"
#include "fagen/sm90/plan.cuh"

// With heads packed, log2 of how many: of those that share keys, as many as a tile of rows can hold evenly.
template <class C>
static int packed_heads(const fagen_params& p) {
  int log2 = 0;
  while (C::kPackHeads && log2 < 6 && p.heads / p.kv_heads % (2 << log2) == 0) ++log2;
  return log2;
}

// Tiles of rows of a head, or of heads that are packed; what a cluster takes together is one. With intervals, some may
// end early where a document does: there is room for some more of them.
template <class C>
static int count_row_tiles(const fagen_params& p) {
  const int rows = p.seqlen_q << packed_heads<C>(p), each = C::kTileM * C::kCluster, tiles = (rows + each - 1) / each;
  return C::kMask == Mask::intervals ? tiles + tiles / 8 + 1 : tiles;
}

// The workspace: a counter; and for intervals their extents, what the tiles of rows see of them, and in which order
// these are taken.
template <class C>
struct Workspace {
  static constexpr bool kCounter = C::kSchedule == Schedule::dynamic, kExtents = C::kMask == Mask::intervals;
  uint64_t extents, spans, parts, ranks, end;  // where each begins

  explicit Workspace(const fagen_params& p) {
    const auto tiles = [](int length, int tile) { return uint64_t(length + tile - 1) / tile; };
    const auto next = [](uint64_t begin, uint64_t bytes) { return (begin + bytes + 255) / 256 * 256; };
    const uint64_t planes = kExtents ? uint64_t(p.batch) * p.mask_heads : 0;
    const uint64_t rows = planes * count_row_tiles<C>(p);
    extents = kCounter ? 256 : 0;
    spans = next(extents, planes * tiles(p.seqlen_k, C::kTileN) * C::kIntervalColumns * sizeof(Extent));
    parts = next(spans, rows * sizeof(Span));
    ranks = next(parts, rows * Part::kKinds * tiles(p.seqlen_k, 32 * C::kTileN) * sizeof(Part));
    end = next(ranks, rows * sizeof(int));
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

// A dimension of a tensor map: its size, the elements from one to the next, and how many of it are in a box.
struct Dimension {
  int size;
  int64_t stride;
  int box;
};

// A tensor of rows of `columns` elements, in boxes of 64 of them.
template <int kDimensions>
static cudaError_t make_map(CUtensorMap* map, CUtensorMapDataType type, const void* base, int columns,
                            const Dimension (&dimensions)[kDimensions]) {
  const auto encode = map_encoder();
  if (!encode) return cudaErrorNotSupported;
  cuuint64_t size[kDimensions + 1] = {cuuint64_t(columns)}, strides[kDimensions];
  cuuint32_t box[kDimensions + 1] = {64}, steps[kDimensions + 1] = {1};
  for (int i = 0; i < kDimensions; ++i) {
    const Dimension& d = dimensions[i];
    size[i + 1] = d.size, box[i + 1] = d.box, steps[i + 1] = 1;
    // a dimension of one never steps, and its stride may be anything; the map wants one that is legal
    strides[i] = d.size > 1 ? d.stride * 2 : 16;
  }
  const CUresult result = encode(map, type, kDimensions + 1, const_cast<void*>(base), size, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The maps of q, k and v.
template <class C>
static cudaError_t make_maps(const fagen_params& p, CUtensorMapDataType type, Launch& launch) {
  const auto keys = [&](CUtensorMap* map, const void* base, const int64_t (&stride)[3], int columns) {
    const Dimension rows = {p.seqlen_k, stride[1], C::kTileN / C::kCluster}, heads = {p.kv_heads, stride[2], 1};
    return make_map(map, type, base, columns, {rows, heads, {p.batch, stride[0], 1}});
  };
  if (const cudaError_t e = keys(&launch.k, p.k, p.k_stride, p.head_dim)) return e;
  if (const cudaError_t e = keys(&launch.v, p.v, p.v_stride, p.head_dim_v)) return e;
  const int packed = 1 << launch.packed;
  const Dimension rows = {p.seqlen_q, p.q_stride[1], C::kTileM / packed};
  const Dimension heads = {p.heads / packed, p.q_stride[2] * packed, 1}, batch = {p.batch, p.q_stride[0], 1};
  if constexpr (C::kPackHeads)
    return make_map(&launch.q, type, p.q, p.head_dim, {{packed, p.q_stride[2], packed}, rows, heads, batch});
  else
    return make_map(&launch.q, type, p.q, p.head_dim, {rows, heads, batch});
}

// How many blocks, or clusters of them, run at once; found out once a device, which is given more shared memory than
// the default as well. Clusters may be fewer than the SMs suggest, since those of one lie close together.
template <class C, class Forward>
static cudaError_t prepare(Forward forward, int* teams) {
  constexpr int kDevices = 64;
  static int known[kDevices];
  static volatile bool ready[kDevices];
  int index = 0;
  if (const cudaError_t e = cudaGetDevice(&index)) return e;
  if (index >= kDevices) return cudaErrorInvalidDevice;
  if (!ready[index]) {  // two threads may both come here; both write the same
    int sms;
    if (const cudaError_t e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, index)) return e;
    if (const cudaError_t e =
            cudaFuncSetAttribute(forward, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape<C>::kSmemBytes))
      return e;
    known[index] = sms * C::kBlocksPerSm;
    if (C::kCluster > 1) {
      cudaLaunchAttribute cluster;
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {C::kCluster, 1, 1};
      const cudaLaunchConfig_t config = {
          dim3(C::kCluster), dim3(Shape<C>::kThreads), Shape<C>::kSmemBytes, nullptr, &cluster, 1};
      if (const cudaError_t e = cudaOccupancyMaxActiveClusters(&known[index], forward, &config)) return e;
      if (known[index] == 0) return cudaErrorInvalidConfiguration;
    }
    ready[index] = true;
  }
  *teams = known[index];
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

// Start a kernel, which may begin before the last one of the stream has ended, ours or not, and waits for that itself.
template <int kCluster = 1, bool kEarly = true, class... Parameters, class... Arguments>
static cudaError_t start(void (*kernel)(Parameters...), int blocks, int threads, int smem, cudaStream_t stream,
                         const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = kEarly;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {kCluster, 1, 1};
  const cudaLaunchConfig_t config = {dim3(blocks), dim3(threads), size_t(smem),
                                     stream,       attributes,    kCluster > 1 ? 2u : 1u};
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

using Body = void (*)(fagen_params, Launch);  // of a kernel

template <class C, class Element>
static int launch_forward(const fagen_params& p, cudaStream_t stream, CUtensorMapDataType type, Body begin, Body plan,
                          Body forward) {
  int resident;  // blocks, or clusters
  if (const cudaError_t e = prepare<C>(forward, &resident)) return e;
  Launch launch;
  if (p.batch == 0 || p.seqlen_q == 0) return cudaSuccess;
  if (p.seqlen_k == 0) return start(begin, resident, 256, 0, stream, p, launch);
  launch.packed = packed_heads<C>(p);
  if (const cudaError_t e = make_maps<C>(p, type, launch)) return e;
  const int heads = (p.heads >> launch.packed) * p.batch, planes = p.batch * p.mask_heads;
  launch.row_tiles = count_row_tiles<C>(p);
  launch.tiles = launch.row_tiles * heads;
  launch.key_tiles = (p.seqlen_k + C::kTileN - 1) / C::kTileN;
  const int64_t head_bytes = int64_t(p.seqlen_k) * (p.head_dim + p.head_dim_v) * sizeof(Element);
  const int sharers = (p.heads / p.kv_heads) >> launch.packed;
  const int heads_at_once = section(heads, sharers, (int64_t(C::kSectionMb) << 20) / head_bytes);
  launch.order = Order::of<C::kBlockOrder>(launch.row_tiles, p.heads >> launch.packed, p.batch, heads_at_once);
  launch.sharers = Divisor(sharers);

  using W = Workspace<C>;
  const W places(p);
  char* workspace = static_cast<char*>(p.workspace);
  launch.taken = reinterpret_cast<unsigned*>(workspace);
  launch.extents = reinterpret_cast<Extent*>(workspace + places.extents);
  launch.spans = reinterpret_cast<Span*>(workspace + places.spans);
  launch.parts = reinterpret_cast<Part*>(workspace + places.parts);
  launch.ranks = reinterpret_cast<int*>(workspace + places.ranks);
  if (W::kExtents || (W::kCounter && launch.tiles > resident))
    if (const cudaError_t e = W::kExtents
                                  ? start<kPlanners>(plan, kPlanners * planes, kPlannerThreads, 0, stream, p, launch)
                                  : start(begin, 1, 32, 0, stream, p, launch))
      return e;

  constexpr bool kSingle = C::kSchedule == Schedule::single;
  constexpr bool kEarly = W::kExtents || !kSingle;  // many short blocks are not the faster for it
  const int teams = kSingle || launch.tiles < resident ? launch.tiles : resident;
  return start<C::kCluster, kEarly>(forward, teams * C::kCluster, Shape<C>::kThreads, Shape<C>::kSmemBytes, stream, p,
                                    launch);
}
