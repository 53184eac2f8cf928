// Positions of new rows and their places in a cache, for device and host alike. Plain C++.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "fagen/abi/append.h"

#ifndef FAGEN_SHARED
#ifdef __CUDACC__
#define FAGEN_SHARED __host__ __device__ __forceinline__
#else
#define FAGEN_SHARED inline
#endif
#endif

namespace fagen {

// A row in its sequence; number -1: no sequence has it.
struct SequenceRow {
  int sequence, number;
};

// `starts` are those of packed rows, else every sequence has `each` rows. Starts that do not rise give some sequence:
// nothing is read beyond them.
FAGEN_SHARED SequenceRow find_row(const int32_t* starts, int batch, int each, int row) {
  if (!starts) return {row / each, row % each};
  if (row < starts[0] || row >= starts[batch]) return {0, -1};
  int low = 0, high = batch;  // starts[low] <= row < starts[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (starts[middle] <= row ? low : high) = middle;
  }
  return {low, row - starts[low]};
}

// The elements of a row; packed ones are found by their index, others by their number in the sequence.
FAGEN_SHARED int64_t row_offset(const fagen_tensor& t, const int32_t* starts, SequenceRow at, int row, int head) {
  return (starts ? 0 : at.sequence * t.stride[0]) + int64_t(starts ? row : at.number) * t.stride[1] +
         head * t.stride[2];
}

// A page of the cache and a row in it; page -1: outside of the cache, or of the sequence's bound.
struct Place {
  int page, row;
};

FAGEN_SHARED Place find_place(const fagen_append_params& p, int sequence, int64_t position) {
  const Place nowhere{-1, 0};
  if (position < 0 || position >= p.most_keys) return nowhere;
  int page = sequence, row = int(position);
  if (p.page_table.data) {
    const int column = row / p.page_size;
    if (column >= p.table_pages) return nowhere;
    page = static_cast<const int32_t*>(p.page_table.data)[sequence * p.page_table.stride[0] + column];
    row -= column * p.page_size;
  } else if (p.cache_batch_idx) {
    page = p.cache_batch_idx[sequence];
  }
  return page < 0 || page >= p.pages || row >= p.page_size ? nowhere : Place{page, row};
}

FAGEN_SHARED int64_t place_offset(const fagen_tensor& cache, Place place, int head) {
  return place.page * cache.stride[0] + place.row * cache.stride[1] + head * cache.stride[2];
}

// The row of cos and sin, in range whatever the lengths are.
FAGEN_SHARED int angle_row(const fagen_append_params& p, SequenceRow at, bool first) {
  const int32_t* begin = p.rotary_seqlens ? p.rotary_seqlens : p.seqlens_k;
  const int64_t position = at.number < 0 ? 0 : int64_t(begin[at.sequence]) + (first ? 0 : at.number);
  return int(position < 0 ? 0 : position < p.positions ? position : p.positions - 1);
}

FAGEN_SHARED int length_after(const fagen_append_params& p, int sequence) {
  const int32_t* starts = p.cu_seqlens_new;
  const uint32_t count = starts ? uint32_t(starts[sequence + 1]) - uint32_t(starts[sequence]) : uint32_t(p.most_new);
  return int(uint32_t(p.seqlens_k[sequence]) + count);  // of lengths astray as well: who reads it keeps it in range
}

// The number divided by its scale as e4m3, rounded to nearest even, at most 448 in size; NaN stays NaN.
FAGEN_SHARED uint8_t encode_e4m3(float x) {
  constexpr float kLargest = 448.f;
  constexpr uint32_t kLeastNormal = 121u << 23;  // 2^-6
  x = x < -kLargest ? -kLargest : x > kLargest ? kLargest : x;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t magnitude = bits & 0x7fffffffu, sign = bits >> 24 & 0x80u;
  if (magnitude > 0x7f800000u) return uint8_t(sign | 0x7fu);
  if (magnitude < kLeastNormal) return uint8_t(sign | uint32_t(rintf(fabsf(x) * 512.f)));  // multiples of 2^-9
  const uint32_t rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u);
  return uint8_t(sign | ((rounded >> 20) - (120u << 3)));  // 3 bits of mantissa; the bias is 7, not 127
}

}  // namespace fagen
