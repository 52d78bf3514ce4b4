// SPDX-License-Identifier: Apache-2.0
#include <dcp/checkpoint/async_save.hpp>
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/manager.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#include "support/campaign.hpp"
#include "support/fault_medium.hpp"
#include "support/generations.hpp"
#include "support/hasty_stager.hpp"
#include "support/outcome.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using namespace std::chrono_literals;
using dcp::test::Call;
using dcp::test::error_of;
using dcp::test::GenerationState;
using Faulty = dcp::test::FaultMedium<dcp::Memory>;
using OnFaulty = dcp::BasicSafeTensors<Faulty>;
using OnMemory = dcp::BasicSafeTensors<dcp::Memory>;
using Deferred = dcp::BasicDeferredStager<false>;
using Guarded = dcp::BasicDeferredStager<true>;

// Broken: leaves out what other ranks wait for.
struct Lonely {
  static constexpr std::string_view name = "lonely";
  static void begin(dcp::StagingWork& work) { work.begin_copies(); }
  static void finish(dcp::StagingWork&) {}
};

// Saves one generation after the other, scribbles over the state from the moment on at which `T` says that it may be, and looks what was saved.
// How many of the checkpoints are torn.
template <class T>
int torn_snapshots(int ranks, int saves, std::int64_t rows) {
  dcp::Memory const store;
  std::atomic<int> torn{0};
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    GenerationState state{world, rows};
    for (int generation = 1; generation <= saves; ++generation) {
      state.fill(static_cast<std::uint64_t>(generation));
      dcp::Pending pending = dcp::async_save<OnMemory, T>(world, {store, "ckpt"}, state, {.if_exists = dcp::IfExists::replace});
      pending.wait_staged();
      do state.scribble();
      while (!pending.done());
      pending.wait();
      dcp::load<OnMemory>(world, {store, "ckpt"}, state);
      bool const whole = state.difference(static_cast<std::uint64_t>(generation)).empty();
      if (!whole && world.rank() == 0) ++torn;
    }
  });
  return torn;
}

}  // namespace

TEST_CASE("stagers: sources that are overwritten in a loop as soon as the stager lets them are saved as they were at the call") {
  int const saves = dcp::test::rounds(30, 1000);
  for (int const ranks : {1, 2, 3}) {
    CAPTURE(ranks);
    CHECK(torn_snapshots<dcp::CopyStager>(ranks, saves, 400) == 0);
    CHECK(torn_snapshots<Deferred>(ranks, saves, 400) == 0);
  }
}

#if defined(__SANITIZE_THREAD__)
#define DCP_TEST_SEES_RACES
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define DCP_TEST_SEES_RACES
#endif
#endif
#ifndef DCP_TEST_SEES_RACES   // which would end the program for what these are about: a data race
TEST_CASE("stagers: that same loop finds a stager that returns before it has copied") {
  CHECK(torn_snapshots<dcp::test::Hasty>(1, 20, 40'000) > 0);
}

TEST_CASE("DeferredStager: guarded, it names the tensors that changed while they were to stay, on all ranks, and nothing is published") {
  dcp::Memory const store;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    dcp::DeviceMesh<1> const mesh{world, {2}};
    std::vector<float> steady(1 << 16, 1), changing(1 << 16, 1);
    dcp::ShardedTensor<float, dcp::Placement<dcp::Shard<0>>> first{mesh, {1 << 17}, steady}, second{mesh, {1 << 17}, changing};
    dcp::StateDict const state{{"steady", first}, {"changing", second}};
    dcp::Pending pending = dcp::async_save<OnMemory, Guarded>(world, {store, "ckpt"}, state);
    if (world.rank() == 1) changing[77] = 2;
    auto const staged = error_of([&] { pending.wait_staged(); }), waited = error_of([&] { pending.wait(); });
    REQUIRE((staged && waited));
    CHECK(staged->code() == dcp::ErrorCode::changed);
    CHECK(staged->message().find("changing") != std::string::npos);
    CHECK(staged->message().find("steady") == std::string::npos);
    CHECK(waited->code() == dcp::ErrorCode::changed);
    dcp::async_save<OnMemory, Guarded>(world, {store, "ckpt"}, state).wait();   // the next one works
  });
  CHECK(dcp::Memory{store}.list("").size() == 1);
}
#endif

