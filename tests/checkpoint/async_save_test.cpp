// SPDX-License-Identifier: Apache-2.0
#include <dcp/checkpoint/async_save.hpp>
#include <dcp/checkpoint/load.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#include "support/campaign.hpp"
#include "support/fault_medium.hpp"
#include "support/generations.hpp"
#include "support/outcome.hpp"
#include "support/late_writes.hpp"
#include "support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <cerrno>
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using namespace std::chrono_literals;
using dcp::test::Call;
using dcp::test::FaultMedium;
using dcp::test::files_in;
using dcp::test::GenerationState;
using Faulty = FaultMedium<dcp::Memory>;
using OnFaulty = dcp::BasicSafeTensors<Faulty>;
using OnMemory = dcp::BasicSafeTensors<dcp::Memory>;

constexpr std::uint64_t least = dcp::least_memory_bytes;

std::uint64_t found_in_rows(dcp::Memory const& store, std::int64_t rows) {
  dcp::SelfComm self;
  GenerationState state{self, rows};
  state.scribble();
  dcp::load<OnMemory>(self, {store, "ckpt"}, state);
  return state.generation();
}

std::uint64_t found_in(dcp::Memory const& store) { return found_in_rows(store, 20); }

// Holds back every call that it is asked about, until it is opened.
class Gate {
 public:
  ~Gate() { open(); }
  void pass() {
    std::unique_lock lock{mutex_};
    ++waiting_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return open_; });
  }
  void wait_for_somebody() {
    std::unique_lock lock{mutex_};
    changed_.wait(lock, [&] { return waiting_ > 0; });
  }
  void open() {
    std::lock_guard const lock{mutex_};
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int waiting_ = 0;
  bool open_ = false;
};

}  // namespace

TEST_CASE("async_save: what the state held at the call is saved, whatever becomes of the memory") {
  for (int const ranks : {1, 2, 3}) {
    CAPTURE(ranks);
    dcp::test::TemporaryDirectory directory;
    std::string const place = directory / "ckpt";
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      GenerationState state{world, 300};
      state.fill(7);
      dcp::Pending pending = dcp::async_save<dcp::SafeTensors>(world, place, state);
      state.scribble();
      auto const report = pending.wait();
      CHECK(report.ranks == ranks);
      CHECK(report.staged_bytes > 300 * 256 * 4);
      CHECK(!report.streamed);
      CHECK(report.tensors == 5);
      CHECK(pending.done());
      CHECK(pending.wait().id == report.id);   // it says the same again
      dcp::load<dcp::SafeTensors>(world, place, state);
      CHECK(state.generation() == 7);
    });
  }
}

TEST_CASE("async_save: the files are, byte by byte, those of save") {
  std::vector<dcp::SafeTensorsOptions> layouts(3);
  layouts[1].max_file_bytes = 200'000;
  layouts[1].groups = {{"layer", "layer"}};
  layouts[2].layout = dcp::FileLayout::sharded;
  for (int const ranks : {1, 2, 5})
    for (auto const& layout : layouts)
      for (bool const checksums : {true, false}) {
        CAPTURE(ranks);
        dcp::test::TemporaryDirectory directory;
        dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
          GenerationState state{world, 700};
          state.fill(3);
          dcp::SaveOptions<dcp::SafeTensors> options;
          options.storage = layout;
          options.checksums = checksums;
          dcp::save<dcp::SafeTensors>(world, directory / "front", state, options);
          dcp::async_save<dcp::SafeTensors>(world, directory / "behind", state, options).wait();
        });
        auto front = files_in(directory / "front"), behind = files_in(directory / "behind");
        CHECK(front.size() >= 3);
        // The record differs in its id, and in the checksum of itself.
        auto const rest_of = [](std::string const& record) { return record.substr(record.find("\"sequence\"")); };
        CHECK(rest_of(front.at("dcp.json")) == rest_of(behind.at("dcp.json")));
        front.erase("dcp.json"), behind.erase("dcp.json");
        CHECK(front == behind);
        CHECK(std::distance(std::filesystem::directory_iterator{directory.path()}, {}) == 2);
      }
}

