// SPDX-License-Identifier: Apache-2.0
// error: dcp: this type is no state; a state holds ShardedTensor, TensorView, numbers, bool, std::string, vectors of numbers or std::byte, nlohmann::json, and types with a member  StateDict state()
#include <dcp/core/state_dict.hpp>

#ifdef MISTAKE
struct Model {
  float scale = 1;
};
#else
struct Model {
  float scale = 1;
  dcp::StateDict state() { return {{"scale", scale}}; }
};
#endif

dcp::StateDict state_of(Model& model) { return {{"model", model}}; }
int main() {}
