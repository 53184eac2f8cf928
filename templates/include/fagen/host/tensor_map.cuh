// Tensor maps for the copy engine (TMA).
#pragma once
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

namespace fagen {

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

// A dimension of a tensor map: its size, the elements from one index to the next, and how many indices a box has.
struct Dimension {
  int size;
  int64_t stride;
  int box;
};

// The map of a tensor of rows of `columns` 16-bit elements, in boxes of 64 of them.
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

}  // namespace fagen
