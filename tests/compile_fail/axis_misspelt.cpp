// SPDX-License-Identifier: Apache-2.0
// An axis is a type, so the compiler knows a misspelt one.
// error (gcc): 'tq' was not declared in this scope
// error (clang): use of undeclared identifier 'tq'
// error (nvcc): identifier "tq" is undefined
#include <dcp/core/placement.hpp>

using Mesh = dcp::Axes<struct dp, struct tp>;

#ifdef MISTAKE
using P = dcp::PlacementOn<Mesh, dcp::On<tq, dcp::Shard<0>>>;
#else
using P = dcp::PlacementOn<Mesh, dcp::On<tp, dcp::Shard<0>>>;
#endif

int main() { return P::mesh_rank; }
