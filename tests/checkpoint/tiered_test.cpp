// SPDX-License-Identifier: Apache-2.0
// Two tiers: a near one that renames and a far one that does not, either of which fails, is damaged, stops, or is gone.
#include <dcp/checkpoint/tiered.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#include "support/fault_medium.hpp"
#include "support/generations.hpp"
#include "support/object_memory.hpp"

#include <doctest/doctest.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace {

using namespace std::chrono_literals;
using dcp::test::Call;
using dcp::test::GenerationState;
using dcp::test::ObjectMemory;
using Faulty = dcp::test::FaultMedium<ObjectMemory>;
template <class M>
using On = dcp::BasicSafeTensors<M>;
template <class Far>
using Tiers = dcp::Tiered<On<dcp::Memory>, On<Far>>;
template <class M>
using One = dcp::CheckpointManager<On<M>>;
using Steps = std::vector<std::int64_t>;
constexpr std::int64_t rows = 20;

template <class Manager>
void check_loads(Manager& checkpoints, GenerationState& state, Steps const& steps) {
  CHECK(checkpoints.steps() == steps);
  for (auto const step : steps) {
    state.scribble();
    checkpoints.load(step, state.state());
    CHECK(state.generation() == static_cast<std::uint64_t>(step));
  }
}
template <class M>
void check_tier(M const& medium, Steps const& steps) {
  dcp::SelfComm self;
  GenerationState state{self, rows};
  One<M> checkpoints{self, {medium, "run"}};
  check_loads(checkpoints, state, steps);
}

void flip(dcp::Memory store, std::string const& path, std::uint64_t at) {
  dcp::Bytes byte(1);
  store.open_read(path)->read_at(at, byte);
  byte[0] ^= std::byte{4};
  store.open_write(path)->write_at(at, byte);
}
constexpr auto near_file = "run/step-00000001/model-00001-of-00001.safetensors";

}  // namespace

TEST_CASE("Tiered: each tier has what its own retention keeps, whole and by its own record, on any number of ranks") {
  for (int const ranks : {1, 3}) {
    dcp::Memory const near;
    ObjectMemory const far;
    std::mutex mutex;
    std::vector<std::string> events;
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      GenerationState state{world, rows};
      dcp::TieredOptions<On<dcp::Memory>> options{.near = {.keep_last = 1}, .keep_last = 2, .keep_every = 2};
      options.near.events = [&](dcp::SaveEvent const& event) {
        using Kind = dcp::SaveEvent::Kind;
        std::lock_guard const lock{mutex};
        if (event.step == 5 && event.kind == Kind::drained) events.push_back("drained " + event.place);
        if (event.step == 5 && event.kind == Kind::committed) events.push_back("committed");
      };
      Tiers<ObjectMemory> checkpoints{world, {near, "run"}, {far, "bucket/run"}, options};
      for (std::int64_t step = 1; step <= 5; ++step) {
        state.fill(static_cast<std::uint64_t>(step));
        auto pending = checkpoints.async_save(step, state.state());
        state.scribble();
        if (step == 5) {
          auto const report = pending.wait();
          CHECK(std::any_of(report.phases.begin(), report.phases.end(), [](dcp::Phase const& phase) { return phase.name == "drain"; }));
        }
      }
      checkpoints.wait();
      CHECK(checkpoints.latest() == 5);
      CHECK(checkpoints.near_steps() == Steps{5});
      check_loads(checkpoints, state, {2, 4, 5});   // 2 and 4 from the far tier
    });
    CHECK(events.size() == 2);
    CHECK(std::count(events.begin(), events.end(), "drained /bucket/run/step-00000005") == 1);
    check_tier(near, {5});
    dcp::SelfComm self;
    GenerationState state{self, rows};
    One<ObjectMemory> alone{self, {far, "bucket/run"}};
    check_loads(alone, state, {2, 4, 5});
  }
}

