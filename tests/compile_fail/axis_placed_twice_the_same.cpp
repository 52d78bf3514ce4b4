// SPDX-License-Identifier: Apache-2.0
// error: dcp: PlacementOn places an axis twice; give each axis one On [times the axis is placed == 1]
// error (gcc): '(2 == 1)'
// error (clang): '2 == 1'
// error (nvcc): Tag=tp
// error (nvcc): Times=2
#include <dcp/core/placement.hpp>

using Mesh = dcp::Axes<struct dp, struct tp>;

#ifdef MISTAKE
using P = dcp::PlacementOn<Mesh, dcp::On<tp, dcp::Shard<0>>, dcp::On<tp, dcp::Shard<0>>>;
#else
using P = dcp::PlacementOn<Mesh, dcp::On<tp, dcp::Shard<0>>>;
#endif

int main() { return P::mesh_rank; }
