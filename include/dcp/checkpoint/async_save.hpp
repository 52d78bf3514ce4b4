// SPDX-License-Identifier: Apache-2.0
#pragma once
// async_save: the call copies the state into staging memory and returns; everything else happens behind the program.
//
//   in the call   ranks agree and plan as in a save; bytes of blocks that another rank owns go to their owner; what this rank will write is
//                 gathered into staging memory as it will lie in the files
//   behind it     rank 0 makes the attempt; every rank writes, syncs and tells so in the attempt; rank 0 commits and publishes; the others
//                 see the outcome there. No communicator is used: the program's own collectives are never mixed with ours
//   in wait()     ranks tell each other how it ended

#include <dcp/base/config.hpp>
#include <dcp/checkpoint/background.hpp>
#include <dcp/checkpoint/exchange.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/plan_cache.hpp>
#include <dcp/checkpoint/report.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/io/background_threads.hpp>
#include <dcp/io/staging_pool.hpp>
#include <dcp/io/workers.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace dcp {

/// What is told of the failure of a save in the background that nobody waited for: one that async_save began, and whose Pending was dropped. Called on
/// a thread of the library, or on that which drops. By default the Error is printed to stderr. An empty function means that again.
template <class = Deferred>
void set_background_error_hook(std::function<void(Error const&)> hook);

/// How long the end of the process waits for saves that are under way, a minute if nothing is said. What is not committed then is an attempt that the
/// next save removes.
template <class = Deferred>
void set_exit_deadline(std::chrono::milliseconds deadline) { BackgroundThreads<>::instance().set_exit_deadline(deadline); }

namespace detail {

template <class = Deferred>
struct ErrorHook {
  std::mutex mutex;
  std::function<void(Error const&)> hook;
  static ErrorHook& instance() {
    static auto* const one = new ErrorHook;   // threads that outlive main may use it
    return *one;
  }
  void operator()(Error const& error) {
    std::function<void(Error const&)> call;
    {
      std::lock_guard const lock{mutex};
      call = hook;
    }
    if (call) return call(error);
    std::fprintf(stderr, "a save in the background failed, and nobody waited for it: %s\n", error.what());
  }
};

/// What saves of one rank in the background use again: staging memory, and the threads that copy into it.
template <class = Deferred>
struct Stage {
  explicit Stage(std::uint64_t staging_bytes, int threads) : pool{std::make_shared<StagingPool<>>(staging_bytes)}, workers{static_cast<std::size_t>(threads)} {}
  std::shared_ptr<StagingPool<>> pool;
  Workers<> workers;

  static constexpr std::uint64_t piece_bytes = 4 * chunk_bytes;
};

template <class = Deferred>
void check_staging(std::uint64_t bytes) {
  if (bytes < least_memory_bytes) throw Error{ErrorCode::budget, "staging memory of " + std::to_string(bytes) + " bytes; at least " + std::to_string(least_memory_bytes) + " are needed"};
}

/// Stages that bare calls of async_save have used, for the next ones.
template <class = Deferred>
class Stages {
 public:
  static std::shared_ptr<Stage<>> take(std::uint64_t staging_bytes) {
    check_staging(staging_bytes);
    auto& all = instance();
    std::lock_guard const lock{all.mutex_};
    for (auto const& stage : all.stages_)
      if (stage.use_count() == 1 && stage->pool.use_count() == 1 && stage->pool->capacity() == round_up(staging_bytes, StagingPool<>::page_bytes)) return stage;
    return all.stages_.emplace_back(std::make_shared<Stage<>>(staging_bytes, copy_threads()));
  }
  static int copy_threads() { return std::clamp(static_cast<int>(std::thread::hardware_concurrency()) / 2, 1, 4); }

 private:
  static Stages& instance() {
    static auto* const one = new Stages;
    return *one;
  }
  std::mutex mutex_;
  std::vector<std::shared_ptr<Stage<>>> stages_;
};

/// Sink of the exchange that gathers into staging memory.
template <class = Deferred>
class StagingSink {
 public:
  StagingSink(CommRef comm, SavePlan const& plan, Stage<>& stage, BackgroundSave<>& save) : comm_{comm}, plan_{plan}, stage_{stage}, save_{save} {}
  StagingSink(StagingSink const&) = delete;

