// SPDX-License-Identifier: Apache-2.0
#pragma once
// Regular expressions from strangers, in time linear in the text: the part of Python's `re` that configurations use.
//
// Backtracking takes exponential time on (a+)+$, and configurations of downloaded models hold such patterns, by accident or not. Here all
// ways through the pattern are followed at once, one character of the text after the other (Thompson). Who only asks whether there is a
// match needs neither groups nor an order of preference, so lazy quantifiers are the same as greedy ones.
//
//   known      literals, . [a-z] [^a-z] \d \D \w \W \s \S ^ $ \A \Z \b \B (...) (?:...) (?P<name>...) | * + ? {m} {m,} {,n} {m,n} and all of them lazy
//   refused    what a set of states cannot follow (backreferences, lookaround, atomic groups, possessive quantifiers), flags, and what `re` refuses
//   differs    \d \w \s \b know ASCII only

#include <dcp/base/config.hpp>
#include <dcp/base/algorithms.hpp>
#include <dcp/base/error.hpp>
#include <dcp/formats/strict_json.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp::detail {

inline constexpr std::size_t max_regex_bytes = 4096;
inline constexpr std::size_t max_regex_steps = 16384;   // of the program: what {m,n} may make of a short pattern
inline constexpr int max_regex_depth = 100;             // of groups: the parser calls itself

enum class RegexOp : std::uint8_t { point, set, split, jump, begin, end, last_end, boundary, no_boundary };

struct RegexStep {
  RegexOp op{};
  std::uint32_t value = 0;   // the code point, or the number of the set
  std::int32_t to = 0;       // how many steps further jump goes, and split goes too, beside the next step
};

using RegexProgram = std::vector<RegexStep>;
using RegexSet = std::vector<std::pair<char32_t, char32_t>>;   // first and last of each range

/// The code points of `text`; a byte that is no UTF-8 becomes one that no character has.
template <class = Deferred>
std::vector<char32_t> code_points(std::string_view text) {
  std::vector<char32_t> points;
  points.reserve(text.size());
  bool const valid = first_invalid_utf8(text) == std::string_view::npos;
  for (std::size_t i = 0; i < text.size();) {
    auto const lead = static_cast<unsigned char>(text[i++]);
    std::size_t const more = lead < 0x80 || !valid ? 0 : lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
    char32_t point = more == 0 ? lead : lead & (0x3Fu >> more);
    for (std::size_t k = 0; k < more; ++k) point = (point << 6) | (static_cast<unsigned char>(text[i++]) & 0x3Fu);
    points.push_back(lead < 0x80 || valid ? point : 0x110000 + point);
  }
  return points;
}

class RegexParser {
 public:
  template <class = Deferred>
  explicit RegexParser(std::string_view pattern) : pattern_{pattern} {
    if (pattern.size() > max_regex_bytes) throw Error{ErrorCode::limit, named() + " is longer than " + std::to_string(max_regex_bytes) + " bytes"};
    points_ = code_points(pattern);
  }

  std::vector<RegexSet> sets;

  template <class = Deferred>
  RegexProgram parse() {
    RegexProgram program = alternatives();
    if (at_ != points_.size()) refuse("has a ) that nothing opens");
    return program;
  }

 private:
  static constexpr char32_t none = 0xFFFFFFFF;
  static constexpr std::uint64_t unlimited = UINT64_MAX;
  struct Repeat {
    std::uint64_t least = 0, most = unlimited;
  };

  char32_t peek(std::size_t further = 0) const { return at_ + further < points_.size() ? points_[at_ + further] : none; }
  bool take(char32_t wanted) {
    if (peek() != wanted) return false;
    ++at_;
    return true;
  }
  template <class = Deferred>
  std::string named() const { return "the regular expression " + shown(pattern_); }
  template <class = Deferred>
  [[noreturn]] void refuse(std::string const& problem) const { throw Error{ErrorCode::unsupported, named() + ' ' + problem}; }

  template <class = Deferred>
  void check_size(std::uint64_t steps) const {
    if (steps > max_regex_steps) throw Error{ErrorCode::limit, named() + " repeats more than " + std::to_string(max_regex_steps) + " steps"};
  }

