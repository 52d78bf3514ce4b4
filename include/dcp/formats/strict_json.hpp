// SPDX-License-Identifier: Apache-2.0
#pragma once
// JSON from strangers: events of one document, no tree, every departure from the grammar refused.
//
// nlohmann's SAX parser does the grammar; three of its habits must not reach a file format: it skips a byte order mark, takes a NUL
// for the end of the text, and calls -0 an integer. Faults have one order, whatever stands first in the text: encoding, then grammar
// and depth, then the first fault of the schema. So a reader's answer does not depend on how a broken text happens to be ordered.

#include <dcp/base/config.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/text.hpp>

#include <nlohmann/json.hpp>

#include <array>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace dcp::detail {

/// No format spoken here nests deeper than 3 levels; fields that a reader ignores may, up to here.
inline constexpr int max_json_depth = 16;

enum class JsonKind : std::uint8_t { null, boolean, natural, other_number, string };

struct JsonScalar {
  JsonKind kind = JsonKind::null;
  std::uint64_t natural = 0;            // an integer from 0 to 2^64 - 1 without sign, fraction or exponent
  std::string const* text = nullptr;    // of a string, unescaped
};

template <class = Deferred>
std::string_view to_string(JsonKind kind) {
  constexpr std::array<std::string_view, 5> names{"null", "true or false", "an integer", "a number that is no unsigned 64-bit integer", "a string"};
  return names[static_cast<std::size_t>(kind)];
}

/// A name from a file as part of a sentence: quoted, escaped, and cut when it is long.
template <class = Deferred>
std::string shown(std::string_view name) {
  constexpr std::size_t most = 120;
  if (name.size() <= most) return json_quoted(name);
  std::size_t cut = most;
  while (cut > 0 && (static_cast<unsigned char>(name[cut]) & 0xC0) == 0x80) --cut;   // not inside a character
  return json_quoted(name.substr(0, cut)) + "... (" + std::to_string(name.size()) + " bytes)";
}

/// Base of a reader of one JSON document. `Derived` has on_open(bool object), on_close(),
/// on_key(std::string const&) and on_scalar(JsonScalar const&).
///
/// skip()    inside on_open(): nothing of this container is reported, its on_close() included
/// fault()   keeps the first fault; nothing is reported after it, and the document is still checked to its end
template <class Derived>
class JsonReader {
 public:
  // The callbacks nlohmann wants.
  bool null() { return value({}); }
  bool boolean(bool) { return value({JsonKind::boolean, 0, nullptr}); }
  bool number_integer(std::int64_t) { return value({JsonKind::other_number, 0, nullptr}); }   // only ever with a minus sign
  bool number_unsigned(std::uint64_t number) { return value({JsonKind::natural, number, nullptr}); }
  bool number_float(double, std::string const&) { return value({JsonKind::other_number, 0, nullptr}); }
  bool string(std::string& text) { return value({JsonKind::string, 0, &text}); }
  template <class Binary>
  bool binary(Binary&) {
    return false;   // text has no binary values
  }
  bool start_object(std::size_t) { return begin(true); }
  bool start_array(std::size_t) { return begin(false); }
  bool end_object() { return end(); }
  bool end_array() { return end(); }
  bool key(std::string& name) {
    if (reporting()) derived().on_key(name);
    return true;
  }
  template <class Exception>
  bool parse_error(std::size_t position, std::string const&, Exception const&) {
    error_position_ = position;
    return false;
  }

 protected:
  void skip() { skipped_depth_ = depth_; }
  void fault(Error const& error) {
    if (!fault_) fault_ = error;
  }
  void fault(ErrorCode code, std::string message) { fault(Error{code, std::move(message)}); }

 private:
  template <class Reader>
  friend void read_json(ConstByteSpan bytes, std::string_view what, std::uint64_t first_byte, Reader& reader);

  Derived& derived() { return static_cast<Derived&>(*this); }
  bool reporting() const { return skipped_depth_ == 0 && !fault_; }
  bool value(JsonScalar const& scalar) {
    if (reporting()) derived().on_scalar(scalar);
    return true;
  }
  bool begin(bool object) {
    if (++depth_ > max_json_depth) throw Error{ErrorCode::limit, "JSON nested deeper than " + std::to_string(max_json_depth) + " levels"};
    if (reporting()) derived().on_open(object);
    return true;
  }
  bool end() {
    if (skipped_depth_ == depth_) skipped_depth_ = 0;
    else if (reporting()) derived().on_close();
    --depth_;
    return true;
  }

