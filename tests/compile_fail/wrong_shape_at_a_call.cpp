// SPDX-License-Identifier: Apache-2.0
// The compiler's own error, good because the types print well.
// error (gcc): dcp::Shape<4, 8>
// error (clang): Shape<4, 8>
// error (nvcc): dcp::Shape<4L, 8L>
#include <dcp/core/sharded_tensor.hpp>

using P = dcp::Placement<dcp::Shard<0>>;
void forward(dcp::ShardedTensor<float, P, dcp::Shape<8, 4>> const&) {}

#ifdef MISTAKE
void step(dcp::ShardedTensor<float, P, dcp::Shape<4, 8>>& weight) { forward(weight); }
#else
void step(dcp::ShardedTensor<float, P, dcp::Shape<8, 4>>& weight) { forward(weight); }
#endif

int main() {}
