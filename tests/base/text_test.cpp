// SPDX-License-Identifier: Apache-2.0
#include <dcp/base/text.hpp>

#include <doctest/doctest.h>

#include <cstdint>
#include <string>

using namespace dcp;

TEST_CASE("first_invalid_utf8: well-formed text of every length of character is all valid") {
  for (char const* text : {"", "plain", "\x7F", "\xC2\x80", "\xDF\xBF", "\xE0\xA0\x80", "\xED\x9F\xBF", "\xEE\x80\x80", "\xEF\xBF\xBF", "\xF0\x90\x80\x80", "\xF4\x8F\xBF\xBF", "a\xE2\x82\xAC" "b"})
    CHECK(first_invalid_utf8(text) == std::string::npos);
  CHECK(first_invalid_utf8(std::string_view{"a\0b", 3}) == std::string::npos);
}

TEST_CASE("first_invalid_utf8: overlong forms, surrogates, strays, cut characters and what is beyond Unicode are found where they begin") {
  for (char const* text : {"\x80", "\xBF", "\xC0\x80", "\xC1\xBF", "\xE0\x9F\xBF", "\xED\xA0\x80", "\xED\xBF\xBF", "\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xFE", "\xFF", "\xC2", "\xE2\x82", "\xF0\x9F\x98", "\xC2" "a",
                           "\xE2\x82" "a", "\xE2" "a\xAC"}) {
    CHECK(first_invalid_utf8(text) == 0);
    CHECK(first_invalid_utf8(std::string{"ab\xC3\xA9"} + text) == 4);
  }
}

TEST_CASE("law: first_invalid_utf8 accepts exactly the encodings of the Unicode scalar values") {
  std::uint32_t valid = 0;
  std::string text;
  // All sequences of four bytes that are at an edge of their class.
  static constexpr unsigned char bytes[] = {0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF};
  auto const decodes = [](std::string const& s) {   // by the definition: decode, and encode in the shortest form again
    for (std::size_t i = 0; i < s.size();) {
      auto const at = [&](std::size_t k) { return k < s.size() ? static_cast<unsigned char>(s[k]) : 0u; };
      unsigned const lead = at(i);
      std::size_t const length = lead < 0x80 ? 1 : lead >> 5 == 6 ? 2 : lead >> 4 == 14 ? 3 : lead >> 3 == 30 ? 4 : 0;
      if (length == 0 || i + length > s.size()) return false;
      std::uint32_t code = length == 1 ? lead : lead & (0x7Fu >> length);
      for (std::size_t k = 1; k < length; ++k) {
        if (at(i + k) >> 6 != 2) return false;
        code = code << 6 | (at(i + k) & 0x3F);
      }
      std::size_t const shortest = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
      if (shortest != length || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) return false;
      i += length;
    }
    return true;
  };
  bool right = true;
  for (unsigned a : bytes)
    for (unsigned b : bytes)
      for (unsigned c : bytes)
        for (unsigned d : bytes) {
          text.assign({static_cast<char>(a), static_cast<char>(b), static_cast<char>(c), static_cast<char>(d)});
          bool const wanted = decodes(text);
          right = right && (first_invalid_utf8(text) == std::string::npos) == wanted;
          valid += wanted ? 1 : 0;
        }
  CHECK(right);
  CHECK(valid > 200);
}

TEST_CASE("json_quoted: escapes quote, backslash and control characters, and nothing else") {
  CHECK(json_quoted("") == "\"\"");
  CHECK(json_quoted("a/b\x7F\xC3\xA9") == "\"a/b\x7F\xC3\xA9\"");
  CHECK(json_quoted("\"\\\b\f\n\r\t\x01\x1F") == "\"\\\"\\\\\\b\\f\\n\\r\\t\\u0001\\u001f\"");
  CHECK(json_quoted(std::string_view{"\0", 1}) == "\"\\u0000\"");
}

TEST_CASE("hex16: 16 lower-case digits, read back and only so") {
  for (std::uint64_t value : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{0xAE8B14860A799888}, UINT64_MAX}) {
    std::uint64_t found = 5;
    CHECK(parse_hex16(hex16(value), found));
    CHECK(found == value);
  }
  CHECK(hex16(0xABC) == "0000000000000abc");
  std::uint64_t value = 0;
  for (char const* text : {"", "abc", "0000000000000ABC", "0x00000000000abc", "0000000000000abcd", " 000000000000abc", "-000000000000abc", "000000000000000g"}) CHECK_FALSE(parse_hex16(text, value));
}

TEST_CASE("human_bytes: a number and a unit") {
  CHECK(human_bytes(0) == "0 B");
  CHECK(human_bytes(1023) == "1023 B");
  CHECK(human_bytes(1536) == "1.5 KiB");
  CHECK(human_bytes(std::uint64_t{5} << 40) == "5.0 TiB");
  CHECK(human_bytes(UINT64_MAX) == "16.0 EiB");
}
