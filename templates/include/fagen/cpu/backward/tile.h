// A tile of rows against a tile of keys: the five products, and between them P and dS.
#pragma once
#include "fagen/cpu/backward/head.h"
#include "fagen/cpu/product.h"

namespace fagen {

// 2^y for y up to 0, 0 below -127. A NaN stays one; what rounds to above 0 is 0.
FAGEN_INLINE vec exp2_of_negative(vec y) {
  y = max(broadcast(-127.0f), y);
  const Exp2Parts e = exp2_parts(y > 0 ? vec{} : y, 1.0f);
  return e.power + e.power * e.excess;
}

// `body` is told how many vectors `count` floats take, as a constant; at most kMost.
template <int kMost, class Body>
FAGEN_INLINE void with_vectors(int count, Body body) {
  if constexpr (kMost > 1)
    if (count <= (kMost - 1) * kLanes) return with_vectors<kMost - 1>(count, body);
  body(std::integral_constant<int, kMost>());
}

// Keys and values of a tile, and where the sums of their gradients lie.
struct KeyTile {
  Range keys;
  Tile k, v;
  float *dk, *dv;
};

template <class Config, class Element>
struct TileStep {
  using At = Layout<Config>;
  using Rows = typename At::Rows;
  static constexpr int kBlockRows = Config::kBlockRows, kBlockVectors = Config::kBlockVectors;
  static constexpr int kWidth = At::kWidth;
  static constexpr bool kBanded = Config::kMask != decltype(Config::kMask)::none;
  // keys of a tile at the edge of the band that take the same rows: few, so that little of what is hidden is multiplied
  static constexpr int kEdgeKeys = 2 * kBlockRows;

  const Head<Config, Element>& head;
  typename At::Cells& cells;

  // Sums into dq and into the key tile's gradients what the rows and keys of the tiles give each other.
  void operator()(const Rows& tile, Range rows, float (*dq)[kWidth], const KeyTile& keys) const {
    bool whole = true, none = true;
    for (int m = 0; m < rows.size(); m += At::kGroup) {
      const Range block = intersect({rows.begin + m, rows.begin + m + At::kGroup}, rows);
      Range seen = intersect(keys.keys, head.keys_for(block));
      bool masked = false;
      if constexpr (kBanded) {
        const Range by_all = head.band.seen_by_all(block);
        masked = seen.begin < by_all.begin || seen.end > by_all.end;
      }
      if constexpr (At::kIntervals) {
        const HiddenBounds& bounds = head.bounds(keys.keys.begin);
        masked |= bounds.hides_any(block);
        if (bounds.hides_all(block)) seen = {};
      }
      if (seen.empty()) seen = {keys.keys.begin, keys.keys.begin};
      if (seen.size() < keys.keys.size()) {
        whole = false;
        clear({keys.keys.begin, seen.begin}, keys.keys.begin, m);
        clear({seen.end, keys.keys.end}, keys.keys.begin, m);
      }
      if (seen.empty()) continue;
      none = false;
      with_vectors<kBlockVectors>(block.size(), [&](auto vectors) {
        if (kBanded && masked)
          advance<vectors, kBanded>(tile, m, block, seen, dq, keys);
        else
          advance<vectors, false>(tile, m, block, seen, dq, keys);
      });
    }
    if (none) return;
    if (whole) return sum_over_rows(tile, {0, rows.size()}, keys.keys, keys);
    for (int n = keys.keys.begin; n < keys.keys.end; n += kEdgeKeys) {
      const Range some = intersect({n, n + kEdgeKeys}, keys.keys), seeing = intersect(rows, head.rows_for(some));
      if (!seeing.empty()) sum_over_rows(tile, {seeing.begin - rows.begin, seeing.end - rows.begin}, some, keys);
    }
  }

