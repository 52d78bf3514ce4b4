// SPDX-License-Identifier: Apache-2.0
#include <dcp/checkpoint/async_save.hpp>
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/manager.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/gguf.hpp>
#include <dcp/storage/quantized.hpp>
#include <dcp/storage/safetensors.hpp>

#include "support/campaign.hpp"
#include "support/generate.hpp"
#include "support/generations.hpp"
#include "support/outcome.hpp"
#include "support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

namespace {

using namespace std::chrono_literals;
using dcp::test::files_in;
using dcp::test::error_of;
using dcp::test::GenerationState;
using Options = dcp::SaveOptions<dcp::SafeTensors>;

Options by_process() { return {.executor = dcp::Executor::process, .saver_program = DCP_SAVER_PROGRAM}; }

bool is_there(pid_t pid) { return ::kill(pid, 0) == 0; }

// Runs body in a process of its own, which is started anew (this program with the arguments of a test case): no fork of threads.
struct Trainer {
  pid_t pid = 0;
  int said = -1;   // what it writes to descriptor 3

  Trainer(std::string const& role, std::string const& directory) {
    std::array<int, 2> ends{};
    REQUIRE(::pipe(ends.data()) == 0);
    pid = ::fork();
    if (pid == 0) {
      ::dup2(ends[1], 3);
      ::setenv("DCP_TEST_ROLE", role.c_str(), 1);
      ::setenv("DCP_TEST_DIRECTORY", directory.c_str(), 1);
      ::execl("/proc/self/exe", "trainer", "--no-skip", "--test-case=the trainer of the tests of dcp-saver", static_cast<char*>(nullptr));
      ::_exit(127);
    }
    ::close(ends[1]);
    said = ends[0];
  }
  Trainer(Trainer const&) = delete;
  ~Trainer() {
    ::close(said);
    end();
  }
  // The next byte that it says; 0 when it is gone.
  char hear() const {
    char byte = 0;
    while (::read(said, &byte, 1) < 0 && errno == EINTR) {}
    return byte;
  }
  void end() {
    if (pid == 0) return;
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
    pid = 0;
  }
};
void say(char byte) { [[maybe_unused]] auto const written = ::write(3, &byte, 1); }

}  // namespace

// Started by the tests below, and killed by them.
TEST_CASE("the trainer of the tests of dcp-saver" * doctest::skip()) {
  char const* const role = std::getenv("DCP_TEST_ROLE");
  char const* const directory = std::getenv("DCP_TEST_DIRECTORY");
  REQUIRE((role != nullptr && directory != nullptr));
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 60'000};   // 61 MB
    dcp::CheckpointManager<dcp::SafeTensors> manager{world, directory, {.keep_last = 2, .save = by_process()}};
    if (std::string{role} == "hand over and wait to be killed") {
      state.fill(7);
      dcp::Pending const pending = manager.async_save(7, state);
      world.barrier();
      while (std::ranges::none_of(std::filesystem::directory_iterator{directory}, [](auto const& entry) { return entry.path().filename().string().starts_with("step-"); })) std::this_thread::sleep_for(1ms);
      if (world.rank() == 0) say('h');
      for (;;) ::pause();
    }
    // Save after save, until it is killed.
    for (std::int64_t step = manager.latest().value_or(0) + 1;; ++step) {
      state.fill(static_cast<std::uint64_t>(step));
      dcp::Pending const pending = manager.async_save(step, state);
      if (world.rank() == 0) say('s');
    }
  });
}

TEST_CASE("Executor::process: another process writes, byte by byte what threads write, and its number is in the report") {
  for (int const ranks : {1, 2, 3}) {
    CAPTURE(ranks);
    dcp::test::TemporaryDirectory directory;
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      GenerationState state{world, 700};
      state.fill(3);
      Options options = by_process();
      options.storage.max_file_bytes = 200'000;
      options.storage.groups = {{"layer", "layer"}};
      auto const report = dcp::async_save<dcp::SafeTensors>(world, directory / "process", state, options).wait();
      CHECK(report.saver_processes.size() == static_cast<std::size_t>(ranks));
      for (auto const pid : report.saver_processes) CHECK((pid > 1 && pid != ::getpid() && is_there(static_cast<pid_t>(pid))));
      CHECK(std::ranges::any_of(report.phases, [](dcp::Phase const& phase) { return phase.name == "write" && phase.bytes() > 700 * 256 * 4; }));
      options.executor = dcp::Executor::thread;
      CHECK(dcp::async_save<dcp::SafeTensors>(world, directory / "thread", state, options).wait().saver_processes.empty());
      state.scribble();
      dcp::load<dcp::SafeTensors>(world, directory / "process", state);
      CHECK(state.generation() == 3);
    });
    auto by_process = files_in(directory / "process"), by_thread = files_in(directory / "thread");
    auto const rest_of = [](std::string const& record) { return record.substr(record.find("\"sequence\"")); };
    CHECK(rest_of(by_process.at("dcp.json")) == rest_of(by_thread.at("dcp.json")));
    by_process.erase("dcp.json"), by_thread.erase("dcp.json");
    CHECK(by_process == by_thread);
  }
}

