// SPDX-License-Identifier: Apache-2.0
// What NcclComm does with the calls of NCCL and CUDA, on simulated ones: there is no GPU here, and none that fails when it is told to anywhere.
#include "../support/comm_conformance.hpp"
#include "../support/simulated_nccl.hpp"

#include <doctest/doctest.h>

#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>

using namespace std::chrono_literals;
using dcp::test::communicator;
using dcp::test::on_simulated_ranks;
using dcp::test::pattern;
using dcp::test::SimulatedNccl;
using dcp::test::SimulatedNcclComm;

namespace {

static_assert(dcp::Communicator<SimulatedNcclComm>);

template <class F>
dcp::Error error_of(F&& step) {
  try {
    step();
  } catch (dcp::Error const& error) {
    return error;
  }
  throw std::runtime_error{"no Error was thrown"};
}

class Errors {
 public:
  void add(int rank, dcp::Error error) {
    std::lock_guard const lock{mutex_};
    errors_.emplace(rank, std::move(error));
  }
  std::size_t size() const {   // also while ranks run
    std::lock_guard const lock{mutex_};
    return errors_.size();
  }
  dcp::Error const& operator[](int rank) const { return errors_.at(rank); }
  bool all_say(std::string const& text) const {
    for (auto const& [rank, error] : errors_)
      if (error.message() != text) return false;
    return true;
  }

 private:
  mutable std::mutex mutex_;
  std::map<int, dcp::Error> errors_;
};

// What is left of a run in which every object has been destroyed and nothing has failed.
void check_nothing_left(SimulatedNccl& nccl, int ranks) {
  CHECK(nccl.violations() == "");
  for (int rank = 0; rank < ranks; ++rank) {
    CHECK(nccl.live(rank, "device") == 0);
    CHECK(nccl.live(rank, "pinned") == 0);
    CHECK(nccl.live(rank, "event") == 0);
    CHECK(nccl.live(rank, "communicator") == 1);   // the borrowed one
    CHECK(nccl.current_device(rank) == 0);
  }
}

double seconds_since(std::chrono::steady_clock::time_point start) { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); }

// Some of everything, with small payloads, on two ranks.
void use_everything(SimulatedNccl& nccl, int rank) {
  auto world = communicator(nccl, rank, {60s, 512});
  dcp::test::check_broadcast(world, 700, 1);
  dcp::test::check_all_gather(world, 300, 2);
  dcp::test::check_exchange(world, 500, 0.7, 3);
  auto const incoming = world.exchange({{1 - rank, pattern(400, 4, rank)}});
  dcp::test::expect(incoming.size() == 1 && incoming[0].bytes == pattern(400, 4, 1 - rank), "both send to each other");
  auto part = world.split(0, -rank);
  part.barrier();
}

}  // namespace

TEST_CASE("NcclComm: does what every communicator must do, on 1, 2, 3 and 4 ranks, blocking and not, and leaves nothing behind") {
  for (bool const nonblocking : {false, true})
    for (int const ranks : {1, 2, 3, 4}) {
      CAPTURE(ranks);
      CAPTURE(nonblocking);
      SimulatedNccl nccl{ranks, nonblocking};
      on_simulated_ranks(nccl, ranks, [&](int rank) {
        auto world = communicator(nccl, rank);
        dcp::test::check_communicator(world, static_cast<std::uint64_t>(ranks));
      });
      check_nothing_left(nccl, ranks);
    }
}

TEST_CASE("NcclComm: payloads of any size go through a buffer of any size, the smallest that a rank has, and the device has one buffer for each communicator") {
  for (std::size_t const bytes : {std::size_t{0}, std::size_t{200}, std::size_t{1000}, std::size_t{4096}}) {
    CAPTURE(bytes);
    SimulatedNccl nccl{3};
    on_simulated_ranks(nccl, 3, [&](int rank) {
      auto world = communicator(nccl, rank, {60s, bytes + static_cast<std::size_t>(rank) * 1000});
      for (std::size_t const size : {0u, 1u, 191u, 192u, 193u, 5000u}) {
        dcp::test::check_broadcast(world, size, size);
        dcp::test::check_all_gather(world, size, size);
      }
      for (std::uint64_t round = 0; round < 10; ++round) dcp::test::check_exchange(world, 2000, 0.6, round);
      auto part = world.split(rank / 2, 0);
      dcp::test::check_exchange(part, 2000, 0.9, 11);
    });
    check_nothing_left(nccl, 3);
    for (int rank = 0; rank < 3; ++rank) CHECK(nccl.made(rank, "device") == 2);
  }
}

