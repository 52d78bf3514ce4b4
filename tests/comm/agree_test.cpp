// SPDX-License-Identifier: Apache-2.0
#include "../support/comm_conformance.hpp"

#include <dcp/comm/agree.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <bit>
#include <numeric>

using namespace std::chrono_literals;

namespace {

template <class F>
dcp::Error error_of(F&& step) {
  try {
    step();
  } catch (dcp::Error const& error) {
    return error;
  }
  throw std::runtime_error{"no Error was thrown"};
}

/// Counts what a communicator is asked for.
struct Counting {
  dcp::ThreadComm& inner;
  int barriers = 0, broadcasts = 0, gathers = 0, exchanges = 0;
  std::size_t received = 0, gathered_bytes = 0;

  int rank() const { return inner.rank(); }
  int size() const { return inner.size(); }
  void barrier() { ++barriers, inner.barrier(); }
  void broadcast(dcp::ByteSpan bytes, int root) { ++broadcasts, inner.broadcast(bytes, root); }
  void all_gather(dcp::ConstByteSpan mine, dcp::ByteSpan all) { ++gathers, gathered_bytes += all.size(), inner.all_gather(mine, all); }
  std::vector<dcp::Message> exchange(std::vector<dcp::Message> outgoing) {
    ++exchanges;
    auto incoming = inner.exchange(std::move(outgoing));
    received += incoming.size();
    return incoming;
  }
  dcp::ThreadComm split(int color, int key) { return inner.split(color, key); }
  void progress() { inner.progress(); }
};

dcp::Bytes bytes_of(std::string_view text) {
  auto const bytes = dcp::as_byte_span(text);
  return {bytes.begin(), bytes.end()};
}

}  // namespace

TEST_CASE("agree: gives each rank its own result when all succeed, at the price of one all_gather of 8 bytes") {
  dcp::run_threads(4, [](dcp::ThreadComm& world) {
    Counting comm{world};
    CHECK(dcp::agree(comm, "test", [&] { return world.rank() * 10; }) == world.rank() * 10);
    CHECK(comm.gathers == 1);
    CHECK(comm.gathered_bytes == 4 * 8);
    CHECK(comm.broadcasts + comm.barriers + comm.exchanges == 0);
    int ran = 0;
    dcp::agree(comm, "test", [&] { ++ran; });
    CHECK(ran == 1);
    auto const moved = dcp::agree(comm, "test", [&] { return std::make_unique<int>(5); });   // move-only results
    CHECK(*moved == 5);
  });
}

TEST_CASE("agree: when ranks fail, all throw the error of the lowest one, with rank and phase") {
  for (int const ranks : {1, 2, 5}) {
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      int const lowest = ranks / 2;
      auto const error = error_of([&] {
        dcp::agree(world, "save: write", [&] {
          if (world.rank() >= lowest)
            throw dcp::Error{dcp::ErrorCode::io, "rank " + std::to_string(world.rank()) + " cannot write"}.with_path("a/b").with_errno(5).with_range(3, 9);
        });
      });
      CHECK(error.code() == dcp::ErrorCode::io);
      CHECK(error.message() == "rank " + std::to_string(lowest) + " cannot write");
      CHECK(error.rank() == lowest);
      CHECK(error.phase() == "save: write");
      CHECK(error.path() == "a/b");
      CHECK(error.system_error() == 5);
      auto const texts = dcp::all_gather_bytes(world, dcp::as_byte_span(error.what()));   // the communicator is not poisoned
      for (auto const& text : texts) CHECK(dcp::as_text(text) == error.what());
    });
  }
}

TEST_CASE("agree: exceptions of any type become an Error on all ranks") {
  dcp::run_threads(3, [](dcp::ThreadComm& world) {
    auto const failing = [&](auto thrown) {
      return error_of([&] {
        dcp::agree(world, "p", [&]() -> int {
          if (world.rank() == 1) throw thrown;
          return 1;
        });
      });
    };
    CHECK(failing(std::runtime_error{"boom"}).message() == "boom");
    CHECK(failing(std::runtime_error{"boom"}).code() == dcp::ErrorCode::unknown);
    CHECK(failing(std::bad_alloc{}).code() == dcp::ErrorCode::budget);
    CHECK(failing(17).code() == dcp::ErrorCode::unknown);
    CHECK(failing(17).rank() == 1);
  });
}

TEST_CASE("agree: an error of the communicator gets the phase") {
  std::atomic<int> seen = 0;
  dcp::run_threads(3, [&](dcp::ThreadComm& world) {
    if (world.rank() == 2) return;
    auto const error = error_of([&] { dcp::agree(world, "load: read", [] {}); });
    CHECK(error.code() == dcp::ErrorCode::rank_failed);
    CHECK(error.rank() == 2);
    CHECK(error.phase() == "load: read");
    ++seen;
  });
  CHECK(seen == 2);
}

