// SPDX-License-Identifier: Apache-2.0
// The explorer itself: it finds what is wrong with small programs, and nothing with right ones.
#include <dcp/base/threading.hpp>

#include "schedules/scheduler.hpp"

#include <doctest/doctest.h>

#include <chrono>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using namespace std::chrono_literals;
using dcp::detail::Atomic;
using dcp::detail::Condition;
using dcp::detail::Mutex;
using dcp::detail::SteadyClock;
using dcp::detail::Thread;
using dcp::test::Found;
using dcp::test::require;

Found look(std::function<void()> const& body, int deviations = 2) { return dcp::test::explore("test", {{deviations, true}}, 0, 1, body); }

// What ran in each order in which two threads can take their mutexes.
Found two_threads(bool same) {
  return look([same] {
    Mutex first, second;
    Thread other{[&] { std::lock_guard const lock{same ? first : second}; }};
    { std::lock_guard const lock{first}; }
    other.join();
  });
}

}  // namespace

TEST_CASE("explore: two threads with one mutex have two orders, and with a mutex each they have one") {
  CHECK(two_threads(true).failure == "");
  CHECK(two_threads(true).distinct == 2);
  CHECK(two_threads(false).distinct == 1);
}

TEST_CASE("explore: without deviations there is one schedule") {
  auto const found = look([] { Thread{[] { dcp::test::step("a step"); }}.join(); }, 0);
  CHECK(found.failure == "");
  CHECK(found.schedules == 1);
}

TEST_CASE("explore: an increment in two parts is lost in one order, that order is named, and run again it fails again") {
  auto const body = [] {
    Atomic<int> count{0};
    auto const increment = [&] {
      int const before = count;
      count = before + 1;
    };
    Thread other{increment};
    increment();
    other.join();
    require(count == 2, "an increment is lost");
  };
  CHECK(look(body, 0).failure == "");
  auto const found = look(body, 2);
  CHECK(found.failure.find("an increment is lost") != std::string::npos);
  auto const again = found.failure.find("DCP_SCHEDULE='");
  REQUIRE(again != std::string::npos);
  auto const schedule = found.failure.substr(again + 14, found.failure.find('\'', again + 14) - again - 14);
  CAPTURE(schedule);
  ::setenv("DCP_SCHEDULE", schedule.c_str(), 1);
  auto const replayed = look(body, 0);
  ::unsetenv("DCP_SCHEDULE");
  CHECK(replayed.failure.find("an increment is lost") != std::string::npos);
}

TEST_CASE("explore: at random it finds the same") {
  auto const found = dcp::test::explore("random", {}, 1000, 7, [] {
    Atomic<int> count{0};
    Thread other{[&] { count = count + 1; }};
    count = count + 1;
    other.join();
    require(count == 2, "an increment is lost");
  });
  CHECK(found.failure.find("an increment is lost") != std::string::npos);
}

TEST_CASE("explore: two mutexes in two orders are a deadlock, and it says who waits where") {
  auto const found = look([] {
    Mutex first, second;
    Thread other{[&] {
      std::lock_guard const one{first};
      std::lock_guard const two{second};
    }};
    {
      std::lock_guard const two{second};
      std::lock_guard const one{first};
    }
    other.join();
  });
  CHECK(found.failure.find("deadlock") != std::string::npos);
  CHECK(found.failure.find("thread 1: lock a mutex") != std::string::npos);
}

namespace {
// A gate with an error that reviewers miss: what is waited for is changed without the mutex.
struct Gate {
  Mutex mutex;
  Condition changed;
  Atomic<bool> is_open{false};
  bool right;
  explicit Gate(bool is_right) : right{is_right} {}
  void open() {
    if (right) {
      std::lock_guard const lock{mutex};
      is_open = true;
    } else {
      is_open = true;
    }
    changed.notify_all();
  }
  void pass() {
    std::unique_lock lock{mutex};
    changed.wait(lock, [&] { return is_open.load(); });
  }
  bool pass_within(std::chrono::milliseconds time) {
    std::unique_lock lock{mutex};
    return changed.wait_for(lock, time, [&] { return is_open.load(); });
  }
};
}  // namespace

