// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a checkpoint holds besides tensors: numbers, text, bytes, JSON, arrays of numbers; erased, with exact bits.

#include <dcp/base/config.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/text.hpp>
#include <dcp/core/dtype.hpp>

#include <array>
#include <charconv>
#include <cmath>
#include <complex>
#include <concepts>
#include <cstdint>
#include <ostream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace dcp {

enum class ValueKind : std::uint8_t { number, array, text, bytes, json, per_rank };

inline constexpr std::array value_kind_names{"number", "array", "text", "bytes", "json", "per_rank"};
inline std::string_view to_string(ValueKind kind) { return value_kind_names[static_cast<std::size_t>(kind)]; }

/// Positions in a name of the dots between the levels of the nested state that it comes from: of "model.layer.weight" out of {"model", {{"layer.weight", w}}} there
/// is one, at 5. Formats that keep nested states need them.
using NameJoints = std::vector<std::uint32_t>;

/// A value as it is stored. `payload`: the little-endian bytes of a number (1 for bool) or of an array's elements, or UTF-8 text
/// (for json: one JSON document), or the bytes themselves.
struct Value {
  ValueKind kind = ValueKind::text;
  DType dtype = DType::u8;      // of numbers and arrays
  Bytes payload;
  std::vector<Value> ranks;     // of per_rank: one value per rank that saved

  friend bool operator==(Value const&, Value const&) = default;
};

/// A value in a message, and out of it.
template <class = Deferred>
void put(ByteWriter& out, Value const& value) {
  out.number(value.kind).number(value.dtype).block(value.payload).number(static_cast<std::uint64_t>(value.ranks.size()));
  for (auto const& one : value.ranks) put(out, one);
}
template <class = Deferred>
Value take_value(ByteReader& in) {
  Value value;
  value.kind = in.number<ValueKind>(), value.dtype = in.number<DType>();
  auto const payload = in.block();
  value.payload.assign(payload.begin(), payload.end());
  for (auto count = in.number<std::uint64_t>(); count > 0 && in.ok(); --count) value.ranks.push_back(take_value(in));
  return value;
}

namespace detail {

/// The shortest decimal that reads back as the same T.
template <class T>
std::string number_to_json(T value) {
  if constexpr (std::is_same_v<T, bool>) {
    return value ? "true" : "false";
  } else {
    if constexpr (std::is_floating_point_v<T>) {
      // JSON has no infinity and no NaN: their bits, as a string.
      if (!std::isfinite(value)) {
        std::array<char, 24> text{};
        if constexpr (sizeof(T) == 8) std::snprintf(text.data(), text.size(), "\"0x%016llx\"", static_cast<unsigned long long>(std::bit_cast<std::uint64_t>(value)));
        else std::snprintf(text.data(), text.size(), "\"0x%08x\"", static_cast<unsigned>(std::bit_cast<std::uint32_t>(value)));
        return text.data();
      }
    }
    std::array<char, 40> text{};
    auto const end = std::to_chars(text.data(), text.data() + text.size(), value).ptr;
    std::string out{text.data(), end};
    if constexpr (std::is_floating_point_v<T>)
      if (out.find_first_of(".e") == std::string::npos) out += ".0";
    return out;
  }
}

/// Calls f(T{}) with the C++ type of a numeric dtype; false for dtypes that values do not have.
template <class F>
bool with_number_type(DType dtype, F f) {
  switch (dtype) {
    case DType::boolean: return f(bool{}), true;
    case DType::i8: return f(std::int8_t{}), true;
    case DType::u8: return f(std::uint8_t{}), true;
    case DType::i16: return f(std::int16_t{}), true;
    case DType::u16: return f(std::uint16_t{}), true;
    case DType::i32: return f(std::int32_t{}), true;
    case DType::u32: return f(std::uint32_t{}), true;
    case DType::i64: return f(std::int64_t{}), true;
    case DType::u64: return f(std::uint64_t{}), true;
    case DType::f32: return f(float{}), true;
    case DType::f64: return f(double{}), true;
    default: return false;
  }
}

template <class = Deferred>
std::string numbers_to_json(Value const& value) {
  std::string out;
  with_number_type(value.dtype, [&](auto type) {
    using T = decltype(type);
    for (std::size_t at = 0; at + sizeof(T) <= value.payload.size(); at += sizeof(T)) {
      if (!out.empty()) out += ',';
      if constexpr (std::is_same_v<T, bool>) out += number_to_json(value.payload[at] != std::byte{0});
      else out += number_to_json(load_little_endian<T>(value.payload.data() + at));
    }
  });
  return out;
}

}  // namespace detail

