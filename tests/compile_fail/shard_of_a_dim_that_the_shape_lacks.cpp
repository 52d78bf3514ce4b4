// SPDX-License-Identifier: Apache-2.0
// error: dcp: this Placement shards a dimension that the tensor does not have [tensor rank >= rank the Placement needs; dimensions count from 0]
// error (gcc): the comparison reduces to '(2 >= 3)'
// error (clang): '2 >= 3'
// error (nvcc): TensorRank=2
// error (nvcc): Needed=3
#include <dcp/core/sharded_tensor.hpp>

#ifdef MISTAKE
using P = dcp::Placement<dcp::Replicate, dcp::Shard<2>>;
#else
using P = dcp::Placement<dcp::Replicate, dcp::Shard<1>>;
#endif

using Weight = dcp::ShardedTensor<dcp::bf16, P, dcp::Shape<4096, 4096>>;
int main() { return static_cast<int>(sizeof(Weight)) == 0; }
