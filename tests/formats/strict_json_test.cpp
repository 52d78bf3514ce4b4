// SPDX-License-Identifier: Apache-2.0
#include <dcp/formats/strict_json.hpp>

#include "golden.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

using namespace dcp;
using golden::outcome;

namespace {

/// Writes down what is reported; skips values of the key "skip", finds fault with the string "fault".
class Listener : public dcp::detail::JsonReader<Listener> {
 public:
  std::string events;

  void on_key(std::string_view key) { (events += key) += ':', skip_next_ = key == "skip"; }
  void on_open(bool object) {
    events += object ? '{' : '[';
    if (skip_next_) skip();
    skip_next_ = false;
  }
  void on_close() { events += ')'; }
  void on_scalar(dcp::detail::JsonScalar const& scalar) {
    if (scalar.kind == dcp::detail::JsonKind::string && scalar.text == "fault") fault(ErrorCode::bad_schema, "found fault");
    events += scalar.kind == dcp::detail::JsonKind::natural  ? std::to_string(scalar.natural)
              : scalar.kind == dcp::detail::JsonKind::string ? std::string{scalar.text}
                                                             : std::string{to_string(scalar.kind)};
    events += ' ';
  }

 private:
  bool skip_next_ = false;
};

std::string events_of(std::string_view json) {
  Listener listener;
  dcp::detail::read_json(as_byte_span(json), "the text", 0, listener);
  return listener.events;
}
std::string outcome_of(std::string_view json) {
  return outcome([&] { events_of(json); });
}

}  // namespace

TEST_CASE("read_json reports values in order, and nothing of what is skipped") {
  CHECK(events_of(R"({"a":[1,"x"],"b":{"c":null}})") == "{a:[1 x )b:{c:null ))");
  CHECK(events_of(R"({"skip":{"a":[1,{}],"skip":{}},"b":[]})") == "{skip:{b:[))");
  CHECK(events_of(R"([0,-1,-0,1.5,18446744073709551615,18446744073709551616,true])") ==
        "[0 a number that is no unsigned 64-bit integer a number that is no unsigned 64-bit integer a number that is no unsigned 64-bit integer "
        "18446744073709551615 "
        "a number that is no unsigned 64-bit integer true or false )");
}

TEST_CASE("read_json: encoding and grammar come before the schema, whatever stands first in the text") {
  CHECK(outcome_of(R"(["fault"])") == "bad_schema");
  CHECK(outcome_of(R"(["fault",])") == "bad_json");
  CHECK(outcome_of("[\"fault\",\"\xff\"]") == "bad_utf8");
  CHECK(outcome_of(R"(["fault",)" + std::string(16, '[')) == "limit");
  CHECK(outcome_of(std::string(16, '[') + std::string(16, ']')) == "ok");
  CHECK(outcome_of(std::string(17, '[') + std::string(17, ']')) == "limit");
}

TEST_CASE("read_json: the wrong byte is found wherever it stands") {
  for (std::size_t before = 0; before < 40; ++before) {
    for (std::string const& wrong : {std::string{"\xff"}, std::string{"\0", 1}, std::string{"\xe2\x82"}}) {
      std::string const text = "[\"" + std::string(before, 'x') + wrong + "\"]";
      CAPTURE(text);
      try {
        events_of(text);
        FAIL("accepted");
      } catch (Error const& error) {
        CHECK(error.message().find("(byte " + std::to_string(before + 2) + " of ") != std::string::npos);
      }
    }
  }
}

TEST_CASE("read_json: numbers, strings and words are those of the grammar, and the first byte that is not is named") {
  for (std::string const json : {"0", "-0", "0.0", "-1.5e-3", "1E+2", "0e0", "1e-400", "0.0001e310", "0e999999999999999999999", "1e-999999999999999999999", "true", "false", "null", " \"\" ", "[]", "{}",
                                 "[ ]", "{ }", R"("\"\\\/\b\f\n\r\t")", R"("\u0000\uD83d\uDE80\u00e9")", "\"\x7f\"", "\t\r\n [\t1\r,\n2 ]"})
    CHECK_MESSAGE(outcome_of(json) == "ok", json);
  struct Bad {
    std::string json;
    std::size_t position;
  };
  for (auto const& bad : std::vector<Bad>{{"", 0},           {" ", 1},         {"01", 1},        {"-", 1},           {"-a", 1},        {"+1", 0},      {".5", 0},      {"1.", 2},
                                                       {"1.e1", 2},       {"1e", 2},        {"1e+", 3},       {"0x1", 1},         {"1 2", 2},       {"tru", 3},     {"truE", 3},    {"nan", 1},
                                                       {"[1,]", 3},       {"[,1]", 1},      {"[1", 2},        {"[1 2]", 3},       {"[}", 1},        {"{]", 1},      {"{\"a\"}", 4}, {"{\"a\":}", 5},
                                                       {"{\"a\":1,}", 7}, {"{a:1}", 1},     {"{1:1}", 1},     {"[] x", 3},        {"]", 0},         {"'a'", 0},     {"\"a", 2},     {"\"\\x\"", 2},
                                                       {"\"a\nb\"", 2},  {"\"\x1f\"", 1}, {"\"\\u12g4\"", 5}, {"/**/1", 0}, {"\"\\ud800\"", 7}, {"\"\\ud800\\n\"", 8}, {"\"\\udc00\"", 3},
                                                       {"\"\\ud800\\ud800\"", 9}, {"[0,1e400]", 3}, {"-1e309", 0}, {"0.001e312", 0}, {"1e999999999999999999999", 0}, {std::string(400, '9'), 0}}) {
    auto const& json = bad.json;   // not a structured binding: CAPTURE makes a lambda, which older clang++ lets capture none
    auto const position = bad.position;
    CAPTURE(json);
    try {
      events_of(json);
      FAIL("accepted");
    } catch (Error const& error) {
      CHECK(error.code() == ErrorCode::bad_json);
      CHECK_MESSAGE(error.message().find("(byte " + std::to_string(position) + " of ") != std::string::npos, error.message());
    }
  }
}

