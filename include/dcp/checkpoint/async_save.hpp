// SPDX-License-Identifier: Apache-2.0
#pragma once
// async_save: the call copies the state into staging memory and returns; everything else happens behind the program.
//
//   in the call   ranks agree and plan as in a save; bytes of blocks that another rank owns go to their owner; what this rank will write is
//                 gathered into staging memory as it will lie in the files (a deferred stager does that behind the call, and exchanges in
//                 wait_staged())
//   behind it     rank 0 makes the attempt; every rank writes, syncs and tells so in the attempt; rank 0 commits and publishes; the others
//                 see the outcome there. No communicator is used: the program's own collectives are never mixed with ours
//   in wait()     ranks tell each other how it ended

#include <dcp/base/config.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/checkpoint/background.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/plan_cache.hpp>
#include <dcp/checkpoint/report.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/checkpoint/stager.hpp>
#include <dcp/checkpoint/staging.hpp>
#include <dcp/io/background_threads.hpp>

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
  Mutex mutex;
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

/// A save in the background, and what the call that began it knows of it.
template <class = Deferred>
struct PendingSave {
  CommRef comm;
  std::shared_ptr<BackgroundSave<>> save;   // none of a save that was skipped
  Report report;                            // what is known when the call returns, on this rank
  Stopwatch watch;                          // of the caller's thread
  bool waited = false;
  std::exception_ptr failure;
  StagerRef stager{};
  std::unique_ptr<Staging<>> staging{};     // until the copy is made
  bool without_event = false;               // some of what is on devices is copied piece by piece
  std::vector<typename DeviceSnapshot<>::Mark> marks{};   // behind copies that devices make
  DevicesOfState devices{};

  /// The rest of the staging. Collective if the stager has left something to be done. Throws the same Error on all ranks.
  void wait_staged() {
    if (!staging) return;
    auto const begun = Stopwatch::clock::now();
    try {
      if (!staging->finished()) stager.finish(*staging);
      settle_staging();
    } catch (...) {
      staging_failed(std::current_exception());
      throw;
    }
    report.wait_staged_seconds = std::chrono::duration<double>(Stopwatch::clock::now() - begun).count();
    watch.leave();
  }
  /// What the stager was to do is done.
  void settle_staging() {
    if (!staging->exchanged()) throw Error{ErrorCode::invalid_argument, "the stager \"" + std::string{stager.name} + "\" has left out the exchange"};
    if (stager.guarded) agree(comm, "save: stage", [&] { staging->unchanged(); });
    if (!staging->finished()) return;   // a stager that leaves the copies to themselves
    if (save->saver_process() != 0) agree(comm, "save: stage", [&] { save->wait_for_hand_over(); });
    staging.reset();
  }
  void staging_failed(std::exception_ptr const& why) {
    save->staging_ended(why);
    staging.reset();
  }
  /// Of a Pending that is dropped. What has not been copied will not be: the memory may be gone next.
  void drop_staging() {
    if (!staging || staging->complete()) return;
    staging_failed(std::make_exception_ptr(Error{ErrorCode::cancelled, "the Pending of a save with the stager \"" + std::string{stager.name} + "\" was dropped before wait_staged()"}));
  }

  /// Collective. Throws the same Error on all ranks.
  Report wait() {
    static_cast<void>(wait_until(Stopwatch::clock::time_point::max()));
    return report;
  }
  /// The same, but false on all ranks once it is later than `until` on any.
  bool wait_until(Stopwatch::clock::time_point until) {
    if (!waited) {
      if (staging) {
        staging->give_up_at(until);
        try {
          wait_staged();
        } catch (...) {
          // The save ends with that.
        }
      }
      if (!rounds(until)) return false;
      waited = true;
      try {
        finish();
      } catch (...) {
        failure = std::current_exception();
      }
      staging.reset();
    }
    if (failure) std::rethrow_exception(failure);
    return true;
  }

