// SPDX-License-Identifier: Apache-2.0
// needs: eigen
// error: dcp: a state entry is bound to a temporary, which is gone before it could be loaded into; name a variable
#define EIGEN_NO_CUDA   // else Eigen 3.4 has a hundred lines of warnings of its own for nvcc
#include <dcp/ext/eigen.hpp>

#ifdef MISTAKE
dcp::StateDict state_of(Eigen::VectorXf& vector) { return {{"vector", Eigen::VectorXf{2 * vector}}}; }
#else
dcp::StateDict state_of(Eigen::VectorXf& vector) { return {{"vector", vector}}; }
#endif

int main() {}
