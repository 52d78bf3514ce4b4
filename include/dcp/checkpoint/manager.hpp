// SPDX-License-Identifier: Apache-2.0
#pragma once
// CheckpointManager: the checkpoints of one training run, each in a directory of its own below a root, by step.
//
//   root/step-00000100        a checkpoint; which step it is of, and which came later, stands in its commit record and not in its name
//   root/step-00000200.dcp-*  one that is being saved or removed, or the wreck of that (root/step-00000200/dcp-*, where directories are not renamed)
//   root/latest               the name of the newest, for people and scripts. The manager itself does not read it
//   root/dcp.pins             steps that retention leaves alone
//
// Order of a save: data durable, commit record, `latest`, retention. So whatever stops it, the newest checkpoint that was committed is there,
// `latest` never names one that is not, and nothing goes before what replaces it has come.

#include <dcp/base/config.hpp>
#include <dcp/checkpoint/async_save.hpp>
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/place.hpp>
#include <dcp/checkpoint/report.hpp>
#include <dcp/formats/json_tree.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace dcp {

/// What a manager does when it is to save while a save is still under way. All ranks do the same.
enum class IfBusy : std::uint8_t {
  wait,   // for that one, first
  fail,   // Error(busy)
  skip,   // nothing is saved, and the report says so
};
enum class Best : std::uint8_t { lowest, highest };

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

inline constexpr std::string_view step_prefix = "step-", latest_name = "latest", pins_name = "dcp.pins", manager_lease_name = "dcp.manager";

struct Retention {
  std::int64_t keep_last = 0, keep_every = 0, keep_best = 0;
  Best best = Best::lowest;
};

/// The checkpoints below a root, as one rank sees them.
template <class = Deferred>
class Run {
 public:
  struct Kept {
    std::string place;      // the directory, or the one that it is on its way to
    RecordRun run;
    std::uint64_t sequence;
  };

  Run(std::shared_ptr<AnyMedium> medium, std::string root) : medium_{std::move(medium)}, root_{std::move(root)} {}

  std::string const& root() const { return root_; }
  AnyMedium& medium() const { return *medium_; }

  std::string place_of_step(std::int64_t step) const {
    std::string const digits = std::to_string(step);
    return root_ + '/' + std::string{step_prefix} + std::string(digits.size() < 8 ? 8 - digits.size() : 0, '0') + digits;
  }

  /// Committed checkpoints of this manager, oldest first. One of a crash between commit and rename is among them.
  std::vector<Kept> checkpoints() const {
    std::vector<Kept> found;
    for (auto const& entry : medium_->list(root_)) {
      if (entry.kind != EntryKind::directory || !entry.name.starts_with(step_prefix)) continue;
      std::optional<CommitRecord> record;
      try {
        record = read_record(*medium_, root_ + '/' + entry.name);
      } catch (Error const& error) {
        if (error.code() == ErrorCode::io) throw;
        continue;   // damaged, or of a newer format: no checkpoint that could be loaded, and not ours to remove
      }
      if (!record || !record->committed || record->run.step < 0) continue;
      std::string const place = root_ + '/' + entry.name.substr(0, entry.name.find(attempt_infix));
      auto const same = std::find_if(found.begin(), found.end(), [&](Kept const& kept) { return kept.place == place; });
      bool const aside = place.size() != root_.size() + 1 + entry.name.size();
      if (same == found.end()) found.push_back({place, record->run, record->sequence});
      else if (!aside || record->sequence > same->sequence) *same = {place, record->run, record->sequence};   // names sort the place itself first
    }
    std::stable_sort(found.begin(), found.end(), [](Kept const& a, Kept const& b) { return a.sequence < b.sequence; });
    return found;
  }

  std::vector<std::int64_t> pins() const {
    std::vector<std::int64_t> steps;
    try {
      auto const tree = JsonTree::parse(read_file(*medium_, root_ + '/' + std::string{pins_name}, 16 << 20), "the list of pinned steps");
      for (auto const& item : tree.root().items()) steps.push_back(item.template number<std::int64_t>());
    } catch (Error const& error) {
      if (error.code() != ErrorCode::missing_file && error.code() != ErrorCode::not_found) throw;
    }
    return steps;
  }
  void set_pins(std::vector<std::int64_t> const& steps) const {
    std::string text = "[";
    for (auto const step : steps) text += (text.size() > 1 ? ", " : "") + std::to_string(step);
    text += "]\n";
    write_file_durably(*medium_, root_, std::string{pins_name}, as_byte_span(text));
  }

