// SPDX-License-Identifier: Apache-2.0
// error: dcp: a layout is a dcp::Placement<...> (or a PlacementOn<...>); this type is none
#include <dcp/core/layout.hpp>

#ifdef MISTAKE
auto checked(dcp::Layout const& layout) { return dcp::as_placement<dcp::Shard<0>>(layout); }
#else
auto checked(dcp::Layout const& layout) { return dcp::as_placement<dcp::Placement<dcp::Shard<0>>>(layout); }
#endif

int main() {}
