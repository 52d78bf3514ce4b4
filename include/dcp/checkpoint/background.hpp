// SPDX-License-Identifier: Apache-2.0
#pragma once
// The part of a save that happens behind the program: attempt, writing, commit, publication, for one rank. It gets its bytes in pieces of
// staging memory, uses no communicator, and keeps no reference to anything of the caller's.

#include <dcp/base/config.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/checkpoint/file_writer.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/place.hpp>
#include <dcp/checkpoint/rendezvous.hpp>
#include <dcp/checkpoint/report.hpp>
#include <dcp/checkpoint/run.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/checkpoint/save_job.hpp>
#include <dcp/checkpoint/saver.hpp>
#include <dcp/io/file.hpp>
#include <dcp/io/io_priority.hpp>
#include <dcp/io/library_thread.hpp>
#include <dcp/io/staging_pool.hpp>
#include <dcp/media/medium.hpp>

#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <sys/eventfd.h>
#include <unistd.h>

namespace dcp::detail {

template <class = Deferred>
class BackgroundSave {
 public:
  enum class State : std::uint8_t { running, saved, failed };

  explicit BackgroundSave(SaveJob job) : job_{std::move(job)}, step_{job_.commit.run.step}, pool_bytes_{job_.pool ? job_.pool->capacity() : 0} {
    if (job_.saver && (wake_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) < 0) throw system_failure(errno, "no descriptor to wake a thread with", "");
  }
  BackgroundSave(BackgroundSave const&) = delete;
  BackgroundSave& operator=(BackgroundSave const&) = delete;
  ~BackgroundSave() {
    if (wake_ >= 0) ::close(wake_);
  }

