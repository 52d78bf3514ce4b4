// SPDX-License-Identifier: Apache-2.0
#pragma once
// Bytes as the library passes them around: spans, little-endian numbers, checked arithmetic, and the flat encoding of control messages.

#include <dcp/base/algorithms.hpp>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace dcp {

using Bytes = std::vector<std::byte>;
using ByteSpan = std::span<std::byte>;
using ConstByteSpan = std::span<std::byte const>;

// Every format spoken here is little-endian, and bytes go from memory to file unchanged.
static_assert(std::endian::native == std::endian::little, "dcp: big-endian machines are not supported; checkpoints are little-endian and are not swapped");

inline ConstByteSpan as_byte_span(std::string_view text) { return std::as_bytes(std::span{text.data(), text.size()}); }
inline std::string_view as_text(ConstByteSpan bytes) { return {reinterpret_cast<char const*>(bytes.data()), bytes.size()}; }

template <class T>
  requires std::is_trivially_copyable_v<T>
T load_little_endian(std::byte const* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

/// a * b, or false when the product does not fit; `out` is then unspecified.
constexpr bool checked_multiply(std::uint64_t a, std::uint64_t b, std::uint64_t& out) {
  return !__builtin_mul_overflow(a, b, &out);
}
constexpr bool checked_add(std::uint64_t a, std::uint64_t b, std::uint64_t& out) { return !__builtin_add_overflow(a, b, &out); }

constexpr std::uint64_t round_down(std::uint64_t value, std::uint64_t multiple) { return value - value % multiple; }
constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t multiple) { return round_down(value + multiple - 1, multiple); }
template <class I>
constexpr I ceil_div(I a, I b) {
  return a / b + (a % b != 0 ? 1 : 0);
}

/// Appends numbers and byte strings to a buffer; ByteReader reads them back in the same order. For messages between ranks of
/// one job (same build), never for files.
class ByteWriter {
 public:
  template <class T>
    requires(std::is_arithmetic_v<T> || std::is_enum_v<T>)
  ByteWriter& number(T value) {
    auto const at = bytes_.size();
    bytes_.resize(at + sizeof value);
    std::memcpy(bytes_.data() + at, &value, sizeof value);
    return *this;
  }
  ByteWriter& raw(ConstByteSpan bytes) {
    detail::append(bytes_, bytes);
    return *this;
  }
  ByteWriter& block(ConstByteSpan bytes) { return number<std::uint64_t>(bytes.size()).raw(bytes); }
  /// A block of `size` bytes for the caller to fill, before anything else is appended.
  ByteSpan block_to_fill(std::uint64_t size) {
    number(size);
    auto const at = bytes_.size();
    bytes_.resize(at + static_cast<std::size_t>(size));
    return ByteSpan{bytes_}.subspan(at);
  }
  void reserve(std::uint64_t size) { bytes_.reserve(static_cast<std::size_t>(size)); }
  ByteWriter& text(std::string_view text) { return block(as_byte_span(text)); }
  std::size_t size() const { return bytes_.size(); }
  Bytes take() { return std::move(bytes_); }
  Bytes const& bytes() const { return bytes_; }

 private:
  Bytes bytes_;
};

/// Reads what ByteWriter wrote. A read past the end gives zeros and clears ok(): the caller checks once, at the end.
class ByteReader {
 public:
  explicit ByteReader(ConstByteSpan bytes) : rest_{bytes} {}

  template <class T>
    requires(std::is_arithmetic_v<T> || std::is_enum_v<T>)
  T number() {
    if constexpr (std::is_same_v<T, bool>) return number<std::uint8_t>() != 0;   // a byte may be neither 0 nor 1
    T value{};
    if (rest_.size() < sizeof value) return ok_ = false, value;
    std::memcpy(&value, rest_.data(), sizeof value);
    rest_ = rest_.subspan(sizeof value);
    return value;
  }
  ConstByteSpan raw(std::uint64_t size) {
    if (rest_.size() < size) return ok_ = false, ConstByteSpan{};
    auto const part = rest_.first(static_cast<std::size_t>(size));
    rest_ = rest_.subspan(static_cast<std::size_t>(size));
    return part;
  }
  ConstByteSpan block() { return raw(number<std::uint64_t>()); }
  std::string text() { return std::string{as_text(block())}; }
  bool ok() const { return ok_; }
  bool done() const { return ok_ && rest_.empty(); }
  ConstByteSpan rest() const { return rest_; }

 private:
  ConstByteSpan rest_;
  bool ok_ = true;
};

}  // namespace dcp
