// SPDX-License-Identifier: Apache-2.0
// error: dcp: a state entry is bound to a temporary, which is gone before it could be loaded into; name a variable
#include <dcp/core/state_dict.hpp>

#ifdef MISTAKE
void add_to(dcp::StateDict& state) { state.add("losses", std::vector<float>{1, 2}); }
#else
void add_to(dcp::StateDict& state, std::vector<float>& losses) { state.add("losses", losses); }
#endif

int main() {}
