// SPDX-License-Identifier: Apache-2.0
#pragma once
// Moves a rank's part of a state into the files of an attempt: what the plan says is shared goes to its owner through the
// communicator, in rounds that a fixed budget bounds; everything else goes from staging buffers straight to its final position. The
// caller's thread exchanges; a few others gather, checksum and write meanwhile, several writes at once.

#include <dcp/base/config.hpp>
#include <dcp/checkpoint/checksums.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/report.hpp>
#include <dcp/comm/agree.hpp>
#include <dcp/io/aligned_buffer.hpp>
#include <dcp/io/workers.hpp>
#include <dcp/media/medium.hpp>
#include <dcp/plan/save_plan.hpp>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
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
class Writer {
 public:
  Writer(CommRef comm, AnyMedium& medium, std::string directory, SavePlan const& plan, SaveSettings const& settings, Stopwatch& watch)
      : comm_{comm}, medium_{medium}, directory_{std::move(directory)}, plan_{plan}, settings_{settings}, budget_{Budget::of(settings.memory_bytes, settings.threads)}, watch_{watch}, windows_{plan.files(), plan.slots(), budget_.round_bytes}, workers_{budget_.threads} {
    files_.resize(plan_.files().size());
    lanes_.resize(workers_.threads());
  }

  /// Writes, syncs and closes everything this rank owns. Collective. Returns the sums of what it wrote.
  std::map<std::string, FileSums> run() {
    exchange();
    agree(comm_, "save: write", [&] {
      watch_.enter("write");
      // A file without bytes has no writer that would create it.
      for (std::uint32_t f = 0; f < plan_.files().size(); ++f)
        if (plan_.files()[f].size == 0 && plan_.owner_of(f, 0) == comm_.rank()) file(f);
      workers_.finish([&] { alive(); });
      for (auto& lane : lanes_)
        while (lane.idle.size() < lane.writes.size()) end_one(lane), alive();
      watch_.here().bytes += total_;
      watch_.here().operations += writes_;
      if (settings_.progress) settings_.progress({"write", total_, total_});
      watch_.enter("sync");
      for (auto& open : files_)
        if (open) workers_.submit([&file = *open](std::size_t) {
          file.sync();
          file.close();
        });
      workers_.finish([&] { comm_.progress(); });
      for (auto const& open : files_) watch_.here().operations += open ? 1 : 0;
    });
    return sums_.take();
  }

 private:
  struct Segment {
    std::uint32_t file;
    FileRange range;
    AlignedBuffer bytes;
    std::vector<FileRange> filled;
  };
  // What one thread has under way.
  struct Lane {
    struct Write {
      AlignedBuffer buffer;
      std::uint32_t file = 0;
      FileRange range{0, 0};
    };
    std::vector<Write> writes;
    std::vector<std::size_t> idle;        // of them
    std::unique_ptr<WriteQueue> queue;    // last: it ends before what it reads
  };

  // On the caller's thread, while others work.
  void alive() {
    comm_.progress();
    auto const now = Stopwatch::clock::now();
    if (!settings_.progress || now - reported_ < std::chrono::milliseconds{250}) return;
    reported_ = now;
    settings_.progress({"write", done_, total_});
  }

  WritableFile& file(std::uint32_t f) {
    std::lock_guard const lock{open_mutex_};
    if (!files_[f]) {
      PlannedFile const& planned = plan_.files()[f];
      files_[f] = medium_.open_blocks(directory_ + '/' + planned.path, plan_.block_bytes(), settings_.direct_io);
      // All writers of a file set the same size, so it does not matter who comes first.
      files_[f]->resize(planned.size);
      sums_.add_empty(planned.path, planned.size);
    }
    return *files_[f];
  }

  // What `fill(position, part)` puts into `bytes` goes to `position` of a file, by `put(file)`. Checksums are of what is written, not of
  // its source, and of small blocks: what was just filled is still in cache.
  template <class Fill, class Put>
  void write(std::uint32_t f, std::uint64_t position, ByteSpan bytes, Fill fill, Put put) {
    constexpr std::uint64_t cached_bytes = 256 << 10;
    PlannedFile const& planned = plan_.files()[f];
    try {
      std::vector<std::pair<std::uint64_t, ChunkSum>> sums;
      for (std::uint64_t at = position; at < position + bytes.size();) {
        std::uint64_t const begin = at, chunk = at / chunk_bytes, end = std::min<std::uint64_t>(position + bytes.size(), (chunk + 1) * chunk_bytes);
        PositionedCrc crc{chunk_size(planned.size, chunk)};
        while (at < end) {
          auto const part = bytes.subspan(static_cast<std::size_t>(at - position), static_cast<std::size_t>(std::min(end, round_down(at, cached_bytes) + cached_bytes) - at));
          fill(at, part);
          if (settings_.checksums) crc.add(at % chunk_bytes, part);
          at += part.size();
        }
        sums.emplace_back(chunk, ChunkSum{crc.contribution(), end - begin});
      }
      sums_.add(planned.path, planned.size, sums);
      put(file(f));
    } catch (Error& error) {
      throw error.with_path(directory_ + '/' + planned.path).with_range(position, position + bytes.size());
    }
  }

