// SPDX-License-Identifier: Apache-2.0
// error: dcp: sub<...> names an axis this mesh does not have; axes count from 0 [axis < mesh axes]
// error (gcc): the comparison reduces to '(3 < 3)'
// error (clang): '3 < 3'
// error (nvcc): Axis=3
// error (nvcc): Axes=3
#include <dcp/core/mesh.hpp>

#ifdef MISTAKE
auto stage_of(dcp::DeviceMesh<3> const& mesh) { return mesh.sub<1, 3>(); }
#else
auto stage_of(dcp::DeviceMesh<3> const& mesh) { return mesh.sub<1, 2>(); }
#endif

int main() {}
