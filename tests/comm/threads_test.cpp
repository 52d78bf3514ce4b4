// SPDX-License-Identifier: Apache-2.0
#include "../support/comm_conformance.hpp"

#include <dcp/comm/threads.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <mutex>

using namespace std::chrono_literals;

namespace {

/// Runs `step` and returns the Error it throws; fails when there is none.
template <class F>
dcp::Error error_of(F&& step) {
  try {
    step();
  } catch (dcp::Error const& error) {
    return error;
  }
  throw std::runtime_error{"no Error was thrown"};
}

template <class E, class F>
bool throws(F&& step) {
  try {
    step();
  } catch (E const&) {
    return true;
  }
  return false;
}

bool same(dcp::Error const& a, dcp::Error const& b) { return std::string_view{a.what()} == b.what() && a.code() == b.code() && a.rank() == b.rank(); }

struct OwnException {
  int value;
};

/// The Errors of the ranks that got one, in rank order.
class Errors {
 public:
  void add(int rank, dcp::Error error) {
    std::lock_guard const lock{mutex_};
    errors_.emplace(rank, std::move(error));
  }
  std::size_t size() const { return errors_.size(); }
  dcp::Error const& operator[](int rank) const { return errors_.at(rank); }
  bool all_same() const {
    for (auto const& [rank, error] : errors_)
      if (!same(error, errors_.begin()->second)) return false;
    return true;
  }

 private:
  std::mutex mutex_;
  std::map<int, dcp::Error> errors_;
};

}  // namespace

TEST_CASE("ThreadComm: does what every communicator must do, on 1, 2, 3, 4 and 7 ranks") {
  for (int const ranks : {1, 2, 3, 4, 7}) {
    CAPTURE(ranks);
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) { dcp::test::check_communicator(world, static_cast<std::uint64_t>(ranks)); });
  }
}

TEST_CASE("run_threads: runs the body once per rank, rank 0 on the calling thread") {
  std::vector<std::thread::id> threads(5);
  std::atomic<int> runs = 0;
  dcp::run_threads(5, [&](dcp::ThreadComm& world) {
    threads[static_cast<std::size_t>(world.rank())] = std::this_thread::get_id();
    ++runs;
    CHECK(world.size() == 5);
  });
  CHECK(runs == 5);
  CHECK(threads[0] == std::this_thread::get_id());
  CHECK(error_of([] { dcp::run_threads(0, [](dcp::ThreadComm&) {}); }).code() == dcp::ErrorCode::invalid_argument);
}

TEST_CASE("run_threads: rethrows the exception that left a body first, with its own type, when others wait for that rank") {
  for (int const thrower : {0, 1, 3}) {
    Errors errors;
    try {
      dcp::run_threads(4, [&](dcp::ThreadComm& world) {
        world.barrier();
        if (world.rank() == thrower) throw OwnException{42};
        try {
          world.barrier();
        } catch (dcp::Error const& error) {
          errors.add(world.rank(), error);
          CHECK(same(error_of([&] { world.barrier(); }), error));  // poisoned: the same again
          CHECK(same(error_of([&] { (void)world.exchange({}); }), error));
          throw;
        }
      });
      FAIL("run_threads returned");
    } catch (OwnException const& exception) {
      CHECK(exception.value == 42);
    }
    REQUIRE(errors.size() == 3);
    CHECK(errors.all_same());
    int const other = thrower == 0 ? 1 : 0;
    CHECK(errors[other].code() == dcp::ErrorCode::rank_failed);
    CHECK(errors[other].rank() == thrower);
    CHECK(errors[other].message().find("rank " + std::to_string(thrower) + " left with an exception") == 0);
  }
}

TEST_CASE("ThreadComm: what an exception said, and its path, phase and errno, reach the ranks that wait") {
  Errors errors;
  auto const thrown = error_of([&] {
    dcp::run_threads(2, [&](dcp::ThreadComm& world) {
      if (world.rank() == 1) throw dcp::Error{dcp::ErrorCode::io, "cannot write"}.with_path("model.safetensors").with_phase("save: write").with_errno(28);
      errors.add(0, error_of([&] { world.barrier(); }));
    });
  });
  CHECK(thrown.code() == dcp::ErrorCode::io);
  CHECK(errors[0].message() == "rank 1 left with an exception: cannot write");
  CHECK(errors[0].path() == "model.safetensors");
  CHECK(errors[0].phase() == "save: write");
  CHECK(errors[0].system_error() == 28);
}

