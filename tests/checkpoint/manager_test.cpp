// SPDX-License-Identifier: Apache-2.0
#include <dcp/checkpoint/manager.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#include "support/campaign.hpp"
#include "support/fault_medium.hpp"
#include "support/generate.hpp"
#include "support/generations.hpp"
#include "support/recording_medium.hpp"
#include "support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using namespace std::chrono_literals;
using dcp::test::Call;
using dcp::test::FaultMedium;
using dcp::test::GenerationState;
using Faulty = FaultMedium<dcp::Memory>;
using OnMemory = dcp::BasicSafeTensors<dcp::Memory>;
using OnFaulty = dcp::BasicSafeTensors<Faulty>;
using Manager = dcp::CheckpointManager<OnMemory>;
using Steps = std::vector<std::int64_t>;

std::string text_of(dcp::Memory store, std::string const& path) {
  dcp::MediumModel<dcp::Memory> medium{store};
  return std::string{dcp::as_text(dcp::read_file(medium, path, 1 << 20))};
}

// Loads every step that a manager lists, and expects of each the generation of its step.
template <class S>
void check_all_load(dcp::CheckpointManager<S>& checkpoints, GenerationState& state) {
  for (auto const step : checkpoints.steps()) {
    state.scribble();
    checkpoints.load(step, state.state());
    CHECK(state.generation() == static_cast<std::uint64_t>(step));
  }
}

}  // namespace

TEST_CASE("CheckpointManager: saves, lists, finds and loads checkpoints by step, on any number of ranks") {
  for (int const ranks : {1, 3}) {
    dcp::Memory const store;
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      GenerationState state{world, 20};
      {
        Manager checkpoints{world, {store, "run"}};
        CHECK(!checkpoints.latest());
        CHECK(checkpoints.steps().empty());
        for (std::int64_t const step : {9'900, 10'000, 100}) {   // digits of any width, and back
          state.fill(static_cast<std::uint64_t>(step));
          if (step == 100) checkpoints.save(step, state.state());
          else checkpoints.async_save(step, state.state()).wait();
          CHECK(checkpoints.latest() == step);
        }
        CHECK(checkpoints.steps() == Steps{100, 9'900, 10'000});
        CHECK(text_of(store, "run/latest") == "step-00000100\n");
        check_all_load(checkpoints, state);
        CHECK_THROWS_AS(checkpoints.load(5, state.state()), dcp::Error);
      }
      world.barrier();
      Manager again{world, {store, "run"}};
      CHECK(again.latest() == 100);
      check_all_load(again, state);
    });
  }
}

TEST_CASE("CheckpointManager: law: retention keeps the last, every k-th, the best and the pinned ones, by what records say, and never lets the newest go") {
  auto const seed = dcp::test::first_seed();
  for (std::uint64_t round = 0; round < static_cast<std::uint64_t>(dcp::test::rounds(60, 1000)); ++round) {
    CAPTURE(seed);
    CAPTURE(round);
    dcp::test::Random random{seed + round};
    dcp::Memory const store;
    dcp::SelfComm self;
    GenerationState state{self, 20};
    dcp::ManagerOptions<OnMemory> options;
    options.keep_last = random.between(1, 3);
    options.keep_every = random.one_in(2) ? random.between(2, 50) : 0;
    options.keep_best = random.one_in(2) ? random.between(1, 2) : 0;
    options.best = random.one_in(2) ? dcp::Best::lowest : dcp::Best::highest;
    struct Saved {
      std::int64_t step;
      double metric;
    };
    std::vector<Saved> kept;   // a model of it, oldest first
    std::set<std::int64_t> pinned, seen;
    Manager checkpoints{self, {store, "run"}, options};
    for (int save = 0; save < 12; ++save) {
      std::int64_t step = random.one_in(4) ? random.between(0, 9) : random.one_in(2) ? random.between(90, 110) : random.between(9'990, 100'010);
      if (!seen.insert(step).second) continue;
      if (random.one_in(5)) checkpoints.pin(step), pinned.insert(step);
      if (!pinned.empty() && random.one_in(8)) checkpoints.unpin(*pinned.begin()), pinned.erase(pinned.begin());
      double const metric = static_cast<double>(random.between(0, 1000));
      state.fill(static_cast<std::uint64_t>(step));
      checkpoints.save(step, state.state(), metric);
      kept.push_back({step, metric});
      auto ranked = kept;
      std::stable_sort(ranked.begin(), ranked.end(), [&](Saved const& a, Saved const& b) { return options.best == dcp::Best::lowest ? a.metric < b.metric : a.metric > b.metric; });
      ranked.resize(std::min(ranked.size(), static_cast<std::size_t>(options.keep_best)));
      std::vector<Saved> next;
      for (std::size_t i = 0; i < kept.size(); ++i) {
        bool const best = std::any_of(ranked.begin(), ranked.end(), [&](Saved const& one) { return one.step == kept[i].step; });
        if (kept.size() - i <= static_cast<std::size_t>(options.keep_last) || (options.keep_every > 0 && kept[i].step % options.keep_every == 0) || best || pinned.contains(kept[i].step)) next.push_back(kept[i]);
      }
      kept = next;
      Steps expected;
      for (auto const& one : kept) expected.push_back(one.step);
      std::sort(expected.begin(), expected.end());
      CHECK(checkpoints.steps() == expected);
      CHECK(checkpoints.latest() == step);
    }
    check_all_load(checkpoints, state);
  }
}

