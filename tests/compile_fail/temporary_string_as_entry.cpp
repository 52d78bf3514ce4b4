// SPDX-License-Identifier: Apache-2.0
// error: dcp: a state entry is bound to a temporary, which is gone before it could be loaded into; name a variable
#include <dcp/core/state_dict.hpp>

#ifdef MISTAKE
dcp::StateDict state_of(std::string& name) { return {{"name", name + ".bin"}}; }
#else
dcp::StateDict state_of(std::string& name) { return {{"name", name}}; }
#endif

int main() {}
