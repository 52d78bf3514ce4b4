// SPDX-License-Identifier: Apache-2.0
// error: dcp: a tensor's element type is not const; loading writes into it
#include <dcp/core/tensor_view.hpp>
#include <vector>

#ifdef MISTAKE
using View = dcp::TensorView<float const>;
#else
using View = dcp::TensorView<float>;
#endif

View view_of(std::vector<float>& memory) { return {memory, {4, 2}}; }
int main() {}