  template <class = Deferred>
  RegexProgram alternatives() {
    std::vector<RegexProgram> all{sequence()};
    while (take(U'|')) all.push_back(sequence());
    RegexProgram program;
    std::size_t size = 2 * (all.size() - 1);
    for (auto const& one : all) size += one.size();
    check_size(size);
    for (std::size_t i = 0; i < all.size(); ++i) {
      bool const last = i + 1 == all.size();
      if (!last) program.push_back({RegexOp::split, 0, static_cast<std::int32_t>(all[i].size() + 2)});
      append(program, all[i]);
      if (!last) program.push_back({RegexOp::jump, 0, static_cast<std::int32_t>(size - program.size())});
    }
    return program;
  }

  template <class = Deferred>
  RegexProgram sequence() {
    RegexProgram program;
    while (peek() != none && peek() != U'|' && peek() != U')') {
      RegexProgram one = atom();
      bool const place = one.size() == 1 && one[0].op >= RegexOp::begin && !was_group_;
      if (auto const count = quantifier()) {
        if (place) refuse("repeats a place");
        if (!take(U'?') && peek() == U'+') refuse("has a possessive quantifier");
        one = repeated(one, *count);
        if (quantifier()) refuse("repeats a repetition");
      }
      check_size(program.size() + one.size());
      append(program, one);
    }
    return program;
  }

  template <class = Deferred>
  RegexProgram atom() {
    was_group_ = false;
    char32_t const c = points_[at_++];
    switch (c) {
      case U'(': return group();
      case U'[': return of_set(set());
      case U'.': return of_set(complement({{U'\n', U'\n'}}));
      case U'^': return {{RegexOp::begin}};
      case U'$': return {{RegexOp::end}};
      case U'\\': return escape();
      case U'*':
      case U'+':
      case U'?': refuse("repeats nothing");
      case U'{':
        --at_;
        if (quantifier()) refuse("repeats nothing");
        ++at_;
        break;
      default: break;
    }
    return {{RegexOp::point, static_cast<std::uint32_t>(c)}};
  }

  template <class = Deferred>
  RegexProgram group() {
    if (take(U'?')) {
      if (take(U'P') && peek() == U'<') {
        while (peek() != none && peek() != U'>') ++at_;
        if (!take(U'>')) refuse("has a name of a group that nothing closes");
      } else if (!take(U':')) {
        refuse("has a group of an unknown kind (lookaround, backreferences, flags and atomic groups are not supported)");
      }
    }
    if (++depth_ > max_regex_depth) throw Error{ErrorCode::limit, named() + " nests deeper than " + std::to_string(max_regex_depth) + " groups"};
    RegexProgram program = alternatives();
    --depth_;
    if (!take(U')')) refuse("has a ( that nothing closes");
    was_group_ = true;
    return program;
  }

  template <class = Deferred>
  RegexProgram escape() {
    if (peek() == none) refuse("ends in a backslash");
    char32_t const c = points_[at_++];
    switch (c) {
      case U'A': return {{RegexOp::begin}};
      case U'Z': return {{RegexOp::last_end}};
      case U'b': return {{RegexOp::boundary}};
      case U'B': return {{RegexOp::no_boundary}};
      default: break;
    }
    if (auto named_set = class_of(c); !named_set.empty()) return of_set(std::move(named_set));
    return {{RegexOp::point, static_cast<std::uint32_t>(escaped(c))}};
  }

  /// * + ? or {m,n}, if one stands here. A brace that is no quantifier is a character, as it is to `re`.
  template <class = Deferred>
  std::optional<Repeat> quantifier() {
    if (take(U'*')) return Repeat{};
    if (take(U'+')) return Repeat{1, unlimited};
    if (take(U'?')) return Repeat{0, 1};
    std::size_t const start = at_;
    if (!take(U'{') || peek() == U'}') return at_ = start, std::nullopt;
    auto const least = count();
    auto const most = take(U',') ? count() : least;
    if (!take(U'}')) return at_ = start, std::nullopt;
    Repeat const repeat{least.value_or(0), most.value_or(unlimited)};
    if (repeat.most < repeat.least) refuse("repeats at least more often than at most");
    return repeat;
  }
  template <class = Deferred>
  std::optional<std::uint64_t> count() {
    std::optional<std::uint64_t> value;
    for (; peek() >= U'0' && peek() <= U'9'; ++at_) value = std::min<std::uint64_t>(1'000'000, value.value_or(0) * 10 + (peek() - U'0'));
    return value;
  }

