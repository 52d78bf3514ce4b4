// SPDX-License-Identifier: Apache-2.0
#pragma once
// Moves a rank's part of a state into the files of an attempt: what the plan says is shared goes to its owner through the
// communicator, in rounds that a fixed budget bounds; everything else goes from staging buffers straight to its final position.

#include <dcp/base/config.hpp>
#include <dcp/checkpoint/checksums.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/report.hpp>
#include <dcp/comm/agree.hpp>
#include <dcp/io/aligned_buffer.hpp>
#include <dcp/io/parallel.hpp>
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

/// How the budget is divided: a quarter each for what a round of the exchange sends and receives (the communicator holds both once
/// more), the rest for the buffers that threads write from.
struct Budget {
  std::uint64_t round_bytes, buffer_bytes;
  std::size_t threads;

  static Budget of(std::uint64_t memory_bytes, int threads) {
    Budget budget{};
    budget.round_bytes = std::max<std::uint64_t>(SavePlan::segment_bytes, round_down(memory_bytes / 8, SavePlan::segment_bytes));
    budget.threads = static_cast<std::size_t>(threads);
    std::uint64_t const each = memory_bytes / 2 / budget.threads;
    budget.buffer_bytes = std::clamp<std::uint64_t>(round_down(each, chunk_bytes), chunk_bytes, 8 * chunk_bytes);
    budget.threads = std::clamp<std::size_t>(static_cast<std::size_t>(memory_bytes / 2 / budget.buffer_bytes), 1, budget.threads);
    return budget;
  }
};

template <class = Deferred>
class Writer {
 public:
  Writer(CommRef comm, AnyMedium& medium, std::string directory, SavePlan const& plan, SaveSettings const& settings, Stopwatch& watch)
      : comm_{comm}, medium_{medium}, directory_{std::move(directory)}, plan_{plan}, settings_{settings}, budget_{Budget::of(settings.memory_bytes, settings.threads)}, watch_{watch} {
    files_.resize(plan.files().size());
  }

  /// Writes, syncs and closes everything this rank owns. Collective. Returns the sums of what it wrote.
  std::map<std::string, FileSums> run() {
    exchange();
    agree(comm_, "save: write", [&] {
      watch_.enter("write");
      // A file without bytes has no writer that would create it.
      for (std::uint32_t f = 0; f < plan_.files().size(); ++f)
        if (plan_.files()[f].size == 0 && plan_.owner_of(f, 0) == comm_.rank()) file(f);
      write_direct();
      watch_.enter("sync");
      for (auto& open : files_) {
        if (!open) continue;
        open->sync();
        open->close();
        ++watch_.here().operations;
        comm_.progress();
      }
    });
    return sums_.take();
  }

 private:
  struct Segment {
    std::uint32_t file;
    FileRange range;
    Bytes bytes;
    std::vector<FileRange> filled;
  };
  struct DirectRange {
    std::uint32_t file;
    FileRange range;
  };
  // One window of one file; windows of shared files are numbered in the same way on all ranks.
  struct WindowAt {
    std::uint32_t file;
    FileRange range;
  };

  WritableFile& file(std::uint32_t f) {
    std::lock_guard const lock{open_mutex_};
    if (!files_[f]) {
      PlannedFile const& planned = plan_.files()[f];
      files_[f] = medium_.open_write(directory_ + '/' + planned.path);
      // All writers of a file set the same size, so it does not matter who comes first.
      files_[f]->resize(planned.size);
      sums_.add_empty(planned.path, planned.size);
    }
    return *files_[f];
  }

  void write(std::uint32_t f, std::uint64_t position, ConstByteSpan bytes) {
    PlannedFile const& planned = plan_.files()[f];
    try {
      sums_.add(planned.path, planned.size, position, bytes);
      file(f).write_at(position, bytes);
    } catch (Error& error) {
      throw error.with_path(directory_ + '/' + planned.path).with_range(position, position + bytes.size());
    }
  }

  // Windows of the files that ranks share, `round_bytes` of file each, counted through. Files of one rank need no exchange.
  void number_windows() {
    for (std::uint32_t f = 0; f < plan_.files().size(); ++f) {
      window_base_.push_back(windows_);
      if (plan_.files()[f].only_rank < 0) windows_ += ceil_div(plan_.files()[f].size, budget_.round_bytes);
    }
  }
  WindowAt window_at(std::uint64_t number) const {
    auto const at = std::upper_bound(window_base_.begin(), window_base_.end(), number) - window_base_.begin() - 1;
    auto const f = static_cast<std::uint32_t>(at);
    std::uint64_t const begin = (number - window_base_[f]) * budget_.round_bytes;
    return {f, {begin, std::min(begin + budget_.round_bytes, plan_.files()[f].size)}};
  }

