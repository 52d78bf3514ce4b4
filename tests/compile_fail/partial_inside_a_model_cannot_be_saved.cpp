// SPDX-License-Identifier: Apache-2.0
// error: dcp: a tensor with Partial axes holds unreduced terms and has no single value to save; all-reduce it first [Partial axes == 0]
// error (gcc): '(2 == 0)'
// error (clang): '2 == 0'
// error (nvcc): Axes=2
#include <dcp/core/state_dict.hpp>

#ifdef MISTAKE
using Gradient = dcp::ShardedTensor<float, dcp::Placement<dcp::Partial, dcp::Partial>>;
#else
using Gradient = dcp::ShardedTensor<float, dcp::Placement<dcp::Replicate, dcp::Replicate>>;
#endif

struct Model {
  Gradient gradient;
  dcp::StateDict state() { return {{"optimizer", {{"gradient", gradient}}}}; }
};
int main() {}
