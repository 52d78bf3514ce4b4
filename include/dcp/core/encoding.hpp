// SPDX-License-Identifier: Apache-2.0
#pragma once
// A tensor that is stored as something else: codes of a few bits, scales, zero points. What of the parts a box of the tensor needs, and
// how it is decoded from them, for that box alone.

#include <dcp/base/algorithms.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/error.hpp>
#include <dcp/core/box.hpp>
#include <dcp/core/dtype.hpp>
#include <dcp/core/tensor_view.hpp>

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace dcp {

/// How one dimension of a part lies along the tensor: its element i belongs to elements [i * each, (i + 1) * each) of dimension `dim`;
/// with dim = -1 all of the dimension belongs to every element.
struct PartAxis {
  int dim = -1;
  std::int64_t each = 1;
};

/// How a part lies along the tensor.
struct PartGrid {
  std::vector<PartAxis> axes;   // of each of its dimensions
  std::int64_t flat_each = 0;   // of a part of one dimension that runs along the elements in row-major order, instead of axes: how many each has

  static PartGrid along(std::vector<PartAxis> axes) { return {std::move(axes), 0}; }
  /// As the tensor, of `rank` dimensions, but for the last, of which an element of the part has `each`.
  template <class = Deferred>
  static PartGrid rows(int rank, std::int64_t each = 1) {
    PartGrid grid;
    for (int d = 0; d < rank; ++d) grid.axes.push_back({d, d == rank - 1 ? each : 1});
    return grid;
  }
  static PartGrid flat(std::int64_t each) { return {{}, each}; }

  /// The box of the part that `box` of a tensor of `shape` needs.
  template <class = Deferred>
  Box needed(Box const& box, Extents const& shape, Extents const& part) const {
    Box result = Box::whole(part);
    if (flat_each > 0) {
      auto const [first, last] = flat_ends(box, shape);
      return range(result, 0, first / flat_each, last / flat_each + 1);
    }
    for (std::size_t d = 0; d < axes.size(); ++d)
      if (auto const [dim, each] = axes[d]; dim >= 0) result = range(result, static_cast<int>(d), box.origin[dim] / each, ceil_div(box.origin[dim] + box.shape[dim], each));
    return result;
  }
  /// The part of needed() that belongs to `box` alone, so that boxes which together are the tensor own every element of the part once:
  /// those whose first element lies in the box. Empty where that is no box.
  template <class = Deferred>
  Box owned(Box const& box, Extents const& shape, Extents const& part) const {
    Box result = Box::whole(part);
    if (flat_each > 0) {
      for (int d = 1; d < shape.rank(); ++d)
        if (box.shape[d] != shape[d] && box.shape.elements() != box.shape[shape.rank() - 1]) return range(result, 0, part[0], part[0]);
      auto const [first, last] = flat_ends(box, shape);
      return range(result, 0, ceil_div(first, flat_each), last / flat_each + 1);
    }
    for (int d = 0; d < shape.rank(); ++d)
      if (std::none_of(axes.begin(), axes.end(), [&](PartAxis const& axis) { return axis.dim == d; }) && box.origin[d] != 0) return part.rank() == 0 ? Box{{}, {}} : range(result, 0, part[0], part[0]);
    for (std::size_t d = 0; d < axes.size(); ++d)
      if (auto const [dim, each] = axes[d]; dim >= 0) result = range(result, static_cast<int>(d), ceil_div(box.origin[dim], each), ceil_div(box.origin[dim] + box.shape[dim], each));
    return result;
  }
  /// The first element of the tensor that element `index` of the part belongs to.
  template <class = Deferred>
  Extents first_element(Extents const& index, Extents const& shape) const {
    Extents first = Extents::filled(shape.rank(), 0);
    if (flat_each > 0) {
      std::int64_t rest = index[0] * flat_each;
      for (int d = shape.rank(); d-- > 0; rest /= std::max<std::int64_t>(1, shape[d])) first[d] = rest % std::max<std::int64_t>(1, shape[d]);
      return first;
    }
    for (std::size_t d = 0; d < axes.size(); ++d)
      if (axes[d].dim >= 0) first[axes[d].dim] = index[static_cast<int>(d)] * axes[d].each;
    return first;
  }
  /// Whether a part without dimensions, of one element, belongs to `box`.
  template <class = Deferred>
  static bool owns_scalar(Box const& box) { return std::all_of(box.origin.begin(), box.origin.end(), [](std::int64_t at) { return at == 0; }); }

 private:
  template <class = Deferred>
  static Box range(Box box, int dim, std::int64_t begin, std::int64_t end) {
    end = std::min(end, box.origin[dim] + box.shape[dim]);
    box.origin[dim] = std::min(begin, end);
    box.shape[dim] = end - box.origin[dim];
    return box;
  }
  // The numbers of the first and the last element.
  template <class = Deferred>
  static std::pair<std::int64_t, std::int64_t> flat_ends(Box const& box, Extents const& shape) {
    Extents const strides = row_major_strides(shape);
    std::int64_t first = 0, last = 0;
    for (int d = 0; d < shape.rank(); ++d) first += box.origin[d] * strides[d], last += (box.origin[d] + box.shape[d] - 1) * strides[d];
    return {first, last};
  }
};

/// A part of an encoded tensor.
struct EncodedPart {
  std::string name;   // under which it is stored
  DType dtype{};      // as it is read
  Extents shape;
  PartGrid grid;
};

/// What decode() is given of a part: the bytes of a box of it, dense and row-major.
struct PartBytes {
  std::byte const* data = nullptr;
  Box box;
};

/// What the codes of an encoding are, of which every element is its code times the scale of its group, in float, and nothing else.
enum class ScaledCodes : std::uint8_t { none, e4m3, e5m2, i8, e2m1 };   // none: the encoding is something else. E2M1: two in a byte, of neighbours in the last dimension, the even one low

/// How a tensor is made of its parts. Immutable; used by several threads at once.
class Encoding {
 public:
  Encoding(std::string scheme, Extents const& shape, std::vector<EncodedPart> parts) : scheme_{std::move(scheme)}, shape_{shape}, parts_{std::move(parts)} {}
  virtual ~Encoding() = default;
  Encoding(Encoding const&) = delete;
  Encoding& operator=(Encoding const&) = delete;

  /// The name of the scheme, for people.
  std::string const& scheme() const { return scheme_; }
  Extents const& shape() const { return shape_; }
  /// The first holds the codes.
  std::vector<EncodedPart> const& parts() const { return parts_; }

  /// Decodes `box` into memory of float, bfloat16, half or double whose first element is that of the box. The values are those of the format's formula in
  /// float, rounded once more (to nearest even) where memory is narrower.
  /// Law       a box of the tensor is, bit for bit, that box of the whole
  /// Throws    Error(quant_mismatch) for codes and scales that the scheme does not have
  virtual void decode(Box const& box, std::span<PartBytes const> parts, DType dtype, MemoryView const& memory) const = 0;

  /// For those who decode elsewhere what is as simple as that: parts 0 and 1 are codes and scales, none of which is zero.
  virtual ScaledCodes scaled_codes() const { return ScaledCodes::none; }
  /// Throws what decode() would for these scales.
  virtual void check_scales(PartBytes const& /*scales*/) const {}

  /// Whether any box needs all of the parts, and much work on them: it is then decoded at once, in memory that holds them.
  virtual bool whole() const { return false; }

  /// A dimension along which every box needs as much of the other parts as the whole does, so that it is cut last; -1: none.
  virtual int dimension_to_keep() const { return -1; }

  /// Bytes of all parts that `box` needs.
  template <class = Deferred>
  std::uint64_t bytes_needed(Box const& box) const {
    std::uint64_t bytes = 0;
    for (auto const& part : parts_) bytes += static_cast<std::uint64_t>(part.grid.needed(box, shape_, part.shape).shape.elements()) * static_cast<std::uint64_t>(bits_of(part.dtype)) / 8;
    return bytes;
  }

 protected:
  template <class = Deferred>
  [[noreturn]] void refuse(std::size_t part, std::string const& sentence) const { throw Error{ErrorCode::quant_mismatch, parts_[part].name + ": " + sentence}; }

 private:
  std::string scheme_;
  Extents shape_;
  std::vector<EncodedPart> parts_;
};

/// Calls visit(tile) for boxes that together are `box`, each with at most `most_elements`, or the fewest that the encoding can handle well.
/// Cuts fall between the codes' own rows first (in the order in which they are stored), and on multiples of what a part's element covers: codes that
/// lie together stay together. Where so many rows would be more than `most_elements`, a tile has up to three times as many, or else cuts fall inside
/// what a scale covers, which is then read once more, but never inside what a code's bytes cover.
template <class Visit>
void for_each_tile(Encoding const& encoding, Box const& box, std::int64_t most_elements, Visit visit) {
  int const rank = box.rank();
  if (box.empty()) return;
  if (encoding.whole()) return static_cast<void>(visit(box));
  // The dimensions, outermost in storage first, and what a cut must be a multiple of.
  std::vector<int> order;
  Extents grain = Extents::filled(rank, 1), codes = grain;
  for (std::size_t p = 0; p < encoding.parts().size(); ++p)
    for (auto const& axis : encoding.parts()[p].grid.axes) {
      if (axis.dim < 0) continue;
      if (std::find(order.begin(), order.end(), axis.dim) == order.end()) order.push_back(axis.dim);
      // A whole number of each part's elements, as long as tiles do not become too large for it.
      if (grain[axis.dim] % axis.each != 0 && axis.each % grain[axis.dim] == 0 && axis.each <= 4096) grain[axis.dim] = axis.each;
      if (p == 0) codes[axis.dim] = grain[axis.dim];
    }
  for (int d = 0; d < rank; ++d)
    if (std::find(order.begin(), order.end(), d) == order.end()) order.push_back(d);
  if (int const kept = encoding.dimension_to_keep(); kept >= 0) {
    order.erase(std::find(order.begin(), order.end(), kept));
    order.push_back(kept);
  }
  Extents tile = box.shape;
  std::int64_t inner = box.shape.elements();
  // What runs along the elements would be read whole between the first and the last of a box that is cut inside.
  if (rank > 0 && encoding.parts()[0].grid.flat_each > 0)
    for (int d = 1; d < rank; ++d)
      if (box.shape[d] != encoding.shape()[d]) most_elements = std::min(most_elements, box.shape[rank - 1]);
  for (std::size_t i = 0; i < order.size() && inner > most_elements; ++i) {
    int const d = order[i];
    inner /= box.shape[d];
    std::int64_t const room = most_elements / std::max<std::int64_t>(1, inner);
    tile[d] = std::min(box.shape[d], std::max(codes[d], room / grain[d] * grain[d]));
    if (room < grain[d] && grain[d] > codes[d]) {
      std::int64_t const whole = std::min(box.shape[d], grain[d]);
      if (whole * inner <= 3 * most_elements) {
        tile[d] = whole;
        break;
      }
      for (std::int64_t size = codes[d]; size <= std::min(room, whole); size += codes[d])
        if (grain[d] % size == 0) tile[d] = size;
    }
    inner *= tile[d];
  }
  // Along every dimension: from the box's begin to the next multiple of the tile, then in steps.
  Box at{box.origin, Extents::filled(rank, 0)};
  auto const step = [&](int d) {
    std::int64_t const end = box.origin[d] + box.shape[d], next = tile[d] >= box.shape[d] ? end : (at.origin[d] / tile[d] + 1) * tile[d];
    at.shape[d] = std::min(end, next) - at.origin[d];
  };
  for (int d = 0; d < rank; ++d) step(d);
  for (;;) {
    visit(at);
    std::size_t i = order.size();
    for (; i-- > 0;) {
      int const d = order[i];
      at.origin[d] += at.shape[d];
      if (at.origin[d] < box.origin[d] + box.shape[d]) {
        step(d);
        break;
      }
      at.origin[d] = box.origin[d];
      step(d);
    }
    if (i == ~std::size_t{0}) return;
  }
}

}  // namespace dcp
