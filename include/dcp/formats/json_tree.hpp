// SPDX-License-Identifier: Apache-2.0
#pragma once
// A JSON document as a tree, for small files whose parts are asked for by name: the commit record. Numbers keep their spelling, so that
// 64-bit integers and doubles are read exactly, as the type that the asker wants.
//
// The tree is two arrays, whatever the document: one node per value, in the order of the text, and the characters of all names, texts
// and numbers. It takes no more than a small multiple of the text, and is destroyed without recursion.

#include <dcp/base/config.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/error.hpp>
#include <dcp/formats/strict_json.hpp>

#include <array>
#include <charconv>
#include <cstdint>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace dcp::detail {

enum class JsonNodeKind : std::uint8_t { null, boolean, number, string, array, object };

struct JsonNode {
  JsonNodeKind kind{};
  std::uint32_t name_bytes = 0, text_bytes = 0;
  std::uint64_t at = 0;       // of the name, and behind it the text, among the characters
  std::uint32_t end = 0;      // the first node that is not inside this one
};

/// One value of a tree, which must outlive it. Every question that the document answers with something else throws Error(bad_schema).
class JsonValue {
 public:
  JsonValue(std::vector<JsonNode> const& nodes, std::string const& characters, std::size_t index) : nodes_{&nodes}, characters_{&characters}, index_{index} {}

  JsonNodeKind kind() const { return node().kind; }
  bool is_string() const { return kind() == JsonNodeKind::string; }

  /// The member called `name` of an object; its first one, if there are several.
  template <class = Deferred>
  JsonValue at(std::string_view name) const {
    std::size_t const found = find(name);
    if (found == 0) wrong("has no " + shown(name));
    return {*nodes_, *characters_, found};
  }
  template <class = Deferred>
  bool contains(std::string_view name) const { return find(name) != 0; }

  template <class = Deferred>
  std::string_view text() const { return want(JsonNodeKind::string, "a text"), spelling(); }
  template <class = Deferred>
  bool boolean() const { return want(JsonNodeKind::boolean, "true or false"), spelling() == "true"; }

  /// A number, exactly: false for one that is no T. Integers have neither fraction nor exponent; of floating-point numbers the nearest
  /// is taken, which is the one that was written if the text has enough digits.
  template <class T>
  bool number(T& value) const {
    if (kind() != JsonNodeKind::number) return false;
    char const *const first = spelling().data(), *const last = first + spelling().size();
    auto const result = std::from_chars(first, last, value);
    return result.ec == std::errc{} && result.ptr == last;
  }
  template <class T>
  T number() const {
    T value{};
    if (!number(value)) wrong(std::string{"is not a number that fits: "} + std::string{spelling()});
    return value;
  }

  /// What an array holds, in order.
  template <class = Deferred>
  std::vector<JsonValue> items() const {
    want(JsonNodeKind::array, "a list");
    std::vector<JsonValue> result;
    for (std::size_t i = index_ + 1; i < node().end; i = (*nodes_)[i].end) result.push_back({*nodes_, *characters_, i});
    return result;
  }

  /// What an object holds, in order; a name that is there twice comes twice.
  template <class = Deferred>
  std::vector<std::pair<std::string_view, JsonValue>> members() const {
    want(JsonNodeKind::object, "an object");
    std::vector<std::pair<std::string_view, JsonValue>> result;
    for (std::size_t i = index_ + 1; i < node().end; i = (*nodes_)[i].end) {
      JsonValue const member{*nodes_, *characters_, i};
      result.emplace_back(member.name(), member);
    }
    return result;
  }

  /// The text, or the spelling of a number, true, false or null.
  std::string_view spelling() const { return std::string_view{*characters_}.substr(static_cast<std::size_t>(node().at) + node().name_bytes, node().text_bytes); }

 private:
  JsonNode const& node() const { return (*nodes_)[index_]; }
  std::string_view name() const { return std::string_view{*characters_}.substr(static_cast<std::size_t>(node().at), node().name_bytes); }
  template <class = Deferred>
  std::size_t find(std::string_view name) const {   // 0, which is the document, if there is none
    want(JsonNodeKind::object, "an object");
    for (std::size_t i = index_ + 1; i < node().end; i = (*nodes_)[i].end)
      if (JsonValue{*nodes_, *characters_, i}.name() == name) return i;
    return 0;
  }
  template <class = Deferred>
  void want(JsonNodeKind kind, char const* called) const {
    if (node().kind != kind) wrong(std::string{"is not "} + called);
  }
  template <class = Deferred>
  [[noreturn]] void wrong(std::string const& problem) const {
    throw Error{ErrorCode::bad_schema, (index_ == 0 ? "the document " : name().empty() ? "an item of a list " : shown(name()) + ' ') + problem};
  }

  std::vector<JsonNode> const* nodes_;
  std::string const* characters_;
  std::size_t index_;
};

class JsonTreeReader : public JsonReader<JsonTreeReader> {
 public:
  std::vector<JsonNode> nodes;
  std::string characters;

  template <class = Deferred>
  void on_key(std::string_view key) {
    characters.append(key);
    name_bytes_ = key.size();
  }
  template <class = Deferred>
  void on_open(bool object) {
    open_.push_back(nodes.size());
    add(object ? JsonNodeKind::object : JsonNodeKind::array, {});
  }
  template <class = Deferred>
  void on_close() {
    nodes[open_.back()].end = static_cast<std::uint32_t>(nodes.size());
    open_.pop_back();
  }
  template <class = Deferred>
  void on_scalar(JsonScalar const& scalar) {
    constexpr std::array kinds{JsonNodeKind::null, JsonNodeKind::boolean, JsonNodeKind::number, JsonNodeKind::number, JsonNodeKind::string};
    add(kinds[static_cast<std::size_t>(scalar.kind)], scalar.text);
  }

 private:
  template <class = Deferred>
  void add(JsonNodeKind kind, std::string_view text) {
    nodes.push_back({kind, static_cast<std::uint32_t>(name_bytes_), static_cast<std::uint32_t>(text.size()), characters.size() - name_bytes_, static_cast<std::uint32_t>(nodes.size() + 1)});
    characters.append(text);
    name_bytes_ = 0;
  }

  std::size_t name_bytes_ = 0;   // at the end of `characters`: of the name whose value comes next
  std::vector<std::size_t> open_;
};

/// A document of at most 4 GiB. Throws as read_json.
class JsonTree {
 public:
  template <class = Deferred>
  static JsonTree parse(ConstByteSpan bytes, std::string_view what) {
    if (bytes.size() > UINT32_MAX) throw Error{ErrorCode::limit, std::string{what} + " is larger than 4 GiB"};   // sizes and node numbers have 32 bits
    JsonTreeReader reader;
    read_json(bytes, what, 0, reader);
    JsonTree tree;
    tree.nodes_ = std::move(reader.nodes);
    tree.characters_ = std::move(reader.characters);
    return tree;
  }
  JsonValue root() const& { return {nodes_, characters_, 0}; }

 private:
  std::vector<JsonNode> nodes_;
  std::string characters_;
};

}  // namespace dcp::detail
