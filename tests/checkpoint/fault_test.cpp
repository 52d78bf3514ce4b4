// SPDX-License-Identifier: Apache-2.0
// ctest: alone
// Storage that fails and ranks that fail, in every phase of a save and a load: all ranks return in time with one Error, and what was
// there before is still there.
#include <dcp/checkpoint/async_save.hpp>
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/local_fs.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>
#include <dcp/storage/torch_dcp.hpp>

#include "support/fault_medium.hpp"
#include "support/generations.hpp"
#include "support/late_writes.hpp"
#include "support/object_memory.hpp"
#include "support/proc_comm.hpp"
#include "support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <sys/mount.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace {

using dcp::test::Call;
using dcp::test::FaultMedium;
using dcp::test::FaultRule;
using dcp::test::GenerationState;
using Faulty = FaultMedium<dcp::Memory>;
using OnMemory = dcp::BasicSafeTensors<dcp::Memory>;
using OnFaulty = dcp::BasicSafeTensors<Faulty>;
using dcp::test::ObjectMemory;
using Clock = std::chrono::steady_clock;

constexpr auto place = "run/ckpt";
constexpr std::int64_t rows = 20;

struct QueuedMemory : dcp::test::LateWrites<dcp::Memory> {
  explicit QueuedMemory(dcp::Memory const& store) : LateWrites{store} {}
};

struct MemoryWithoutExchange : dcp::Memory {
  explicit MemoryWithoutExchange(dcp::Memory const& store) : Memory{store} {}
  bool exchange_directories(std::string const&, std::string const&) { return false; }
};

/// What each rank of a run threw, if it did.
using Outcomes = std::vector<std::optional<dcp::Error>>;

template <class F>
Outcomes outcomes_of(int ranks, F body) {
  Outcomes outcomes(static_cast<std::size_t>(ranks));
  dcp::run_threads(
      ranks,
      [&](dcp::ThreadComm& world) {
        try {
          body(world);
        } catch (dcp::Error const& error) {
          outcomes[static_cast<std::size_t>(world.rank())] = error;
        }
      },
      std::chrono::seconds{30});
  return outcomes;
}

/// Empty if all ranks succeeded or all threw the same.
std::string disagreement(Outcomes const& outcomes) {
  for (auto const& one : outcomes) {
    if (one.has_value() != outcomes[0].has_value()) return "one rank returned and another threw";
    if (!one) continue;
    if (std::string{one->what()} != outcomes[0]->what()) return std::string{one->what()} + "\nand\n" + outcomes[0]->what();
    if (one->code() != outcomes[0]->code() || one->rank() != outcomes[0]->rank() || one->phase() != outcomes[0]->phase() || one->path() != outcomes[0]->path() ||
        one->system_error() != outcomes[0]->system_error())
      return "fields differ";
  }
  return "";
}

template <template <class> class On = dcp::BasicSafeTensors, class Store>
void save_plain(Store const& store, std::uint64_t generation) {
  dcp::SelfComm self;
  GenerationState state{self, rows};
  state.fill(generation);
  dcp::save<On<Store>>(self, {store, place}, state, {.if_exists = dcp::IfExists::replace, .threads = 1});
}

/// 0 if nothing is there; throws for anything that is neither that nor a whole generation.
template <template <class> class On = dcp::BasicSafeTensors, class Store>
std::uint64_t found_in(Store const& store) {
  dcp::SelfComm self;
  GenerationState state{self, rows};
  state.scribble();
  try {
    dcp::load<On<Store>>(self, {store, place}, state);
  } catch (dcp::Error const& error) {
    if (error.code() == dcp::ErrorCode::not_found) return 0;
    throw;
  }
  return state.generation();
}

/// What the place and its surroundings hold besides the checkpoint.
template <class Store>
std::size_t leftovers(Store store) {
  if (Store::renames_directories) return store.list("run").size() - 1;
  return store.list(place).size() - 2;   // a record and its data
}

struct Tally {
  std::size_t errors = 0, successes = 0;
  std::set<std::string> phases;
};