TEST_CASE("Executor::process: what is quantized on the way is byte by byte what save writes") {
  dcp::test::TemporaryDirectory directory;
  auto const each = [&]<class S>(std::type_identity<S>, std::string const& name, dcp::SaveOptions<S> options) {
    CAPTURE(name);
    dcp::run_threads(2, [&](dcp::ThreadComm& world) {
      dcp::DeviceMesh<1> const mesh{world, {2}};
      using Columns = dcp::Placement<dcp::Shard<1>>;
      std::vector<float> memory(dcp::local_box<Columns>(mesh, {96, 160}).size());
      for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<float>(i % 97) - 40.0f * static_cast<float>(world.rank());
      dcp::ShardedTensor<float, Columns> const tensor{mesh, {96, 160}, memory};
      std::int64_t step = 7;
      dcp::StateDict const state{{"layer.weight", tensor}, {"step", step}};
      dcp::save<S>(world, directory / name, state, options);
      dcp::SaveOptions<S> by_process = options;
      by_process.executor = dcp::Executor::process, by_process.saver_program = DCP_SAVER_PROGRAM;
      CHECK(dcp::async_save<S>(world, directory / (name + "-process"), state, by_process).wait().saver_processes.size() == 2);
    });
    auto by_process = files_in(directory / (name + "-process")), by_thread = files_in(directory / name);
    by_process.erase("dcp.json"), by_thread.erase("dcp.json");
    CHECK(by_process == by_thread);
  };
  each(std::type_identity<dcp::Quantized<dcp::Fp8Block<>, dcp::SafeTensors>>{}, "fp8", {});
  each(std::type_identity<dcp::Quantized<dcp::Mxfp4, dcp::SafeTensors>>{}, "mxfp4", {});
  each(std::type_identity<dcp::Gguf>{}, "gguf", {.storage = {.quantize_to = "Q4_0"}});
}

TEST_CASE("Executor::process: one process serves save after save, with a state larger than the memory that both share") {
  dcp::test::TemporaryDirectory directory;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 60'000};
    dcp::CheckpointManager<dcp::SafeTensors, dcp::BasicDeferredStager<true>> manager{world, directory.path(), {.keep_last = 2, .staging_bytes = dcp::least_memory_bytes, .save = by_process()}};
    std::vector<std::int64_t> processes;
    for (std::int64_t step = 1; step <= 4; ++step) {
      state.fill(static_cast<std::uint64_t>(step));
      dcp::Pending pending = manager.async_save(step, state);
      pending.wait_staged();
      state.scribble();
      auto const report = pending.wait();
      CHECK(report.streamed);
      CHECK(report.deferred);
      CHECK(report.pool_reused == (step > 1));
      if (step > 1) CHECK(report.saver_processes == processes);
      processes = report.saver_processes;
    }
    CHECK(manager.steps() == std::vector<std::int64_t>{3, 4});
    manager.load(4, state);
    CHECK(state.generation() == 4);
  });
}

TEST_CASE("Executor::process: events are told in the program that saves") {
  dcp::test::TemporaryDirectory directory;
  std::mutex mutex;
  std::vector<dcp::SaveEvent::Kind> kinds;
  dcp::SelfComm self;
  GenerationState state{self, 20};
  dcp::ManagerOptions<dcp::SafeTensors> options{.keep_last = 1, .save = by_process()};
  options.events = [&](dcp::SaveEvent const& event) {
    std::lock_guard const lock{mutex};
    kinds.push_back(event.kind);
  };
  dcp::CheckpointManager<dcp::SafeTensors> manager{self, directory.path(), options};
  manager.save(1, state);
  manager.save(2, state);
  using Kind = dcp::SaveEvent::Kind;
  std::lock_guard const lock{mutex};
  CHECK(kinds == std::vector<Kind>{Kind::staged, Kind::written, Kind::committed, Kind::staged, Kind::written, Kind::retired, Kind::committed});
}

