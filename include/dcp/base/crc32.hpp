// SPDX-License-Identifier: Apache-2.0
#pragma once
// CRC-32 as zip archives carry it (CRC-32/ISO-HDLC): the same algebra as checksum.hpp, with a polynomial of degree 32.
//
// Words are reflected: bit i of a 32-bit word is the coefficient of x^(31-i). The *raw* CRC of bytes M is M * x^32 mod P with nothing added
// at either end; the one that everybody else means starts from all ones and ends inverted.

#include <dcp/base/config.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/crc_folding.hpp>
#include <dcp/base/instructions.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace dcp {
namespace detail {

// x^32 mod P, bits reversed (APPNOTE.TXT 4.4.7: the "magic number" of zip).
inline constexpr std::uint32_t crc32_polynomial = 0xedb88320;
inline constexpr std::uint32_t crc32_one = std::uint32_t{1} << 31;

constexpr std::uint32_t crc32_times_x(std::uint32_t a) { return (a >> 1) ^ (crc32_polynomial & (0 - (a & 1))); }

/// a * b mod P.
constexpr std::uint32_t crc32_multiply(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product = 0;
  for (; a != 0; a <<= 1, b = crc32_times_x(b)) product ^= b & (0 - (a >> 31));
  return product;
}

/// x^n mod P.
constexpr std::uint32_t crc32_x_to(unsigned n) {
  std::uint32_t result = crc32_one;
  for (std::uint32_t power = crc32_times_x(crc32_one); n != 0; n >>= 1, power = crc32_multiply(power, power))
    if ((n & 1) != 0) result = crc32_multiply(result, power);
  return result;
}

// [k] is x^(8 * 2^k): what 2^k zero bytes multiply by.
template <class = Deferred>
std::array<std::uint32_t, 64> const& crc32_zero_bytes() {
  static constexpr auto result = [] {
    std::array<std::uint32_t, 64> table{};
    table[0] = crc32_x_to(8);
    for (std::size_t k = 1; k < table.size(); ++k) table[k] = crc32_multiply(table[k - 1], table[k - 1]);
    return table;
  }();
  return result;
}

// [k][b] is byte b followed by k zero bytes: sixteen look-ups do sixteen bytes.
template <class = Deferred>
std::array<std::array<std::uint32_t, 256>, 16> const& crc32_slices() {
  static constexpr auto result = [] {
    std::array<std::array<std::uint32_t, 256>, 16> table{};
    for (std::size_t b = 0; b < 256; ++b) {
      auto state = static_cast<std::uint32_t>(b);
      for (int bit = 0; bit < 8; ++bit) state = crc32_times_x(state);
      table[0][b] = state;
    }
    for (std::size_t k = 1; k < table.size(); ++k)
      for (std::size_t b = 0; b < 256; ++b) table[k][b] = (table[k - 1][b] >> 8) ^ table[0][table[k - 1][b] & 0xff];
    return table;
  }();
  return result;
}

struct Crc32Zip {
  using Word = std::uint32_t;
  template <class = Deferred>
  static Word tables(std::byte const* bytes, std::size_t size, Word state) {
    for (; size >= 16; bytes += 16, size -= 16) state = remainder(load_little_endian<std::uint64_t>(bytes) ^ state, load_little_endian<std::uint64_t>(bytes + 8));
    for (; size > 0; ++bytes, --size) state = (state >> 8) ^ crc32_slices()[0][(state ^ std::to_integer<std::uint32_t>(*bytes)) & 0xff];
    return state;
  }
  template <unsigned Bits>
  static CrcFold fold_over() {   // the 32 coefficients of a remainder are the upper half of a reflected 64-bit word
    static constexpr CrcFold result{std::uint64_t{crc32_x_to(Bits + 63)} << 32, std::uint64_t{crc32_x_to(Bits - 1)} << 32};
    return result;
  }
  template <class = Deferred>
  static Word remainder(std::uint64_t low, std::uint64_t high) {
    auto const& t = crc32_slices();
    return t[15][low & 0xff] ^ t[14][(low >> 8) & 0xff] ^ t[13][(low >> 16) & 0xff] ^ t[12][(low >> 24) & 0xff] ^ t[11][(low >> 32) & 0xff] ^
           t[10][(low >> 40) & 0xff] ^ t[9][(low >> 48) & 0xff] ^ t[8][low >> 56] ^ t[7][high & 0xff] ^ t[6][(high >> 8) & 0xff] ^
           t[5][(high >> 16) & 0xff] ^ t[4][(high >> 24) & 0xff] ^ t[3][(high >> 32) & 0xff] ^ t[2][(high >> 40) & 0xff] ^
           t[1][(high >> 48) & 0xff] ^ t[0][high >> 56];
  }
};

}  // namespace detail

/// One way to compute. All give equal results; they differ in the instructions they need.
struct Crc32Implementation {
  char const* name;
  std::uint32_t (*raw)(std::byte const* bytes, std::size_t size, std::uint32_t state);
};

/// What this processor can run, slowest first; crc32 uses the last one.
template <class = Deferred>
std::span<Crc32Implementation const> crc32_implementations() {
  using detail::Crc32Zip;
  static std::array<Crc32Implementation, 3> list{{{"tables", Crc32Zip::tables}}};
  static std::size_t const count = [] {
    std::size_t n = 1;
#if DCP_X86_KERNELS
    __builtin_cpu_init();   // a caller may run before the constructors of the run-time library
    if (__builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1")) {
      list[n++] = {"pclmulqdq", detail::crc_raw_clmul<Crc32Zip>};
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq")) list[n++] = {"vpclmulqdq-512", detail::crc_raw_vclmul<Crc32Zip>};
    }
#endif
    return n;
  }();
  return std::span{list}.first(count);
}

namespace detail {
template <class = Deferred>
Crc32Implementation const& crc32_best() {
  static Crc32Implementation const best = crc32_implementations().back();
  return best;
}
}  // namespace detail

/// The CRC-32 of bytes that follow those whose CRC-32 is `before`.
///
/// Law       crc32(b, crc32(a)) == crc32(a ++ b);  crc32 of nothing == 0
/// Example   crc32 of "123456789" == 0xcbf43926
template <class = Deferred>
std::uint32_t crc32(ConstByteSpan bytes, std::uint32_t before = 0) { return ~detail::crc32_best().raw(bytes.data(), bytes.size(), ~before); }

/// The CRC-32 of two byte strings, one after the other, of which the second has `second_size` bytes. At most 64 products of 32 steps.
template <class = Deferred>
std::uint32_t crc32_combine(std::uint32_t first, std::uint32_t second, std::uint64_t second_size) {
  for (std::size_t k = 0; second_size != 0; ++k, second_size >>= 1)
    if ((second_size & 1) != 0) first = detail::crc32_multiply(first, detail::crc32_zero_bytes()[k]);
  return first ^ second;
}

}  // namespace dcp
