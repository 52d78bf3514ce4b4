// SPDX-License-Identifier: Apache-2.0
#pragma once
// Flat buffers: tensors flattened and laid one behind the other, cut into one range per rank without regard to where tensors begin,
// as ZeRO and Megatron's distributed optimizer hold optimizer state. From offsets and cuts every rank derives every rank's elements.

#include <dcp/base/checksum.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/error.hpp>
#include <dcp/core/shape.hpp>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace dcp {

/// Elements [begin, end) of something flat.
struct FlatRange {
  std::int64_t begin = 0, end = 0;
  constexpr std::int64_t size() const { return end - begin; }
  friend constexpr bool operator==(FlatRange const&, FlatRange const&) = default;
};

namespace detail {

// One list of ranges for all tensors of a bucket, in every layout that speaks of them: shared, never changed. A std::shared_ptr would
// do, but for layouts in constant expressions (which have none).
class SharedRanges {
 public:
  constexpr SharedRanges() = default;
  template <class = Deferred>
  explicit SharedRanges(std::vector<FlatRange> ranges) : held_{new Held{std::move(ranges), {}, 0, {1}}} {
    for (std::uint32_t i = 0; i < held_->ranges.size(); ++i)
      if (held_->ranges[i].begin != held_->ranges[i].end) held_->order.push_back(i);
    std::sort(held_->order.begin(), held_->order.end(), [&](std::uint32_t a, std::uint32_t b) { return held_->ranges[a].begin < held_->ranges[b].begin; });
    ByteWriter bytes;
    for (auto const& range : held_->ranges) bytes.number(range.begin).number(range.end);
    held_->digest = crc64(bytes.bytes());
  }
  constexpr SharedRanges(SharedRanges const& other) : held_{other.held_} {
    if (held_ != nullptr) keep(held_);
  }
  constexpr SharedRanges(SharedRanges&& other) noexcept : held_{std::exchange(other.held_, nullptr)} {}
  constexpr SharedRanges& operator=(SharedRanges other) noexcept {
    std::swap(held_, other.held_);
    return *this;
  }
  constexpr ~SharedRanges() {
    if (held_ != nullptr) drop(held_);
  }

  constexpr explicit operator bool() const { return held_ != nullptr; }
  std::vector<FlatRange> const& by_coordinate() const { return held_->ranges; }
  std::vector<std::uint32_t> const& in_order() const { return held_->order; }   // coordinates by their ranges, empty ones left out
  constexpr std::uint64_t digest() const { return held_ == nullptr ? 0 : held_->digest; }
  friend constexpr bool operator==(SharedRanges const& a, SharedRanges const& b) {
    return a.held_ == b.held_ || (a.held_ != nullptr && b.held_ != nullptr && a.held_->ranges == b.held_->ranges);
  }

 private:
  struct Held {
    std::vector<FlatRange> ranges;
    std::vector<std::uint32_t> order;
    std::uint64_t digest;
    std::atomic<std::int64_t> owners;
  };
  static void keep(Held* held) { held->owners.fetch_add(1, std::memory_order_relaxed); }
  static void drop(Held* held) {
    if (held->owners.fetch_sub(1, std::memory_order_acq_rel) == 1) delete held;
  }
  Held* held_ = nullptr;
};

}  // namespace detail

/// Where a tensor lies in a flat buffer, and how the buffer is cut; in elements. Handed out by FlatBucket. The default is a tensor that
/// lies in no buffer: split by itself, ceil(elements / ranks) each.
struct FlatSlot {
  std::int64_t offset = 0;        // of the tensor's first element in the buffer
  std::int64_t elements = 0;      // of the tensor as it lies there: after the Shard rules of other axes, padding included
  std::int64_t ranks = 0;         // that the buffer is cut for; 0: no buffer
  std::int64_t shard = 0;         // of the buffer, to each of them; 0: as `ranges` say
  detail::SharedRanges ranges{};  // of the buffer, by coordinate of the flat axis