  // What the budget has left is for writes beyond the first of each thread, where the medium can have several under way.
  void open(Lane& lane) {
    std::size_t const depth = std::clamp<std::size_t>(static_cast<std::size_t>(settings_.memory_bytes * 3 / 8 / budget_.buffer_bytes) / lanes_.size(), 1, 8);
    if (depth > 1) lane.queue = medium_.open_queue(depth);
    lane.writes.resize(lane.queue ? lane.queue->depth() : 1);
    for (std::size_t id = 0; id < lane.writes.size(); ++id) lane.idle.push_back(id);
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
      throw error.with_path(directory_ + '/' + plan_.files()[write.file].path).with_range(write.range.begin, write.range.end);
    }
  }

  // Rounds. In each, every rank looks ahead as far as the budget carries it; the shortest look decides how far all go.
  void exchange() {
    watch_.enter("exchange");
    std::uint64_t const end = comm_.size() == 1 ? 0 : windows_.size();
    for (std::uint64_t next = 0; next < end;) {
      std::vector<SavePlan::Window> planned;
      std::uint64_t sent = 0, owned = 0, reach = next;
      std::exception_ptr failure;
      try {
        for (; reach < end; ++reach) {
          auto const at = windows_[reach];
          SavePlan::Window window = plan_.window(at.file, at.range.begin, at.range.end);
          std::uint64_t more_sent = 0, more_owned = 0;
          for (auto const& part : window.outgoing) more_sent += part.range.size();
          for (auto const& range : window.gathered) more_owned += range.size();
          if (reach > next && (sent + more_sent > budget_.round_bytes || owned + more_owned > budget_.round_bytes)) break;
          sent += more_sent, owned += more_owned;
          planned.push_back(std::move(window));
          if (reach % 256 == 0) comm_.progress();
        }
      } catch (...) {
        // Nobody goes on without this rank: the round has no windows, and its agreement tells all why.
        failure = std::current_exception();
        reach = next;
      }
      std::uint64_t const horizon = all_reduce_min(comm_, reach);
      planned.resize(static_cast<std::size_t>(horizon - next));
      round(next, planned, failure);
      for (std::size_t w = 0; w < planned.size(); ++w)
        for (auto const& range : planned[w].direct) write_direct(windows_[next + w].file, range);
      next = horizon;
    }
    for (std::uint32_t f = 0; f < plan_.files().size(); ++f)
      if (comm_.size() == 1 || plan_.files()[f].only_rank >= 0) write_direct(f, {0, plan_.files()[f].size});
  }

  void round(std::uint64_t first, std::vector<SavePlan::Window> const& windows, std::exception_ptr const& failure) {
    std::vector<Segment> segments;
    std::vector<Message> outgoing;
    agree(comm_, "save: exchange", [&] {
      if (failure) std::rethrow_exception(failure);
      std::map<std::int64_t, ByteWriter> messages;
      std::map<std::int64_t, std::uint64_t> sizes;
      for (auto const& window : windows)
        for (auto const& part : window.outgoing) sizes[part.owner] += part.range.size() + 24;
      for (auto const& [owner, size] : sizes) messages[owner].reserve(size);
      for (std::size_t w = 0; w < windows.size(); ++w) {
        std::uint32_t const f = windows_[first + w].file;
        for (auto const& part : windows[w].outgoing) {
          auto const run = messages[part.owner].number(f).number(part.range.begin).block_to_fill(part.range.size());
          plan_.gather_transfer(part.transfer, part.range, run.data());
          watch_.here().bytes += run.size();
        }
        for (auto const& range : windows[w].gathered) {
          Segment& segment = segments.emplace_back(Segment{f, range, AlignedBuffer{static_cast<std::size_t>(range.size())}, {}});
          plan_.gather(f, range.begin, range.end, segment.bytes.data());
          plan_.for_each_local_run(f, range.begin, range.end, [&](std::uint32_t, FileRange local) { segment.filled.push_back(local); });
        }
      }
      for (auto& [owner, message] : messages) {
        outgoing.push_back({static_cast<int>(owner), message.take()});
        ++watch_.here().operations;
      }
    });
    auto const incoming = comm_.exchange(std::move(outgoing));
    agree(comm_, "save: exchange", [&] {
      for (auto const& message : incoming)
        for (ByteReader in{message.bytes}; !in.done();) {
          auto const f = in.number<std::uint32_t>();
          auto const begin = in.number<std::uint64_t>();
          auto const run = in.block();
          if (!in.ok()) throw Error{ErrorCode::unknown, "a message with data from rank " + std::to_string(message.rank) + " is damaged"};
          accept(segments, f, begin, run);
        }
      for (auto& segment : segments) require_complete(segment);
      // The budget has room for the segments of two rounds.
      workers_.wait_until([&] { return segments_in_flight_ == 0; }, [&] { alive(); });
      for (auto& segment : segments) {
        ++segments_in_flight_;
        total_ += segment.range.size();
        ++writes_;
        workers_.submit(
            [this, segment = std::make_shared<Segment>(std::move(segment))](std::size_t) mutable {
              auto const bytes = segment->bytes.first(segment->range.size());
              write(segment->file, segment->range.begin, bytes, [](std::uint64_t, ByteSpan) {}, [&](WritableFile& out) { out.write_at(segment->range.begin, bytes); });
              done_ += bytes.size();
              segment.reset();
              --segments_in_flight_;
            },
            true);
      }
    });
  }

  static void accept(std::vector<Segment>& segments, std::uint32_t f, std::uint64_t begin, ConstByteSpan run) {
    // A sender cuts its runs where the owner changes, not where a segment of the owner ends.
    while (!run.empty()) {
      auto const at = std::partition_point(segments.begin(), segments.end(), [&](Segment const& s) { return s.file != f ? s.file < f : s.range.end <= begin; });
      if (at == segments.end() || at->file != f || at->range.begin > begin) throw Error{ErrorCode::incomplete, "data came for bytes that this rank does not own"}.with_range(begin, begin + run.size());
      auto const part = run.first(static_cast<std::size_t>(std::min<std::uint64_t>(run.size(), at->range.end - begin)));
      std::memcpy(at->bytes.data() + (begin - at->range.begin), part.data(), part.size());
      at->filled.push_back({begin, begin + part.size()});
      begin += part.size();
      run = run.subspan(part.size());
    }
  }

  void require_complete(Segment& segment) const {
    std::sort(segment.filled.begin(), segment.filled.end(), [](auto const& a, auto const& b) { return a.begin < b.begin; });
    std::uint64_t at = segment.range.begin;
    for (auto const& run : segment.filled) {
      if (run.begin != at) break;
      at = run.end;
    }
    std::uint64_t sum = 0;
    for (auto const& run : segment.filled) sum += run.size();
    if (at != segment.range.end || sum != segment.range.size())
      throw Error{ErrorCode::incomplete, sum > segment.range.size() ? "two ranks sent the same bytes" : "a part of the bytes came from nobody"}
          .with_path(directory_ + '/' + plan_.files()[segment.file].path)
          .with_range(segment.range.begin, segment.range.end);
  }

  // Blocks that this rank owns and has all bytes of, in pieces on the grid of the buffers, so that a chunk is rarely cut.
  void write_direct(std::uint32_t f, FileRange range) {
    for (std::uint64_t at = range.begin; at < range.end;) {
      std::uint64_t const end = std::min(range.end, round_down(at, budget_.buffer_bytes) + budget_.buffer_bytes);
      total_ += end - at;
      ++writes_;
      workers_.submit([this, f, at, end](std::size_t thread) {
        Lane& lane = lanes_[thread];
        if (lane.writes.empty()) open(lane);
        if (lane.idle.empty()) end_one(lane);
        std::size_t const id = lane.idle.back();
        auto& [buffer, written_file, written_range] = lane.writes[id];
        if (buffer.size() == 0) buffer = AlignedBuffer{static_cast<std::size_t>(budget_.buffer_bytes)};
        written_file = f, written_range = {at, end};
        std::uint64_t held = 0;
        auto const gather = [&](std::uint64_t position, ByteSpan part) {
          held += plan_.gather(f, position, position + part.size(), part.data());
          if (held != position + part.size() - at)
            throw Error{ErrorCode::incomplete, "this rank holds " + std::to_string(held) + " of " + std::to_string(position + part.size() - at) + " bytes that it is to write"};
        };
        ByteSpan const bytes = buffer.first(end - at);
        write(f, at, bytes, gather, [&](WritableFile& out) {
          if (!lane.queue) return out.write_at(at, bytes), static_cast<void>(done_ += bytes.size());
          lane.idle.pop_back();
          lane.queue->begin(out, at, bytes, id);
        });
      });
      at = end;
    }
  }

  CommRef comm_;
  AnyMedium& medium_;
  std::string directory_;
  SavePlan const& plan_;
  SaveSettings const& settings_;
  Budget budget_;
  Stopwatch& watch_;
  std::vector<std::unique_ptr<WritableFile>> files_;
  std::mutex open_mutex_;
  WrittenSums<> sums_;
  SharedWindows windows_;
  std::uint64_t total_ = 0, writes_ = 0;             // handed to the workers
  std::atomic<std::uint64_t> done_{0};
  std::atomic<std::int64_t> segments_in_flight_{0};
  Stopwatch::clock::time_point reported_ = Stopwatch::clock::now();
  std::vector<Lane> lanes_;                          // one per worker
  Workers<> workers_;                                // last: it ends before what its jobs use
};

}  // namespace dcp::detail
