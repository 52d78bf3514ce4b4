// SPDX-License-Identifier: Apache-2.0
#pragma once
// Transfers in the order of their files and positions, and the question "which of them touch this window of that file".

#include <dcp/base/bytes.hpp>
#include <dcp/base/config.hpp>
#include <dcp/plan/transfer.hpp>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace dcp {

/// [begin, end) of a file, in bytes.
struct FileRange {
  std::uint64_t begin, end;
  std::uint64_t size() const { return end - begin; }
};

/// How gather() copies, unless it is told otherwise.
struct PlainCopy {
  void operator()(std::byte* to, std::byte const* from, std::size_t bytes) const { std::memcpy(to, from, bytes); }
};

class TransferIndex {
 public:
  TransferIndex() = default;
  template <class = Deferred>
  explicit TransferIndex(std::vector<Transfer> transfers) : transfers_{std::move(transfers)} {
    std::erase_if(transfers_, [](Transfer const& t) { return t.begin == t.end; });
    sort();
    extents_.reserve(transfers_.size());
    // Boxes of one tensor interleave in the file, so a transfer may end before one that begins earlier: ends are running maxima.
    for (std::size_t i = 0; i < transfers_.size(); ++i) {
      bool const follows = i > 0 && transfers_[i - 1].file == transfers_[i].file;
      extents_.push_back({transfers_[i].file_begin(), follows ? std::max(extents_.back().end, transfers_[i].file_end()) : transfers_[i].file_end()});
    }
  }

  std::vector<Transfer> const& transfers() const { return transfers_; }
  Transfer const& operator[](std::size_t i) const { return transfers_[i]; }
  std::uint64_t memory_bytes() const { return transfers_.capacity() * sizeof(Transfer) + extents_.capacity() * sizeof(FileRange); }

  /// Calls visit(index, from, to) for the elements of each transfer that *begin* in the window. Windows side by side give every
  /// element exactly once.
  template <class Visit>
  void for_each_in(std::uint32_t file, FileRange window, Visit visit) const {
    for_each_near(file, window, [&](std::uint32_t at) {
      std::int64_t const from = transfers_[at].elements_before(window.begin), to = transfers_[at].elements_before(window.end);
      if (from < to) visit(at, from, to);
    });
  }

  /// The same for the elements that have a byte in the window.
  template <class Visit>
  void for_each_touching(std::uint32_t file, FileRange window, Visit visit) const {
    for_each_near(file, window, [&](std::uint32_t at) {
      std::int64_t const from = first_touching(at, window.begin), to = transfers_[at].elements_before(window.end);
      if (from < to) visit(at, from, to);
    });
  }

  /// Copies the bytes that transfer `at` has in `range` from memory to `out`, at their distance from the begin of the range, with copy(to, from, bytes).
  /// Returns their number.
  template <class Copy>
  std::uint64_t gather(std::uint32_t at, FileRange range, std::byte* out, Copy copy) const {
    std::uint64_t total = 0;
    if (transfers_[at].source != nullptr) return produce(at, range, out);
    transfers_[at].for_each_run(first_touching(at, range.begin), transfers_[at].elements_before(range.end), [&](std::uint64_t position, std::byte const* memory, std::size_t bytes) {
      std::uint64_t const begin = std::max(position, range.begin), end = std::min(position + bytes, range.end);
      if (begin >= end) return;
      copy(out + (begin - range.begin), memory + (begin - position), static_cast<std::size_t>(end - begin));
      total += end - begin;
    });
    return total;
  }

  /// The windows of `bytes` bytes, on the grid, in which a transfer has elements.
  template <class = Deferred>
  std::vector<std::pair<std::uint32_t, FileRange>> windows(std::uint64_t bytes) const {
    std::vector<std::pair<std::uint32_t, FileRange>> result;
    for (auto const& transfer : transfers_)
      for (std::uint64_t at = round_down(transfer.file_begin(), bytes); at < transfer.file_end(); at += bytes)
        if (transfer.elements_before(at) < transfer.elements_before(at + bytes)) result.push_back({transfer.file, {at, at + bytes}});
    std::sort(result.begin(), result.end(), [](auto const& a, auto const& b) { return a.first != b.first ? a.first < b.first : a.second.begin < b.second.begin; });
    result.erase(std::unique(result.begin(), result.end(), [](auto const& a, auto const& b) { return a.first == b.first && a.second.begin == b.second.begin; }), result.end());
    return result;
  }