  // Rounds. In each, every rank looks ahead as far as the budget carries it; the shortest look decides how far all go.
  void exchange() {
    watch_.enter("exchange");
    number_windows();
    std::uint64_t const end = comm_.size() == 1 ? 0 : windows_;
    for (std::uint64_t next = 0; next < end;) {
      std::vector<SavePlan::Window> planned;
      std::uint64_t sent = 0, owned = 0, reach = next;
      std::exception_ptr failure;
      try {
        for (; reach < end; ++reach) {
          WindowAt const at = window_at(reach);
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
        for (auto const& range : planned[w].direct) direct_.push_back({window_at(next + w).file, range});
      next = horizon;
    }
    if (comm_.size() == 1) {
      for (std::uint32_t f = 0; f < plan_.files().size(); ++f) direct_of_file(f);
    } else {
      for (std::uint32_t f = 0; f < plan_.files().size(); ++f)
        if (plan_.files()[f].only_rank >= 0) direct_of_file(f);
    }
  }
  void direct_of_file(std::uint32_t f) {
    std::uint64_t const size = plan_.files()[f].size;
    if (size > 0) direct_.push_back({f, {0, size}});
  }

  void round(std::uint64_t first, std::vector<SavePlan::Window> const& windows, std::exception_ptr const& failure) {
    std::vector<Segment> segments;
    std::vector<Message> outgoing;
    agree(comm_, "save: exchange", [&] {
      if (failure) std::rethrow_exception(failure);
      std::map<std::int64_t, ByteWriter> messages;
      Bytes run;
      for (std::size_t w = 0; w < windows.size(); ++w) {
        std::uint32_t const f = window_at(first + w).file;
        for (auto const& part : windows[w].outgoing) {
          run.resize(static_cast<std::size_t>(part.range.size()));
          plan_.gather_transfer(part.transfer, part.range, run.data());
          messages[part.owner].number(f).number(part.range.begin).block(run);
          watch_.here().bytes += run.size();
        }
        for (auto const& range : windows[w].gathered) {
          Segment& segment = segments.emplace_back(Segment{f, range, Bytes(static_cast<std::size_t>(range.size())), {}});
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
      for (auto& segment : segments) {
        require_complete(segment);
        write(segment.file, segment.range.begin, segment.bytes);
        comm_.progress();
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

  void write_direct() {
    // Pieces on the grid of the buffer size, so that a chunk is rarely cut.
    std::vector<DirectRange> pieces;
    std::uint64_t total = 0;
    for (auto const& direct : direct_)
      for (std::uint64_t at = direct.range.begin; at < direct.range.end;) {
        std::uint64_t const end = std::min(direct.range.end, round_down(at, budget_.buffer_bytes) + budget_.buffer_bytes);
        if (!pieces.empty() && pieces.back().file == direct.file && pieces.back().range.end == at && at % budget_.buffer_bytes != 0) pieces.back().range.end = end;
        else pieces.push_back({direct.file, {at, end}});
        total += end - at;
        at = end;
      }
    std::vector<std::optional<AlignedBuffer>> buffers(budget_.threads);
    std::atomic<std::uint64_t> done{0};
    auto reported = Stopwatch::clock::now();
    parallel_for(
        budget_.threads, pieces.size(),
        [&](std::size_t thread, std::size_t item) {
          auto const& [f, range] = pieces[item];
          if (!buffers[thread]) buffers[thread].emplace(static_cast<std::size_t>(budget_.buffer_bytes));
          auto const bytes = buffers[thread]->first(range.size());
          if (std::uint64_t const held = plan_.gather(f, range.begin, range.end, bytes.data()); held != range.size())
            throw Error{ErrorCode::incomplete, "this rank holds " + std::to_string(held) + " of the bytes that it is to write"}.with_path(directory_ + '/' + plan_.files()[f].path).with_range(range.begin, range.end);
          write(f, range.begin, bytes);
          done += bytes.size();
        },
        [&] {
          comm_.progress();
          auto const now = Stopwatch::clock::now();
          if (settings_.progress && now - reported > std::chrono::milliseconds{250}) {
            reported = now;
            settings_.progress({"write", done, total});
          }
        });
    watch_.here().bytes += total;
    watch_.here().operations += pieces.size();
    if (settings_.progress) settings_.progress({"write", total, total});
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
  std::vector<std::uint64_t> window_base_;
  std::uint64_t windows_ = 0;
  std::vector<DirectRange> direct_;
};

}  // namespace dcp::detail
