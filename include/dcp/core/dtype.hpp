// SPDX-License-Identifier: Apache-2.0
#pragma once
// Element types: the 22 of safetensors and two more of PyTorch, the C++ types that stand for them, and the small floats that C++ lacks.

#include <dcp/base/bytes.hpp>

#include <array>
#include <bit>
#include <complex>
#include <cstdint>
#include <ostream>
#include <string_view>
#include <type_traits>

namespace dcp {

/// Those of safetensors in the order in which its writer ranks them, low to high (a file holds the highest first); then those that it lacks.
/// Source    safetensors crate 0.8, enum Dtype; torch.complex32 and torch.complex128
enum class DType : std::uint8_t {
  boolean, f4, f6_e2m3, f6_e3m2, u8, i8, f8_e5m2, f8_e4m3, f8_e8m0, f8_e4m3fnuz, f8_e5m2fnuz,
  i16, u16, f16, bf16, i32, u32, f32, c64, f64, i64, u64,
  c32, c128,
};

namespace detail {
struct DTypeFacts {
  std::string_view name;
  int bits;
};
inline constexpr std::array<DTypeFacts, 24> dtype_facts{{
    {"BOOL", 8}, {"F4", 4}, {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8}, {"I8", 8}, {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8},
    {"I16", 16}, {"U16", 16}, {"F16", 16}, {"BF16", 16}, {"I32", 32}, {"U32", 32}, {"F32", 32}, {"C64", 64}, {"F64", 64}, {"I64", 64}, {"U64", 64},
    {"C32", 32}, {"C128", 128},
}};
}  // namespace detail

inline constexpr int dtype_count = 24, safetensors_dtype_count = 22;
constexpr std::string_view to_string(DType dtype) { return detail::dtype_facts[static_cast<std::size_t>(dtype)].name; }
constexpr int bits_of(DType dtype) { return detail::dtype_facts[static_cast<std::size_t>(dtype)].bits; }
inline std::ostream& operator<<(std::ostream& out, DType dtype) { return out << to_string(dtype); }

/// Whether a tensor's values, and not codes for some, are held as this: the floats of two bytes and more.
constexpr bool is_wide_float(DType dtype) { return dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16 || dtype == DType::f64; }

/// Whether safetensors has it.
constexpr bool in_safetensors(DType dtype) { return static_cast<int>(dtype) < safetensors_dtype_count; }

/// The dtype with this name, as safetensors spells it or would (case matters); false if there is none.
constexpr bool parse_dtype(std::string_view name, DType& dtype) {
  for (int i = 0; i < dtype_count; ++i)
    if (detail::dtype_facts[static_cast<std::size_t>(i)].name == name) return dtype = static_cast<DType>(i), true;
  return false;
}

/// A float of one sign bit, `Exponent` and `Mantissa` bits, held in a byte or two.
/// How    `Finite`: no infinity; the all-ones code is NaN ("FN") or, with `Nuz`, the code of minus zero is the only NaN
/// Source OCP 8-bit floating point specification 1.0 (E4M3, E5M2); the FNUZ variants as in MLIR's and PyTorch's float8 types
template <int Exponent, int Mantissa, bool Finite, bool Nuz, class Bits>
class SmallFloat {
 public:
  using bits_type = Bits;
  constexpr SmallFloat() = default;
  /// Rounds to nearest, ties to even. Beyond the largest finite value: infinity where there is one, else NaN.
  constexpr explicit SmallFloat(float value) : bits_{encode(std::bit_cast<std::uint32_t>(value))} {}
  static constexpr SmallFloat from_bits(Bits bits) {
    SmallFloat result;
    result.bits_ = bits;
    return result;
  }
  constexpr Bits bits() const { return bits_; }
  constexpr explicit operator float() const { return std::bit_cast<float>(decode(bits_)); }

  friend constexpr bool operator==(SmallFloat a, SmallFloat b) { return static_cast<float>(a) == static_cast<float>(b); }