  template <class = Deferred>
  RegexProgram repeated(RegexProgram const& body, Repeat repeat) const {
    RegexProgram program;
    if (body.empty()) return program;
    bool const endless = repeat.most == unlimited;
    check_size((endless ? std::max<std::uint64_t>(1, repeat.least) : repeat.most) * (body.size() + 1) + 1);
    auto const size = static_cast<std::int32_t>(body.size());
    for (std::uint64_t i = 0; i < repeat.least; ++i) append(program, body);
    if (endless && repeat.least > 0) {
      program.push_back({RegexOp::split, 0, -size});
    } else if (endless) {
      program.push_back({RegexOp::split, 0, size + 2});
      append(program, body);
      program.push_back({RegexOp::jump, 0, -size - 1});
    } else {
      for (std::uint64_t left = repeat.most - repeat.least; left > 0; --left) {
        program.push_back({RegexOp::split, 0, static_cast<std::int32_t>(left) * (size + 1)});
        append(program, body);
      }
    }
    return program;
  }

  template <class = Deferred>
  RegexProgram of_set(RegexSet ranges) {
    sets.push_back(std::move(ranges));
    return {{RegexOp::set, static_cast<std::uint32_t>(sets.size() - 1)}};
  }

  /// Behind the [.
  template <class = Deferred>
  RegexSet set() {
    bool const negated = take(U'^');
    RegexSet ranges;
    for (bool first = true; first || peek() != U']'; first = false) {
      auto const low = member(ranges);
      if (peek() == U'-' && peek(1) != U']') {
        ++at_;
        auto const high = member(ranges);
        if (!low || !high || *high < *low) refuse("has a range of characters that is none");
        ranges.emplace_back(*low, *high);
      } else if (low) {
        ranges.emplace_back(*low, *low);
      }
    }
    ++at_;
    RegexSet const outside = complement(std::move(ranges));   // sorted, and no two of its ranges touch
    return negated ? outside : complement(outside);
  }

  /// A character of a set; nothing where it was a class, which is then among `ranges`.
  template <class = Deferred>
  std::optional<char32_t> member(RegexSet& ranges) {
    char32_t const c = peek();
    if (c == none) refuse("has a [ that nothing closes");
    ++at_;
    if (c != U'\\') return c;
    if (peek() == none) refuse("ends in a backslash");
    char32_t const letter = points_[at_++];
    if (auto const named_set = class_of(letter); !named_set.empty()) return append(ranges, named_set), std::nullopt;
    return letter == U'b' ? U'\b' : escaped(letter);
  }

  template <class = Deferred>
  static RegexSet class_of(char32_t letter) {
    switch (letter) {
      case U'd': return {{U'0', U'9'}};
      case U'w': return {{U'0', U'9'}, {U'A', U'Z'}, {U'_', U'_'}, {U'a', U'z'}};
      case U's': return {{U'\t', U'\r'}, {0x1C, U' '}};
      case U'D': return complement(class_of(U'd'));
      case U'W': return complement(class_of(U'w'));
      case U'S': return complement(class_of(U's'));
      default: return {};
    }
  }

  template <class = Deferred>
  static RegexSet complement(RegexSet ranges) {
    dcp::detail::sort(ranges);
    RegexSet outside;
    char32_t next = 0;   // the first that no range so far holds
    for (auto const& [low, high] : ranges) {
      if (low > next) outside.emplace_back(next, low - 1);
      next = std::max<char32_t>(next, high + 1);
    }
    if (next != none) outside.emplace_back(next, none - 1);
    return outside;
  }

