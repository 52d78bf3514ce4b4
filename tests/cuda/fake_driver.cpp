// SPDX-License-Identifier: Apache-2.0
// A driver of CUDA with one call, whose answer is in the address: a library by the name that the driver has in a process.
#include <cuda.h>

extern "C" CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* attributes, void** values, CUdeviceptr address) {
  if (count != 3 || attributes[0] != CU_POINTER_ATTRIBUTE_MEMORY_TYPE || attributes[1] != CU_POINTER_ATTRIBUTE_IS_MANAGED || attributes[2] != CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) return CUDA_ERROR_UNKNOWN;
  auto const answer = [&](unsigned type, bool managed, int ordinal) {
    *static_cast<unsigned*>(values[0]) = type;
    *static_cast<bool*>(values[1]) = managed;   // a byte: the rest is the caller's
    *static_cast<int*>(values[2]) = ordinal;
    return CUDA_SUCCESS;
  };
  switch (address) {
    case 1: return answer(CU_MEMORYTYPE_DEVICE, false, 3);
    case 2: return answer(CU_MEMORYTYPE_HOST, false, 1);
    case 3: return answer(CU_MEMORYTYPE_DEVICE, true, -1);
    case 4: return answer(CU_MEMORYTYPE_HOST, true, -1);
    case 5: return answer(0, false, 0);
    case 6: return CUDA_ERROR_INVALID_VALUE;
    case 7: return CUDA_ERROR_INVALID_CONTEXT;
    case 8: return CUDA_ERROR_NOT_INITIALIZED;
    case 9: return CUDA_ERROR_DEINITIALIZED;
    default: return CUDA_ERROR_UNKNOWN;
  }
}
