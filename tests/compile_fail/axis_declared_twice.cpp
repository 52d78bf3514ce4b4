// SPDX-License-Identifier: Apache-2.0
// error: dcp: Axes names an axis twice; each axis of a mesh has its own tag [axes == distinct axes]
// error (gcc): the comparison reduces to '(3 == 2)'
// error (clang): '3 == 2'
// error (nvcc): Axes=3
// error (nvcc): Distinct=2
#include <dcp/core/placement.hpp>

#ifdef MISTAKE
using Mesh = dcp::Axes<struct dp, struct tp, struct dp>;
#else
using Mesh = dcp::Axes<struct dp, struct tp, struct pp>;
#endif

int main() { return Mesh::count; }
