// SPDX-License-Identifier: Apache-2.0
// error: dcp: the third argument of a ShardedTensor is a dcp::Shape<...>, or dcp::AnyShape when the shape is known at run time
#include <dcp/core/sharded_tensor.hpp>

using P = dcp::Placement<dcp::Shard<0>>;

#ifdef MISTAKE
using Weight = dcp::ShardedTensor<float, P, dcp::Extents>;
#else
using Weight = dcp::ShardedTensor<float, P, dcp::AnyShape>;
#endif

int main() { return static_cast<int>(sizeof(Weight)) == 0; }
