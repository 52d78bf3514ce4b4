// SPDX-License-Identifier: Apache-2.0
#pragma once
// JSON from strangers: events of one document, no tree, every departure from the grammar refused.
//
// Why a parser of our own. Strictness: nlohmann's skips a byte order mark, takes a NUL for the end of the text, and calls -0 an integer,
// and none of that may reach a file format. Speed: the header of a million tensors (90 MB) takes 0.18 s instead of 0.66 s through its events,
// which copy each string byte by byte. Cost: nlohmann/json.hpp alone takes g++ 1.3 s, in every file that would include this library.
//
// One pass, no recursion: a bit per open container says whether it is an object. Faults have one order, whatever stands first in the
// text: encoding, then grammar and depth, then the first fault of the schema. So a reader's answer does not depend on how a broken
// text happens to be ordered. A number whose nearest double is infinite is no JSON here, because no two parsers agree on it.

#include <dcp/base/config.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/text.hpp>

#include <array>
#include <bit>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

namespace dcp::detail {

/// No format spoken here nests deeper than 3 levels; fields that a reader ignores may, up to here.
inline constexpr int max_json_depth = 16;

enum class JsonKind : std::uint8_t { null, boolean, natural, other_number, string };

struct JsonScalar {
  JsonKind kind = JsonKind::null;
  std::uint64_t natural = 0;            // an integer from 0 to 2^64 - 1 without sign, fraction or exponent
  std::string_view text = {};           // of a string, unescaped; of everything else, as it stands in the document. For the call only
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
/// on_key(std::string_view), of which nothing is kept, and on_scalar(JsonScalar const&).
///
/// skip()    inside on_open(): nothing of this container is reported, its on_close() included
/// fault()   keeps the first fault; nothing is reported after it, and the document is still checked to its end
template <class Derived>
class JsonReader {
 protected:
  void skip() { skipped_depth_ = depth_; }
  void fault(Error const& error) {
    if (!fault_) fault_ = error;
  }
  void fault(ErrorCode code, std::string message) { fault(Error{code, std::move(message)}); }

 private:
  template <class D>
  friend void read_json(ConstByteSpan bytes, std::string_view what, std::uint64_t first_byte, JsonReader<D>& reader);
  template <class>
  friend class JsonText;

  Derived& derived() { return static_cast<Derived&>(*this); }
  bool reporting() const { return skipped_depth_ == 0 && !fault_; }
  void key(std::string_view name) {
    if (reporting()) derived().on_key(name);
  }
  void value(JsonScalar const& scalar) {
    if (reporting()) derived().on_scalar(scalar);
  }
  void begin(bool object) {
    if (++depth_ > max_json_depth) throw Error{ErrorCode::limit, "JSON nested deeper than " + std::to_string(max_json_depth) + " levels"};
    if (reporting()) derived().on_open(object);
  }
  void end() {
    if (skipped_depth_ == depth_) skipped_depth_ = 0;
    else if (reporting()) derived().on_close();
    --depth_;
  }

  int depth_ = 0;
  int skipped_depth_ = 0;
  std::optional<Error> fault_;
};

/// The grammar of RFC 8259, over text that is known to be UTF-8 without NUL.
template <class = Deferred>
class JsonText {
 public:
  explicit JsonText(std::string_view text) : begin_{text.data()}, at_{text.data()}, end_{text.data() + text.size()} {}

  /// Where the text stopped being JSON, and what to say of it.
  std::size_t position() const { return static_cast<std::size_t>(at_ - begin_); }
  char const* problem() const { return problem_; }

  /// Reports the document; false where it is not JSON.
  template <class Derived>
  bool walk(JsonReader<Derived>& reader) {
    std::uint32_t objects = 0;   // the last bit: whether the innermost open container is an object
    static_assert(max_json_depth < 32);
    for (;;) {
      char const c = next();
      if (c == '{' || c == '[') {
        ++at_;
        reader.begin(c == '{');
        objects = objects << 1 | (c == '{' ? 1u : 0u);
        if (next() != (c == '{' ? '}' : ']')) {
          if (c == '{' && !key(reader)) return false;
          continue;
        }
      } else if (!scalar(c, reader)) {
        return false;
      }
      for (;; objects >>= 1, ++at_, reader.end()) {   // a value has ended, and with it perhaps what it was the last of
        char const after = next();
        if (reader.depth_ == 0) return at_ == end_;
        bool const object = (objects & 1) != 0;
        if (after == (object ? '}' : ']')) continue;
        if (after != ',') return false;
        ++at_;
        if (object && !(next(), key(reader))) return false;
        break;
      }
    }
  }

