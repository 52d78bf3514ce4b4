// SPDX-License-Identifier: Apache-2.0
#pragma once
// The part of a save that happens behind the program: attempt, writing, commit, publication, for one rank. It gets its bytes in pieces of
// staging memory, uses no communicator, and keeps no reference to anything of the caller's.

#include <dcp/base/config.hpp>
#include <dcp/checkpoint/file_writer.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/place.hpp>
#include <dcp/checkpoint/rendezvous.hpp>
#include <dcp/checkpoint/report.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/io/staging_pool.hpp>
#include <dcp/media/medium.hpp>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace dcp {

/// What a save in the background has reached.
struct SaveEvent {
  enum class Kind : std::uint8_t { staged, written, committed, failed, retired, drained } kind;
  std::string place;      // of the checkpoint
  std::int64_t step = -1; // of a manager's
  std::string error;      // of `failed`
};
/// Called on a thread of the library; `committed`, `retired` and `drained` (Tiered: in place in the far tier) on rank 0 only.
using SaveEventCallback = std::function<void(SaveEvent const&)>;

namespace detail {

/// What rank 0 needs besides for the commit.
struct CommitWork {
  CommitRecord record;
  std::vector<std::pair<std::string, Value>> values;
  std::vector<std::pair<std::string, Bytes>> extra;
  std::function<void()> after;   // once the checkpoint is in its place; a failure of it is a warning
  // Of a save to two tiers: what is done first then, and whose failure is one of the save. It calls what it is given whenever something has moved.
  std::function<void(std::function<void()> const&)> drain;
  bool drains = false;           // on all ranks
};

template <class = Deferred>
class BackgroundSave {
 public:
  struct Job {
    std::shared_ptr<AnyMedium> medium;
    std::string place, id;                          // resolved; of the attempt
    int rank = 0, ranks = 1;
    std::shared_ptr<FilePlan const> files;
    std::vector<std::uint32_t> empty_files;         // that this rank is to create
    std::uint64_t block_bytes = 4096;
    SaveSettings settings;
    std::shared_ptr<StagingPool<>> pool;
    CommitWork commit;                              // on rank 0
    SaveEventCallback events;
  };
  enum class State : std::uint8_t { running, saved, failed };

  explicit BackgroundSave(Job job) : job_{std::move(job)}, step_{job_.commit.record.run.step} {}

  // Of the caller.
  /// A piece of a file that is to be written, from any thread.
  void stage(std::uint32_t f, std::uint64_t position, Staged memory) {
    {
      std::lock_guard const lock{mutex_};
      staged_bytes_ += memory.bytes.size();
      if (closed_) return;   // it has failed, and writes nothing any more
      pieces_.push_back({f, position, std::move(memory)});
    }
    news_.notify_all();
  }
  /// There will be no more pieces. `failure`: because staging failed.
  void staging_ended(std::exception_ptr failure = nullptr) {
    {
      std::lock_guard const lock{mutex_};
      staged_ = true;
      staging_failure_ = std::move(failure);
    }
    news_.notify_all();
  }
  /// Ends it as soon as it can, unless it is committed already. Local.
  void interrupt(Interruption::Why why) {
    interruption_.interrupt(why);
    news_.notify_all();
  }
  /// Whether it was ended because of what another rank did.
  bool was_followed() const { return interruption_.why() == Interruption::Why::followed || interruption_.why() == Interruption::Why::settled; }
  template <class = Deferred>
  State state() const {
    std::lock_guard const lock{mutex_};
    return state_;
  }
  /// Waits until it has ended, or for `time`. Local.
  template <class = Deferred>
  bool wait_for(std::chrono::milliseconds time) const {
    std::unique_lock lock{mutex_};
    return ended_.wait_for(lock, time, [&] { return state_ != State::running; });
  }
  /// After it ended: what stopped it, nothing if it was saved.
  template <class = Deferred>
  std::exception_ptr failure() const {
    std::lock_guard const lock{mutex_};
    return failure_;
  }
  /// After it ended. What is left of a failed attempt goes, now that everyone knows.
  void forget_attempt() {
    if (attempt_) attempt_->abandon();
    attempt_.reset();
  }
  /// Grows whenever something was done: whoever waits sees by it that there is a point in that.
  std::uint64_t moves() const { return moves_; }
  template <class = Deferred>
  std::uint64_t staged_bytes() const {
    std::lock_guard const lock{mutex_};
    return staged_bytes_;
  }
  Stopwatch& watch() { return watch_; }                      // after it ended
  std::vector<std::string> const& warnings() const { return warnings_; }
  std::chrono::milliseconds deadline() const { return job_.settings.deadline; }
  /// The state has been copied.
  void staged_event() { event(SaveEvent::Kind::staged, nullptr); }