TEST_CASE("NcclComm: an exchange may have one sender, one receiver, nothing at all, empty messages only, and one pair with much more than the others") {
  SimulatedNccl nccl{4};
  on_simulated_ranks(nccl, 4, [&](int rank) {
    auto world = communicator(nccl, rank, {60s, 1024});
    std::vector<dcp::Message> outgoing;
    if (rank == 2)
      for (int to = 0; to < 4; ++to) outgoing.push_back({to, pattern(3000, 1, to)});
    auto incoming = world.exchange(std::move(outgoing));
    dcp::test::expect(incoming.size() == 1 && incoming[0].rank == 2 && incoming[0].bytes == pattern(3000, 1, rank), "one sends to all");

    incoming = world.exchange({{1, pattern(2500, 2, rank)}});
    dcp::test::expect(incoming.size() == (rank == 1 ? 4 : 0), "all send to one");
    for (int from = 0; from < static_cast<int>(incoming.size()); ++from)
      dcp::test::expect(incoming[static_cast<std::size_t>(from)].rank == from && incoming[static_cast<std::size_t>(from)].bytes == pattern(2500, 2, from), "all messages to one arrive");

    dcp::test::expect(world.exchange({}).empty(), "nothing brings nothing");

    incoming = world.exchange({{(rank + 1) % 4, {}}, {(rank + 1) % 4, {}}, {rank, {}}});
    dcp::test::expect(incoming.size() == 3, "empty messages arrive, also several, also to oneself");
    for (dcp::Message const& message : incoming) dcp::test::expect(message.bytes.empty(), "and are empty");

    outgoing.clear();
    outgoing.push_back({0, pattern(10, 3, rank)});
    if (rank == 3) outgoing.push_back({2, pattern(100'000, 3, rank)});
    incoming = world.exchange(std::move(outgoing));
    if (rank == 0) dcp::test::expect(incoming.size() == 4 && incoming[3].bytes == pattern(10, 3, 3), "small ones arrive beside a large one");
    if (rank == 2) dcp::test::expect(incoming.size() == 1 && incoming[0].bytes == pattern(100'000, 3, 3), "and the large one");
  });
  check_nothing_left(nccl, 4);
}

TEST_CASE("NcclComm: an exchange of all with all on 7 ranks, whose plan alone takes rounds, brings everything in order") {
  SimulatedNccl nccl{7};
  on_simulated_ranks(nccl, 7, [&](int rank) {
    auto world = communicator(nccl, rank, {60s, 0});
    for (std::uint64_t round = 0; round < 3; ++round) dcp::test::check_exchange(world, 300, 0.99, round);
    // Of what comes to rank 6, the word of rank 0 comes last.
    std::vector<dcp::Message> outgoing;
    for (int to = rank == 0 ? 1 : 6; to < 7; ++to) outgoing.push_back({to, pattern(100, 4, rank)});
    auto const incoming = world.exchange(std::move(outgoing));
    dcp::test::expect(incoming.size() == (rank == 6 ? 7 : rank > 0 ? 1 : 0), "what was sent to a rank arrives");
    for (std::size_t i = 0; i < incoming.size(); ++i)
      dcp::test::expect(incoming[i].rank == static_cast<int>(i) && incoming[i].bytes == pattern(100, 4, incoming[i].rank), "in the order of the senders");
  });
  check_nothing_left(nccl, 7);
}

TEST_CASE("NcclComm: no communicator is an argument that is refused") {
  SimulatedNccl nccl{1};
  auto const error = error_of([&] { SimulatedNcclComm{nullptr, nccl.stream(0), {}, nccl.api(0)}; });
  CHECK(error.code() == dcp::ErrorCode::invalid_argument);
  CHECK(nccl.calls(0) == 0);
}

TEST_CASE("NcclComm: a rank that does not come is a timeout on those that wait, which are poisoned and keep their buffers") {
  for (bool const nonblocking : {false, true}) {
    CAPTURE(nonblocking);
    SimulatedNccl nccl{3, nonblocking};
    Errors errors;
    on_simulated_ranks(nccl, 3, [&](int rank) {
      // Rank 1 has a deadline of its own choice, which it does not come to.
      auto world = communicator(nccl, rank, {rank == 1 ? 60s : 300ms});
      if (rank == 1) {
        while (errors.size() < 2) std::this_thread::sleep_for(1ms);
        return;
      }
      dcp::Bytes bytes(5), all(15);
      auto const start = std::chrono::steady_clock::now();
      auto const error = error_of([&] { rank == 0 ? world.barrier() : world.all_gather(bytes, all); });
      auto const waited = seconds_since(start);
      dcp::test::expect(waited >= 0.3, "the deadline is waited for");
      auto const before = nccl.calls(rank);
      for (auto const& again : {error_of([&] { world.barrier(); }), error_of([&] { world.broadcast(bytes, 0); }), error_of([&] { world.all_gather(bytes, all); }),
                                error_of([&] { (void)world.exchange({}); }), error_of([&] { (void)world.split(0, 0); })})
        dcp::test::expect(std::string_view{again.what()} == error.what(), "every later call throws the same");
      world.progress();
      dcp::test::expect(nccl.calls(rank) == before, "and calls nothing");
      errors.add(rank, error);
    });
    CHECK(nccl.violations() == "");
    REQUIRE(errors.size() == 2);
    CHECK(errors[0].code() == dcp::ErrorCode::timeout);
    CHECK(errors[2].code() == dcp::ErrorCode::timeout);
    CHECK(errors[0].message().find("barrier has not ended within 300 ms") == 0);
    CHECK(errors[2].message().find("all_gather has not ended within 300 ms") == 0);
    CHECK(errors[0].hint().find("ncclCommAbort") != std::string::npos);
    for (int const rank : {0, 2}) {
      CHECK(nccl.live(rank, "device") == 1);
      CHECK(nccl.live(rank, "pinned") == 1);
      CHECK(nccl.current_device(rank) == 0);
    }
    CHECK(nccl.live(1, "device") == 0);

    // The owners end it and make a new one.
    for (int rank = 0; rank < 3; ++rank) nccl.abort_world(rank);
    nccl.new_world();
    on_simulated_ranks(nccl, 3, [&](int rank) {
      auto world = communicator(nccl, rank);
      dcp::test::check_exchange(world, 300, 0.5, 1);
    });
    CHECK(nccl.violations() == "");
  }
}

TEST_CASE("NcclComm: a rank that makes no NcclComm of the communicator is a timeout in the constructor") {
  SimulatedNccl nccl{2};
  CHECK(error_of([&] { communicator(nccl, 0, {100ms}); }).code() == dcp::ErrorCode::timeout);
  CHECK(nccl.violations() == "");
  CHECK(nccl.live(0, "device") == 1);
}

TEST_CASE("NcclComm: what is in the stream before comes first, and counts for the deadline") {
  SimulatedNccl nccl{2};
  auto const start = std::chrono::steady_clock::now();
  on_simulated_ranks(nccl, 2, [&](int rank) {
    auto world = communicator(nccl, rank);
    std::thread later;
    if (rank == 1) {
      auto const work = nccl.add_work(rank);
      later = std::thread{[&nccl, work] {
        std::this_thread::sleep_for(150ms);
        nccl.release(*work);
      }};
    }
    world.barrier();
    if (later.joinable()) later.join();
  });
  CHECK(seconds_since(start) >= 0.15);
  check_nothing_left(nccl, 2);

  SimulatedNccl stopped{1};
  auto world = communicator(stopped, 0, {100ms});
  auto const work = stopped.add_work(0);
  CHECK(error_of([&] { world.barrier(); }).code() == dcp::ErrorCode::timeout);
  CHECK(stopped.violations() == "");
}

TEST_CASE("NcclComm: an error that NCCL reports while a rank waits is rank_failed, at once, with NCCL's words") {
  for (bool const nonblocking : {false, true}) {
    SimulatedNccl nccl{2, nonblocking};
    Errors errors;
    on_simulated_ranks(nccl, 2, [&](int rank) {
      auto world = communicator(nccl, rank);
      if (rank == 1) {
        std::this_thread::sleep_for(50ms);
        nccl.report_error(0, SimulatedNccl::remote_error);
        while (errors.size() == 0) std::this_thread::sleep_for(1ms);
        return;
      }
      errors.add(rank, error_of([&] { world.barrier(); }));
    });
    REQUIRE(errors.size() == 1);
    CHECK(errors[0].code() == dcp::ErrorCode::rank_failed);
    CHECK(errors[0].message() == "barrier cannot end: simulated NCCL error 6");
    CHECK(nccl.live(0, "device") == 1);
    CHECK(nccl.violations() == "");
  }
}

TEST_CASE("NcclComm: a rank that dies is rank_failed on those that wait for it, in whichever operation") {
  for (int turn = 0; turn < 10; ++turn) {
    int const step = turn % 5;
    CAPTURE(turn);
    SimulatedNccl nccl{3, turn >= 5};
    Errors errors;
    on_simulated_ranks(nccl, 3, [&](int rank) {
      auto world = communicator(nccl, rank);
      if (rank == 1) return nccl.die(rank);
      dcp::Bytes bytes(10), all(30);
      errors.add(rank, error_of([&] {
                   if (step == 0) world.barrier();
                   if (step == 1) world.broadcast(bytes, 1);
                   if (step == 2) world.all_gather(bytes, all);
                   if (step == 3) (void)world.exchange({{1, dcp::Bytes(10)}});
                   if (step == 4) (void)world.split(0, 0);
                 }));
    });
    REQUIRE(errors.size() == 2);
    for (int const rank : {0, 2}) CHECK(errors[rank].code() == dcp::ErrorCode::rank_failed);
    CHECK(nccl.violations() == "");
  }
}

TEST_CASE("NcclComm: ranks that call different steps get one Error that names them; calls that only NCCL sees end at the deadline") {
  SimulatedNccl nccl{3};
  Errors errors;
  on_simulated_ranks(nccl, 3, [&](int rank) {
    auto world = communicator(nccl, rank);
    errors.add(rank, error_of([&] {
                 if (rank == 2) (void)world.exchange({});
                 else world.barrier();
               }));
  });
  REQUIRE(errors.size() == 3);
  CHECK(errors.all_say("rank 2 calls exchange as operation 2 of its communicator, but rank 0 calls barrier as operation 2"));
  CHECK(errors[1].code() == dcp::ErrorCode::ranks_disagree);
  CHECK(errors[1].rank() == 2);
  check_nothing_left(nccl, 3);   // nothing is under way

  SimulatedNccl other{2};
  Errors timeouts;
  on_simulated_ranks(other, 2, [&](int rank) {
    auto world = communicator(other, rank, {200ms});
    dcp::Bytes bytes(rank == 0 ? 10 : 20);
    timeouts.add(rank, error_of([&] { world.broadcast(bytes, 0); }));
  });
  REQUIRE(timeouts.size() == 2);
  for (int const rank : {0, 1}) CHECK(timeouts[rank].code() == dcp::ErrorCode::timeout);
  CHECK(other.violations() == "");
}

TEST_CASE("NcclComm: whichever call fails, the rank says so or needs it not, nobody hangs, and nothing is freed that may be in use") {
  // Needed for the end of an object only: there is nobody to tell, and a group that cannot be closed is aborted instead.
  std::set<std::string> const at_the_end{"free", "free_pinned", "destroy_event", "destroy", "finalize"};
  for (bool const nonblocking : {false, true})
    for (std::string const name : {"current", "use", "allocate", "free", "allocate_pinned", "free_pinned", "create_event", "destroy_event", "record", "query", "copy_in", "copy_out", "rank", "size", "device",
                                   "async_error", "all_gather", "broadcast", "group_start", "group_end", "send", "receive", "split", "finalize", "destroy"}) {
      std::size_t const most = name == "query" || name == "async_error" ? 8 : 1000;   // how often these are called depends on the other rank
      std::size_t number = 1;
      for (; number <= most; ++number) {
        CAPTURE(name);
        CAPTURE(number);
        CAPTURE(nonblocking);
        SimulatedNccl nccl{2, nonblocking, 1};
        nccl.fail_call(0, name, number);
        Errors errors;
        bool told = false;
        on_simulated_ranks(nccl, 2, [&](int rank) {
          try {
            use_everything(nccl, rank);
          } catch (dcp::Error const& error) {
            errors.add(rank, error);
            if (rank == 0) told = true;
          }
          nccl.die(rank);   // as when the process ends: others that still wait for it hear so
        });
        CHECK(nccl.violations() == "");
        CHECK(!nccl.in_group(0));
        if (!nccl.has_failed(0)) {
          CHECK(errors.size() == 0);
          break;
        }
        if (told) {
          CHECK((errors[0].code() == dcp::ErrorCode::device || errors[0].code() == dcp::ErrorCode::rank_failed));
          CHECK(errors[0].message().find("simulated") != std::string::npos);
          CHECK(errors[0].message().find("cannot end") == std::string::npos);   // the cause, not what came of it
        } else {
          // The caller's device is restored where the device lets us; else the failure was in a destructor.
          CHECK((at_the_end.contains(name) || name == "use" || nccl.live(0, "communicator") == 1));
        }
      }
      CAPTURE(name);
      CHECK(number > 1);   // it was called
    }
}

TEST_CASE("NcclComm: a split that one rank has no device memory for fails on all with that rank's Error, and the communicator can be used on") {
  SimulatedNccl nccl{3};
  Errors errors;
  auto const start = std::chrono::steady_clock::now();
  on_simulated_ranks(nccl, 3, [&](int rank) {
    struct SecondFails : SimulatedNccl::Api {
      std::shared_ptr<int> allocations = std::make_shared<int>(0);
      int allocate(void*& memory, std::size_t bytes) { return me == 1 && ++*allocations == 2 ? SimulatedNccl::device_error : SimulatedNccl::Api::allocate(memory, bytes); }
    };
    dcp::BasicNcclComm<SecondFails> world{nccl.comm(rank), nccl.stream(rank), {60s}, SecondFails{nccl.api(rank)}};
    errors.add(rank, error_of([&] { (void)world.split(0, 0); }));
    world.barrier();
    auto part = world.split(0, 0);
    part.barrier();
  });
  REQUIRE(errors.size() == 3);
  for (int rank = 0; rank < 3; ++rank) {
    CHECK(errors[rank].code() == dcp::ErrorCode::device);
    CHECK(errors[rank].rank() == 1);
  }
  CHECK(errors.all_say(errors[1].message()));
  CHECK(seconds_since(start) < 4);
  check_nothing_left(nccl, 3);
}

TEST_CASE("NcclComm: a rank that dies while NCCL makes a group is rank_failed on the others") {
  struct DiesInSplit : SimulatedNccl::Api {
    int split(Comm from, int color, int key, Comm* made) {
      if (me == 1) {
        nccl->die(me);
        return SimulatedNccl::internal_error;
      }
      return SimulatedNccl::Api::split(from, color, key, made);
    }
  };
  for (bool const nonblocking : {false, true}) {
    CAPTURE(nonblocking);
    SimulatedNccl nccl{3, nonblocking};
    Errors errors;
    on_simulated_ranks(nccl, 3, [&](int rank) {
      dcp::BasicNcclComm<DiesInSplit> world{nccl.comm(rank), nccl.stream(rank), {60s}, DiesInSplit{nccl.api(rank)}};
      errors.add(rank, error_of([&] { (void)world.split(0, 0); }));
      nccl.abort_world(rank);   // which ends the split: it may write what it has made now
    });
    REQUIRE(errors.size() == 3);
    for (int rank = 0; rank < 3; ++rank) CHECK(errors[rank].code() == dcp::ErrorCode::rank_failed);
    CHECK(nccl.violations() == "");
  }
}

TEST_CASE("NcclComm: a group whose rank closes it early is rank_failed on the others, which name it") {
  for (bool const nonblocking : {false, true}) {
    SimulatedNccl nccl{3, nonblocking};
    Errors errors;
    on_simulated_ranks(nccl, 3, [&](int rank) {
      auto world = communicator(nccl, rank);
      {
        auto part = world.split(0, 0);
        part.barrier();
        if (rank != 1) errors.add(rank, error_of([&] { part.barrier(); }));
      }
      world.barrier();   // which still works
    });
    REQUIRE(errors.size() == 2);
    CHECK(errors.all_say("rank 1 destroyed its communicator, and other ranks wait for it in a collective operation"));
    CHECK(errors[0].code() == dcp::ErrorCode::rank_failed);
    CHECK(errors[0].rank() == 1);
    check_nothing_left(nccl, 3);
  }
}

TEST_CASE("NcclComm: a group that has failed is aborted when it is destroyed, in whichever order, and its buffer is never given back") {
  for (bool const world_first : {false, true}) {
    CAPTURE(world_first);
    SimulatedNccl nccl{2};
    Errors errors;
    on_simulated_ranks(nccl, 2, [&](int rank) {
      auto world = std::make_unique<SimulatedNcclComm>(communicator(nccl, rank, {200ms}));
      auto part = std::make_unique<SimulatedNcclComm>(world->split(0, 0));
      if (rank == 0) errors.add(rank, error_of([&] { part->barrier(); }));
      while (errors.size() == 0) std::this_thread::sleep_for(1ms);
      if (world_first) world.reset();
      part.reset();
    });
    CHECK(errors[0].code() == dcp::ErrorCode::timeout);
    CHECK(errors[0].hint().find("made by split") != std::string::npos);
    CHECK(nccl.violations() == "");
    CHECK(nccl.live(0, "communicator") == 1);
    CHECK(nccl.live(1, "communicator") == 1);
    CHECK(nccl.live(0, "device") == (world_first ? 2 : 1));   // what hangs in the stream would hang whoever gives memory back
  }
}

TEST_CASE("NcclComm: a communicator that hangs lets the destructors of its groups end") {
  SimulatedNccl nccl{2};
  Errors errors;
  on_simulated_ranks(nccl, 2, [&](int rank) {
    auto world = communicator(nccl, rank, {200ms});
    auto part = world.split(0, 0);
    if (rank == 0) errors.add(rank, error_of([&] { world.barrier(); }));
    while (errors.size() == 0) std::this_thread::sleep_for(1ms);
  });
  CHECK(errors[0].code() == dcp::ErrorCode::timeout);
  CHECK(nccl.violations() == "");
  CHECK(nccl.live(0, "communicator") == 1);
  CHECK(nccl.live(0, "device") == 2);
}

TEST_CASE("NcclComm: a group may be used beside the other by another thread, on a stream of its own") {
  SimulatedNccl nccl{2};
  on_simulated_ranks(nccl, 2, [&](int rank) {
    auto world = communicator(nccl, rank);
    auto part = world.split(0, 0, nccl.new_stream(rank));
    for (int i = 0; i < 5; ++i) dcp::test::check_exchange(part, 300, 0.5, static_cast<std::uint64_t>(i));
    part.barrier();
    world = std::move(part);   // closes the borrowed one, which takes nobody
    world.barrier();
  });
  check_nothing_left(nccl, 2);
}
