// SPDX-License-Identifier: Apache-2.0
#pragma once
// The copy of a state for a save in the background: what this rank will write is gathered into staging memory as it will lie in the files.

#include <dcp/base/checksum.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/checkpoint/background.hpp>
#include <dcp/checkpoint/exchange.hpp>
#include <dcp/checkpoint/file_writer.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/report.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/checkpoint/saver.hpp>
#include <dcp/checkpoint/stager.hpp>
#include <dcp/comm/agree.hpp>
#include <dcp/io/staging_pool.hpp>
#include <dcp/io/stream_copy.hpp>
#include <dcp/io/workers.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace dcp::detail {

/// What saves of one rank in the background use again: staging memory, and the threads that copy into it.
template <class = Deferred>
struct Stage {
  Stage(std::uint64_t staging_bytes, Executor executor, std::uint64_t bytes_of_a_piece = 4 * chunk_bytes)
      : piece_bytes{bytes_of_a_piece}, pool{std::make_shared<StagingPool<>>(staging_bytes, executor == Executor::process ? StagingPool<>::Sharing::with_processes : StagingPool<>::Sharing::own)}, workers{copy_threads()} {}
  std::uint64_t piece_bytes;               // that are copied, and written, at once
  std::shared_ptr<StagingPool<>> pool;
  std::shared_ptr<SaverProcess<>> saver;   // of Executor::process, from the first save on
  Workers<> workers;
  PinnedArea pinned;                       // for copies of what is on devices, by deferred stagers
  bool used = false;                       // by an earlier save

  bool shared() const { return pool->descriptor() >= 0; }
  /// Nobody uses it; a save that hangs may do so long after its end has been reported.
  bool free() const { return pool.use_count() == 1; }
  /// Starts a saver, if there must be one and is none.
  void prepare(std::string const& program) {
    if (!shared()) return;
    std::string const path = find_saver(program);
    if (saver && saver->program() == path && saver->listen(-1, std::chrono::milliseconds{0}, [](SaverWord, ConstByteSpan) {})) return;
    saver.reset();
    saver = std::make_shared<SaverProcess<>>(path, pool->descriptor(), pool->capacity());
  }

 private:
  // As many as helped where it was measured, on two processors: with two, 1 GiB of one rank is copied in 0.059 s, with one in 0.11 s; of two ranks, which then
  // have four, in 0.06 s either way. Where there are more processors there are more ranks beside this one.
  static std::size_t copy_threads() { return std::clamp<std::size_t>(Thread::hardware_concurrency(), 1, 4); }
};

template <class = Deferred>
void check_staging(std::uint64_t bytes) {
  if (bytes == 0) {
    Error error{ErrorCode::unsupported, "nothing can stage this state: a save in the background copies it first, and there is no staging memory"};
    throw error.with_hint("enable it with staging_bytes, of at least " + std::to_string(least_memory_bytes) + " bytes; or use save, which copies nothing");
  }
  if (bytes < least_memory_bytes) throw Error{ErrorCode::budget, "staging memory of " + std::to_string(bytes) + " bytes; at least " + std::to_string(least_memory_bytes) + " are needed"};
}

/// Stages that bare calls of async_save have used, for the next ones.
template <class = Deferred>
class Stages {
 public:
  static std::shared_ptr<Stage<>> take(std::uint64_t staging_bytes, Executor executor) {
    check_staging(staging_bytes);
    auto& all = instance();
    std::lock_guard const lock{all.mutex_};
    for (auto const& stage : all.stages_)
      if (stage.use_count() == 1 && stage->free() && stage->shared() == (executor == Executor::process) && stage->pool->capacity() == round_up(staging_bytes, StagingPool<>::page_bytes)) return stage;
    return all.stages_.emplace_back(std::make_shared<Stage<>>(staging_bytes, executor));
  }

 private:
  static Stages& instance() {
    static auto* const one = new Stages;
    return *one;
  }
  Mutex mutex_;
  std::vector<std::shared_ptr<Stage<>>> stages_;
};

