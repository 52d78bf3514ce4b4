// SPDX-License-Identifier: Apache-2.0
// ctest: alone
// Power cuts and kills between any two storage calls of a save: what is found afterwards is the old checkpoint or the new one.
// And the same with protocols broken on purpose, to show that this would be noticed.
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/remove.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>
#include <dcp/storage/torch_dcp.hpp>

#include "support/campaign.hpp"
#include "support/fault_medium.hpp"
#include "support/generations.hpp"
#include "support/late_writes.hpp"
#include "support/recording_medium.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace {

using dcp::test::DropPolicy;
using dcp::test::GenerationState;
using dcp::test::RecordingMedium;

constexpr auto place = "run/ckpt";

struct RecordingWithoutExchange : RecordingMedium {
  using RecordingMedium::RecordingMedium;
  bool exchange_directories(std::string const&, std::string const&) { return false; }
};

// Commit before sync: files are never synced.
struct RecordingWithoutFileSync : RecordingMedium {
  using RecordingMedium::RecordingMedium;
  struct File final : dcp::WritableFile {
    std::unique_ptr<dcp::WritableFile> inner;
    explicit File(std::unique_ptr<dcp::WritableFile> file) : inner{std::move(file)} {}
    void write_at(std::uint64_t offset, dcp::ConstByteSpan bytes) override { inner->write_at(offset, bytes); }
    void resize(std::uint64_t size) override { inner->resize(size); }
    void sync() override {}
    void close() override { inner->close(); }
  };
  std::unique_ptr<dcp::WritableFile> open_write(std::string const& path) { return std::make_unique<File>(RecordingMedium::open_write(path)); }
};

// Names are never synced.
struct RecordingWithoutDirectorySync : RecordingMedium {
  using RecordingMedium::RecordingMedium;
  void sync_directory(std::string const&) {}
};

// Record before data: data is written (and synced, very carefully) when the checkpoint has its name.
struct RecordingWithLateData : RecordingMedium {
  using RecordingMedium::RecordingMedium;
  using Late = std::vector<std::function<void()>>;
  std::shared_ptr<Late> late = std::make_shared<Late>();
  std::shared_ptr<std::mutex> mutex = std::make_shared<std::mutex>();
  struct File final : dcp::WritableFile {
    std::shared_ptr<dcp::WritableFile> inner;
    RecordingWithLateData& medium;
    File(std::unique_ptr<dcp::WritableFile> file, RecordingWithLateData& of) : inner{std::move(file)}, medium{of} {}
    void later(std::function<void()> action) {
      std::lock_guard const lock{*medium.mutex};
      medium.late->push_back(std::move(action));
    }
    void write_at(std::uint64_t offset, dcp::ConstByteSpan bytes) override {
      later([file = inner, offset, copy = dcp::Bytes(bytes.begin(), bytes.end())] { file->write_at(offset, copy); });
    }
    void resize(std::uint64_t size) override { inner->resize(size); }
    void sync() override { later([file = inner] { file->sync(); }); }
    void close() override {}
  };
  std::unique_ptr<dcp::WritableFile> open_write(std::string const& path) {
    auto file = RecordingMedium::open_write(path);
    if (path.find(".safetensors") == std::string::npos) return file;
    return std::make_unique<File>(std::move(file), *this);
  }
  void write_late() {
    for (auto const& action : std::exchange(*late, {})) action();
  }
  bool publish_new(std::string const& from, std::string const& to) {
    bool const done = RecordingMedium::publish_new(from, to);
    write_late();
    return done;
  }
  bool exchange_directories(std::string const& a, std::string const& b) {
    bool const done = RecordingMedium::exchange_directories(a, b);
    write_late();
    return done;
  }
};

// The old checkpoint goes first, then the new one is written: safe it is not, but there is space for both.
struct RecordingThatMakesSpace : RecordingMedium {
  using RecordingMedium::RecordingMedium;
  std::unique_ptr<dcp::WritableFile> open_write(std::string const& path) {
    if (path.find(".safetensors") != std::string::npos) RecordingMedium::remove_tree("run/ckpt");
    return RecordingMedium::open_write(path);
  }
  bool exchange_directories(std::string const& a, std::string const& b) { return RecordingMedium::publish_new(a, b) && RecordingMedium::create_directory(a); }
};

