// SPDX-License-Identifier: Apache-2.0
// error: dcp: per_rank is given a temporary, which is gone before it could be loaded into; name a variable
#include <dcp/core/state_dict.hpp>

#ifdef MISTAKE
dcp::StateDict state_of(std::int64_t& seed) { return {{"seed", dcp::per_rank(seed + 1)}}; }
#else
dcp::StateDict state_of(std::int64_t& seed) { return {{"seed", dcp::per_rank(seed)}}; }
#endif

int main() {}
