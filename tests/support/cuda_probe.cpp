// SPDX-License-Identifier: Apache-2.0
// Whether this process has a CUDA device: run while CMake configures.
#include <cuda_runtime_api.h>

int main() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0 ? 0 : 1;
}