TEST_CASE("CheckpointManager: a second one on the same root is told so, until the first one has ended") {
  dcp::Memory const store;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    {
      Manager const first{world, {store, "run"}};
      try {
        Manager const second{world, {store, "run"}};
        FAIL("no error");
      } catch (dcp::Error const& error) {
        CHECK(error.code() == dcp::ErrorCode::busy);
        CHECK(error.path() != "");
      }
      Manager const elsewhere{world, {store, "other"}};
      world.barrier();
    }
    world.barrier();
    Manager const third{world, {store, "run"}};
  });
}

TEST_CASE("CheckpointManager: a step that is there is not replaced") {
  dcp::Memory const store;
  dcp::SelfComm self;
  GenerationState state{self, 20};
  Manager checkpoints{self, {store, "run"}};
  state.fill(4);
  checkpoints.save(4, state.state());
  state.fill(5);
  CHECK_THROWS_AS(checkpoints.async_save(4, state.state()).wait(), dcp::Error);
  check_all_load(checkpoints, state);
  CHECK_THROWS_AS(checkpoints.save(-1, state.state()), dcp::Error);
  CHECK_THROWS_AS(checkpoints.save(7, state.state(), std::nan("")), dcp::Error);
  CHECK(checkpoints.steps() == Steps{4});
}

TEST_CASE("CheckpointManager: what comes while a save is under way waits, fails or is skipped, the same on all ranks") {
  for (auto const if_busy : {dcp::IfBusy::wait, dcp::IfBusy::fail, dcp::IfBusy::skip}) {
    CAPTURE(static_cast<int>(if_busy));
    dcp::Memory const store;
    dcp::run_threads(3, [&](dcp::ThreadComm& world) {
      GenerationState state{world, 20};
      Faulty faulty{store};
      // Only one rank is slow: the others would decide differently by themselves.
      if (world.rank() == 1) faulty.add({.call = Call::rename_file, .path = "done-1", .delay = 300ms});
      dcp::CheckpointManager<OnFaulty> checkpoints{world, {faulty, "run"}, {.if_busy = if_busy}};
      state.fill(1);
      dcp::Pending first = checkpoints.async_save(1, state.state());
      state.fill(2);
      bool failed = false, skipped = false;
      try {
        dcp::Pending second = checkpoints.async_save(2, state.state());
        skipped = second.wait().skipped;
        CHECK(second.done());
        second.cancel();   // nothing is left to cancel
        second.wait();
      } catch (dcp::Error const& error) {
        failed = true;
        CHECK(error.code() == dcp::ErrorCode::busy);
      }
      CHECK(failed == (if_busy == dcp::IfBusy::fail));
      CHECK(skipped == (if_busy == dcp::IfBusy::skip));
      checkpoints.wait();
      first.wait();
      CHECK(checkpoints.steps() == (if_busy == dcp::IfBusy::wait ? Steps{1, 2} : Steps{1}));
      state.fill(3);
      checkpoints.save(3, state.state());
      check_all_load(checkpoints, state);
    });
  }
}

