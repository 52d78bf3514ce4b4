// SPDX-License-Identifier: Apache-2.0
// error: dcp: a layout is a dcp::Placement<...> (or a PlacementOn<...>); this type is none
#include <dcp/core/layout.hpp>

#ifdef MISTAKE
using P = dcp::Shard<0>;
#else
using P = dcp::Placement<dcp::Shard<0>>;
#endif

dcp::Box mine(dcp::DeviceMesh<1> const& mesh) { return dcp::local_box<P>(mesh, {7, 5}); }
int main() {}
