// SPDX-License-Identifier: Apache-2.0
#include "../uses_dcp.hpp"
#ifdef WITH_MPI
#include <dcp/comm/mpi.hpp>
#endif
#ifdef WITH_EIGEN
#include <dcp/ext/eigen.hpp>
#endif
#ifdef WITH_URING
#include <dcp/media/uring_fs.hpp>
#endif
#ifdef WITH_S3
#include <dcp/media/object_store.hpp>
#endif
#ifdef WITH_CUDA
#include <dcp/device/cuda.hpp>
#endif
#ifdef WITH_NCCL
#include <dcp/comm/nccl.hpp>
#endif
#ifdef WITH_SAVER
#include <unistd.h>
#endif

int main() {
#ifdef WITH_MPI
  int initialized = 1;
  if (MPI_Initialized(&initialized) != MPI_SUCCESS || initialized != 0) return 2;   // linked, not only included
#endif
#ifdef WITH_EIGEN
  Eigen::Matrix<float, 2, 2, Eigen::RowMajor> const matrix = Eigen::Matrix<float, 2, 2, Eigen::RowMajor>::Identity();
  if (matrix.trace() != 2.0f) return 3;
#endif
#ifdef WITH_URING
  static_cast<void>(dcp::UringFs{}.open_queue(4));   // linked; whether there is a ring is the machine's affair
#endif
#ifdef WITH_SAVER
  if (::access(DCP_SAVER_PROGRAM, X_OK) != 0) return 5;
#endif
#ifdef WITH_CUDA
  int on_the_host = 0;
  if (dcp::detail::cuda_driver()->where(&on_the_host).kind != dcp::MemoryKind::host) return 6;   // linked; whether there is a device is the machine's affair
  try {
    static_cast<void>(dcp::on(nullptr));
  } catch (dcp::Error const& error) {
    if (error.code() != dcp::ErrorCode::device) return 6;
  }
#endif
#ifdef WITH_NCCL
  int version = 0;
  if (ncclGetVersion(&version) != ncclSuccess || version / 10'000 < 2) return 7;
#endif
#ifdef WITH_S3
  try {
    dcp::ObjectStore const store{{.endpoint = "no endpoint"}};   // linked; and told what is wrong, whatever the environment holds
    return 4;
  } catch (dcp::Error const& error) {
    if (error.code() != dcp::ErrorCode::invalid_argument) return 4;
  }
#endif
  return uses_dcp() ? 0 : 1;
}