 private:
  static constexpr int bias = (1 << (Exponent - 1)) - 1 + (Nuz ? 1 : 0);
  static constexpr std::uint32_t sign_bit = 1u << (Exponent + Mantissa);
  static constexpr std::uint32_t exponent_mask = ((1u << Exponent) - 1) << Mantissa;
  static constexpr std::uint32_t magnitude_mask = sign_bit - 1;
  static constexpr std::uint32_t nan_code = Nuz ? sign_bit : Finite ? magnitude_mask : exponent_mask | (1u << (Mantissa - 1));
  static constexpr std::uint32_t largest = Nuz ? magnitude_mask : Finite ? magnitude_mask - 1 : exponent_mask - 1;

  static constexpr std::uint32_t decode(std::uint32_t code) {
    std::uint32_t const sign = (code & sign_bit) != 0 ? 0x80000000u : 0u;
    std::uint32_t const magnitude = code & magnitude_mask;
    if (Nuz && code == sign_bit) return 0x7FC00000u;
    if (Finite && !Nuz && magnitude == magnitude_mask) return sign | 0x7FC00000u;
    if (!Finite && magnitude >= exponent_mask) return sign | 0x7F800000u | ((magnitude & ~exponent_mask) << (23 - Mantissa));
    std::uint32_t exponent = magnitude >> Mantissa;
    std::uint32_t mantissa = magnitude & ((1u << Mantissa) - 1);
    if (exponent == 0) {
      if (mantissa == 0) return sign;
      if constexpr (Exponent == 8) return sign | (mantissa << (23 - Mantissa));   // as subnormal in float as here (bfloat16)
      int shift = 0;
      while ((mantissa & (1u << Mantissa)) == 0) mantissa <<= 1, ++shift;
      mantissa &= (1u << Mantissa) - 1;
      return sign | (static_cast<std::uint32_t>(127 - bias + 1 - shift) << 23) | (mantissa << (23 - Mantissa));
    }
    return sign | ((exponent + static_cast<std::uint32_t>(127 - bias)) << 23) | (mantissa << (23 - Mantissa));
  }

  static constexpr Bits encode(std::uint32_t x) {
    std::uint32_t const sign = (x >> 31) != 0 ? sign_bit : 0u;
    std::uint32_t const magnitude = x & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return static_cast<Bits>(Nuz ? nan_code : sign | nan_code);
    std::uint32_t const overflow = Nuz ? nan_code : Finite ? sign | nan_code : sign | exponent_mask;
    if (magnitude == 0x7F800000u) return static_cast<Bits>(overflow);
    std::uint32_t const zero = Nuz ? 0u : sign;
    int const field = static_cast<int>(magnitude >> 23);
    if (field == 0 && Exponent < 8) return static_cast<Bits>(zero);   // a float subnormal is below half of every smallest value here
    std::uint32_t const significand = field == 0 ? magnitude : (magnitude & 0x7FFFFFu) | 0x800000u;
    int target = (field == 0 ? 1 : field) - 127 + bias;
    int shift = 23 - Mantissa;
    if (target <= 0) shift += 1 - target, target = 0;
    if (field == 0) target = 0;
    if (shift > 25) return static_cast<Bits>(zero);
    std::uint32_t quotient = significand >> shift;
    std::uint32_t const remainder = significand & ((1u << shift) - 1), half = 1u << (shift - 1);
    if (remainder > half || (remainder == half && (quotient & 1u) != 0)) ++quotient;
    std::uint32_t const code = target == 0 ? quotient : (static_cast<std::uint32_t>(target - 1) << Mantissa) + quotient;
    if (code > largest) return static_cast<Bits>(overflow);
    return static_cast<Bits>(code == 0 ? zero : sign | code);
  }

  Bits bits_{};
};

using bf16 = SmallFloat<8, 7, false, false, std::uint16_t>;
using f16 = SmallFloat<5, 10, false, false, std::uint16_t>;
using f8_e4m3 = SmallFloat<4, 3, true, false, std::uint8_t>;
using f8_e5m2 = SmallFloat<5, 2, false, false, std::uint8_t>;
using f8_e4m3fnuz = SmallFloat<4, 3, true, true, std::uint8_t>;
using f8_e5m2fnuz = SmallFloat<5, 2, true, true, std::uint8_t>;

/// A power of two, 2^(code - 127); code 255 is NaN. A scale of the OCP microscaling formats; has no sign and no zero.
class f8_e8m0 {
 public:
  constexpr f8_e8m0() = default;
  static constexpr f8_e8m0 from_bits(std::uint8_t bits) {
    f8_e8m0 result;
    result.bits_ = bits;
    return result;
  }
  constexpr std::uint8_t bits() const { return bits_; }
  constexpr explicit operator float() const {
    return std::bit_cast<float>(bits_ == 255 ? 0x7FC00000u : bits_ == 0 ? 0x00400000u : static_cast<std::uint32_t>(bits_) << 23);
  }

