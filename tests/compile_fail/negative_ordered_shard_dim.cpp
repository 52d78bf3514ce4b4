// SPDX-License-Identifier: Apache-2.0
// error: dcp: a sharded dimension is counted from 0; negative dimensions do not count from the end here [Dim >= 0]
// error (gcc): '(-2 >= 0)'
// error (clang): '-2 >= 0'
// error (nvcc): Dim=-2
#include <dcp/core/sharded_tensor.hpp>

#ifdef MISTAKE
using P = dcp::Placement<dcp::OrderedShard<-2, 0>>;
#else
using P = dcp::Placement<dcp::OrderedShard<0, 0>>;
#endif

using Weight = dcp::ShardedTensor<float, P, dcp::Shape<8, 8>>;
int main() { return static_cast<int>(sizeof(Weight)) == 0; }
