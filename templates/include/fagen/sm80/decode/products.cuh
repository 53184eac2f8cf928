// A warp's scores and sums of a key tile: the products of 16-bit keys are the shared ones; those of fp8 keys expand
// their operands on the way from shared memory. Visible keys are a range for each row.
#pragma once
#include "fagen/common/fp8.cuh"
#include "fagen/sm80/decode/place.cuh"
#include "fagen/sm80/decode/shape.cuh"

namespace fagen {

template <class C, class Element>
using DecodeWarpProducts = WarpProducts<C, Element, typename DecodeShape<C>::TileQ, typename DecodeShape<C>::TileK,
                                        typename DecodeShape<C>::TileV, DecodeShape<C>::kSlabs,
                                        DecodeShape<C>::kWarpKeys, DecodeShape<C>::kWarpColumns>;

template <class C, class Element>
struct DecodeProducts : DecodeWarpProducts<C, Element> {
  using S = DecodeShape<C>;
  using Base = DecodeWarpProducts<C, Element>;
  using Base::lane;
  using Base::o;
  using Base::softmax;
  using typename Base::Scores;
  using typename Base::Weights;
  using TileQ = typename S::TileQ;
  using TileK = typename S::TileK;
  using TileV = typename S::TileV;
  static constexpr int kRows = S::kSlabs * 2;

  ScoreMod<C> mod;
  int begin[kRows], end[kRows];  // keys that this thread's rows see

  __device__ __forceinline__ DecodeProducts(const fagen_forward_params& scores, const DecodeTile<C>& tile)
      : Base(scores, 0, 0), mod(scores, 0, 0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int token = tile.token(tile.first_row + row_of(r));
      begin[r] = tile.begin_of(token), end[r] = tile.end_of(token);
    }
  }
  // Row r of this thread, in the tile.
  __device__ __forceinline__ int row_of(int r) const { return r / 2 * 16 + r % 2 * 8 + lane.row; }

  // S = Q K^T for the kWarpKeys keys from row `first_key` of the tile on.
  __device__ __forceinline__ void compute_scores(Scores& s_acc, uint32_t q_tile, uint32_t k_tile, int first_key) {
    if constexpr (!C::kFp8Cache) {
      Base::compute_scores(s_acc, q_tile, 0, k_tile, first_key, [](int) {});
    } else {
      const uint32_t q_lane = row_major_address<TileQ>(lane, q_tile, 0);
      const uint32_t k_lane = column_major_address<TileK>(lane, k_tile, first_key);
#pragma unroll
      for (auto& slab : s_acc) clear(slab);
#pragma unroll
      for (int d = 0; d < C::kHeadDim / 32; ++d) fp8_score_step(s_acc, q_lane, k_lane, d);
    }
  }

