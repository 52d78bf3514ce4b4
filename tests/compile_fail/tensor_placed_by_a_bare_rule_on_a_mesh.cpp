// SPDX-License-Identifier: Apache-2.0
// error: dcp: a layout is a dcp::Placement<...> (or a PlacementOn<...>); this type is none
#include <dcp/core/sharded_tensor.hpp>
#include <vector>

#ifdef MISTAKE
using P = dcp::Shard<0>;
#else
using P = dcp::Placement<dcp::Shard<0>>;
#endif

dcp::ShardedTensor<float, P> weight(dcp::DeviceMesh<1> const& mesh, std::vector<float>& memory) { return {mesh, {7, 5}, memory}; }
int main() {}
