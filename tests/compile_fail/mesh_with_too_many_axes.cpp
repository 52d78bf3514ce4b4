// SPDX-License-Identifier: Apache-2.0
// error: dcp: a DeviceMesh has 0 to 6 axes; make one axis of those that no tensor tells apart [axes <= 6]
// error (gcc): '(7 <= 6)'
// error (clang): '7 <= max_axes'
// error (nvcc): Axes=7
#include <dcp/core/mesh.hpp>

struct World {
  int rank() const { return 0; }
  int size() const { return 4; }
};

#ifdef MISTAKE
dcp::DeviceMesh<7> const mesh{World{}, {1, 1, 1, 1, 1, 2, 2}};
#else
dcp::DeviceMesh<6> const mesh{World{}, {1, 1, 1, 1, 2, 2}};
#endif

int main() {}
