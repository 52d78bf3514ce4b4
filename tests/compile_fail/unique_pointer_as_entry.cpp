// SPDX-License-Identifier: Apache-2.0
// error: dcp: this type is no state; a state holds ShardedTensor, TensorView, numbers, bool, std::string, vectors of numbers or std::byte, nlohmann::json, and types with a member  StateDict state()
#include <dcp/core/state_dict.hpp>

struct Model {
  float scale = 1;
  dcp::StateDict state() { return {{"scale", scale}}; }
};

#ifdef MISTAKE
dcp::StateDict state_of(std::unique_ptr<Model>& model) { return {{"model", model}}; }
#else
dcp::StateDict state_of(std::unique_ptr<Model>& model) { return {{"model", *model}}; }
#endif

int main() {}
