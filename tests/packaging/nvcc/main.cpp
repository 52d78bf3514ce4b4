// SPDX-License-Identifier: Apache-2.0
// The others are compiled without nvcc, and have its kernels all the same. Runs where there is no device, too: whatever a launch of no blocks says there, it is not that there is no kernel.
#include <dcp/dcp.hpp>
#include <dcp/device/cuda.hpp>

int main() {
  dcp::DeviceDecode work;
  work.rows.count = 0;
  bool has_kernel = false;
  return dcp::detail::cuda_driver()->api().decode(work, nullptr, has_kernel) != 0 && has_kernel ? 0 : 1;
}
