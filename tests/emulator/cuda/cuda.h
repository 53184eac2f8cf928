// What the driver has: tensor maps.
#pragma once
#include "cuda_runtime.h"

using cuuint64_t = uint64_t;
using cuuint32_t = uint32_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
struct CUtensorMap {
  const unsigned char* base;
  int rank;
  uint64_t size[5], stride[5];
  uint32_t box[5];
};
using PFN_cuTensorMapEncodeTiled_v12000 = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                                       const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                                       const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum cudaDriverEntryPointFlags { cudaEnableDefault };

namespace emulator {

inline CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base, const cuuint64_t* size,
                       const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                       CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (rank < 1 || rank > 5 || uintptr_t(base) % 16 || box[0] * 2 > 128) return CUDA_ERROR_INVALID_VALUE;
  map->base = static_cast<const unsigned char*>(base), map->rank = rank;
  for (unsigned i = 0; i < rank; ++i) {
    map->size[i] = size[i], map->box[i] = box[i], map->stride[i] = i ? strides[i - 1] : 2;
    if (!size[i] || size[i] > 1ull << 32 || !box[i] || box[i] > 256 || steps[i] != 1) return CUDA_ERROR_INVALID_VALUE;
    if (i && (map->stride[i] % 16 || map->stride[i] >= 1ull << 40)) return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

}  // namespace emulator

inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, cudaDriverEntryPointFlags,
                                                    cudaDriverEntryPointQueryResult*) {
  *function = reinterpret_cast<void*>(&emulator::encode);
  return cudaSuccess;
}
