// SPDX-License-Identifier: Apache-2.0
// error: dcp: On<axis, rule> names an axis this mesh does not have; use a tag of its Axes [times the axis occurs in the mesh == 1]
// error (gcc): '(0 == 1)'
// error (clang): '0 == 1'
// error (nvcc): Tag=pp
// error (nvcc): Occurrences=0
#include <dcp/core/placement.hpp>

using Mesh = dcp::Axes<struct dp, struct tp>;
struct pp;

#ifdef MISTAKE
using P = dcp::PlacementOn<Mesh, dcp::On<pp, dcp::Shard<0>>>;
#else
using P = dcp::PlacementOn<Mesh, dcp::On<tp, dcp::Shard<0>>>;
#endif

int main() { return P::mesh_rank; }
