// SPDX-License-Identifier: Apache-2.0
#pragma once
// The part of a save that ranks do together once all is planned: bytes of blocks that another rank owns go to their owner through the
// communicator, in rounds that a fixed budget bounds. What then is to be written, by this rank alone, goes to a sink: straight to the
// files in a save, to staging memory in a save in the background.

#include <dcp/base/config.hpp>
#include <dcp/checkpoint/report.hpp>
#include <dcp/comm/agree.hpp>
#include <dcp/io/aligned_buffer.hpp>
#include <dcp/io/staging_pool.hpp>
#include <dcp/plan/save_plan.hpp>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace dcp::detail {

/// Calls visit(begin, end) for the pieces of `range` between multiples of `grid`, so that a chunk is rarely cut.
template <class Visit>
void for_each_piece(FileRange range, std::uint64_t grid, Visit visit) {
  for (std::uint64_t at = range.begin, end = 0; at < range.end; at = end) {
    end = std::min(range.end, round_down(at, grid) + grid);
    visit(at, end);
  }
}

/// The rounds of an exchange, for the next one with the same plan and the same bytes of a round, which need not plan them again.
class ExchangeRounds {
 public:
  struct Round {
    std::uint64_t first;   // of its windows
    std::vector<SavePlan::Window> windows;
  };

  /// Of all ranks or of none.
  bool known() const { return known_; }
  std::vector<Round> const& all() const { return rounds_; }

  /// Remembers a round, as long as all of them take little memory beside the transfers of `plan`.
  template <class = Deferred>
  void add(SavePlan const& plan, std::uint64_t first, std::vector<SavePlan::Window> windows) noexcept {
    for (auto const& window : windows) ranges_ += window.outgoing.size() + window.direct.size() + window.gathered.size();
    small_ = small_ && ranges_ <= 4 * plan.transfers().size() + 4096;
    try {
      if (small_) rounds_.push_back({first, std::move(windows)});
    } catch (...) {
      small_ = false;   // then they are planned again
    }
  }
  /// There are no more. Collective.
  template <class = Deferred>
  void end(CommRef comm) {
    known_ = all_reduce_min(comm, small_ ? 1 : 0) != 0;
    if (!known_) rounds_ = {};
  }
  /// After a failure, or for another plan.
  void forget() { *this = {}; }

 private:
  std::vector<Round> rounds_;
  std::uint64_t ranges_ = 0;
  bool small_ = true, known_ = false;
};

/// What a rank writes, and how its bytes come together.
struct PlannedWrites {
  SavePlan plan;
  ExchangeRounds rounds{};
};

/// Visits what this rank writes without anybody's help, as Exchange gives it to its sink: visit(file, range). Local.
template <class Visit>
void for_each_own_range(SavePlan const& plan, ExchangeRounds const* known, std::int64_t ranks, std::uint64_t window_bytes, Visit visit) {
  if (ranks > 1) {
    SharedWindows const windows{plan.files(), plan.slots(), window_bytes};
    auto const visit_window = [&](std::uint64_t w, SavePlan::Window const& window) {
      for (auto const& range : window.direct) visit(windows[w].file, range);
    };
    if (known != nullptr) {
      for (auto const& round : known->all())
        for (std::size_t w = 0; w < round.windows.size(); ++w) visit_window(round.first + w, round.windows[w]);
    } else {
      for (std::uint64_t w = 0; w < windows.size(); ++w) visit_window(w, plan.window(windows[w].file, windows[w].range.begin, windows[w].range.end));
    }
  }
  for (std::uint32_t f = 0; f < plan.files().size(); ++f)
    if (ranks == 1 || plan.files()[f].only_rank >= 0) visit(f, FileRange{0, plan.files()[f].size});
}

/// `Sink`:   direct(file, range)            a range of a file that this rank owns and has all bytes of, of any length
///           most_bytes()                   of a segment
///           room(bytes) -> Staged          memory to gather the segments of a round in
///           end_of_round()                 before the segments of a round are handed over
///           ready(file, range, Staged)     a segment that is complete
/// Throws    the same Error on all ranks, whatever fails on one of them
template <class Sink>
class Exchange {
 public:
  Exchange(CommRef comm, SavePlan const& plan, std::uint64_t round_bytes, Stopwatch& watch, Sink& sink)
      : comm_{comm}, plan_{plan}, round_bytes_{round_bytes}, watch_{watch}, sink_{sink}, windows_{plan.files(), plan.slots(), round_bytes} {}

  /// `rounds`: on all ranks of one exchange before, with the same plan and bytes; or they become those of this one. Collective.
  void run(ExchangeRounds* rounds = nullptr) {
    watch_.enter("exchange");
    if (rounds != nullptr && rounds->known()) {
      for (auto const& known : rounds->all()) round(known.first, known.windows, nullptr);
    } else {
      if (rounds != nullptr) rounds->forget();
      plan_and_run(rounds);
      if (rounds != nullptr) rounds->end(comm_);
    }
    for (std::uint32_t f = 0; f < plan_.files().size(); ++f)
      if (comm_.size() == 1 || plan_.files()[f].only_rank >= 0) sink_.direct(f, {0, plan_.files()[f].size});
  }

