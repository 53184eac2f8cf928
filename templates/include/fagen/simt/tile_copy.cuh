// Tiles from global memory to float32 numbers in shared memory, copied by all threads of a block together.
#pragma once
#include "fagen/abi/tensor.h"
#include "fagen/ptx/cp_async_4.cuh"
#include "fagen/simt/store.cuh"

namespace fagen {

// A matrix in global memory whose rows are `stride` elements apart.
template <class Element>
struct Matrix {
  Element* base;
  int64_t stride;
  int rows, cols;

  __device__ __forceinline__ Element* row(int index) const { return base + index * stride; }
};

// One head of a tensor of (batch, row, head, element).
template <class Element>
__device__ __forceinline__ Matrix<Element> head_of(const fagen_tensor& t, int batch, int head, int rows, int cols) {
  return {static_cast<Element*>(t.data) + batch * t.stride[0] + head * t.stride[2], t.stride[1], rows, cols};
}

// kRows rows of kColumns numbers, which lie kStride floats apart in shared memory. What is outside of the matrix reads
// as 0. A thread moves a piece at a time: 16 bytes where rows are aligned, else one element.
template <class Element, int kRows, int kColumns, int kStride, int kThreads, bool kAligned>
struct TileCopy {
  static constexpr int kPiece = kAligned ? 16 / int(sizeof(Element)) : 1;
  static constexpr int kPerRow = kColumns / kPiece, kCount = kRows * kPerRow;
  static constexpr int kEach = (kCount + kThreads - 1) / kThreads;  // pieces of a thread
  static_assert(kColumns % kPiece == 0, "a row is made of whole pieces");

  union Piece {
    uint4 bits;
    Element e[kPiece];
    __device__ __forceinline__ Piece() : bits(make_uint4(0, 0, 0, 0)) {}
  };

  // Start copying by cp.async, which moves float32 as it is.
  static __device__ __forceinline__ void start(float* to, const Matrix<Element>& from, int row, int column) {
    each_piece<4>(from, row, column, [&](int, int offset, const Element* source, bool there) {
      if constexpr (kAligned)
        ptx::cp_async_16(ptx::shared_address(to + offset), source, there);
      else
        ptx::cp_async_4(ptx::shared_address(to + offset), source, there);
    });
  }
  // Load into registers, and store from there.
  static __device__ __forceinline__ void load(Piece (&held)[kEach], const Matrix<Element>& from, int row, int column) {
    each_piece<kEach>(from, row, column,
                      [&](int i, int, const Element* source, bool there) { held[i] = read(source, there); });
  }
  static __device__ __forceinline__ void store(float* to, const Piece (&held)[kEach]) {
    each_piece<kEach>({}, 0, 0, [&](int i, int offset, const Element*, bool) { write(to + offset, held[i]); });
  }
  // Both at once.
  static __device__ __forceinline__ void copy(float* to, const Matrix<Element>& from, int row, int column) {
    each_piece<4>(from, row, column,
                  [&](int, int offset, const Element* source, bool there) { write(to + offset, read(source, there)); });
  }

 private:
  // Call visit(i, its place in the tile, its source, whether it is inside of the matrix) for a thread's pieces, kUnroll
  // at a time: all of them where they are in registers.
  template <int kUnroll, class Visit>
  static __device__ __forceinline__ void each_piece(const Matrix<Element>& from, int first_row, int first_column,
                                                    Visit visit) {
#pragma unroll kUnroll
    for (int i = 0; i < kEach; ++i) {
      const int index = threadIdx.x + i * kThreads;
      if (kCount % kThreads && index >= kCount) break;
      const int row = index / kPerRow, column = index % kPerRow * kPiece;
      const bool there = first_row + row < from.rows && first_column + column < from.cols;
      const Element* source = there ? from.row(first_row + row) + first_column + column : from.base;
      visit(i, row * kStride + column, source, there);
    }
  }
  static __device__ __forceinline__ Piece read(const Element* source, bool there) {
    Piece piece;
    if (!there) return piece;
    if constexpr (kAligned)
      piece.bits = *reinterpret_cast<const uint4*>(source);
    else
      piece.e[0] = *source;
    return piece;
  }
  static __device__ __forceinline__ void write(float* to, const Piece& piece) {
    if constexpr (kPiece == 1) {
      *to = to_float(piece.e[0]);
    } else {
#pragma unroll
      for (int i = 0; i < kPiece; i += 4)
        *reinterpret_cast<float4*>(to + i) = make_float4(to_float(piece.e[i]), to_float(piece.e[i + 1]),
                                                         to_float(piece.e[i + 2]), to_float(piece.e[i + 3]));
    }
  }
};

}  // namespace fagen
