// SPDX-License-Identifier: Apache-2.0
// error: dcp: the member state() of this type does not return a dcp::StateDict; make it  StateDict state()
#include <dcp/core/state_dict.hpp>

void use(dcp::StateDict const&) {}

#ifdef MISTAKE
struct Model {
  float scale = 1;
  void state() {}
};
#else
struct Model {
  float scale = 1;
  dcp::StateDict state() { return {{"scale", scale}}; }
};
#endif

void save_all(Model& model) { use(model); }
int main() {}