TEST_CASE("Tiered: what is damaged or gone in the near tier is loaded from the far one, and the report says why") {
  dcp::Memory near;
  ObjectMemory const far;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, rows};
    Tiers<ObjectMemory> checkpoints{world, {near, "run"}, {far, "run"}};
    state.fill(1);
    CHECK(checkpoints.save(1, state.state()).warnings.empty());
    CHECK(checkpoints.load(1, state.state()).warnings.empty());
    if (world.rank() == 0) flip(near, near_file, 9000);
    world.barrier();
    state.scribble();
    auto const report = checkpoints.load(1, state.state());
    CHECK(state.generation() == 1);
    REQUIRE(report.warnings.size() == 1);
    CHECK(report.warnings[0].find("checksum") != std::string::npos);
    world.barrier();
    if (world.rank() == 0) near.remove_tree("run/step-00000001");
    world.barrier();
    state.scribble();
    CHECK(checkpoints.load(1, state.state()).place == "/run/step-00000001");
    CHECK(state.generation() == 1);
    CHECK(checkpoints.latest() == 1);
    try {
      checkpoints.load(7, state.state());
      FAIL("no error");
    } catch (dcp::Error const& error) {
      CHECK(error.code() == dcp::ErrorCode::not_found);
    }
  });
}

TEST_CASE("Tiered: a near tier that is lost with its machine begins anew behind what the far one has") {
  ObjectMemory const far;
  dcp::SelfComm self;
  GenerationState state{self, rows};
  for (std::int64_t step = 10; step <= 13; ++step) {
    dcp::Memory const near;   // another machine each time
    Tiers<ObjectMemory> checkpoints{self, {near, "run"}, {far, "run"}, {.near = {.keep_last = 1}, .keep_last = 2}};
    if (step > 10) {
      CHECK(checkpoints.latest() == step - 1);
      state.scribble();
      checkpoints.load(step - 1, state.state());
      CHECK(state.generation() == static_cast<std::uint64_t>(step - 1));
    }
    state.fill(static_cast<std::uint64_t>(step));
    checkpoints.save(step, state.state());
    CHECK(checkpoints.latest() == step);
  }
  check_tier(far, {12, 13});
}

TEST_CASE("Tiered: a near checkpoint that is damaged before it is copied is an error, is not copied, and does not keep newer ones from being copied") {
  dcp::Memory near;
  ObjectMemory const far;
  Faulty faulty{far};
  dcp::SelfComm self;
  GenerationState state{self, rows};
  {
    Tiers<Faulty> checkpoints{self, {near, "run"}, {faulty, "run"}};
    state.fill(1);
    // When the near tier has committed, and the far one is about to be looked at.
    bool damaged = false;
    faulty.add({.call = Call::create_directories, .times = dcp::test::forever, .hook = [&](Call, std::string const&) {
                  if (!std::exchange(damaged, true)) flip(near, near_file, 9000);
                }});
    try {
      checkpoints.save(1, state.state());
      FAIL("no error");
    } catch (dcp::Error const& error) {
      CHECK(error.code() == dcp::ErrorCode::corrupt);
      CHECK(error.phase() == "save: drain");
    }
    CHECK(damaged);
    state.fill(2);
    CHECK_THROWS_AS(checkpoints.save(2, state.state()), dcp::Error);   // says again that 1 is not there
    state.fill(3);
    checkpoints.save(3, state.state());
  }
  check_tier(far, {2, 3});
}

