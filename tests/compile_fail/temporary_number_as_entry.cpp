// SPDX-License-Identifier: Apache-2.0
// error: dcp: a state entry is bound to a temporary, which is gone before it could be loaded into; name a variable
#include <dcp/core/state_dict.hpp>

struct Schedule {
  std::int64_t steps() const { return 7; }
};

#ifdef MISTAKE
dcp::StateDict state_of(Schedule& schedule) { return {{"step", schedule.steps()}}; }
#else
dcp::StateDict state_of(std::int64_t& steps) { return {{"step", steps}}; }
#endif

int main() {}
