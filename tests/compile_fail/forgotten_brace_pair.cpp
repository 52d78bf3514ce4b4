// SPDX-License-Identifier: Apache-2.0
// error: dcp: a state is a list of entries, and a brace pair is missing; write {{
#include <dcp/core/state_dict.hpp>

#ifdef MISTAKE
dcp::StateDict state_of(std::int64_t& step) { return {"step", step}; }
#else
dcp::StateDict state_of(std::int64_t& step) { return {{"step", step}}; }
#endif

int main() {}
