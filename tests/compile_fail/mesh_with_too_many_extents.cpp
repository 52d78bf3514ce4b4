// SPDX-License-Identifier: Apache-2.0
// error: dcp: a DeviceMesh takes one extent per axis; list as many extents as it has axes [extents given == mesh axes]
// error (gcc): the comparison reduces to '(3 == 2)'
// error (clang): '3 == 2'
// error (nvcc): Given=3
// error (nvcc): Axes=2
#include <dcp/core/mesh.hpp>

struct World {
  int rank() const { return 0; }
  int size() const { return 4; }
};

#ifdef MISTAKE
dcp::DeviceMesh<2> const mesh{World{}, {2, 2, 1}};
#else
dcp::DeviceMesh<2> const mesh{World{}, {2, 2}};
#endif

int main() {}