template <template <class> class On = dcp::BasicSafeTensors, class M>
void save_generation(int ranks, M& medium, std::uint64_t generation, dcp::IfExists if_exists, typename On<M>::Options const& options = {}, std::int64_t rows = 1100) {
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    GenerationState state{world, rows};
    state.fill(generation);
    dcp::save<On<M>>(world, {medium, place}, state, {.if_exists = if_exists, .threads = 1, .storage = options});
  });
}

/// The generation that is found; 0 for nothing. Throws what load throws, and std::runtime_error for a mix.
template <template <class> class On = dcp::BasicSafeTensors>
std::uint64_t load_generation(int ranks, dcp::Memory const& disk, std::string const& from = place, std::int64_t rows = 1100) {
  std::atomic<std::uint64_t> found{0};
  auto const body = [&](auto& world) {
    GenerationState state{world, rows};
    state.scribble();
    dcp::load<On<dcp::Memory>>(world, {disk, from}, state);
    found = state.generation();
  };
  try {
    dcp::SelfComm self;
    if (ranks == 1) body(self);
    else dcp::run_threads(ranks, body);
  } catch (dcp::Error const& error) {
    if (error.code() == dcp::ErrorCode::not_found) return 0;
    throw;
  }
  return found;
}

struct Findings {
  std::size_t crashes = 0, steps = 0;
  std::map<std::uint64_t, std::size_t> found;   // generation -> how often; 0: nothing was there
  std::size_t lost = 0, wrong_after = 0;        // of the crash; of the save that came after it
  std::string first;                            // what was wrong first

  void note(std::size_t& counter, std::string const& what) {
    ++counter;
    if (first.empty()) first = what;
  }
};

struct Experiment {
  std::uint64_t old_generation = 0, new_generation = 2;   // 0: a first save
  std::int64_t rows = 1100;
  bool save_again = true;
  bool returned = true;                         // the save, without an error
};

/// Stops the recorded save everywhere, in every way, and looks.
template <template <class> class On = dcp::BasicSafeTensors, class M>
Findings crash_everywhere(M const& medium, Experiment const& experiment, std::uint64_t seed) {
  Findings findings;
  findings.steps = medium.length();
  auto const policies = dcp::test::crash_policies(seed, dcp::test::rounds(3, 40));
  medium.for_each_crash(policies, [&](dcp::Memory disk, std::size_t prefix, DropPolicy policy) {
    ++findings.crashes;
    std::string const where = std::to_string(prefix) + " of " + std::to_string(findings.steps) + " steps, the last " + (prefix > 0 ? medium.describe(prefix - 1) : "none") + "; " + policy.text() + ": ";
    bool const killed = policy.text() == DropPolicy::process_kill().text();
    std::uint64_t found = 0;
    try {
      found = load_generation<On>(killed && prefix % 3 == 0 ? 2 : 1, disk, place, experiment.rows);
    } catch (std::exception const& error) {
      findings.note(findings.lost, where + error.what());
      return;
    }
    ++findings.found[found];
    if (found != experiment.old_generation && found != experiment.new_generation) findings.note(findings.lost, where + "generation " + std::to_string(found));
    if (experiment.returned && prefix == findings.steps && found != experiment.new_generation) findings.note(findings.lost, where + "the save had returned");
    // An attempt that is not committed is loaded by nobody, not even by its own name.
    dcp::MediumModel<dcp::Memory> model{disk};
    if (killed && disk.kind("run") == dcp::EntryKind::directory)
      for (auto const& sibling : dcp::detail::siblings_of(model, place))
        if (!sibling.record || !sibling.record->committed) {
          std::string loaded;
          try {
            if (load_generation<On>(1, disk, sibling.path, experiment.rows) != 0) loaded = "an open attempt was loaded";
          } catch (std::exception const&) {
            // Refused: by its record, or for want of files.
          }
          if (!loaded.empty()) findings.note(findings.lost, where + loaded);
        }
    bool const plain = policy.names == DropPolicy::Names::some || killed || (policy.names == DropPolicy::Names::drop && policy.files == DropPolicy::Files::zero_filled);
    if (!experiment.save_again || (!plain && !dcp::test::long_run()) || (dcp::test::under_a_sanitizer && prefix % 3 != 0 && prefix != findings.steps)) return;
    try {
      dcp::Memory first = disk.copy();
      try {
        save_generation<On>(2, first, 4, dcp::IfExists::fail, {}, experiment.rows);
        if (found != 0) findings.note(findings.wrong_after, where + "a checkpoint was overlooked by if_exists = fail");
        if (load_generation<On>(1, first, place, experiment.rows) != 4) findings.note(findings.wrong_after, where + "the next first save does not load");
      } catch (dcp::Error const& error) {
        if (error.code() != dcp::ErrorCode::already_exists || found == 0) throw;
        if (load_generation<On>(1, first, place, experiment.rows) != found || first.kind(place) != dcp::EntryKind::directory) findings.note(findings.wrong_after, where + "the refused save changed what is there");
      }
      save_generation<On>(2, disk, 5, dcp::IfExists::replace, {}, experiment.rows);
      if (load_generation<On>(1, disk, place, experiment.rows) != 5) findings.note(findings.wrong_after, where + "the next save does not load");
      if (disk.list("run").size() != 1) findings.note(findings.wrong_after, where + "the next save leaves " + std::to_string(disk.list("run").size()) + " entries");
    } catch (std::exception const& error) {
      findings.note(findings.wrong_after, where + "the next save: " + error.what());
    }
  });
  return findings;
}

