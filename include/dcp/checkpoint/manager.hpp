// SPDX-License-Identifier: Apache-2.0
#pragma once
// CheckpointManager: saves, finds, loads and retires the checkpoints of one training run. What lies where: checkpoint/run.hpp.

#include <dcp/base/config.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/checkpoint/async_save.hpp>
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/place.hpp>
#include <dcp/checkpoint/report.hpp>
#include <dcp/checkpoint/run.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace dcp {

/// What a manager does when it is to save while a save is still under way. All ranks do the same.
enum class IfBusy : std::uint8_t {
  wait,   // for that one, first
  fail,   // Error(busy)
  skip,   // nothing is saved, and the report says so
};

template <class S>
struct ManagerOptions {
  // Retention: what one of these keeps is kept; the newest checkpoint always is, and pinned ones are.
  std::int64_t keep_last = 0;                          // the newest, by commit; 0: all checkpoints are kept, whatever the others say
  std::int64_t keep_every = 0;                         // those whose step is a multiple of this
  std::int64_t keep_best = 0;                          // this many, by metric
  Best best = Best::lowest;
  std::uint64_t staging_bytes = default_staging_bytes; // of the copy that async_save makes, on this rank
  IfBusy if_busy = IfBusy::wait;
  SaveEventCallback events = {};
  SaveOptions<S> save = {};                            // staging_bytes in it is not used
  LoadOptions<S> load = {};
};

namespace detail {

/// A root, claimed by rank 0 for as long as it has `lease`, and what crashes have left there put right. Collective.
///
/// `deadline`  how long a dcp-saver of a program that was killed is waited for: what it was given is the newest checkpoint then
template <class = Deferred>
std::shared_ptr<Run<>> claim_root(CommRef comm, PlaceRef const& place, std::unique_ptr<Lease>& lease, std::chrono::milliseconds deadline) {
  std::string resolved = agree(comm, "manager", [&]() -> std::string {
    if (comm.rank() != 0) return {};
    place.medium->create_directories(place.path);
    std::string const path = place.medium->resolve_place(place.path + "/step");
    std::string const here = split_path(path).first;
    // That of a manager that was killed may look held for a while.
    for (auto const until = SteadyClock::now() + place.medium->lease_life();; this_thread::sleep_for(std::chrono::milliseconds{200})) {
      lease = place.medium->acquire_lease(here + '/' + std::string{manager_lease_name});
      if (lease || SteadyClock::now() >= until) break;
      comm.progress();
    }
    if (!lease) {
      Error error{ErrorCode::busy, "another CheckpointManager keeps the checkpoints of this directory"};
      throw error.with_path(here).with_hint("one manager per run: give each its own directory, or end the other one first");
    }
    Run<> run{place.medium, here};
    for (auto const until = SteadyClock::now() + deadline; run.clean() && SteadyClock::now() < until; this_thread::sleep_for(std::chrono::milliseconds{20})) comm.progress();
    return here;
  });
  return std::make_shared<Run<>>(place.medium, broadcast_text(comm, std::move(resolved), 0));
}

/// What a manager does besides where a second tier follows it: tiered.hpp.
struct NextTier {
  std::uint64_t newest = 0;                                                         // the largest sequence there, when the manager began; on rank 0
  std::function<void(Run<> const&, std::function<void()> const&)> drain;            // to it; see CommitWork
};

}  // namespace detail

template <class Near, class Far>
class Tiered;

