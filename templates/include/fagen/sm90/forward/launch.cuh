// The host's part of the forward kernel: workspace, tensor maps, grid.
#pragma once
#include "fagen/host/launch.cuh"
#include "fagen/host/prepare.cuh"
#include "fagen/host/tensor_map.cuh"
#include "fagen/sm90/forward/kernel.cuh"
#include "fagen/sm90/forward/prologue.cuh"

namespace fagen {

// With heads packed, how many: of those that share keys, as many as divide them and fit in a tile, if tiles are no more
// than a sixteenth beyond the fewest. A tile has whole rows of q; see size_point.packed_heads in Python.
template <class C>
static int packed_heads(const fagen_forward_params& p) {
  if (!C::kPackHeads) return 1;
  const int group = p.heads / p.kv_heads;
  const auto tiles = [&](int packed) { return int64_t(ceil_div(p.seqlen_q, C::kTileM / packed)) * (group / packed); };
  int best = 1;
  int64_t fewest = tiles(1);
  for (int packed = 2; packed <= group && packed <= 64; ++packed) {
    if (group % packed) continue;
    const int64_t these = tiles(packed);
    if (these < fewest) fewest = these;
    if (16 * these <= 17 * fewest) best = packed;
  }
  return best;
}

// Row tiles of a head, or of heads that are packed; those of a cluster count as one. With intervals some may end early
// where a document does: there is room for some more of them.
template <class C>
static int count_row_tiles(const fagen_forward_params& p) {
  const int tiles = ceil_div(p.seqlen_q, C::kTileM / packed_heads<C>(p) * C::kCluster);
  return MaskOf<C>::kIntervals ? tiles + tiles / 8 + 1 : tiles;
}

// The workspace: a counter, and for intervals the arrays of LaunchArgs.
template <class C>
struct Workspace {
  static constexpr bool kCounter = C::kSchedule == Schedule::dynamic, kPlanned = MaskOf<C>::kIntervals;
  uint64_t extents, visits, visit_bits, ranks, end;  // where each begins

  explicit Workspace(const fagen_forward_params& p) {
    const auto next = [](uint64_t begin, uint64_t bytes) { return align_workspace(begin + bytes); };
    const auto key_tiles = [&](int keys) { return uint64_t(ceil_div(p.seqlen_k, keys)); };
    const uint64_t planes = kPlanned ? uint64_t(p.batch) * p.mask_heads : 0;
    const uint64_t row_tiles = planes * count_row_tiles<C>(p);
    extents = kCounter ? 256 : 0;
    visits = next(extents, planes * key_tiles(C::kTileN) * C::kIntervalColumns * sizeof(Extent));
    visit_bits = next(visits, row_tiles * sizeof(RowTileVisits));
    ranks = next(visit_bits, row_tiles * VisitBits::kKinds * key_tiles(32 * C::kTileN) * sizeof(VisitBits));
    end = next(ranks, row_tiles * sizeof(int));
  }
  void assign(char* workspace, LaunchArgs& launch) const {
    launch.next_tile_counter = reinterpret_cast<unsigned*>(workspace);
    launch.extents = reinterpret_cast<Extent*>(workspace + extents);
    launch.visits = reinterpret_cast<RowTileVisits*>(workspace + visits);
    launch.visit_bits = reinterpret_cast<VisitBits*>(workspace + visit_bits);
    launch.ranks = reinterpret_cast<int*>(workspace + ranks);
  }
};

// For keys or values whose rows all begin alike in sectors, by blocks that do not split keys: the kernel must have 8
// columns more than they.
static EarlyColumns early_columns(const fagen_tensor& t, int columns, int kernel_columns) {
  if (columns + 8 > kernel_columns || t.stride[1] % 16) return {};
  return {int(reinterpret_cast<uintptr_t>(t.data) / 2 & 8), int(t.stride[0] & 8), int(t.stride[2] & 8)};
}

// The maps of q, k and v.
template <class C>
static cudaError_t make_maps(const fagen_forward_params& p, CUtensorMapDataType type, LaunchArgs& launch) {
  const auto keys = [&](CUtensorMap* map, const fagen_tensor& t, int columns) {
    const Dimension rows = {p.seqlen_k, t.stride[1], C::kTileN / C::kCluster}, heads = {p.kv_heads, t.stride[2], 1};
    return make_map(map, type, t.data, columns, {rows, heads, {p.batch, t.stride[0], 1}});
  };
  if (const cudaError_t e = keys(&launch.k, p.k, p.head_dim)) return e;
  if (const cudaError_t e = keys(&launch.v, p.v, p.head_dim_v)) return e;
  const int packed = launch.packed.by;
  const Dimension rows = {p.seqlen_q, p.q.stride[1], C::kTileM / packed};
  const Dimension heads = {p.heads / packed, p.q.stride[2] * packed, 1}, batch = {p.batch, p.q.stride[0], 1};
  if constexpr (C::kPackHeads)
    return make_map(&launch.q, type, p.q.data, p.head_dim, {{packed, p.q.stride[2], packed}, rows, heads, batch});
  else
    return make_map(&launch.q, type, p.q.data, p.head_dim, {rows, heads, batch});
}

// Count the clusters that run at once, and give the kernel more shared memory than the default. Clusters of several
// blocks may be fewer than the SMs suggest, since the blocks of one lie close together.
template <class C, class Forward>
static cudaError_t count_resident(Forward forward, int index, int& resident) {
  using L = BlockLayout<C>;
  int sms;
  if (const cudaError_t e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, index)) return e;
  if (const cudaError_t e = cudaFuncSetAttribute(forward, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kSmemBytes))
    return e;
  resident = sms * C::kBlocksPerSm;
  if (C::kCluster > 1) {
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {C::kCluster, 1, 1};
    const cudaLaunchConfig_t config = {dim3(C::kCluster), dim3(L::kThreads), L::kSmemBytes, nullptr, &cluster, 1};
    if (const cudaError_t e = cudaOccupancyMaxActiveClusters(&resident, forward, &config)) return e;
    if (resident == 0) return cudaErrorInvalidConfiguration;
  }
  return cudaSuccess;
}