TEST_CASE("Executor::process: what it cannot do is refused before anything is written, on all ranks, and the sentence says what to do") {
  dcp::test::TemporaryDirectory directory;
  dcp::Memory const store;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 20};
    using OnMemory = dcp::BasicSafeTensors<dcp::Memory>;
    auto const elsewhere = error_of([&] { static_cast<void>(dcp::async_save<OnMemory>(world, {store, "ckpt"}, state, {.executor = dcp::Executor::process, .saver_program = DCP_SAVER_PROGRAM})); });
    REQUIRE(elsewhere);
    CHECK(elsewhere->code() == dcp::ErrorCode::unsupported);
    CHECK(elsewhere->message().find("local files only") != std::string::npos);
    for (std::string const program : {"/nowhere/dcp-saver", "/bin/true", "/bin/cat"}) {
      CAPTURE(program);
      auto const error = error_of([&] { static_cast<void>(dcp::async_save<dcp::SafeTensors>(world, directory / "ckpt", state, {.executor = dcp::Executor::process, .saver_program = program})); });
      REQUIRE(error);
      CHECK(error->code() == dcp::ErrorCode::unsupported);
    }
  });
  CHECK(dcp::Memory{store}.list("").empty());
  CHECK(std::filesystem::is_empty(directory.path()));
}

TEST_CASE("Executor::process: ranks that want different executors are told so, and nothing is written") {
  dcp::test::TemporaryDirectory directory;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 20};
    auto const error = error_of([&] { static_cast<void>(dcp::async_save<dcp::SafeTensors>(world, directory / "ckpt", state, world.rank() == 0 ? by_process() : Options{})); });
    REQUIRE(error);
    CHECK(error->code() == dcp::ErrorCode::ranks_disagree);
    CHECK(dcp::async_save<dcp::SafeTensors>(world, directory / "same", state, by_process()).wait().saver_processes.size() == 2);
  });
  CHECK(std::distance(std::filesystem::directory_iterator{directory.path()}, {}) == 1);
}

TEST_CASE("Executor::process: a saver that stands still is an error after the deadline, on all ranks, and the next save works") {
  dcp::test::TemporaryDirectory directory;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 20'000};
    auto options = by_process();
    options.deadline = 3s;
    dcp::CheckpointManager<dcp::SafeTensors> manager{world, directory.path(), {.save = options}};
    state.fill(1);
    auto const mine = static_cast<pid_t>(manager.save(1, state).saver_processes.at(static_cast<std::size_t>(world.rank())));
    world.barrier();
    if (world.rank() == 1) ::kill(mine, SIGSTOP);
    world.barrier();
    state.fill(2);
    auto const error = error_of([&] { manager.async_save(2, state).wait(); });
    REQUIRE(error);
    CHECK(error->code() == dcp::ErrorCode::timeout);
    std::this_thread::sleep_for(300ms);   // until the saver of rank 0 has heard that the save has failed
    world.barrier();
    if (world.rank() == 1) ::kill(mine, SIGCONT);   // it finds out that nobody wants what it was given any more
    state.fill(3);
    manager.save(3, state);
    CHECK(!std::ranges::count(manager.steps(), 2));
    state.scribble();
    manager.load(*manager.latest(), state);
    CHECK(state.generation() == 3);
  });
}

TEST_CASE("Executor::process: errors of the storage come back with rank and file, and the next save works") {
  dcp::test::TemporaryDirectory directory;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 700};
    state.fill(1);
    dcp::CheckpointManager<dcp::SafeTensors> manager{world, directory.path(), {.save = by_process()}};
    manager.save(1, state);
    auto const error = error_of([&] { manager.save(1, state); });   // found out by the other process
    REQUIRE(error);
    CHECK(error->code() == dcp::ErrorCode::already_exists);
    manager.save(2, state);
    CHECK(manager.steps() == std::vector<std::int64_t>{1, 2});
  });
  CHECK(std::distance(std::filesystem::directory_iterator{directory.path()}, {}) <= 4);   // two checkpoints, latest, and the lease
}

