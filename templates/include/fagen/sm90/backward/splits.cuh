// How many blocks share the visits of a key tile, as the host chooses at a launch: they are a cluster.
#pragma once
#include "fagen/host/launch.cuh"
#include "fagen/sm90/backward/walk.cuh"

namespace fagen {

// Bytes that blocks read of a row of q and dO, and add to of its dQ.
template <class C>
constexpr int kVisitedRowBytes = (C::kHeadDim + C::kHeadDimV) * 2 + C::kHeadDim * 4;

// Blocks that a GPU runs at once.
struct ResidentBlocks {
  int alone, in_clusters[4];  // of 1, 2, 4, 8; 0 where there can be none
};

// Blocks of a cluster lie close together, so that those at once may be fewer than the SMs.
template <class C, class Kernel>
static cudaError_t count_blocks(Kernel kernel, int device, ResidentBlocks& found) {
  using L = BackwardLayout<C>;
  if (const cudaError_t e = cudaDeviceGetAttribute(&found.alone, cudaDevAttrMultiProcessorCount, device)) return e;
  for (int i = 0; i < 4; ++i) {
    const int splits = 1 << i;
    int clusters = splits == 1 ? found.alone : 0;
    if (splits > 1 && splits <= kMostSplits<C>) {
      cudaLaunchAttribute cluster;
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {unsigned(splits), 1, 1};
      const cudaLaunchConfig_t config = {dim3(splits), dim3(L::kThreads), L::kSmemBytes, nullptr, &cluster, 1};
      if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) clusters = 0;
    }
    found.in_clusters[i] = clusters * splits;
  }
  return cudaSuccess;
}

// Row tiles of a head that a key tile sees by the band, on average and at most: of key tiles all along the sequence.
template <class C>
struct SeenRowTiles {
  double average = 0;
  int most = 0;

  explicit SeenRowTiles(const fagen_backward_params& p) {
    constexpr int kSamples = 64;
    const RowBand band(p);
    const int tiles = ceil_div(p.seqlen_k, C::kTileN), samples = tiles < kSamples ? tiles : kSamples;
    for (int i = 0; i < samples; ++i) {
      const int n0 = int(int64_t(tiles) * i / samples) * C::kTileN;
      const int last_key = n0 + C::kTileN < p.seqlen_k ? n0 + C::kTileN - 1 : p.seqlen_k - 1;
      const int begin = band.begin(n0), end = band.end(last_key);
      const int seen = begin < end ? ceil_div(end, C::kTileM) - begin / C::kTileM : 0;
      average += double(seen) / samples;
      if (seen > most) most = seen;
    }
  }
};

// Cycles that the kernel takes, roughly, with so many blocks to a key tile. The factors were fitted to an H200.
template <class C>
struct SplitCost {
  static constexpr double kVisit = 1.9 * C::kTileM * C::kTileN * (3 * C::kHeadDim + 2 * C::kHeadDimV) / 2048;
  static constexpr double kEnds = 6000 + 0.16 * C::kTileN * (C::kHeadDim + C::kHeadDimV);     // of a block
  static constexpr double kMeeting = 2500, kMoved = 0.12 * C::kTileN * (C::kHeadDim + C::kHeadDimV);  // of a cluster
  // Bytes that blocks may read and add to at a time: more than L2 has, since some are not needed yet or no longer.
  // Beyond that a visit is slower.
  static constexpr double kCachedBytes = 64 << 20, kSlower = 0.06;
  static constexpr int kRounds = 3;  // of equal blocks, beyond which they no longer end together

  const fagen_backward_params& p;
  const ResidentBlocks& gpu;
  const SeenRowTiles<C> seen;

  // Each block goes through its heads at a pace of its own, so that all heads of the kv heads at work count.
  double cached_bytes(int splits) const {
    const int64_t all = int64_t(p.kv_heads) * p.batch, key_tiles = ceil_div(p.seqlen_k, C::kTileN);
    const int64_t at_work = ceil_div<int64_t>(gpu.alone, key_tiles * splits);
    const int64_t rows = int64_t(seen.most) * C::kTileM < p.seqlen_q ? seen.most * C::kTileM : p.seqlen_q;
    return double(at_work < all ? at_work : all) * (p.heads / p.kv_heads) * rows * kVisitedRowBytes<C>;
  }
  double operator()(int splits, int resident) const {
    const int group = p.heads / p.kv_heads;
    const double over = cached_bytes(splits) / kCachedBytes - 1;
    const double visit = kVisit * (over > 0 ? 1 + kSlower * over : 1);
    const double ends = kEnds + (splits > 1 ? kMeeting + kMoved * (splits - 1) / splits : 0);
    const double longest = ceil_div(group * seen.most, splits) * visit + ends;
    const double average = group * seen.average / splits * visit + ends;
    const double rounds = double(ceil_div(p.seqlen_k, C::kTileN)) * p.kv_heads * p.batch * splits / resident;
    if (seen.most <= 1.1 * seen.average) return rounds < kRounds ? ceil(rounds) * longest : (rounds + 0.5) * average;
    const double total = rounds * average + 0.5 * longest;
    return total > longest ? total : longest;
  }
};

// The fewest blocks among those that are fastest, to within a hundredth.
template <class C>
static int choose_splits(const fagen_backward_params& p, const ResidentBlocks& gpu) {
  if (kMostSplits<C> == 1 || p.kv_heads == 0) return 1;
  const SplitCost<C> cost = {p, gpu, SeenRowTiles<C>(p)};
  int best = 1;
  double least = cost(1, gpu.in_clusters[0]);
  for (int i = 1; i < 4; ++i) {
    if (gpu.in_clusters[i] == 0) continue;
    const double here = cost(1 << i, gpu.in_clusters[i]);
    if (here < 0.99 * least) best = 1 << i, least = here;
  }
  return best;
}

}  // namespace fagen
