// SPDX-License-Identifier: Apache-2.0
#include <dcp/formats/linear_regex.hpp>

#include "golden.hpp"

#include <doctest/doctest.h>

#include <array>
#include <cstddef>
#include <string>
#include <string_view>

using dcp::detail::LinearRegex;
using golden::outcome;
using namespace std::string_literals;

namespace {

std::string outcome_of(std::string const& pattern) {
  return outcome([&] { LinearRegex{pattern}; });
}
bool match(std::string_view pattern, std::string_view text) { return LinearRegex{pattern}.match(text); }

constexpr std::array<std::string_view, 12> texts{"", "lm_head", "model.layers.0.mlp.gate_proj", "model.layers.10.self_attn.q_proj", "model.layers.0.mlp.experts.17.down_proj",
                                                 "model.layers.0.mlp.gate", "visual.blocks.3.attn.qkv", "aaa", "aab", "a\n", "a-b c_1", "\xc3\xa9t\xc3\xa9"};

struct Row {
  std::string_view pattern, matched;   // one digit per text
};

// re.compile(pattern, re.ASCII).match(text) of CPython 3.11.7
constexpr Row rows[] = {
    {R"()", "111111111111"},
    {R"(lm_head)", "010000000000"},
    {R"(.*lm_head)", "010000000000"},
    {R"(lm)", "010000000000"},
    {R"(head)", "000000000000"},
    {R"(.*)", "111111111111"},
    {R"(.+)", "011111111111"},
    {R"(^$)", "100000000000"},
    {R"($)", "100000000000"},
    {R"(model\.layers\.\d+\.mlp\.(gate|up|down)_proj)", "001000000000"},
    {R"(model.layers.\d+.mlp.(gate|up)_proj$)", "001000000000"},
    {R"(.*\.(q|k|v|o)_proj$)", "000100000000"},
    {R"(.*mlp.gate$)", "000001000000"},
    {R"(.*mlp\.gate)", "001001000000"},
    {R"(.*experts\.\d+\.(?:gate|up|down)_proj)", "000010000000"},
    {R"(.*experts\.\d\.)", "000000000000"},
    {R"(.*layers\.(0|[1-9]\d*)\.)", "001111000000"},
    {R"(.*layers\.([0-9]|1[0-5])\.self_attn)", "000100000000"},
    {R"(visual.*)", "000000100000"},
    {R"(.*\.visual\.)", "000000000000"},
    {R"((visual|model\.vision)\..*)", "000000100000"},
    {R"((?P<who>lm|model)(_|\.)\w+)", "011111000000"},
    {R"(a{3})", "000000010000"},
    {R"(a{2,}$)", "000000010000"},
    {R"(a{,2}$)", "100000000100"},
    {R"(a{1,2}b)", "000000001000"},
    {R"((a|b)*$)", "100000011100"},
    {R"((a+)+$)", "000000010100"},
    {R"((a*)*b)", "000000001000"},
    {R"((?:a|aa)+$)", "000000010100"},
    {R"(a*?b)", "000000001000"},
    {R"(a+?$)", "000000010100"},
    {R"(a??a??a??$)", "100000010100"},
    {R"(a{1,2}?b$)", "000000001000"},
    {R"([ab]{3}$)", "000000011000"},
    {R"([^b]+$)", "011111010101"},
    {R"([^\n]*$)", "111111111111"},
    {R"(a.$)", "000000000000"},
    {R"(a$)", "000000000100"},
    {R"(a\Z)", "000000000000"},
    {R"(\Aa)", "000000011110"},
    {R"(a\s)", "000000000100"},
    {R"(\S+$)", "011111111101"},
    {R"(\w+$)", "010000011100"},
    {R"([\w.]+$)", "011111111100"},
    {R"([\w.-]+\s[a-c_]+\d)", "000000000010"},
    {R"(.*\bgate\b)", "000001000000"},
    {R"(.*\Bgate)", "000000000000"},
    {R"(\W)", "000000000001"},
    {R"(\D*$)", "110000011101"},
    {R"(.*[]._-])", "011111100010"},
    {R"([a-]+)", "000000011110"},
    {R"(.*[^a-z_.0-9])", "000000000111"},
    {R"(..t.$)", "000000000000"},
    {R"(.t.$)", "000000000001"},
    {R"(\xe9)", "000000000001"},
    {R"(\u00e9t)", "000000000001"},
    {R"([\u00e0-\u00ff]t[^a-z]$)", "000000000001"},
    {R"((|a)a{0}(b|))", "111111111111"},
    {R"(x{)", "000000000000"},
    {R"(a|)", "111111111111"},
    {R"((a{2}){1,}b?$)", "000000001000"},
    {R"(((((a))))b?)", "000000011110"},
    {R"(a{2,3}|m)", "001111011000"},
};

}  // namespace