TEST_CASE("all_gather_value, broadcast_value, all_reduce: numbers of all ranks, on all ranks") {
  dcp::run_threads(5, [](dcp::ThreadComm& world) {
    auto const me = static_cast<std::uint64_t>(world.rank());
    CHECK(dcp::all_gather_value(world, me * me) == std::vector<std::uint64_t>{0, 1, 4, 9, 16});
    CHECK(dcp::broadcast_value(world, me + 7, 3) == 10);
    CHECK(dcp::all_reduce_min(world, 100 - me) == 96);
    CHECK(dcp::all_reduce_max(world, 100 - me) == 100);
    CHECK(dcp::all_reduce_sum(world, (std::uint64_t{1} << 40) + me) == (std::uint64_t{5} << 40) + 10);
  });
}

TEST_CASE("broadcast_bytes: the receivers need not know the size") {
  dcp::run_threads(3, [](dcp::ThreadComm& world) {
    for (std::size_t const size : {0u, 1u, 100000u}) {
      auto const wanted = dcp::test::pattern(size, 4, 2);
      auto bytes = world.rank() == 2 ? wanted : dcp::Bytes(17);
      dcp::broadcast_bytes(world, bytes, 2);
      CHECK(bytes == wanted);
    }
  });
}

TEST_CASE("all_gather_bytes: everyone gets everyone's bytes, even, skewed, empty or larger than the scratch space") {
  auto const check = [](std::vector<std::size_t> const& sizes) {
    dcp::run_threads(static_cast<int>(sizes.size()), [&](dcp::ThreadComm& world) {
      Counting comm{world};
      auto const size_of = [&](int rank) { return sizes[static_cast<std::size_t>(rank)]; };
      auto const all = dcp::all_gather_bytes(comm, dcp::test::pattern(size_of(world.rank()), 9, world.rank()));
      REQUIRE(all.size() == sizes.size());
      for (int rank = 0; rank < world.size(); ++rank) CHECK(all[static_cast<std::size_t>(rank)] == dcp::test::pattern(size_of(rank), 9, rank));
      auto const total = std::accumulate(sizes.begin(), sizes.end(), std::size_t{0});
      CHECK(comm.gathered_bytes <= 2 * total + sizes.size() * 10);   // padding does not multiply what travels
    });
  };
  check({0});
  check({5});
  check({0, 0, 0});
  check({1, 2, 3, 4});
  check({0, 0, 1000000, 0, 0, 3, 0});
  check({100, 100000, 100, 100000});
  check({40u << 20, 40u << 20});   // 80 MiB of slabs: two rounds
}

TEST_CASE("reduce_to_root: merges in rank order, and no rank receives more than log2(size) messages") {
  for (int ranks = 1; ranks <= 9; ++ranks) {
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      Counting comm{world};
      auto const merged = dcp::reduce_to_root(comm, bytes_of(std::to_string(world.rank())), [](dcp::Bytes a, dcp::Bytes const& b) {
        a.insert(a.end(), b.begin(), b.end());
        return a;
      });
      CHECK(dcp::as_text(merged) == (world.rank() == 0 ? std::string{"0123456789"}.substr(0, static_cast<std::size_t>(ranks)) : std::string{}));
      CHECK(comm.received <= static_cast<std::size_t>(std::bit_width(static_cast<unsigned>(ranks - 1))));
    });
  }
}

TEST_CASE("reduce_to_root: a merge that throws on one rank is one Error on all, whose cause is not hidden by merges above it") {
  for (int failing = 0; failing < 8; failing += 2) {
    dcp::run_threads(8, [&](dcp::ThreadComm& world) {
      int merges = 0;
      auto const error = error_of([&] {
        dcp::reduce_to_root(
            world, dcp::Bytes(1),
            [&](dcp::Bytes a, dcp::Bytes const& b) {
              ++merges;
              if (world.rank() == failing) throw dcp::Error{dcp::ErrorCode::corrupt, "tables differ"};
              if (a.size() != b.size()) throw dcp::Error{dcp::ErrorCode::unknown, "a merge saw what a failed rank left"};
              return a;
            },
            "save: checksums");
      });
      CHECK(error.code() == dcp::ErrorCode::corrupt);
      CHECK(error.rank() == failing);
      CHECK(error.phase() == "save: checksums");
      if (world.rank() == failing) CHECK(merges == 1);
      world.barrier();   // not poisoned
    });
  }
}

TEST_CASE("agree and its companions work on one process without a launcher") {
  dcp::SelfComm self;
  CHECK(dcp::agree(self, "p", [] { return 3; }) == 3);
  CHECK(error_of([&] { dcp::agree(self, "p", [] { throw std::runtime_error{"x"}; }); }).rank() == 0);
  CHECK(dcp::all_gather_bytes(self, dcp::Bytes(4)).front().size() == 4);
  CHECK(dcp::reduce_to_root(self, dcp::Bytes(4), [](dcp::Bytes a, dcp::Bytes const&) { return a; }).size() == 4);
}
