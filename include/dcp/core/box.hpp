// SPDX-License-Identifier: Apache-2.0
#pragma once
// Axis-aligned boxes of a tensor, and the walk over the contiguous runs that a box consists of.

#include <dcp/core/shape.hpp>

#include <algorithm>
#include <cstdint>
#include <ostream>
#include <string>
#include <utility>

namespace dcp {

/// The elements [origin, origin + shape) of a global tensor. An empty box has a dimension of size 0; there its origin is the
/// global length of the dimension, so that all empty shards of a tensor are the same box (as in PyTorch DCP).
struct Box {
  Extents origin;
  Extents shape;

  constexpr int rank() const { return shape.rank(); }
  constexpr bool empty() const { return shape.empty(); }
  /// The number of elements: what std::vector wants for the memory of a shard.
  constexpr std::size_t size() const { return static_cast<std::size_t>(shape.elements()); }

  /// All of a tensor.
  static constexpr Box whole(Extents const& shape) { return {Extents::filled(shape.rank(), 0), shape}; }

  friend constexpr bool operator==(Box const&, Box const&) = default;
  friend std::string to_string(Box const& box) { return to_string(box.shape) + " at " + to_string(box.origin); }
  friend std::ostream& operator<<(std::ostream& out, Box const& box) { return out << to_string(box); }
};

/// The elements that lie in both; false, and `common` unspecified, if there are none. Two scalars always meet.
constexpr bool intersect(Box const& a, Box const& b, Box& common) {
  common = a;
  for (int d = 0; d < a.rank(); ++d) {
    auto const begin = std::max(a.origin[d], b.origin[d]);
    auto const end = std::min(a.origin[d] + a.shape[d], b.origin[d] + b.shape[d]);
    if (end <= begin) return false;
    common.origin[d] = begin;
    common.shape[d] = end - begin;
  }
  return true;
}

/// The strides of a dense row-major array, in elements; of a shape whose number of elements overflows they mean nothing.
constexpr Extents row_major_strides(Extents const& shape) {
  Extents strides = shape;
  std::uint64_t stride = 1;
  for (int d = shape.rank(); d-- > 0;) {
    strides[d] = static_cast<std::int64_t>(stride);
    stride *= static_cast<std::uint64_t>(std::max<std::int64_t>(shape[d], 1));
  }
  return strides;
}

/// Calls visit(position, first, second, length) for the elements [begin, end) of `box`, numbered in row-major order of the box,
/// in the longest runs that are contiguous in two arrays at once: `first` is the position in an array with `first_strides` whose
/// element 0 is the box's first, `second` likewise. Strides are in elements. Both innermost strides should be 1; where one is
/// not, runs have length 1.
///
/// Law       the lengths sum to end - begin, and positions are visited in increasing order
/// Example   box [2, 3] in rows of 10 (strides [10, 1]) against itself dense (strides [3, 1]): runs (0, 0, 0, 3), (3, 10, 3, 3)
template <class Visit>
constexpr void for_each_run(Extents const& shape, Extents const& first_strides, Extents const& second_strides, std::int64_t begin, std::int64_t end, Visit visit) {
  if (begin >= end) return;
  // The dimensions from `inner` on form one run in both arrays.
  int inner = shape.rank();
  std::int64_t run = 1;
  while (inner > 0 && (shape[inner - 1] == 1 || (first_strides[inner - 1] == run && second_strides[inner - 1] == run))) run *= shape[--inner];
  // An odometer over the outer dimensions, set to `begin`.
  Extents index = Extents::filled(inner, 0);
  std::int64_t first = 0, second = 0;
  std::int64_t rest = begin / run;
  for (int d = inner; d-- > 0;) {
    index[d] = rest % shape[d];
    rest /= shape[d];
    first += index[d] * first_strides[d];
    second += index[d] * second_strides[d];
  }
  for (std::int64_t position = begin; position < end;) {
    std::int64_t const into = position % run, length = std::min(run - into, end - position);
    visit(position, first + into, second + into, length);
    position += length;
    for (int d = inner; d-- > 0;) {
      first += first_strides[d];
      second += second_strides[d];
      if (++index[d] < shape[d]) break;
      first -= shape[d] * first_strides[d];
      second -= shape[d] * second_strides[d];
      index[d] = 0;
    }
  }
}

/// Calls visit(index) for the elements of `box`, in row-major order; of all that differ behind the first `dims` dimensions only for the first of them, so
/// that rank - 1 gives the rows.
template <class Visit>
constexpr void for_each_index(Box const& box, int dims, Visit visit) {
  for (int d = 0; d < dims; ++d)
    if (box.shape[d] == 0) return;
  Extents index = box.origin;
  for (int d = 0; d >= 0;) {
    visit(std::as_const(index));
    for (d = dims - 1; d >= 0; --d) {
      if (++index[d] < box.origin[d] + box.shape[d]) break;
      index[d] = box.origin[d];
    }
  }
}

/// Position of the box's first element in the dense row-major array of a tensor of `shape`.
constexpr std::int64_t linear_origin(Box const& box, Extents const& strides) {
  std::int64_t at = 0;
  for (int d = 0; d < box.rank(); ++d) at += box.origin[d] * strides[d];
  return at;
}

}  // namespace dcp
