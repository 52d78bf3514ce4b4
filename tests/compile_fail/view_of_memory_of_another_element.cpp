// SPDX-License-Identifier: Apache-2.0
// error: dcp: this memory does not hold the tensor's elements; pass a mutable contiguous range of exactly its element type (std::byte for elements smaller than a byte)
#include <dcp/core/tensor_view.hpp>
#include <vector>

#ifdef MISTAKE
dcp::TensorView<float> view_of(std::vector<double>& memory) { return {memory, {4, 2}}; }
#else
dcp::TensorView<float> view_of(std::vector<float>& memory) { return {memory, {4, 2}}; }
#endif

int main() {}
