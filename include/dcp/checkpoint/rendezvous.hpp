// SPDX-License-Identifier: Apache-2.0
#pragma once
// How the ranks of a save in the background meet without a communicator: by small files in the attempt. Every rank tells there that it has
// written and synced its part, or why not; rank 0 reads that, commits, and the others see the outcome.
//
//   done-<rank>     what a rank has written (its checksums and byte counts), or the Error that stopped it
//   alive-<rank>    grows by a byte now and then while a rank works (where files are put as a whole: is put again, longer): whoever waits
//                   for it knows that it is worth waiting
//   failed          the Error that ended the save; written by rank 0
// The outcome "committed" is the commit record, under the place's name. All of these files are gone before that.

#include <dcp/base/algorithms.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/checksum.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/checkpoint/checksums.hpp>
#include <dcp/checkpoint/place.hpp>
#include <dcp/comm/communicator.hpp>
#include <dcp/media/medium.hpp>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp::detail {

/// Sleep that others can end.
class Interruption {
 public:
  enum class Why : std::uint8_t { none, cancelled, followed, settled };

  /// The save is to end, if it still can: `cancelled` because the program says so, `followed` because another rank's part has failed, `settled`
  /// because rank 0 has ended and the caller knows how. The first one counts, and `settled` after any.
  void interrupt(Why why) {
    {
      std::lock_guard const lock{mutex_};
      if (why_ == Why::none) why_ = why;
      settled_ = settled_ || why == Why::settled;
    }
    wake_.notify_all();
  }
  template <class = Deferred>
  Why why() const {
    std::lock_guard const lock{mutex_};
    return why_;
  }
  template <class = Deferred>
  bool settled() const {
    std::lock_guard const lock{mutex_};
    return settled_;
  }
  /// Throws Error(cancelled) when it is interrupted.
  template <class = Deferred>
  void pause(std::chrono::milliseconds time) {
    std::unique_lock lock{mutex_};
    wake_.wait_for(lock, time, [&] { return why_ != Why::none; });
    if (why_ != Why::none) throw Error{ErrorCode::cancelled, why_ == Why::cancelled ? "the save was cancelled" : "another rank's part of the save has failed"};
  }
  /// True when it is settled; a cancellation comes too late here.
  template <class = Deferred>
  bool settled_within(std::chrono::milliseconds time) {
    std::unique_lock lock{mutex_};
    return wake_.wait_for(lock, time, [&] { return settled_; });
  }

 private:
  mutable Mutex mutex_;
  Condition wake_;
  Why why_ = Why::none;
  bool settled_ = false;
};

/// A rank's part of a meeting. Not thread-safe.
template <class = Deferred>
class Rendezvous {
 public:
  using clock = SteadyClock;

  /// `deadline`: how long a rank may give no sign of life
  Rendezvous(AnyMedium& medium, std::string place, std::string id, int rank, int ranks, std::chrono::milliseconds deadline, Interruption& interruption)
      : medium_{medium}, place_{std::move(place)}, id_{std::move(id)}, directory_{attempt_path(medium, place_, id_)}, rank_{rank}, ranks_{ranks}, deadline_{deadline}, most_pause_{medium.renames_directories() ? 100 : 1000}, interruption_{interruption} {}

  std::string const& directory() const { return directory_; }

  /// Of ranks that did not make the attempt: waits until it is there. Throws Error(not_shared) after `visible_within`.
  void wait_for_attempt(std::chrono::milliseconds visible_within) {
    auto const until = clock::now() + visible_within;
    for (auto pause = first_pause;; pause = std::min(2 * pause, most_pause_)) {
      if (auto const failed = failure_told()) throw *failed;
      std::optional<Error> failure;
      try {
        if (auto const record = read_record(medium_, directory_); record && record->id == id_) {
          sequence_ = record->sequence;
          return;
        }
      } catch (Error const& error) {
        failure = error;
      }
      if (clock::now() > until) {
        Error error{ErrorCode::not_shared, "rank " + std::to_string(rank_) + " does not see the directory that rank 0 was to make"};
        error.with_path(directory_).with_hint("every rank must see the same file system at this path; or rank 0 failed, and says why");
        if (failure) error.with_errno(failure->system_error());
        throw error;
      }
      interruption_.pause(pause);
    }
  }