enum class How { in_front, behind };
template <class S>
void save_as(How how, dcp::ThreadComm& world, dcp::place_of<S> const& where, dcp::StateDict const& state, dcp::SaveOptions<S> const& options) {
  if (how == How::in_front) dcp::save<S>(world, where, state, options);
  else dcp::async_save<S>(world, where, state, options).wait();
}

/// Fails every call of every kind on every rank in turn, while three ranks save.
template <class M, How how = How::in_front, class Store = dcp::Memory, template <class> class On = dcp::BasicSafeTensors>
Tally fail_every_call_of_a_save(std::uint64_t old_generation, std::vector<int> const& errors, bool after = false) {
  using Medium = FaultMedium<M>;
  Tally tally;
  for (int const system_error : errors)
    for (int victim = 0; victim < 3; ++victim)
      for (int call = 0; call <= static_cast<int>(Call::block_bytes); ++call)
        for (std::uint64_t nth = 1;; ++nth) {
          Store store;
          store.create_directories("run");
          if (old_generation != 0) save_plain<On>(store, old_generation);
          Medium faulty{M{store}};
          faulty.add({.call = static_cast<Call>(call), .nth = nth, .system_error = system_error, .after = after});
          auto const outcomes = outcomes_of(3, [&](dcp::ThreadComm& world) {
            GenerationState state{world, rows};
            state.fill(2);
            save_as<On<Medium>>(how, world, {world.rank() == victim ? faulty : Medium{M{store}}, place}, state,
                                                   {.if_exists = dcp::IfExists::replace, .threads = 1, .visible_within = std::chrono::milliseconds{50}, .staging_bytes = 16 << 20});
          });
          if (faulty.hits() == 0) break;
          CAPTURE(victim);
          CAPTURE(to_string(static_cast<Call>(call)));
          CAPTURE(nth);
          CAPTURE(system_error);
          CHECK(disagreement(outcomes) == "");
          auto const& error = outcomes[0];
          auto const found = found_in<On>(store);
          if (error) {
            ++tally.errors;
            tally.phases.insert(error->phase());
            std::string const what = error->what();
            CAPTURE(what);
            CHECK(error->rank() == victim);
            CHECK(error->phase().starts_with("save: "));
            CHECK(error->path() != "");
            CHECK(error->system_error() == system_error);
            // Behind the commit the new one may be the checkpoint already; before it, never.
            CHECK((found == old_generation || (found == 2 && error->phase() == "save: publish")));
          } else {
            ++tally.successes;
            CHECK(found == 2);
          }
          save_plain<On>(store, 3);
          CHECK(found_in<On>(store) == 3);
          CHECK(leftovers(store) == 0);
        }
  return tally;
}

}  // namespace

TEST_CASE("save: any storage call that fails on any rank is one Error on all, with rank, phase, path and errno, and the old checkpoint stays") {
  auto const tally = fail_every_call_of_a_save<dcp::Memory>(1, {EIO});
  CHECK(tally.errors > 40);
  for (std::string const phase : {"save: attempt", "save: write", "save: commit", "save: publish"}) CHECK_MESSAGE(tally.phases.contains(phase), phase);
}

TEST_CASE("save: a storage call that fails in a save of PyTorch's format is one Error on all ranks, and the old checkpoint stays") {
  auto const tally = fail_every_call_of_a_save<dcp::Memory, How::in_front, dcp::Memory, dcp::BasicTorchDcp>(1, {EIO});
  CHECK(tally.errors > 40);
  for (std::string const phase : {"save: attempt", "save: write", "save: commit", "save: publish"}) CHECK_MESSAGE(tally.phases.contains(phase), phase);
}

TEST_CASE("save: a full, read-only or vanished storage is one Error on all ranks, in a first save too") {
  CHECK(fail_every_call_of_a_save<dcp::Memory>(0, {ENOSPC, EROFS, ENOENT}).errors > 100);
}