  /// Once a checkpoint is in its place: points to it, then removes what retention does not keep. Steps removed.
  std::vector<Kept> settle(Retention const& retention) const {
    auto const all = checkpoints();
    if (all.empty()) return {};
    std::string const name = split_path(all.back().place).second + '\n';
    write_file_durably(*medium_, root_, std::string{latest_name}, as_byte_span(name));
    std::vector<Kept> removed;
    if (retention.keep_last <= 0) return removed;
    auto const pinned = pins();
    std::vector<Kept const*> measured;
    for (auto const& one : all)
      if (one.run.measured) measured.push_back(&one);
    std::stable_sort(measured.begin(), measured.end(), [&](Kept const* a, Kept const* b) { return retention.best == Best::lowest ? a->run.metric < b->run.metric : a->run.metric > b->run.metric; });
    measured.resize(std::min(measured.size(), static_cast<std::size_t>(std::max<std::int64_t>(0, retention.keep_best))));
    for (std::size_t i = 0; i < all.size(); ++i) {
      auto const& one = all[i];
      bool const keep = static_cast<std::int64_t>(all.size() - i) <= retention.keep_last || (retention.keep_every > 0 && one.run.step % retention.keep_every == 0) ||
                        std::find(measured.begin(), measured.end(), &one) != measured.end() || std::find(pinned.begin(), pinned.end(), one.run.step) != pinned.end();
      if (keep) continue;
      retire(one.place);
      removed.push_back(one);
    }
    return removed;
  }

  /// Puts right what crashes have left, where nobody holds the lease of it: a committed checkpoint that was not renamed to its place is, and everything else of our
  /// pattern beside a place goes.
  void clean() const {
    for (auto const& entry : medium_->list(root_)) {
      if (!medium_->renames_directories()) {
        if (entry.kind == EntryKind::directory && entry.name.starts_with(step_prefix)) clean_below(root_ + '/' + entry.name);
        continue;
      }
      auto const infix = entry.name.find(attempt_infix);
      std::uint64_t id = 0;
      if (entry.kind != EntryKind::directory || !entry.name.starts_with(step_prefix) || infix == std::string::npos || !parse_hex16(std::string_view{entry.name}.substr(infix + attempt_infix.size()), id)) continue;
      std::string const path = root_ + '/' + entry.name, place = root_ + '/' + entry.name.substr(0, infix);
      try {
        auto const record = read_record(*medium_, path);
        auto lease = medium_->acquire_lease(path + '/' + std::string{lease_name});
        if (!lease) continue;
        if (!record || !record->committed || look_at(*medium_, place).kind == Occupant::Kind::checkpoint) {
          remove_with_record_first(*medium_, path);
        } else if (medium_->publish_new(path, place)) {
          medium_->sync_directory(root_);
          lease.reset();
          medium_->remove_file(place + '/' + std::string{lease_name});
        }
      } catch (Error const&) {
        // Damaged, or somebody else's turn: no reason to fail.
      }
    }
  }

 private:
  void clean_below(std::string const& place) const {
    try {
      auto const occupant = look_at(*medium_, place);
      clean_attempts(*medium_, place, siblings_of(*medium_, place, occupant.record), occupant);
    } catch (Error const&) {
      // As above.
    }
  }
  // Aside first, so that what a crash leaves of it is known for what it is. A reader keeps the files that it has open, and is told that the rest is gone.
  void retire(std::string const& place) const {
    if (!medium_->renames_directories()) return remove_with_record_first(*medium_, place);
    if (auto const record = read_record(*medium_, place)) {
      std::string const aside = place + std::string{attempt_infix} + record->id;
      if (medium_->publish_new(place, aside)) medium_->sync_directory(root_);
      else remove_with_record_first(*medium_, place);
    }
    for (auto const& sibling : siblings_of(*medium_, place)) remove_with_record_first(*medium_, sibling.path);
  }

  std::shared_ptr<AnyMedium> medium_;
  std::string root_;
};

