// SPDX-License-Identifier: Apache-2.0
// error: dcp: PlacementOn takes the Axes and then  On<axis, rule>  for each axis that does not replicate
#include <dcp/core/placement.hpp>

using Mesh = dcp::Axes<struct dp, struct tp>;

#ifdef MISTAKE
using P = dcp::PlacementOn<Mesh, dcp::Shard<0>>;
#else
using P = dcp::PlacementOn<Mesh, dcp::On<tp, dcp::Shard<0>>>;
#endif

int main() { return P::mesh_rank; }