TEST_CASE("save: any storage call that fails while a queue of writes is under way is one Error on all, and the old checkpoint stays") {
  auto const tally = fail_every_call_of_a_save<QueuedMemory>(1, {EIO});
  CHECK(tally.errors > 40);
  CHECK(tally.phases.contains("save: write"));
}

TEST_CASE("save: any storage call that fails where directories cannot be exchanged leaves the old checkpoint or the new one") {
  CHECK(fail_every_call_of_a_save<MemoryWithoutExchange>(1, {EIO}).errors > 50);
}

TEST_CASE("save: an attempt that fails is removed when the storage still allows it") {
  for (auto const call : {Call::open_write, Call::write, Call::sync, Call::acquire_lease, Call::rename_file}) {
    dcp::Memory store;
    store.create_directories("run");
    save_plain(store, 1);
    Faulty faulty{store};
    faulty.add({.call = call, .system_error = ENOSPC});
    auto const outcomes = outcomes_of(3, [&](dcp::ThreadComm& world) {
      GenerationState state{world, rows};
      state.fill(2);
      dcp::save<OnFaulty>(world, {faulty, place}, state, {.if_exists = dcp::IfExists::replace, .threads = 1});
    });
    CAPTURE(to_string(call));
    CHECK(outcomes[0].has_value());
    CHECK(store.list("run").size() == 1);
  }
}

TEST_CASE("save: a checkpoint beside a missing place whose record cannot be read now is not cleaned away") {
  dcp::Memory store;
  store.create_directories("run");
  save_plain(store, 1);
  store.publish_new(place, "run/ckpt.dcp-00000000000000aa");   // as a crash between two renames leaves it
  Faulty faulty{store};
  faulty.add({.call = Call::open_read, .path = "ckpt.dcp-00000000000000aa/dcp.json", .times = dcp::test::forever, .system_error = EIO});
  dcp::SelfComm self;
  GenerationState state{self, rows};
  state.fill(2);
  try {   // no older checkpoint and no "not found" in its stead
    dcp::load<OnFaulty>(self, {faulty, place}, state);
    FAIL("loaded what cannot be read");
  } catch (dcp::Error const& error) {
    CHECK(error.system_error() == EIO);
  }
  faulty.add({.call = Call::sync, .path = ".safetensors", .system_error = ENOSPC});
  CHECK_THROWS_AS(dcp::save<OnFaulty>(self, {faulty, place}, state), dcp::Error);
  CHECK(found_in(store) == 1);
}

TEST_CASE("load: any storage call that fails on any rank is one Error on all, and the same state loads afterwards") {
  dcp::Memory store;
  store.create_directories("run");
  save_plain(store, 1);
  Tally tally;
  for (int const system_error : {EIO, EACCES, ENOENT})
    for (int victim = 0; victim < 3; ++victim)
      for (auto const call : {Call::open_read, Call::read, Call::kind, Call::list})
        for (std::uint64_t nth = 1;; ++nth) {
          Faulty faulty{store};
          faulty.add({.call = call, .nth = nth, .system_error = system_error});
          std::array<std::string, 3> wrong;
          auto const outcomes = outcomes_of(3, [&](dcp::ThreadComm& world) {
            GenerationState state{world, rows};
            state.scribble();
            std::optional<dcp::Error> failure;
            try {
              dcp::load<OnFaulty>(world, {world.rank() == victim ? faulty : Faulty{store}, place}, state, {.threads = 1});
            } catch (dcp::Error const& error) {
              failure = error;
            }
            if (failure) dcp::load<OnMemory>(world, {store, place}, state);
            wrong[static_cast<std::size_t>(world.rank())] = state.difference(1);
            if (failure) throw *failure;
          });
          if (faulty.hits() == 0) break;
          CAPTURE(victim);
          CAPTURE(to_string(call));
          CAPTURE(nth);
          CAPTURE(system_error);
          CHECK(disagreement(outcomes) == "");
          for (auto const& difference : wrong) CHECK(difference == "");
          if (auto const& error = outcomes[0]) {
            ++tally.errors;
            tally.phases.insert(error->phase());
            std::string const what = error->what();
            CAPTURE(what);
            CHECK(error->rank() == victim);
            CHECK(error->phase().starts_with("load: "));
            CHECK(error->path() != "");
            // A record that is not there (any more) is a finding, and no refusal of the system.
            CHECK((error->system_error() == system_error || (system_error == ENOENT && error->system_error() == 0)));
          } else {
            ++tally.successes;
          }
        }
  CHECK(tally.errors > 40);
  for (std::string const phase : {"load: open", "load: headers", "load: read"}) CHECK_MESSAGE(tally.phases.contains(phase), phase);
}

