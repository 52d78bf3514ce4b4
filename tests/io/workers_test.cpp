// SPDX-License-Identifier: Apache-2.0
#include <dcp/io/workers.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using dcp::Workers;

TEST_CASE("workers: every job runs once, on a thread that is not the caller's") {
  for (std::size_t const threads : {1u, 2u, 5u}) {
    std::vector<std::atomic<int>> runs(500);
    std::atomic<bool> elsewhere{true};
    auto const caller = std::this_thread::get_id();
    Workers<> workers{threads};
    CHECK(workers.threads() == threads);
    for (std::size_t i = 0; i < runs.size(); ++i)
      workers.submit([&, i](std::size_t thread) {
        ++runs[i];
        if (thread >= threads || std::this_thread::get_id() == caller) elsewhere = false;
      });
    workers.finish([] {});
    for (auto const& count : runs) CHECK(count == 1);
    CHECK(elsewhere);
  }
}

TEST_CASE("workers: jobs with the same thread number never run at once") {
  std::vector<int> counts(3, 0);   // not atomic: the thread sanitizer would see it
  Workers<> workers{3};
  for (int i = 0; i < 300; ++i) workers.submit([&](std::size_t thread) { ++counts[thread]; });
  workers.finish([] {});
  CHECK(counts[0] + counts[1] + counts[2] == 300);
}

TEST_CASE("workers: an urgent job goes before those that wait") {
  Workers<> workers{1};
  std::atomic<bool> go{false};
  std::vector<std::string> order;
  workers.submit([&](std::size_t) {
    while (!go) std::this_thread::yield();
  });
  workers.submit([&](std::size_t) { order.emplace_back("waiting"); });
  workers.submit([&](std::size_t) { order.emplace_back("urgent"); }, true);
  go = true;
  workers.finish([] {});
  CHECK(order == std::vector<std::string>{"urgent", "waiting"});
}

TEST_CASE("workers: the first exception ends the queue, is thrown once, and the workers can be used again") {
  Workers<> workers{2};
  std::atomic<int> ran{0};
  for (int i = 0; i < 1000; ++i)
    workers.submit([&, i](std::size_t) {
      ++ran;
      if (i == 3) throw std::runtime_error{"three"};
      std::this_thread::sleep_for(std::chrono::microseconds{20});
    });
  CHECK_THROWS_WITH(workers.finish([] {}), "three");
  CHECK(ran < 1000);
  int const before = ran;
  workers.submit([&](std::size_t) { ++ran; });
  CHECK_NOTHROW(workers.finish([] {}));
  CHECK(ran == before + 1);
}

TEST_CASE("workers: an exception of the caller's meanwhile ends the queue too") {
  Workers<> workers{1};
  std::atomic<int> ran{0};
  for (int i = 0; i < 100; ++i)
    workers.submit([&](std::size_t) {
      ++ran;
      std::this_thread::sleep_for(std::chrono::milliseconds{1});
    });
  CHECK_THROWS_WITH(workers.finish([] { throw std::runtime_error{"a rank is gone"}; }), "a rank is gone");
  CHECK(ran < 100);
}

TEST_CASE("workers: waiting for a condition returns when a job has made it true, with other jobs left") {
  Workers<> workers{1};
  std::atomic<int> done{0};
  std::atomic<bool> go{false};
  workers.submit([&](std::size_t) { ++done; });
  workers.submit([&](std::size_t) {
    while (!go) std::this_thread::yield();
    ++done;
  });
  workers.wait_until([&] { return done == 1; }, [] {});
  CHECK(done == 1);
  go = true;
  workers.finish([] {});
  CHECK(done == 2);
}

TEST_CASE("workers: destroyed with jobs in the queue, they end what has begun and drop the rest") {
  std::atomic<int> begun{0}, ended{0};
  {
    Workers<> workers{2};
    for (int i = 0; i < 200; ++i)
      workers.submit([&](std::size_t) {
        ++begun;
        std::this_thread::sleep_for(std::chrono::milliseconds{1});
        ++ended;
      });
  }
  CHECK(begun == ended);
  CHECK(begun < 200);
}
