// SPDX-License-Identifier: Apache-2.0
// needs: eigen
// error: dcp: this memory does not hold the tensor's elements; pass a mutable contiguous range of exactly its element type (std::byte for elements smaller than a byte)
#define EIGEN_NO_CUDA   // else Eigen 3.4 has a hundred lines of warnings of its own for nvcc
#include <dcp/ext/eigen.hpp>

using Bias = dcp::ShardedTensor<float, dcp::Placement<dcp::Shard<0>>>;

#ifdef MISTAKE
using Vector = Eigen::VectorXd;
#else
using Vector = Eigen::VectorXf;
#endif

Bias bias(dcp::DeviceMesh<1> const& mesh, Vector& shard) { return {mesh, {8}, dcp::view(shard)}; }
int main() {}
