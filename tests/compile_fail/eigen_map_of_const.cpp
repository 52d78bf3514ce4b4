// SPDX-License-Identifier: Apache-2.0
// needs: eigen
// error: dcp: this Eigen object is const, and loading writes into it; use a matrix, Map or Ref that can change
#define EIGEN_NO_CUDA   // else Eigen 3.4 has a hundred lines of warnings of its own for nvcc
#include <dcp/ext/eigen.hpp>

#ifdef MISTAKE
using Vector = Eigen::Map<Eigen::VectorXf const>;
#else
using Vector = Eigen::Map<Eigen::VectorXf>;
#endif

dcp::StateDict state_of(Vector& vector) { return {{"vector", vector}}; }
int main() {}
