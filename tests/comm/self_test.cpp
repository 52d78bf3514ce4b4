// SPDX-License-Identifier: Apache-2.0
#include "../support/comm_conformance.hpp"

#include <dcp/comm/self.hpp>

#include <doctest/doctest.h>

TEST_CASE("SelfComm: does what every communicator must do") {
  dcp::SelfComm self;
  dcp::test::check_communicator(self);
}