TEST_CASE("CheckpointManager: a failure that nobody waited for is thrown by the next save, on all ranks, and the one after that works") {
  for (int const victim : {0, 2}) {
    CAPTURE(victim);
    dcp::Memory const store;
    dcp::run_threads(3, [&](dcp::ThreadComm& world) {
      GenerationState state{world, 700};
      Faulty faulty{store};
      dcp::CheckpointManager<OnFaulty> checkpoints{world, {faulty, "run"}};
      state.fill(1);
      checkpoints.save(1, state.state());
      if (world.rank() == victim) faulty.add({.call = Call::sync, .path = ".safetensors", .system_error = EIO});
      state.fill(2);
      static_cast<void>(checkpoints.async_save(2, state.state()));
      state.fill(3);
      try {
        static_cast<void>(checkpoints.async_save(3, state.state()));
        FAIL("no error");
      } catch (dcp::Error const& error) {
        CHECK(error.system_error() == EIO);
        CHECK(error.rank() == victim);
      }
      CHECK(checkpoints.latest() == 1);
      checkpoints.save(3, state.state());
      CHECK(checkpoints.steps() == Steps{1, 3});
      check_all_load(checkpoints, state);
      world.barrier();
      if (world.rank() == 0)
        for (auto const& entry : dcp::Memory{store}.list("run")) CHECK(entry.name.find(".dcp-") == std::string::npos);
    });
  }
}

TEST_CASE("CheckpointManager: flush returns in time when the storage does not answer, and tells whether all is saved") {
  dcp::Memory const store;
  std::atomic<bool> answer{false};
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 700};
    Faulty faulty{store};
    dcp::CheckpointManager<OnFaulty> checkpoints{world, {faulty, "run"}};
    CHECK(checkpoints.flush(0s));   // nothing is under way
    state.fill(1);
    checkpoints.save(1, state.state());
    if (world.rank() == 1)
      faulty.add({.call = Call::write, .path = ".safetensors", .times = dcp::test::forever, .hook = [&](Call, std::string const&) {
                    while (!answer) std::this_thread::sleep_for(1ms);
                  }});
    state.fill(2);
    dcp::Pending pending = checkpoints.async_save(2, state.state());
    CHECK(!checkpoints.flush(100ms));   // or else nobody would answer
    CHECK(checkpoints.latest() == 1);
    world.barrier();
    answer = true;
    CHECK(checkpoints.flush(60s));
    pending.wait();
    CHECK(checkpoints.latest() == 2);
  });
}

TEST_CASE("CheckpointManager: who loads a checkpoint while it is retired gets all of it, or is told that it is gone") {
  dcp::test::TemporaryDirectory directory;
  auto const root = directory / "run";
  std::atomic<std::int64_t> newest{0};
  std::atomic<bool> ended{false};
  int whole = 0, gone = 0;
  std::string wrong;
  std::jthread reader{[&] {
    dcp::SelfComm self;
    GenerationState state{self, 5000};
    while (!ended || whole == 0) {
      std::int64_t const step = newest;
      if (step == 0) continue;
      std::array<char, 32> name{};
      std::snprintf(name.data(), name.size(), "/step-%08lld", static_cast<long long>(step));
      state.scribble();
      try {
        dcp::load<dcp::SafeTensors>(self, root + name.data(), state);
        whole += state.generation() == static_cast<std::uint64_t>(step) ? 1 : 0;
      } catch (dcp::Error const& error) {
        ++gone;
        if (error.code() != dcp::ErrorCode::not_found && error.code() != dcp::ErrorCode::missing_file) wrong = error.what();
      } catch (std::exception const& error) {
        wrong = error.what();
      }
    }
  }};
  dcp::SelfComm self;
  GenerationState state{self, 5000};
  dcp::CheckpointManager<dcp::SafeTensors> checkpoints{self, root, {.keep_last = 1}};
  for (std::int64_t step = 1; step <= dcp::test::rounds(60, 2000); ++step) {
    state.fill(static_cast<std::uint64_t>(step));
    checkpoints.save(step, state);
    newest = step;
  }
  ended = true;
  reader.join();
  CHECK(wrong == "");
  CHECK(whole > 0);
  MESSAGE(whole << " loads were whole, " << gone << " were told that it is gone");
}