TEST_CASE("LinearRegex: matches what Python's re.match matches") {
  for (auto const& row : rows) {
    CAPTURE(row.pattern);
    REQUIRE(row.matched.size() == texts.size());
    LinearRegex const regex{row.pattern};
    for (std::size_t i = 0; i < texts.size(); ++i) {
      CAPTURE(texts[i]);
      CHECK(regex.match(texts[i]) == (row.matched[i] == '1'));
    }
  }
}

TEST_CASE("LinearRegex: the time is linear in the text, whatever the pattern") {
  std::string const many(10'000, 'a');
  for (char const* pattern : {"(a+)+$", "(a*)*$", "(a|aa)+$", "(a|a?)+$", "(.*a){12}$", "(([a-z])+.)+[A-Z]$", "((a+)+)+$"}) {
    CAPTURE(pattern);
    bool const fits = std::string_view{pattern} != "(([a-z])+.)+[A-Z]$";
    CHECK(match(pattern, many) == fits);
    CHECK(!match(pattern, many + "!"));
  }
  CHECK(match("(a?){500}a{500}$", many.substr(0, 500)));
  CHECK(match("("s + std::string(2000, 'x') + "|.){6}", many));
}

TEST_CASE("LinearRegex: what it does not know is refused, and the error names the pattern") {
  for (char const* pattern : {"(a)\\1", "(?P<n>a)(?P=n)", "(?=a)", "(?!a)", "(?<=a)", "(?<!a)", "(?>a)", "(?i)a", "(?i:a)", "(?#note)a", "(?(1)a|b)", "a*+", "a++", "a?+", "a{2}+", "\\0",
                              "\\07", "\\N{DASH}", "\\p{L}", "\\U0001F600"}) {
    CAPTURE(pattern);
    CHECK(outcome_of(pattern) == "unsupported");
    try {
      LinearRegex{pattern};
    } catch (dcp::Error const& error) {
      CHECK(error.message().find(dcp::json_quoted(pattern)) != std::string::npos);
    }
  }
}

TEST_CASE("LinearRegex: what is no regular expression to Python is none here") {
  for (char const* pattern : {"(", "a)", "(?:a", "(?", "(?P", "[a", "[", "[]", "[^]", "[a-", "a\\", "[\\", "*a", "a**", "a+*", "a{2}{3}", "a*?*", "{2}", "^*", "$?", "\\b+", "\\A{2}", "a{3,2}", "[b-a]",
                              "[a-\\d]", "[\\w-z]", "(?<n>a)", "(?P<n", "\\q", "[\\q]", "\\x1", "\\xg0", "\\u12", "|*", "(*a)"}) {
    CAPTURE(pattern);
    CHECK(outcome_of(pattern) == "unsupported");
  }
  for (char const* pattern : {"", "|", "a||b", "()", "(|)", "()*", "(){5}", "(^)*", "(?:$)+", "a{", "a{x}", "a{,}", "a{}", "{", "}", "]", "a]", "[]]", "[^]]", "[-a]", "[a-]", "a{0}", "a{0,0}b", "\\.", "\\-", "\\{",
                              "[\\]]", "[\\b]", "\\é"}) {
    CAPTURE(pattern);
    CHECK(outcome_of(pattern) == "ok");
  }
}

TEST_CASE("LinearRegex: length, depth and size of the program have bounds") {
  CHECK(outcome_of(std::string(4096, 'a')) == "ok");
  CHECK(outcome_of(std::string(4097, 'a')) == "limit");
  CHECK(outcome_of(std::string(100, '(') + std::string(100, ')')) == "ok");
  CHECK(outcome_of(std::string(101, '(') + std::string(101, ')')) == "limit");
  CHECK(outcome_of("a{8000}") == "ok");
  for (char const* pattern : {"a{20000}", "a{,20000}", "a{20000,}", "a{99999999999999999999}", "((((a{99}){99}){99}){99}){99}", "(a{200}b{200}){50}"}) {
    CAPTURE(pattern);
    CHECK(outcome_of(pattern) == "limit");
  }
  std::string empty;   // repetitions of nothing take no steps, however many they are
  for (int i = 0; i < 90; ++i) empty = "(" + empty + "){999999}";
  CHECK(outcome_of(empty) == "ok");
  CHECK(match(empty + "a$", "a"));
  std::string sets;
  while (sets.size() < 4090) sets += "[^a]|";
  CHECK(match(sets + "$", "b"));
}

TEST_CASE("LinearRegex: characters are code points, and bytes that are no UTF-8 are characters of their own") {
  CHECK(match("^.$", "\xf0\x9f\x98\x80"));
  CHECK(match("^\xf0\x9f\x98\x80+$", "\xf0\x9f\x98\x80\xf0\x9f\x98\x80"));
  CHECK(match("^[\xc3\xa0-\xc3\xbf]$", "\xc3\xa9"));
  CHECK(!match("^[a-z]$", "\xc3\xa9"));
  CHECK(match("^..$", "\xff\xfe"));
  CHECK(!match("^\xc3\xbf$", "\xff"));
  CHECK(match("^[^a]$", "\xff"));
  CHECK(!match("^[\\d\\w\\s]$", "\xff"));
}
