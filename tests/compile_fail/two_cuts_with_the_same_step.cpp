// SPDX-License-Identifier: Apache-2.0
// error: dcp: two axes split a dimension with the same Step; number the cuts 0, 1, ... in the order they are made [repeated steps == 0]
// error (gcc): '(1 == 0)'
// error (clang): '1 == 0'
// error (nvcc): Repeated=1
#include <dcp/core/sharded_tensor.hpp>

#ifdef MISTAKE
using P = dcp::Placement<dcp::OrderedShard<0, 0>, dcp::OrderedShard<0, 0>>;
#else
using P = dcp::Placement<dcp::OrderedShard<0, 1>, dcp::OrderedShard<0, 0>>;
#endif

using Weight = dcp::ShardedTensor<float, P>;
int main() { return static_cast<int>(sizeof(Weight)) == 0; }
