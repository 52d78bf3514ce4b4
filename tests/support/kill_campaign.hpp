// SPDX-License-Identifier: Apache-2.0
#pragma once
// Four processes save generation after generation over each other, and one or all of them are killed: at any time, and at any storage
// call. What other processes then load is the last generation that was saved or the one that was under way, whole.

#include "support/campaign.hpp"
#include "support/fault_medium.hpp"
#include "support/generate.hpp"
#include "support/generations.hpp"
#include "support/proc_comm.hpp"
#include "support/temporary_directory.hpp"

#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/media/local_fs.hpp>
#include <dcp/storage/safetensors.hpp>

#include <doctest/doctest.h>

#include <sys/mman.h>

#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <map>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace dcp::test::kills {

using Clock = std::chrono::steady_clock;

inline constexpr int ranks = 4;

/// What the processes and their parent tell each other.
struct Board {
  std::atomic<std::uint64_t> started, returned, found;   // generations: saving, saved, loaded
  std::atomic<std::uint64_t> entries;                    // in the directory after a save that nobody disturbed
  std::array<std::atomic<pid_t>, ranks> processes;
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

/// One T that processes share, from before they are forked.
template <class T>
class SharedMemory {
 public:
  SharedMemory() : memory_{::mmap(nullptr, sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)} {
    if (memory_ == MAP_FAILED) throw std::runtime_error{"no shared memory"};
    new (memory_) T{};
  }
  SharedMemory(SharedMemory const&) = delete;
  ~SharedMemory() { ::munmap(memory_, sizeof(T)); }
  T& operator*() { return *static_cast<T*>(memory_); }

