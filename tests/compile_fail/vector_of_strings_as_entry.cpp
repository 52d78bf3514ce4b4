// SPDX-License-Identifier: Apache-2.0
// error: dcp: this type is no state; a state holds ShardedTensor, TensorView, numbers, bool, std::string, vectors of numbers or std::byte, nlohmann::json, and types with a member  StateDict state()
#include <dcp/core/state_dict.hpp>

#ifdef MISTAKE
dcp::StateDict state_of(std::vector<std::string>& names) { return {{"names", names}}; }
#else
dcp::StateDict state_of(std::vector<int>& names) { return {{"names", names}}; }
#endif

int main() {}
