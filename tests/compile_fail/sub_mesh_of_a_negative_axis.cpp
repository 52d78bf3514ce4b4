// SPDX-License-Identifier: Apache-2.0
// error: dcp: sub<...> counts axes from 0; negative numbers do not count from the end here [axis >= 0]
// error (gcc): '(-1 >= 0)'
// error (clang): '-1 >= 0'
// error (nvcc): Axis=-1
#include <dcp/core/mesh.hpp>

#ifdef MISTAKE
auto stage_of(dcp::DeviceMesh<3> const& mesh) { return mesh.sub<0, -1>(); }
#else
auto stage_of(dcp::DeviceMesh<3> const& mesh) { return mesh.sub<0, 1>(); }
#endif

int main() {}