/// The value as JSON: numbers (infinities and NaNs as a string of their bits, "0x7ff0000000000000"), arrays, strings (text; bytes
/// in hexadecimal), a JSON value as it is, per-rank values as an array.
template <class = Deferred>
std::string to_json(Value const& value) {
  switch (value.kind) {
    case ValueKind::number: return detail::numbers_to_json(value);
    case ValueKind::array: return '[' + detail::numbers_to_json(value) + ']';
    case ValueKind::text: return json_quoted(as_text(value.payload));
    case ValueKind::bytes: return '"' + hex_text(value.payload) + '"';
    case ValueKind::json: return std::string{as_text(value.payload)};
    case ValueKind::per_rank: break;
  }
  std::string out{'['};
  for (auto const& one : value.ranks) out += (out.size() > 1 ? "," : "") + to_json(one);
  return out + ']';
}
template <class = Deferred>
std::ostream& operator<<(std::ostream& out, Value const& value) { return out << to_json(value); }

/// How to read and write one C++ object as a value.
struct ValueOps {
  ValueKind kind;
  DType dtype;
  Value (*encode)(void const* object);
  void (*decode)(void* object, Value const& value);   // kind and dtype have been checked; throws Error(corrupt) for a payload of another size
};

namespace detail {

template <class T>
inline constexpr bool is_number = std::is_arithmetic_v<T> && !std::is_same_v<T, long double>;
template <class T>
inline constexpr bool is_number_vector = false;
template <class T, class A>
inline constexpr bool is_number_vector<std::vector<T, A>> = is_number<T>;
template <class T>
inline constexpr bool is_byte_vector = false;
template <class A>
inline constexpr bool is_byte_vector<std::vector<std::byte, A>> = true;

template <class = Deferred>
Value make_value(ValueKind kind, DType dtype, ConstByteSpan payload) { return {kind, dtype, Bytes(payload.begin(), payload.end()), {}}; }

template <class = Deferred>
void require_whole(Value const& value, bool whole) {
  if (!whole) throw Error{ErrorCode::corrupt, "a stored " + std::string{to_string(value.kind)} + " of " + std::string{to_string(value.dtype)} + " has " + std::to_string(value.payload.size()) + " bytes"};
}

// Wide characters and such count as the integer of their size.
template <class T>
inline constexpr DType number_dtype = dtype_of<T>;

template <class T>
inline constexpr ValueOps number_ops{
    ValueKind::number, number_dtype<T>,
    [](void const* object) { return make_value(ValueKind::number, number_dtype<T>, std::as_bytes(std::span{static_cast<T const*>(object), 1})); },
    [](void* object, Value const& value) {
      require_whole(value, value.payload.size() == sizeof(T));
      if constexpr (std::is_same_v<T, bool>) *static_cast<bool*>(object) = value.payload[0] != std::byte{0};
      else *static_cast<T*>(object) = load_little_endian<T>(value.payload.data());
    }};

template <class V>
inline constexpr ValueOps array_ops{
    ValueKind::array, number_dtype<typename V::value_type>,
    [](void const* object) {
      using T = typename V::value_type;
      auto const& list = *static_cast<V const*>(object);
      Value value{ValueKind::array, number_dtype<T>, {}, {}};
      if constexpr (std::is_same_v<T, bool>) {
        for (bool const item : list) value.payload.push_back(std::byte{item ? std::uint8_t{1} : std::uint8_t{0}});
      } else {
        auto const bytes = std::as_bytes(std::span{list});
        value.payload.assign(bytes.begin(), bytes.end());
      }
      return value;
    },
    [](void* object, Value const& value) {
      using T = typename V::value_type;
      auto& list = *static_cast<V*>(object);
      require_whole(value, value.payload.size() % sizeof(T) == 0);
      list.resize(value.payload.size() / sizeof(T));
      if constexpr (std::is_same_v<T, bool>) {
        for (std::size_t i = 0; i < list.size(); ++i) list[i] = value.payload[i] != std::byte{0};
      } else if (!list.empty()) {
        std::memcpy(list.data(), value.payload.data(), value.payload.size());
      }
    }};

inline constexpr ValueOps text_ops{ValueKind::text, DType::u8,
                                   [](void const* object) { return make_value(ValueKind::text, DType::u8, as_byte_span(*static_cast<std::string const*>(object))); },
                                   [](void* object, Value const& value) { *static_cast<std::string*>(object) = as_text(value.payload); }};

template <class V>
inline constexpr ValueOps bytes_ops{ValueKind::bytes, DType::u8,
                                    [](void const* object) { return make_value(ValueKind::bytes, DType::u8, *static_cast<V const*>(object)); },
                                    [](void* object, Value const& value) { static_cast<V*>(object)->assign(value.payload.begin(), value.payload.end()); }};

template <class T>
inline constexpr bool is_value = is_number<T> || is_number_vector<T> || is_byte_vector<T> || std::is_same_v<T, std::string>;

/// The operations for `T`, or nullptr if it is no value type known here.
template <class T>
constexpr ValueOps const* value_ops() {
  if constexpr (is_number<T>) return &number_ops<T>;
  else if constexpr (is_number_vector<T>) return &array_ops<T>;
  else if constexpr (is_byte_vector<T>) return &bytes_ops<T>;
  else if constexpr (std::is_same_v<T, std::string>) return &text_ops;
  else return nullptr;
}

}  // namespace detail
}  // namespace dcp