  constexpr bool in_bucket() const { return ranks > 0; }

  /// The part of the buffer that coordinate `at` of `extent` holds: of the tensor's own `count` elements if it lies in no buffer.
  constexpr FlatRange range_of(std::int64_t at, std::int64_t extent, std::int64_t count) const {
    if (ranges) return ranges.by_coordinate()[static_cast<std::size_t>(at)];
    if (shard > 0) return {at * shard, (at + 1) * shard};
    std::int64_t const part = ceil_div(count, extent);
    return {std::min(count, at * part), std::min(count, (at + 1) * part)};
  }
  /// The coordinate that holds element `element` of the tensor.
  constexpr std::int64_t coordinate_of(std::int64_t element, std::int64_t extent, std::int64_t count) const {
    if (shard > 0) return (offset + element) / shard;
    if (!ranges) return element / std::max<std::int64_t>(1, ceil_div(count, extent));
    auto const& order = ranges.in_order();
    auto const& list = ranges.by_coordinate();
    auto const behind = std::partition_point(order.begin(), order.end(), [&](std::uint32_t c) { return list[c].end <= offset + element; });
    return static_cast<std::int64_t>(*behind);
  }
  /// The coordinates [first, last] outside of which nobody holds an element of the tensor; all, where ranges come in any order.
  constexpr std::pair<std::int64_t, std::int64_t> coordinates(std::int64_t extent) const {
    if (shard == 0 || elements == 0) return {0, extent - 1};
    return {offset / shard, (offset + elements - 1) / shard};
  }

  friend constexpr bool operator==(FlatSlot const&, FlatSlot const&) = default;
};

/// Tensors flattened and concatenated: each begins at a multiple of `alignment` elements, the end is padded, and each of `ranks` ranks
/// holds one contiguous shard.
///
/// Shapes    of each tensor as it lies in the buffer: a rank's part after tensor parallelism, the same on every rank. In the order of
///           the buffer (Megatron fills its buffers from the last parameter to the first)
/// Size      the end is padded so that every shard is a multiple of `alignment`; with `multiple`, to the least common multiple of
///           `ranks` and `multiple`. ZeRO stages 1 and 2: alignment 1, multiple 2 * ranks. Megatron: alignment 64, multiple 128
/// Throws    Error(invalid_argument) for an alignment, multiple or number of ranks below 1, Error(overflow) beyond 2^63 elements
/// Example   dcp::FlatBucket bucket{{{4096, 1024}, {1024}}, 64, mesh.size(0)};
///           std::vector<float> moments(bucket.shard_elements());
///           dcp::ShardedTensor<float, dcp::Placement<dcp::FlatShard>> w{mesh, {4096, 1024}, bucket[0], moments}, b{mesh, {1024}, bucket[1], moments};
class FlatBucket {
 public:
  template <class = Deferred>
  FlatBucket(std::vector<Extents> const& shapes, std::int64_t alignment, std::int64_t ranks, std::int64_t multiple = 0) : ranks_{ranks} {
    if (alignment < 1 || ranks < 1 || multiple < 0)
      throw Error{ErrorCode::invalid_argument, "a flat bucket of alignment " + std::to_string(alignment) + " for " + std::to_string(ranks) + " ranks, padded to a multiple of " + std::to_string(multiple)};
    lay_out(shapes, alignment);
    std::int64_t const step = multiple == 0 ? alignment * ranks : std::lcm(multiple, ranks);
    std::int64_t const size = ceil_div(end_, step) * step;
    if (step < 1 || size < end_) throw too_large();
    shard_ = size / ranks;
    for (auto& slot : slots_) slot.ranks = ranks, slot.shard = shard_;
  }
  /// Cut as `ranges` say: one per rank of the flat axis, in any order. Each element of each tensor lies in exactly one.
  ///
  /// Throws    Error(incomplete) naming what nobody or two ranks hold
  template <class = Deferred>
  FlatBucket(std::vector<Extents> const& shapes, std::int64_t alignment, std::vector<FlatRange> ranges) : ranks_{static_cast<std::int64_t>(ranges.size())} {
    if (alignment < 1 || ranges.empty()) throw Error{ErrorCode::invalid_argument, "a flat bucket of alignment " + std::to_string(alignment) + " for " + std::to_string(ranges.size()) + " ranks"};
    lay_out(shapes, alignment);
    ranges_ = detail::SharedRanges{std::move(ranges)};
    require_cover();
    for (auto& slot : slots_) slot.ranks = ranks_, slot.ranges = ranges_;
  }

