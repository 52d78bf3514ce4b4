// SPDX-License-Identifier: Apache-2.0
// error: dcp: a state entry is const, and loading writes into it; bind a variable that can change
#include <dcp/core/state_dict.hpp>

#ifdef MISTAKE
struct Model {
  float scale = 1;
  dcp::StateDict state() const { return {{"scale", scale}}; }
};
#else
struct Model {
  float scale = 1;
  dcp::StateDict state() { return {{"scale", scale}}; }
};
#endif

int main() {}
