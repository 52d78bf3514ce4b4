// SPDX-License-Identifier: Apache-2.0
// error: dcp: the member state() of this type does not return a dcp::StateDict; make it  StateDict state()
#include <dcp/core/state_dict.hpp>

#ifdef MISTAKE
struct Model {
  float scale = 1;
  dcp::Entry state() { return {"scale", scale}; }
};
#else
struct Model {
  float scale = 1;
  dcp::StateDict state() { return {{"scale", scale}}; }
};
#endif

dcp::StateDict state_of(Model& model) { return {{"model", model}}; }
int main() {}