 private:
  // P and dS of one register block of rows, and its dQ.
  template <int kVectors, bool kMasked>
  void advance(const Rows& tile, int m, Range block, Range seen, float (*dq)[kWidth], const KeyTile& keys) const {
    const int first = seen.begin - keys.keys.begin, head_dim = head.p.head_dim, head_dim_v = head.p.head_dim_v;
    float *const weights = &cells.weights[first][m], *const gradients = &cells.gradients[first][m];
    const Tile k = keys.k.from(first), v = keys.v.from(first);
    product<Product::scores, kBlockRows, kVectors, kWidth>(k.data, k.stride, seen.size(), &tile.q_lanes[0][m], head_dim,
                                                           weights);
    product<Product::scores, kBlockRows, kVectors, kWidth>(v.data, v.stride, seen.size(), &tile.dout_lanes[0][m],
                                                           head_dim_v, gradients);
    differentiate<kVectors, kMasked>(tile, m, block.begin, seen);
    product<Product::output, kBlockRows, kVectors, kWidth>(k.data, k.stride, head_dim, gradients, seen.size(),
                                                           &dq[0][m]);
  }

  // P = exp(S - lse) and dS = P (dP - delta), in place. With dropout, dP is less what is dropped, and so is the P that
  // is left for dV.
  template <int kVectors, bool kMasked>
  void differentiate(const Rows& tile, int m, int row, Range seen) const {
    const auto score = head.template score<kMasked>();
    const float factor = head.scale.factor;
    vec lse[kVectors], delta[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      lse[v] = load(tile.lse_log2 + m + v * kLanes);
      delta[v] = load(tile.delta + m + v * kLanes);
    }
    const int tile_begin = seen.begin - seen.begin % At::kTileN;
    KeptWeights<Config::kDropout ? At::kTileN : 1, Config::kDropout ? At::kGroup : kLanes> kept;
    if constexpr (Config::kDropout) kept.fill(head.dropout, {row, row + kVectors * kLanes}, seen);
    for (int key = seen.begin; key < seen.end; ++key)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        float* const weight = &cells.weights[key - tile_begin][m + v * kLanes];
        float* const gradient = &cells.gradients[key - tile_begin][m + v * kLanes];
        vec x = load(weight), slope = broadcast(1.0f);
        if constexpr (Config::kSoftcap) {
          const vec capped = tanh(x * score.inner);
          x = score.softcap * capped;
          slope = 1.0f - capped * capped;
        } else if constexpr (Config::kAlibi) {
          x *= score.inner;
        }
        x = score.biased(x, lane_index() + (row + v * kLanes), key);
        if constexpr (kMasked) x = lse[v] == INFINITY ? broadcast(-INFINITY) : x;
        const vec p = exp2_of_negative(x * factor - lse[v]);
        vec dp = load(gradient), used = p;
        if constexpr (Config::kDropout) {
          const ivec keep = kept.at(key - seen.begin, v * kLanes);
          dp = keep ? dp * head.dropout.scale : vec{};
          used = keep ? p * head.dropout.scale : vec{};
        }
        vec ds = p * (dp - delta[v]);
        if constexpr (Config::kSoftcap) ds *= slope;
        store(weight, used);
        store(gradient, ds);
      }
  }

  // dV += P^T dO and dK += dS^T Q, of some keys, over some rows of the tile.
  void sum_over_rows(const Rows& tile, Range rows, Range some, const KeyTile& keys) const {
    const int n = some.begin - keys.keys.begin;
    const auto sum = [&](auto stride, const float* cells, const float* of_rows, float* to, int columns) {
      for (int d = 0; d < columns; d += At::kGroup)
        with_vectors<kBlockVectors>(columns - d, [&](auto vectors) {
          product<Product::sum, kBlockRows, vectors, stride>(cells, kWidth, some.size(), of_rows + d, rows.size(),
                                                             to + d);
        });
    };
    sum(std::integral_constant<int, At::kStrideV>(), &cells.weights[n][rows.begin], tile.dout[rows.begin],
        keys.dv + int64_t(n) * At::kStrideV, head.p.head_dim_v);
    sum(std::integral_constant<int, At::kStride>(), &cells.gradients[n][rows.begin], tile.q[rows.begin],
        keys.dk + int64_t(n) * At::kStride, head.p.head_dim);
  }

  // Cells that no row of a block sees, where a neighbour does.
  void clear(Range some, int tile_begin, int m) const {
    for (int n = some.begin - tile_begin; n < some.end - tile_begin; ++n)
      for (int v = 0; v < kBlockVectors; ++v) {
        store(&cells.weights[n][m + v * kLanes], vec{});
        store(&cells.gradients[n][m + v * kLanes], vec{});
      }
  }
};

}  // namespace fagen
