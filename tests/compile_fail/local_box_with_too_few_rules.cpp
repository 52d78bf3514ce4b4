// SPDX-License-Identifier: Apache-2.0
// error: dcp: a Placement lists one rule per mesh axis; write Replicate for the axes it ignores [rules given == mesh axes]
// error (gcc): the comparison reduces to '(1 == 3)'
// error (clang): '1 == 3'
// error (nvcc): Rules=1
// error (nvcc): Axes=3
#include <dcp/core/layout.hpp>

#ifdef MISTAKE
dcp::Box mine(dcp::DeviceMesh<3> const& mesh) { return dcp::local_box<dcp::Placement<dcp::Shard<0>>>(mesh, {7, 5}); }
#else
dcp::Box mine(dcp::DeviceMesh<3> const& mesh) { return dcp::local_box<dcp::Placement<dcp::Replicate, dcp::Shard<0>, dcp::Replicate>>(mesh, {7, 5}); }
#endif

int main() {}