/// Records a first save (old_generation 0) or a replacement, and stops it everywhere.
template <class M, template <class> class On = dcp::BasicSafeTensors>
Findings run(int ranks, Experiment experiment, typename On<M>::Options const& options = {}) {
  dcp::Memory start;
  start.create_directories("run");
  if (experiment.old_generation != 0) save_generation<On>(1, start, experiment.old_generation, dcp::IfExists::fail, {}, experiment.rows);
  M medium{start};
  save_generation<On>(ranks, medium, experiment.new_generation, dcp::IfExists::replace, options, experiment.rows);
  return crash_everywhere<On>(medium, experiment, 20260300);
}

void check_nothing_lost(Findings findings, Experiment const& experiment) {
  CHECK_MESSAGE(findings.lost == 0, findings.first);
  CHECK_MESSAGE(findings.wrong_after == 0, findings.first);
  CHECK(findings.crashes > 200);
  // Both outcomes occur, or nothing was tested.
  CHECK(findings.found[experiment.old_generation] > 0);
  CHECK(findings.found[experiment.new_generation] > 0);
}

}  // namespace

TEST_CASE("save: a first save that stops anywhere leaves nothing or the new checkpoint") {
  for (int const ranks : {1, 3}) {
    CAPTURE(ranks);
    Experiment const experiment{.rows = ranks == 3 ? 1100 : 20};
    check_nothing_lost(run<RecordingMedium>(ranks, experiment), experiment);
  }
}

TEST_CASE("save: a replacement that stops anywhere leaves the old checkpoint or the new one") {
  for (int const ranks : {1, 3}) {
    CAPTURE(ranks);
    Experiment const experiment{.old_generation = 1, .rows = ranks == 3 ? 1100 : 20};
    check_nothing_lost(run<RecordingMedium>(ranks, experiment), experiment);
  }
}

TEST_CASE("save: a checkpoint of PyTorch's format, first or a replacement, that stops anywhere leaves the old checkpoint or the new one") {
  for (int const ranks : {1, 3})
    for (std::uint64_t const old_generation : {0u, 1u}) {
      CAPTURE(ranks);
      CAPTURE(old_generation);
      Experiment const experiment{.old_generation = old_generation, .rows = 20};
      check_nothing_lost(run<RecordingMedium, dcp::BasicTorchDcp>(ranks, experiment), experiment);
    }
}

TEST_CASE("save: where directories cannot be exchanged, a replacement that stops anywhere still leaves the old checkpoint or the new one") {
  for (int const ranks : {1, 3}) {
    CAPTURE(ranks);
    Experiment const experiment{.old_generation = 1, .rows = ranks == 3 ? 1100 : 20};
    check_nothing_lost(run<RecordingWithoutExchange>(ranks, experiment), experiment);
  }
}

