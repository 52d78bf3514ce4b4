// SPDX-License-Identifier: Apache-2.0
// ctest: alone
// Three processes save step after step in the background, with retention, and one or all of them are killed at any time. What other processes then find is what
// retention promises, whole.
#include "support/campaign.hpp"
#include "support/generate.hpp"
#include "support/generations.hpp"
#include "support/kill_campaign.hpp"
#include "support/proc_comm.hpp"
#include "support/temporary_directory.hpp"

#include <dcp/checkpoint/manager.hpp>
#include <dcp/storage/safetensors.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include <csignal>
#include <unistd.h>

namespace {

using dcp::test::GenerationState;
using Manager = dcp::CheckpointManager<dcp::SafeTensors>;
constexpr int ranks = 3;
constexpr std::int64_t keep = 2;

struct Shared {
  std::atomic<std::int64_t> begun, ended;    // the newest step whose save was begun, and whose wait() has returned
  std::atomic<std::int64_t> latest, kept;    // what readers found
  std::array<std::atomic<pid_t>, ranks> processes;
};

// Saves overlap: the next one begins, and waits for the one before, while nobody has waited for that.
void train_until_killed(dcp::test::ProcComm& comm, std::string const& root, Shared& shared, int victim, bool all, std::chrono::microseconds after) {
  shared.processes[static_cast<std::size_t>(comm.rank())] = ::getpid();
  GenerationState state{comm, 300};
  Manager checkpoints{comm, root, {.keep_last = keep}};
  std::int64_t step = checkpoints.latest().value_or(0);
  comm.barrier();
  if (comm.rank() == victim)
    std::thread{[&shared, all, after] {
      std::this_thread::sleep_for(after);
      if (all)
        for (auto const& process : shared.processes)
          if (process != ::getpid()) ::kill(process, SIGKILL);
      ::kill(::getpid(), SIGKILL);
    }}.detach();
  for (;;) {
    state.fill(static_cast<std::uint64_t>(++step));
    if (comm.rank() == 0) shared.begun = step;
    // It returns when the one before has ended well.
    static_cast<void>(checkpoints.async_save(step, state.state()));
    if (comm.rank() == 0 && step > 1) shared.ended = std::max<std::int64_t>(shared.ended, step - 1);
    state.scribble();
  }
}

}  // namespace

TEST_CASE("CheckpointManager: ranks that are killed at any time of overlapping saves lose nothing that retention promises") {
  auto const seed = dcp::test::first_seed() + 5'000'000;
  CAPTURE(seed);
  dcp::test::TemporaryDirectory directory;
  std::string const root = directory / "run";
  dcp::test::kills::SharedMemory<Shared> memory;
  Shared& shared = *memory;
  int kills = 0;
  auto const until = std::chrono::steady_clock::now() + dcp::test::kills::time_of();
  for (int round = 0; round < dcp::test::rounds(100, 1000) && (round < dcp::test::kills::least_kills || std::chrono::steady_clock::now() < until); ++round) {
    dcp::test::Random random{seed + static_cast<std::uint64_t>(round)};
    int const victim = static_cast<int>(random.between(0, ranks - 1));
    bool const all = random.one_in(2);
    CAPTURE(round);
    CAPTURE(victim);
    CAPTURE(all);
    shared.ended = 0;
    auto const ends = dcp::test::run_processes(ranks, [&](dcp::test::ProcComm& comm) { train_until_killed(comm, root, shared, victim, all, std::chrono::microseconds{random.between(0, 60'000)}); });
    if (!all) CHECK(ends[static_cast<std::size_t>(victim)].signal == SIGKILL);   // who kills all may see the others die, and leave with that
    ++kills;
    int const readers = static_cast<int>(random.between(1, 4));
    auto const loads = dcp::test::run_processes(readers, [&](dcp::test::ProcComm& comm) {
      GenerationState state{comm, 300};
      Manager checkpoints{comm, root, {.keep_last = keep}};
      auto const steps = checkpoints.steps();
      for (auto const step : steps) {
        state.scribble();
        checkpoints.load(step, state.state());
        if (state.generation() != static_cast<std::uint64_t>(step)) ::_exit(9);
      }
      shared.latest = checkpoints.latest().value_or(0);
      shared.kept = static_cast<std::int64_t>(steps.size());
    });
    for (auto const& load : loads) CHECK_MESSAGE(load.exit_code == 0, load.text());
    CHECK(shared.latest >= shared.ended);
    CHECK(shared.latest <= shared.begun);
    CHECK(shared.kept >= std::min<std::int64_t>(keep, shared.latest));   // steps count from 1
  }
  // One save that nobody disturbs puts right what all of them have left.
  auto const last = dcp::test::run_processes(ranks, [&](dcp::test::ProcComm& comm) {
    GenerationState state{comm, 300};
    Manager checkpoints{comm, root, {.keep_last = keep}};
    checkpoints.save(checkpoints.latest().value_or(0) + 1, state.state());
    shared.latest = *checkpoints.latest();
    shared.kept = static_cast<std::int64_t>(checkpoints.steps().size());
  });
  for (auto const& end : last) CHECK_MESSAGE(end.exit_code == 0, end.text());
  CHECK(std::int64_t{shared.kept} == std::min(std::int64_t{keep}, std::int64_t{shared.latest}));   // a slow machine may never have got further than the first
  CHECK(kills >= dcp::test::kills::least_kills);
  if (dcp::test::long_run()) MESSAGE(kills << " kills");
}
