// SPDX-License-Identifier: Apache-2.0
#pragma once
// Tensors that are stored as views: elements at any strides of their storage, some of them transformed when they are looked at. PyTorch stores a transposed, sliced
// or expanded tensor so.

#include <dcp/base/algorithms.hpp>
#include <dcp/base/config.hpp>
#include <dcp/core/box.hpp>
#include <dcp/core/cast.hpp>
#include <dcp/core/encoding.hpp>
#include <dcp/core/tensor_view.hpp>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace dcp {

/// What elements are before they are looked at.
struct ElementTransform {
  bool conjugate = false, negative = false;
  bool swapped = false;   // most significant byte first

  bool any() const { return conjugate || negative || swapped; }
};

namespace detail {

// The size of the numbers that an element consists of: complex ones are two.
constexpr std::size_t number_bytes(DType dtype) {
  std::size_t const bytes = static_cast<std::size_t>(bits_of(dtype)) / 8;
  return dtype == DType::c32 || dtype == DType::c64 || dtype == DType::c128 ? bytes / 2 : bytes;
}

template <class = Deferred>
void transform_elements(DType dtype, ElementTransform how, std::byte* elements, std::size_t count) {
  std::size_t const number = number_bytes(dtype), each = static_cast<std::size_t>(bits_of(dtype)) / 8;
  for (std::size_t i = 0; i < count; ++i)
    for (std::size_t part = 0; part < each; part += number) {
      std::byte* const at = elements + i * each + part;
      if (how.swapped) std::reverse(at, at + number);
      bool const flips = (how.conjugate && part > 0) != how.negative;
      if (flips) at[number - 1] ^= std::byte{0x80};
    }
}

template <std::size_t Bytes>
void gather(std::byte const* from, std::int64_t stride, std::byte* to, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) std::memcpy(to + i * Bytes, from + static_cast<std::ptrdiff_t>(i) * stride * static_cast<std::ptrdiff_t>(Bytes), Bytes);
}
template <std::size_t Bytes>
void scatter(std::byte const* from, std::byte* to, std::int64_t stride, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) std::memcpy(to + static_cast<std::ptrdiff_t>(i) * stride * static_cast<std::ptrdiff_t>(Bytes), from + i * Bytes, Bytes);
}
// Calls f(std::integral_constant) with the size of an element.
template <class F>
void with_element_bytes(DType dtype, F f) {
  switch (bits_of(dtype)) {
    case 8: f(std::integral_constant<std::size_t, 1>{}); return;
    case 16: f(std::integral_constant<std::size_t, 2>{}); return;
    case 32: f(std::integral_constant<std::size_t, 4>{}); return;
    case 64: f(std::integral_constant<std::size_t, 8>{}); return;
    case 128: f(std::integral_constant<std::size_t, 16>{}); return;
    default: throw Error{ErrorCode::unsupported, "a view of elements of " + std::to_string(bits_of(dtype)) + " bits"};
  }
}
}  // namespace detail

/// Copies a box of elements from one layout in memory to another, transformed, and cast where the dtypes differ.
///
/// from      the first element of the box; its neighbours are `strides` elements apart
template <class = Deferred>
void copy_strided(Extents const& shape, DType dtype, std::byte const* from, std::vector<std::int64_t> const& strides, ElementTransform how, DType memory_dtype, MemoryView const& memory) {
  constexpr std::int64_t piece = 2048;
  if (shape.empty()) return;
  int const last = shape.rank() - 1;
  std::int64_t const columns = last < 0 ? 1 : shape[last], in_stride = last < 0 ? 1 : strides[static_cast<std::size_t>(last)], out_stride = last < 0 ? 1 : memory.strides[last];
  std::ptrdiff_t const in_bytes = bits_of(dtype) / 8, out_bytes = bits_of(memory_dtype) / 8;
  Bytes buffer(static_cast<std::size_t>(std::min(piece, columns) * in_bytes)), cast(dtype == memory_dtype ? 0 : static_cast<std::size_t>(std::min(piece, columns) * out_bytes));
  detail::with_element_bytes(dtype, [&](auto in_size) {
    detail::with_element_bytes(memory_dtype, [&](auto out_size) {
      for_each_index(Box::whole(shape), last, [&](Extents const& index) {
        std::int64_t in_row = 0, out_row = 0;
        for (int d = 0; d < last; ++d) in_row += index[d] * strides[static_cast<std::size_t>(d)], out_row += index[d] * memory.strides[d];
        for (std::int64_t begin = 0; begin < columns; begin += piece) {
          auto const count = static_cast<std::size_t>(std::min(piece, columns - begin));
          std::byte const* source = from + (in_row + begin * in_stride) * in_bytes;
          std::byte* const target = memory.data + (out_row + begin * out_stride) * out_bytes;
          if (in_stride != 1 || how.any()) {
            detail::gather<decltype(in_size)::value>(source, in_stride, buffer.data(), count);
            if (how.any()) detail::transform_elements(dtype, how, buffer.data(), count);
            source = buffer.data();
          }
          if (dtype != memory_dtype) {
            cast_elements(dtype, source, memory_dtype, cast.data(), count);
            source = cast.data();
          }
          detail::scatter<decltype(out_size)::value>(source, target, out_stride, count);
        }
      });
    });
  });
}

