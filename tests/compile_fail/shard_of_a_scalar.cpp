// SPDX-License-Identifier: Apache-2.0
// error: dcp: this Placement shards a dimension that the tensor does not have [tensor rank >= rank the Placement needs; dimensions count from 0]
// error (gcc): the comparison reduces to '(0 >= 1)'
// error (clang): '0 >= 1'
// error (nvcc): TensorRank=0
// error (nvcc): Needed=1
#include <dcp/core/sharded_tensor.hpp>

#ifdef MISTAKE
using P = dcp::Placement<dcp::Shard<0>>;
#else
using P = dcp::Placement<dcp::Replicate>;
#endif

using Scale = dcp::ShardedTensor<float, P, dcp::Shape<>>;
int main() { return static_cast<int>(sizeof(Scale)) == 0; }
