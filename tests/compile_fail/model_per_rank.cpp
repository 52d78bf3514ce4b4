// SPDX-License-Identifier: Apache-2.0
// error: dcp: per_rank takes a value (a number, std::string, bytes, JSON, a vector of numbers); give tensors a Placement instead
#include <dcp/core/state_dict.hpp>

struct Model {
  float scale = 1;
  dcp::StateDict state() { return {{"scale", scale}}; }
};

#ifdef MISTAKE
dcp::StateDict state_of(Model& model) { return {{"model", dcp::per_rank(model)}}; }
#else
dcp::StateDict state_of(Model& model) { return {{"model", {{"scale", dcp::per_rank(model.scale)}}}}; }
#endif

int main() {}