TEST_CASE("CheckpointManager: events tell what happened, in order, and a callback that throws harms nothing") {
  dcp::Memory const store;
  std::mutex mutex;
  std::map<int, std::vector<std::string>> told;   // by rank
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 700};
    dcp::ManagerOptions<OnMemory> options;
    options.keep_last = 1;
    options.events = [&, rank = world.rank()](dcp::SaveEvent const& event) {
      constexpr std::array names{"staged", "written", "committed", "failed", "retired"};
      std::lock_guard const lock{mutex};
      told[rank].push_back(std::string{names[static_cast<std::size_t>(event.kind)]} + (event.step >= 0 ? " " + std::to_string(event.step) : ""));
      if (event.kind != dcp::SaveEvent::Kind::staged) throw 1;
    };
    Manager checkpoints{world, {store, "run"}, options};
    for (int step = 1; step <= 2; ++step) checkpoints.save(step, state.state());
    CHECK(checkpoints.steps() == Steps{2});
  });
  auto const count = [&](int rank, std::string const& what) { return std::count(told[rank].begin(), told[rank].end(), what); };
  CHECK(count(0, "staged 1") == 1);
  CHECK(count(0, "written 2") == 1);
  CHECK(count(0, "committed 2") == 1);
  CHECK(count(0, "retired 1") == 1);
  CHECK(count(1, "staged 1") == 1);
  CHECK(count(1, "written 1") == 1);
  CHECK(count(1, "written 2") == 1);
  CHECK(count(1, "committed 1") == 0);
}

TEST_CASE("CheckpointManager: a stop anywhere in a save with retention leaves what retention promises, and the next manager cleans up") {
  using Recorder = dcp::test::RecordingMedium;
  using OnRecorder = dcp::BasicSafeTensors<Recorder>;
  for (int const ranks : {1, 2}) {
    CAPTURE(ranks);
    dcp::Memory start;
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      GenerationState state{world, 20};
      Manager checkpoints{world, {start, "run"}, {.keep_last = 2}};
      for (std::uint64_t const step : {1u, 2u}) state.fill(step), checkpoints.save(static_cast<std::int64_t>(step), state.state());
    });
    Recorder recorder{start};
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      GenerationState state{world, 20};
      dcp::CheckpointManager<OnRecorder> checkpoints{world, {recorder, "run"}, {.keep_last = 2}};
      state.fill(3);
      static_cast<void>(checkpoints.async_save(3, state.state()));
      checkpoints.wait();
    });
    std::set<Steps> outcomes;
    std::size_t crashes = 0;
    recorder.for_each_crash(dcp::test::crash_policies(20261127, 4), [&](dcp::Memory disk, std::size_t prefix, dcp::test::DropPolicy const&) {
      CAPTURE(prefix);
      ++crashes;
      dcp::SelfComm self;
      GenerationState state{self, 20};
      Manager checkpoints{self, {disk, "run"}, {.keep_last = 2}};
      auto const steps = checkpoints.steps();
      outcomes.insert(steps);
      CHECK(steps.size() >= 2);   // what retention promises
      CHECK((checkpoints.latest() == 2 || checkpoints.latest() == 3));
      check_all_load(checkpoints, state);
      std::string const pointed = text_of(disk, "run/latest");
      CHECK((pointed == "step-00000002\n" || (pointed == "step-00000003\n" && checkpoints.latest() == 3)));
      state.fill(4);
      checkpoints.save(4, state.state());
      CHECK(checkpoints.steps() == Steps{*std::max_element(steps.begin(), steps.end()), 4});
      std::size_t strangers = 0;
      for (auto const& entry : disk.list("run"))
        if (entry.name.find(".dcp-") != std::string::npos) ++strangers;
      CHECK(strangers == 0);
    });
    CHECK(crashes > 200);
    CHECK(outcomes.contains(Steps{1, 2}));
    CHECK(outcomes.contains(Steps{1, 2, 3}));
    CHECK(outcomes.contains(Steps{2, 3}));
  }
}