  void direct(std::uint32_t f, FileRange range) {
    for_each_piece(range, Stage<>::piece_bytes, [&](std::uint64_t at, std::uint64_t end) {
      stage_.workers.submit([this, f, at, end](std::size_t) {
        Staged memory = stage_.pool->take(end - at, [] {});
        std::uint64_t const held = plan_.gather(f, at, end, memory.bytes.data());
        if (held != end - at) throw Error{ErrorCode::incomplete, "this rank holds " + std::to_string(held) + " of " + std::to_string(end - at) + " bytes that it is to write"}.with_path(plan_.files()[f].path).with_range(at, end);
        save_.stage(f, at, std::move(memory));
      });
    });
  }
  std::uint64_t most_bytes() const { return Stage<>::piece_bytes; }
  Staged segment(std::uint64_t bytes) {
    return stage_.pool->take(bytes, [&] { comm_.progress(); });
  }
  void end_of_round() const {}
  void ready(std::uint32_t f, FileRange range, Staged memory) { save_.stage(f, range.begin, std::move(memory)); }

  void finish() {
    stage_.workers.finish([&] { comm_.progress(); });
    finished_ = true;
  }
  // Its jobs use what is about to go.
  ~StagingSink() {
    if (finished_) return;
    try {
      stage_.pool->stop(std::make_exception_ptr(Error{ErrorCode::cancelled, "the save has failed"}));
      stage_.workers.finish([] {});
    } catch (...) {
      // What failed is on its way to the caller.
    }
  }

 private:
  CommRef comm_;
  SavePlan const& plan_;
  Stage<>& stage_;
  BackgroundSave<>& save_;
  bool finished_ = false;
};

/// A save in the background, and what the call that began it knows of it.
template <class = Deferred>
struct PendingSave {
  CommRef comm;
  std::shared_ptr<Stage<>> stage;
  std::shared_ptr<BackgroundSave<>> save;
  Report report;                        // what is known when the call returns, on this rank
  Stopwatch watch;                      // of the call
  bool waited = false;
  std::exception_ptr failure;

