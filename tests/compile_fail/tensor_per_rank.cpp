// SPDX-License-Identifier: Apache-2.0
// error: dcp: per_rank takes a value (a number, std::string, bytes, JSON, a vector of numbers); give tensors a Placement instead
#include <dcp/core/state_dict.hpp>

using Weight = dcp::ShardedTensor<float, dcp::Placement<dcp::Shard<0>>>;

#ifdef MISTAKE
dcp::StateDict state_of(Weight& weight) { return {{"weight", dcp::per_rank(weight)}}; }
#else
dcp::StateDict state_of(Weight& weight) { return {{"weight", weight}}; }
#endif

int main() {}