TEST_CASE("async_save: a part that is larger than staging memory streams through it, and the report says so") {
  dcp::test::TemporaryDirectory directory;
  std::string const place = directory / "ckpt";
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 80'000};   // 82 MB
    state.fill(5);
    dcp::Pending pending = dcp::async_save<dcp::SafeTensors>(world, place, state, {.staging_bytes = least});
    state.scribble();
    auto const report = pending.wait();
    CHECK(report.streamed);
    dcp::load<dcp::SafeTensors>(world, place, state);
    CHECK(state.generation() == 5);
  });
}

TEST_CASE("async_save: one rank's part streams through its staging memory while others have little to copy") {
  dcp::Memory const store;
  dcp::run_threads(3, [&](dcp::ThreadComm& world) {
    for (std::int64_t const large : {0, 2}) {
      CAPTURE(large);
      using Rows = dcp::Placement<dcp::Shard<0>>;
      auto const alone = dcp::DeviceMesh<2>{world, {3, 1}}.sub<1>({large});
      dcp::Extents const shape{20'000, 1024};   // 82 MB
      std::vector<float> memory(dcp::local_box<Rows>(alone, shape).size(), 3.0f);
      CHECK(memory.empty() == (world.rank() != large));
      GenerationState state{world, 700};   // which ranks exchange parts of
      state.fill(5);
      dcp::StateDict all{{"model", state}};
      all.add("large", dcp::ShardedTensor<float, Rows>{alone, shape, memory});
      dcp::Pending pending = dcp::async_save<OnMemory>(world, {store, "ckpt"}, all, {.if_exists = dcp::IfExists::replace, .staging_bytes = least, .deadline = 20s});
      state.scribble();
      std::fill(memory.begin(), memory.end(), 0.0f);
      CHECK(pending.wait().streamed);
      dcp::load<OnMemory>(world, {store, "ckpt"}, all);
      CHECK(state.generation() == 5);
      CHECK(std::count(memory.begin(), memory.end(), 3.0f) == static_cast<std::ptrdiff_t>(memory.size()));
    }
  });
}

TEST_CASE("async_save: less staging memory than the least is refused before anything is touched") {
  dcp::Memory const store;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 20};
    try {
      static_cast<void>(dcp::async_save<OnMemory>(world, {store, "ckpt"}, state, {.staging_bytes = least - 1}));
      FAIL("no error");
    } catch (dcp::Error const& error) {
      CHECK(error.code() == dcp::ErrorCode::budget);
    }
  });
  CHECK(dcp::Memory{store}.list("").empty());
}

TEST_CASE("async_save: sources that are overwritten in a loop from the return of the call on are saved as they were at the call") {
  int const saves = dcp::test::rounds(100, 1000);
  dcp::Memory const store;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 400};
    for (int generation = 1; generation <= saves; ++generation) {
      state.fill(static_cast<std::uint64_t>(generation));
      dcp::Pending pending = dcp::async_save<OnMemory>(world, {store, "ckpt"}, state, {.if_exists = dcp::IfExists::replace});
      do state.scribble();
      while (!pending.done());
      pending.wait();
      dcp::load<OnMemory>(world, {store, "ckpt"}, state);
      REQUIRE(state.generation() == static_cast<std::uint64_t>(generation));
    }
  });
}

TEST_CASE("async_save: writes that a queue does late are complete all the same") {
  using Late = dcp::test::LateWrites<dcp::Memory>;
  Late store;
  dcp::run_threads(3, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 700};
    state.fill(2);
    dcp::async_save<dcp::BasicSafeTensors<Late>>(world, {store, "ckpt"}, state).wait();
  });
  CHECK(store.list("").size() == 1);   // nothing beside it
}

TEST_CASE("async_save: a place that is taken is refused in the call, on all ranks") {
  dcp::Memory const store;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 20};
    state.fill(1);
    dcp::async_save<OnMemory>(world, {store, "ckpt"}, state).wait();
    state.fill(2);
    try {
      static_cast<void>(dcp::async_save<OnMemory>(world, {store, "ckpt"}, state));
      FAIL("no error");
    } catch (dcp::Error const& error) {
      CHECK(error.code() == dcp::ErrorCode::already_exists);
    }
  });
  CHECK(found_in(store) == 1);
}

