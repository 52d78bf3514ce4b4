// SPDX-License-Identifier: Apache-2.0
#pragma once
// Conversions between element types, for loads that were told to cast.

#include <dcp/base/config.hpp>
#include <dcp/core/dtype.hpp>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace dcp {

namespace detail {

template <class T>
inline constexpr bool is_small_float = requires(T x) { T::from_bits(x.bits()); };
template <class T>
inline constexpr bool is_float_element = std::is_floating_point_v<T> || is_small_float<T>;

/// double to float, rounding to odd: a later rounding to at most 22 bits then gives what one rounding of the double gives.
inline float to_odd_float(double value) {
  float const nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) == value || nearest != nearest) return nearest;
  std::uint32_t bits = std::bit_cast<std::uint32_t>(nearest);
  bool const away = (value > 0) == (static_cast<double>(nearest) > value);   // rounded away from zero: step back
  if (away) --bits;
  return std::bit_cast<float>(bits | 1u);
}

template <class To, class From>
To cast_element(From from) {
  if constexpr (std::is_same_v<To, From>) return from;
  else if constexpr (is_small_float<To>) {
    if constexpr (std::is_same_v<From, double>) return To{to_odd_float(from)};
    else return To{static_cast<float>(from)};
  } else if constexpr (is_small_float<From>) return static_cast<To>(static_cast<float>(from));
  else return static_cast<To>(from);
}

// Calls f with a value of the element type of a dtype that can be cast.
template <class F>
bool with_castable_type(DType dtype, F f) {
  switch (dtype) {
    case DType::boolean: return f(bool{});
    case DType::u8: return f(std::uint8_t{});
    case DType::i8: return f(std::int8_t{});
    case DType::u16: return f(std::uint16_t{});
    case DType::i16: return f(std::int16_t{});
    case DType::u32: return f(std::uint32_t{});
    case DType::i32: return f(std::int32_t{});
    case DType::u64: return f(std::uint64_t{});
    case DType::i64: return f(std::int64_t{});
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::f16: return f(f16{});
    case DType::bf16: return f(bf16{});
    case DType::f8_e4m3: return f(f8_e4m3{});
    case DType::f8_e5m2: return f(f8_e5m2{});
    case DType::f8_e4m3fnuz: return f(f8_e4m3fnuz{});
    case DType::f8_e5m2fnuz: return f(f8_e5m2fnuz{});
    default: return false;
  }
}

template <class To, class From>
constexpr bool castable() {
  if constexpr (is_float_element<From>) return is_float_element<To>;                       // rounded to nearest even
  else if constexpr (std::is_same_v<To, bool>) return std::is_same_v<From, bool>;
  else if constexpr (is_float_element<To>) {
    // Integers only where the float holds every one of them.
    if constexpr (std::is_same_v<To, double>) return sizeof(From) <= 4;
    else if constexpr (std::is_same_v<To, float>) return sizeof(From) <= 2;
    else return false;
  } else if constexpr (std::is_same_v<From, bool>) return true;
  else return sizeof(To) > sizeof(From) ? std::is_signed_v<To> || std::is_unsigned_v<From> : sizeof(To) == sizeof(From) && std::is_signed_v<To> == std::is_signed_v<From>;
}
}  // namespace detail

/// Whether a load may cast: any float to any float (round to nearest even; beyond the range: infinity, or NaN where there is none),
/// integers to types that hold all their values.
template <class = Deferred>
bool can_cast(DType from, DType to) {
  return detail::with_castable_type(from, [&](auto f) { return detail::with_castable_type(to, [&](auto t) { return detail::castable<decltype(t), decltype(f)>(); }); });
}

/// Casts `count` elements; neither side need be aligned. Pre: can_cast(from, to).
template <class = Deferred>
void cast_elements(DType from, std::byte const* source, DType to, std::byte* target, std::size_t count) {
  detail::with_castable_type(from, [&](auto f) {
    return detail::with_castable_type(to, [&](auto t) {
      using From = decltype(f);
      using To = decltype(t);
      if constexpr (detail::castable<To, From>()) {
        for (std::size_t i = 0; i < count; ++i) {
          From in;
          if constexpr (std::is_same_v<From, bool>) in = source[i] != std::byte{0};
          else std::memcpy(&in, source + i * sizeof(From), sizeof(From));
          To const out = detail::cast_element<To>(in);
          std::memcpy(target + i * sizeof(To), &out, sizeof(To));
        }
      }
      return true;
    });
  });
}

}  // namespace dcp
