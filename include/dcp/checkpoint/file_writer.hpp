// SPDX-License-Identifier: Apache-2.0
#pragma once
// Writes this rank's blocks of the files of an attempt: several writes at once by a few threads, checksums of what is written, and at the
// end a sync of every file. Knows nothing of other ranks, nor where the bytes come from.

#include <dcp/base/config.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/checkpoint/checksums.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/report.hpp>
#include <dcp/io/aligned_buffer.hpp>
#include <dcp/io/workers.hpp>
#include <dcp/media/medium.hpp>
#include <dcp/plan/save_plan.hpp>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace dcp::detail {

/// How the budget is divided: an eighth each for what a round of the exchange sends and receives (the communicator holds both once
/// more) and for what the round before received and is being written; the rest for the buffers that threads write from.
struct Budget {
  std::uint64_t round_bytes, buffer_bytes;
  std::size_t threads;

  static Budget of(std::uint64_t memory_bytes, int threads) {
    Budget budget{};
    budget.round_bytes = std::max<std::uint64_t>(SavePlan::segment_bytes, round_down(memory_bytes / 8, SavePlan::segment_bytes));
    budget.threads = static_cast<std::size_t>(threads);
    std::uint64_t const rest = memory_bytes * 3 / 8;
    budget.buffer_bytes = std::clamp<std::uint64_t>(round_down(rest / budget.threads, chunk_bytes), chunk_bytes, 4 * chunk_bytes);
    budget.threads = std::clamp<std::size_t>(static_cast<std::size_t>(rest / budget.buffer_bytes), 1, budget.threads);
    return budget;
  }
};

template <class = Deferred>
class FileWriter {
 public:
  /// What a file's bytes come from: fill(position, part) puts the bytes of [position, position + part.size()) into `part`.
  using Fill = std::function<void(std::uint64_t position, ByteSpan part)>;

  FileWriter(AnyMedium& medium, std::string directory, std::vector<PlannedFile> const& files, std::uint64_t block_bytes, SaveSettings const& settings)
      : medium_{medium}, directory_{std::move(directory)}, planned_{files}, block_bytes_{block_bytes}, settings_{settings}, budget_{Budget::of(settings.memory_bytes, settings.threads)}, workers_{budget_.threads} {
    files_.resize(planned_.size());
    lanes_.resize(workers_.threads());
  }

  std::uint64_t buffer_bytes() const { return budget_.buffer_bytes; }

  /// Hands over [range.begin, range.end) of a file, at most buffer_bytes(), to be put into a buffer and written.
  void write(std::uint32_t f, FileRange range, Fill fill) {
    total_ += range.size();
    ++writes_;
    workers_.submit([this, f, range, fill = std::move(fill)](std::size_t thread) {
      Lane& lane = ready_lane(thread);
      std::size_t const id = lane.idle.back();
      auto& buffered = lane.writes[id];
      if (buffered.buffer.size() == 0) buffered.buffer = AlignedBuffer{static_cast<std::size_t>(budget_.buffer_bytes)};
      buffered.file = f, buffered.range = range;
      ByteSpan const bytes = buffered.buffer.first(range.size());
      put(f, range, bytes, fill, [&](WritableFile& out) {
        if (!lane.queue) return out.write_at(range.begin, bytes), static_cast<void>(done_ += bytes.size());
        lane.idle.pop_back();
        lane.queue->begin(out, range.begin, bytes, id);
      });
    });
  }
  /// Hands over bytes that stay where they are until written() is called, on one of the writer's threads; never, if a write fails. They
  /// are written before what waits to be put into buffers.
  void write(std::uint32_t f, std::uint64_t position, ByteSpan bytes, std::function<void()> written) {
    total_ += bytes.size();
    ++writes_;
    workers_.submit(
        [this, f, position, bytes, written = std::move(written)](std::size_t) {
          put(f, {position, position + bytes.size()}, bytes, {}, [&](WritableFile& out) { out.write_at(position, bytes); });
          done_ += bytes.size();
          written();
        },
        true);
  }
  /// A file without bytes, which nobody else would create.
  void create(std::uint32_t f) { file(f); }

  /// Waits until done(), or until nothing is under way. meanwhile() is called now and then, on this thread. Throws what a write threw.
  template <class Done, class Meanwhile>
  void wait_until(Done done, Meanwhile meanwhile) { workers_.wait_until(done, meanwhile); }

  /// Waits for all writes; calls syncing(); syncs and closes all files. Returns the sums of what was written.
  template <class Meanwhile, class Syncing>
  std::map<std::string, FileSums> finish(Meanwhile meanwhile, Syncing syncing) {
    workers_.finish(meanwhile);
    for (auto& lane : lanes_)
      while (lane.idle.size() < lane.writes.size()) end_one(lane), meanwhile();
    syncing();
    for (auto& open : files_)
      if (open) workers_.submit([&file = *open](std::size_t) {
        file.sync();
        file.close();
      });
    workers_.finish(meanwhile);
    return sums_.take();
  }

