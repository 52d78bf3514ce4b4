// SPDX-License-Identifier: Apache-2.0
#pragma once
// A value of a pickle as text, much as Python prints it, and pickles written by hand.

#include <dcp/formats/pickle.hpp>

#include "formats/golden.hpp"

#include <cstdio>
#include <string>
#include <string_view>

namespace dcp::test {

inline std::string pickle_text(pickle::Value const& value) {
  using pickle::Kind;
  std::string out;
  auto const list = [&](char const* open, char const* close) {
    value.for_each([&](pickle::Value const& item) { out += (out.empty() ? "" : ", ") + pickle_text(item); });
    out = open + out + close;
  };
  auto const dict = [&] {
    value.for_each_pair([&](pickle::Value const& k, pickle::Value const& v) { out += (out.empty() ? "" : ", ") + pickle_text(k) + ": " + pickle_text(v); });
    out = '{' + out + '}';
  };
  switch (value.kind()) {
    case Kind::none: return "None";
    case Kind::boolean: return value.boolean() ? "True" : "False";
    case Kind::integer: return std::to_string(value.integer());
    case Kind::large_integer: return "0x" + hex_text(value.bytes());
    case Kind::real: {
      char digits[32];
      std::snprintf(digits, sizeof digits, "%.17g", value.real());
      return std::string{"float "} + digits;
    }
    case Kind::text: return '\'' + std::string{value.text()} + '\'';
    case Kind::bytes: return "b'" + hex_text(value.bytes()) + '\'';
    case Kind::list: list("[", "]"); return out;
    case Kind::tuple: list("(", value.size() == 1 ? ",)" : ")"); return out;
    case Kind::set: list("{", "}"); return out;
    case Kind::dict: dict(); return out;
    case Kind::global: return std::string{value.module()} + '.' + std::string{value.name()} + (value.is_allowed() ? "" : "?");
    case Kind::persistent: return "persistent " + pickle_text(value.persistent_id());
    case Kind::object: break;
  }
  std::string text = std::string{value.by_newobj() ? "new " : ""} + std::string{value.module()} + '.' + std::string{value.name()} + (value.is_allowed() ? "" : "?") + pickle_text(value.arguments());
  if (auto const keywords = value.keywords()) text += "**" + pickle_text(*keywords);
  if (auto const state = value.state()) text += " state " + pickle_text(*state);
  if (value.size() == 0) return text;
  bool pairs = true;
  try {
    value.for_each_pair([](auto const&, auto const&) {});
  } catch (Error const&) {
    pairs = false;
  }
  if (pairs) dict();
  else list("[", "]");
  return text + ' ' + out;
}

template <class T>
std::string raw(T number) { return {reinterpret_cast<char const*>(&number), sizeof number}; }
inline std::string u32(std::uint64_t n) { return raw(static_cast<std::uint32_t>(n)); }
inline std::string u64(std::uint64_t n) { return raw(n); }
/// SHORT_BINUNICODE
inline std::string word(std::string const& text) { return '\x8c' + std::string(1, static_cast<char>(text.size())) + text; }
inline std::string times(std::size_t n, std::string const& part) {
  std::string out;
  while (n-- > 0) out += part;
  return out;
}
/// The bytes of a literal, NUL bytes among them.
template <std::size_t N>
std::string lit(char const (&bytes)[N]) { return {bytes, N - 1}; }

inline std::string pickle_text(std::string const& bytes, pickle::ParseOptions const& options = {}) {
  auto const tree = pickle::Tree::parse(as_byte_span(bytes), [](auto, auto) { return true; }, options);
  pickle::expanded_nodes(tree.root(), 1'000'000);
  return pickle_text(tree.root());
}
/// The name of the code that parsing throws, or "ok". Allowed are the modules torch and collections.
inline std::string pickle_outcome(std::string const& bytes, pickle::ParseOptions const& options = {}) {
  return golden::outcome([&] { pickle::Tree::parse(as_byte_span(bytes), [](std::string_view module, std::string_view) { return module == "torch" || module == "collections"; }, options); });
}

}  // namespace dcp::test