  // The 32 columns from 32 d on. In shared memory q has each 16 columns' even ones first, then the odd ones, as keys
  // have them when they are expanded.
  __device__ __forceinline__ void fp8_score_step(Scores& s_acc, uint32_t q_lane, uint32_t k_lane, int d) {
    uint32_t q_frag[2][S::kSlabs][4];
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int s = 0; s < S::kSlabs; ++s) {
        if constexpr (Base::kQInRegisters)
          for (int i = 0; i < 4; ++i) q_frag[step][s][i] = this->q_registers[s][2 * d + step][i];
        else
          ptx::ldmatrix_x4(q_frag[step][s], TileQ::step(q_lane, s * 16, 2 * d + step));
      }
#pragma unroll
    for (int n = 0; n < S::kWarpKeys / 16; ++n) {
      uint32_t k_frag[4];
      ptx::ldmatrix_x4(k_frag, TileK::step(k_lane, n * 16, d));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t even, odd;
        expand_e4m3<Element>(k_frag[i], even, odd);
#pragma unroll
        for (int s = 0; s < S::kSlabs; ++s)
          ptx::mma_m16n8k16<Element>(s_acc[s][2 * n + i / 2], q_frag[i % 2][s], even, odd);
      }
    }
  }

  // Softcap and, on tiles that not every row sees in full, the mask. `key`: the warp's first one.
  template <bool kMasked>
  __device__ __forceinline__ void modify_scores(Scores& s_acc, int key) const {
    if constexpr (kMasked || ScoreMod<C>::kActive) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) modify_row<kMasked>(s_acc, r, key);
    }
  }
  template <bool kMasked>
  __device__ __forceinline__ void modify_row(Scores& s_acc, int r, int key) const {
    const int from = begin[r] - key - lane.column, to = end[r] - key - lane.column;
#pragma unroll
    for (int n = 0; n < S::kWarpKeys / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = s_acc[r / 2][n][r % 2 * 2 + e];
        if constexpr (ScoreMod<C>::kActive) score = mod(score, 0, 0);
        if constexpr (kMasked) {
          bool hidden = n * 8 + e >= to;
          if constexpr (MaskOf<C>::kHasBegin) hidden |= n * 8 + e < from;
          if (hidden) score = -INFINITY;
        }
      }
  }

  // The softmax and second product of the warp's own keys.
  __device__ __forceinline__ void add_values(Scores& s_acc, uint32_t v_tile) {
    this->update_max(s_acc);
    const uint32_t v_lane = row_major_address<TileV>(lane, v_tile, 0);
    Weights p_frag;
#pragma unroll
    for (int n = 0; n < S::kWarpKeys / 16; ++n) {
#pragma unroll
      for (int s = 0; s < S::kSlabs; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) this->exponentiate(s_acc, p_frag, s, n, i);
      add_16_values(p_frag[n], v_lane + n * 16 * TileV::kPitch);
    }
  }

  // O += P V for 16 keys: `v_lane` is this lane's address of their first columns.
  __device__ __forceinline__ void add_16_values(const uint32_t (&p_frag)[S::kSlabs][4], uint32_t v_lane) {
    if constexpr (!C::kFp8Cache) {
      this->value_step(p_frag, v_lane);
    } else {
#pragma unroll
      for (int d = 0; d < S::kWarpColumns / 32; ++d) {
        uint32_t v_frag[4];
        ptx::ldmatrix_x4_trans(v_frag, TileV::step(v_lane, 0, d));
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // 16 columns: the even ones in one piece of O, the odd ones in the next
          uint32_t even[2], odd[2];  // of keys 0 to 7 and 8 to 15
#pragma unroll
          for (int i = 0; i < 2; ++i) expand_e4m3<Element>(v_frag[half * 2 + i], even[i], odd[i]);
#pragma unroll
          for (int s = 0; s < S::kSlabs; ++s) {
            ptx::mma_m16n8k16<Element>(o[s][4 * d + 2 * half], p_frag[s], even[0], even[1]);
            ptx::mma_m16n8k16<Element>(o[s][4 * d + 2 * half + 1], p_frag[s], odd[0], odd[1]);
          }
        }
      }
    }
  }

  // Store this thread's sums to a matrix of kPartPitch floats a row, of whose columns the warp has those from `column`.
  __device__ __forceinline__ void store_sums(float* part, int column) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float* row = part + row_of(r) * S::kPartPitch + column;
#pragma unroll
      for (int n = 0; n < S::kWarpColumns / 16; ++n) {
        const float* first = &o[r / 2][2 * n][r % 2 * 2];
        const float* second = &o[r / 2][2 * n + 1][r % 2 * 2];
        if constexpr (C::kFp8Cache) {
          *reinterpret_cast<float4*>(row + n * 16 + lane.column * 2) =
              make_float4(first[0], second[0], first[1], second[1]);
        } else {
          *reinterpret_cast<float2*>(row + n * 16 + lane.column) = make_float2(first[0], first[1]);
          *reinterpret_cast<float2*>(row + n * 16 + 8 + lane.column) = make_float2(second[0], second[1]);
        }
      }
    }
  }
};

}  // namespace fagen