 private:
  // How little a failure says of what went wrong: 0 for a cause; more for what other ranks' failures bring with them: the attempt is emptied under a rank
  // that is still at work in it, or the rank is told to end.
  static int remoteness(BackgroundSave<> const& save, std::exception_ptr const& failure) {
    try {
      std::rethrow_exception(failure);
    } catch (Error const& error) {
      if (error.code() == ErrorCode::cancelled && save.was_followed()) return 2;
      return error.code() == ErrorCode::missing_file ? 1 : 0;
    } catch (...) {
      return 0;
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
    // Causes before their consequences, if any rank knows one.
    try {
      for (int const remote : {0, 1, 2})
        agree(comm, "save", [&] {
          if (save->state() == BackgroundSave<>::State::running)
            throw Error{ErrorCode::timeout, "rank " + std::to_string(comm.rank()) + " has not finished, and nothing has moved on any rank for " + std::to_string(save->deadline().count()) + " ms: its storage does not answer"}.with_path(report.place);
          auto const failed = save->failure();
          if (failed && remoteness(*save, failed) <= remote) std::rethrow_exception(failed);
        });
    } catch (...) {
      // One that has not ended does so as soon as its storage answers: what was said to have failed is not published later.
      if (save->state() != BackgroundSave<>::State::running) save->forget_attempt();
      else save->interrupt(Interruption::Why::cancelled);
      throw;
    }
    report.warnings = save->warnings();
    devices.warn(report.warnings);
    report.stall_seconds = std::ranges::max(all_gather_value(comm, report.stall_seconds));
    report.wait_staged_seconds = std::ranges::max(all_gather_value(comm, report.wait_staged_seconds));
    report.staged_bytes = all_reduce_sum(comm, save->staged_bytes());
    report.streamed = all_reduce_max(comm, save->streamed() ? 1 : 0) != 0;
    report.saver_processes = all_gather_value(comm, save->saver_process());
    std::erase(report.saver_processes, 0);
    double const seconds = std::chrono::duration<double>(save->watch().end() - watch.begin()).count();
    watch.collect(comm, report);
    save->watch().collect(comm, report);
    report.seconds = std::ranges::max(all_gather_value(comm, seconds));   // not those until somebody waited
  }
};

/// Whether the plan of a save is good for the next one: nothing in it depends on contents.
template <class = Deferred>
bool stays_valid(AnyStorage const& storage, SaveSettings const& settings) { return settings.check == Check::values && !storage.holds_values(); }

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
      Bytes const own = agree(comm, "save: plan", [&] {
        planned->agreed.devices.record_again(settings.on);
        return own_values(planned->agreed, comm.rank());
      });
      values = collect_values(comm, planned->agreed, own);
      return {std::move(planned), true};
    }
    cache->forget();
  }
  auto planned = agree_and_plan(comm, storage, place, state, settings, watch, values);
  if (cache != nullptr && stays_valid(storage, settings)) cache->remember(state, planned);
  return {std::move(planned), false};
}

/// Where a save goes, for callers that have looked: resolved, in a directory that is there.
struct KnownPlace {
  std::string path;
  std::uint64_t block_bytes;   // of the medium there
};

