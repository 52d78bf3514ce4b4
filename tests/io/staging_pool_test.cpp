// SPDX-License-Identifier: Apache-2.0
#include <dcp/io/staging_pool.hpp>

#include "support/generate.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

namespace {
auto make(std::uint64_t budget) { return std::make_shared<dcp::StagingPool<>>(budget); }
auto const nothing = [] {};
}  // namespace

TEST_CASE("StagingPool: law: parts that are out never overlap, whatever the order in which they come back") {
  auto const seed = dcp::test::first_seed();
  for (std::uint64_t round = 0; round < 50; ++round) {
    CAPTURE(seed);
    CAPTURE(round);
    dcp::test::Random random{seed + round};
    auto const pool = make(static_cast<std::uint64_t>(random.between(1, 64)) * 4096);
    std::vector<dcp::detail::Staged> out;
    std::uint64_t used = 0;
    for (int step = 0; step < 500; ++step) {
      if (!out.empty() && random.one_in(2)) {
        auto const which = static_cast<std::size_t>(random.between(0, static_cast<std::int64_t>(out.size()) - 1));
        auto const bytes = out[which].bytes;
        REQUIRE(std::all_of(bytes.begin(), bytes.end(), [&](std::byte byte) { return byte == bytes[0]; }));   // nobody else wrote there
        used -= dcp::round_up(out[which].bytes.size(), std::size_t{4096});
        out.erase(out.begin() + static_cast<std::ptrdiff_t>(which));
        continue;
      }
      auto const bytes = static_cast<std::uint64_t>(random.between(1, static_cast<std::int64_t>(pool->capacity())));
      int waits = 0;
      try {
        auto part = pool->take(bytes, [&] {
          if (++waits == 1) throw waits;   // no room: nobody gives back while we wait
        });
        CHECK(part.bytes.size() == bytes);
        CHECK(reinterpret_cast<std::uintptr_t>(part.bytes.data()) % 4096 == 0);
        std::memset(part.bytes.data(), step, part.bytes.size());
        used += dcp::round_up(bytes, std::uint64_t{4096});
        CHECK(used <= pool->capacity());
        out.push_back(std::move(part));
      } catch (int) {
        CHECK(!out.empty());   // an empty pool has room
      }
    }
  }
}

TEST_CASE("StagingPool: the same amounts get the same memory again") {
  auto const pool = make(1 << 20);
  std::vector<std::byte*> first;
  for (int save = 0; save < 5; ++save) {
    std::vector<dcp::detail::Staged> parts;
    for (std::uint64_t const bytes : {5u, 100'000u, 4096u, 300'000u}) parts.push_back(pool->take(bytes, nothing));
    std::vector<std::byte*> here;
    for (auto const& part : parts) here.push_back(part.bytes.data());
    if (save == 0) first = here;
    CHECK(here == first);
  }
  CHECK(pool->most_used() == 4096 + 102'400 + 4096 + 303'104);
  CHECK(pool->waits() == 0);
}

TEST_CASE("StagingPool: who finds no room waits until there is some, or until the pool is stopped") {
  auto const pool = make(64 << 10);
  auto part = std::make_unique<dcp::detail::Staged>(pool->take(64 << 10, nothing));
  std::atomic<bool> got{false};
  std::thread waiter{[&] {
    auto const mine = pool->take(4096, nothing);
    got = true;
  }};
  std::this_thread::sleep_for(std::chrono::milliseconds{30});
  CHECK(!got);
  part.reset();
  waiter.join();
  CHECK(got);
  CHECK(pool->waits() == 1);

  auto const all = pool->take(64 << 10, nothing);
  std::thread stopped{[&] { CHECK_THROWS_AS(pool->take(4096, nothing), int); }};
  std::this_thread::sleep_for(std::chrono::milliseconds{30});
  pool->stop(std::make_exception_ptr(7));
  stopped.join();
  CHECK_THROWS_AS(pool->take(4096, nothing), int);
  pool->start();
  CHECK_THROWS_AS(pool->take((64 << 10) + 1, nothing), dcp::Error);
}