TEST_CASE("read_json: escapes become the characters they stand for, at every distance from the start") {
  for (std::size_t before = 0; before < 20; ++before) {
    std::string const x(before, 'x');
    CHECK(events_of("\"" + x + R"(\u00E9\ud83d\ude80\u20aC\/\t\u0041)" + x + "\"") == x + "\xc3\xa9\xf0\x9f\x9a\x80\xe2\x82\xac/\tA" + x + ' ');
  }
}

TEST_CASE("law: read_json accepts what nlohmann's parser accepts, and hears the same strings") {
  std::uint64_t const seed = std::random_device{}();
  CAPTURE(seed);
  std::mt19937_64 random{seed};
  auto const below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  std::vector<std::string> const parts{"{", "}", "[", "]", ",", ":", "\"", "\"a\"", "\"b\\n\"", "\\", "\\u", "d800", "\\udc00", "00e9", "0", "-", "1", "12", ".", "e", "E+", "5", "300",
                                       "true", "false", "null", "nul", " ", "\n", "\t", "\x01", "\xc3\xa9", "[1,2.5,{}]", "{\"k\":\"v\"}", "{\"k\":[", "\"x", "\":"};
  int accepted = 0;
  for (int round = 0; round < 60'000; ++round) {
    std::string json;
    if (below(2) == 0) {   // random parts
      for (std::size_t n = below(9) + 1; n-- > 0;) json += parts[below(parts.size())];
    } else {               // good text, one place of it replaced
      json = R"({"a":[1,-2.5e3,"x\u00e9\ud83d\ude80y",true,null],"b":{"c":{},"d":[]}, "e" : 0 })";
      json.replace(below(json.size()), below(3), below(3) == 0 ? std::string{} : parts[below(parts.size())]);
    }
    CAPTURE(json);
    bool const expected = nlohmann::json::accept(json);
    REQUIRE((outcome_of(json) == "ok") == expected);
    accepted += expected ? 1 : 0;
    if (!expected) continue;
    std::string const strings = events_of('[' + json + ']');
    auto const find = [&](auto const& self, nlohmann::json const& value) -> void {
      if (value.is_string()) CHECK(strings.find(value.get<std::string>()) != std::string::npos);
      if (value.is_structured()) for (auto const& item : value) self(self, item);
    };
    find(find, nlohmann::json::parse(json));
  }
  CHECK(accepted > 1000);
}

TEST_CASE("shown: long names are cut between characters") {
  CHECK(dcp::detail::shown("a\n") == R"("a\n")");
  std::string long_name(119, 'x');
  long_name += "\xc3\xa9\xc3\xa9";
  CHECK(dcp::detail::shown(long_name) == '"' + std::string(119, 'x') + "\"... (123 bytes)");
}

TEST_CASE("python_quoted: every character of the basic plane and beyond comes back through a JSON parser") {
  for (std::uint32_t point : {0x00u, 0x1fu, 0x22u, 0x5cu, 0x7eu, 0x7fu, 0x80u, 0x7ffu, 0x800u, 0xd7ffu, 0xe000u, 0xffffu, 0x10000u, 0x10ffffu}) {
    std::string text;
    if (point < 0x80) text += static_cast<char>(point);
    else if (point < 0x800) text += {static_cast<char>(0xc0 | point >> 6), static_cast<char>(0x80 | (point & 63))};
    else if (point < 0x10000)
      text += {static_cast<char>(0xe0 | point >> 12), static_cast<char>(0x80 | (point >> 6 & 63)), static_cast<char>(0x80 | (point & 63))};
    else
      text += {static_cast<char>(0xf0 | point >> 18), static_cast<char>(0x80 | (point >> 12 & 63)), static_cast<char>(0x80 | (point >> 6 & 63)),
               static_cast<char>(0x80 | (point & 63))};
    std::string const quoted = dcp::detail::python_quoted("a" + text + "b");
    CAPTURE(quoted);
    CHECK(nlohmann::json::parse(quoted).get<std::string>() == "a" + text + "b");
    CHECK(std::all_of(quoted.begin(), quoted.end(), [](char c) { return c >= 0x20 && c < 0x7f; }));
  }
  CHECK(dcp::detail::python_quoted("\xf0\x9f\x9a\x80") == R"("\ud83d\ude80")");
  CHECK(outcome([] { dcp::detail::python_quoted("\xed\xa0\x80"); }) == "bad_utf8");
}
