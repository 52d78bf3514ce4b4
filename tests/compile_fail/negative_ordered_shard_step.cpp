// SPDX-License-Identifier: Apache-2.0
// error: dcp: the Step of an OrderedShard is counted from 0; Step 0 cuts first [Step >= 0]
// error (gcc): '(-1 >= 0)'
// error (clang): '-1 >= 0'
// error (nvcc): Step=-1
#include <dcp/core/sharded_tensor.hpp>

#ifdef MISTAKE
using P = dcp::Placement<dcp::OrderedShard<0, -1>>;
#else
using P = dcp::Placement<dcp::OrderedShard<0, 0>>;
#endif

using Weight = dcp::ShardedTensor<float, P>;
int main() { return static_cast<int>(sizeof(Weight)) == 0; }
