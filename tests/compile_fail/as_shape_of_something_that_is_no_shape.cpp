// SPDX-License-Identifier: Apache-2.0
// error: dcp: as_shape<...> takes a dcp::Shape<...>, the global shape that the tensor should turn out to have
#include <dcp/core/sharded_tensor.hpp>

using Weight = dcp::ShardedTensor<float, dcp::Placement<dcp::Shard<0>>>;

#ifdef MISTAKE
auto checked(Weight const& weight) { return weight.as_shape<dcp::Extents>(); }
#else
auto checked(Weight const& weight) { return weight.as_shape<dcp::Shape<7, 5>>(); }
#endif

int main() {}