  int depth_ = 0;
  int skipped_depth_ = 0;
  std::size_t error_position_ = 0;
  std::optional<Error> fault_;
};

/// Reports the document in `bytes` to `reader`, then throws the reader's fault if there was one.
///
/// what      what the text is, for the message: "the header"; first_byte is its position in the file
/// Throws    Error(bad_utf8), Error(bad_json), Error(limit), and the fault
/// Memory    what the reader keeps, and the longest string of the text
template <class Reader>
void read_json(ConstByteSpan bytes, std::string_view what, std::uint64_t first_byte, Reader& reader) {
  std::string_view const text = as_text(bytes);
  auto const at = [&](ErrorCode code, std::size_t position, std::string const& problem) {
    std::size_t const in_text = position < text.size() ? position : text.size();
    return Error{code, std::string{what} + ' ' + problem + " (byte " + std::to_string(in_text) + " of " + std::to_string(text.size()) + ")"}.with_range(
        first_byte + in_text, first_byte + in_text + 1);
  };

  std::size_t ascii = 0;   // nearly every text is ASCII throughout: look at eight bytes at a time until it is not
  for (; ascii + 8 <= text.size(); ascii += 8)
    if ((load_little_endian<std::uint64_t>(bytes.data() + ascii) & 0x8080808080808080u) != 0) break;
  if (auto const bad = first_invalid_utf8(text.substr(ascii)); bad != std::string_view::npos) throw at(ErrorCode::bad_utf8, ascii + bad, "is not UTF-8");

  if (text.starts_with("\xEF\xBB\xBF")) throw at(ErrorCode::bad_json, 0, "starts with a byte order mark");
  if (auto const nul = text.find('\0'); nul != std::string_view::npos) {
    Error error = at(ErrorCode::bad_json, nul, "contains a NUL byte");
    if (nul > 0 && text.find_first_not_of('\0', nul) == std::string_view::npos)
      error.with_hint("padded with NUL bytes; only JSON white space may follow the document");
    throw error;
  }
  if (!nlohmann::json::sax_parse(text.data(), text.data() + text.size(), &reader)) {
    std::size_t const position = reader.error_position_;   // counts the byte that was wrong
    throw at(ErrorCode::bad_json, position > 0 ? position - 1 : 0, "is not JSON");
  }
  if (reader.fault_) throw *reader.fault_;
}

/// `text` as Python's json.dumps writes it by default: pure ASCII, \uXXXX in lower case, surrogate pairs beyond U+FFFF.
///
/// Throws    Error(bad_utf8)
template <class = Deferred>
std::string python_quoted(std::string_view text) {
  if (first_invalid_utf8(text) != std::string_view::npos) throw Error{ErrorCode::bad_utf8, "a name that is not UTF-8 cannot be written as JSON"};
  std::string out{'"'};
  auto const escaped = [&](std::uint32_t unit) {
    std::array<char, 16> digits{};
    std::snprintf(digits.data(), digits.size(), "\\u%04x", static_cast<unsigned>(unit));
    out += digits.data();
  };
  for (std::size_t i = 0; i < text.size();) {
    std::size_t plain = i;
    while (plain < text.size() && static_cast<unsigned char>(text[plain]) < 0x7F) ++plain;
    if (plain > i) {
      std::string const run = json_quoted(text.substr(i, plain - i));
      out.append(run, 1, run.size() - 2);
      i = plain;
      continue;
    }
    auto const lead = static_cast<unsigned char>(text[i]);
    std::size_t const more = lead < 0x80 ? 0 : lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
    std::uint32_t point = more == 0 ? lead : lead & (0x3Fu >> more);
    for (std::size_t k = 1; k <= more; ++k) point = (point << 6) | (static_cast<unsigned char>(text[i + k]) & 0x3Fu);
    i += more + 1;
    if (point < 0x10000) escaped(point);
    else escaped(0xD7C0 + (point >> 10)), escaped(0xDC00 + (point & 0x3FF));
  }
  return out += '"';
}

}  // namespace dcp::detail