TEST_CASE("ThreadComm: a rank that throws long before the others arrive is noticed when they do") {
  Errors errors;
  CHECK(throws<std::logic_error>([&] {
    dcp::run_threads(3, [&](dcp::ThreadComm& world) {
      if (world.rank() == 0) throw std::logic_error{"early"};
      std::this_thread::sleep_for(30ms);
      errors.add(world.rank(), error_of([&] { world.barrier(); }));
    });
  }));
  CHECK(errors.size() == 2);
  CHECK(errors.all_same());
}

TEST_CASE("ThreadComm: an operation that all entered succeeds on all, though one rank throws right after it") {
  for (int i = 0; i < 200; ++i) {
    std::atomic<int> passed = 0;
    CHECK(throws<OwnException>([&] {
      dcp::run_threads(4, [&](dcp::ThreadComm& world) {
        world.barrier();
        ++passed;
        if (world.rank() == 2) throw OwnException{1};
      });
    }));
    REQUIRE(passed == 4);
  }
}

TEST_CASE("ThreadComm: a rank that returns while others wait makes them throw rank_failed") {
  Errors errors;
  dcp::run_threads(4, [&](dcp::ThreadComm& world) {
    if (world.rank() == 2) return;
    errors.add(world.rank(), error_of([&] { world.barrier(); }));
  });
  REQUIRE(errors.size() == 3);
  CHECK(errors.all_same());
  CHECK(errors[0].code() == dcp::ErrorCode::rank_failed);
  CHECK(errors[0].rank() == 2);
  CHECK(errors[0].message().find("rank 2 returned") == 0);
}

TEST_CASE("ThreadComm: a rank that never arrives is a timeout on all others, and on itself when it comes too late") {
  Errors errors;
  std::atomic<int> waiting = 3;
  auto const start = std::chrono::steady_clock::now();
  dcp::run_threads(
      4,
      [&](dcp::ThreadComm& world) {
        if (world.rank() == 1)
          while (waiting > 0) std::this_thread::sleep_for(1ms);
        errors.add(world.rank(), error_of([&] { world.barrier(); }));
        --waiting;
      },
      300ms);
  auto const waited = std::chrono::steady_clock::now() - start;
  CHECK(waited >= 300ms);
  CHECK(waited < 5s);
  REQUIRE(errors.size() == 4);
  CHECK(errors.all_same());
  CHECK(errors[0].code() == dcp::ErrorCode::timeout);
  CHECK(errors[0].rank() == 1);
  CHECK(errors[0].message() == "no rank made progress for 300 ms; barrier still waits for rank 1");
}

TEST_CASE("ThreadComm: progress on any rank keeps the others waiting beyond the deadline") {
  auto const start = std::chrono::steady_clock::now();
  dcp::run_threads(
      3,
      [&](dcp::ThreadComm& world) {
        if (world.rank() == 2)
          for (int i = 0; i < 30; ++i) {
            std::this_thread::sleep_for(30ms);
            world.progress();
          }
        world.barrier();
      },
      300ms);
  CHECK(std::chrono::steady_clock::now() - start >= 900ms);
}

TEST_CASE("ThreadComm: a deadline of milliseconds::max() waits for ever") {
  dcp::run_threads(
      2,
      [&](dcp::ThreadComm& world) {
        if (world.rank() == 1) std::this_thread::sleep_for(50ms);
        world.barrier();
      },
      std::chrono::milliseconds::max());
}

TEST_CASE("ThreadComm: ranks that call different operations get one Error that names both") {
  Errors errors;
  dcp::run_threads(3, [&](dcp::ThreadComm& world) {
    errors.add(world.rank(), error_of([&] {
                 dcp::Bytes bytes(8);
                 if (world.rank() == 1)
                   std::this_thread::sleep_for(50ms), world.broadcast(bytes, 2);
                 else
                   world.barrier();
               }));
  });
  REQUIRE(errors.size() == 3);
  CHECK(errors.all_same());
  CHECK(errors[0].code() == dcp::ErrorCode::ranks_disagree);
  CHECK(errors[0].message() == "rank 1 calls broadcast of 8 bytes from rank 2, but others of its group call barrier");
}

