// SPDX-License-Identifier: Apache-2.0
#pragma once
// A broken stager, which tests of torn snapshots must find.

#include <dcp/checkpoint/stager.hpp>

#include <string_view>

namespace dcp::test {

/// Says that it has copied when it has only begun to.
struct Hasty {
  static constexpr std::string_view name = "hasty";
  static void begin(StagingWork& work) {
    work.begin_copies();
    work.exchange();
  }
  static void finish(StagingWork&) {}
};

}  // namespace dcp::test
