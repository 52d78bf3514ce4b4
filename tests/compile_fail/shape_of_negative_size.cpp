// SPDX-License-Identifier: Apache-2.0
// error: dcp: a dimension of negative size; sizes count elements, from 0 up
// error (gcc): the comparison reduces to '(-1 >= 0)'
// error (nvcc): Sizes=<4L, -1L>
#include <dcp/core/shape.hpp>

#ifdef MISTAKE
using Weight = dcp::Shape<4, -1>;
#else
using Weight = dcp::Shape<4, 1>;
#endif

int main() { return Weight::rank; }