TEST_CASE("CheckpointManager: plans are used again while names, shapes, layouts, memory and options stay, and a change on one rank is noticed by all") {
  dcp::Memory const store;
  dcp::run_threads(3, [&](dcp::ThreadComm& world) {
    using Rows = dcp::Placement<dcp::Shard<0>>;
    using Columns = dcp::Placement<dcp::Shard<1>>;
    dcp::DeviceMesh<1> const mesh{world, {3}};
    std::vector<float> memory(dcp::local_box<Rows>(mesh, {90, 64}).size()), other(memory.size()), small(7);
    std::vector<float> columns(dcp::local_box<Columns>(mesh, {90, 64}).size()), thin(dcp::local_box<Columns>(mesh, {9000, 6}).size());
    std::int64_t number = 0;
    std::string note;
    Manager checkpoints{world, {store, "run"}, {.keep_last = 2}};
    std::int64_t step = 0;
    auto const save = [&](dcp::StateDict const& state) {
      ++step;
      number = 100 * step, note = "step " + std::to_string(step);
      for (auto* part : {&memory, &other, &columns, &thin}) std::fill(part->begin(), part->end(), static_cast<float>(step));
      auto const report = checkpoints.save(step, state);
      number = 0, note.clear();
      for (auto* part : {&memory, &other, &columns, &thin}) std::fill(part->begin(), part->end(), 0.0f);
      checkpoints.load(step, state);
      CHECK(number == 100 * step);
      CHECK(note == "step " + std::to_string(step));
      return report.plan_reused;
    };
    auto const plain = [&](std::vector<float>& part) {
      dcp::StateDict state{{"number", number}, {"note", note}, {"small", dcp::TensorView<float>{small, {7}}}};
      state.add("weight", dcp::ShardedTensor<float, Rows>{mesh, {90, 64}, part});
      return state;
    };
    CHECK(!save(plain(memory)));
    for (int i = 0; i < 3; ++i) {   // a state that is built anew every time
      CHECK(save(plain(memory)));
      CHECK(std::count(memory.begin(), memory.end(), static_cast<float>(step)) == static_cast<std::ptrdiff_t>(memory.size()));
    }
    CHECK(!save(plain(world.rank() == 1 ? other : memory)));   // one rank's memory has moved
    CHECK(save(plain(world.rank() == 1 ? other : memory)));
    dcp::StateDict across{{"number", number}, {"note", note}};
    across.add("weight", dcp::ShardedTensor<float, Columns>{mesh, {90, 64}, columns});
    CHECK(!save(across));
    CHECK(save(across));
    CHECK(std::count(columns.begin(), columns.end(), static_cast<float>(step)) == static_cast<std::ptrdiff_t>(columns.size()));
    across.add("more", dcp::TensorView<float>{small, {7}});
    CHECK(!save(across));
    CHECK(save(across));
    dcp::StateDict runs{{"number", number}, {"note", note}};   // too many for rounds of the exchange to be remembered
    runs.add("thin", dcp::ShardedTensor<float, Columns>{mesh, {9000, 6}, thin});
    CHECK(!save(runs));
    CHECK(save(runs));
    CHECK(std::count(thin.begin(), thin.end(), static_cast<float>(step)) == static_cast<std::ptrdiff_t>(thin.size()));
    CHECK(!save(across));
    // Values that ranks hold differently are found in a save with a known plan too.
    number = world.rank();
    CHECK_THROWS_AS(checkpoints.save(++step, across), dcp::Error);
    number = 0;
    // And steps that ranks count differently.
    try {
      checkpoints.save(step + (world.rank() == 2 ? 1 : 0), across);
      FAIL("no error");
    } catch (dcp::Error const& error) {
      CHECK(error.code() == dcp::ErrorCode::ranks_disagree);
    }
    CHECK(!save(across));
  });
}
