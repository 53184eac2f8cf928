// All that a kernel may include of CUDA, to be compiled ahead of it.
#pragma once
#include "cuda.h"
#include "cudaTypedefs.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"
