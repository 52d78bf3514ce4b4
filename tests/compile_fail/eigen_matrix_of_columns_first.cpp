// SPDX-License-Identifier: Apache-2.0
// needs: eigen
// error: dcp: checkpoints store rows first (C order) and this Eigen type stores columns first; use Eigen::RowMajor, or dcp::transposed(m) to save the transpose [M::IsRowMajor == 1]
// error (gcc): '(0 == 1)'
// error (clang): '0 == 1'
// error (nvcc): IsRowMajor=0
#define EIGEN_NO_CUDA   // else Eigen 3.4 has a hundred lines of warnings of its own for nvcc
#include <dcp/ext/eigen.hpp>

#ifdef MISTAKE
using Matrix = Eigen::MatrixXf;
#else
using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
#endif

dcp::StateDict state_of(Matrix& matrix) { return {{"matrix", matrix}}; }
int main() {}
