// SPDX-License-Identifier: Apache-2.0
// error: dcp: this Placement shards a dimension that the tensor does not have [tensor rank >= rank the Placement needs; dimensions count from 0]
// error (gcc): the comparison reduces to '(1 >= 2)'
// error (clang): '1 >= 2'
// error (nvcc): TensorRank=1
// error (nvcc): Needed=2
#include <dcp/core/sharded_tensor.hpp>

#ifdef MISTAKE
using P = dcp::Placement<dcp::OrderedShard<1, 1>, dcp::OrderedShard<1, 0>>;
#else
using P = dcp::Placement<dcp::OrderedShard<0, 1>, dcp::OrderedShard<0, 0>>;
#endif

using Bias = dcp::ShardedTensor<float, P, dcp::Shape<512>>;
int main() { return static_cast<int>(sizeof(Bias)) == 0; }
