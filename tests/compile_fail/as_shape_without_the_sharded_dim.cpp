// SPDX-License-Identifier: Apache-2.0
// error: dcp: this Placement shards a dimension that the tensor does not have [tensor rank >= rank the Placement needs; dimensions count from 0]
// error (gcc): the comparison reduces to '(1 >= 2)'
// error (clang): '1 >= 2'
// error (nvcc): TensorRank=1
// error (nvcc): Needed=2
#include <dcp/core/sharded_tensor.hpp>

using Weight = dcp::ShardedTensor<float, dcp::Placement<dcp::Shard<1>>>;

#ifdef MISTAKE
auto checked(Weight const& weight) { return weight.as_shape<dcp::Shape<7>>(); }
#else
auto checked(Weight const& weight) { return weight.as_shape<dcp::Shape<7, 5>>(); }
#endif

int main() {}
