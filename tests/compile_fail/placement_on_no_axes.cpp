// SPDX-License-Identifier: Apache-2.0
// error: dcp: PlacementOn takes the names of the mesh axes first, a dcp::Axes<...>
#include <dcp/core/placement.hpp>

using Mesh = dcp::Axes<struct tp>;

#ifdef MISTAKE
using P = dcp::PlacementOn<dcp::DeviceMesh<1>, dcp::On<struct tp, dcp::Shard<0>>>;
#else
using P = dcp::PlacementOn<Mesh, dcp::On<struct tp, dcp::Shard<0>>>;
#endif

int main() { return P::mesh_rank; }
