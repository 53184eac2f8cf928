// What the driver has: tensor maps.
#pragma once
#include "cuda_runtime.h"

using cuuint64_t = uint64_t;
using cuuint32_t = uint32_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
struct CUtensorMap {
  const unsigned char* base;
  int rank;
  uint64_t size[5], stride[5];
  uint32_t box[5];
  bool swizzled;
};
using PFN_cuTensorMapEncodeTiled_v12000 = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                                       const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                                       const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum cudaDriverEntryPointFlags { cudaEnableDefault };

namespace emulator {

CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base, const cuuint64_t* size,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// A box from global memory to the same place of some blocks, at some later moment; their barriers learn of its bytes.
void copy(uint32_t to, const CUtensorMap* map, uint32_t barrier, std::initializer_list<int> where, unsigned blocks);

}  // namespace emulator

inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, cudaDriverEntryPointFlags,
                                                    cudaDriverEntryPointQueryResult*) {
  *function = reinterpret_cast<void*>(&emulator::encode);
  return cudaSuccess;
}