/// Saves, finds, loads and retires the checkpoints of one run. One per run and root at a time: a second one is an Error(busy). Every member is collective,
/// but those that say otherwise. `comm` must outlive it.
///
/// T         when a save in the background copies: inside the call (CopyStager), or behind it (DeferredStager)
/// Memory    one staging area, allocated once and used by all saves
/// Failures  of a save in the background that nobody waited for are thrown by the next save, async_save, wait or flush
/// Example   dcp::CheckpointManager<dcp::SafeTensors> checkpoints{world, "run", {.keep_last = 3, .keep_every = 1000}};
///           if (auto const step = checkpoints.latest()) checkpoints.load(*step, state);
///           for (...) { train(); auto pending = checkpoints.async_save(step, state); }
///           checkpoints.wait();
template <class S, class T = CopyStager>
class CheckpointManager : detail::a_storage<S>, detail::a_stager<T> {
 public:
  template <class C>
  CheckpointManager(C& comm, place_of<S> const& root, ManagerOptions<S> options = {})
      : comm_{comm}, options_{std::move(options)}, storage_{S::open(options_.save.storage)} {
    PlaceRef const place = S::locate(root);
    auto const settings = detail::settings_of(options_.save);
    agree(comm_, "manager", [&] {
      detail::check_resources(settings.memory_bytes, settings.threads);
      if (options_.keep_last < 0 || options_.keep_every < 0 || options_.keep_best < 0) throw Error{ErrorCode::invalid_argument, "retention with a negative number"};
      if (options_.keep_last == 0 && (options_.keep_every > 0 || options_.keep_best > 0))
        throw Error{ErrorCode::invalid_argument, "keep_every and keep_best keep what keep_last would let go; with keep_last = 0 everything is kept"};
      detail::check_staging(options_.staging_bytes);
      stage_ = std::make_shared<detail::Stage<>>(options_.staging_bytes, options_.save.executor);
    });
    run_ = detail::claim_root(comm_, place, lease_, settings.deadline);
    block_bytes_ = broadcast_value(comm_, agree(comm_, "manager", [&]() -> std::uint64_t {
      if (comm_.rank() != 0) return 0;
      for (auto const& one : run_->checkpoints()) sequence_ = std::max(sequence_, one.sequence);
      return place.medium->block_bytes(run_->root());
    }), 0);
  }
  CheckpointManager(CheckpointManager const&) = delete;
  CheckpointManager& operator=(CheckpointManager const&) = delete;
  /// Does not wait: a save that is under way goes on, and a failure of it goes to the hook of set_background_error_hook. Local.
  ~CheckpointManager() {
    if (last_ && !last_->waited) last_->save->drop([](Error const& error) { detail::ErrorHook<>::instance()(error); });
  }

  /// Saves `state` as the checkpoint of `step`, which must not be there. `metric`: what keep_best compares; finite.
  Report save(std::int64_t step, StateDict const& state, std::optional<double> metric = {}) {
    return async_save(step, state, metric).wait();
  }
  /// The same behind the program: returns when the state has been copied. Asks the storage nothing, so that the call is not held up by it; that the step is
  /// there already is then an Error of wait().
  Pending async_save(std::int64_t step, StateDict const& state, std::optional<double> metric = {}) {
    auto const begun = detail::SteadyClock::now();
    if (!settle_last(options_.if_busy)) {
      auto skipped = std::make_shared<detail::PendingSave<>>(detail::PendingSave<>{comm_, nullptr, {}, {}, true, nullptr});
      skipped->report.operation = "save", skipped->report.place = run_->place_of_step(step), skipped->report.ranks = comm_.size(), skipped->report.skipped = true;
      return {std::move(skipped), {}};
    }
    detail::CommitWork commit;
    agree(comm_, "save: agree", [&] {
      // A save whose storage never answered still has the memory.
      if (!stage_->free()) stage_ = std::make_shared<detail::Stage<>>(options_.staging_bytes, options_.save.executor);
      if (step < 0) throw Error{ErrorCode::invalid_argument, "step " + std::to_string(step)};
      if (metric && !std::isfinite(*metric)) throw Error{ErrorCode::invalid_argument, "a metric that is no finite number"};
      commit.run = {step, metric.has_value(), metric.value_or(0)};
      commit.drains = next_ != nullptr;
      if (comm_.rank() != 0) return;
      if (next_) {
        sequence_ = std::max(sequence_, next_->newest);
        commit.drain = [next = next_, run = run_](std::function<void()> const& moved) { next->drain(*run, moved); };
      }
      commit.sequence = ++sequence_;
      commit.root = run_->root();
      commit.retention = {options_.keep_last, options_.keep_every, options_.keep_best, options_.best};
    });
    detail::KnownPlace const known{run_->place_of_step(step), block_bytes_};
    last_ = detail::begin_save(comm_, *storage_, where(step), state, detail::settings_of(options_.save), detail::StagerRef::of<T>(), stage_, std::move(commit), options_.events, &cache_, &known);
    last_->report.stall_seconds = std::chrono::duration<double>(detail::SteadyClock::now() - begun).count();
    return {last_, {}};
  }