  /// A sign of life, if it is time for one. Never fails: what is wrong shows where it matters.
  void alive() noexcept {
    auto const now = clock::now();
    if (ranks_ == 1 || now - last_sign_ < deadline_ / 8) return;
    last_sign_ = now;
    try {
      std::string const path = directory_ + '/' + std::string{alive_prefix} + std::to_string(rank_);
      auto const file = medium_.open_write(path);
      std::byte const one{1};
      file->write_at(signs_++, {&one, 1});
      file->close();
    } catch (...) {
    }
  }

  /// This rank's part is durable.
  void tell_done(std::map<std::string, FileSums> const& sums) { tell(ByteWriter{}.number(std::uint8_t{1}).block(encode(sums)).take()); }
  /// This rank failed. Never throws: the storage may be what failed, and then silence says so. Nothing is told after "done", which rank 0 may have read: the attempt
  /// may be the checkpoint by now.
  void tell_failed(Error const& error) noexcept {
    if (told_) return;
    try {
      tell(ByteWriter{}.number(std::uint8_t{0}).block(error.encode()).take());
    } catch (...) {
    }
  }

  /// On rank 0, whose own are `all`: the sums of all ranks together. Throws the Error of a rank that failed, Error(rank_failed) for one that gave no sign of life.
  std::map<std::string, FileSums> wait_for_all(std::map<std::string, FileSums> all) {
    std::vector<bool> done(static_cast<std::size_t>(ranks_));
    done[0] = true;
    int missing = ranks_ - 1;
    std::map<int, std::uint64_t> signs;
    auto last_news = clock::now();
    for (auto pause = first_pause; missing > 0; pause = std::min(2 * pause, most_pause_)) {
      bool news = false;
      for (auto const& entry : medium_.list(directory_)) {
        int rank = -1;
        if (entry.kind != EntryKind::file || (!numbered(entry.name, done_prefix, rank) && !numbered(entry.name, alive_prefix, rank)) || rank <= 0 || rank >= ranks_) continue;
        if (entry.name.starts_with(alive_prefix)) {
          news = std::exchange(signs[rank], entry.size) != entry.size || news;
          continue;
        }
        if (done[static_cast<std::size_t>(rank)]) continue;
        add_sums(all, heard(directory_ + '/' + entry.name));
        done[static_cast<std::size_t>(rank)] = true;
        --missing;
        news = true;
      }
      if (missing == 0) break;
      alive();
      if (news) last_news = clock::now(), pause = first_pause;
      if (clock::now() - last_news > deadline_) {
        std::vector<int> silent;
        for (int r = 0; r < ranks_; ++r)
          if (!done[static_cast<std::size_t>(r)]) silent.push_back(r);
        throw Error{ErrorCode::rank_failed, name_ranks(silent) + " did not finish, and gave no sign of life for " + std::to_string(deadline_.count()) + " ms"}.with_path(directory_);
      }
      interruption_.pause(pause);
    }
    return all;
  }
  /// On rank 0, before the commit.
  void clear() {
    for (auto const& entry : medium_.list(directory_)) {
      int rank = -1;
      if (numbered(entry.name, done_prefix, rank) || numbered(entry.name, alive_prefix, rank)) medium_.remove_file(directory_ + '/' + entry.name);
    }
  }

