// SPDX-License-Identifier: Apache-2.0
// error: dcp: sub<...> names an axis this mesh does not have; axes count from 0 [axis < mesh axes]
// error (gcc): the comparison reduces to '(2 < 2)'
// error (clang): '2 < 2'
// error (nvcc): Axis=2
// error (nvcc): Axes=2
#include <dcp/core/mesh.hpp>

#ifdef MISTAKE
auto stage_of(dcp::DeviceMesh<2> const& mesh) { return mesh.sub<2>({1}); }
#else
auto stage_of(dcp::DeviceMesh<2> const& mesh) { return mesh.sub<1>({1}); }
#endif

int main() {}