  template <class = Deferred>
  char32_t escaped(char32_t letter) {
    constexpr std::u32string_view letters = U"tnrfva", meanings = U"\t\n\r\f\v\a";
    if (auto const which = letters.find(letter); which != std::u32string_view::npos) return meanings[which];
    if (letter == U'x' || letter == U'u') {
      char32_t value = 0;
      for (int k = letter == U'x' ? 2 : 4; k > 0; --k, ++at_) {
        char32_t const c = peek(), lower = c | 0x20;
        if (!(c >= U'0' && c <= U'9') && !(lower >= U'a' && lower <= U'f')) refuse("has an incomplete escape");
        value = value << 4 | (c <= U'9' ? c - U'0' : lower - U'a' + 10);
      }
      return value;
    }
    if (letter >= U'0' && letter <= U'9') refuse("has a backreference or an octal escape");
    if ((letter | 0x20) >= U'a' && (letter | 0x20) <= U'z') refuse("has an unknown escape");
    return letter;
  }

  std::string_view pattern_;
  std::vector<char32_t> points_;
  std::size_t at_ = 0;
  int depth_ = 0;
  bool was_group_ = false;   // the atom last read
};

class LinearRegex {
 public:
  /// Throws    Error(unsupported), Error(limit); both name the pattern
  template <class = Deferred>
  explicit LinearRegex(std::string_view pattern) {
    RegexParser parser{pattern};
    program_ = parser.parse();
    sets_ = std::move(parser.sets);
  }

  /// Whether the pattern fits the start of `text`, as re.match asks; only $ and \Z ask for its end.
  ///
  /// Time      at most the steps of the program for each character
  template <class = Deferred>
  bool match(std::string_view text) const {
    auto const points = code_points(text);
    std::vector<std::uint32_t> now, next, open;
    std::vector<std::size_t> seen(program_.size(), 0);   // the last position at which a step was reached, from 1
    auto const word = [&](std::size_t i) {
      return i < points.size() && ((points[i] >= U'0' && points[i] <= U'9') || points[i] == U'_' || ((points[i] | 0x20) >= U'a' && (points[i] | 0x20) <= U'z'));
    };
    auto const holds = [&](RegexOp place, std::size_t position) {
      std::size_t const left = points.size() - position;
      if (place == RegexOp::begin) return position == 0;
      if (place == RegexOp::last_end) return left == 0;
      if (place == RegexOp::end) return left == 0 || (left == 1 && points[position] == U'\n');
      return ((position > 0 && word(position - 1)) != word(position)) == (place == RegexOp::boundary);
    };
    // Every step that is reached from `first` without a character; true if the end of the program is.
    auto const follow = [&](std::uint32_t first, std::size_t position, std::vector<std::uint32_t>& into) {
      for (open.push_back(first); !open.empty();) {
        std::uint32_t const at = open.back();
        open.pop_back();
        if (at == program_.size()) return true;
        if (std::exchange(seen[at], position + 1) == position + 1) continue;
        RegexStep const& step = program_[at];
        if (step.op == RegexOp::point || step.op == RegexOp::set) into.push_back(at);
        if (step.op == RegexOp::jump || step.op == RegexOp::split) open.push_back(at + static_cast<std::uint32_t>(step.to));   // modulo 2^32: backwards too
        if (step.op == RegexOp::split || (step.op >= RegexOp::begin && holds(step.op, position))) open.push_back(at + 1);
      }
      return false;
    };
    if (follow(0, 0, now)) return true;
    for (std::size_t i = 0; i < points.size() && !now.empty(); ++i, now.swap(next)) {
      next.clear();
      for (auto const at : now) {
        RegexStep const& step = program_[at];
        bool const fits = step.op == RegexOp::point ? points[i] == step.value : contains(sets_[step.value], points[i]);
        if (fits && follow(at + 1, i + 1, next)) return true;
      }
    }
    return false;
  }

 private:
  template <class = Deferred>
  static bool contains(RegexSet const& set, char32_t point) {
    auto const after = std::upper_bound(set.begin(), set.end(), point, [](char32_t wanted, auto const& range) { return wanted < range.first; });
    return after != set.begin() && point <= std::prev(after)->second;
  }

  RegexProgram program_;
  std::vector<RegexSet> sets_;
};

}  // namespace dcp::detail
