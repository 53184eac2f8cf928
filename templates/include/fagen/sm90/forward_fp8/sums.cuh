// O of a warpgroup's rows. The tensor cores add e4m3 products with some 14 bits: what they add to sums that are large
// already is lost. With kPromote they add the products of so many key tiles only, and float32 units the rest.
#pragma once
#include "fagen/common/row_state.cuh"
#include "fagen/sm90/operand.cuh"

namespace fagen {

template <int kPieces>
__device__ __forceinline__ void multiply_rows(float (&pieces)[kPieces][4], const float (&factor)[2]) {
#pragma unroll
  for (auto& piece : pieces)
#pragma unroll
    for (int i = 0; i < 4; ++i) piece[i] *= factor[i / 2];
}

// All of them by the tensor cores.
template <class C, int kPromote = C::kPromote>
struct ValueSums {
  using O = float[C::kHeadDimV / 8][4];

  __device__ __forceinline__ void begin(O& o) { clear(o); }
  // what the next product adds to, and whether there is anything in it
  __device__ __forceinline__ O& target(O& o) { return o; }
  __device__ __forceinline__ bool more() const { return true; }
  // The product is there; the weights of the next one are smaller by `factor`, if they are.
  __device__ __forceinline__ void take(O& o, const float (&factor)[2], bool smaller) {
    if (smaller) multiply_rows(o, factor);
  }
  __device__ __forceinline__ void finish(O& o) {}
};

// Those of every tile: O is multiplied in the same operation.
template <class C>
struct ValueSums<C, 1> {
  using O = float[C::kHeadDimV / 8][4];
  O recent;
  float held[2];  // by which O is still to be multiplied

  __device__ __forceinline__ void begin(O& o) {
    clear(o);
    held[0] = held[1] = 1.f;
  }
  __device__ __forceinline__ O& target(O& o) { return recent; }
  __device__ __forceinline__ bool more() const { return false; }
  __device__ __forceinline__ void take(O& o, const float (&factor)[2], bool smaller) {
    finish(o);
    held[0] = smaller ? factor[0] : 1.f, held[1] = smaller ? factor[1] : 1.f;
  }
  __device__ __forceinline__ void finish(O& o) {
#pragma unroll
    for (int n = 0; n < C::kHeadDimV / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[n][i] = fmaf(o[n][i], held[i / 2], recent[n][i]);
  }
};

// Those of two or four tiles.
template <class C>
struct SumsOfSeveral {
  using O = float[C::kHeadDimV / 8][4];
  O recent;
  int tiles;  // whose products `recent` has

  __device__ __forceinline__ void begin(O& o) {
    clear(o);
    tiles = 0;
  }
  __device__ __forceinline__ O& target(O& o) { return recent; }
  __device__ __forceinline__ bool more() const { return tiles > 0; }
  __device__ __forceinline__ void take(O& o, const float (&factor)[2], bool smaller) {
    if (++tiles == C::kPromote) {
      finish(o);
      tiles = 0;
    }
    if (smaller) {
      multiply_rows(o, factor);
      multiply_rows(recent, factor);
    }
  }
  __device__ __forceinline__ void finish(O& o) {
#pragma unroll
    for (int n = 0; n < C::kHeadDimV / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[n][i] += recent[n][i];
  }
};
template <class C>
struct ValueSums<C, 2> : SumsOfSeveral<C> {};
template <class C>
struct ValueSums<C, 4> : SumsOfSeveral<C> {};

}  // namespace fagen