/// One copy of one rank. A sink of the exchange.
///
/// Ends      by itself: when all has been exchanged and copied, the save learns that there is no more to come; when a copy fails, it learns that
template <class = Deferred>
class Staging final : public StagingWork {
 public:
  Staging(CommRef comm, std::shared_ptr<PlannedSave const> planned, std::shared_ptr<PlannedWrites> writes, bool remembered, std::shared_ptr<Stage<>> stage, std::shared_ptr<BackgroundSave<>> save, SaveSettings const& settings, Stopwatch& watch)
      : comm_{comm}, planned_{std::move(planned)}, writes_{std::move(writes)}, plan_{&writes_->plan}, rounds_{remembered ? &writes_->rounds : nullptr}, stage_{std::move(stage)}, save_{std::move(save)}, watch_{watch}, deadline_{settings.deadline} {
    // What a round holds must leave room for what is on its way to the storage.
    round_bytes_ = std::min(Budget::of(settings.memory_bytes, settings.threads).round_bytes, round_down(stage_->pool->capacity() / 4, stage_->piece_bytes));
  }
  /// Puts copies of what is on devices into their streams, if there is memory for all of it. Local; at once.
  void snapshot() {
    std::vector<typename DeviceSnapshot<>::Part> parts;
    for (auto const& transfer : plan_->transfers())
      if (auto* const source = dynamic_cast<DeviceSource<>*>(const_cast<ElementSource*>(transfer.source))) parts.push_back({source, transfer.begin, transfer.end, transfer.bytes()});
    snapshot_ = DeviceSnapshot<>::take(parts, stage_->pool->capacity(), stage_->pinned);
  }
  std::shared_ptr<DeviceSnapshot<>> const& snapshotted() const { return snapshot_; }
  Staging(Staging const&) = delete;
  Staging& operator=(Staging const&) = delete;
  /// Nothing is read any more when it is gone.
  ~Staging() {
    if (complete()) return;
    try {
      auto const failure = std::make_exception_ptr(Error{ErrorCode::cancelled, "the save has failed"});
      stage_->pool->stop(failure);
      save_->staging_ended(failure);
      stage_->workers.finish([] {});
    } catch (...) {
      // What failed is on its way to the caller.
    }
  }

  // StagingWork
  void begin_copies() override {
    if (std::exchange(begun_, true)) return;
    auto const* const known = rounds_ != nullptr && rounds_->known() ? rounds_ : nullptr;
    submit([this, known] { for_each_own_range(*plan_, known, comm_.size(), round_bytes_, [this](std::uint32_t f, FileRange range) { copy(f, range); }); });
  }
  void exchange() override {
    if (std::exchange(exchanged_, true)) return;
    Exchange<Staging>{comm_, *plan_, round_bytes_, watch_, *this}.run(rounds_);
    begun_ = true;
    one_ended();
  }
  void finish_copies() override {
    watch_.enter("stage");
    agree(comm_, "save: stage", [&] {
      stage_->workers.finish([&] {
        comm_.progress();
        check_time();
      });
    });
    watch_.here().bytes += save_->staged_bytes();
    finished_ = true;
  }

  /// Who waits for memory or for copies later than that throws Error(timeout).
  void give_up_at(Stopwatch::clock::time_point until) { until_ = until.time_since_epoch().count(); }

  /// Whether a stager has done all that it must, and everything has been copied. Local.
  bool finished() const { return exchanged_ && finished_; }
  bool complete() const { return open_ == 0; }
  bool exchanged() const { return exchanged_; }

  /// Reads all that will be copied, so that unchanged() can tell. The copy does not end before that.
  template <class = Deferred>
  void remember() {
    remembered_ = digests();
    guarding_ = true;
    ++open_;
  }
  /// Throws Error(changed) with the names of tensors that are not as they were.
  template <class = Deferred>
  void unchanged() {
    if (!std::exchange(guarding_, false)) return;
    auto const now = digests();
    std::vector<std::string> names;
    for (std::size_t t = 0; t < now.size(); ++t)
      if (now[t] != remembered_[t]) names.push_back(planned_->agreed.tensors[plan_->transfers()[t].tensor].name);
    names.erase(std::unique(names.begin(), names.end()), names.end());
    if (names.empty()) return one_ended();
    std::string text;
    for (std::size_t i = 0; i < std::min<std::size_t>(names.size(), 8); ++i) text += (i > 0 ? ", " : "") + names[i];
    Error error{ErrorCode::changed, "changed while it was to be copied: " + text + (names.size() > 8 ? ", ..." : "")};
    throw error.with_hint("with a deferred stager the state must stay as it is until wait_staged() returns");
  }

  // Sink of the exchange.
  void direct(std::uint32_t f, FileRange range) {
    if (!begun_) copy(f, range);
  }
  std::uint64_t most_bytes() const { return stage_->piece_bytes; }
  Staged room(std::uint64_t bytes) {
    return take(bytes, [&] { comm_.progress(); });
  }
  void end_of_round() const {}
  void ready(std::uint32_t f, FileRange range, Staged memory) { save_->stage(f, range.begin, std::move(memory)); }