TEST_CASE("async_save: a failure that nobody waits for reaches the hook, once, before it happens or after") {
  for (bool const late : {false, true}) {
    CAPTURE(late);
    dcp::Memory const store;
    std::mutex mutex;
    std::vector<dcp::Error> lost;
    dcp::set_background_error_hook([&](dcp::Error const& error) {
      std::lock_guard const lock{mutex};
      lost.push_back(error);
    });
    Gate gate;
    Faulty faulty{store};
    faulty.add({.call = Call::sync, .path = ".safetensors", .system_error = EIO, .hook = [&](Call, std::string const&) { gate.pass(); }});
    {
      dcp::SelfComm self;
      GenerationState state{self, 20};
      dcp::Pending pending = dcp::async_save<OnFaulty>(self, {faulty, "ckpt"}, state);
      gate.wait_for_somebody();
      CHECK(!pending.done());
      if (late) {
        gate.open();
        CHECK(pending.wait_for(30s));
      }
    }
    gate.open();
    for (auto const until = std::chrono::steady_clock::now() + 30s; std::chrono::steady_clock::now() < until; std::this_thread::sleep_for(1ms)) {
      std::lock_guard const lock{mutex};
      if (!lost.empty()) break;
    }
    dcp::set_background_error_hook({});
    std::lock_guard const lock{mutex};
    REQUIRE(lost.size() == 1);
    CHECK(lost[0].system_error() == EIO);
    CHECK(lost[0].phase() == "save: sync");
    CHECK(dcp::Memory{store}.list("").empty());
  }
}

TEST_CASE("async_save: one that was waited for does not reach the hook as well") {
  std::atomic<int> lost{0};
  dcp::set_background_error_hook([&](dcp::Error const&) { ++lost; });
  {
    dcp::SelfComm self;
    Faulty faulty{dcp::Memory{}};
    faulty.add({.call = Call::sync, .path = ".safetensors", .system_error = EIO});
    GenerationState state{self, 20};
    dcp::Pending pending = dcp::async_save<OnFaulty>(self, {faulty, "ckpt"}, state);
    for (int i = 0; i < 2; ++i) CHECK_THROWS_AS(pending.wait(), dcp::Error);
  }
  dcp::set_background_error_hook({});
  CHECK(lost == 0);
}

TEST_CASE("Pending: cancel on one rank ends the save on all, and leaves what was there") {
  for (int const canceller : {0, 2}) {
    CAPTURE(canceller);
    dcp::Memory const store;
    Gate gate;
    dcp::run_threads(3, [&](dcp::ThreadComm& world) {
      GenerationState state{world, 700};
      state.fill(1);
      dcp::save<OnMemory>(world, {store, "ckpt"}, state);
      state.fill(2);
      Faulty faulty{store};
      if (world.rank() == 1) faulty.add({.call = Call::sync, .path = ".safetensors", .hook = [&](Call, std::string const&) { gate.pass(); }});
      dcp::Pending pending = dcp::async_save<OnFaulty>(world, {faulty, "ckpt"}, state, {.if_exists = dcp::IfExists::replace});
      if (world.rank() == 1) gate.wait_for_somebody();
      world.barrier();
      if (world.rank() == canceller) {
        pending.cancel();
        if (canceller == 0) CHECK(pending.wait_for(30s));   // the other one's part may be done already: then it is rank 0 that decides
        gate.open();
      }
      bool cancelled = false;
      try {
        pending.wait();
      } catch (dcp::Error const& error) {
        cancelled = true;
        CHECK(error.code() == dcp::ErrorCode::cancelled);
        CHECK(error.rank() == canceller);
      }
      if (canceller == 0) CHECK(cancelled);
      dcp::load<OnMemory>(world, {store, "ckpt"}, state);
      CHECK(state.generation() == (cancelled ? 1 : 2));
      world.barrier();
      if (world.rank() == 0) CHECK(dcp::Memory{store}.list("").size() == 1);
    });
  }
}

