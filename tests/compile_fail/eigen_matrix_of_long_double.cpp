// SPDX-License-Identifier: Apache-2.0
// needs: eigen
// error: dcp: no checkpoint format has this element type; use bool, a fixed-width integer, float, double, std::complex of both, or a dcp float such as dcp::bf16
#define EIGEN_NO_CUDA   // else Eigen 3.4 has a hundred lines of warnings of its own for nvcc
#include <dcp/ext/eigen.hpp>

#ifdef MISTAKE
using Vector = Eigen::Matrix<long double, Eigen::Dynamic, 1>;
#else
using Vector = Eigen::VectorXd;
#endif

dcp::StateDict state_of(Vector& vector) { return {{"vector", vector}}; }
int main() {}