TEST_CASE("stagers: one that leaves out the exchange is an error on all ranks, and of the wait too") {
  dcp::Memory const store;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 100};
    dcp::Pending pending = dcp::async_save<OnMemory, Lonely>(world, {store, "ckpt"}, state);
    auto const staged = error_of([&] { pending.wait_staged(); }), waited = error_of([&] { pending.wait(); });
    REQUIRE((staged && waited));
    CHECK(staged->code() == dcp::ErrorCode::invalid_argument);
    CHECK(waited->code() == dcp::ErrorCode::invalid_argument);
  });
  CHECK(dcp::Memory{store}.list("").empty());
}

TEST_CASE("DeferredStager: the call returns before the copy, the report says so, and the bytes are those of CopyStager") {
  for (int const ranks : {1, 2, 3}) {
    CAPTURE(ranks);
    dcp::Memory const store;
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      GenerationState state{world, 300};
      state.fill(4);
      auto const copied = dcp::async_save<OnMemory>(world, {store, "copied"}, state).wait();
      CHECK(copied.stager == "copy");
      CHECK(!copied.deferred);
      dcp::Pending pending = dcp::async_save<OnMemory, Guarded>(world, {store, "deferred"}, state);
      pending.wait_staged();
      pending.wait_staged();   // it says the same again
      state.scribble();
      auto const report = pending.wait();
      CHECK(report.stager == "deferred");
      CHECK(report.deferred);
      CHECK(report.staged_bytes == copied.staged_bytes);
      dcp::load<OnMemory>(world, {store, "deferred"}, state);
      CHECK(state.generation() == 4);
    });
    dcp::Memory files{store};
    for (auto const& entry : files.list("copied"))
      if (entry.name != "dcp.json") {
        CAPTURE(entry.name);
        dcp::MediumModel<dcp::Memory> model{files};
        CHECK(dcp::read_file(model, "copied/" + entry.name, 1 << 30) == dcp::read_file(model, "deferred/" + entry.name, 1 << 30));
      }
  }
}

TEST_CASE("DeferredStager: wait() alone waits for the copy too") {
  dcp::Memory const store;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 300};
    state.fill(4);
    dcp::async_save<OnMemory, Deferred>(world, {store, "ckpt"}, state).wait();
    state.scribble();
    dcp::load<OnMemory>(world, {store, "ckpt"}, state);
    CHECK(state.generation() == 4);
  });
}

TEST_CASE("DeferredStager: a part that is larger than staging memory streams through it behind the call") {
  dcp::Memory const store;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 60'000};   // 61 MB
    state.fill(5);
    dcp::Pending pending = dcp::async_save<OnMemory, Deferred>(world, {store, "ckpt"}, state, {.staging_bytes = dcp::least_memory_bytes});
    pending.wait_staged();
    state.scribble();
    auto const report = pending.wait();
    CHECK(report.streamed);
    dcp::load<OnMemory>(world, {store, "ckpt"}, state);
    CHECK(state.generation() == 5);
  });
}

TEST_CASE("DeferredStager: a Pending that is dropped before the copy reads nothing any more, and the failure of its save is not lost") {
  for (int const ranks : {1, 2}) {
    CAPTURE(ranks);
    dcp::Memory const store;
    std::atomic<int> lost{0};
    dcp::set_background_error_hook([&](dcp::Error const& error) {
      if (error.message().find("dropped before wait_staged") != std::string::npos) ++lost;
    });
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      auto state = std::make_unique<GenerationState>(world, 20'000);
      { dcp::Pending const pending = dcp::async_save<OnMemory, Deferred>(world, {store, "ckpt"}, *state); }
      state.reset();   // a sanitizer sees whoever still reads it
      for (int i = 0; lost < ranks && i < 10'000; ++i) std::this_thread::sleep_for(1ms);
    });
    dcp::set_background_error_hook({});
    CHECK(lost == ranks);
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      GenerationState state{world, 20};
      CHECK_THROWS_AS(dcp::load<OnMemory>(world, {store, "ckpt"}, state), dcp::Error);
    });
  }
}