TEST_CASE("ThreadComm: a rank that leaves poisons the groups it belongs to, and no other") {
  Errors errors;
  std::atomic<int> passed = 0;
  CHECK(throws<OwnException>([&] {
    dcp::run_threads(4, [&](dcp::ThreadComm& world) {
      auto pair = world.split(world.rank() / 2, 0);
      if (world.rank() == 3) throw OwnException{3};
      if (world.rank() == 2) errors.add(2, error_of([&] { pair.barrier(); }));
      if (world.rank() < 2) std::this_thread::sleep_for(20ms), pair.barrier(), ++passed;
      if (world.rank() < 2) errors.add(world.rank(), error_of([&] { world.barrier(); }));
    });
  }));
  CHECK(passed == 2);
  REQUIRE(errors.size() == 3);
  CHECK(errors.all_same());  // also rank 2's: it was named as the run numbers it, not as its group does
  CHECK(errors[2].rank() == 3);
}

TEST_CASE("ThreadComm: ranks that stop because of another's failure pass its cause on, not their own") {
  Errors errors;
  CHECK(throws<OwnException>([&] {
    dcp::run_threads(4, [&](dcp::ThreadComm& world) {
      auto left = world.split(world.rank() < 3 ? 0 : 1, 0);
      auto last = world.split(world.rank() == 0 ? 1 : 0, 0);
      if (world.rank() == 0) throw OwnException{0};
      if (world.rank() < 3) left.barrier();  // throws rank 0's failure out of the body
      errors.add(3, error_of([&] { last.barrier(); }));
    });
  }));
  REQUIRE(errors.size() == 1);
  CHECK(errors[3].rank() == 0);
  CHECK(errors[3].message().find("rank 0 left") == 0);
}

TEST_CASE("run_threads: inside a catch block, and inside a body, is no different") {
  try {
    throw OwnException{1};
  } catch (OwnException const&) {
    dcp::run_threads(2, [](dcp::ThreadComm& outer) {
      dcp::run_threads(2, [](dcp::ThreadComm& inner) { inner.barrier(); });
      outer.barrier();
    });
  }
}

TEST_CASE("law: whichever ranks fail in whichever step, no rank hangs, and all that waited get one Error") {
  std::random_device device;
  std::uint64_t const seed = device();
  CAPTURE(seed);
  std::mt19937_64 random{seed};
  for (int round = 0; round < 150; ++round) {
    int const ranks = 2 + static_cast<int>(random() % 5), steps = 6;
    std::vector<int> fails_at(static_cast<std::size_t>(ranks), steps);
    fails_at[random() % static_cast<std::size_t>(ranks)] = static_cast<int>(random() % steps);
    if (random() % 3 == 0) fails_at[random() % static_cast<std::size_t>(ranks)] = static_cast<int>(random() % steps);
    int const first = *std::ranges::min_element(fails_at);
    Errors errors;
    std::atomic<int> throwers = 0;
    bool const thrown = throws<OwnException>([&] {
      dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
        for (int step = 0; step < steps; ++step) {
          if (fails_at[static_cast<std::size_t>(world.rank())] == step) {
            ++throwers;
            throw OwnException{world.rank()};
          }
          try {
            if (step % 3 == 0) world.barrier();
            if (step % 3 == 1) (void)world.exchange({{(world.rank() + 1) % world.size(), dcp::Bytes(10)}});
            if (step % 3 == 2) (void)world.split(0, 0);
          } catch (dcp::Error const& error) {
            errors.add(world.rank(), error);
            REQUIRE(step == first);
            throw;
          }
        }
      });
    });
    REQUIRE(thrown);
    REQUIRE(errors.size() + static_cast<std::size_t>(throwers) == static_cast<std::size_t>(ranks));
    REQUIRE(errors.all_same());
  }
}
