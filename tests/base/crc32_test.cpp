// SPDX-License-Identifier: Apache-2.0
#include <dcp/base/crc32.hpp>

#include "support/generate.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <vector>

using namespace dcp;

namespace {

// The definition, bit by bit and unreflected: long division of the bit-reversed bytes by P. Shares nothing with the header.
std::uint32_t divide(ConstByteSpan bytes, std::uint32_t init) {
  std::uint32_t remainder = init;   // zero or all ones, which are their own reflections
  for (std::byte const b : bytes)
    for (int bit = 0; bit < 8; ++bit) {
      bool const in = ((std::to_integer<unsigned>(b) >> bit) & 1U) != 0;
      bool const out = (remainder >> 31) != 0;
      remainder = (remainder << 1) ^ (in != out ? 0x04c11db7U : 0U);
    }
  std::uint32_t reflected = 0;
  for (int bit = 0; bit < 32; ++bit, remainder >>= 1) reflected = (reflected << 1) | (remainder & 1);
  return reflected;
}

Bytes joined(ConstByteSpan a, ConstByteSpan b) {
  Bytes result(a.begin(), a.end());
  result.insert(result.end(), b.begin(), b.end());
  return result;
}

/// Byte i is (7 i + i / 256) mod 256.
Bytes pattern(std::size_t size) {
  Bytes bytes(size);
  for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(7 * i + i / 256);
  return bytes;
}

}  // namespace

TEST_CASE("crc32: the check value of the catalogue, from every implementation") {
  auto const digits = as_byte_span("123456789");
  CHECK(crc32(digits) == 0xcbf43926U);
  CHECK(crc32({}) == 0);
  CHECK(crc32({}, 0x12345678U) == 0x12345678U);
  CHECK(~divide(digits, ~std::uint32_t{0}) == 0xcbf43926U);
  for (auto const& implementation : crc32_implementations()) {
    CAPTURE(implementation.name);
    CHECK(~implementation.raw(digits.data(), digits.size(), ~std::uint32_t{0}) == 0xcbf43926U);
  }
}

TEST_CASE("crc32: the values of zlib") {
  // zlib.crc32 of CPython 3.11
  CHECK(crc32(as_byte_span("a")) == 0xe8b7be43U);
  CHECK(crc32(as_byte_span("3\n")) == 0x55679ed1U);
  CHECK(crc32(as_byte_span("little")) == 0x19e33d85U);
  CHECK(crc32(as_byte_span("The quick brown fox jumps over the lazy dog")) == 0x414fa339U);
  CHECK(crc32(Bytes(1 << 20)) == 0xa738ea1cU);
  CHECK(crc32(Bytes(4096, std::byte{0xff})) == 0xf154670aU);
  struct Known {
    std::size_t size;
    std::uint32_t crc;
  };
  for (auto const& known : std::vector<Known>{{1, 0xd202ef8dU}, {15, 0xc356fbb9U}, {16, 0x54126ba2U}, {17, 0xba8b4e1eU}, {63, 0xfd395ff8U}, {64, 0xd324a7d4U}, {65, 0xc80b1f57U}, {255, 0x89b9aecbU}, {256, 0x1a5c07a3U}, {257, 0xeac0714eU}, {1000, 0x668f073dU}, {65536, 0xdf6fd768U}, {100003, 0xb697026U}}) {
    CAPTURE(known.size);
    CHECK(crc32(pattern(known.size)) == known.crc);
  }
}

TEST_CASE("crc32_implementations: the portable tables are always there, and names are distinct") {
  auto const list = crc32_implementations();
  REQUIRE(list.size() >= 1);
  CHECK(std::string_view{list.front().name} == "tables");
  for (std::size_t i = 1; i < list.size(); ++i) CHECK(std::string_view{list[i].name} != std::string_view{list[i - 1].name});
#if defined(__x86_64__)
  CHECK((list.size() > 1) == (__builtin_cpu_supports("pclmul") != 0));
#endif
}

TEST_CASE("law: every implementation gives the remainder of long division, at every length to 300 and every offset below 32") {
  std::uint64_t const seed = test::first_seed();
  CAPTURE(seed);
  test::Random random{seed};
  Bytes const bytes = random.bytes(700);
  auto const state = static_cast<std::uint32_t>(random.between(0, 0xffffffff));
  for (std::size_t size = 0; size <= 300; ++size)
    for (std::size_t offset = 0; offset < 32; ++offset) {
      auto const run = ConstByteSpan{bytes}.subspan(offset, size);
      auto const expected = divide(run, 0);
      for (auto const& implementation : crc32_implementations()) {
        CAPTURE(implementation.name);
        CAPTURE(size);
        CAPTURE(offset);
        REQUIRE(implementation.raw(run.data(), run.size(), 0) == expected);
      }
    }
  for (std::size_t size = 0; size <= 640; ++size) {
    Bytes const exact = joined(ConstByteSpan{bytes}.subspan(size % 32, size), {});   // ends where its allocation ends, so that a sanitizer sees a read past it
    auto const expected = divide(exact, 0), continued = crc32_combine(state, expected, size);
    for (auto const& implementation : crc32_implementations()) {
      CAPTURE(implementation.name);
      CAPTURE(size);
      REQUIRE(implementation.raw(exact.data(), exact.size(), 0) == expected);
      REQUIRE(implementation.raw(exact.data(), exact.size(), state) == continued);
    }
  }
}

TEST_CASE("law: crc32(b, crc32(a)) and crc32_combine are the crc32 of both, one after the other") {
  std::uint64_t const first = test::first_seed();
  for (std::uint64_t seed = first; seed < first + 200; ++seed) {
    CAPTURE(seed);
    test::Random random{seed};
    auto const size = [&] { return static_cast<std::size_t>(random.one_in(4) ? random.between(0, 100'000) : random.between(0, 600)); };
    Bytes const a = random.bytes(size()), b = random.bytes(size()), both = joined(a, b);
    REQUIRE(crc32(b, crc32(a)) == crc32(both));
    REQUIRE(crc32_combine(crc32(a), crc32(b), b.size()) == crc32(both));
    for (auto const& implementation : crc32_implementations()) REQUIRE(~implementation.raw(both.data(), both.size(), ~std::uint32_t{0}) == crc32(both));
  }
  // x^(2^32 - 1) == 1, so that 2^32 - 1 zero bytes change nothing.
  CHECK(crc32_combine(0xdeadbeefU, 0, 0xffffffffU) == 0xdeadbeefU);
}