 private:
  char peek() const { return at_ != end_ ? *at_ : '\0'; }   // the text has no NUL of its own
  char next() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\t' || *at_ == '\r')) ++at_;
    return peek();
  }

  template <class Derived>
  bool key(JsonReader<Derived>& reader) {
    std::string_view name;
    if (!string(name)) return false;
    reader.key(name);
    if (next() != ':') return false;
    ++at_;
    return true;
  }

  template <class Derived>
  bool scalar(char first, JsonReader<Derived>& reader) {
    JsonScalar value;
    if (first == '"') {
      if (!string(value.text)) return false;
      value.kind = JsonKind::string;
    } else if (first == '-' || is_digit(first)) {
      if (!number(value)) return false;
    } else {
      std::string_view const word = first == 't' ? "true" : first == 'f' ? "false" : "null";
      for (char const letter : word) {
        if (peek() != letter) return false;
        ++at_;
      }
      value = {first == 'n' ? JsonKind::null : JsonKind::boolean, 0, word};
    }
    reader.value(value);
    return true;
  }

  static bool is_digit(char c) { return c >= '0' && c <= '9'; }
  bool digits() {
    if (!is_digit(peek())) return false;
    while (is_digit(peek())) ++at_;
    return true;
  }

  bool number(JsonScalar& value) {
    char const* const first = at_;
    // Nearly all numbers of a header are natural and short. 19 digits fit into 64 bits.
    std::uint64_t natural = 0;
    while (at_ - first < 19 && is_digit(peek())) natural = natural * 10 + static_cast<std::uint64_t>(*at_++ - '0');
    if (at_ != first && (*first != '0' || at_ - first == 1))
      if (char const after = peek(); !is_digit(after) && after != '.' && after != 'e' && after != 'E') {
        value = {JsonKind::natural, natural, {first, static_cast<std::size_t>(at_ - first)}};
        return true;
      }
    at_ = first;
    if (peek() == '-') ++at_;
    char const* const whole = at_;
    if (peek() == '0') ++at_;   // nothing follows a leading zero
    else if (!digits()) return false;
    char const* const whole_end = at_;
    if (peek() == '.' && (++at_, !digits())) return false;
    char const* const mantissa_end = at_;
    if (peek() == 'e' || peek() == 'E') {
      ++at_;
      if (peek() == '-' || peek() == '+') ++at_;
      if (!digits()) return false;
    }
    value = {JsonKind::other_number, 0, {first, static_cast<std::size_t>(at_ - first)}};
    if (first == whole && whole_end == at_ && std::from_chars(first, at_, value.natural).ec == std::errc{}) {
      value.kind = JsonKind::natural;
      return true;
    }
    value.natural = 0;
    double nearest = 0;
    if (std::from_chars(first, at_, nearest).ec == std::errc{} || !is_large(whole, whole_end, mantissa_end)) return true;
    at_ = first;
    problem_ = "has a number beyond the range of a double";
    return false;
  }

  // Of a number out of range, which from_chars says of the tiny ones too: the sign of its decimal exponent decides.
  bool is_large(char const* whole, char const* whole_end, char const* mantissa_end) const {
    std::int64_t exponent = 0;
    if (mantissa_end != at_) {
      char const* const digits = mantissa_end + (mantissa_end[1] == '+' ? 2 : 1);
      if (std::from_chars(digits, at_, exponent).ec != std::errc{}) return *digits != '-';
      if (exponent > INT32_MAX || exponent < INT32_MIN) return exponent > 0;   // no text is long enough to make up for it
    }
    if (*whole != '0') return exponent + (whole_end - whole) > 0;
    char const* digit = whole_end < mantissa_end ? whole_end + 1 : mantissa_end;
    while (digit != mantissa_end && *digit == '0') --exponent, ++digit;
    return exponent > 0;
  }

  // Reads a string with its quotes: `text` lies in the document, or in unescaped_ until the next string.
  bool string(std::string_view& text) {
    if (peek() != '"') return false;
    char const* run = ++at_;
    skip_plain();
    if (peek() == '"') {
      text = {run, static_cast<std::size_t>(at_++ - run)};
      return true;
    }
    for (unescaped_.clear();; run = at_, skip_plain()) {
      unescaped_.append(run, at_);
      char const c = peek();
      if (c == '"') {
        ++at_;
        text = unescaped_;
        return true;
      }
      if (c != '\\') return false;   // a control character, or the end
      ++at_;
      if (!escape()) return false;
    }
  }

