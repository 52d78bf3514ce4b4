// SPDX-License-Identifier: Apache-2.0
// error: dcp: a state entry is const, and loading writes into it; bind a variable that can change
#include <dcp/core/state_dict.hpp>

#ifdef MISTAKE
dcp::StateDict state_of(std::int64_t const& step) { return {{"step", step}}; }
#else
dcp::StateDict state_of(std::int64_t& step) { return {{"step", step}}; }
#endif

int main() {}