  std::uint64_t total_bytes() const { return total_; }
  std::uint64_t done_bytes() const { return done_; }
  std::uint64_t writes() const { return writes_; }
  /// What checksums have taken, of all threads together.
  template <class = Deferred>
  PhaseReport hashing() const {
    return {std::chrono::duration<double>(std::chrono::nanoseconds{hashing_.load()}).count(), done_.load(), writes_};
  }
  template <class = Deferred>
  std::uint64_t open_files() const { return static_cast<std::uint64_t>(std::count_if(files_.begin(), files_.end(), [](auto const& file) { return file != nullptr; })); }

 private:
  // What one thread has under way.
  struct Lane {
    struct Buffered {
      AlignedBuffer buffer;
      std::uint32_t file = 0;
      FileRange range{0, 0};
    };
    std::vector<Buffered> writes;
    std::vector<std::size_t> idle;        // of them
    std::unique_ptr<WriteQueue> queue;    // last: it ends before what it reads
  };

  WritableFile& file(std::uint32_t f) {
    std::lock_guard const lock{open_mutex_};
    if (!files_[f]) {
      PlannedFile const& planned = planned_[f];
      files_[f] = medium_.open_blocks(directory_ + '/' + planned.path, block_bytes_, settings_.direct_io);
      // All writers of a file set the same size, so it does not matter who comes first.
      files_[f]->resize(planned.size);
      sums_.add_empty(planned.path, planned.size);
    }
    return *files_[f];
  }

  // Checksums are of what is written, not of its source, and of small blocks: what was just filled is still in cache.
  template <class Put>
  void put(std::uint32_t f, FileRange range, ByteSpan bytes, Fill const& fill, Put put_into) {
    constexpr std::uint64_t cached_bytes = 256 << 10;
    PlannedFile const& planned = planned_[f];
    SteadyClock::duration hashing{};
    try {
      std::vector<std::pair<std::uint64_t, ChunkSum>> sums;
      for (std::uint64_t at = range.begin; at < range.end;) {
        std::uint64_t const begin = at, chunk = at / chunk_bytes, end = std::min<std::uint64_t>(range.end, (chunk + 1) * chunk_bytes);
        PositionedCrc crc{chunk_size(planned.size, chunk)};
        while (at < end) {
          auto const part = bytes.subspan(static_cast<std::size_t>(at - range.begin), static_cast<std::size_t>(std::min(end, round_down(at, cached_bytes) + cached_bytes) - at));
          if (fill) fill(at, part);
          if (settings_.checksums) {
            auto const begun = SteadyClock::now();
            crc.add(at % chunk_bytes, part);
            hashing += SteadyClock::now() - begun;
          }
          at += part.size();
        }
        sums.emplace_back(chunk, ChunkSum{crc.contribution(), end - begin});
      }
      sums_.add(planned.path, planned.size, sums);
      hashing_ += std::chrono::nanoseconds{hashing}.count();
      put_into(file(f));
    } catch (Error& error) {
      throw error.with_path(directory_ + '/' + planned.path).with_range(range.begin, range.end);
    }
  }

  // What the budget has left is for writes beyond the first of each thread, where the medium can have several under way.
  Lane& ready_lane(std::size_t thread) {
    Lane& lane = lanes_[thread];
    if (lane.writes.empty()) {
      std::size_t const depth = std::clamp<std::size_t>(static_cast<std::size_t>(settings_.memory_bytes * 3 / 8 / budget_.buffer_bytes) / lanes_.size(), 1, 8);
      if (depth > 1) lane.queue = medium_.open_queue(depth);
      lane.writes.resize(lane.queue ? lane.queue->depth() : 1);
      for (std::size_t id = 0; id < lane.writes.size(); ++id) lane.idle.push_back(id);
    }
    if (lane.idle.empty()) end_one(lane);
    return lane;
  }
  // Waits for one of the writes of a queue.
  void end_one(Lane& lane) {
    auto const ended = lane.queue->wait();
    auto const& write = lane.writes[ended.id];
    lane.idle.push_back(ended.id);
    done_ += write.range.size();
    if (!ended.failure) return;
    try {
      std::rethrow_exception(ended.failure);
    } catch (Error& error) {
      throw error.with_path(directory_ + '/' + planned_[write.file].path).with_range(write.range.begin, write.range.end);
    }
  }

  AnyMedium& medium_;
  std::string directory_;
  std::vector<PlannedFile> const& planned_;
  std::uint64_t block_bytes_;
  SaveSettings const& settings_;
  Budget budget_;
  std::vector<std::unique_ptr<WritableFile>> files_;
  Mutex open_mutex_;
  WrittenSums<> sums_;
  std::uint64_t total_ = 0, writes_ = 0;   // handed over
  Atomic<std::uint64_t> done_{0};
  Atomic<std::int64_t> hashing_{0};        // nanoseconds
  std::vector<Lane> lanes_;                // one per worker
  Workers<> workers_;                      // last: it ends before what its jobs use
};

}  // namespace dcp::detail
