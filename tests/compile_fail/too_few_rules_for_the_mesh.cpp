// SPDX-License-Identifier: Apache-2.0
// error: dcp: a Placement lists one rule per mesh axis; write Replicate for the axes it ignores [rules given == mesh axes]
// error (gcc): the comparison reduces to '(1 == 2)'
// error (clang): '1 == 2'
// error (nvcc): Rules=1
// error (nvcc): Axes=2
#include <dcp/core/sharded_tensor.hpp>
#include <vector>

#ifdef MISTAKE
using P = dcp::Placement<dcp::Shard<0>>;
#else
using P = dcp::Placement<dcp::Replicate, dcp::Shard<0>>;
#endif

dcp::ShardedTensor<float, P> weight(dcp::DeviceMesh<2> const& mesh, std::vector<float>& memory) { return {mesh, {7, 5}, memory}; }
int main() {}
