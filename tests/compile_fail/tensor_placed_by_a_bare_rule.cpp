// SPDX-License-Identifier: Apache-2.0
// error: dcp: a layout is a dcp::Placement<...> (or a PlacementOn<...>); this type is none
#include <dcp/core/sharded_tensor.hpp>

#ifdef MISTAKE
using P = dcp::Shard<0>;
#else
using P = dcp::Placement<dcp::Shard<0>>;
#endif

using Weight = dcp::ShardedTensor<float, P, dcp::Shape<4, 4>>;
int main() { return static_cast<int>(sizeof(Weight)) == 0; }