 private:
  void copy(std::uint32_t f, FileRange range) {
    for_each_piece(range, stage_->piece_bytes, [&](std::uint64_t at, std::uint64_t end) {
      submit([this, f, at, end] {
        Staged memory = take(end - at, [] {});
        std::uint64_t const held = plan_->gather(f, at, end, memory.bytes.data(), [](std::byte* to, std::byte const* from, std::size_t bytes) { stream_copy(to, from, bytes); });
        if (held != end - at) throw Error{ErrorCode::incomplete, "this rank holds " + std::to_string(held) + " of " + std::to_string(end - at) + " bytes that it is to write"}.with_path(plan_->files()[f].path).with_range(at, end);
        save_->stage(f, at, std::move(memory));
      });
    });
  }
  // Memory is short only while the storage is slower than the copy. When it does not answer at all, there is nothing to wait for.
  template <class Meanwhile>
  Staged take(std::uint64_t bytes, Meanwhile meanwhile) {
    std::uint64_t moves = save_->moves();
    auto last = Stopwatch::clock::now();
    return stage_->pool->take(bytes, [&] {
      meanwhile();
      check_time();
      save_->hurry();
      auto const now = Stopwatch::clock::now();
      if (std::exchange(moves, save_->moves()) != moves) last = now;
      if (now - last > deadline_) throw Error{ErrorCode::timeout, "staging memory is full, and nothing has been written for " + std::to_string(deadline_.count()) + " ms: the storage does not answer"};
    });
  }
  void check_time() const {
    if (Stopwatch::clock::now().time_since_epoch().count() > until_) throw Error{ErrorCode::timeout, "the state was not copied in the time that there was for it: the storage takes what is staged too slowly"};
  }
  template <class Job>
  void submit(Job job) {
    ++open_;
    stage_->workers.submit([this, job = std::move(job)](std::size_t) {
      try {
        job();
      } catch (...) {
        save_->staging_ended(std::current_exception());
        throw;
      }
      one_ended();
    });
  }
  void one_ended() {
    if (--open_ > 0) return;
    save_->staged_event();
    save_->staging_ended();
  }
  template <class = Deferred>
  std::vector<std::uint64_t> digests() const {
    std::vector<std::uint64_t> all;
    all.reserve(plan_->transfers().size());
    for (auto const& transfer : plan_->transfers()) {
      std::uint64_t raw = 0;
      if (transfer.source != nullptr && transfer.source->copied()) {
        all.push_back(raw);
        continue;
      }
      if (transfer.source != nullptr) {
        // Made of the state's memory: of what it would be now.
        Bytes made;
        constexpr std::int64_t piece = 64 << 10;
        for (std::int64_t at = transfer.begin; at < transfer.end; at += piece) {
          std::int64_t const count = std::min(piece, transfer.end - at);
          made.resize(static_cast<std::size_t>(bytes_of(transfer.dtype, count)));
          transfer.source->produce(at, count, made.data());
          raw = crc64_raw(made, raw);
        }
        all.push_back(raw);
        continue;
      }
      transfer.for_each_run(transfer.begin, transfer.end, [&](std::uint64_t, std::byte const* memory, std::size_t bytes) { raw = crc64_raw({memory, bytes}, raw); });
      all.push_back(raw);
    }
    return all;
  }

  CommRef comm_;
  std::shared_ptr<PlannedSave const> planned_;
  std::shared_ptr<PlannedWrites> writes_;
  std::shared_ptr<DeviceSnapshot<>> snapshot_;
  SavePlan const* plan_;
  ExchangeRounds* rounds_;   // where they are of use to the next save
  std::shared_ptr<Stage<>> stage_;
  std::shared_ptr<BackgroundSave<>> save_;
  Stopwatch& watch_;
  std::chrono::milliseconds deadline_;
  Atomic<Stopwatch::clock::rep> until_{Stopwatch::clock::time_point::max().time_since_epoch().count()};
  std::uint64_t round_bytes_ = 0;
  bool begun_ = false, exchanged_ = false, finished_ = false, guarding_ = false;
  Atomic<std::uint64_t> open_{1};   // jobs that have not ended, the exchange, the guard
  std::vector<std::uint64_t> remembered_;
};

}  // namespace dcp::detail
