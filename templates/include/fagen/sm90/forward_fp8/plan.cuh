// Intervals: the plan of a launch, made by sm90/forward/prologue.cuh, and the workspace where it lies.
#pragma once
#include "fagen/host/launch.cuh"
#include "fagen/sm90/forward/prologue.cuh"
#include "fagen/sm90/forward_fp8/layout.cuh"

namespace fagen {

// Row tiles of a head. With intervals some may end early where a document does: there is room for some more of them.
template <class C>
static int count_row_tiles(const fagen_forward_params& p) {
  const int tiles = ceil_div(p.seqlen_q, C::kTileM);
  return MaskOf<C>::kIntervals ? tiles + tiles / 8 + 1 : tiles;
}

// A counter, and for intervals the arrays of LaunchArgs.
template <class C>
struct Workspace {
  static constexpr bool kCounter = C::kSchedule == Schedule::dynamic, kPlanned = MaskOf<C>::kIntervals;
  uint64_t extents, visits, visit_bits, ranks, end;  // where each begins

  explicit Workspace(const fagen_forward_params& p) {
    const auto next = [](uint64_t begin, uint64_t bytes) { return align_workspace(begin + bytes); };
    const uint64_t planes = kPlanned ? uint64_t(p.batch) * p.mask_heads : 0;
    const uint64_t row_tiles = planes * count_row_tiles<C>(p);
    const uint64_t extent_bytes = ceil_div(p.seqlen_k, C::kTileN) * C::kIntervalColumns * sizeof(Extent);
    const uint64_t bits_bytes = ceil_div(p.seqlen_k, 32 * C::kTileN) * VisitBits::kKinds * sizeof(VisitBits);
    extents = kCounter ? 256 : 0;
    visits = next(extents, planes * extent_bytes);
    visit_bits = next(visits, row_tiles * sizeof(RowTileVisits));
    ranks = next(visit_bits, row_tiles * bits_bytes);
    end = next(ranks, row_tiles * sizeof(int));
  }
  void assign(void* workspace, LaunchArgs& launch) const {
    char* begin = static_cast<char*>(workspace);
    launch.next_tile_counter = reinterpret_cast<unsigned*>(begin);
    launch.extents = reinterpret_cast<Extent*>(begin + extents);
    launch.visits = reinterpret_cast<RowTileVisits*>(begin + visits);
    launch.visit_bits = reinterpret_cast<VisitBits*>(begin + visit_bits);
    launch.ranks = reinterpret_cast<int*>(begin + ranks);
  }
};

// The config as the plan sees it. With dropout, a row tile's key tiles begin at multiples of 32, as blocks of v do
// here.
template <class C>
struct WholeBlocks : C {
  static constexpr bool kDropout = true;
  static_assert(kBlockKeys == 32, "a key tile is whole blocks of v");
};

}  // namespace fagen