  std::size_t size() const { return slots_.size(); }
  /// Tensor `i` of the bucket.
  FlatSlot const& operator[](std::size_t i) const { return slots_.at(i); }
  /// Elements of the whole buffer, padding at its end included; where ranges were given, up to the end of the last tensor.
  std::int64_t elements() const { return ranges_ ? end_ : shard_ * ranks_; }
  /// Elements of each rank's shard: the memory that a rank gives to every tensor of the bucket.
  std::int64_t shard_elements() const { return shard_; }
  /// What coordinate `at` of the flat axis holds of the buffer.
  FlatRange range_of(std::int64_t at) const { return ranges_ ? ranges_.by_coordinate().at(static_cast<std::size_t>(at)) : FlatRange{at * shard_, (at + 1) * shard_}; }

 private:
  static Error too_large() { return Error{ErrorCode::overflow, "a flat bucket of more than 2^63 elements"}; }

  template <class = Deferred>
  void lay_out(std::vector<Extents> const& shapes, std::int64_t alignment) {
    std::uint64_t at = 0;
    for (auto const& shape : shapes) {
      at = ceil_div(at, static_cast<std::uint64_t>(alignment)) * static_cast<std::uint64_t>(alignment);
      FlatSlot& slot = slots_.emplace_back();
      slot.offset = static_cast<std::int64_t>(at);
      slot.elements = shape.elements();
      if (!checked_add(at, static_cast<std::uint64_t>(slot.elements), at) || at > static_cast<std::uint64_t>(INT64_MAX) / 2) throw too_large();
    }
    end_ = static_cast<std::int64_t>(at);
  }

  template <class = Deferred>
  void require_cover() const {
    auto const& list = ranges_.by_coordinate();
    auto const& order = ranges_.in_order();
    auto const refuse = [](std::string const& what) { throw Error{ErrorCode::incomplete, "the ranges of a flat bucket: " + what}; };
    for (std::size_t i = 0; i < list.size(); ++i)
      if (list[i].begin < 0 || list[i].end < list[i].begin) refuse("rank " + std::to_string(i) + " of the axis has [" + std::to_string(list[i].begin) + ", " + std::to_string(list[i].end) + ")");
    for (std::size_t i = 1; i < order.size(); ++i) {
      FlatRange const& range = list[order[i]];
      if (list[order[i - 1]].end > range.begin) refuse("ranks " + std::to_string(order[i - 1]) + " and " + std::to_string(order[i]) + " of the axis both hold element " + std::to_string(range.begin));
    }
    std::size_t i = 0;
    for (std::size_t t = 0; t < slots_.size(); ++t) {
      std::int64_t at = slots_[t].offset;
      std::int64_t const end = at + slots_[t].elements;
      while (at < end) {
        while (i < order.size() && list[order[i]].end <= at) ++i;
        if (i == order.size() || list[order[i]].begin > at) refuse("nobody holds element " + std::to_string(at) + ", of tensor " + std::to_string(t));
        at = std::min(end, list[order[i]].end);
      }
    }
  }

  std::vector<FlatSlot> slots_;
  std::int64_t ranks_ = 0, end_ = 0, shard_ = 0;
  detail::SharedRanges ranges_;
};

}  // namespace dcp