  /// Somebody has learnt of a failure, or will.
  void observe() {
    std::lock_guard const lock{mutex_};
    observed_ = true;
  }
  /// Nobody will ask any more. `lost` gets the failure if there is one that nobody has learnt of, now or when it happens.
  void drop(std::function<void(Error const&)> lost) {
    std::exception_ptr failure;
    {
      std::lock_guard const lock{mutex_};
      if (observed_) return;
      if (state_ == State::running) lost_ = lost;
      failure = state_ == State::failed ? failure_ : nullptr;
    }
    if (failure) report_lost(failure, lost);
  }

  /// All of it, on a thread of the library.
  void run() noexcept {
    std::exception_ptr failure;
    try {
      Rendezvous<> meeting{*job_.medium, job_.place, job_.id, job_.rank, job_.ranks, job_.settings.deadline, interruption_};
      try {
        save(meeting);
      } catch (...) {
        failure = std::current_exception();
        job_.pool->stop(failure);   // who stages for this save need not wait for room
        Error const error = current_error().with_rank(job_.rank, job_.ranks).with_phase("save: " + watch_.phase());
        if (job_.rank != 0) meeting.tell_failed(error);
        else if (attempt_ && job_.ranks > 1) attempt_->leave_word(std::string{failed_name}, error.encode());
        else if (attempt_) attempt_->abandon();
        failure = std::make_exception_ptr(error);
      }
    } catch (...) {
      failure = std::current_exception();
    }
    {
      std::lock_guard const lock{mutex_};
      closed_ = true;
      pieces_.clear(), next_ = 0;
    }
    watch_.leave();
    event(failure ? SaveEvent::Kind::failed : SaveEvent::Kind::committed, failure);
    std::function<void(Error const&)> lost;
    {
      std::lock_guard const lock{mutex_};
      failure_ = failure;
      state_ = failure ? State::failed : State::saved;
      if (failure && !observed_) lost = std::exchange(lost_, {});
    }
    ended_.notify_all();
    if (lost) report_lost(failure, lost);
  }

 private:
  struct Piece {
    std::uint32_t file;
    std::uint64_t position;
    Staged memory;
  };