/// What the caller's thread does. Collective.
///
/// `known`   on all ranks: the call then asks the medium nothing, and cannot be held up by it; whether something is in the place is found out behind it
/// `commit`  `run`; and on rank 0 the least sequence, and what is to be done when the checkpoint is in its place
template <class = Deferred>
std::shared_ptr<PendingSave<>> begin_save(CommRef comm, AnyStorage const& storage, PlaceRef const& place, StateDict const& state, SaveSettings const& settings, StagerRef stager, std::shared_ptr<Stage<>> const& stage, CommitWork commit = {},
                                          SaveEventCallback events = {}, PlanCache<>* cache = nullptr, KnownPlace const* known = nullptr) {
  auto pending = std::make_shared<PendingSave<>>(PendingSave<>{comm, nullptr, {}, {}, false, nullptr, stager, nullptr});
  Stopwatch& watch = pending->watch;
  auto const begun = Stopwatch::clock::now();
  AnyMedium& medium = *place.medium;
  std::vector<std::pair<std::string, Value>> values;
  auto const agreed = agree_or_reuse(comm, storage, place, state, settings, watch, values, cache);
  std::shared_ptr<PlannedSave> const& planned = agreed.first;
  if (planned->plan->recoding) prepare_recoding(comm, *planned->plan->recoding, planned->agreed, planned->plan->shares, settings, watch);
  pending->report.plan_reused = agreed.second;
  describe_saved(*planned, pending->report);
  pending->devices = planned->agreed.devices;

  watch.enter("look");
  struct Opened {
    std::uint64_t block_bytes = 0;
    std::array<char, 16> id{};
  };
  std::string resolved;
  Opened opened = agree(comm, "save: attempt", [&] {
    Opened result;
    if (settings.executor == Executor::process && !medium.local_files()) {
      Error error{ErrorCode::unsupported, "the executor is a process, which can write local files only, and this place is none"};
      throw error.with_path(place.path).with_hint("use Executor::thread");
    }
    if (settings.executor == Executor::process && commit.drains) throw Error{ErrorCode::unsupported, "the executor is a process, which does not copy to a second tier; use Executor::thread"};
    if (comm.rank() != 0) return result;
    if (known != nullptr) {
      result.block_bytes = known->block_bytes;
    } else {
      resolved = medium.resolve_place(place.path);
      if (settings.if_exists == IfExists::fail && look_at(medium, resolved).kind != Occupant::Kind::nothing) throw already_there(resolved);
      std::string const parent = split_path(resolved).first;
      medium.create_directories(parent);
      result.block_bytes = medium.block_bytes(parent);
    }
    auto const id = random_id();
    std::copy_n(id.begin(), 16, result.id.begin());
    commit.extra = storage.extra_files();
    if (planned->plan->recoding) storage.describe(*planned->plan->recoding, commit.extra);
    commit.planned = {planned, &*planned->record};
    commit.values = std::move(values);
    return result;
  });
  opened = broadcast_value(comm, opened, 0);
  pending->report.operation = "save";
  pending->report.place = known != nullptr ? known->path : broadcast_text(comm, std::move(resolved), 0);
  pending->report.id = std::string{opened.id.begin(), opened.id.end()};

  watch.enter("plan");
  stage->pool->start();
  pending->report.stager = stager.name;
  pending->report.pool_reused = std::exchange(stage->used, true);
  bool const remembered = cache != nullptr && stays_valid(storage, settings);
  auto const writes = agree(comm, "save: plan", [&] {
    stage->prepare(settings.saver_program);
    SaveJob job;
    job.medium = place.medium;
    job.place = pending->report.place, job.id = pending->report.id;
    job.rank = comm.rank(), job.ranks = comm.size();
    job.files = {planned, &planned->plan->files};
    job.block_bytes = opened.block_bytes;
    job.settings = settings;
    job.settings.progress = {};
    job.pool = stage->pool;
    job.saver = stage->saver;
    job.commit = std::move(commit);
    job.events = events;
    auto const make = [&](PlannedSave const& of) { return of.plan->writes(of.agreed, comm.rank(), comm.size(), {opened.block_bytes, writers_per_file(medium, settings.writers_per_file)}); };
    // What copies of devices are made of belongs to one save.
    auto planned_writes = remembered && !(stager.deferred && planned->agreed.devices.any()) ? cache->writes(opened.block_bytes, make) : std::make_shared<PlannedWrites>(PlannedWrites{make(*planned)});
    job.empty_files = planned_writes->plan.empty_files();
    pending->save = std::make_shared<BackgroundSave<>>(std::move(job));
    return planned_writes;
  });
  BackgroundSave<>& save = *pending->save;
  bool begun_behind = false;
  try {
    agree(comm, "save: stage", [&] {
      BackgroundThreads<>::instance().run([save = pending->save] { save->run(); });
      begun_behind = true;
    });
    agree(comm, "save: stage", [&] {
      pending->staging = std::make_unique<Staging<>>(comm, planned, writes, remembered, stage, pending->save, settings, watch);
      if (stager.deferred && planned->agreed.devices.any()) {
        pending->staging->snapshot();
        auto const& snapshot = pending->staging->snapshotted();
        if (snapshot != nullptr) pending->marks = snapshot->marks();
        pending->without_event = snapshot == nullptr || planned->plan->recoding != nullptr;   // what is quantized is read when it is
      }
      if (stager.deferred && planned->agreed.devices.shared()) pending->without_event = true;
      if (stager.guarded) pending->staging->remember();
    });
    stager.begin(*pending->staging);
    pending->report.deferred = !pending->staging->finished();
    if (pending->report.deferred) save.hurry();
    else pending->settle_staging();
  } catch (...) {
    auto const failure = std::current_exception();
    save.observe();
    pending->staging_failed(failure);
    // Its wreck goes at once, if that does not take long; else with the next save.
    if (begun_behind && save.wait_for(std::chrono::seconds{5})) save.forget_attempt();
    std::rethrow_exception(failure);
  }
  watch.leave();
  pending->report.stall_seconds = std::chrono::duration<double>(Stopwatch::clock::now() - begun).count();
  return pending;
}

}  // namespace detail