 private:
  // Rounds. In each, every rank looks ahead as far as the budget carries it; the shortest look decides how far all go.
  void plan_and_run(ExchangeRounds* rounds) {
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
          for (auto const& part : window.outgoing) more_sent += part.range.size() + run_header;
          for (auto const& range : window.gathered) more_owned += room_for(range);
          if (reach > next && (sent + more_sent > round_bytes_ || owned + more_owned > round_bytes_)) break;
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
      if (rounds != nullptr) rounds->add(plan_, next, std::move(planned));
      next = horizon;
    }
  }

  struct Segment {
    std::uint32_t file;
    FileRange range;
    Staged memory;
    std::vector<FileRange> filled;
  };

  // Of a message, which has many runs: enough for the network, and no large allocation in any save.
  static constexpr std::uint64_t message_bytes = std::uint64_t{256} << 10;
  // What stands before a run: file, begin, bytes.
  static constexpr std::uint64_t run_header = sizeof(std::uint32_t) + 2 * sizeof(std::uint64_t);

  // Messages to other ranks, each of message_bytes at most.
  class Outbox {
   public:
    /// So many bytes more will come for `owner`: for what to reserve.
    void expect(std::int64_t owner, std::uint64_t bytes) { to_[owner].expected += bytes; }
    /// Calls fill(range, memory) for the parts of `range`, of `file`, that go to `owner`.
    template <class Fill>
    void add(std::int64_t owner, std::uint32_t file, FileRange range, Fill fill) {
      auto& [expected, message] = to_[owner];
      for (std::uint64_t at = range.begin; at < range.end;) {
        if (message.size() + run_header >= message_bytes) close(owner, message);
        if (message.size() == 0) message.reserve(std::min(expected, message_bytes));
        FileRange const part{at, std::min(range.end, at + message_bytes - run_header - message.size())};
        fill(part, message.number(file).number(part.begin).block_to_fill(part.size()));
        expected -= std::min(expected, part.size() + run_header);
        at = part.end;
      }
    }
    std::vector<Message> take() {
      for (auto& [owner, to] : to_)
        if (to.message.size() > 0) close(owner, to.message);
      return std::move(closed_);
    }

   private:
    struct Open {
      std::uint64_t expected = 0;
      ByteWriter message{};
    };
    void close(std::int64_t owner, ByteWriter& message) { closed_.push_back({static_cast<int>(owner), std::exchange(message, {}).take()}); }

    std::map<std::int64_t, Open> to_;
    std::vector<Message> closed_;
  };

  // Segments begin at pages, which direct writes need. What is cut to most_bytes(), whole pages, takes no more.
  static std::uint64_t room_for(FileRange range) { return round_up(range.size(), std::uint64_t{AlignedBuffer::alignment}); }

  void round(std::uint64_t first, std::vector<SavePlan::Window> const& windows, std::exception_ptr const& failure) {
    std::vector<Segment> segments;
    std::vector<Message> outgoing;
    agree(comm_, "save: exchange", [&] {
      if (failure) std::rethrow_exception(failure);
      Outbox outbox;
      std::uint64_t room = 0;
      for (auto const& window : windows) {
        for (auto const& part : window.outgoing) outbox.expect(part.owner, part.range.size() + run_header);
        for (auto const& range : window.gathered) room += room_for(range);
      }
      // All of a round at once: whoever held some and waited for more could wait for ever.
      Staged const memory = room > 0 ? sink_.room(room) : Staged{};
      std::size_t used = 0;
      for (std::size_t w = 0; w < windows.size(); ++w) {
        std::uint32_t const f = windows_[first + w].file;
        for (auto const& part : windows[w].outgoing) {
          outbox.add(part.owner, f, part.range, [&](FileRange range, ByteSpan run) { plan_.gather_transfer(part.transfer, range, run.data()); });
          watch_.here().bytes += part.range.size();
        }
        for (auto const& range : windows[w].gathered) {
          for (FileRange rest = range; rest.begin < rest.end; rest.begin = segments.back().range.end) {
            FileRange const part{rest.begin, rest.begin + std::min(rest.size(), sink_.most_bytes())};
            Segment& segment = segments.emplace_back(Segment{f, part, {memory.bytes.subspan(used, static_cast<std::size_t>(part.size())), memory.owner}, {}});
            used += static_cast<std::size_t>(room_for(part));
            plan_.gather(f, part.begin, part.end, segment.memory.bytes.data());
            plan_.for_each_local_run(f, part.begin, part.end, [&](std::uint32_t, FileRange local) { segment.filled.push_back(local); });
          }
        }
      }
      outgoing = outbox.take();
      watch_.here().operations += outgoing.size();
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
      sink_.end_of_round();
      for (auto& segment : segments) sink_.ready(segment.file, segment.range, std::move(segment.memory));
    });
    for (std::size_t w = 0; w < windows.size(); ++w)
      for (auto const& range : windows[w].direct) sink_.direct(windows_[first + w].file, range);
  }

  static void accept(std::vector<Segment>& segments, std::uint32_t f, std::uint64_t begin, ConstByteSpan run) {
    // A sender cuts its runs where the owner changes, not where a segment of the owner ends.
    while (!run.empty()) {
      auto const at = std::partition_point(segments.begin(), segments.end(), [&](Segment const& s) { return s.file != f ? s.file < f : s.range.end <= begin; });
      if (at == segments.end() || at->file != f || at->range.begin > begin) throw Error{ErrorCode::incomplete, "data came for bytes that this rank does not own"}.with_range(begin, begin + run.size());
      auto const part = run.first(static_cast<std::size_t>(std::min<std::uint64_t>(run.size(), at->range.end - begin)));
      std::memcpy(at->memory.bytes.data() + (begin - at->range.begin), part.data(), part.size());
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
          .with_path(plan_.files()[segment.file].path)
          .with_range(segment.range.begin, segment.range.end);
  }

  CommRef comm_;
  SavePlan const& plan_;
  std::uint64_t round_bytes_;
  Stopwatch& watch_;
  Sink& sink_;
  SharedWindows windows_;
};

}  // namespace dcp::detail