  /// On other ranks: returns when the checkpoint is committed and in its place, or when the outcome is settled elsewhere. Throws the Error
  /// that ended the save. A cancellation comes too late: rank 0 may commit at any time.
  void wait_for_outcome() {
    std::uint64_t signs = 0;
    auto last_news = clock::now();
    for (auto pause = first_pause;; pause = std::min(2 * pause, most_pause_)) {
      if (auto const failure = failure_told()) throw *failure;
      if (in_place()) return;
      bool there = false;
      try {
        for (auto const& entry : medium_.list(directory_)) {
          int rank = -1;
          there = true;
          if (numbered(entry.name, alive_prefix, rank) && rank == 0 && std::exchange(signs, entry.size) != entry.size) last_news = clock::now();
        }
      } catch (Error const& error) {
        if (error.code() != ErrorCode::missing_file && error.code() != ErrorCode::not_found) throw;
      }
      // No sign of life from here on: rank 0 does not wait for this rank any more, and may be committing the directory as it is.
      if (clock::now() - last_news > deadline_)
        throw Error{ErrorCode::rank_failed, there ? "rank 0 did not commit, and gave no sign of life for " + std::to_string(deadline_.count()) + " ms" : std::string{"the attempt was removed by somebody, and is not in its place"}}.with_path(directory_);
      if (interruption_.settled_within(pause)) return;
    }
  }

 private:
  static constexpr std::chrono::milliseconds first_pause{1};

  template <class = Deferred>
  static bool numbered(std::string_view name, std::string_view prefix, int& rank) {
    if (!name.starts_with(prefix)) return false;
    auto const digits = name.substr(prefix.size());
    auto const result = std::from_chars(digits.data(), digits.data() + digits.size(), rank);
    return result.ec == std::errc{} && result.ptr == digits.data() + digits.size();
  }
  void tell(Bytes message) {
    std::uint64_t const crc = crc64(message);
    append(message, std::as_bytes(std::span{&crc, 1}));
    std::string const path = directory_ + '/' + std::string{done_prefix} + std::to_string(rank_), temporary = path + ".tmp";
    if (!medium_.renames_directories()) return static_cast<void>(put_surely(medium_, path, message, {})), static_cast<void>(told_ = true);
    auto const file = medium_.open_write(temporary);
    file->resize(message.size());
    file->write_at(0, message);
    file->sync();
    file->close();
    // From here on rank 0 may act on it, so nothing may fail any more; that the name is durable matters to nobody.
    told_ = true;
    medium_.rename_file(temporary, path);
  }
  // The sums in a message; throws the Error in it.
  std::map<std::string, FileSums> heard(std::string const& path) {
    Bytes const bytes = read_file(medium_, path, most_record_bytes);
    if (bytes.size() < 8 || crc64(ConstByteSpan{bytes}.first(bytes.size() - 8)) != load_little_endian<std::uint64_t>(bytes.data() + bytes.size() - 8))
      throw Error{ErrorCode::corrupt, "what a rank wrote about its part is damaged"}.with_path(path);
    ByteReader in{ConstByteSpan{bytes}.first(bytes.size() - 8)};
    bool const ok = in.number<std::uint8_t>() == 1;
    auto const block = in.block();
    if (!ok) throw Error::decode(block);
    return decode_sums(block);
  }
  std::optional<Error> failure_told() {
    try {
      return Error::decode(read_file(medium_, directory_ + '/' + std::string{failed_name}, most_record_bytes));
    } catch (Error const& error) {
      if (error.code() == ErrorCode::missing_file || error.code() == ErrorCode::not_found) return std::nullopt;
      throw;
    }
  }
  bool in_place() {
    try {
      auto const record = read_record(medium_, place_);
      if (!record || !record->committed) return false;
      // A newer one: this one was there, or failed, and then rank 0 knows.
      return record->id == id_ || (record->sequence > sequence_ && medium_.kind(directory_) == EntryKind::missing);
    } catch (Error const& error) {
      if (error.code() == ErrorCode::io) throw;
      return false;
    }
  }

  AnyMedium& medium_;
  std::string place_, id_, directory_;
  int rank_, ranks_;
  std::chrono::milliseconds deadline_, most_pause_;   // between looks: of an object store each is several requests of every rank
  Interruption& interruption_;
  clock::time_point last_sign_ = clock::now();
  std::uint64_t signs_ = 0;
  bool told_ = false;
  std::uint64_t sequence_ = 0;   // of the attempt
};

}  // namespace dcp::detail