/// A root, claimed by rank 0 for as long as it has `lease`, and what crashes have left there put right. Collective.
template <class = Deferred>
std::shared_ptr<Run<>> claim_root(CommRef comm, PlaceRef const& place, std::unique_ptr<Lease>& lease) {
  std::string const resolved = agree(comm, "manager", [&]() -> std::string {
    if (comm.rank() != 0) return {};
    place.medium->create_directories(place.path);
    std::string const path = place.medium->resolve_place(place.path + "/step");
    std::string const here = split_path(path).first;
    // That of a manager that was killed may look held for a while.
    for (auto const until = std::chrono::steady_clock::now() + place.medium->lease_life();; std::this_thread::sleep_for(std::chrono::milliseconds{200})) {
      lease = place.medium->acquire_lease(here + '/' + std::string{manager_lease_name});
      if (lease || std::chrono::steady_clock::now() >= until) break;
      comm.progress();
    }
    if (!lease) {
      Error error{ErrorCode::busy, "another CheckpointManager keeps the checkpoints of this directory"};
      throw error.with_path(here).with_hint("one manager per run: give each its own directory, or end the other one first");
    }
    Run<> run{place.medium, here};
    run.clean();
    return here;
  });
  Bytes text;
  append(text, as_byte_span(resolved));
  broadcast_bytes(comm, text, 0);
  return std::make_shared<Run<>>(place.medium, std::string{as_text(text)});
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
/// Memory    one staging area, allocated once and used by all saves
/// Failures  of a save in the background that nobody waited for are thrown by the next save, async_save, wait or flush
/// Example   dcp::CheckpointManager<dcp::SafeTensors> checkpoints{world, "run", {.keep_last = 3, .keep_every = 1000}};
///           if (auto const step = checkpoints.latest()) checkpoints.load(*step, state);
///           for (...) { train(); auto pending = checkpoints.async_save(step, state); }
///           checkpoints.wait();
template <class S>
class CheckpointManager : detail::a_storage<S> {
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
      stage_ = std::make_shared<detail::Stage<>>(options_.staging_bytes, detail::Stages<>::copy_threads());
    });
    run_ = detail::claim_root(comm_, place, lease_);
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
  /// The same behind the program: returns when the state has been copied.
  Pending async_save(std::int64_t step, StateDict const& state, std::optional<double> metric = {}) {
    if (!settle_last(options_.if_busy)) {
      auto skipped = std::make_shared<detail::PendingSave<>>(detail::PendingSave<>{comm_, nullptr, nullptr, {}, {}, true, nullptr});
      skipped->report.operation = "save", skipped->report.place = run_->place_of_step(step), skipped->report.ranks = comm_.size(), skipped->report.skipped = true;
      return {std::move(skipped), {}};
    }
    detail::CommitWork commit;
    agree(comm_, "save: agree", [&] {
      // A save whose storage never answered still has the memory.
      if (last_ && last_->save->state() == detail::BackgroundSave<>::State::running) stage_ = std::make_shared<detail::Stage<>>(options_.staging_bytes, detail::Stages<>::copy_threads());
      if (step < 0) throw Error{ErrorCode::invalid_argument, "step " + std::to_string(step)};
      if (metric && !std::isfinite(*metric)) throw Error{ErrorCode::invalid_argument, "a metric that is no finite number"};
      commit.record.run = {step, metric.has_value(), metric.value_or(0)};
      commit.drains = next_ != nullptr;
      if (comm_.rank() != 0) return;
      std::uint64_t newest = 0;
      for (auto const& one : run_->checkpoints()) newest = std::max(newest, one.sequence);
      if (next_) {
        newest = std::max(newest, next_->newest);
        commit.drain = [next = next_, run = run_](std::function<void()> const& moved) { next->drain(*run, moved); };
      }
      commit.record.sequence = newest + 1;
      commit.after = [run = run_, retention = detail::Retention{options_.keep_last, options_.keep_every, options_.keep_best, options_.best}, events = options_.events] {
        for (auto const& gone : run->settle(retention))
          if (events) events({SaveEvent::Kind::retired, gone.place, gone.run.step, {}});
      };
    });
    last_ = detail::begin_save(comm_, *storage_, where(step), state, detail::settings_of(options_.save), stage_, std::move(commit), options_.events, &cache_);
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
  /// complete goes on until the process ends; the checkpoint before it stays. Throws what any rank threw.
  template <class Rep, class Period>
  bool flush(std::chrono::duration<Rep, Period> time) {
    if (!last_ || last_->waited) return true;
    auto const until = std::chrono::steady_clock::now() + std::chrono::ceil<std::chrono::milliseconds>(time);
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
  std::shared_ptr<detail::Run<>> run_;
  std::shared_ptr<detail::NextTier const> next_;
  std::shared_ptr<detail::PendingSave<>> last_;
  detail::PlanCache<> cache_;
};

}  // namespace dcp