 private:
  // By file and position. Transfers are large, so their keys are sorted; and plans make them in this order for the most part.
  template <class = Deferred>
  void sort() {
    struct Key {
      std::uint64_t begin;
      std::uint32_t file, index;
      bool operator<(Key const& other) const { return file != other.file ? file < other.file : begin != other.begin ? begin < other.begin : index < other.index; }
    };
    std::vector<Key> keys;
    keys.reserve(transfers_.size());
    for (std::uint32_t i = 0; i < transfers_.size(); ++i) keys.push_back({transfers_[i].file_begin(), transfers_[i].file, i});
    if (std::is_sorted(keys.begin(), keys.end())) return;
    std::sort(keys.begin(), keys.end());
    std::vector<Transfer> sorted;
    sorted.reserve(transfers_.size());
    for (Key const& key : keys) sorted.push_back(transfers_[key.index]);
    transfers_ = std::move(sorted);
  }

  template <class Visit>
  void for_each_near(std::uint32_t file, FileRange window, Visit visit) const {
    auto const first = std::partition_point(transfers_.begin(), transfers_.end(), [&](Transfer const& t) {
      if (t.file != file) return t.file < file;
      return extents_[static_cast<std::size_t>(&t - transfers_.data())].end <= window.begin;
    });
    for (auto at = static_cast<std::size_t>(first - transfers_.begin()); at < transfers_.size() && transfers_[at].file == file && extents_[at].begin < window.end; ++at)
      visit(static_cast<std::uint32_t>(at));
  }
  // What is made for the purpose. An element that the range cuts is made whole. Short runs, which follow each other in the source, are made together.
  template <class = Deferred>
  std::uint64_t produce(std::uint32_t at, FileRange range, std::byte* out) const {
    constexpr std::uint64_t together_bytes = 1 << 20;
    Transfer const& transfer = transfers_[at];
    std::uint64_t const width = bytes_of(transfer.dtype, 1);
    struct Run {
      std::int64_t first;
      std::uint64_t position;
      std::int64_t count;
    };
    std::vector<Run> runs;
    std::int64_t elements = 0;   // of them
    std::uint64_t total = 0;
    Bytes made;
    auto const put = [&] {
      if (runs.empty()) return;
      Run const& only = runs.front();
      bool const direct = runs.size() == 1 && only.position >= range.begin && only.position + bytes_of(transfer.dtype, only.count) <= range.end;
      if (direct) {
        transfer.source->produce(only.first, only.count, out + (only.position - range.begin));
        total += bytes_of(transfer.dtype, only.count);
      } else {
        made.resize(static_cast<std::size_t>(bytes_of(transfer.dtype, elements)));
        transfer.source->produce(only.first, elements, made.data());
        std::byte const* from = made.data();
        for (Run const& run : runs) {
          std::uint64_t const size = bytes_of(transfer.dtype, run.count), begin = std::max(run.position, range.begin), end = std::min(run.position + size, range.end);
          if (begin < end) std::memcpy(out + (begin - range.begin), from + (begin - run.position), static_cast<std::size_t>(end - begin)), total += end - begin;
          from += size;
        }
      }
      runs.clear();
      elements = 0;
    };
    transfer.for_each_numbered_run(first_touching(at, range.begin), transfer.elements_before(range.end), [&](std::int64_t first, std::uint64_t position, std::int64_t count) {
      // Of a long run only what the range has of it.
      if (position < range.begin) {
        std::int64_t const before = static_cast<std::int64_t>((range.begin - position) / width);
        if (before >= count) return;
        first += before, count -= before, position += static_cast<std::uint64_t>(before) * width;
      }
      if (position >= range.end) return;
      count = std::min(count, static_cast<std::int64_t>(ceil_div(range.end - position, width)));
      if (elements > 0 && bytes_of(transfer.dtype, elements + count) > together_bytes) put();
      runs.push_back({first, position, count});
      elements += count;
    });
    put();
    return total;
  }
  // elements_before counts an element that the position cuts as before it; that one touches what follows.
  template <class = Deferred>
  std::int64_t first_touching(std::uint32_t at, std::uint64_t position) const {
    Transfer const& transfer = transfers_[at];
    std::int64_t const element = transfer.elements_before(position);
    if (element <= transfer.begin || element > transfer.end) return element;
    return transfer.position_of(element - 1) + static_cast<std::uint64_t>(bits_of(transfer.dtype)) / 8 > position ? element - 1 : element;
  }

  std::vector<Transfer> transfers_;
  std::vector<FileRange> extents_;
};

}  // namespace dcp
