// SPDX-License-Identifier: Apache-2.0
// error: dcp: a state is a list of entries, and a brace pair is missing; write {{
#include <dcp/core/state_dict.hpp>

void use(dcp::StateDict const&) {}

#ifdef MISTAKE
void save_all(std::int64_t& step) { use({"step", step}); }
#else
void save_all(std::int64_t& step) { use({{"step", step}}); }
#endif

int main() {}