TEST_CASE("Pending: a storage that does not answer holds up nobody who does not wait for it") {
  dcp::Memory const store;
  Gate gate;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 700};
    state.fill(1);
    Faulty faulty{store};
    faulty.add({.call = Call::write, .path = ".safetensors", .times = dcp::test::forever, .hook = [&](Call, std::string const&) { gate.pass(); }});
    dcp::Pending pending = dcp::async_save<OnFaulty>(world, {faulty, "ckpt"}, state);
    CHECK(!pending.wait_for(20ms));
    pending.wait_staged();
    state.fill(2);
    CHECK(!pending.done());
    world.barrier();
    gate.open();
    pending.wait();
    dcp::load<OnMemory>(world, {store, "ckpt"}, state);
    CHECK(state.generation() == 1);
  });
}

TEST_CASE("async_save: a rank that dies in the background is noticed by the deadline, by its silence") {
  dcp::Memory const store;
  Gate gate;
  dcp::run_threads(3, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 700};
    state.fill(1);
    Faulty faulty{store};
    // Rank 2 stops for good, its signs of life included: as a process that is gone, but for the communicator.
    if (world.rank() == 2) faulty.add({.call = Call::sync, .path = ".safetensors", .times = 1, .hook = [&](Call, std::string const&) { gate.pass(); }});
    dcp::Pending pending = dcp::async_save<OnFaulty>(world, {faulty, "ckpt"}, state, {.deadline = 300ms});
    if (world.rank() == 2) faulty.add({.path = "alive-2", .times = dcp::test::forever, .system_error = EIO});
    if (world.rank() != 2) CHECK(pending.wait_for(30s));
    world.barrier();
    gate.open();
    try {
      pending.wait();
      FAIL("no error");
    } catch (dcp::Error const& error) {
      CHECK(error.code() == dcp::ErrorCode::rank_failed);
      CHECK(error.message().find("rank 2 did not finish") != std::string::npos);
    }
  });
}

TEST_CASE("Pending: wait ends by the deadline when the storage does not answer, on all ranks, and the program can go on") {
  for (int const silent : {0, 1, -1}) {   // one rank's, or everybody's
    CAPTURE(silent);
    dcp::Memory const store, other;
    auto const gate = std::make_shared<Gate>();   // threads that are left behind keep it
    dcp::run_threads(2, [&](dcp::ThreadComm& world) {
      GenerationState state{world, 700};
      state.fill(1);
      Faulty faulty{store};
      if (silent < 0 || world.rank() == silent) faulty.add({.call = Call::write, .path = ".safetensors", .times = dcp::test::forever, .hook = [gate](Call, std::string const&) { gate->pass(); }});
      dcp::Pending pending = dcp::async_save<OnFaulty>(world, {faulty, "ckpt"}, state, {.deadline = 200ms});
      try {
        pending.wait();
        FAIL("no error");
      } catch (dcp::Error const& error) {
        CHECK((error.code() == dcp::ErrorCode::timeout || error.code() == dcp::ErrorCode::rank_failed));
      }
      dcp::async_save<OnMemory>(world, {other, "ckpt"}, state).wait();
    });
    gate->open();
    CHECK(found_in_rows(other, 700) == 1);
  }
}

TEST_CASE("async_save: an exchange that fails on one rank ends the call on all, while others copy") {
  dcp::Memory const store;
  dcp::run_threads(3, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 80'000};
    state.fill(1);
    Faulty faulty{store};
    // The writer fails while the call still streams through little memory.
    if (world.rank() == 1) faulty.add({.call = Call::write, .path = ".safetensors", .nth = 2, .times = dcp::test::forever, .system_error = EIO});
    bool failed = false;
    try {
      dcp::async_save<OnFaulty>(world, {faulty, "ckpt"}, state, {.staging_bytes = least}).wait();
    } catch (dcp::Error const& error) {
      failed = true;
      CHECK(error.system_error() == EIO);
      CHECK(error.rank() == 1);
    }
    CHECK(failed);
    world.barrier();
    dcp::async_save<OnMemory>(world, {store, "ckpt"}, state, {.staging_bytes = least}).wait();
  });
  CHECK(found_in_rows(store, 80'000) == 1);
}
