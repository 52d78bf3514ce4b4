// SPDX-License-Identifier: Apache-2.0
// ctest: alone
// Saves where nothing is renamed: attempts below the place, and a record that is put there last, on condition. Everything stops between any two changes of the
// store, changes come late, savers wake up after others have taken them for dead.
#include <dcp/checkpoint/async_save.hpp>
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/manager.hpp>
#include <dcp/checkpoint/remove.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#include "support/campaign.hpp"
#include "support/fault_medium.hpp"
#include "support/generate.hpp"
#include "support/generations.hpp"
#include "support/object_memory.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace {

using dcp::test::Call;
using dcp::test::FaultMedium;
using dcp::test::GenerationState;
using dcp::test::ObjectMemory;
template <class M>
using On = dcp::BasicSafeTensors<M>;
using Faulty = FaultMedium<ObjectMemory>;
using Steps = std::vector<std::int64_t>;

constexpr auto place = "/run/ckpt";
constexpr std::int64_t rows = 20;

template <class M>
void save_generation(int ranks, M medium, std::uint64_t generation, dcp::IfExists if_exists, bool behind = false, dcp::SafeTensorsOptions options = {}) {
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    GenerationState state{world, rows};
    state.fill(generation);
    dcp::SaveOptions<On<M>> const how{.if_exists = if_exists, .threads = 2, .staging_bytes = 16 << 20, .storage = options};
    if (behind) dcp::async_save<On<M>>(world, {medium, place}, state, how).wait();
    else dcp::save<On<M>>(world, {medium, place}, state, how);
  });
}

/// The generation that is found; 0 for nothing. Throws what load throws, and std::runtime_error for a mix.
template <class M>
std::uint64_t found(M const& medium, std::string const& from = place, int ranks = 1) {
  std::atomic<std::uint64_t> generation{0};
  try {
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      GenerationState state{world, rows};
      state.scribble();
      dcp::load<On<M>>(world, {medium, from}, state);
      generation = state.generation();
    });
  } catch (dcp::Error const& error) {
    if (error.code() == dcp::ErrorCode::not_found) return 0;
    throw;
  }
  return generation;
}

/// Directories below the place: the checkpoint's data, and whatever attempts have left.
std::size_t directories(ObjectMemory store) {
  std::size_t count = 0;
  for (auto const& entry : store.list(place)) count += entry.kind == dcp::EntryKind::directory ? 1 : 0;
  return count;
}

std::string data_of(ObjectMemory store) {
  dcp::MediumModel<ObjectMemory> medium{store};
  return dcp::detail::data_directory(place, *dcp::detail::read_record(medium, place));
}

}  // namespace