TEST_CASE("save: a directory of one node taken for a shared one is found before any data, naming both ranks") {
  for (int const lonely : {1, 2}) {
    dcp::Memory store, other;
    auto const outcomes = outcomes_of(3, [&](dcp::ThreadComm& world) {
      GenerationState state{world, rows};
      state.fill(1);
      dcp::save<OnMemory>(world, {world.rank() == lonely ? other : store, place}, state, {.threads = 1, .visible_within = std::chrono::milliseconds{50}});
    });
    CHECK(disagreement(outcomes) == "");
    REQUIRE(outcomes[0].has_value());
    CHECK(outcomes[0]->code() == dcp::ErrorCode::not_shared);
    CHECK(outcomes[0]->rank() == lonely);
    CHECK(outcomes[0]->message().find("ranks 0 and " + std::to_string(lonely)) != std::string::npos);
    CHECK(store.list("run").empty());
    CHECK(other.kind("run") == dcp::EntryKind::missing);
  }
}

TEST_CASE("save and load: ranks that name different places are told so") {
  dcp::Memory store;
  auto const outcomes = outcomes_of(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, rows};
    state.fill(1);
    dcp::save<OnMemory>(world, {store, world.rank() == 0 ? "step-1" : "step-2"}, state);
  });
  CHECK(disagreement(outcomes).find("step-1") != std::string::npos);   // each says in its hint what it was given
  for (auto const& error : outcomes) {
    REQUIRE(error.has_value());
    CHECK(error->code() == dcp::ErrorCode::ranks_disagree);
  }
  CHECK(store.list("/").empty());
}

namespace {

struct Model {
  GenerationState& inner;
  int fails_on = -1, rank = 0;
  bool in_hook = false;
  int* hooks = nullptr;
  dcp::StateDict state() {
    if (!in_hook && rank == fails_on) throw std::runtime_error{"the model is not ready"};
    return inner.state();
  }
  void after_load() {
    if (hooks != nullptr) ++*hooks;
    if (in_hook && rank == fails_on) throw std::runtime_error{"the model does not like what it got"};
  }
};

}  // namespace

TEST_CASE("load: an after_load that throws on one rank is one Error on all, with its sentence") {
  dcp::Memory store;
  save_plain(store, 1);
  for (int const victim : {0, 2}) {
    auto const outcomes = outcomes_of(3, [&](dcp::ThreadComm& world) {
      GenerationState state{world, rows};
      Model model{state, victim, world.rank(), true};
      dcp::load<OnMemory>(world, {store, place}, model);
    });
    CHECK(disagreement(outcomes) == "");
    REQUIRE(outcomes[0].has_value());
    CHECK(outcomes[0]->rank() == victim);
    CHECK(outcomes[0]->phase() == "load: after_load");
    CHECK(outcomes[0]->message() == "the model does not like what it got");
  }
}

TEST_CASE("load: no after_load runs on any rank when the bytes of one rank are wrong") {
  dcp::Memory store;
  save_plain(store, 1);
  dcp::Bytes byte(1);
  store.open_read(std::string{place} + "/model-00001-of-00001.safetensors")->read_at(9000, byte);
  byte[0] ^= std::byte{4};
  store.open_write(std::string{place} + "/model-00001-of-00001.safetensors")->write_at(9000, byte);
  std::array<int, 3> hooks{};
  auto const outcomes = outcomes_of(3, [&](dcp::ThreadComm& world) {
    GenerationState state{world, rows};
    Model model{state, -1, world.rank(), false, &hooks[static_cast<std::size_t>(world.rank())]};
    dcp::load<OnMemory>(world, {store, place}, model);
  });
  CHECK(disagreement(outcomes) == "");
  REQUIRE(outcomes[0].has_value());
  CHECK(outcomes[0]->code() == dcp::ErrorCode::corrupt);
  CHECK(hooks == std::array<int, 3>{});
}

