// SPDX-License-Identifier: Apache-2.0
// error: dcp: no checkpoint format has this element type; use bool, a fixed-width integer, float, double, std::complex of both, or a dcp float such as dcp::bf16
#include <dcp/core/tensor_view.hpp>
#include <vector>

#ifdef MISTAKE
using Element = long double;
#else
using Element = double;
#endif

dcp::TensorView<Element> view_of(std::vector<Element>& memory) { return {memory, {4, 2}}; }
int main() {}
