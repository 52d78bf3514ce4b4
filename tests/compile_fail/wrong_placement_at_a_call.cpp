// SPDX-License-Identifier: Apache-2.0
// The compiler's own error, good because the types print well.
// error (gcc): dcp::Placement<dcp::Replicate, dcp::Shard<1> > >
// error (clang): ShardedTensor<[...], Placement<[...], Shard<1>>>
// error (nvcc): dcp::Shard<1>
#include <dcp/core/sharded_tensor.hpp>

using ColumnParallel = dcp::Placement<dcp::Replicate, dcp::Shard<0>>;
using RowParallel = dcp::Placement<dcp::Replicate, dcp::Shard<1>>;
void forward(dcp::ShardedTensor<dcp::bf16, ColumnParallel> const&) {}

#ifdef MISTAKE
void step(dcp::ShardedTensor<dcp::bf16, RowParallel>& weight) { forward(weight); }
#else
void step(dcp::ShardedTensor<dcp::bf16, ColumnParallel>& weight) { forward(weight); }
#endif

int main() {}