 private:
  std::uint8_t bits_{};
};

/// Elements smaller than a byte. They are never held one by one: memory of such a tensor is std::byte, packed as in the file.
struct f4 {};        // E2M1; the even element of a pair lies in the low four bits, as every known producer packs it
struct f6_e2m3 {};
struct f6_e3m2 {};
/// A complex number of two halves, torch.complex32.
struct complex_f16 {
  f16 real, imag;
  friend constexpr bool operator==(complex_f16 const&, complex_f16 const&) = default;
};

namespace detail {
template <class T>
constexpr int dtype_index() {
  if constexpr (std::is_same_v<T, bool>) return static_cast<int>(DType::boolean);
  else if constexpr (std::is_same_v<T, f4>) return static_cast<int>(DType::f4);
  else if constexpr (std::is_same_v<T, f6_e2m3>) return static_cast<int>(DType::f6_e2m3);
  else if constexpr (std::is_same_v<T, f6_e3m2>) return static_cast<int>(DType::f6_e3m2);
  else if constexpr (std::is_same_v<T, f8_e5m2>) return static_cast<int>(DType::f8_e5m2);
  else if constexpr (std::is_same_v<T, f8_e4m3>) return static_cast<int>(DType::f8_e4m3);
  else if constexpr (std::is_same_v<T, f8_e8m0>) return static_cast<int>(DType::f8_e8m0);
  else if constexpr (std::is_same_v<T, f8_e4m3fnuz>) return static_cast<int>(DType::f8_e4m3fnuz);
  else if constexpr (std::is_same_v<T, f8_e5m2fnuz>) return static_cast<int>(DType::f8_e5m2fnuz);
  else if constexpr (std::is_same_v<T, f16>) return static_cast<int>(DType::f16);
  else if constexpr (std::is_same_v<T, bf16>) return static_cast<int>(DType::bf16);
  else if constexpr (std::is_same_v<T, float>) return static_cast<int>(DType::f32);
  else if constexpr (std::is_same_v<T, double>) return static_cast<int>(DType::f64);
  else if constexpr (std::is_same_v<T, std::complex<float>>) return static_cast<int>(DType::c64);
  else if constexpr (std::is_same_v<T, std::complex<double>>) return static_cast<int>(DType::c128);
  else if constexpr (std::is_same_v<T, complex_f16>) return static_cast<int>(DType::c32);
  else if constexpr (std::is_same_v<T, std::byte>) return static_cast<int>(DType::u8);
  else if constexpr (std::is_integral_v<T>) {
    constexpr std::array<DType, 4> with_sign{DType::i8, DType::i16, DType::i32, DType::i64}, without{DType::u8, DType::u16, DType::u32, DType::u64};
    constexpr int log = std::bit_width(sizeof(T)) - 1;
    if constexpr (log < 4) return static_cast<int>((std::is_signed_v<T> ? with_sign : without)[static_cast<std::size_t>(log)]);
    else return -1;
  } else return -1;
}
}  // namespace detail

/// Whether `T` can be the element type of a tensor in a checkpoint.
template <class T>
inline constexpr bool is_element = detail::dtype_index<std::remove_cv_t<T>>() >= 0;

/// The dtype of element type `T`: bool, the fixed-width integers, float, double, std::complex of both, std::byte (as U8), and the
/// types of this header.
template <class T>
inline constexpr DType dtype_of = static_cast<DType>(detail::dtype_index<std::remove_cv_t<T>>());

/// What memory of such a tensor consists of: T itself, or bytes for elements smaller than a byte.
template <class T>
using storage_of = std::conditional_t<std::is_same_v<T, f4> || std::is_same_v<T, f6_e2m3> || std::is_same_v<T, f6_e3m2>, std::byte, T>;

}  // namespace dcp
