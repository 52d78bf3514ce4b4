// SPDX-License-Identifier: Apache-2.0
// error: dcp: a state entry is const, and loading writes into it; bind a variable that can change
#include <dcp/core/state_dict.hpp>

struct Model {
  float scale = 1;
  dcp::StateDict state() { return {{"scale", scale}}; }
};

#ifdef MISTAKE
dcp::StateDict state_of(Model const& model) { return {{"model", model}}; }
#else
dcp::StateDict state_of(Model& model) { return {{"model", model}}; }
#endif

int main() {}
