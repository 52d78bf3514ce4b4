// SPDX-License-Identifier: Apache-2.0
// error: dcp: this Placement shards a dimension that the tensor does not have [tensor rank >= rank the Placement needs; dimensions count from 0]
// error (gcc): the comparison reduces to '(1 >= 2)'
// error (clang): '1 >= 2'
// error (nvcc): TensorRank=1
// error (nvcc): Needed=2
#include <dcp/core/layout.hpp>

#ifdef MISTAKE
using P = dcp::Placement<dcp::Shard<1>>;
#else
using P = dcp::Placement<dcp::Shard<0>>;
#endif

dcp::Box mine(dcp::DeviceMesh<1> const& mesh) { return dcp::local_box<P>(mesh, {7}); }
int main() {}
