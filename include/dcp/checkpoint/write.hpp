// SPDX-License-Identifier: Apache-2.0
#pragma once
// Moves a rank's part of a state into the files of an attempt. The caller's thread exchanges; a few others gather, checksum and write
// meanwhile, several writes at once.

#include <dcp/base/config.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/checkpoint/exchange.hpp>
#include <dcp/checkpoint/file_writer.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/report.hpp>
#include <dcp/comm/agree.hpp>
#include <dcp/io/aligned_buffer.hpp>
#include <dcp/media/medium.hpp>
#include <dcp/plan/save_plan.hpp>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>

namespace dcp::detail {

template <class = Deferred>
class Writer {
 public:
  Writer(CommRef comm, AnyMedium& medium, std::string directory, SavePlan const& plan, SaveSettings const& settings, Stopwatch& watch)
      : comm_{comm}, plan_{plan}, settings_{settings}, watch_{watch}, files_{medium, std::move(directory), plan.files(), plan.block_bytes(), settings} {}

  /// Writes, syncs and closes everything this rank owns. Collective. Returns the sums of what it wrote.
  std::map<std::string, FileSums> run() {
    Exchange<Writer> exchange{comm_, plan_, Budget::of(settings_.memory_bytes, settings_.threads).round_bytes, watch_, *this};
    exchange.run();
    return agree(comm_, "save: write", [&] {
      watch_.enter("write");
      for (auto const f : plan_.empty_files()) files_.create(f);
      auto sums = files_.finish([&] { alive(); },
                                [&] {
                                  watch_.here().bytes += files_.total_bytes();
                                  watch_.here().operations += files_.writes();
                                  if (settings_.checksums) watch_.note("hash", files_.hashing());
                                  if (settings_.progress) settings_.progress({"write", files_.total_bytes(), files_.total_bytes()});
                                  watch_.enter("sync");
                                });
      watch_.here().operations += files_.open_files();
      return sums;
    });
  }

  // Sink of the exchange.
  void direct(std::uint32_t f, FileRange range) {
    for_each_piece(range, files_.buffer_bytes(), [&](std::uint64_t at, std::uint64_t end) {
      files_.write(f, {at, end}, [this, f, at, held = std::uint64_t{0}](std::uint64_t position, ByteSpan part) mutable {
        held += plan_.gather(f, position, position + part.size(), part.data());
        if (held != position + part.size() - at)
          throw Error{ErrorCode::incomplete, "this rank holds " + std::to_string(held) + " of " + std::to_string(position + part.size() - at) + " bytes that it is to write"};
      });
    });
  }
  std::uint64_t most_bytes() const { return ~std::uint64_t{0}; }
  Staged room(std::uint64_t bytes) const {
    auto const buffer = std::make_shared<AlignedBuffer>(static_cast<std::size_t>(bytes));
    return {buffer->first(bytes), buffer};
  }
  // The budget has room for the segments of two rounds.
  void end_of_round() {
    files_.wait_until([&] { return segments_in_flight_ == 0; }, [&] { alive(); });
  }
  void ready(std::uint32_t f, FileRange range, Staged segment) {
    ++segments_in_flight_;
    ByteSpan const bytes = segment.bytes;
    files_.write(f, range.begin, bytes, [this, owner = std::move(segment.owner)]() mutable {
      owner.reset();
      --segments_in_flight_;
    });
  }

 private:
  // On the caller's thread, while others work.
  void alive() {
    comm_.progress();
    auto const now = Stopwatch::clock::now();
    if (!settings_.progress || now - reported_ < std::chrono::milliseconds{250}) return;
    reported_ = now;
    settings_.progress({"write", files_.done_bytes(), files_.total_bytes()});
  }

  CommRef comm_;
  SavePlan const& plan_;
  SaveSettings const& settings_;
  Stopwatch& watch_;
  Atomic<std::int64_t> segments_in_flight_{0};
  Stopwatch::clock::time_point reported_ = Stopwatch::clock::now();
  FileWriter<> files_;   // last: it ends before what its jobs use
};

}  // namespace dcp::detail
