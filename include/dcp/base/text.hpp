// SPDX-License-Identifier: Apache-2.0
#pragma once
// Text for people and for JSON: UTF-8, escapes, hexadecimal numbers, byte counts.

#include <dcp/base/config.hpp>

#include <array>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>

namespace dcp {

/// The position of the first byte that is not part of well-formed UTF-8 (RFC 3629: no overlong forms, no surrogates, at most
/// U+10FFFF), or npos when all of it is.
template <class = Deferred>
std::size_t first_invalid_utf8(std::string_view text) {
  auto const byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  for (std::size_t i = 0; i < text.size();) {
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

/// `text` as a JSON string with its quotes, escaped as serde_json does (the safetensors writer): only quote, backslash and the
/// control characters; everything else stays raw UTF-8.
template <class = Deferred>
std::string json_quoted(std::string_view text) {
  std::string out{'"'};
  out.reserve(text.size() + 2);
  for (char const c : text) {
    switch (c) {
      case '"': out += "\\\""; break;
      case '\\': out += "\\\\"; break;
      case '\b': out += "\\b"; break;
      case '\f': out += "\\f"; break;
      case '\n': out += "\\n"; break;
      case '\r': out += "\\r"; break;
      case '\t': out += "\\t"; break;
      default:
        if (static_cast<unsigned char>(c) < 0x20) {
          std::array<char, 7> escaped{};
          std::snprintf(escaped.data(), escaped.size(), "\\u%04x", static_cast<unsigned>(static_cast<unsigned char>(c)));
          out += escaped.data();
        } else {
          out += c;
        }
    }
  }
  return out += '"';
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
