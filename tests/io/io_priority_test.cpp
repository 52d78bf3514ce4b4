// SPDX-License-Identifier: Apache-2.0
#include <dcp/io/io_priority.hpp>

#include <doctest/doctest.h>

#include <thread>

#include <sys/syscall.h>
#include <unistd.h>

namespace {
long priority() { return ::syscall(SYS_ioprio_get, 1, 0); }
constexpr long lowest_best_effort = 2 << 13 | 7;
}  // namespace

TEST_CASE("LowIoPriority: this thread and those that it starts have it while it lives, and other threads keep theirs") {
  long const before = priority();
  std::thread{[before] {
    long started = 0;
    {
      dcp::detail::LowIoPriority<> const low{true};
      CHECK(priority() == lowest_best_effort);
      std::thread{[&] { started = priority(); }}.join();
    }
    CHECK(started == lowest_best_effort);
    CHECK(priority() == before);
    dcp::detail::LowIoPriority<> const none{false};
    CHECK(priority() == before);
  }}.join();
  CHECK(priority() == before);
}
