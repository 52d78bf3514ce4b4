// SPDX-License-Identifier: Apache-2.0
#pragma once
// Values of Python as a tree that can be changed anywhere, and the pickle of it: for what no well-meaning program writes.

#include <dcp/formats/pickle.hpp>

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace dcp::test {

struct PythonValue {
  enum class Kind : std::uint8_t { none, boolean, integer, real, text, list, tuple, dict, global, call, made, persistent };
  Kind kind = Kind::none;
  std::int64_t integer = 0;
  double real = 0;
  std::string text = {}, name = {};      // a text; module and name of a global
  std::vector<PythonValue> parts = {};   // of a dict: key, value, key, value, ...; of a call its arguments; of what was made its state, if there is one

  static PythonValue none() { return {}; }
  static PythonValue boolean(bool value) { return {.kind = Kind::boolean, .integer = value ? 1 : 0}; }
  static PythonValue number(std::int64_t value) { return {.kind = Kind::integer, .integer = value}; }
  static PythonValue of_real(double value) { return {.kind = Kind::real, .real = value}; }
  static PythonValue of_text(std::string value) { return {.kind = Kind::text, .text = std::move(value)}; }
  static PythonValue list(std::vector<PythonValue> parts = {}) { return {.kind = Kind::list, .parts = std::move(parts)}; }
  static PythonValue tuple(std::vector<PythonValue> parts = {}) { return {.kind = Kind::tuple, .parts = std::move(parts)}; }
  static PythonValue global(std::string module, std::string name) { return {.kind = Kind::global, .text = std::move(module), .name = std::move(name)}; }
  static PythonValue call(std::string module, std::string name, std::vector<PythonValue> arguments = {}) { return {.kind = Kind::call, .text = std::move(module), .name = std::move(name), .parts = std::move(arguments)}; }
  static PythonValue made(std::string module, std::string name, std::vector<PythonValue> state = {}) { return {.kind = Kind::made, .text = std::move(module), .name = std::move(name), .parts = std::move(state)}; }
  static PythonValue persistent(PythonValue id) { return {.kind = Kind::persistent, .parts = {std::move(id)}}; }
  static PythonValue dict(std::vector<std::pair<std::string, PythonValue>> pairs = {}) {
    PythonValue value{.kind = Kind::dict};
    for (auto& [key, one] : pairs) value.parts.push_back(of_text(std::move(key))), value.parts.push_back(std::move(one));
    return value;
  }

  /// What a dict, or the dict that is the state of what was made, has under `key`.
  PythonValue& operator[](std::string const& key) {
    PythonValue& dict = kind == Kind::made ? parts.at(0) : *this;
    for (std::size_t i = 0; i + 1 < dict.parts.size(); i += 2)
      if (dict.parts[i].kind == Kind::text && dict.parts[i].text == key) return dict.parts[i + 1];
    throw std::out_of_range{key};
  }
  /// Takes a pair away.
  void remove(std::string const& key) {
    PythonValue& dict = kind == Kind::made ? parts.at(0) : *this;
    for (std::size_t i = 0; i + 1 < dict.parts.size(); i += 2)
      if (dict.parts[i].kind == Kind::text && dict.parts[i].text == key) return static_cast<void>(dict.parts.erase(dict.parts.begin() + static_cast<std::ptrdiff_t>(i), dict.parts.begin() + static_cast<std::ptrdiff_t>(i) + 2));
    throw std::out_of_range{key};
  }

  void write(pickle::Writer& out) const {
    auto const all = [&] { for (auto const& part : parts) part.write(out); };
    switch (kind) {
      case Kind::none: out.none(); return;
      case Kind::boolean: out.boolean(integer != 0); return;
      case Kind::integer: out.integer(integer); return;
      case Kind::real: out.real(real); return;
      case Kind::text: out.text(text); return;
      case Kind::list:
        out.empty_list().mark();
        all();
        out.appends();
        return;
      case Kind::tuple:
        out.mark();
        all();
        out.tuple();
        return;
      case Kind::dict:
        out.empty_dict().mark();
        all();
        out.setitems();
        return;
      case Kind::global: out.global(text, name); return;
      case Kind::call:
        out.global(text, name).mark();
        all();
        out.tuple().reduce();
        return;
      case Kind::made:
        out.global(text, name).empty_tuple().newobj();
        all();
        if (!parts.empty()) out.build();
        return;
      case Kind::persistent:
        all();
        out.persistent_id();
        return;
    }
  }
  Bytes pickled() const {
    pickle::Writer out;
    write(out);
    return out.take();
  }

  /// Calls visit(value, where) for this and every part of it, parts last; `where` is like ".size[0][1]", and ".size#key" of a key. visit may change the value and change it back.
  void each(std::function<void(PythonValue&, std::string const&)> const& visit, std::string const& where = "") {
    visit(*this, where);
    for (std::size_t i = 0; i < parts.size(); ++i) {
      std::string below = where;
      if (kind == Kind::dict) {
        PythonValue const& key = parts[i - i % 2];
        below += '.' + (key.kind == Kind::text ? key.text : std::to_string(i / 2)) + (i % 2 == 0 ? "#key" : "");
      } else if (kind != Kind::made) {
        below += '[' + std::to_string(i) + ']';
      }
      parts[i].each(visit, below);
    }
  }
};

}  // namespace dcp::test
