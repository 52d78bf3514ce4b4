// SPDX-License-Identifier: Apache-2.0
#include "../support/comm_conformance.hpp"
#include "../support/proc_comm.hpp"

#include <dcp/comm/agree.hpp>

#include <doctest/doctest.h>

#include <thread>

using namespace std::chrono_literals;
using dcp::test::ProcComm;
using dcp::test::run_processes;

TEST_CASE("ProcComm: does what every communicator must do, on 1, 2, 3, 4 and 7 processes") {
  for (int const ranks : {1, 2, 3, 4, 7}) {
    auto const ends = run_processes(ranks, [&](ProcComm& world) { dcp::test::check_communicator(world, static_cast<std::uint64_t>(ranks)); });
    for (auto const& end : ends) {
      CHECK(end.text() == "");
      CHECK(end.exit_code == 0);
    }
  }
}

TEST_CASE("ProcComm: a rank killed while the others wait is named on all of them") {
  for (int const victim : {0, 2}) {
    auto const ends = run_processes(4, [&](ProcComm& world) {
      world.barrier();
      if (world.rank() == victim) {
        std::this_thread::sleep_for(50ms);
        ::raise(SIGKILL);
      }
      world.barrier();
    });
    for (int rank = 0; rank < 4; ++rank) {
      auto const& end = ends[static_cast<std::size_t>(rank)];
      if (rank == victim) {
        CHECK(end.signal == SIGKILL);
        continue;
      }
      REQUIRE(end.error.has_value());
      CHECK(end.error->code() == dcp::ErrorCode::rank_failed);
      CHECK(end.error->rank() == victim);
      CHECK(end.error->message() == "rank " + std::to_string(victim) + " died: its connection is closed");
    }
  }
}

TEST_CASE("ProcComm: a rank killed in the middle of a large exchange is named, whatever the others wait for") {
  auto const ends = run_processes(4, [&](ProcComm& world) {
    std::vector<dcp::Message> outgoing;
    for (int to = 0; to < 4; ++to) outgoing.push_back({to, dcp::Bytes(4u << 20)});
    if (world.rank() == 1) outgoing.clear(), ::raise(SIGKILL);
    (void)world.exchange(std::move(outgoing));
    world.barrier();
  });
  CHECK(ends[1].signal == SIGKILL);
  for (std::size_t const rank : {0u, 2u, 3u}) {
    REQUIRE(ends[rank].error.has_value());
    CHECK(ends[rank].error->rank() == 1);
  }
}

TEST_CASE("ProcComm: a rank that is stopped is a timeout on all others, not before the deadline") {
  auto const start = std::chrono::steady_clock::now();
  auto const ends = run_processes(
      4,
      [&](ProcComm& world) {
        world.barrier();
        if (world.rank() == 3) ::raise(SIGSTOP);
        world.barrier();
      },
      {.deadline = 300ms});
  auto const waited = std::chrono::steady_clock::now() - start;
  CHECK(waited >= 300ms);
  CHECK(waited < 5s);
  CHECK(ends[3].was_stopped);
  for (std::size_t rank = 0; rank < 3; ++rank) {
    REQUIRE(ends[rank].error.has_value());
    CHECK(ends[rank].error->code() == dcp::ErrorCode::timeout);
    CHECK(ends[rank].error->rank() == 3);
    CHECK(ends[rank].error->message() == "no rank made progress for 300 ms; barrier still waits for rank 3");
  }
}

TEST_CASE("ProcComm: progress of a rank keeps the others waiting beyond the deadline") {
  auto const ends = run_processes(
      3,
      [&](ProcComm& world) {
        if (world.rank() == 1)
          for (int i = 0; i < 45; ++i) std::this_thread::sleep_for(20ms), world.progress();
        world.barrier();
      },
      {.deadline = 300ms});
  for (auto const& end : ends) CHECK(end.text() == "");
}

TEST_CASE("ProcComm: a rank that throws tells the others what, and one that returns tells them so") {
  for (bool const throws : {true, false}) {
    auto const ends = run_processes(3, [&](ProcComm& world) {
      world.barrier();
      if (world.rank() == 2) {
        if (throws) throw dcp::Error{dcp::ErrorCode::io, "no space"};
        return;
      }
      auto pair = world.split(0, 0);
    });
    CHECK(ends[2].exit_code == (throws ? 1 : 0));
    for (std::size_t rank = 0; rank < 2; ++rank) {
      REQUIRE(ends[rank].error.has_value());
      CHECK(ends[rank].error->code() == dcp::ErrorCode::rank_failed);
      CHECK(ends[rank].error->rank() == 2);
      CHECK(ends[rank].error->message().find(throws ? "rank 2 left with an exception: no space" : "rank 2 returned") == 0);
    }
  }
}

TEST_CASE("ProcComm: an operation that all entered succeeds on all, though one is killed right after it") {
  for (int i = 0; i < 20; ++i) {
    auto const ends = run_processes(4, [&](ProcComm& world) {
      world.barrier();
      dcp::Bytes all(4 * 1000);
      world.all_gather(dcp::Bytes(1000), all);
      if (world.rank() == 1) ::raise(SIGKILL);
    });
    for (std::size_t const rank : {0u, 2u, 3u}) CHECK(ends[rank].text() == "");
  }
}

TEST_CASE("ProcComm: a poisoned communicator throws the same Error again, and agree adds the phase") {
  auto const ends = run_processes(2, [&](ProcComm& world) {
    if (world.rank() == 1) return;
    std::string first, second;
    try {
      dcp::agree(world, "save: write", [] {});
    } catch (dcp::Error const& error) {
      dcp::test::expect(error.phase() == "save: write" && error.rank() == 1, "agree adds the phase");
      first = error.message();
    }
    try {
      (void)world.exchange({});
    } catch (dcp::Error const& error) {
      second = error.message();
    }
    dcp::test::expect(first.find("rank 1 returned") == 0 && first == second, "it is the same Error");
  });
  CHECK(ends[0].text() == "");
}

TEST_CASE("run_processes: the watchdog ends what would never end") {
  auto const ends = run_processes(
      2, [&](ProcComm& world) { std::this_thread::sleep_for(world.rank() == 0 ? 1h : 0h); }, {.watchdog = 200ms});
  CHECK(ends[0].signal == SIGKILL);
  CHECK(ends[1].exit_code == 0);
}