  /// Loads the checkpoint of `step`. Throws Error(not_found) if there is none.
  Report load(std::int64_t step, StateDict const& state) { return load(step, state, options_.load); }
  Report load(std::int64_t step, StateDict const& state, LoadOptions<S> const& options) {
    return detail::load_state(comm_, *S::open(options.storage), where(step), state, detail::settings_of(options));
  }

  /// The step of the newest checkpoint, by commit; nothing if there is none.
  std::optional<std::int64_t> latest() {
    auto const all = found();
    if (all.empty()) return std::nullopt;
    return all.back().first;
  }
  /// The steps that have a checkpoint, in ascending order.
  std::vector<std::int64_t> steps() {
    std::vector<std::int64_t> steps;
    for (auto const& [step, sequence] : found()) steps.push_back(step);
    std::sort(steps.begin(), steps.end());
    return steps;
  }

  /// Keeps the checkpoint of `step` until it is unpinned, whatever retention says. A step may be pinned before it is saved.
  void pin(std::int64_t step) { change_pins(step, true); }
  void unpin(std::int64_t step) { change_pins(step, false); }

  /// Waits for the save that is under way. Throws what any rank threw.
  void wait() { settle_last(IfBusy::wait); }
  /// Waits for it, but no longer than `time`: whether nothing is under way any more. For the end of a job that was told to go (SIGTERM). A save that is not
  /// complete goes on until the process ends; the checkpoint before it stays. Of a deferred stager's, the copy is made first, and a save whose state has not been
  /// copied by then ends. Throws what any rank threw.
  template <class Rep, class Period>
  bool flush(std::chrono::duration<Rep, Period> time) {
    if (!last_ || last_->waited) return true;
    auto const until = detail::SteadyClock::now() + std::chrono::ceil<std::chrono::milliseconds>(time);
    return last_->wait_until(until);
  }

 private:
  template <class, class>
  friend class Tiered;

  PlaceRef where(std::int64_t step) const { return {run_medium(), run_->place_of_step(step)}; }
  std::shared_ptr<AnyMedium> run_medium() const { return {run_, &run_->medium()}; }

  // False if one is under way and is to be left alone. Throws the failure of one that nobody has waited for.
  bool settle_last(IfBusy if_busy) {
    if (!last_ || last_->waited) return true;
    bool const busy = std::ranges::max(all_gather_value(comm_, static_cast<int>(last_->save->state() == detail::BackgroundSave<>::State::running))) != 0;
    if (busy && if_busy == IfBusy::skip) return false;
    if (busy && if_busy == IfBusy::fail) throw Error{ErrorCode::busy, "a save is still under way"}.with_path(last_->report.place).with_phase("save: agree");
    last_->wait();
    return true;
  }
  std::vector<std::pair<std::int64_t, std::uint64_t>> found() {
    Bytes text = agree(comm_, "manager", [&] {
      ByteWriter out;
      if (comm_.rank() == 0)
        for (auto const& one : run_->checkpoints()) out.number(one.run.step).number(one.sequence);
      return out.take();
    });
    broadcast_bytes(comm_, text, 0);
    std::vector<std::pair<std::int64_t, std::uint64_t>> found;
    for (ByteReader in{text}; !in.done() && in.ok();) {
      auto const step = in.number<std::int64_t>();
      found.emplace_back(step, in.number<std::uint64_t>());
    }
    return found;
  }
  void change_pins(std::int64_t step, bool pinned) {
    agree(comm_, "manager", [&] {
      if (comm_.rank() != 0) return;
      auto steps = run_->pins();
      std::erase(steps, step);
      if (pinned) steps.push_back(step);
      std::sort(steps.begin(), steps.end());
      run_->set_pins(steps);
    });
  }

  CommRef comm_;
  ManagerOptions<S> options_;
  std::unique_ptr<AnyStorage> storage_;
  std::shared_ptr<detail::Stage<>> stage_;
  std::unique_ptr<Lease> lease_;                        // on rank 0
  std::uint64_t sequence_ = 0;                          // on rank 0: of the newest checkpoint, or attempt of one
  std::uint64_t block_bytes_ = 0;
  std::shared_ptr<detail::Run<>> run_;
  std::shared_ptr<detail::NextTier const> next_;
  std::shared_ptr<detail::PendingSave<>> last_;
  detail::PlanCache<> cache_;
};

}  // namespace dcp
