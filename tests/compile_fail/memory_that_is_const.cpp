// SPDX-License-Identifier: Apache-2.0
// error: dcp: this memory does not hold the tensor's elements; pass a mutable contiguous range of exactly its element type (std::byte for elements smaller than a byte)
#include <dcp/core/sharded_tensor.hpp>
#include <vector>

#ifdef MISTAKE
dcp::ShardedTensor<float, dcp::Placement<dcp::Shard<0>>> weight(dcp::DeviceMesh<1> const& mesh, std::vector<float> const& memory) { return {mesh, {8, 4}, memory}; }
#else
dcp::ShardedTensor<float, dcp::Placement<dcp::Shard<0>>> weight(dcp::DeviceMesh<1> const& mesh, std::vector<float>& memory) { return {mesh, {8, 4}, memory}; }
#endif

int main() {}