  /// Collective. Throws the same Error on all ranks.
  Report wait() {
    static_cast<void>(wait_until(Stopwatch::clock::time_point::max()));
    return report;
  }
  /// The same, but false on all ranks once it is later than `until` on any.
  bool wait_until(Stopwatch::clock::time_point until) {
    if (!waited) {
      if (!rounds(until)) return false;
      waited = true;
      try {
        finish();
      } catch (...) {
        failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
    return true;
  }

 private:
  static bool is_cancellation(std::exception_ptr const& failure) {
    try {
      std::rethrow_exception(failure);
    } catch (Error const& error) {
      return error.code() == ErrorCode::cancelled;
    } catch (...) {
      return false;
    }
  }
  // In each, every rank says how far it is. One that has failed ends the others; when rank 0 has ended, all is decided. When nothing has moved on any rank for
  // the deadline, some storage does not answer, and there is nothing to wait for.
  bool rounds(Stopwatch::clock::time_point until) {
    using State = typename BackgroundSave<>::State;
    struct Say {
      State state;
      bool late;
      std::uint64_t moves;
      bool stuck;
    };
    std::uint64_t moved = 0;
    auto last_move = Stopwatch::clock::now();
    std::chrono::milliseconds const deadline = save->deadline();
    for (auto pause = std::chrono::milliseconds{1};; pause = std::min(2 * pause, std::chrono::milliseconds{20})) {
      bool running = false, failed = false, late = false;
      std::uint64_t moves = 0;
      // Rank 0 knows the time: all come to the same conclusion.
      bool const stuck = Stopwatch::clock::now() - last_move > deadline;
      auto const all = all_gather_value(comm, Say{save->state(), Stopwatch::clock::now() > until, save->moves(), stuck});
      for (auto const& say : all) running = running || say.state == State::running, failed = failed || say.state == State::failed, late = late || say.late, moves += say.moves + (say.state != State::running ? 1 : 0);
      if (!running || all[0].stuck) return true;
      if (late) return false;
      if (std::exchange(moved, moves) != moves) last_move = Stopwatch::clock::now();
      if (all[0].state != State::running) save->interrupt(Interruption::Why::settled);
      else if (failed) save->interrupt(Interruption::Why::followed);
      for (auto const next = Stopwatch::clock::now() + pause; Stopwatch::clock::now() < next && !save->wait_for(std::chrono::milliseconds{1});) comm.progress();
    }
  }
  void finish() {
    save->observe();
    // Who was ended by another's failure has nothing to say, unless nobody has.
    try {
      for (bool const last : {false, true})
        agree(comm, "save", [&] {
          if (save->state() == BackgroundSave<>::State::running)
            throw Error{ErrorCode::timeout, "rank " + std::to_string(comm.rank()) + " has not finished, and nothing has moved on any rank for " + std::to_string(save->deadline().count()) + " ms: its storage does not answer"}.with_path(report.place);
          auto const failed = save->failure();
          if (failed && (last || !save->was_followed() || !is_cancellation(failed))) std::rethrow_exception(failed);
        });
    } catch (...) {
      if (save->state() != BackgroundSave<>::State::running) save->forget_attempt();
      throw;
    }
    report.warnings = save->warnings();
    report.stall_seconds = std::ranges::max(all_gather_value(comm, report.stall_seconds));
    report.staged_bytes = all_reduce_sum(comm, report.staged_bytes);
    report.streamed = all_reduce_max(comm, report.streamed ? 1 : 0) != 0;
    watch.collect(comm, report);
    save->watch().collect(comm, report);
  }
};

/// agree_and_plan, or what `cache` remembers of it where that holds on all ranks. Collective.
template <class = Deferred>
std::pair<std::shared_ptr<PlannedSave>, bool> agree_or_reuse(CommRef comm, AnyStorage const& storage, PlaceRef const& place, StateDict const& state, SaveSettings const& settings, Stopwatch& watch, std::vector<std::pair<std::string, Value>>& values, PlanCache<>* cache) {
  if (cache != nullptr) {
    watch.enter("agree");
    struct Known {
      std::uint64_t plan, values, place;
      bool operator==(Known const&) const = default;
    } mine{cache->match(state, options_in_words(storage, settings)), 0, crc64(as_byte_span(place.path))};
    std::shared_ptr<PlannedSave> planned;
    if (mine.plan != 0) {
      planned = cache->rebound(state);
      try {
        mine.values = shared_values_digest(planned->agreed);
      } catch (...) {
        mine.plan = 0;   // agree_and_plan says what is wrong
      }
    }
    auto const all = all_gather_value(comm, mine);
    if (mine.plan != 0 && std::count(all.begin(), all.end(), mine) == comm.size()) {
      watch.enter("plan");
      Bytes const own = agree(comm, "save: plan", [&] { return own_values(planned->agreed, comm.rank()); });
      values = collect_values(comm, planned->agreed, own);
      return {std::move(planned), true};
    }
    cache->forget();
  }
  auto planned = agree_and_plan(comm, storage, place, state, settings, watch, values);
  if (cache != nullptr && settings.check == Check::values) cache->remember(state, planned);
  return {std::move(planned), false};
}

/// What the caller's thread does. Collective.
///
/// `commit`  on rank 0: of its record `run` and the least sequence, and what is to be done when the checkpoint is in its place
template <class = Deferred>
std::shared_ptr<PendingSave<>> begin_save(CommRef comm, AnyStorage const& storage, PlaceRef const& place, StateDict const& state, SaveSettings const& settings, std::shared_ptr<Stage<>> stage, CommitWork commit = {}, SaveEventCallback events = {}, PlanCache<>* cache = nullptr) {
  auto pending = std::make_shared<PendingSave<>>(PendingSave<>{comm, std::move(stage), nullptr, {}, {}, false, nullptr});
  Stopwatch& watch = pending->watch;
  auto const begun = Stopwatch::clock::now();
  AnyMedium& medium = *place.medium;
  std::vector<std::pair<std::string, Value>> values;
  auto const agreed = agree_or_reuse(comm, storage, place, state, settings, watch, values, cache);
  std::shared_ptr<PlannedSave> const& planned = agreed.first;
  pending->report.plan_reused = agreed.second;
  describe_saved(*planned, pending->report);

  watch.enter("look");
  struct Opened {
    std::uint64_t block_bytes = 0;
    std::array<char, 16> id{};
  };
  std::string resolved;
  Opened opened = agree(comm, "save: attempt", [&] {
    Opened result;
    if (comm.rank() != 0) return result;
    resolved = medium.resolve_place(place.path);
    if (settings.if_exists == IfExists::fail && look_at(medium, resolved).kind != Occupant::Kind::nothing) throw already_there(resolved);
    std::string const parent = split_path(resolved).first;
    medium.create_directories(parent);
    result.block_bytes = medium.block_bytes(parent);
    auto const id = random_id();
    std::copy_n(id.begin(), 16, result.id.begin());
    commit.extra = storage.extra_files();
    CommitRecord record = record_of(storage, planned->agreed);
    record.run = commit.record.run, record.sequence = commit.record.sequence;
    commit.record = std::move(record);
    commit.values = std::move(values);
    return result;
  });
  opened = broadcast_value(comm, opened, 0);
  Bytes text;
  append(text, as_byte_span(resolved));
  broadcast_bytes(comm, text, 0);
  pending->report.operation = "save";
  pending->report.place = as_text(text);
  pending->report.id = std::string{opened.id.begin(), opened.id.end()};

  watch.enter("plan");
  StagingPool<>& pool = *pending->stage->pool;
  pool.start();
  auto const writes = agree(comm, "save: plan", [&] {
    typename BackgroundSave<>::Job job;
    job.medium = place.medium;
    job.place = pending->report.place, job.id = pending->report.id;
    job.rank = comm.rank(), job.ranks = comm.size();
    job.files = {planned, &planned->plan->files};
    job.block_bytes = opened.block_bytes;
    job.settings = settings;
    job.settings.progress = {};
    job.pool = pending->stage->pool;
    job.commit = std::move(commit);
    job.events = events;
    auto const make = [&](PlannedSave const& of) { return of.plan->writes(of.agreed, comm.rank(), comm.size(), {opened.block_bytes, writers_per_file(medium, settings.writers_per_file)}); };
    auto plan = cache != nullptr && settings.check == Check::values ? cache->writes(opened.block_bytes, make) : std::make_shared<SavePlan const>(make(*planned));
    job.empty_files = plan->empty_files();
    pending->save = std::make_shared<BackgroundSave<>>(std::move(job));
    return plan;
  });
  BackgroundSave<>& save = *pending->save;
  bool begun_behind = false;
  try {
    agree(comm, "save: stage", [&] {
      BackgroundThreads<>::instance().run([save = pending->save] { save->run(); });
      begun_behind = true;
    });
    StagingSink<> sink{comm, *writes, *pending->stage, save};
    // What a round holds must leave room for what is on its way to the storage.
    std::uint64_t const round = std::min(Budget::of(settings.memory_bytes, settings.threads).round_bytes, round_down(pool.capacity() / 4, Stage<>::piece_bytes));
    Exchange<StagingSink<>>{comm, *writes, round, watch, sink}.run();
    watch.enter("stage");
    agree(comm, "save: stage", [&] { sink.finish(); });
    watch.here().bytes += save.staged_bytes();
  } catch (...) {
    auto const failure = std::current_exception();
    save.observe();
    save.staging_ended(failure);
    // Its wreck goes at once, if that does not take long; else with the next save.
    if (begun_behind && save.wait_for(std::chrono::seconds{5})) save.forget_attempt();
    std::rethrow_exception(failure);
  }
  save.staging_ended();
  watch.leave();
  pending->report.stall_seconds = std::chrono::duration<double>(Stopwatch::clock::now() - begun).count();
  pending->report.staged_bytes = save.staged_bytes();
  pending->report.streamed = pending->report.staged_bytes > pool.capacity();
  save.staged_event();
  return pending;
}

}  // namespace detail

/// A save that is under way behind the program. Move-only. It must not outlive the communicator that the save was begun with.
///
/// Dropped   without wait(), the save goes on, and a failure of it is not lost: the next save or wait of its manager throws it, or the hook of
///           set_background_error_hook is called
/// Example   dcp::Pending pending = dcp::async_save<dcp::SafeTensors>(world, "ckpt", state);
///           train();                       // may change the state
///           dcp::Report report = pending.wait();
template <class = Deferred>
class [[nodiscard]] BasicPending {
 public:
  BasicPending(BasicPending&&) noexcept = default;
  BasicPending& operator=(BasicPending&& other) noexcept {
    std::swap(save_, other.save_);
    std::swap(lost_, other.lost_);
    return *this;
  }
  ~BasicPending() {
    if (save_ && save_->save && !save_->waited && lost_) save_->save->drop(lost_);
  }

