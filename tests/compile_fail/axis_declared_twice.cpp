// SPDX-License-Identifier: Apache-2.0
// error: dcp: Axes names an axis twice; give each axis of the mesh a tag of its own [axes named == distinct axes]
// error (gcc): the comparison reduces to '(3 == 2)'
// error (clang): '3 == 2'
// error (nvcc): Named=3
// error (nvcc): Distinct=2
#include <dcp/core/placement.hpp>

#ifdef MISTAKE
using Mesh = dcp::Axes<struct dp, struct tp, struct dp>;
#else
using Mesh = dcp::Axes<struct dp, struct tp, struct pp>;
#endif

int main() { return Mesh::count; }
