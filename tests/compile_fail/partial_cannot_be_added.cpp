// SPDX-License-Identifier: Apache-2.0
// error: dcp: a tensor with Partial axes holds unreduced terms and has no single value to save; all-reduce it first [Partial axes == 0]
// error (gcc): '(1 == 0)'
// error (clang): '1 == 0'
// error (nvcc): Axes=1
#include <dcp/core/state_dict.hpp>

#ifdef MISTAKE
using Gradient = dcp::ShardedTensor<float, dcp::Placement<dcp::Partial>>;
#else
using Gradient = dcp::ShardedTensor<float, dcp::Placement<dcp::Replicate>>;
#endif

void add_to(dcp::StateDict& state, Gradient& gradient) { state.add("gradient", gradient); }
int main() {}