  void save(Rendezvous<>& meeting) {
    AnyMedium& medium = *job_.medium;
    std::vector<PlannedFile> const& files = job_.files->files;
    enter("attempt");
    if (job_.rank == 0) {
      std::vector<std::string> carried;
      for (auto const& [name, bytes] : job_.commit.extra) carried.push_back(name);
      attempt_ = std::make_unique<Attempt<>>(medium, job_.place, job_.settings.if_exists == IfExists::replace, carried, std::move(job_.commit.record), job_.id);
    } else {
      meeting.wait_for_attempt(job_.settings.visible_within);
    }
    // Whoever comes first to a directory below the attempt makes it: nobody waits for anybody here.
    std::vector<bool> ready(files.size());
    auto const make_room_for = [&](std::uint32_t f) {
      if (ready[f]) return;
      ready[f] = true;
      if (auto const below = split_path('/' + files[f].path).first; below != "/") medium.create_directories(meeting.directory() + below);
    };

    enter("write");
    std::map<std::string, FileSums> sums;
    {
      FileWriter<> writer{medium, meeting.directory(), files, job_.block_bytes, job_.settings};
      for (auto const f : job_.empty_files) make_room_for(f), writer.create(f);
      while (auto piece = next_piece([&] {
               meeting.alive();
               writer.wait_until([] { return true; }, [] {});   // throws what a write threw
             })) {
        make_room_for(piece->file);
        writer.write(piece->file, piece->position, piece->memory.bytes, [this, owner = std::move(piece->memory.owner)]() mutable {
          owner.reset();
          ++moves_;
        });
      }
      sums = writer.finish(
          [&] {
            meeting.alive();
            interruption_.pause(std::chrono::milliseconds{0});
          },
          [&] {
            watch_.here().bytes += writer.total_bytes();
            watch_.here().operations += writer.writes();
            enter("sync");
          });
      watch_.here().operations += writer.open_files();
    }
    event(SaveEvent::Kind::written, nullptr);

    enter("meet");
    if (job_.rank != 0) meeting.tell_done(sums);
    else if (job_.ranks > 1) sums = meeting.wait_for_all(std::move(sums)), meeting.clear();
    enter("commit");
    if (job_.rank == 0) {
      interruption_.pause(std::chrono::milliseconds{0});
      commit_attempt(medium, *attempt_, sums, *job_.files, std::move(job_.commit.extra), std::move(job_.commit.values), job_.settings.checksums);
    }
    enter("publish");
    if (job_.rank != 0) {
      meeting.wait_for_outcome();
      if (job_.commit.drains) enter("drain");   // as rank 0, whose work it is
      return;
    }
    attempt_->publish();
    try {
      attempt_->remove_old();
    } catch (Error const& error) {
      warnings_.push_back("the old checkpoint could not be removed: " + error.message());
    }
    attempt_.reset();
    std::exception_ptr not_drained;
    if (job_.commit.drains) {
      enter("drain");
      try {
        job_.commit.drain([this] { ++moves_; });
      } catch (...) {
        not_drained = std::current_exception();
      }
    }
    try {
      if (job_.commit.after) job_.commit.after();
    } catch (...) {
      warnings_.push_back("the checkpoint is in its place; what comes after that failed: " + current_error().message());
    }
    if (not_drained) std::rethrow_exception(not_drained);
  }

  // Nothing at the end of all pieces. Throws what staging threw, Error(cancelled), and what meanwhile() throws.
  template <class Meanwhile>
  std::optional<Piece> next_piece(Meanwhile meanwhile) {
    for (;;) {
      {
        std::unique_lock lock{mutex_};
        news_.wait_for(lock, std::chrono::milliseconds{20}, [&] { return next_ < pieces_.size() || staged_ || interruption_.why() != Interruption::Why::none; });
        if (staging_failure_) std::rethrow_exception(staging_failure_);
        if (next_ < pieces_.size()) {
          Piece piece = std::move(pieces_[next_++]);
          if (next_ == pieces_.size()) pieces_.clear(), next_ = 0;
          return piece;
        }
        if (staged_) return std::nullopt;
      }
      interruption_.pause(std::chrono::milliseconds{0});
      meanwhile();
    }
  }

  void enter(char const* phase) {
    watch_.enter(phase);
    ++moves_;
  }
  void event(SaveEvent::Kind kind, std::exception_ptr const& failure) noexcept {
    if (!job_.events || (kind == SaveEvent::Kind::committed && job_.rank != 0)) return;
    try {
      SaveEvent event{kind, job_.place, step_, {}};
      try {
        if (failure) std::rethrow_exception(failure);
      } catch (...) {
        event.error = current_error().what();
      }
      job_.events(event);
    } catch (...) {
      // It is told, not asked.
    }
  }
  static void report_lost(std::exception_ptr const& failure, std::function<void(Error const&)> const& lost) {
    try {
      std::rethrow_exception(failure);
    } catch (...) {
      try {
        lost(current_error());
      } catch (...) {
        // A hook that throws has nobody to throw to.
      }
    }
  }

  Job job_;
  std::int64_t step_;
  Interruption interruption_;
  mutable std::mutex mutex_;
  mutable std::condition_variable ended_;
  std::condition_variable news_;
  std::vector<Piece> pieces_;
  std::size_t next_ = 0;
  std::uint64_t staged_bytes_ = 0;
  bool staged_ = false, closed_ = false, observed_ = false;
  std::atomic<std::uint64_t> moves_{0};
  std::exception_ptr staging_failure_;
  std::unique_ptr<Attempt<>> attempt_;
  Stopwatch watch_;
  std::vector<std::string> warnings_;
  State state_ = State::running;
  std::exception_ptr failure_;
  std::function<void(Error const&)> lost_;
};

}  // namespace detail
}  // namespace dcp