TEST_CASE("Executor::process: a save that is cancelled leaves nothing") {
  dcp::test::TemporaryDirectory directory;
  int cancelled = 0;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, 20'000};
    for (int round = 0; round < 5; ++round) {
      dcp::Pending pending = dcp::async_save<dcp::SafeTensors>(world, directory / ("ckpt" + std::to_string(round)), state, by_process());
      if (world.rank() == round % 2) pending.cancel();
      auto const error = error_of([&] { pending.wait(); });
      if (error) CHECK(error->code() == dcp::ErrorCode::cancelled);
      if (error && world.rank() == 0) ++cancelled;
    }
  });
  CHECK(std::distance(std::filesystem::directory_iterator{directory.path()}, {}) == 5 - cancelled);
}

TEST_CASE("Executor::process: when the saver is killed, wait() says so, the checkpoint before stays, and the next save has a new one") {
  dcp::test::TemporaryDirectory directory;
  int killed = 0;
  dcp::SelfComm self;
  GenerationState state{self, 100'000};
  dcp::CheckpointManager<dcp::SafeTensors> manager{self, directory.path(), {.keep_last = 2, .save = by_process()}};
  state.fill(1);
  auto saver = static_cast<pid_t>(manager.save(1, state).saver_processes.at(0));
  std::uint64_t saved = 1;
  for (std::uint64_t step = 2; step < 8; ++step) {
    state.fill(step);
    dcp::Pending pending = manager.async_save(static_cast<std::int64_t>(step), state);
    ::kill(saver, SIGKILL);
    auto const error = error_of([&] { saver = static_cast<pid_t>(pending.wait().saver_processes.at(0)); });
    if (error) {
      ++killed;
      CHECK(error->code() == dcp::ErrorCode::rank_failed);
      CHECK(error->message().find("signal 9") != std::string::npos);
      state.fill(100 + step);
      saver = static_cast<pid_t>(manager.save(static_cast<std::int64_t>(100 + step), state).saver_processes.at(0));
      saved = 100 + step;
    } else {
      saved = step;
    }
    state.scribble();
    manager.load(*manager.latest(), state);
    CHECK(state.generation() == saved);
  }
  CHECK(killed > 0);
}

TEST_CASE("Executor::process: a save that was handed over is committed although the trainer is killed, and a manager that comes then waits for it") {
  for (int round = 0; round < dcp::test::rounds(3, 50); ++round) {
    dcp::test::TemporaryDirectory directory;
    {
      Trainer trainer{"hand over and wait to be killed", directory.path()};
      REQUIRE(trainer.hear() == 'h');
      trainer.end();
    }
    dcp::run_threads(3, [&](dcp::ThreadComm& world) {
      GenerationState state{world, 60'000};
      dcp::CheckpointManager<dcp::SafeTensors> manager{world, directory.path(), {.save = by_process()}};
      REQUIRE(manager.latest() == 7);
      manager.load(7, state);
      CHECK(state.generation() == 7);
    });
  }
}

TEST_CASE("Executor::process: whenever the trainer is killed, the newest checkpoint is whole, and saves go on from it") {
  auto const seed = dcp::test::first_seed();
  dcp::test::Random random{seed};
  CAPTURE(seed);
  dcp::test::TemporaryDirectory directory;
  std::int64_t before = 0;
  int const kills = dcp::test::rounds(8, 200);
  for (int kill = 0; kill < kills; ++kill) {
    CAPTURE(kill);
    {
      Trainer trainer{"save until killed", directory.path()};
      for (auto saves = random.between(1, 4); saves > 0; --saves) REQUIRE(trainer.hear() == 's');
      std::this_thread::sleep_for(std::chrono::milliseconds{random.between(0, 60)});
      trainer.end();
    }
    dcp::SelfComm self;
    GenerationState state{self, 60'000};
    dcp::CheckpointManager<dcp::SafeTensors> manager{self, directory.path(), {.keep_last = 2, .save = by_process()}};
    auto const latest = manager.latest();
    if (!latest) continue;
    CHECK(*latest >= before);
    before = *latest;
    manager.load(*latest, state);
    REQUIRE(state.generation() == static_cast<std::uint64_t>(*latest));
  }
  CHECK(before > 0);
}
