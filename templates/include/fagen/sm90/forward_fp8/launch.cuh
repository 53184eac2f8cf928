// The host's part of the fp8 forward kernel: tensor maps, grid.
#pragma once
#include "fagen/host/launch.cuh"
#include "fagen/host/prepare.cuh"
#include "fagen/host/tensor_map.cuh"
#include "fagen/sm90/forward_fp8/kernel.cuh"
#include "fagen/sm90/forward_fp8/plan.cuh"

namespace fagen {

constexpr auto kMapType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;  // two e4m3 numbers, as bits

// The map of values: a box is the blocks of a tile's keys, as they are, in rows of one group of 256 bytes.
template <class C>
static cudaError_t make_value_map(const fagen_forward_params& p, CUtensorMap* map) {
  const auto encode = map_encoder();
  if (!encode) return cudaErrorNotSupported;
  const int groups = p.head_dim_v / kCoreColumns, blocks = ceil_div(p.seqlen_k, kBlockKeys);
  const cuuint64_t size[5] = {kGroupBytes / 2, cuuint64_t(groups), cuuint64_t(blocks), cuuint64_t(p.kv_heads),
                              cuuint64_t(p.batch)};
  // a dimension of one never steps, and its stride may be anything; the map wants one that is legal
  const auto stride = [](int size, int64_t bytes) { return cuuint64_t(size > 1 ? bytes : 16); };
  const cuuint64_t strides[4] = {kGroupBytes, stride(blocks, p.v.stride[1]), stride(p.kv_heads, p.v.stride[2]),
                                 stride(p.batch, p.v.stride[0])};
  const cuuint32_t box[5] = {kGroupBytes / 2, C::kHeadDimV / kCoreColumns, C::kTileN / kBlockKeys, 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encode(map, kMapType, 5, p.v.data, size, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The maps of q, k and v. What make_map takes for an element are two e4m3 numbers.
template <class C>
static cudaError_t make_maps(const fagen_forward_params& p, LaunchArgs& launch) {
  const auto rows_of = [&](CUtensorMap* map, const fagen_tensor& t, int rows, int heads, int box) {
    const Dimension dimensions[3] = {
        {rows, t.stride[1] / 2, box}, {heads, t.stride[2] / 2, 1}, {p.batch, t.stride[0] / 2, 1}};
    return make_map(map, kMapType, t.data, p.head_dim / 2, dimensions);
  };
  if (const cudaError_t e = rows_of(&launch.q, p.q, p.seqlen_q, p.heads, C::kTileM)) return e;
  if (const cudaError_t e = rows_of(&launch.k, p.k, p.seqlen_k, p.kv_heads, C::kTileN)) return e;
  return make_value_map<C>(p, &launch.v);
}

// Count the blocks that run at once, and give the kernel more shared memory than the default.
template <class C, class Forward>
static cudaError_t count_resident(Forward forward, int index, int& resident) {
  int sms;
  if (const cudaError_t e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, index)) return e;
  resident = sms * C::kBlocksPerSm;
  return cudaFuncSetAttribute(forward, cudaFuncAttributeMaxDynamicSharedMemorySize, BlockLayout<C>::kSmemBytes);
}

// The heads of a section (sectioned order): whole groups of heads that share keys, as many as the section's keys and
// values leave room for, and about as many in each section.
template <class C>
static int heads_of_section(const fagen_forward_params& p) {
  const int64_t bytes = int64_t(p.seqlen_k) * (p.head_dim + p.head_dim_v), fit = (int64_t(C::kSectionMb) << 20) / bytes;
  const int groups = p.kv_heads * p.batch, most = fit < 1 ? 1 : fit < groups ? int(fit) : groups;
  return ceil_div(groups, ceil_div(groups, most)) * (p.heads / p.kv_heads);
}

using Kernel = void (*)(fagen_forward_params, LaunchArgs);

// The kernel before the forward one, if that needs any.
template <class C>
static cudaError_t launch_before(const fagen_forward_params& p, const LaunchArgs& launch, int resident,
                                 cudaStream_t stream, Kernel prologue, Kernel plan) {
  using W = Workspace<C>;
  if (W::kPlanned)
    return launch_kernel<kPlanners>(plan, kPlanners * p.batch * p.mask_heads, kPlannerThreads, 0, stream, p, launch);
  return W::kCounter && launch.tiles > resident ? launch_kernel(prologue, 1, 32, 0, stream, p, launch) : cudaSuccess;
}

template <class C, class Forward>
static int launch_forward(const fagen_forward_fp8_params& given, cudaStream_t stream, Kernel prologue, Kernel plan,
                          Forward forward) {
  using L = BlockLayout<C>;
  const fagen_forward_params& p = given.forward;
  int resident;
  const auto find = [&](int index, int& found) { return count_resident<C>(forward, index, found); };
  if (const cudaError_t e = once_per_device(&resident, find)) return e;
  LaunchArgs launch;
  if (p.batch == 0 || p.seqlen_q == 0) return cudaSuccess;
  if (p.seqlen_k == 0) return launch_kernel(prologue, resident, 256, 0, stream, p, launch);
  if (const cudaError_t e = make_maps<C>(p, launch)) return e;
  launch.packed = Divisor(1), launch.tile_rows = C::kTileM;
  launch.row_tiles = count_row_tiles<C>(p);
  launch.tiles = launch.row_tiles * p.heads * p.batch;
  launch.key_tiles = ceil_div(p.seqlen_k, C::kTileN);
  launch.order = TileOrder::of<C::kBlockOrder>(launch.row_tiles, p.heads, p.batch, heads_of_section<C>(p));
  launch.heads_per_kv_head = Divisor(p.heads / p.kv_heads);
  Workspace<C>(p).assign(given.workspace, launch);
  if (const cudaError_t e = launch_before<C>(p, launch, resident, stream, prologue, plan)) return e;

  constexpr bool kSingle = C::kSchedule == Schedule::single;
  constexpr bool kEarly = MaskOf<C>::kIntervals || !kSingle;  // many short blocks are not the faster for it
  const int blocks = kSingle || launch.tiles < resident ? launch.tiles : resident;
  return launch_kernel<1, kEarly>(forward, blocks, L::kThreads, L::kSmemBytes, stream, given, launch);
}

}  // namespace fagen