 private:
  void* memory_;
};

struct Kill {
  int victim = 0;
  bool all = false;
  bool at_call = false;   // or at a time
  double when = 0;        // of a save's calls, or of its duration
};

/// One save that nobody disturbs, then saves until the kill comes.
template <class M, template <class> class Storage>
void save_until_killed(ProcComm& comm, std::string const& place, Board& board, Kill const& kill) {
  auto const me = static_cast<std::size_t>(comm.rank());
  board.processes[me] = ::getpid();
  FaultMedium<M> medium{M{}};
  GenerationState state{comm, 300};
  auto const save_next = [&](std::uint64_t generation) {
    if (comm.rank() == 0) board.started = generation;
    state.fill(generation);
    dcp::save<Storage<FaultMedium<M>>>(comm, {medium, place}, state, {.if_exists = dcp::IfExists::replace, .threads = 1});
    board.returned = generation;   // the same on all ranks
  };
  std::uint64_t const first = board.started + 1;
  comm.barrier();
  medium.clear();
  save_next(first);
  std::uint64_t const calls = medium.calls();
  comm.barrier();
  if (comm.rank() == 0) board.entries = medium.list(dcp::parent_path(place)).size();
  auto const before = Clock::now();
  save_next(first + 1);
  auto const duration = Clock::now() - before;
  comm.barrier();
  auto const strike = [&board, all = kill.all] {
    if (all)
      for (auto const& process : board.processes)
        if (process != ::getpid()) ::kill(process, SIGKILL);
    ::kill(::getpid(), SIGKILL);
  };
  if (comm.rank() == kill.victim) {
    if (kill.at_call) {
      medium.clear();
      medium.add({.nth = 1 + static_cast<std::uint64_t>(kill.when * static_cast<double>(calls)), .hook = [strike](Call, std::string const&) { strike(); }});
    } else {
      std::thread{[strike, pause = std::chrono::duration<double>(duration) * kill.when] {
        std::this_thread::sleep_for(pause);
        strike();
      }}.detach();
    }
  }
  for (std::uint64_t generation = first + 2;; ++generation) save_next(generation);
}

/// Which phase the save was in, by what it left.
inline std::string phase_left(std::string const& place) {
  dcp::MediumModel<dcp::LocalFs> medium{dcp::LocalFs{}};
  auto const siblings = dcp::detail::siblings_of(medium, place);
  bool const missing = medium.kind(place) == dcp::EntryKind::missing;
  if (siblings.empty()) return "nothing: before the attempt, or after the end";
  if (missing) return "publish: old aside, new not in";
  auto const at_place = dcp::detail::look_at(medium, place);
  std::uint64_t const sequence = at_place.record ? at_place.record->sequence : 0;
  for (auto const& sibling : siblings) {
    if (!sibling.record) {
      bool data = false;
      for (auto const& entry : medium.list(sibling.path)) data = data || entry.name.ends_with(".safetensors");
      return data ? "clean: an old checkpoint half removed" : "attempt: made, without a record; or the end of cleaning";
    }
    if (sibling.record->committed && sibling.record->sequence > sequence) return "publish: committed, not in place";
    if (sibling.record->committed) return "outcome: in place, the old one not removed";
    bool data = false, table = false;
    for (auto const& entry : medium.list(sibling.path)) data = data || entry.name.ends_with(".safetensors"), table = table || entry.name == dcp::checksums_name;
    if (table) return "commit: checksums there, record open";
    return data ? "write: data under way" : "attempt: open, no data";
  }
  return "";
}

struct Findings {
  std::size_t kills = 0, lost = 0, not_cleaned = 0, wrong_ends = 0;
  std::map<std::string, std::size_t> phases;
  std::string first;
  void note(std::size_t& counter, std::string const& what) {
    ++counter;
    if (first.empty()) first = what;
  }
};

inline constexpr int least_kills = 5;   // however long they take: on a busy machine, under a sanitizer, one takes seconds

template <class M, template <class> class Storage = dcp::BasicSafeTensors>
Findings campaign(std::uint64_t seed, int rounds, std::chrono::seconds most) {
  Findings findings;
  TemporaryDirectory directory;
  std::string const place = directory / "run/ckpt";
  SharedMemory<Board> board;
  auto const until = Clock::now() + most;
  for (int round = 0; round < rounds && (round < least_kills || Clock::now() < until); ++round) {
    Random random{seed + static_cast<std::uint64_t>(round)};
    Kill kill;
    kill.victim = random.one_in(2) ? 0 : static_cast<int>(random.between(1, ranks - 1));
    kill.all = random.one_in(3);
    kill.at_call = random.one_in(2);
    kill.when = static_cast<double>(random.between(0, 999)) / (kill.at_call ? 1000 : 600);
    std::string const where = "seed " + std::to_string(seed + static_cast<std::uint64_t>(round)) + ", rank " + std::to_string(kill.victim) + (kill.all ? " and all others" : "") + (kill.at_call ? ", by calls" : ", by time") + ": ";
    auto const ends = run_processes(ranks, [&](ProcComm& comm) { save_until_killed<M, Storage>(comm, place, *board, kill); });
    for (int rank = 0; rank < ranks; ++rank) {
      auto const& end = ends[static_cast<std::size_t>(rank)];
      if (end.signal == SIGKILL && (rank == kill.victim || kill.all)) continue;
      if (rank == kill.victim && !kill.all) {   // who kills all may see the others die, and leave with that, before its own turn
        findings.note(findings.wrong_ends, where + "rank " + std::to_string(rank) + " was not killed: " + end.text());
      } else if (!end.error || end.error->code() != dcp::ErrorCode::rank_failed || (end.error->rank() != kill.victim && !kill.all)) {   // of many, anyone is seen first
        findings.note(findings.wrong_ends, where + "rank " + std::to_string(rank) + " ended with " + end.text());
      }
    }
    ++findings.kills;
    std::string const phase = phase_left(place);
    ++findings.phases[phase];
    if ((*board).entries != 1) findings.note(findings.not_cleaned, where + std::to_string((*board).entries) + " entries after a save that nobody disturbed");
    // Other processes, as many as it happens.
    int const readers = static_cast<int>(random.between(1, 5));
    (*board).found = 0;
    auto const loads = run_processes(readers, [&](ProcComm& comm) {
      GenerationState state{comm, 300};
      state.scribble();
      dcp::load<Storage<dcp::LocalFs>>(comm, place, state);
      (*board).found = state.generation();
    });
    for (auto const& load : loads)
      if (load.exit_code != 0) findings.note(findings.lost, where + phase + ": " + load.text());
    std::uint64_t const found = (*board).found;
    if (found < (*board).returned || found > (*board).started)
      findings.note(findings.lost, where + phase + ": generation " + std::to_string(found) + ", saved was " + std::to_string((*board).returned) + ", being saved " + std::to_string((*board).started));
  }
  return findings;
}

inline std::chrono::seconds time_of() { return std::chrono::seconds{rounds(30, 3600)}; }

inline void check(Findings const& findings, std::size_t least) {
  std::string phases;
  for (auto const& [phase, count] : findings.phases) phases += "\n  " + std::to_string(count) + "  " + phase;
  CAPTURE(phases);
  CHECK_MESSAGE(findings.lost == 0, findings.first);
  CHECK_MESSAGE(findings.not_cleaned == 0, findings.first);
  CHECK_MESSAGE(findings.wrong_ends == 0, findings.first);
  CHECK(findings.kills >= least);
  CHECK(findings.phases.size() >= (findings.kills >= 100 ? 6u : findings.kills >= 16 ? 3u : 1u));
  if (long_run()) MESSAGE(findings.kills << " kills, " << findings.lost << " lost, by what they left:" << phases);
}

}  // namespace dcp::test::kills