// The heads of a section (sectioned order): as many as their keys and values leave room for, whole groups of heads that
// share them, and such that the last section is not much smaller than the others, since it ends the kernel.
static int heads_of_section(int heads, int group, int64_t fit) {
  const int groups = heads / group;
  const int most = fit < 1 ? 1 : fit < groups ? int(fit) : groups;
  int best = most;
  for (int n = most; 2 * n >= most && n > 0; --n) {
    const auto missing = [&](int at_once) { return (at_once - groups % at_once) % at_once * best; };  // in the last one
    if (missing(n) < missing(best)) best = n;
  }
  return best * group;
}

using Kernel = void (*)(fagen_forward_params, LaunchArgs);

template <class C, class Element>
static int launch_forward(const fagen_forward_params& p, cudaStream_t stream, CUtensorMapDataType type, Kernel prologue,
                          Kernel plan, Kernel forward) {
  using L = BlockLayout<C>;
  int resident;
  const auto find = [&](int index, int& found) { return count_resident<C>(forward, index, found); };
  if (const cudaError_t e = once_per_device(&resident, find)) return e;
  LaunchArgs launch;
  if (p.batch == 0 || p.seqlen_q == 0) return cudaSuccess;
  if (p.seqlen_k == 0) return launch_kernel(prologue, resident, 256, 0, stream, p, launch);
  const int packed = packed_heads<C>(p);
  launch.packed = Divisor(packed), launch.tile_rows = C::kTileM / packed * packed;
  if (const cudaError_t e = make_maps<C>(p, type, launch)) return e;
  if (kLoadsEarly<C>) {
    launch.k_early = early_columns(p.k, p.head_dim, C::kHeadDim);
    launch.v_early = early_columns(p.v, p.head_dim_v, C::kHeadDimV);
  }
  const int heads = p.heads / packed * p.batch, planes = p.batch * p.mask_heads;
  launch.row_tiles = count_row_tiles<C>(p);
  launch.tiles = launch.row_tiles * heads;
  launch.key_tiles = ceil_div(p.seqlen_k, C::kTileN);
  const int64_t head_bytes = int64_t(p.seqlen_k) * (p.head_dim + p.head_dim_v) * sizeof(Element);
  const int group = p.heads / p.kv_heads / packed;
  const int heads_at_once = heads_of_section(heads, group, (int64_t(C::kSectionMb) << 20) / head_bytes);
  launch.order = TileOrder::of<C::kBlockOrder>(launch.row_tiles, p.heads / packed, p.batch, heads_at_once);
  launch.heads_per_kv_head = Divisor(group);

  using W = Workspace<C>;
  W(p).assign(static_cast<char*>(p.workspace), launch);
  if (W::kPlanned || (W::kCounter && launch.tiles > resident))
    if (const cudaError_t e =
            W::kPlanned ? launch_kernel<kPlanners>(plan, kPlanners * planes, kPlannerThreads, 0, stream, p, launch)
                        : launch_kernel(prologue, 1, 32, 0, stream, p, launch))
      return e;

  constexpr bool kSingle = C::kSchedule == Schedule::single;
  constexpr bool kEarly = W::kPlanned || !kSingle;  // many short blocks are not the faster for it
  const int clusters = kSingle || launch.tiles < resident ? launch.tiles : resident;
  return launch_kernel<C::kCluster, kEarly>(forward, clusters * C::kCluster, L::kThreads, L::kSmemBytes, stream, p,
                                            launch);
}

}  // namespace fagen