TEST_CASE("save: a state() that throws on one rank ends the others with that rank's sentence") {
  for (int const victim : {0, 1}) {
    std::array<std::string, 3> what;
    CHECK_THROWS_WITH(dcp::run_threads(3,
                                       [&](dcp::ThreadComm& world) {
                                         GenerationState state{world, rows};
                                         Model model{state, victim, world.rank()};
                                         try {
                                           dcp::save<OnMemory>(world, {dcp::Memory{}, place}, model);
                                         } catch (dcp::Error const& error) {
                                           what[static_cast<std::size_t>(world.rank())] = error.what();
                                           throw;
                                         }
                                       }),
                      "the model is not ready");
    for (int rank = 0; rank < 3; ++rank) {
      if (rank == victim) continue;
      CHECK(what[static_cast<std::size_t>(rank)].find("rank " + std::to_string(victim) + " left with an exception: the model is not ready") != std::string::npos);
      CHECK(what[static_cast<std::size_t>(rank)].find("save: agree") != std::string::npos);
    }
  }
}

// --- ranks that end or stand still, as processes

namespace {

constexpr std::int64_t many_rows = 300;   // enough for every rank to write some of them itself

enum class End { throws, exits, killed, stopped };
constexpr std::array end_names{"throws", "exits", "is killed", "is stopped"};

struct Moment {
  std::string phase;   // that the others report
  int victim;
  FaultRule rule;      // when: the victim's call
};

void end_here(End end) {
  switch (end) {
    case End::throws: throw std::runtime_error{"thrown in the middle of it"};
    case End::exits: ::_exit(7);
    case End::killed: ::raise(SIGKILL); break;
    case End::stopped: ::raise(SIGSTOP); break;
  }
}

std::uint64_t found_in_fresh_processes(std::string const& path, int ranks) {
  std::uint64_t found = 0;
  for (std::uint64_t const candidate : {1u, 2u}) {
    auto const ends = dcp::test::run_processes(ranks, [&](dcp::test::ProcComm& comm) {
      GenerationState state{comm, many_rows};
      state.scribble();
      dcp::load<dcp::SafeTensors>(comm, path, state);
      if (state.generation() != candidate) throw dcp::Error{dcp::ErrorCode::unknown, "another generation"};
    });
    bool all = true;
    for (auto const& end : ends) all = all && end.exit_code == 0;
    if (all) found = candidate;
  }
  return found;
}

}  // namespace

