// SPDX-License-Identifier: Apache-2.0
// error: dcp: a DeviceMesh is made from something with  rank()  and  size() , such as a communicator; this type lacks one of them
#include <dcp/core/mesh.hpp>

struct World {
  int rank() const { return 0; }
  int size() const { return 4; }
};

#ifdef MISTAKE
dcp::DeviceMesh<2> const mesh{4, {2, 2}};
#else
dcp::DeviceMesh<2> const mesh{World{}, {2, 2}};
#endif

int main() {}
