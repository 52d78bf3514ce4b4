// SPDX-License-Identifier: Apache-2.0
#pragma once
// Runs the bodies of the upstream rows on threads. ranks_on_mpi.hpp has the same names; a test includes one of the two before the
// rows.

#include "support/temporary_directory.hpp"

#include <dcp/comm/threads.hpp>

#include <string>

namespace dcp::test {

/// Calls body(world, directory) on `ranks` ranks, which share an empty directory.
template <class Body>
void on_ranks(int ranks, Body const& body) {
  TemporaryDirectory const directory;
  run_threads(ranks, [&](ThreadComm& world) { body(world, directory.path()); }, std::chrono::seconds{60});
}

}  // namespace dcp::test
