// SPDX-License-Identifier: Apache-2.0
// error: dcp: a Placement lists rules; each is Shard<Dim>, OrderedShard<Dim, Step>, FlatShard, Replicate or Partial
#include <dcp/core/sharded_tensor.hpp>

#ifdef MISTAKE
using P = dcp::Placement<dcp::Replicate, dcp::Shape<0>>;
#else
using P = dcp::Placement<dcp::Replicate, dcp::Shard<0>>;
#endif

using Weight = dcp::ShardedTensor<float, P>;
int main() { return static_cast<int>(sizeof(Weight)) == 0; }
