// SPDX-License-Identifier: Apache-2.0
// error: dcp: a tensor has at most 16 dimensions
#include <dcp/core/shape.hpp>

#ifdef MISTAKE
using Weight = dcp::Shape<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17>;
#else
using Weight = dcp::Shape<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16>;
#endif

int main() { return Weight::rank; }