TEST_CASE("save and load: a rank that throws, exits, is killed or is stopped in any phase ends all others in time, with its number and the phase") {
  using FaultyFs = FaultMedium<dcp::LocalFs>;
  constexpr auto deadline = std::chrono::milliseconds{1200};
  std::vector<Moment> const moments{
      {"save: attempt", 0, {.call = Call::resolve_place}},
      {"save: attempt", 0, {.call = Call::create_directory}},
      {"save: attempt", 1, {.call = Call::open_read}},
      {"save: write", 2, {.call = Call::write, .path = ".safetensors"}},   // of what other ranks sent
      {"save: write", 1, {.call = Call::sync, .path = ".safetensors"}},
      {"save: write", 0, {.call = Call::close, .path = ".safetensors"}},
      {"save: commit", 0, {.call = Call::write, .path = "dcp.crc"}},
      {"save: commit", 0, {.call = Call::rename_file, .nth = 2}},
      {"save: publish", 0, {.call = Call::exchange_directories}},
      {"save: publish", 0, {.call = Call::remove_file, .path = "dcp.lease"}},
      {"load: open", 0, {.call = Call::read, .path = "dcp.json", .nth = 2}},
      {"load: headers", 1, {.call = Call::read}},
      {"load: read", 2, {.call = Call::read, .path = ".safetensors", .nth = 5}},
  };
  for (auto const end : {End::throws, End::exits, End::killed, End::stopped})
    for (auto const& moment : moments) {
      bool const loads = moment.phase.starts_with("load");
      dcp::test::TemporaryDirectory directory;
      std::string const path = directory / "ckpt";
      {
        dcp::SelfComm self;
        GenerationState state{self, many_rows};
        state.fill(1);
        dcp::save<dcp::SafeTensors>(self, path, state, {.threads = 1, .storage = {.max_file_bytes = 100'000}});   // several files, so that all ranks have headers to read
      }
      auto const before = Clock::now();
      auto const ends = dcp::test::run_processes(
          3,
          [&](dcp::test::ProcComm& comm) {
            FaultyFs medium{dcp::LocalFs{}};
            GenerationState state{comm, many_rows};
            state.fill(2);
            if (comm.rank() == moment.victim) {
              auto rule = moment.rule;
              rule.hook = [end](Call, std::string const&) { end_here(end); };
              medium.add(rule);
            }
            if (loads) dcp::load<dcp::BasicSafeTensors<FaultyFs>>(comm, {medium, path}, state, {.threads = 1});
            else dcp::save<dcp::BasicSafeTensors<FaultyFs>>(comm, {medium, path}, state, {.if_exists = dcp::IfExists::replace, .threads = 1, .visible_within = deadline});
          },
          {.deadline = deadline, .watchdog = std::chrono::seconds{60}});
      std::string const what = "rank " + std::to_string(moment.victim) + " " + end_names[static_cast<std::size_t>(end)] + " in " + moment.phase + " at " + to_string(*moment.rule.call);
      CAPTURE(what);
      CHECK(Clock::now() - before < 3 * deadline + std::chrono::seconds{8});   // the machine may be busy
      for (int rank = 0; rank < 3; ++rank) {
        auto const& one = ends[static_cast<std::size_t>(rank)];
        CAPTURE(rank);
        CAPTURE(one.text());
        if (rank == moment.victim && end != End::throws) {
          CHECK(one.exit_code == (end == End::exits ? 7 : -1));
          CHECK(one.was_stopped == (end == End::stopped));
          continue;
        }
        REQUIRE(one.error.has_value());
        CHECK(one.error->rank() == moment.victim);
        // Writes begin while ranks still exchange: which of the two is interrupted is a matter of time.
        bool const overlaps = moment.phase == "save: write" && moment.rule.call == Call::write && one.error->phase() == "save: exchange";
        if (!overlaps) CHECK(one.error->phase() == moment.phase);
        CHECK(one.error->code() == (end == End::throws ? dcp::ErrorCode::unknown : end == End::stopped ? dcp::ErrorCode::timeout : dcp::ErrorCode::rank_failed));
        if (end == End::throws) CHECK(one.error->message() == "thrown in the middle of it");
      }
      auto const found = found_in_fresh_processes(path, 2);
      if (loads || moment.phase != "save: publish") CHECK(found == 1);
      else CHECK(found > 0);
    }
}

// --- a reader beside a writer

namespace {

template <class M>
void read_while_replacing(typename dcp::BasicSafeTensors<M>::Place const& where, int replacements) {
  using On = dcp::BasicSafeTensors<M>;
  auto const save = [&](std::uint64_t generation) {
    dcp::SelfComm self;
    GenerationState state{self, rows};
    state.fill(generation);
    dcp::save<On>(self, where, state, {.if_exists = dcp::IfExists::replace, .threads = 1, .storage = {.max_file_bytes = 16'000}});
  };
  save(1);
  std::atomic<std::uint64_t> newest{1};
  std::atomic<bool> done{false};
  std::string writer_problem;
  std::thread writer{[&] {
    try {
      for (int i = 0; i < replacements; ++i) {
        save(newest + 1);
        ++newest;
        std::this_thread::sleep_for(std::chrono::milliseconds{i % 3});
      }
    } catch (std::exception const& error) {
      writer_problem = error.what();
    }
    done = true;
  }};
  std::string problem;
  std::set<std::uint64_t> seen;
  std::mutex mutex;
  std::uint64_t loads = 0, last = 0;
  while (!done && problem.empty()) {
    std::uint64_t const at_least = newest;
    try {
      if (++loads % 4 == 0) {
        dcp::SelfComm self;
        auto const all = dcp::load_from_keys<On>(self, where);
        GenerationState expected{self, rows};
        std::uint64_t step = 0;
        std::memcpy(&step, all.values().at("step").payload.data(), sizeof step);
        expected.fill(step);
        auto const state = expected.state();
        for (auto const& entry : state.entries())
          if (entry.tensor && std::memcmp(entry.tensor->memory.data, all.tensors().at(entry.name).bytes().data(), all.tensors().at(entry.name).bytes().size()) != 0)
            problem = entry.name + " is not of the generation of step";
        last = step;
      } else {
        dcp::run_threads(3, [&](dcp::ThreadComm& world) {
          GenerationState state{world, rows};
          state.scribble();
          dcp::load<On>(world, where, state, {.threads = 1});
          std::lock_guard const lock{mutex};
          last = state.generation();
        });
      }
      if (last < at_least) problem = "generation " + std::to_string(last) + ", when " + std::to_string(at_least) + " had been saved";
      seen.insert(last);
    } catch (std::exception const& error) {
      problem = error.what();
    }
  }
  writer.join();
  CHECK(writer_problem == "");
  CHECK(problem == "");
  CHECK(seen.size() > 3);
}

}  // namespace

TEST_CASE("load: beside a writer that replaces the checkpoint again and again, each load is one generation, and none older than the last saved") {
  dcp::test::TemporaryDirectory directory;
  SUBCASE("in memory") { read_while_replacing<dcp::Memory>({dcp::Memory{}, place}, 50); }
  SUBCASE("without exchange") { read_while_replacing<MemoryWithoutExchange>({MemoryWithoutExchange{dcp::Memory{}}, place}, 50); }
  SUBCASE("on the file system") { read_while_replacing<dcp::LocalFs>(directory / "ckpt", 50); }
}

// --- a file system that is really full

namespace {

/// A tmpfs of its own; nothing if this process may not mount.
class SmallFileSystem {
 public:
  explicit SmallFileSystem(std::string const& size) : mounted_{::mount("none", directory_.path().c_str(), "tmpfs", 0, ("size=" + size).c_str()) == 0} {}
  SmallFileSystem(SmallFileSystem const&) = delete;
  ~SmallFileSystem() {
    if (mounted_) ::umount2(directory_.path().c_str(), MNT_DETACH);
  }
  bool mounted() const { return mounted_; }
  std::string const& path() const { return directory_.path(); }
  bool make_read_only(bool read_only) const { return ::mount("none", path().c_str(), "tmpfs", MS_REMOUNT | (read_only ? static_cast<unsigned long>(MS_RDONLY) : 0), nullptr) == 0; }

 private:
  dcp::test::TemporaryDirectory directory_;
  bool mounted_;
};

bool can_mount() {
  static bool const possible = [] {
    bool const mounted = SmallFileSystem{"1m"}.mounted();
    if (!mounted) std::fprintf(stderr, "not run: a file system that is really full or read-only (this user cannot mount a tmpfs)\n");
    return mounted;
  }();
  return possible;
}

}  // namespace

TEST_CASE("save: on a file system that is really full or read-only, all ranks say so and the old checkpoint stays" * doctest::skip(!can_mount())) {
  SmallFileSystem const disk{"7m"};
  REQUIRE(disk.mounted());
  std::string const path = disk.path() + "/ckpt";
  auto const save = [&](std::uint64_t generation, std::int64_t how_many_rows) {
    return outcomes_of(3, [&](dcp::ThreadComm& world) {
      GenerationState state{world, how_many_rows};
      state.fill(generation);
      dcp::save<dcp::SafeTensors>(world, path, state, {.if_exists = dcp::IfExists::replace});
    });
  };
  auto const found = [&] {
    dcp::SelfComm self;
    GenerationState state{self, 4000};
    dcp::load<dcp::SafeTensors>(self, path, state);
    return state.generation();
  };
  CHECK(!save(1, 4000)[0].has_value());   // 4 MiB
  auto const full = save(2, 4000);        // and again 4
  CHECK(disagreement(full) == "");
  REQUIRE(full[0].has_value());
  CHECK(full[0]->code() == dcp::ErrorCode::io);
  CHECK(full[0]->system_error() == ENOSPC);
  CHECK(full[0]->phase() == "save: write");
  CHECK(full[0]->path().find(".safetensors") != std::string::npos);
  CHECK(found() == 1);
  CHECK(dcp::LocalFs{}.list(disk.path()).size() == 1);
  REQUIRE(disk.make_read_only(true));
  auto const refused = save(3, 20);
  CHECK(disagreement(refused) == "");
  REQUIRE(refused[0].has_value());
  CHECK(refused[0]->system_error() == EROFS);
  CHECK(found() == 1);
  REQUIRE(disk.make_read_only(false));
  CHECK(!save(4, 2000)[0].has_value());
}

TEST_CASE("save: any call of an object store that fails on any rank is one Error on all, and the old checkpoint stays, or none is there") {
  auto const tally = fail_every_call_of_a_save<ObjectMemory, How::in_front, ObjectMemory>(1, {EIO});
  CHECK(tally.errors > 20);
  for (std::string const phase : {"save: attempt", "save: write", "save: commit", "save: publish"}) CHECK_MESSAGE(tally.phases.contains(phase), phase);
  CHECK(fail_every_call_of_a_save<ObjectMemory, How::in_front, ObjectMemory>(0, {EACCES}).errors > 20);
}

TEST_CASE("save: an answer of an object store that is lost on any rank is one Error on all, or none: what was put is there all the same") {
  auto const tally = fail_every_call_of_a_save<ObjectMemory, How::in_front, ObjectMemory>(1, {EIO}, true);
  CHECK(tally.errors > 20);
  CHECK(tally.successes > 0);
}

// Last: they leave threads behind, and the thread sanitizer lets no child of a fork make threads then.
TEST_CASE("async_save: any storage call that fails on any rank is one Error on all, with rank, phase, path and errno, and the old checkpoint stays") {
  auto const tally = fail_every_call_of_a_save<dcp::Memory, How::behind>(1, {EIO});
  CHECK(tally.errors > 40);
  for (std::string const phase : {"save: attempt", "save: write", "save: sync", "save: meet", "save: commit", "save: publish"}) CHECK_MESSAGE(tally.phases.contains(phase), phase);
}

TEST_CASE("async_save: a full, read-only or vanished storage is one Error on all ranks, in a first save too") {
  CHECK(fail_every_call_of_a_save<dcp::Memory, How::behind>(0, {ENOSPC, EROFS, ENOENT}).errors > 100);
}

TEST_CASE("async_save: any call of an object store that fails on any rank is one Error on all, and the old checkpoint stays, or none is there") {
  auto const tally = fail_every_call_of_a_save<ObjectMemory, How::behind, ObjectMemory>(1, {EIO});
  CHECK(tally.errors > 20);
  for (std::string const phase : {"save: attempt", "save: sync", "save: meet", "save: commit", "save: publish"}) CHECK_MESSAGE(tally.phases.contains(phase), phase);
  CHECK(fail_every_call_of_a_save<ObjectMemory, How::behind, ObjectMemory>(0, {EACCES}).errors > 20);
}

TEST_CASE("async_save: an answer of an object store that is lost on any rank is one Error on all, or none: what was put is there all the same") {
  auto const tally = fail_every_call_of_a_save<ObjectMemory, How::behind, ObjectMemory>(1, {EIO}, true);
  CHECK(tally.errors > 20);
  CHECK(tally.successes > 0);
}
