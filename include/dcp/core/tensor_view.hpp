// SPDX-License-Identifier: Apache-2.0
#pragma once
// Views of memory that the trainer owns: contiguous or strided, of one element type, or erased to bytes.

#include <dcp/core/box.hpp>
#include <dcp/core/dtype.hpp>

#include <array>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>

namespace dcp {

namespace detail {
template <class T>
struct an_element_type {
  static_assert(is_element<T>, "dcp: no checkpoint format has this element type; use bool, a fixed-width integer, float, double, std::complex of both, or a dcp float such as dcp::bf16");
  static_assert(!std::is_const_v<T>, "dcp: a tensor's element type is not const; loading writes into it");
};
template <class T, int Bits>
struct elements_of_whole_bytes {
  static_assert(Bits >= 8, "dcp: elements smaller than a byte cannot be sliced; view the bytes that hold them [bits of an element >= 8]");
};
template <class T, class M>
struct memory_of_type {
  static_assert(std::is_constructible_v<std::span<storage_of<T>>, M&>,
                "dcp: this memory does not hold the tensor's elements; pass a mutable contiguous range of exactly its element type (std::byte for elements smaller than a byte)");
};
}  // namespace detail

/// Memory without its type: the first element and the distance of neighbours in each dimension.
struct MemoryView {
  std::byte* data = nullptr;
  Extents strides;   // in elements
};

/// A tensor in local memory. As an entry of a state it is the same on every rank and written once.
///
/// Views     nothing is owned or copied; the memory must outlive the view's use
/// Throws    Error(invalid_argument) if the memory is smaller than the shape needs
/// Example   dcp::TensorView<float> qkv{memory, {3 * 64, 512}};   auto k = qkv.slice(0, 64, 128);   // rows 64 .. 127
template <class T>
class TensorView : detail::an_element_type<T> {
 public:
  using element_type = T;

  TensorView() = default;
  template <class M>
  TensorView(M&& memory, Extents const& shape) : TensorView{memory_of(memory), shape, row_major_strides(shape)} {
    [[maybe_unused]] detail::memory_of_type<T, std::remove_reference_t<M>> check;
  }
  /// `strides`: distance in elements between neighbours in each dimension; a row pitch is strides[0].
  template <class M>
  TensorView(M&& memory, Extents const& shape, Extents const& strides) : TensorView{memory_of(memory), shape, strides} {
    [[maybe_unused]] detail::memory_of_type<T, std::remove_reference_t<M>> check;
  }

  storage_of<T>* data() const { return data_; }
  Extents const& shape() const { return shape_; }
  Extents const& strides() const { return strides_; }
  DType dtype() const { return dtype_of<T>; }

  /// Elements [begin, end) of dimension `dim`: part of a fused buffer, or a buffer without its padding.
  TensorView slice(int dim, std::int64_t begin, std::int64_t end) const {
    [[maybe_unused]] detail::elements_of_whole_bytes<T, bits_of(dtype_of<T>)> check;
    if (dim < 0 || dim >= shape_.rank() || begin < 0 || end < begin || end > shape_[dim])
      throw Error{ErrorCode::invalid_argument, "slice [" + std::to_string(begin) + ", " + std::to_string(end) + ") of dimension " + std::to_string(dim) + " of a tensor " + to_string(shape_)};
    TensorView part = *this;
    part.data_ += begin * strides_[dim];
    part.shape_[dim] = end - begin;
    return part;
  }

  MemoryView memory() const { return {reinterpret_cast<std::byte*>(data_), strides_}; }

 private:
  struct Units {   // a type of its own, lest the constructor below take a span that a user passes
    std::span<storage_of<T>> span;
  };
  template <class M>
  static Units memory_of(M& memory) {
    if constexpr (std::is_constructible_v<std::span<storage_of<T>>, M&>) return {std::span<storage_of<T>>{memory}};
    else return {};
  }
  TensorView(Units memory, Extents const& shape, Extents const& strides) : data_{memory.span.data()}, shape_{shape}, strides_{strides} {
    if (shape.rank() != strides.rank())
      throw Error{ErrorCode::invalid_argument, "a tensor of shape " + to_string(shape) + " with strides " + to_string(strides)};
    if (bits_of(dtype_of<T>) < 8 && !(strides == row_major_strides(shape)))
      throw Error{ErrorCode::invalid_argument, "a strided tensor of " + std::string{to_string(dtype_of<T>)} + "; elements smaller than a byte must be dense"};
    if (shape.empty()) return;
    std::uint64_t units = 0;   // of memory, up to the farthest element
    bool fits = true;
    for (int d = 0; d < shape.rank(); ++d) {
      if (strides[d] < 0) throw Error{ErrorCode::invalid_argument, "a tensor of shape " + to_string(shape) + " with strides " + to_string(strides) + "; strides are not negative"};
      std::uint64_t reach = 0;
      fits = fits && checked_multiply(static_cast<std::uint64_t>(shape[d] - 1), static_cast<std::uint64_t>(strides[d]), reach) && checked_add(units, reach, units);
    }
    fits = fits && checked_add(units, 1, units);
    if constexpr (is_element<T> && bits_of(dtype_of<T>) < 8) {
      fits = fits && checked_multiply(units, static_cast<std::uint64_t>(bits_of(dtype_of<T>)), units);
      units = ceil_div<std::uint64_t>(units, 8);
    }
    if (!fits || units > memory.span.size())
      throw Error{ErrorCode::invalid_argument, "a tensor of shape " + to_string(shape) + " needs memory of " + (fits ? std::to_string(units) : std::string{"2^64 or more"}) + " elements, but was given " +
                                                   std::to_string(memory.span.size())};
  }

  storage_of<T>* data_ = nullptr;
  Extents shape_ = Extents{0};
  Extents strides_ = Extents{1};
};

}  // namespace dcp
