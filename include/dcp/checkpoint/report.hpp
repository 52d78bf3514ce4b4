// SPDX-License-Identifier: Apache-2.0
#pragma once
// What an operation did: printable, and as fields.

#include <dcp/base/bytes.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/text.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/comm/agree.hpp>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <ostream>
#include <string>
#include <vector>

namespace dcp {

/// One phase of an operation on one rank. Of a save, "hash" is a part of "write": the seconds of all threads that compute checksums, one after the other.
struct PhaseReport {
  double seconds = 0;
  std::uint64_t bytes = 0, operations = 0;
};
struct Phase {
  std::string name;
  std::vector<PhaseReport> ranks;   // of every rank

  template <class = Deferred>
  double longest() const {
    double most = 0;
    for (auto const& r : ranks) most = std::max(most, r.seconds);
    return most;
  }
  template <class = Deferred>
  std::uint64_t bytes() const {
    std::uint64_t sum = 0;
    for (auto const& r : ranks) sum += r.bytes;
    return sum;
  }
  template <class = Deferred>
  std::uint64_t operations() const {
    std::uint64_t sum = 0;
    for (auto const& r : ranks) sum += r.operations;
    return sum;
  }
};

/// The result of save, load, reshard, convert and verify, equal on all ranks.
struct Report {
  std::string operation;                 // "save", "load", "reshard", "convert", "verify"
  std::string place;
  std::string id;                        // of the commit; empty for a foreign checkpoint
  int ranks = 0;
  double seconds = 0;                    // of the slowest rank; of a save in the background, from the call until the rank's part had ended
  std::uint64_t tensors = 0, values = 0; // entries stored or loaded
  std::uint64_t tensor_bytes = 0;        // of them, each element once
  // Of a save in the background.
  double stall_seconds = 0;              // that the call took, on the slowest rank; with the wait for a save before, where it had to wait
  double wait_staged_seconds = 0;        // that wait_staged took, there; with a stager that copies inside the call there is nothing to wait for
  std::string stager;                    // "copy", "deferred"
  bool deferred = false;                 // the call returned before the copy was made
  bool pool_reused = false;              // the staging memory was that of an earlier save
  std::uint64_t staged_bytes = 0;        // copied, on all ranks
  std::vector<std::int64_t> saver_processes;   // of each rank, its dcp-saver; none where threads of the program did it
  bool streamed = false;                 // some rank's part was larger than its staging memory, and had to be written while it was copied
  bool plan_reused = false;              // names, shapes, layouts, memory and options were those of the save before
  bool skipped = false;                  // another save was under way, and this one was not begun
  std::vector<Phase> phases;
  // What a load did that a strict, complete, verified load of the same layout would not.
  std::vector<std::string> cast;         // "name: F32 to BF16"
  std::vector<std::string> decoded;      // "name: fp8_block 128x128 to BF16"
  std::vector<std::string> missing;      // names that kept their value, or became zero
  std::vector<std::string> unexpected;   // names in the checkpoint that were not asked for
  std::vector<std::string> kept;         // names of another shape that kept their value
  std::vector<std::string> duplicates;   // pieces stored twice
  std::vector<std::string> warnings;
  std::uint64_t verified_bytes = 0;      // that were read and whose checksums were compared
  std::uint64_t unverified_bytes = 0;    // that were read and could not be
  std::uint64_t verification_bytes = 0;  // read for no other purpose than that
  std::uint64_t over_read_bytes = 0;     // read because they lie between bytes that were wanted
  bool foreign = false;                  // written by somebody else: nothing to verify against
  std::string options;                   // in effect

