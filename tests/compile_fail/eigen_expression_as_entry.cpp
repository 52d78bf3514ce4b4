// SPDX-License-Identifier: Apache-2.0
// needs: eigen
// error: dcp: this Eigen expression has no memory of its own; evaluate it into a matrix and name that
#define EIGEN_NO_CUDA   // else Eigen 3.4 has a hundred lines of warnings of its own for nvcc
#include <dcp/ext/eigen.hpp>

#ifdef MISTAKE
dcp::StateDict state_of(Eigen::VectorXf& vector) { return {{"vector", 2 * vector}}; }
#else
dcp::StateDict state_of(Eigen::VectorXf& vector) { return {{"vector", vector.head(2)}}; }
#endif

int main() {}