TEST_CASE("save: where nothing is renamed, a checkpoint is a record and one directory below it that holds the listed files and nothing else") {
  for (int const ranks : {1, 3})
    for (bool const behind : {false, true})
      for (auto const layout : {dcp::FileLayout::final, dcp::FileLayout::sharded}) {
        CAPTURE(ranks);
        CAPTURE(behind);
        ObjectMemory store;
        save_generation(ranks, store, 7, dcp::IfExists::fail, behind, {.layout = layout, .max_file_bytes = 16'000, .groups = {{"layer", "layer"}}});
        for (int const readers : {1, 2}) CHECK(found(store, place, readers) == 7);
        dcp::MediumModel<ObjectMemory> medium{store};
        auto const record = dcp::detail::read_record(medium, place);
        REQUIRE(record.has_value());
        std::set<std::string> listed{std::string{dcp::checksums_name}}, there;
        for (auto const& file : record->files) listed.insert(file.path);
        std::vector<std::string> files;
        dcp::detail::list_files(medium, data_of(store), "", files);
        there.insert(files.begin(), files.end());
        CHECK(there == listed);
        CHECK(store.list(place).size() == 2);
      }
}

TEST_CASE("save: a copy of such a checkpoint to a disk, or back, is a checkpoint") {
  ObjectMemory store;
  save_generation(3, store, 7, dcp::IfExists::fail);
  dcp::Memory disk = store.on_disk();
  CHECK(found(disk, place, 2) == 7);
  // There it is replaced as any other.
  save_generation(2, disk, 8, dcp::IfExists::replace);
  CHECK(found(disk) == 8);
  CHECK(disk.list("/run").size() == 1);
  // And one of a disk in the store.
  ObjectMemory back;
  dcp::MediumModel<dcp::Memory> from{disk};
  std::vector<std::string> files;
  dcp::detail::list_files(from, place, "", files);
  for (auto const& file : files) back.put_file(place + ('/' + file), dcp::read_file(from, place + ('/' + file), 1 << 30), {});
  CHECK(found(back) == 8);
  save_generation(2, back, 9, dcp::IfExists::replace);
  CHECK(found(back) == 9);
  CHECK(back.list(place).size() == 2);
}

TEST_CASE("save: where nothing is renamed, files that nobody has listed keep a checkpoint from being replaced if they would go with it") {
  ObjectMemory store;
  save_generation(1, store, 1, dcp::IfExists::fail);
  store.put_file(std::string{place} + "/notes.txt", dcp::as_byte_span("beside the record"), {});
  save_generation(1, store, 2, dcp::IfExists::replace);
  CHECK(store.kind(std::string{place} + "/notes.txt") == dcp::EntryKind::file);
  store.put_file(data_of(store) + "/config.json", dcp::as_byte_span("{}"), {});
  CHECK_THROWS_WITH_AS(save_generation(1, store, 3, dcp::IfExists::replace), doctest::Contains("config.json"), dcp::Error);
  CHECK(found(store) == 2);
  store.remove_file(data_of(store) + "/config.json");
  // What a rank of that save says late is no reason.
  store.put_file(data_of(store) + "/alive-1", dcp::as_byte_span("."), {});
  save_generation(1, store, 3, dcp::IfExists::replace);
  CHECK(found(store) == 3);
  CHECK(directories(store) == 1);
  ObjectMemory foreign;
  foreign.put_file(std::string{place} + "/model.safetensors", dcp::as_byte_span("of somebody"), {});
  for (auto const if_exists : {dcp::IfExists::fail, dcp::IfExists::replace}) CHECK_THROWS_AS(save_generation(1, foreign, 3, if_exists), dcp::Error);
  CHECK(foreign.list(place).size() == 1);
}

TEST_CASE("save: where nothing is renamed, one that stops anywhere leaves the old checkpoint or the new one, and the next save leaves only its own") {
  std::size_t stops = 0;
  for (int const ranks : {1, 3})
    for (bool const behind : {false, true})
      for (std::uint64_t const old_generation : {0u, 1u}) {
        ObjectMemory start;
        if (old_generation != 0) save_generation(2, start, old_generation, dcp::IfExists::fail);
        ObjectMemory const store = start.copy();
        save_generation(ranks, store, 2, dcp::IfExists::replace, behind, {.max_file_bytes = 16'000});
        std::map<std::uint64_t, std::size_t> outcomes;
        auto const steps = store.changes().size();
        for (std::size_t step = 0; step <= steps; ++step) {
          CAPTURE(ranks);
          CAPTURE(behind);
          CAPTURE(step);
          CAPTURE(steps);
          ++stops;
          ObjectMemory const stopped = store.replay(step);
          auto const now = found(stopped, place, step % 2 == 0 ? 1 : 2);
          ++outcomes[now];
          CHECK((now == old_generation || now == 2));
          if (step == steps) CHECK(now == 2);
          CHECK(found(stopped.on_disk()) == now);
          // By its own name an attempt is loaded by nobody.
          for (auto const& entry : ObjectMemory{stopped}.list(place)) {
            std::string const attempt = std::string{place} + '/' + entry.name;
            if (entry.kind != dcp::EntryKind::directory || (now != 0 && attempt == data_of(stopped))) continue;
            bool loaded = false;
            try {
              loaded = found(stopped, attempt) != 0;
            } catch (std::exception const&) {
              // Refused: by its record, or for want of files.
            }
            CHECK(!loaded);
          }
          ObjectMemory const next = stopped.copy();
          bool refused = false;
          try {
            save_generation(2, next, 4, dcp::IfExists::fail, behind);
          } catch (dcp::Error const& error) {
            refused = error.code() == dcp::ErrorCode::already_exists;
          }
          CHECK(refused == (now != 0));
          save_generation(2, next, 5, dcp::IfExists::replace);
          CHECK(found(next) == 5);
          CHECK(directories(next) == 1);
          ObjectMemory const gone = stopped.copy();
          dcp::SelfComm self;
          if (ObjectMemory{gone}.kind(place) != dcp::EntryKind::missing) dcp::remove<On<ObjectMemory>>(self, {gone, place});
          CHECK(ObjectMemory{gone}.kind(place) == dcp::EntryKind::missing);
        }
        CHECK(outcomes[old_generation] > 0);
        CHECK(outcomes[2] > 0);
      }
  CHECK(stops > 100);
}

TEST_CASE("save: what a save that was cut off still has on its way changes nothing about a checkpoint that was committed since") {
  std::size_t late = 0, refused = 0;
  for (bool const behind : {false, true})
    for (std::uint64_t const old_generation : {0u, 1u}) {
      ObjectMemory start;
      if (old_generation != 0) save_generation(2, start, old_generation, dcp::IfExists::fail);
      ObjectMemory const store = start.copy();
      save_generation(2, store, 2, dcp::IfExists::replace, behind, {.max_file_bytes = 16'000});
      auto const changes = store.changes();
      for (std::size_t step = 0; step <= changes.size(); ++step) {
        ObjectMemory const stopped = store.replay(step);
        save_generation(2, stopped, 3, dcp::IfExists::replace);
        // Each alone, and all of them.
        for (std::size_t one = step; one <= changes.size(); ++one) {
          ObjectMemory after = stopped.copy();
          for (std::size_t i = one == changes.size() ? step : one; i < std::min(one + 1, changes.size()) || (one == changes.size() && i < one); ++i) {
            ++late;
            refused += after.apply(changes[i]) ? 0 : 1;
          }
          CAPTURE(step);
          CAPTURE(one);
          CHECK(found(after) == 3);
        }
        ObjectMemory all = stopped.copy();
        for (std::size_t i = step; i < changes.size(); ++i) all.apply(changes[i]);
        save_generation(1, all, 4, dcp::IfExists::replace);
        CHECK(found(all) == 4);
        CHECK(directories(all) == 1);
      }
    }
  CHECK(late > 500);
  CHECK(refused > 50);   // records that came too late
}

TEST_CASE("save: one that wakes up after another save has taken it for dead fails, and the other's checkpoint stays") {
  for (std::uint64_t const old_generation : {0u, 1u}) {
    ObjectMemory store;
    if (old_generation != 0) save_generation(1, store, old_generation, dcp::IfExists::fail);
    Faulty faulty{store};
    bool slept = false;
    faulty.add({.call = Call::put_file, .path = "ckpt/dcp.json", .hook = [&](Call, std::string const&) {
                  slept = true;
                  store.expire_leases();
                  save_generation(2, store, 3, dcp::IfExists::replace);
                }});
    try {
      save_generation(1, faulty, 2, dcp::IfExists::replace);
      FAIL("no error");
    } catch (dcp::Error const& error) {
      CHECK(error.code() == dcp::ErrorCode::already_exists);
    }
    CHECK(slept);
    CHECK(found(store) == 3);
    CHECK(directories(store) == 1);
  }
}

TEST_CASE("save: one whose data was removed as that of a dead one takes its commit back, whenever that comes") {
  // The other has cleaned up, and then failed itself.
  auto const clean = [](ObjectMemory store) {
    store.expire_leases();
    Faulty faulty{store};
    faulty.add({.call = Call::open_write, .times = dcp::test::forever, .system_error = EIO});
    CHECK_THROWS_AS(save_generation(1, faulty, 9, dcp::IfExists::replace), dcp::Error);
  };
  for (std::uint64_t const old_generation : {0u, 1u})
    for (bool const before : {true, false}) {
      CAPTURE(old_generation);
      CAPTURE(before);
      ObjectMemory store;
      if (old_generation != 0) save_generation(1, store, old_generation, dcp::IfExists::fail);
      Faulty faulty{store};
      bool slept = false;
      // Just before the commit, or between it and the look whether anybody has been there.
      if (before) faulty.add({.call = Call::put_file, .path = "ckpt/dcp.json", .hook = [&](Call, std::string const&) { slept = true, clean(store); }});
      else
        faulty.add({.call = Call::open_read, .path = "dcp.json", .times = dcp::test::forever, .hook = [&](Call, std::string const& path) {
                      dcp::MediumModel<ObjectMemory> medium{store};
                      auto const record = dcp::detail::read_record(medium, place);
                      if (slept || !record || path.find(record->directory) == std::string::npos || record->directory.empty()) return;
                      slept = true;
                      clean(store);
                    }});
      bool failed = false;
      try {
        save_generation(1, faulty, 2, dcp::IfExists::replace);
      } catch (dcp::Error const& error) {
        failed = true;
        CHECK(std::string{error.what()}.find("gave no sign of life") != std::string::npos);
      }
      CHECK(slept);
      // Who cleans after the commit sees it.
      CHECK(failed == before);
      CHECK(found(store) == (before ? old_generation : 2));
      save_generation(1, store, 4, dcp::IfExists::replace);
      CHECK(found(store) == 4);
      CHECK(directories(store) == 1);
    }
}

TEST_CASE("save: a commit that is taken back finds the old checkpoint, whatever another save has cleaned up meanwhile") {
  ObjectMemory store;
  save_generation(1, store, 1, dcp::IfExists::fail);
  Faulty faulty{store};
  // Others, that clean up and fail: one before the commit, which removes the data, and one between the commit and its taking back, to which it is the checkpoint.
  int others = 0;
  auto const other = [&] {
    ++others;
    store.expire_leases();
    Faulty failing{store};
    failing.add({.call = Call::open_write, .times = dcp::test::forever, .system_error = EIO});
    CHECK_THROWS_AS(save_generation(1, failing, 9, dcp::IfExists::replace), dcp::Error);
  };
  faulty.add({.call = Call::put_file, .path = "ckpt/dcp.json", .hook = [&](Call, std::string const&) { other(); }});
  faulty.add({.call = Call::open_read, .path = "dcp.json", .times = dcp::test::forever, .hook = [&](Call, std::string const&) {
                if (others == 1) other();
              }});
  CHECK_THROWS_WITH_AS(save_generation(1, faulty, 2, dcp::IfExists::replace), doctest::Contains("gave no sign of life"), dcp::Error);
  CHECK(others == 2);
  CHECK(found(store) == 1);
  save_generation(1, store, 3, dcp::IfExists::replace);
  CHECK(found(store) == 3);
  CHECK(directories(store) == 1);
}

TEST_CASE("save: of many saves to one place at once one is committed, and the others are told so") {
  for (int round = 0; round < dcp::test::rounds(20, 500); ++round) {
    ObjectMemory const store;
    std::atomic<int> committed{0}, refused{0};
    std::atomic<std::uint64_t> last{0};
    dcp::run_threads(4, [&](dcp::ThreadComm& world) {
      dcp::SelfComm self;
      GenerationState state{self, rows};
      auto const generation = static_cast<std::uint64_t>(world.rank()) + 1;
      state.fill(generation);
      try {
        dcp::save<On<ObjectMemory>>(self, {store, place}, state, {.threads = 1});
        ++committed, last = generation;
      } catch (dcp::Error const& error) {
        CHECK(error.code() == dcp::ErrorCode::already_exists);
        ++refused;
      }
    });
    CHECK(committed == 1);
    CHECK(refused == 3);
    CHECK(found(store) == last);
  }
}

TEST_CASE("load: beside a writer that replaces a checkpoint below a record again and again, each load is one generation, none older than the last saved") {
  ObjectMemory const store;
  save_generation(1, store, 1, dcp::IfExists::fail);
  std::atomic<std::uint64_t> newest{1};
  std::atomic<bool> done{false}, problem_free{true};
  std::string problem;
  std::set<std::uint64_t> seen;
  std::atomic<int> loads{0};
  std::thread writer{[&] {
    for (int i = 0; i < 50; ++i) {
      // Some loads meet one replacement, some several.
      for (int const before = loads; i % 5 == 0 && loads == before && problem_free;) std::this_thread::yield();
      save_generation(1, store, newest + 1, dcp::IfExists::replace, false, {.max_file_bytes = 16'000});
      ++newest;
    }
    done = true;
  }};
  while (!done && problem.empty()) {
    std::uint64_t const at_least = newest;
    try {
      auto const now = found(store, place, 2);
      if (now < at_least) problem = "generation " + std::to_string(now) + ", when " + std::to_string(at_least) + " had been saved";
      seen.insert(now);
    } catch (std::exception const& error) {
      problem = error.what();
    }
    problem_free = problem.empty();
    ++loads;
  }
  writer.join();
  CHECK(problem == "");
  CHECK(seen.size() > 3);
}

// --- a manager

namespace {

void run_of_saves(ObjectMemory const& store, Steps const& steps, Steps const& pinned = {}) {
  dcp::SelfComm self;
  GenerationState state{self, rows};
  dcp::CheckpointManager<On<ObjectMemory>> checkpoints{self, {store, "run"}, {.keep_last = 2}};
  for (auto const step : pinned) checkpoints.pin(step);
  for (auto const step : steps) {
    state.fill(static_cast<std::uint64_t>(step));
    checkpoints.save(step, state.state());
  }
}

std::string text_of(ObjectMemory store, std::string const& path) {
  dcp::MediumModel<ObjectMemory> medium{store};
  return std::string{dcp::as_text(dcp::read_file(medium, path, 1 << 20))};
}

}  // namespace

TEST_CASE("CheckpointManager: where nothing is renamed, a stop anywhere leaves what retention promises, and the next manager cleans up") {
  ObjectMemory const store;
  run_of_saves(store, {1, 2, 3}, {1});
  ObjectMemory const recorded = store.copy();
  run_of_saves(recorded, {4});
  std::set<Steps> outcomes;
  for (std::size_t step = 0; step <= recorded.changes().size(); ++step) {
    CAPTURE(step);
    ObjectMemory const stopped = recorded.replay(step);
    dcp::SelfComm self;
    GenerationState state{self, rows};
    dcp::CheckpointManager<On<ObjectMemory>> checkpoints{self, {stopped, "run"}, {.keep_last = 2}};
    auto const steps = checkpoints.steps();
    outcomes.insert(steps);
    CHECK(steps.size() >= 3);
    CHECK(steps[0] == 1);   // pinned
    for (auto const one : steps) {
      state.scribble();
      checkpoints.load(one, state.state());
      CHECK(state.generation() == static_cast<std::uint64_t>(one));
    }
    auto const latest = checkpoints.latest();
    CHECK((latest == 3 || latest == 4));
    auto const named = text_of(stopped, "run/latest");
    CHECK((named == "step-00000003\n" || named == "step-00000004\n"));
    state.fill(5);
    checkpoints.save(5, state.state());
    for (auto const& entry : ObjectMemory{stopped}.list("run"))
      if (entry.kind == dcp::EntryKind::directory) CHECK(ObjectMemory{stopped}.list("run/" + entry.name).size() == 2);
    CHECK(checkpoints.steps() == Steps{1, latest.value_or(0), 5});
  }
  CHECK(outcomes == std::set<Steps>{{1, 2, 3}, {1, 2, 3, 4}, {1, 3, 4}});
}
