// SPDX-License-Identifier: Apache-2.0
// error: dcp: sub<...> names an axis twice; name each axis to keep once [axes named == distinct axes]
// error (gcc): the comparison reduces to '(2 == 1)'
// error (clang): '2 == 1'
// error (nvcc): Named=2
// error (nvcc): Distinct=1
#include <dcp/core/mesh.hpp>

#ifdef MISTAKE
auto stage_of(dcp::DeviceMesh<3> const& mesh) { return mesh.sub<1, 1>(); }
#else
auto stage_of(dcp::DeviceMesh<3> const& mesh) { return mesh.sub<1, 2>(); }
#endif

int main() {}
