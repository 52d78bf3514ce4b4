// SPDX-License-Identifier: Apache-2.0
// The compiler's own error, good because the types print well.
// error (gcc): ShardedTensor<float,
// error (clang): ShardedTensor<float,
// error (nvcc): dcp::ShardedTensor<float,
#include <dcp/core/sharded_tensor.hpp>

using P = dcp::Placement<dcp::Shard<0>>;
void forward(dcp::ShardedTensor<dcp::bf16, P> const&) {}

#ifdef MISTAKE
void step(dcp::ShardedTensor<float, P>& weight) { forward(weight); }
#else
void step(dcp::ShardedTensor<dcp::bf16, P>& weight) { forward(weight); }
#endif

int main() {}