  /// Until the checkpoint is complete and in its place. Collective. Throws on all ranks what any rank threw, every time it is called.
  Report wait() { return here().wait(); }
  /// Until the memory of the state may be changed: at once, as the call has copied it. Local.
  void wait_staged() { static_cast<void>(here()); }
  /// Whether this rank's part has ended within `time`, well or not. Local.
  template <class Rep, class Period>
  bool wait_for(std::chrono::duration<Rep, Period> time) const {
    auto const& save = here().save;   // none of a save that was skipped
    return !save || save->wait_for(std::chrono::ceil<std::chrono::milliseconds>(time));
  }
  /// Whether this rank's part has ended, well or not. Local.
  bool done() const { return wait_for(std::chrono::milliseconds{0}); }
  /// Ends the save if it is not committed yet; wait() then throws Error(cancelled). Local: one rank is enough.
  void cancel() {
    if (auto const& save = here().save) save->interrupt(detail::Interruption::Why::cancelled);
  }

  // Of the library.
  BasicPending(std::shared_ptr<detail::PendingSave<>> save, std::function<void(Error const&)> lost) : save_{std::move(save)}, lost_{std::move(lost)} {}

 private:
  detail::PendingSave<>& here() const {
    if (!save_) throw Error{ErrorCode::invalid_argument, "this Pending was moved from"};
    return *save_;
  }
  std::shared_ptr<detail::PendingSave<>> save_;
  std::function<void(Error const&)> lost_;
};
using Pending = BasicPending<>;

template <class>
void set_background_error_hook(std::function<void(Error const&)> hook) {
  auto& here = detail::ErrorHook<>::instance();
  std::lock_guard const lock{here.mutex};
  here.hook = std::move(hook);
}

/// Saves `state` as save() does, and byte for byte the same, but returns when the state has been copied. Collective. `comm` is used in this call and
/// in Pending::wait() only.
///
/// Memory    options.staging_bytes of address space on each rank, of which only the rank's part of the state is touched; kept for later saves of
///           this process. Of a larger part the call returns when the last of it has been copied, and Report::streamed says so
/// Throws    Error on all ranks if any rank failed before the copy was made; what fails later is thrown by wait()
/// Example   see Pending
template <class S, class C>
Pending async_save(C& comm, place_of<S> const& place, StateDict const& state, SaveOptions<S> const& options = {}) {
  [[maybe_unused]] detail::verb_arguments<S, C> check;
  if constexpr (Storage<S> && Communicator<C>) {
    auto stage = agree(comm, "save: stage", [&] { return detail::Stages<>::take(options.staging_bytes); });
    return {detail::begin_save(CommRef{comm}, *S::open(options.storage), S::locate(place), state, detail::settings_of(options), std::move(stage)), [](Error const& error) { detail::ErrorHook<>::instance()(error); }};
  } else {
    return {nullptr, {}};
  }
}

}  // namespace dcp
