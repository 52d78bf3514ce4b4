// SPDX-License-Identifier: Apache-2.0
#pragma once
// Kernels for CUDA's devices: what is stored in eight or four bits is decoded on the device that it is loaded to, and comes over the bus as it is stored. Needs nvcc 12 or
// later; component dcp::cuda.
//
// To have it   include this header in one file that nvcc compiles, with -std=c++20 and the architectures of the devices; nothing else is to be done. Where a device is of
//              none of these architectures the host decodes, as without this header.
// Decoded      FP8 (E4M3, E5M2), MXFP8, MXFP4 and INT8 without zero points, with scales for blocks, groups, rows or tensors, to F32, BF16 and F16. The host decodes all
//              else, and double; values are the same, bit for bit.
// Allocated    on the device: nothing. Kernels read what was read from the files where it lies, in pinned memory of the host.

#ifndef __CUDACC__
#error "dcp: device/cuda_decoders.cuh is for nvcc; other files of the program include device/cuda.hpp"
#endif

#include <dcp/device/cuda.hpp>
#include <dcp/device/decode_elements.hpp>

namespace dcp::detail {

template <class Run>
__global__ void decode_kernel(DeviceDecode const work, DecodeGrid const grid) {
  decode_thread<Run>(work, grid, blockIdx.x * grid.across + threadIdx.x, blockIdx.y * grid.down + threadIdx.y);
}

template <class Run>
int launch_decode(DeviceDecode const& work, cudaStream_t stream, bool& has_kernel) {
  auto grid = DecodeGrid::of<Run>(work);
  auto of_kernel = work;
  void* arguments[] = {&of_kernel, &grid};
  // Not <<<>>>, whose status has to be asked for, and may then be that of a call of the program's.
  cudaError_t const status = cudaLaunchKernel(decode_kernel<Run>, dim3{grid.blocks_across, grid.blocks_down}, dim3{grid.across, grid.down}, arguments, 0, stream);
  has_kernel = status != cudaErrorNoKernelImageForDevice && status != cudaErrorInvalidDeviceFunction;
  if (has_kernel) return static_cast<int>(status);
  static_cast<void>(cudaGetLastError());   // there is none for this architecture, which is nobody's error
  return 0;
}

/// Before main, and once.
inline bool const cuda_decodes = (CudaApi::use([](DeviceDecode const& work, cudaStream_t stream, bool& has_kernel) {
                                    return with_decode_run(work, [&](auto run) { return launch_decode<typename decltype(run)::type>(work, stream, has_kernel); });
                                  }),
                                  true);

}  // namespace dcp::detail