/// The point where what a save copies of devices has been copied, in the order of devices. Copyable; may outlive the save.
///
/// Example   dcp::Pending pending = dcp::async_save<dcp::SafeTensors, dcp::DeferredStager>(world, "ckpt", state, {.on = {dcp::on(stream)}});
///           pending.staged_event().before(dcp::on(stream));
///           optimizer_step<<<blocks, threads, 0, stream>>>(weights);   // not before the copies, and the host has waited for nothing
///           pending.wait_staged();                                     // some time later
template <class = Deferred>
class BasicStagedEvent {
 public:
  /// What is put into the stream from now on comes after the copies. Throws Error(device).
  void before(DeviceStream const& stream) const {
    for (auto const& mark : marks_) {
      if (mark.device->driver() == stream.driver) stream.driver->order(stream.ordinal, stream.stream, *mark.made);
      else mark.device->wait_for(*mark.made);   // a stream knows no events of other kinds of devices
    }
  }
  /// Whether the copies have been made. Throws Error(device) if they failed.
  bool done() const {
    return std::all_of(marks_.begin(), marks_.end(), [](auto const& mark) { return mark.made->done(); });
  }

  // Of the library.
  explicit BasicStagedEvent(std::vector<typename detail::DeviceSnapshot<>::Mark> marks) : marks_{std::move(marks)} {}

 private:
  std::vector<typename detail::DeviceSnapshot<>::Mark> marks_;
};
using StagedEvent = BasicStagedEvent<>;

/// A save that is under way behind the program. Move-only. It must not outlive the communicator that the save was begun with.
///
/// Dropped   without wait(), the save goes on, and a failure of it is not lost: the next save or wait of its manager throws it, or the hook of
///           set_background_error_hook is called. Dropped before the copy was made (DeferredStager), the save fails: the memory may be gone next
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
    if (!save_ || !save_->save) return;
    save_->drop_staging();
    if (!save_->waited && lost_) save_->save->drop(lost_);
  }

  /// Until the checkpoint is complete and in its place. Collective. Throws on all ranks what any rank threw, every time it is called.
  Report wait() { return here().wait(); }
  /// Until the memory of the state may be changed. Local and at once if the call has copied it, as with CopyStager; else collective: throws on all ranks what
  /// any rank threw, and so does wait() then.
  void wait_staged() { here().wait_staged(); }
  /// When tensors on devices may be changed, as an event for their streams; tensors on the host stay as they are until wait_staged(). With CopyStager they may be changed
  /// already. Local. Throws Error(unsupported) where the copies are not put into streams: of states larger than staging_bytes, of tensors that are quantized, and of memory
  /// that the host and devices share.
  StagedEvent staged_event() const {
    auto const& save = here();
    if (save.without_event && save.staging && !save.staging->complete())
      throw Error{ErrorCode::unsupported, "there is no event for this copy: the host makes it, piece by piece, until wait_staged() returns"}.with_hint("staging_bytes must hold all that the rank writes; what is quantized, and what lies in memory that the host shares with devices, is always copied by the host");
    return StagedEvent{save.marks};
  }
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

/// Saves `state` as save() does, and byte for byte the same, but returns when the state has been copied. Collective. `comm` is used in this call, in
/// Pending::wait_staged() and in Pending::wait() only.
///
/// T         when the copy is made: inside the call (CopyStager), or behind it (DeferredStager)
/// Memory    options.staging_bytes of address space on each rank, of which only the rank's part of the state is touched; kept for later saves of
///           this process. Of a larger part the call returns when the last of it has been copied, and Report::streamed says so
/// Throws    Error on all ranks if any rank failed before the copy was made; what fails later is thrown by wait()
/// Example   see Pending
template <class S, class T = CopyStager, class C>
Pending async_save(C& comm, place_of<S> const& place, StateDict const& state, SaveOptions<S> const& options = {}) {
  [[maybe_unused]] detail::verb_arguments<S, C> check;
  [[maybe_unused]] detail::a_stager<T> stager_check;
  [[maybe_unused]] detail::a_writable_storage<detail::can_be_written<S>()> writable;
  if constexpr (Storage<S> && Communicator<C> && Stager<T> && detail::can_be_written<S>()) {
    auto const stage = agree(comm, "save: stage", [&] { return detail::Stages<>::take(options.staging_bytes, options.executor); });
    return {detail::begin_save(CommRef{comm}, *S::open(options.storage), S::locate(place), state, detail::settings_of(options), detail::StagerRef::of<T>(), stage), [](Error const& error) { detail::ErrorHook<>::instance()(error); }};
  } else {
    return {nullptr, {}};
  }
}

}  // namespace dcp