  // To the next quote, backslash or control character; eight bytes at a time, because nearly all of a header is such text.
  void skip_plain() {
    constexpr std::uint64_t ones = 0x0101010101010101u, tops = 0x80 * ones;
    for (; end_ - at_ >= 8; at_ += 8) {
      auto const word = load_little_endian<std::uint64_t>(reinterpret_cast<std::byte const*>(at_));
      std::uint64_t const quote = word ^ ones * '"', backslash = word ^ ones * '\\';
      // The lowest top bit that remains marks the first byte below 1, 1 and 0x20 (borrows only reach later bytes).
      std::uint64_t const found = (((quote - ones) & ~quote) | ((backslash - ones) & ~backslash) | ((word - 0x20 * ones) & ~word)) & tops;
      if (found != 0) {
        at_ += std::countr_zero(found) / 8;
        return;
      }
    }
    while (at_ != end_ && *at_ != '"' && *at_ != '\\' && static_cast<unsigned char>(*at_) >= 0x20) ++at_;
  }

  bool escape() {
    constexpr std::string_view letters = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
    char const c = peek();
    if (c != 'u') {
      auto const which = letters.find(c);
      if (which == std::string_view::npos) return false;
      ++at_;
      unescaped_ += meanings[which];
      return true;
    }
    ++at_;
    std::uint32_t point = 0, low = 0;
    if (!hex4(point)) return false;
    if (point >= 0xDC00 && point < 0xE000) return at_ -= 4, false;   // the second half of a pair, without the first
    if (point >= 0xD800 && point < 0xDC00) {
      for (char const wanted : {'\\', 'u'})
        if (peek() != wanted) return false;
        else ++at_;
      if (!hex4(low)) return false;
      if (low < 0xDC00 || low >= 0xE000) return at_ -= 4, false;
      point = 0x10000 + ((point & 0x3FF) << 10) + (low & 0x3FF);
    }
    int const more = point < 0x80 ? 0 : point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
    constexpr std::array<std::uint32_t, 4> leads{0, 0xC0, 0xE0, 0xF0};
    unescaped_ += static_cast<char>(leads[static_cast<std::size_t>(more)] | point >> 6 * more);
    for (int k = more; k-- > 0;) unescaped_ += static_cast<char>(0x80 | (point >> 6 * k & 0x3F));
    return true;
  }
  bool hex4(std::uint32_t& unit) {
    unit = 0;
    for (int k = 0; k < 4; ++k, ++at_) {
      char const c = peek();
      char const lower = static_cast<char>(c | 0x20);
      if (!is_digit(c) && !(lower >= 'a' && lower <= 'f')) return false;
      unit = unit << 4 | static_cast<std::uint32_t>(is_digit(c) ? c - '0' : lower - 'a' + 10);
    }
    return true;
  }

  char const* begin_;
  char const* at_;
  char const* end_;
  char const* problem_ = "is not JSON";
  std::string unescaped_;   // the key or text last read, where it has escapes
};

/// Reports the document in `bytes` to `reader`, then throws the reader's fault if there was one.
///
/// what      what the text is, for the message: "the header"; first_byte is its position in the file
/// Throws    Error(bad_utf8), Error(bad_json), Error(limit), and the fault
/// Memory    what the reader keeps, and the longest string of the text
template <class Derived>
void read_json(ConstByteSpan bytes, std::string_view what, std::uint64_t first_byte, JsonReader<Derived>& reader) {
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
  if (JsonText<> json{text}; !json.walk(reader)) throw at(ErrorCode::bad_json, json.position(), json.problem());
  if (reader.fault_) throw *reader.fault_;
}

/// `text` as Python's json.dumps writes it by default: pure ASCII, \uXXXX in lower case, surrogate pairs beyond U+FFFF.
///
/// Throws    Error(bad_utf8)
template <class = Deferred>
std::string python_quoted(std::string_view text) {
  if (first_invalid_utf8(text) != std::string_view::npos) throw Error{ErrorCode::bad_utf8, "a name that is not UTF-8 cannot be written as JSON"};
  if (std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x7F; })) return json_quoted(text);
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
