// SPDX-License-Identifier: Apache-2.0
#pragma once
// Text for people and for JSON: UTF-8, escapes, hexadecimal numbers, byte counts.

#include <dcp/base/bytes.hpp>
#include <dcp/base/config.hpp>

#include <array>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <string_view>

namespace dcp {

namespace detail {
/// How many bytes at the start of `text` are certainly ASCII that JSON quotes as it is, in steps of 8: names hold little else.
template <class = Deferred>
std::size_t plain_prefix(std::string_view text) {
  constexpr std::uint64_t ones = 0x0101010101010101u, high = 0x8080808080808080u;
  std::size_t at = 0;
  for (; at + 8 <= text.size(); at += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, text.data() + at, 8);
    auto const zeros = [&](std::uint64_t x) { return (x - ones) & ~x; };   // the high bit of each zero byte, and of some above one
    if (((word | (word - 0x20 * ones) | zeros(word ^ ('"' * ones)) | zeros(word ^ ('\\' * ones))) & high) != 0) break;
  }
  return at;
}
}  // namespace detail

/// The position of the first byte that is not part of well-formed UTF-8 (RFC 3629: no overlong forms, no surrogates, at most
/// U+10FFFF), or npos when all of it is.
template <class = Deferred>
std::size_t first_invalid_utf8(std::string_view text) {
  auto const byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  for (std::size_t i = detail::plain_prefix(text); i < text.size();) {
    unsigned const lead = byte(i);
    if (lead < 0x80) {
      ++i;
      continue;
    }
    int const more = lead >= 0xC2 && lead <= 0xDF ? 1 : (lead & 0xF0) == 0xE0 ? 2 : lead >= 0xF0 && lead <= 0xF4 ? 3 : -1;
    if (more < 0 || i + static_cast<std::size_t>(more) >= text.size()) return i;
    unsigned const second = byte(i + 1);
    unsigned const low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    unsigned const high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    if (second < low || second > high) return i;
    for (int k = 2; k <= more; ++k)
      if ((byte(i + static_cast<std::size_t>(k)) & 0xC0) != 0x80) return i;
    i += static_cast<std::size_t>(more) + 1;
  }
  return std::string_view::npos;
}

/// Takes text as a std::string does, and keeps only its length: what a text will have, before there is a need for it.
class TextLength {
 public:
  TextLength& append(std::string_view text) {
    size_ += text.size();
    return *this;
  }
  std::size_t size() const { return size_; }

 private:
  std::size_t size_ = 0;
};

/// Appends `text` as a JSON string with its quotes, escaped as serde_json does (the safetensors writer): only quote, backslash and the
/// control characters; everything else stays raw UTF-8. `out`: std::string or TextLength.
template <class Out>
void append_json_quoted(Out& out, std::string_view text) {
  auto const plain = [](char c) { return static_cast<unsigned char>(c) >= 0x20 && c != '"' && c != '\\'; };
  out.append("\"");
  for (std::size_t at = 0; at < text.size();) {
    std::size_t end = at + detail::plain_prefix(text.substr(at));
    while (end < text.size() && plain(text[end])) ++end;
    out.append(text.substr(at, end - at));
    if (end == text.size()) break;
    switch (char const c = text[end]) {
      case '"': out.append("\\\""); break;
      case '\\': out.append("\\\\"); break;
      case '\b': out.append("\\b"); break;
      case '\f': out.append("\\f"); break;
      case '\n': out.append("\\n"); break;
      case '\r': out.append("\\r"); break;
      case '\t': out.append("\\t"); break;
      default: {
        std::array<char, 7> escaped{};
        std::snprintf(escaped.data(), escaped.size(), "\\u%04x", static_cast<unsigned>(static_cast<unsigned char>(c)));
        out.append(std::string_view{escaped.data()});
      }
    }
    at = end + 1;
  }
  out.append("\"");
}
template <class = Deferred>
std::string json_quoted(std::string_view text) {
  std::string out;
  out.reserve(text.size() + 2);
  append_json_quoted(out, text);
  return out;
}

/// Appends a number in decimal.
template <class Out>
void append_number(Out& out, std::uint64_t number) {
  std::array<char, 20> digits;
  char* at = digits.data() + digits.size();
  do *--at = static_cast<char>('0' + number % 10);
  while ((number /= 10) != 0);
  out.append(std::string_view{at, static_cast<std::size_t>(digits.data() + digits.size() - at)});
}

/// 16 lower-case hexadecimal digits.
template <class = Deferred>
std::string hex16(std::uint64_t value) {
  std::array<char, 17> digits{};
  std::snprintf(digits.data(), digits.size(), "%016llx", static_cast<unsigned long long>(value));
  return std::string{digits.data(), 16};
}

/// The number that hex16 wrote; false for anything else.
template <class = Deferred>
bool parse_hex16(std::string_view text, std::uint64_t& value) {
  if (text.size() != 16) return false;
  for (char const c : text)
    if (!((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'))) return false;
  auto const result = std::from_chars(text.data(), text.data() + text.size(), value, 16);
  return result.ec == std::errc{} && result.ptr == text.data() + text.size();
}

/// Two lower-case hexadecimal digits a byte.
template <class = Deferred>
std::string hex_text(ConstByteSpan bytes) {
  constexpr std::string_view digits = "0123456789abcdef";
  std::string out;
  out.reserve(2 * bytes.size());
  for (auto const byte : bytes) out += digits[static_cast<std::size_t>(byte >> 4)], out += digits[static_cast<std::size_t>(byte & std::byte{15})];
  return out;
}

/// "12 B", "3.4 MiB".
template <class = Deferred>
std::string human_bytes(std::uint64_t bytes) {
  constexpr std::array units{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  double value = static_cast<double>(bytes);
  std::size_t unit = 0;
  while (value >= 1024 && unit + 1 < units.size()) value /= 1024, ++unit;
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), unit == 0 ? "%.0f %s" : "%.1f %s", value, units[unit]);
  return text.data();
}

}  // namespace dcp