TEST_CASE("DeferredStager: a failure of the storage behind the copy is thrown by wait(), and a manager goes on after it") {
  dcp::Memory const store;
  Faulty medium{dcp::Memory{store}};
  medium.add({.call = Call::write, .path = "safetensors", .times = dcp::test::forever, .system_error = ENOSPC});
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 300};
    dcp::CheckpointManager<OnFaulty, Deferred> manager{world, {medium, "run"}, {.staging_bytes = dcp::least_memory_bytes}};
    state.fill(1);
    dcp::Pending pending = manager.async_save(1, state);
    error_of([&] { pending.wait_staged(); });   // it may have learnt of it by then
    auto const waited = error_of([&] { pending.wait(); });
    REQUIRE(waited);
    CHECK(waited->system_error() == ENOSPC);
    world.barrier();
    medium.clear();
    world.barrier();
    dcp::Pending next = manager.async_save(2, state);
    next.wait_staged();
    state.scribble();
    auto const report = next.wait();
    CHECK(report.pool_reused);
    CHECK(report.deferred);
    manager.load(2, state);
    CHECK(state.generation() == 1);
  });
}

TEST_CASE("DeferredStager: flush returns in time, also where the copy waits for a storage that does not answer") {
  dcp::Memory const store;
  auto const answers = std::make_shared<std::atomic<bool>>(false);   // the save that hangs outlives this test
  Faulty medium{dcp::Memory{store}};
  medium.add({.call = Call::write, .path = "safetensors", .times = dcp::test::forever, .hook = [answers](Call, std::string const&) {
                while (!*answers) std::this_thread::sleep_for(1ms);
              }});
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 60'000};   // 61 MB, more than there is staging memory
    dcp::CheckpointManager<OnFaulty, Deferred> manager{world, {medium, "run"}, {.staging_bytes = dcp::least_memory_bytes}};
    dcp::Pending pending = manager.async_save(1, state);
    auto const before = std::chrono::steady_clock::now();
    CHECK(!manager.flush(200ms));
    CHECK(std::chrono::steady_clock::now() - before < 20s);
    world.barrier();
    *answers = true;
    auto const waited = error_of([&] { pending.wait(); });
    REQUIRE(waited);
    CHECK(waited->code() == dcp::ErrorCode::timeout);
    CHECK(!manager.latest());
  });
}

TEST_CASE("async_save: a storage that does not answer is an error after the deadline, also while the copy waits for room") {
  dcp::Memory const store;
  struct Gate {
    std::mutex mutex;
    std::condition_variable changed;
    bool open = false;
    ~Gate() { release(); }
    void pass() {
      std::unique_lock lock{mutex};
      changed.wait(lock, [&] { return open; });
    }
    void release() {
      std::lock_guard const lock{mutex};
      open = true;
      changed.notify_all();
    }
  };
  auto const gate = std::make_shared<Gate>();   // the save that hangs outlives this test
  Faulty medium{dcp::Memory{store}};
  medium.add({.call = Call::write, .path = "safetensors", .times = dcp::test::forever, .hook = [gate](Call, std::string const&) { gate->pass(); }});
  dcp::SelfComm self;
  GenerationState state{self, 60'000};
  auto const error = error_of([&] { static_cast<void>(dcp::async_save<OnFaulty>(self, {medium, "ckpt"}, state, {.staging_bytes = dcp::least_memory_bytes, .deadline = 300ms})); });
  gate->release();
  REQUIRE(error);
  CHECK(error->code() == dcp::ErrorCode::timeout);
  CHECK(error->message().find("does not answer") != std::string::npos);
}