/// A tensor that is a view of a storage. Its one part is the storage from the view's first element on: as an array in the order in which the view's dimensions
/// lie in it, where they do not overlap, so that a box needs a box; else all of it.
template <class D = Deferred>
class StridedEncoding final : public Encoding {
 public:
  /// strides   in elements, of each dimension
  /// stored    elements that the storage has from the view's first one on: nothing behind them is read
  StridedEncoding(std::string name, DType dtype, Extents const& shape, std::vector<std::uint64_t> const& strides, std::uint64_t stored, ElementTransform how)
      : StridedEncoding{shape, Made{std::move(name), dtype, shape, strides, stored}, how} {}

  void decode(Box const& box, std::span<PartBytes const> given, DType dtype, MemoryView const& memory) const override {
    Extents const in_part = row_major_strides(given[0].box.shape);
    std::vector<std::int64_t> strides(static_cast<std::size_t>(box.rank()), 0);
    std::int64_t first = 0;
    for (int d = 0; d < box.rank(); ++d) {
      auto const axis = axis_of_[static_cast<std::size_t>(d)];
      if (nested_ && axis < 0) continue;   // of one element, or the same for all
      std::int64_t& stride = strides[static_cast<std::size_t>(d)];
      stride = nested_ ? in_part[axis] : strides_[static_cast<std::size_t>(d)];
      first += (box.origin[d] - (nested_ ? given[0].box.origin[axis] : 0)) * stride;
    }
    copy_strided(box.shape, parts()[0].dtype, given[0].data + first * (bits_of(parts()[0].dtype) / 8), strides, how_, dtype, memory);
  }

 private:
  struct Made {
    std::vector<EncodedPart> parts;
    std::vector<int> axis_of;
    std::vector<std::int64_t> strides;
    bool nested = true;

    Made(std::string name, DType dtype, Extents const& shape, std::vector<std::uint64_t> const& given, std::uint64_t stored) : axis_of(static_cast<std::size_t>(shape.rank()), -1) {
      std::vector<int> order;
      std::int64_t span = 1;
      for (int d = 0; d < shape.rank(); ++d) {
        strides.push_back(static_cast<std::int64_t>(given[static_cast<std::size_t>(d)]));
        if (shape[d] > 1) span += (shape[d] - 1) * strides.back();
        if (shape[d] > 1 && strides.back() > 0) order.push_back(d);
      }
      auto const stride = [&](int d) { return strides[static_cast<std::size_t>(d)]; };
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return stride(a) > stride(b); });
      for (std::size_t i = 1; i < order.size(); ++i) nested = nested && stride(order[i - 1]) % stride(order[i]) == 0 && stride(order[i - 1]) / stride(order[i]) >= shape[order[i]];
      // A box of such an array ends as far behind its last element as two of them are apart.
      if (!order.empty()) nested = nested && static_cast<std::uint64_t>(span) + static_cast<std::uint64_t>(stride(order.back())) - 1 <= stored;
      std::vector<std::int64_t> sizes;
      std::vector<PartAxis> axes;
      if (!nested || shape.empty()) {
        sizes.push_back(shape.empty() ? 0 : span);
        axes.push_back({});
      } else {
        for (std::size_t i = 0; i < order.size(); ++i) {
          sizes.push_back(i == 0 ? shape[order[i]] : stride(order[i - 1]) / stride(order[i]));
          axes.push_back({order[i], 1});
          axis_of[static_cast<std::size_t>(order[i])] = static_cast<int>(i);
        }
        if (order.empty() || stride(order.back()) > 1) {
          sizes.push_back(order.empty() ? 1 : stride(order.back()));
          axes.push_back({});
        }
      }
      parts.push_back({std::move(name), dtype, Extents{sizes}, PartGrid::along(std::move(axes))});
    }
  };
  StridedEncoding(Extents const& shape, Made made, ElementTransform how) : Encoding{"view", shape, std::move(made.parts)}, axis_of_{std::move(made.axis_of)}, strides_{std::move(made.strides)}, nested_{made.nested}, how_{how} {}

  std::vector<int> axis_of_;            // of the part, for each dimension
  std::vector<std::int64_t> strides_;
  bool nested_;
  ElementTransform how_;
};

/// Whether elements at these strides lie in row-major order without gaps.
template <class = Deferred>
bool is_dense(Extents const& shape, std::vector<std::uint64_t> const& strides) {
  if (shape.empty()) return true;
  std::uint64_t expected = 1;
  for (int d = shape.rank(); d-- > 0;) {
    if (shape[d] > 1 && strides[static_cast<std::size_t>(d)] != expected) return false;
    expected *= static_cast<std::uint64_t>(shape[d]);
  }
  return true;
}

}  // namespace dcp