  // Of the caller.
  /// A piece of a file that is to be written, from any thread.
  void stage(std::uint32_t f, std::uint64_t position, Staged memory) {
    {
      std::lock_guard const lock{mutex_};
      staged_bytes_ += memory.bytes.size();
      if (closed_) return;   // it has failed, and writes nothing any more
      pieces_.push_back({f, position, std::move(memory)});
      if (!may_write()) return;
    }
    wake();
  }
  /// The copy waits for staging memory, or nobody waits for the copy: what has been copied may be written meanwhile.
  void hurry() {
    {
      std::lock_guard const lock{mutex_};
      if (std::exchange(hurried_, true)) return;
    }
    wake();
  }
  /// There will be no more pieces. `failure`: because staging failed, so that the save ends wherever it is; the first one counts.
  void staging_ended(std::exception_ptr failure = nullptr) {
    if (failure) interruption_.interrupt(Interruption::Why::followed);
    {
      std::lock_guard const lock{mutex_};
      staged_ = true;
      if (!staging_failure_ && failure) staging_failure_ = copy_of(failure);
    }
    wake();
  }
  /// Ends it as soon as it can, unless it is committed already. Local.
  void interrupt(Interruption::Why why) {
    interruption_.interrupt(why);
    { std::lock_guard const lock{mutex_}; }   // who has not seen it yet waits by now, and is woken
    wake();
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
  /// Of a save by another process: until nothing of it depends on this one any more, or it has ended. Local. Throws Error(timeout) after the deadline.
  template <class = Deferred>
  void wait_for_hand_over() const {
    std::unique_lock lock{mutex_};
    if (!ended_.wait_for(lock, deadline(), [&] { return handed_over_ || state_ != State::running; }))
      throw Error{ErrorCode::timeout, "dcp-saver (process " + std::to_string(saver_process()) + ") has taken nothing for " + std::to_string(deadline().count()) + " ms"};
  }
  /// After it ended: what stopped it, nothing if it was saved.
  template <class = Deferred>
  std::exception_ptr failure() const {
    std::lock_guard const lock{mutex_};
    return failure_ ? copy_of(failure_) : nullptr;
  }
  /// After it ended. What is left of a failed attempt goes, now that everyone knows.
  void forget_attempt() {
    if (job_.saver) {
      bool forgotten = false;
      job_.saver->say(SaverWord::forget);
      for (auto const until = Stopwatch::clock::now() + std::chrono::seconds{5}; !forgotten && Stopwatch::clock::now() < until;)
        if (!job_.saver->listen(-1, std::chrono::milliseconds{100}, [&](SaverWord word, ConstByteSpan) { forgotten = forgotten || word == SaverWord::forgotten; })) break;
    }
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
  /// Whether the copy was larger than the staging memory.
  bool streamed() const { return staged_bytes() > pool_bytes_; }
  /// The process that does it; 0 for this one.
  std::int64_t saver_process() const { return job_.saver ? job_.saver->pid() : 0; }
  Stopwatch& watch() { return watch_; }                      // after it ended
  std::vector<std::string> const& warnings() const { return warnings_; }
  std::chrono::milliseconds deadline() const { return job_.settings.deadline; }
  /// The state has been copied.
  void staged_event() { event(own_event(SaveEvent::Kind::staged)); }

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
      leave_to_the_copy();
      if (job_.saver) save_elsewhere(*job_.saver);
      else save_here();
    } catch (...) {
      failure = std::current_exception();
      stop_pool(failure);
    }
    {
      std::lock_guard const lock{mutex_};
      closed_ = true;
      pieces_.clear(), next_ = 0;
      if (failure && staging_failure_ && error_of(failure).code() == ErrorCode::cancelled) failure = staging_failure_;
    }
    job_.pool.reset();
    watch_.leave();
    SaveEvent ended = own_event(failure ? SaveEvent::Kind::failed : SaveEvent::Kind::committed);
    if (failure) ended.error = error_of(failure).what();
    event(std::move(ended));
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

  // Who stages for this save need not wait for room any more.
  void stop_pool(std::exception_ptr const& failure) const {
    if (job_.pool) job_.pool->stop(copy_of(failure));
  }
  // With the lock held. Until all has been copied, the processors and the memory belong to the copy, which somebody waits for.
  bool may_write() const { return staged_ || hurried_ || staged_bytes_ > pool_bytes_ / 2; }
  // Not for long: the attempt is rank 0's, and another rank, whose staging memory is full, may need it before it can go on.
  void leave_to_the_copy() {
    std::unique_lock lock{mutex_};
    news_.wait_for(lock, std::chrono::milliseconds{200}, [&] { return may_write() || interruption_.why() != Interruption::Why::none; });
  }
  void wake() {
    news_.notify_all();
    if (wake_ >= 0) ::eventfd_write(wake_, 1);
  }

  void save_here() {
    become_background_thread();
    LowIoPriority<> const priority{job_.settings.low_io_priority};
    Rendezvous<> meeting{*job_.medium, job_.place, job_.id, job_.rank, job_.ranks, job_.settings.deadline, interruption_};
    try {
      save(meeting);
    } catch (...) {
      stop_pool(std::current_exception());
      Error const error = current_error().with_rank(job_.rank, job_.ranks).with_phase("save: " + watch_.phase());
      if (job_.rank != 0) meeting.tell_failed(error);
      else if (attempt_ && job_.ranks > 1) attempt_->leave_word(std::string{failed_name}, error.encode());
      else if (attempt_) attempt_->abandon();
      throw error;
    }
  }

  // Hands everything on, and hears how it goes.
  void save_elsewhere(SaverProcess<>& saver) {
    std::map<std::uint64_t, Staged> away;   // pieces whose memory the other process still needs
    std::uint64_t next = 0;
    bool told_staged = false, ended = false;
    Interruption::Why told = Interruption::Why::none;
    std::optional<Error> failure;
    saver.say(SaverWord::save, encode(job_));
    while (!ended) {
      std::vector<Piece> pieces;
      bool staged = false;
      std::exception_ptr staging_failure;
      {
        std::lock_guard const lock{mutex_};
        if (may_write()) pieces.swap(pieces_);
        staged = staged_, staging_failure = staging_failure_;
      }
      for (auto& piece : pieces) {
        ByteWriter words;
        std::uint64_t const offset = job_.pool->offset_of(piece.memory.bytes), size = piece.memory.bytes.size();
        words.number(piece.file).number(piece.position).number(offset).number(size).number(next);
        saver.say(SaverWord::piece, words.bytes());
        away.emplace(next++, std::move(piece.memory));
      }
      if (staged && !std::exchange(told_staged, true)) saver.say(SaverWord::staged, staging_failure ? error_of(staging_failure).encode() : Bytes{});
      auto const why = interruption_.settled() ? Interruption::Why::settled : interruption_.why();
      if (std::exchange(told, why) != why) saver.say(SaverWord::interrupt, ByteWriter{}.number(why).bytes());
      bool const there = saver.listen(wake_, std::chrono::milliseconds{100}, [&](SaverWord word, ConstByteSpan body) {
        ByteReader in{body};
        switch (word) {
          case SaverWord::returned: away.erase(in.number<std::uint64_t>()), ++moves_; break;
          case SaverWord::moved: moves_ += in.number<std::uint64_t>(); break;
          case SaverWord::event: {
            SaveEvent heard = decode_event(body);
            event(heard.kind == SaveEvent::Kind::retired ? std::move(heard) : own_event(heard.kind));
            break;
          }
          case SaverWord::ended:
            ended = true;
            if (auto const error = in.block(); !error.empty()) failure = Error::decode(error);
            watch_.decode(in.block());
            while (!in.done() && in.ok()) warnings_.push_back(in.text());
            break;
          default: break;
        }
      });
      if (told_staged && !saver.has_unsent()) {
        std::lock_guard const lock{mutex_};
        handed_over_ = true;
        ended_.notify_all();
      }
      eventfd_t woken = 0;
      ::eventfd_read(wake_, &woken);
      if (!there && !ended) throw Error{ErrorCode::rank_failed, "dcp-saver (process " + std::to_string(saver.pid()) + ") " + saver.end() + " before the checkpoint was complete"}.with_rank(job_.rank, job_.ranks).with_path(job_.place);
    }
    if (failure) throw *failure;
  }

  void save(Rendezvous<>& meeting) {
    AnyMedium& medium = *job_.medium;
    std::vector<PlannedFile> const& files = job_.files->files;
    enter("attempt");
    if (job_.rank == 0) {
      std::vector<std::string> carried;
      for (auto const& [name, bytes] : job_.commit.extra) carried.push_back(name);
      attempt_ = std::make_unique<Attempt<>>(medium, job_.place, job_.settings.if_exists == IfExists::replace, carried, job_.commit.record(), job_.id);
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
            if (job_.settings.checksums) watch_.note("hash", writer.hashing());
            enter("sync");
          });
      watch_.here().operations += writer.open_files();
    }
    event(own_event(SaveEvent::Kind::written));

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
      if (!job_.commit.root.empty())
        for (auto const& gone : Run<>{job_.medium, job_.commit.root}.settle(job_.commit.retention)) event({SaveEvent::Kind::retired, gone.place, gone.run.step, {}});
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
        news_.wait_for(lock, std::chrono::milliseconds{20}, [&] { return (next_ < pieces_.size() && may_write()) || staged_ || interruption_.why() != Interruption::Why::none; });
        if (staging_failure_) std::rethrow_exception(staging_failure_);
        if (next_ < pieces_.size() && may_write()) {
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
  void event(SaveEvent event) noexcept {
    if (!job_.events || (event.kind == SaveEvent::Kind::committed && job_.rank != 0)) return;
    try {
      job_.events(event);
    } catch (...) {
      // It is told, not asked.
    }
  }
  SaveEvent own_event(SaveEvent::Kind kind) const { return {kind, job_.place, step_, {}}; }
  // Threads share no exception object: what counts the references to one is not visible to a thread sanitizer.
  static std::exception_ptr copy_of(std::exception_ptr const& failure) { return std::make_exception_ptr(error_of(failure)); }
  static Error error_of(std::exception_ptr const& failure) {
    try {
      std::rethrow_exception(failure);
    } catch (...) {
      return current_error();
    }
  }
  static void report_lost(std::exception_ptr const& failure, std::function<void(Error const&)> const& lost) {
    try {
      lost(error_of(failure));
    } catch (...) {
      // A hook that throws has nobody to throw to.
    }
  }

  SaveJob job_;
  std::int64_t step_;
  std::uint64_t pool_bytes_;
  Interruption interruption_;
  int wake_ = -1;   // for a thread that waits for another process
  mutable Mutex mutex_;
  mutable Condition ended_;
  Condition news_;
  std::vector<Piece> pieces_;
  std::size_t next_ = 0;
  std::uint64_t staged_bytes_ = 0;
  bool staged_ = false, hurried_ = false, handed_over_ = false, closed_ = false, observed_ = false;
  Atomic<std::uint64_t> moves_{0};
  std::exception_ptr staging_failure_;
  std::unique_ptr<Attempt<>> attempt_;
  Stopwatch watch_;
  std::vector<std::string> warnings_;
  State state_ = State::running;
  std::exception_ptr failure_;
  std::function<void(Error const&)> lost_;
};

}  // namespace dcp::detail
