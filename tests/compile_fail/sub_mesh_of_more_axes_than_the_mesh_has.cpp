// SPDX-License-Identifier: Apache-2.0
// error: dcp: sub<...> names an axis twice; name each axis to keep once [axes named == distinct axes]
// error (gcc): the comparison reduces to '(3 == 2)'
// error (clang): '3 == 2'
// error (nvcc): Named=3
// error (nvcc): Distinct=2
#include <dcp/core/mesh.hpp>

#ifdef MISTAKE
auto stage_of(dcp::DeviceMesh<2> const& mesh) { return mesh.sub<0, 1, 1>(); }
#else
auto stage_of(dcp::DeviceMesh<2> const& mesh) { return mesh.sub<0, 1>(); }
#endif

int main() {}
