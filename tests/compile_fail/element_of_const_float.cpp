// SPDX-License-Identifier: Apache-2.0
// error: dcp: a tensor's element type is not const; loading writes into it
#include <dcp/core/sharded_tensor.hpp>

#ifdef MISTAKE
using Weight = dcp::ShardedTensor<float const, dcp::Placement<dcp::Shard<0>>>;
#else
using Weight = dcp::ShardedTensor<float, dcp::Placement<dcp::Shard<0>>>;
#endif

int main() { return static_cast<int>(sizeof(Weight)) == 0; }
