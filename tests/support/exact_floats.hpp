// SPDX-License-Identifier: Apache-2.0
#pragma once
// Small floats as their specifications say them, in exact arithmetic of doubles: an oracle that shares no code with the library.
// Source    OCP 8-bit floating point specification 1.0, OCP Microscaling Formats specification 1.0, IEEE 754

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace dcp::test::exact {

/// What the topmost codes of a format are.
enum class Top : std::uint8_t { infinity_and_nan, one_nan, numbers, minus_zero_is_nan };

/// A float of one sign bit, `exponent` and `mantissa` bits.
struct Format {
  int exponent, mantissa, bias;
  Top top;
};
inline constexpr Format e4m3{4, 3, 7, Top::one_nan}, e5m2{5, 2, 15, Top::infinity_and_nan}, e2m1{2, 1, 1, Top::numbers}, e4m3fnuz{4, 3, 8, Top::minus_zero_is_nan},
    e5m2fnuz{5, 2, 16, Top::minus_zero_is_nan}, half{5, 10, 15, Top::infinity_and_nan}, bfloat{8, 7, 127, Top::infinity_and_nan};

inline double value_of(Format const& format, std::uint32_t code) {
  int const m = static_cast<int>(code & ((1u << format.mantissa) - 1)), e = static_cast<int>(code >> format.mantissa & ((1u << format.exponent) - 1)), last = (1 << format.exponent) - 1;
  bool const minus = (code >> (format.exponent + format.mantissa) & 1u) != 0;
  constexpr double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  if (format.top == Top::minus_zero_is_nan && minus && e == 0 && m == 0) return nan;
  if (format.top == Top::one_nan && e == last && m == (1 << format.mantissa) - 1) return nan;
  if (format.top == Top::infinity_and_nan && e == last) return m != 0 ? nan : minus ? -infinity : infinity;
  double const size = e == 0 ? std::ldexp(m, 1 - format.bias - format.mantissa) : std::ldexp(m + (1 << format.mantissa), e - format.bias - format.mantissa);
  return minus ? -size : size;
}

/// A power of two by its exponent.
inline double e8m0(std::uint32_t code) { return code == 255 ? std::numeric_limits<double>::quiet_NaN() : std::ldexp(1.0, static_cast<int>(code) - 127); }

/// The code nearest to a number, of two the even one; of a format with infinities.
inline std::uint32_t code_of(Format const& format, double value) {
  std::uint32_t const sign = std::signbit(value) ? 1u << (format.exponent + format.mantissa) : 0u, infinity = ((1u << format.exponent) - 1) << format.mantissa;
  if (std::isnan(value)) return sign | infinity | 1u << (format.mantissa - 1);
  if (std::isinf(value)) return sign | infinity;
  if (value == 0) return sign;
  int const least = 1 - format.bias, e = std::max(least, std::ilogb(value));
  auto const steps = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(std::abs(value), format.mantissa - e)));
  return sign | std::min(infinity, (static_cast<std::uint32_t>(e - least) << format.mantissa) + steps);
}

/// Equal bits; every NaN is every other.
inline bool same(float a, float b) { return std::isnan(a) ? std::isnan(b) : std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b); }
inline bool same(float a, double b) { return same(a, static_cast<float>(b)); }

}  // namespace dcp::test::exact
