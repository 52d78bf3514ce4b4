// SPDX-License-Identifier: Apache-2.0
// needs: eigen
// error: dcp: a state entry is const, and loading writes into it; bind a variable that can change
#define EIGEN_NO_CUDA   // else Eigen 3.4 has a hundred lines of warnings of its own for nvcc
#include <dcp/ext/eigen.hpp>

#ifdef MISTAKE
dcp::StateDict state_of(Eigen::VectorXf const& vector) { return {{"vector", vector}}; }
#else
dcp::StateDict state_of(Eigen::VectorXf& vector) { return {{"vector", vector}}; }
#endif

int main() {}