TEST_CASE("explore: a wake-up that is lost is a deadlock, and where the wait has a limit, one that could have gone on") {
  for (bool const right : {false, true})
    for (bool const limited : {false, true}) {
      CAPTURE(right);
      CAPTURE(limited);
      auto const found = look([&] {
        Gate gate{right};
        Thread other{[&] { gate.open(); }};
        if (limited) gate.pass_within(20ms);
        else gate.pass();
        other.join();
      });
      if (right) CHECK(found.failure == "");
      else CHECK(found.failure.find(limited ? "nobody told it" : "deadlock") != std::string::npos);
    }
}

TEST_CASE("explore: time moves when nobody can run, in the order of deadlines, and earlier as a deviation, if that is near") {
  auto const sleepers = [](std::chrono::milliseconds time, bool order) {
    return [time, order] {
      std::vector<int> ended;
      Mutex mutex;
      auto const sleeper = [&](int number, std::chrono::milliseconds for_time) {
        dcp::detail::this_thread::sleep_for(for_time);
        std::lock_guard const lock{mutex};
        ended.push_back(number);
      };
      Thread late{sleeper, 2, 2 * time}, early{sleeper, 1, time};
      auto const begun = SteadyClock::now();
      for (int i = 0; i < 3; ++i) dcp::test::step("work");
      std::size_t const soon = [&] {
        std::lock_guard const lock{mutex};
        return ended.size();
      }();
      late.join(), early.join();
      require(SteadyClock::now() - begun <= 3 * time, "it took longer");
      require(!order || soon == 0, "who sleeps came before who works");
    };
  };
  CHECK(look(sleepers(50ms, false)).failure == "");
  CHECK(look(sleepers(50ms, true), 0).failure == "");
  CHECK(look(sleepers(50ms, true), 2).failure.find("came before") != std::string::npos);
  CHECK(look(sleepers(1h, true), 2).failure == "");
}

TEST_CASE("explore: exceptions that are being handled stay with their threads") {
  auto const found = look([] {
    auto const handle = [](std::string const& mine) {
      try {
        throw std::runtime_error{mine};
      } catch (std::runtime_error const&) {
        dcp::test::step("others throw");
        try {
          throw;
        } catch (std::runtime_error const& error) {
          require(error.what() == mine, "another thread's exception");
        }
      }
    };
    Thread one{handle, "one"}, two{handle, "two"};
    handle("three");
    one.join(), two.join();
  });
  CHECK(found.failure == "");
  CHECK(found.schedules > 3);
}

TEST_CASE("explore: every deviation of choose() is tried") {
  auto const found = look([] { require(dcp::test::choose(5, "a number") != 4, "it was four"); }, 1);
  CHECK(found.failure.find("it was four") != std::string::npos);
}

TEST_CASE("explore: an exception that leaves a thread, and the death of the process, end the search") {
  CHECK(look([] { throw std::runtime_error{"left"}; }).failure.find("left") != std::string::npos);
  CHECK(look([] { std::_Exit(3); }).failure.find("exit status 3") != std::string::npos);
  CHECK(look([] { ::raise(SIGTERM); }).failure.find("signal 15") != std::string::npos);
}

#if DCP_TEST_TSAN
TEST_CASE("explore: under the thread sanitizer a race is found, though no two threads ever run at once") {
  CHECK(look([] {
          int count = 0;
          Thread other{[&] { ++count; }};
          ++count;
          other.join();
        }).failure.find("exit status 66") != std::string::npos);
  CHECK(look([] {
          int count = 0;
          Mutex mutex;
          auto const increment = [&] {
            std::lock_guard const lock{mutex};
            ++count;
          };
          Thread other{increment};
          increment();
          other.join();
        }).failure == "");
}
#endif
