// SPDX-License-Identifier: Apache-2.0
// error: dcp: elements smaller than a byte cannot be sliced; view the bytes that hold them [bits of an element >= 8]
// error (gcc): '(4 >= 8)'
// error (clang): '4 >= 8'
// error (nvcc): Bits=4
#include <dcp/core/tensor_view.hpp>

#ifdef MISTAKE
using Element = dcp::f4;
#else
using Element = std::byte;
#endif

dcp::TensorView<Element> first_rows(dcp::TensorView<Element> const& view) { return view.slice(0, 0, 2); }
int main() {}
