// SPDX-License-Identifier: Apache-2.0
// needs: eigen
// error: dcp: this Eigen object is const, and loading writes into it; use a matrix, Map or Ref that can change
#define EIGEN_NO_CUDA   // else Eigen 3.4 has a hundred lines of warnings of its own for nvcc
#include <dcp/ext/eigen.hpp>

#ifdef MISTAKE
auto view_of(Eigen::MatrixXf const& matrix) { return dcp::transposed(matrix); }
#else
auto view_of(Eigen::MatrixXf& matrix) { return dcp::transposed(matrix); }
#endif

int main() {}
