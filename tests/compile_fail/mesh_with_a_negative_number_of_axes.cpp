// SPDX-License-Identifier: Apache-2.0
// error: dcp: a DeviceMesh has 0 to 6 axes [axes >= 0]
// error (gcc): '(-1 >= 0)'
// error (clang): '-1 >= 0'
// error (nvcc): Axes=-1
#include <dcp/core/mesh.hpp>

struct World {
  int rank() const { return 0; }
  int size() const { return 4; }
};

#ifdef MISTAKE
using Mesh = dcp::DeviceMesh<-1>;
#else
using Mesh = dcp::DeviceMesh<1>;
#endif

int main() { return static_cast<int>(sizeof(Mesh)) == 0; }
