// SPDX-License-Identifier: Apache-2.0
#include <dcp/formats/strict_json.hpp>

#include "golden.hpp"

#include <doctest/doctest.h>

using namespace dcp;
using golden::outcome;

namespace {

/// Writes down what is reported; skips values of the key "skip", finds fault with the string "fault".
class Listener : public dcp::detail::JsonReader<Listener> {
 public:
  std::string events;

  void on_key(std::string const& key) { events += key + ':', skip_next_ = key == "skip"; }
  void on_open(bool object) {
    events += object ? '{' : '[';
    if (skip_next_) skip();
    skip_next_ = false;
  }
  void on_close() { events += ')'; }
  void on_scalar(dcp::detail::JsonScalar const& scalar) {
    if (scalar.kind == dcp::detail::JsonKind::string && *scalar.text == "fault") fault(ErrorCode::bad_schema, "found fault");
    events += scalar.kind == dcp::detail::JsonKind::natural  ? std::to_string(scalar.natural)
              : scalar.kind == dcp::detail::JsonKind::string ? *scalar.text
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