TEST_CASE("Tiered: a far tier that fails in any call is one Error on all ranks, the near tier has the checkpoint, and the next save copies both") {
  std::size_t errors = 0;
  for (int call = 0; call <= static_cast<int>(Call::block_bytes); ++call)
    for (std::uint64_t nth = 1;; ++nth) {
      dcp::Memory const near;
      ObjectMemory const far;
      Faulty faulty{far};
      bool failed = false;
      std::uint64_t hits = 0;
      dcp::run_threads(2, [&](dcp::ThreadComm& world) {
        GenerationState state{world, rows};
        Tiers<Faulty> checkpoints{world, {near, "run"}, {faulty, "run"}};
        if (world.rank() == 0) faulty.add({.call = static_cast<Call>(call), .nth = nth, .system_error = EIO});
        world.barrier();
        state.fill(1);
        std::optional<dcp::Error> failure;
        try {
          checkpoints.save(1, state.state());
        } catch (dcp::Error const& error) {
          failure = error;
          CHECK(error.system_error() == EIO);
          CHECK(error.rank() == 0);
        }
        state.scribble();
        checkpoints.load(1, state.state());
        CHECK(state.generation() == 1);
        world.barrier();
        if (world.rank() == 0) failed = failure.has_value(), hits = faulty.hits(), faulty.clear();
        world.barrier();
        state.fill(2);
        CHECK(checkpoints.save(2, state.state()).warnings.empty());
      });
      if (hits == 0) break;
      CAPTURE(to_string(static_cast<Call>(call)));
      CAPTURE(nth);
      errors += failed ? 1 : 0;
      check_tier(near, {1, 2});
      check_tier(far, {1, 2});
      for (auto const& entry : ObjectMemory{far}.list("run"))
        if (entry.kind == dcp::EntryKind::directory) CHECK(ObjectMemory{far}.list("run/" + entry.name).size() == 2);
    }
  CHECK(errors > 15);
}

TEST_CASE("Tiered: a stop anywhere leaves whole checkpoints in either tier, and the next run copies what the far tier lacks") {
  dcp::Memory const near;
  ObjectMemory const far;
  dcp::SelfComm self;
  GenerationState state{self, rows};
  auto const save = [&](dcp::Memory const& n, ObjectMemory const& f, std::int64_t step) {
    Tiers<ObjectMemory> checkpoints{self, {n, "run"}, {f, "run"}};
    state.fill(static_cast<std::uint64_t>(step));
    checkpoints.save(step, state.state());
  };
  save(near, far, 1);
  ObjectMemory const recorded = far.copy();
  save(near, recorded, 2);
  std::set<Steps> outcomes;
  auto const steps = recorded.changes().size();
  for (std::size_t step = 0; step <= steps; ++step) {
    CAPTURE(step);
    ObjectMemory const stopped = recorded.replay(step);
    dcp::Memory const near_then = near.copy();
    {
      Tiers<ObjectMemory> checkpoints{self, {near_then, "run"}, {stopped, "run"}};
      check_loads(checkpoints, state, {1, 2});
    }
    {
      One<ObjectMemory> alone{self, {stopped, "run"}};
      auto const there = alone.steps();
      outcomes.insert(there);
      check_loads(alone, state, there);
    }
    save(near_then, stopped, 3);
    check_tier(stopped, {1, 2, 3});
    for (auto const& entry : ObjectMemory{stopped}.list("run"))
      if (entry.kind == dcp::EntryKind::directory) CHECK(ObjectMemory{stopped}.list("run/" + entry.name).size() == 2);
  }
  CHECK(outcomes == std::set<Steps>{{1}, {1, 2}});
}

TEST_CASE("Tiered: the next save waits until the far tier has the one before, so that no more than one is on its way") {
  dcp::Memory const near;
  Faulty faulty{ObjectMemory{}};
  faulty.add({.call = Call::put_file, .path = "step-", .times = dcp::test::forever, .delay = 20ms});
  dcp::SelfComm self;
  GenerationState state{self, rows};
  Tiers<Faulty> checkpoints{self, {near, "run"}, {faulty, "run"}};
  for (std::int64_t step = 1; step <= 4; ++step) {
    state.fill(static_cast<std::uint64_t>(step));
    static_cast<void>(checkpoints.async_save(step, state.state()));
    // What the far tier has by now is at most one behind.
    dcp::MediumModel<Faulty> medium{faulty};
    if (step > 1) CHECK(dcp::detail::read_record(medium, "/run/step-0000000" + std::to_string(step - 1)).value().committed);
  }
  CHECK(checkpoints.flush(30s));
  CHECK(checkpoints.steps() == Steps{1, 2, 3, 4});
}
