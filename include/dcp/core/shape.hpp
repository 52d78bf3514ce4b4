// SPDX-License-Identifier: Apache-2.0
#pragma once
// Shapes of tensors: Extents at run time, Shape<...> in types.

#include <dcp/base/bytes.hpp>
#include <dcp/base/error.hpp>

#include <algorithm>
#include <concepts>
#include <array>
#include <cstdint>
#include <ostream>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace dcp {

/// The most dimensions a tensor may have. The models that people train have at most 8.
inline constexpr int max_rank = 16;

/// The sizes of a tensor's dimensions, outermost first. A small value: plans hold millions of them, so the dimensions of nearly all tensors
/// (convolutions of volumes have five) lie inside, and more on the heap.
///
/// Throws    Error(limit) for more than max_rank dimensions, Error(invalid_argument) for a negative size
/// Example   Extents{7, 5}.elements() == 35;  Extents{}.elements() == 1 (a scalar)
class Extents {
 public:
  constexpr Extents() = default;
  constexpr Extents(Extents const& other) : few_{other.few_} {
    set_rank(other.rank_);
    if (many_ != nullptr) std::copy(other.begin(), other.end(), many_);
  }
  constexpr Extents(Extents&& other) noexcept : few_{other.few_}, many_{std::exchange(other.many_, nullptr)}, rank_{std::exchange(other.rank_, 0)} {}
  constexpr Extents& operator=(Extents const& other) {
    if (many_ == nullptr && other.many_ == nullptr) few_ = other.few_, rank_ = other.rank_;
    else if (this != &other) *this = Extents{other};
    return *this;
  }
  constexpr Extents& operator=(Extents&& other) noexcept {
    few_ = other.few_;
    std::swap(many_, other.many_);
    std::swap(rank_, other.rank_);
    return *this;
  }
  constexpr ~Extents() { delete[] many_; }
  constexpr Extents(std::span<std::int64_t const> sizes) { assign(sizes); }
  template <std::size_t K>
  constexpr Extents(std::int64_t const (&sizes)[K]) {
    assign(std::span<std::int64_t const>{sizes, K});
  }
  template <std::convertible_to<std::int64_t>... I>
    requires(sizeof...(I) > 0)
  constexpr Extents(I... sizes) {
    std::array<std::int64_t, sizeof...(I)> const list{static_cast<std::int64_t>(sizes)...};
    assign(list);
  }
  constexpr Extents(std::vector<std::int64_t> const& sizes) { assign(sizes); }

  /// `rank` dimensions of size `value` each.
  static constexpr Extents filled(int rank, std::int64_t value) {
    Extents result;
    if (rank < 0 || rank > max_rank) too_many(static_cast<std::size_t>(rank));
    result.set_rank(rank);
    std::fill_n(result.data(), rank, value);
    return result;
  }

  constexpr int rank() const { return rank_; }
  constexpr std::int64_t operator[](int dim) const { return begin()[dim]; }
  constexpr std::int64_t& operator[](int dim) { return data()[dim]; }
  constexpr std::int64_t const* begin() const { return many_ == nullptr ? few_.data() : many_; }
  constexpr std::int64_t const* end() const { return begin() + rank_; }

  /// The product of the sizes. Throws Error(overflow) if it does not fit into 63 bits, whatever the order of the sizes.
  constexpr std::int64_t elements() const {
    std::uint64_t product = 1;
    bool zero = false;
    for (auto const size : *this) {
      if (size == 0) zero = true;
      else if (!checked_multiply(product, static_cast<std::uint64_t>(size), product) || product > INT64_MAX) overflow();
    }
    return zero ? 0 : static_cast<std::int64_t>(product);
  }
  constexpr bool empty() const { return std::find(begin(), end(), 0) != end(); }

  friend constexpr bool operator==(Extents const& a, Extents const& b) { return a.rank_ == b.rank_ && std::equal(a.begin(), a.end(), b.begin()); }
  friend std::ostream& operator<<(std::ostream& out, Extents const& extents) { return out << to_string(extents); }
  friend std::string to_string(Extents const& extents) {
    std::string out{'['};
    for (int d = 0; d < extents.rank_; ++d) out += (d > 0 ? ", " : "") + std::to_string(extents[d]);
    return out + ']';
  }

 private:
  static constexpr int inside = 5;

  constexpr void assign(std::span<std::int64_t const> sizes) {
    if (sizes.size() > max_rank) too_many(sizes.size());
    for (auto const size : sizes)
      if (size < 0) throw Error{ErrorCode::invalid_argument, "a dimension of size " + std::to_string(size)};
    set_rank(static_cast<int>(sizes.size()));
    std::copy(sizes.begin(), sizes.end(), data());
  }
  // Of a new one.
  constexpr void set_rank(int rank) {
    if (rank > inside) many_ = new std::int64_t[static_cast<std::size_t>(rank)];
    rank_ = rank;
  }
  constexpr std::int64_t* data() { return many_ == nullptr ? few_.data() : many_; }
  [[noreturn]] static void too_many(std::size_t rank) {
    throw Error{ErrorCode::limit, "a tensor of " + std::to_string(rank) + " dimensions; this library holds at most " + std::to_string(max_rank)};
  }
  [[noreturn]] static void overflow() { throw Error{ErrorCode::overflow, "the number of elements of a tensor does not fit into 63 bits"}; }

  std::array<std::int64_t, inside> few_{};
  std::int64_t* many_ = nullptr;   // owned; where rank_ > inside
  int rank_ = 0;
};

namespace detail {
template <int Given, int Most>
struct dims_in_range {
  static_assert(Given <= Most, "dcp: a tensor has at most 16 dimensions [dimensions given <= dimensions a tensor may have]");
};
}  // namespace detail

/// A global shape in a tensor's type.
template <std::int64_t... Sizes>
struct Shape : detail::dims_in_range<static_cast<int>(sizeof...(Sizes)), max_rank> {
  static_assert(((Sizes >= 0) && ...), "dcp: a dimension of negative size; sizes count elements, from 0 up");
  static constexpr int rank = static_cast<int>(sizeof...(Sizes));
  static constexpr std::array<std::int64_t, sizeof...(Sizes)> sizes{Sizes...};
};

/// The global shape is known at run time.
struct AnyShape {};

}  // namespace dcp