TEST_CASE("save: writes that a queue does late and in any order survive a stop anywhere") {
  for (int const ranks : {1, 3}) {
    CAPTURE(ranks);
    Experiment const experiment{.old_generation = 1, .rows = ranks == 3 ? 1100 : 20};
    check_nothing_lost(run<dcp::test::LateWrites<RecordingMedium>>(ranks, experiment, {.max_file_bytes = 300'000}), experiment);
  }
}

TEST_CASE("save: several files, in directories of their own, survive a stop anywhere") {
  dcp::SafeTensorsOptions options{.max_file_bytes = 300'000};
  options.groups = {{"layer", "layer"}};
  Experiment experiment{.old_generation = 1, .rows = 600};
  check_nothing_lost(run<RecordingMedium>(2, experiment, options), experiment);
  options = {.layout = dcp::FileLayout::sharded};
  experiment.rows = 20;
  check_nothing_lost(run<RecordingWithoutExchange>(3, experiment, options), experiment);
}

TEST_CASE("save: one that fails at any step, and is then cut off while it cleans up, leaves the old checkpoint or the new one") {
  using Faulty = dcp::test::FaultMedium<RecordingMedium>;
  using dcp::test::Call;
  std::size_t failures = 0;
  for (std::uint64_t const old_generation : {0u, 1u})
    for (auto const call : {Call::open_write, Call::write, Call::resize, Call::sync, Call::close, Call::rename_file, Call::sync_directory, Call::publish_new, Call::exchange_directories})
      for (bool const after : {false, true})
        for (std::uint64_t nth = 1;; ++nth) {
          dcp::Memory start;
          start.create_directories("run");
          Experiment const experiment{.old_generation = old_generation, .rows = 20, .save_again = false};
          if (old_generation != 0) save_generation(1, start, old_generation, dcp::IfExists::fail, {}, experiment.rows);
          RecordingMedium recorder{start};
          Faulty medium{recorder};
          medium.add({.call = call, .nth = nth, .system_error = EIO, .after = after});
          bool failed = false;
          try {
            save_generation(1, medium, experiment.new_generation, dcp::IfExists::replace, {}, experiment.rows);
          } catch (dcp::Error const& error) {
            failed = true;
            CHECK(error.system_error() == EIO);
          }
          if (medium.hits() == 0) break;
          failures += failed ? 1 : 0;
          auto findings = crash_everywhere(recorder, {.old_generation = old_generation, .new_generation = experiment.new_generation, .rows = experiment.rows, .save_again = false, .returned = !failed}, nth);
          CAPTURE(to_string(call));
          CAPTURE(nth);
          CHECK_MESSAGE(findings.lost == 0, findings.first);
        }
  CHECK(failures > 60);
}

TEST_CASE("save: a copy of a committed checkpoint is a checkpoint, wherever it lies") {
  dcp::Memory store;
  save_generation(3, store, 7, dcp::IfExists::fail);
  dcp::Memory elsewhere;
  elsewhere.create_directories("backup/of");
  std::function<void(std::string const&, std::string const&)> const copy = [&](std::string const& from, std::string const& to) {
    elsewhere.create_directories(to);
    for (auto const& entry : store.list(from)) {
      if (entry.kind == dcp::EntryKind::directory) copy(from + "/" + entry.name, to + "/" + entry.name);
      else {
        dcp::Bytes bytes(static_cast<std::size_t>(entry.size));
        store.open_read(from + "/" + entry.name)->read_at(0, bytes);
        elsewhere.open_write(to + "/" + entry.name)->write_at(0, bytes);
      }
    }
  };
  copy(place, "backup/of/it");
  CHECK(load_generation(2, elsewhere, "backup/of/it") == 7);
  store.remove_tree("run");
  CHECK(load_generation(1, store) == 0);
}

TEST_CASE("remove: one that stops anywhere leaves the checkpoint or none, never an older one") {
  dcp::Memory start;
  start.create_directories("run");
  save_generation(1, start, 1, dcp::IfExists::fail, {}, 20);
  // An old one that nobody has cleaned up yet lies beside it.
  RecordingWithoutExchange wreck{start};
  save_generation(1, wreck, 2, dcp::IfExists::replace, {}, 20);
  std::optional<dcp::Memory> both;
  for (std::size_t step = 0; step <= wreck.length() && !both; ++step) {
    dcp::Memory disk = wreck.replay(step, DropPolicy::process_kill());
    if (disk.list("run").size() == 2 && load_generation(1, disk, place, 20) == 2 && disk.kind(place) == dcp::EntryKind::directory) both = disk;
  }
  REQUIRE(both.has_value());
  RecordingMedium medium{*both};
  dcp::SelfComm self;
  dcp::remove<dcp::BasicSafeTensors<RecordingMedium>>(self, {medium, place});
  std::map<std::string, int> outcomes;
  medium.for_each_crash(dcp::test::crash_policies(3, 20), [&](dcp::Memory const& disk, std::size_t prefix, DropPolicy policy) {
    std::string outcome;
    try {
      auto const found = load_generation(1, disk, place, 20);
      outcome = found == 0 ? "nothing" : "generation " + std::to_string(found);
    } catch (dcp::Error const& error) {
      outcome = std::string{dcp::to_string(error.code())};   // half of it is gone
    }
    CAPTURE(prefix);
    CAPTURE(policy.text());
    CHECK(outcome != "generation 1");
    ++outcomes[outcome];
  });
  CHECK(outcomes["generation 2"] > 0);
  CHECK(outcomes["nothing"] > 0);
}

TEST_CASE("harness: a commit before the sync of files is noticed") {
  Experiment const experiment{.rows = 20, .save_again = false};
  CHECK(run<RecordingWithoutFileSync>(1, experiment).lost > 0);
  Experiment const replacing{.old_generation = 1, .rows = 20, .save_again = false};
  CHECK(run<RecordingWithoutFileSync>(3, replacing).lost > 0);
}

TEST_CASE("harness: a commit before the sync of directories is noticed") {
  Experiment const experiment{.rows = 20, .save_again = false};
  CHECK(run<RecordingWithoutDirectorySync>(1, experiment).lost > 0);
}

TEST_CASE("harness: a record that is written before the data is noticed, with a replacement and without") {
  Experiment const experiment{.rows = 20, .save_again = false};
  CHECK(run<RecordingWithLateData>(1, experiment).lost > 0);
  Experiment const replacing{.old_generation = 1, .rows = 20, .save_again = false};
  CHECK(run<RecordingWithLateData>(1, replacing).lost > 0);
}

TEST_CASE("harness: an old checkpoint that is removed before the new one is complete is noticed") {
  Experiment const replacing{.old_generation = 1, .rows = 20, .save_again = false};
  CHECK(run<RecordingThatMakesSpace>(1, replacing).lost > 0);
}

TEST_CASE("harness: a write that the medium forgets is noticed when the bytes are loaded") {
  for (int forgotten = 1; forgotten <= 3; ++forgotten) {
    struct Forgetful : dcp::Memory {
      std::shared_ptr<std::atomic<int>> left = std::make_shared<std::atomic<int>>(0);
      struct File final : dcp::WritableFile {
        std::unique_ptr<dcp::WritableFile> inner;
        std::shared_ptr<std::atomic<int>> left;
        File(std::unique_ptr<dcp::WritableFile> file, std::shared_ptr<std::atomic<int>> count) : inner{std::move(file)}, left{std::move(count)} {}
        void write_at(std::uint64_t offset, dcp::ConstByteSpan bytes) override {
          if (--*left != 0) inner->write_at(offset, bytes);
        }
        void resize(std::uint64_t size) override { inner->resize(size); }
        void sync() override { inner->sync(); }
        void close() override { inner->close(); }
      };
      std::unique_ptr<dcp::WritableFile> open_write(std::string const& path) {
        auto file = Memory::open_write(path);
        if (path.find(".safetensors") == std::string::npos) return file;
        return std::make_unique<File>(std::move(file), left);
      }
    };
    Forgetful medium;
    *medium.left = forgotten;
    save_generation(3, medium, 3, dcp::IfExists::fail);
    CAPTURE(forgotten);
    REQUIRE(*medium.left <= 0);
    for (int const ranks : {1, 2}) CHECK_THROWS_AS(load_generation(ranks, medium), dcp::Error);
  }
}
