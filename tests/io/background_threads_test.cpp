// SPDX-License-Identifier: Apache-2.0
#include <dcp/io/background_threads.hpp>

#include "support/campaign.hpp"

#include <doctest/doctest.h>

#include <sys/wait.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <thread>

namespace {
using Threads = dcp::BackgroundThreads<>;
using namespace std::chrono_literals;

// The thread sanitizer ends a child that makes threads when its parent had some.
int const says_so = dcp::test::under_a_sanitizer ? std::fprintf(stderr, "not run: the library's threads in a child of a fork, and at its end (under a sanitizer)\n") : 0;
}  // namespace

TEST_CASE("BackgroundThreads: jobs that wait for each other all run, and threads are used again") {
  std::set<std::thread::id> seen;
  std::mutex mutex;
  std::condition_variable changed;
  for (int round = 0; round < 10; ++round) {
    int here = 0, done = 0;
    for (int job = 0; job < 4; ++job)
      Threads::instance().run([&] {
        std::unique_lock lock{mutex};
        seen.insert(std::this_thread::get_id());
        ++here;
        changed.notify_all();
        changed.wait(lock, [&] { return here == 4; });
        ++done;
        changed.notify_all();
      });
    std::unique_lock lock{mutex};
    CHECK(changed.wait_for(lock, 30s, [&] { return done == 4; }));
  }
  CHECK(seen.size() < 40);
}

TEST_CASE("BackgroundThreads: they take no signals of the program") {
  std::atomic<bool> blocked{false}, done{false};
  Threads::instance().run([&] {
    sigset_t mask;
    ::pthread_sigmask(SIG_BLOCK, nullptr, &mask);
    blocked = ::sigismember(&mask, SIGTERM) == 1 && ::sigismember(&mask, SIGINT) == 1;
    done = true;
  });
  while (!done) std::this_thread::sleep_for(1ms);
  CHECK(blocked);
}

TEST_CASE("BackgroundThreads: the end of the process waits for jobs, but no longer than it was told; a child of a fork has threads of its own" * doctest::skip(dcp::test::under_a_sanitizer)) {
  for (bool const stuck : {false, true}) {
    CAPTURE(stuck);
    auto const before = std::chrono::steady_clock::now();
    pid_t const child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      Threads::instance().set_exit_deadline(stuck ? 200ms : 60s);
      Threads::instance().run([stuck] {
        std::this_thread::sleep_for(stuck ? 600s : 100ms);
        ::_exit(7);   // only who is waited for gets here
      });
      std::exit(3);
    }
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == (stuck ? 3 : 7));
    CHECK(std::chrono::steady_clock::now() - before < 60s);
  }
}
