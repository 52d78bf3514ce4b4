// SPDX-License-Identifier: Apache-2.0
// error: dcp: a state entry is bound to a temporary, which is gone before it could be loaded into; name a variable
#include <dcp/core/state_dict.hpp>

struct Model {
  float scale = 1;
  dcp::StateDict state() { return {{"scale", scale}}; }
};

#ifdef MISTAKE
dcp::StateDict state_of() { return {{"model", Model{}}}; }
#else
dcp::StateDict state_of(Model& model) { return {{"model", model}}; }
#endif

int main() {}