  template <class = Deferred>
  friend std::ostream& operator<<(std::ostream& out, Report const& report) {
    auto const number = [](double value) {
      std::array<char, 32> text{};
      std::snprintf(text.data(), text.size(), "%.3f", value);
      return std::string{text.data()};
    };
    out << report.operation << ' ' << report.place << (report.id.empty() ? "" : " (" + report.id + ")") << ": " << report.tensors << (report.tensors == 1 ? " tensor, " : " tensors, ")
        << human_bytes(report.tensor_bytes) << ", " << report.values << (report.values == 1 ? " value, on " : " values, on ") << report.ranks
        << (report.ranks == 1 ? " rank, in " : " ranks, in ") << number(report.seconds) << " s";
    if (report.skipped) out << "\n  skipped: another save was under way";
    if (!report.stager.empty())
      out << "\n  stall     " << number(report.stall_seconds) << " s" << (report.deferred ? " and " + number(report.wait_staged_seconds) + " s in wait_staged" : std::string{}) << ", " << human_bytes(report.staged_bytes) << " copied" << (report.streamed ? "; more than staging memory holds, so that it was written meanwhile" : "") << (report.plan_reused ? "; with the plan of the save before" : "") << (report.saver_processes.empty() ? "" : "; written by dcp-saver");
    for (auto const& phase : report.phases) {
      out << "\n  " << phase.name << std::string(phase.name.size() < 10 ? 10 - phase.name.size() : 1, ' ') << number(phase.longest()) << " s" << (phase.name == "hash" ? " of the threads that write" : "");
      if (phase.bytes() > 0) out << ", " << human_bytes(phase.bytes()) << " in " << phase.operations() << " operations";
    }
    auto const list = [&](char const* what, std::vector<std::string> const& names) {
      if (names.empty()) return;
      out << "\n  " << what << ' ' << names.size() << ": ";
      for (std::size_t i = 0; i < std::min<std::size_t>(names.size(), 8); ++i) out << (i > 0 ? ", " : "") << names[i];
      if (names.size() > 8) out << ", ...";
    };
    list("cast", report.cast);
    list("decoded", report.decoded);
    list("missing", report.missing);
    list("unexpected", report.unexpected);
    list("kept for their shape", report.kept);
    list("stored twice", report.duplicates);
    list("warnings", report.warnings);
    if (report.operation == "load") {
      if (report.foreign) out << "\n  unverified: the checkpoint has no commit record";
      else out << "\n  verified  " << human_bytes(report.verified_bytes) << (report.unverified_bytes > 0 ? ", unverified " + human_bytes(report.unverified_bytes) : "")
               << (report.verification_bytes > 0 ? ", read only for that " + human_bytes(report.verification_bytes) : "");
      if (report.over_read_bytes > 0) out << "\n  over-read " << human_bytes(report.over_read_bytes) << ", between what was wanted";
    }
    return out;
  }
};

namespace detail {

/// Times the phases of an operation on this rank.
class Stopwatch {
 public:
  using clock = SteadyClock;

  template <class = Deferred>
  PhaseReport& enter(std::string name) {
    leave();
    for (std::size_t i = 0; i < names_.size(); ++i)
      if (names_[i] == name) return current_ = i, mine_[i];
    names_.push_back(std::move(name));
    mine_.emplace_back();
    return current_ = names_.size() - 1, mine_.back();
  }
  /// As a message, for a process that reports in another one's name.
  template <class = Deferred>
  Bytes encode() const {
    ByteWriter out;
    for (std::size_t p = 0; p < names_.size(); ++p) out.text(names_[p]).number(mine_[p].seconds).number(mine_[p].bytes).number(mine_[p].operations);
    return out.take();
  }
  template <class = Deferred>
  void decode(ConstByteSpan bytes) {
    for (ByteReader in{bytes}; !in.done() && in.ok();) {
      enter(in.text());
      double const seconds = in.number<double>();
      std::uint64_t const moved = in.number<std::uint64_t>();
      leave();
      mine_.back() = {seconds, moved, in.number<std::uint64_t>()};
    }
  }
  /// What has been measured elsewhere, as a phase beside the one that this rank is in.
  template <class = Deferred>
  void note(std::string name, PhaseReport const& measured) {
    names_.push_back(std::move(name));
    mine_.push_back(measured);
  }
  template <class = Deferred>
  void leave() {
    auto const now = clock::now();
    if (current_ < mine_.size()) mine_[current_].seconds += std::chrono::duration<double>(now - last_).count();
    current_ = static_cast<std::size_t>(-1);
    last_ = now;
  }
  /// When it was made, and when the last phase ended.
  clock::time_point begin() const { return begin_; }
  clock::time_point end() const { return last_; }
  std::string const& phase() const { return names_[current_]; }
  PhaseReport& here() { return mine_[current_]; }

  /// Everyone's times into `report`. Collective; all ranks have entered the same phases.
  template <class = Deferred>
  void collect(CommRef comm, Report& report) {
    leave();
    double const seconds = std::chrono::duration<double>(clock::now() - begin_).count();
    report.ranks = comm.size();
    for (double const one : all_gather_value(comm, seconds)) report.seconds = std::max(report.seconds, one);
    std::vector<PhaseReport> all(mine_.size() * static_cast<std::size_t>(comm.size()));
    if (!mine_.empty()) comm.all_gather(std::as_bytes(std::span{mine_}), std::as_writable_bytes(std::span{all}));
    for (std::size_t p = 0; p < names_.size(); ++p) {
      Phase& phase = report.phases.emplace_back();
      phase.name = names_[p];
      for (std::size_t r = 0; r < static_cast<std::size_t>(comm.size()); ++r) phase.ranks.push_back(all[r * mine_.size() + p]);
    }
  }

 private:
  clock::time_point begin_ = clock::now(), last_ = begin_;
  std::vector<std::string> names_;
  std::vector<PhaseReport> mine_;
  std::size_t current_ = static_cast<std::size_t>(-1);
};

}  // namespace detail
}  // namespace dcp
