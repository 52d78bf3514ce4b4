// SPDX-License-Identifier: Apache-2.0
// error: dcp: this Placement shards a dimension that the tensor does not have [tensor rank >= rank the Placement needs; dimensions count from 0]
// error (gcc): the comparison reduces to '(2 >= 3)'
// error (clang): '2 >= 3'
// error (nvcc): TensorRank=2
// error (nvcc): Needed=3
#include <dcp/core/sharded_tensor.hpp>
#include <vector>

#ifdef MISTAKE
using P = dcp::Placement<dcp::Shard<2>>;
#else
using P = dcp::Placement<dcp::Shard<1>>;
#endif

dcp::ShardedTensor<float, P> weight(dcp::DeviceMesh<1> const& mesh, std::vector<float>& memory) { return {mesh, {7, 5}, memory}; }
int main() {}
