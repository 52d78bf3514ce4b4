// SPDX-License-Identifier: Apache-2.0
// needs: eigen
// error: dcp: a view is made of a temporary Eigen matrix, which is gone before it could be loaded into; name a variable
#define EIGEN_NO_CUDA   // else Eigen 3.4 has a hundred lines of warnings of its own for nvcc
#include <dcp/ext/eigen.hpp>

#ifdef MISTAKE
auto view_of(Eigen::VectorXf& vector) { return dcp::view(Eigen::VectorXf{2 * vector}); }
#else
auto view_of(Eigen::VectorXf& vector) { return dcp::view(vector); }
#endif

int main() {}
