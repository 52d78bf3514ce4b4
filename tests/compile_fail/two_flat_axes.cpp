// SPDX-License-Identifier: Apache-2.0
// error: dcp: a Placement splits the flattened elements along two axes; use one FlatShard, over a mesh axis of all those ranks [FlatShard axes <= 1]
// error (gcc): '(2 <= 1)'
// error (clang): '2 <= 1'
// error (nvcc): Axes=2
#include <dcp/core/sharded_tensor.hpp>

#ifdef MISTAKE
using P = dcp::Placement<dcp::FlatShard, dcp::FlatShard>;
#else
using P = dcp::Placement<dcp::FlatShard, dcp::Replicate>;
#endif

using Weight = dcp::ShardedTensor<float, P>;
int main() { return static_cast<int>(sizeof(Weight)) == 0; }
