// SPDX-License-Identifier: Apache-2.0
// error: dcp: the third argument of a ShardedTensor is a dcp::Shape<...>, or dcp::AnyShape when the shape is known at run time
#include <dcp/core/sharded_tensor.hpp>
#include <vector>

#ifdef MISTAKE
using Weight = dcp::ShardedTensor<float, dcp::Placement<dcp::Replicate>, dcp::Shard<0>>;
#else
using Weight = dcp::ShardedTensor<float, dcp::Placement<dcp::Replicate, dcp::Shard<0>>>;
#endif

std::vector<Weight> weights;
int main() {}
