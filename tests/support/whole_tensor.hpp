// SPDX-License-Identifier: Apache-2.0
#pragma once
// Tensors with known content, and the parts of them that ranks hold. Parts are cut element by element, with nothing of the library's own
// transfers, so that the two check each other.

#include <dcp/core/layout.hpp>
#include <dcp/core/state_dict.hpp>

#include <cstdint>
#include <deque>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace dcp::test {

struct WholeTensor {
  std::string name;
  DType dtype{};
  Extents shape;
  Bytes bytes;
};

inline std::size_t packed_bytes(DType dtype, std::size_t elements) { return (elements * static_cast<std::size_t>(bits_of(dtype)) + 7) / 8; }

/// Bytes that follow from the name, 0 or 1 for bool.
inline WholeTensor made_tensor(std::string name, DType dtype, Extents const& shape) {
  WholeTensor tensor{std::move(name), dtype, shape, Bytes(packed_bytes(dtype, static_cast<std::size_t>(shape.elements())))};
  std::uint64_t x = 0x9E3779B97F4A7C15u;
  for (char const c : tensor.name) x = (x ^ static_cast<unsigned char>(c)) * 0x100000001B3u;
  for (auto& byte : tensor.bytes) {
    x = x * 6364136223846793005u + 1442695040888963407u;
    byte = static_cast<std::byte>(x >> 56);
    if (dtype == DType::boolean) byte &= std::byte{1};
  }
  return tensor;
}

/// The elements of `box` out of a whole tensor.
inline Bytes cut_out(ConstByteSpan whole, DType dtype, Extents const& shape, Box const& box) {
  auto const elements = static_cast<std::size_t>(box.empty() ? 0 : box.shape.elements()), width = static_cast<std::size_t>(bits_of(dtype));
  Bytes part(packed_bytes(dtype, elements));
  for (std::size_t i = 0; i < elements; ++i) {
    auto rest = static_cast<std::int64_t>(i);
    std::int64_t at = 0, stride = 1;
    for (int d = box.rank(); d-- > 0;) {
      at += (rest % box.shape[d] + box.origin[d]) * stride;
      rest /= box.shape[d];
      stride *= shape[d];
    }
    auto const from = static_cast<std::size_t>(at) * width, to = i * width;
    if (width % 8 == 0) {
      for (std::size_t b = 0; b < width / 8; ++b) part[to / 8 + b] = whole[from / 8 + b];
      continue;
    }
    for (std::size_t b = 0; b < width; ++b)
      if ((whole[(from + b) / 8] >> static_cast<int>((from + b) % 8) & std::byte{1}) != std::byte{0}) part[(to + b) / 8] |= std::byte{1} << static_cast<int>((to + b) % 8);
  }
  return part;
}

/// What one rank holds of tensors in given layouts, as a state.
class HeldTensors {
 public:
  using LayoutOf = std::function<Layout(WholeTensor const&)>;

  HeldTensors(std::vector<WholeTensor> const& tensors, LayoutOf const& layout_of, std::int64_t rank, bool filled) {
    for (auto const& tensor : tensors) {
      Layout const layout = layout_of(tensor);
      auto const box = layout.everywhere ? std::optional{Box::whole(tensor.shape)} : box_of_rank(layout, rank);
      if (!box) continue;
      Bytes part = cut_out(tensor.bytes, tensor.dtype, tensor.shape, *box);
      Extents strides = row_major_strides(box->shape);
      if (flat_axis(layout) >= 0) {
        HeldPart const held = held_by(layout, rank).value();
        auto const begin = static_cast<std::ptrdiff_t>(bytes_of(tensor.dtype, held.begin)), end = static_cast<std::ptrdiff_t>(bytes_of(tensor.dtype, held.end));
        part = Bytes(part.begin() + begin, part.begin() + end);
        strides = Extents{1};
      }
      auto& memory = memory_.emplace_back(filled ? part : Bytes(part.size(), std::byte{0xEE}));
      wanted_.push_back(std::move(part));
      memory.reserve(1);   // a part without bytes has an address too
      state.add_tensor(tensor.name, tensor.dtype, layout, {memory.data(), strides});
    }
  }
  bool complete() const { return std::equal(memory_.begin(), memory_.end(), wanted_.begin(), wanted_.end()); }

  StateDict state;

 private:
  std::deque<Bytes> memory_, wanted_;
};

/// Whether every rank's part of a tensor of small elements begins and ends on a byte.
inline bool cuts_whole_bytes(Layout const& layout, DType dtype) {
  std::int64_t row = bits_of(dtype);
  for (int d = layout.shape.rank(); d-- > 0; row *= layout.shape[d])
    for (std::int64_t cell = 0; cell < cells(layout); ++cell) {
      Box const box = box_at(layout, cell_coordinate(layout, cell));
      if (box.shape[d] != layout.shape[d] && (box.origin[d] * row % 8 != 0 || (box.origin[d] + box.shape[d]) * row % 8 != 0)) return false;
    }
  return true;
}

}  // namespace dcp::test
