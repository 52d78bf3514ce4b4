// SPDX-License-Identifier: Apache-2.0
#pragma once
// Python pickles as data: a reader that builds a tree of values and never calls, imports or computes anything, and a writer of the
// few opcodes that PyTorch's weights_only unpickler accepts.
//
// A pickle is a program for a machine with a stack and a memo. What makes it dangerous to a Python process is that GLOBAL finds anything
// by name, that REDUCE and NEWOBJ call what was found, and that BUILD may run code of the result. Here these make nodes: a global is a
// pair of names, an object is "this global, with these arguments and this state". What that means is for the caller to know, who
// also says which globals may occur at all.
//
// The memo lets one value stand in many places, so the tree is a graph: a few bytes can stand for 2^1000 values, and a list can hold
// itself. There are at most as many nodes as bytes in the stream, and four; a walk over them is bounded by expanded_nodes().
// Source    CPython 3.11: Lib/pickletools.py (opcodes and operands), Lib/pickle.py; torch 2.15: torch/_weights_only_unpickler.py

#include <dcp/base/config.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/error.hpp>
#include <dcp/formats/pickle_reader.hpp>
#include <dcp/formats/pickle_writer.hpp>
#include <dcp/formats/strict_json.hpp>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace dcp::pickle {

class Value;

/// The values that a walk from `value` meets, itself included, one in several places once for each; names of globals, arguments and states
/// are among them. Who has called this may walk, recursively even.
///
/// Throws    Error(limit) beyond `limit` values, or where values nest deeper than `max_depth`; on a cycle, too, which is both
/// Cost      proportional to the tree that `value` is of, however many values are met
template <class = Deferred>
std::uint64_t expanded_nodes(Value const& value, std::uint64_t limit, std::uint32_t max_depth = 1000);

/// One value of a Tree, which must outlive it and stay where it is. A question that the value has no answer to throws Error(bad_schema).
///
/// Cycles    a list, dict, set or object may be its own part, and one value may have many places: bound every walk (expanded_nodes)
class Value {
 public:
  Value(detail::Store const& store, std::uint32_t index) : store_{&store}, index_{index} {}

  Kind kind() const { return node().kind; }
  bool is_none() const { return kind() == Kind::none; }
  bool is_boolean() const { return kind() == Kind::boolean; }
  bool is_integer() const { return kind() == Kind::integer; }
  bool is_real() const { return kind() == Kind::real; }
  bool is_text() const { return kind() == Kind::text; }
  bool is_bytes() const { return kind() == Kind::bytes; }
  bool is_list() const { return kind() == Kind::list; }
  bool is_tuple() const { return kind() == Kind::tuple; }
  bool is_dict() const { return kind() == Kind::dict; }
  bool is_set() const { return kind() == Kind::set; }
  bool is_global() const { return kind() == Kind::global; }
  bool is_object() const { return kind() == Kind::object; }
  bool is_persistent() const { return kind() == Kind::persistent; }

  template <class = Deferred>
  bool boolean() const { return want(Kind::boolean).a != 0; }
  template <class = Deferred>
  std::int64_t integer() const { return static_cast<std::int64_t>(want(Kind::integer).bits()); }
  /// An integer from 0 to 2^64 - 1.
  template <class = Deferred>
  std::uint64_t natural() const {
    if (kind() == Kind::large_integer) {
      auto const digits = store_->characters(node());
      if (digits.size() == 9 && digits[8] == std::byte{0}) return load_little_endian<std::uint64_t>(digits.data());
      wrong("an integer that is no unsigned 64-bit integer");
    }
    if (integer() < 0) wrong("a negative integer, not a natural number");
    return static_cast<std::uint64_t>(integer());
  }
  template <class = Deferred>
  double real() const { return std::bit_cast<double>(want(Kind::real).bits()); }
  /// UTF-8, which was checked.
  template <class = Deferred>
  std::string_view text() const { return as_text(store_->characters(want(Kind::text))); }
  /// Of a large integer: two's complement, little-endian, without needless bytes.
  template <class = Deferred>
  ConstByteSpan bytes() const { return store_->characters(kind() == Kind::large_integer ? node() : want(Kind::bytes)); }

  /// Items of a list, tuple or set, pairs of a dict, and of an object whichever was put into it.
  template <class = Deferred>
  std::size_t size() const {
    Node const& n = node();
    if (!is_container(n.kind)) wrong("not a container");
    return n.count / (holds_pairs() ? 2 : 1);
  }
  /// visit(Value) for each item of a list, tuple, set, or object that items were put into.
  template <class F>
  void for_each(F visit) const {
    if (!is_container(kind()) || holds_pairs()) wrong("not a list, tuple or set");
    store_->for_each_item(node(), [&](std::uint32_t item) { visit(Value{*store_, item}); });
  }
  /// visit(Value key, Value value) for each pair of a dict, or of an object that pairs were put into (an OrderedDict). A key that is
  /// there twice comes twice.
  template <class F>
  void for_each_pair(F visit) const {
    if (!may_have_pairs()) wrong("not a dict");
    std::uint32_t key = detail::absent;
    store_->for_each_item(node(), [&](std::uint32_t item) {
      if (key == detail::absent) key = item;
      else visit(Value{*store_, key}, Value{*store_, item}), key = detail::absent;
    });
  }
  /// Of a tuple or list.
  template <class = Deferred>
  Value item(std::size_t index) const {
    Node const& n = node();
    if (n.kind != Kind::list && n.kind != Kind::tuple) wrong("not a list or tuple");
    if (index >= n.count) throw Error{ErrorCode::bad_schema, what() + " of " + std::to_string(n.count) + " items in a pickle has no item " + std::to_string(index)};
    if (n.kind == Kind::tuple) return {*store_, store_->pool[n.a + index]};
    std::uint32_t batch = n.a;
    for (; index >= store_->batches[batch].count; batch = store_->batches[batch].next) index -= store_->batches[batch].count;
    return {*store_, store_->pool[store_->batches[batch].begin + index]};
  }
  /// What a dict, or an object with pairs, has under a key that is this text: the last, as in Python.
  ///
  /// Cost      proportional to the pairs
  template <class = Deferred>
  std::optional<Value> find(std::string_view key) const {
    std::optional<Value> found;
    for_each_pair([&](Value const& k, Value const& value) {
      if (k.is_text() && k.text() == key) found = value;
    });
    return found;
  }
  template <class = Deferred>
  Value at(std::string_view key) const {
    auto const found = find(key);
    if (!found) throw Error{ErrorCode::bad_schema, what() + " in a pickle has no " + detail::shown(key)};
    return *found;
  }

  /// Of a global; of an object: of what was called.
  template <class = Deferred>
  std::string_view module() const { return Value{*store_, global_node().a}.text(); }
  template <class = Deferred>
  std::string_view name() const { return Value{*store_, global_node().b}.text(); }
  /// Whether the caller of parse allowed that global.
  template <class = Deferred>
  bool is_allowed() const { return (global_node().flags & detail::flags::allowed) != 0; }
  /// Whether it is an object that a call of that global gives (REDUCE, NEWOBJ or NEWOBJ_EX).
  template <class = Deferred>
  bool is_call_of(std::string_view module, std::string_view name) const { return is_object() && this->name() == name && this->module() == module; }
  /// Whether the global was called as a class, by NEWOBJ or NEWOBJ_EX, which leaves out __init__.
  template <class = Deferred>
  bool by_newobj() const { return (want(Kind::object).flags & detail::flags::newobj) != 0; }
  /// The tuple that the global was called with.
  template <class = Deferred>
  Value arguments() const { return {*store_, parts().arguments}; }
  /// The dict of keyword arguments, which only NEWOBJ_EX has.
  template <class = Deferred>
  std::optional<Value> keywords() const { return part(parts().keywords); }
  /// What BUILD gave the object.
  template <class = Deferred>
  std::optional<Value> state() const { return part(parts().state); }
  template <class = Deferred>
  Value persistent_id() const { return {*store_, want(Kind::persistent).a}; }

  /// The same for one and the same value in several places; also for equal ones among None, bools, () and integers of a byte.
  std::uint32_t id() const { return index_; }

 private:
  using Node = detail::Node;

  static bool is_container(Kind kind) { return kind == Kind::list || kind == Kind::tuple || kind == Kind::dict || kind == Kind::set || kind == Kind::object; }
  Node const& node() const { return store_->nodes[index_]; }
  bool holds_pairs() const { return kind() == Kind::dict || (node().flags & detail::flags::pairs) != 0; }
  bool may_have_pairs() const { return holds_pairs() || (kind() == Kind::object && node().count == 0); }
  template <class = Deferred>
  std::string what() const { return kind_names[static_cast<std::size_t>(kind())]; }
  template <class = Deferred>
  [[noreturn]] void wrong(std::string const& problem) const { throw Error{ErrorCode::bad_schema, "a value of a pickle is " + what() + ", " + problem}; }
  template <class = Deferred>
  Node const& want(Kind wanted) const {
    if (node().kind != wanted) wrong(std::string{"not "} + kind_names[static_cast<std::size_t>(wanted)]);
    return node();
  }
  template <class = Deferred>
  detail::ObjectParts const& parts() const { return store_->objects[want(Kind::object).a]; }
  template <class = Deferred>
  Node const& global_node() const { return kind() == Kind::object ? store_->nodes[parts().callable] : want(Kind::global); }
  template <class = Deferred>
  std::optional<Value> part(std::uint32_t index) const {
    if (index == detail::absent) return std::nullopt;
    return Value{*store_, index};
  }

  template <class>
  friend std::uint64_t expanded_nodes(Value const&, std::uint64_t, std::uint32_t);

  detail::Store const* store_;
  std::uint32_t index_;
};

template <class>
std::uint64_t expanded_nodes(Value const& value, std::uint64_t limit, std::uint32_t max_depth) {
  detail::Store const& store = *value.store_;
  constexpr std::uint64_t open = UINT64_MAX;
  std::vector<std::uint64_t> counts(store.nodes.size());   // 0: not met yet
  std::vector<std::uint32_t> heights(store.nodes.size());
  std::vector<std::uint64_t> work{std::uint64_t{value.index_} * 2};   // node * 2, + 1 when its parts are counted
  while (!work.empty()) {
    auto const index = static_cast<std::uint32_t>(work.back() / 2);
    bool const leave = work.back() % 2 != 0;
    work.pop_back();
    std::uint64_t& count = counts[index];
    if (!leave) {
      if (count == open) throw Error{ErrorCode::limit, "a value of a pickle is a part of itself"};   // open are those that lead to this one, and no others
      if (count != 0) continue;
      count = open;
      work.push_back(std::uint64_t{index} * 2 + 1);
      store.for_each_part(store.nodes[index], [&](std::uint32_t part) {
        if (counts[part] == 0 && store.nodes[part].kind < Kind::list) counts[part] = 1;   // has no parts
        if (counts[part] == 0 || counts[part] == open) work.push_back(std::uint64_t{part} * 2);
      });
      continue;
    }
    std::uint64_t sum = 1;
    std::uint32_t height = 0;
    store.for_each_part(store.nodes[index], [&](std::uint32_t part) {
      if (!checked_add(sum, counts[part], sum)) sum = open;
      height = std::max(height, heights[part] + 1);
    });
    if (sum > limit) throw Error{ErrorCode::limit, "a pickle stands for more than " + std::to_string(limit) + " values"};
    if (height > max_depth) throw Error{ErrorCode::limit, "the values of a pickle nest deeper than " + std::to_string(max_depth)};
    count = sum, heights[index] = height;
  }
  return counts[value.index_];
}

/// What a pickle says.
///
/// Memory    at most about 100 bytes per byte of the stream, usually 5; destroyed without recursion. Texts and bytes stay in the stream
class Tree {
 public:
  /// The value that the pickle at the start of `bytes` makes. `bytes` must outlive the tree.
  ///
  /// allowed   bool(std::string_view module, std::string_view name), asked of each GLOBAL and STACK_GLOBAL; names as they are spelt, so
  ///           `__builtin__` below protocol 3, and with dots for parts of parts
  /// consumed  the bytes up to STOP, which counts
  /// Refused   INST, OBJ, EXT1/2/4, out-of-band buffers; calls of anything but a global; a second BUILD of one object; more than one value at STOP
  /// Throws    Error: truncated; bad_version for the protocol; unsupported for such instructions, unknown ones, and globals that are not
  ///           allowed; bad_utf8; limit; trailing_data; bad_schema for all else. Its byte range is the instruction at fault
  template <class Allowed>
  static Tree parse(ConstByteSpan bytes, Allowed allowed, ParseOptions const& options = {}, std::size_t* consumed = nullptr) {
    Tree tree;
    std::size_t end = 0;
    detail::AllowedRef const asked{&allowed, [](void* callable, std::string_view module, std::string_view name) -> bool { return (*static_cast<Allowed*>(callable))(module, name); }};
    tree.root_ = detail::Reader<>{tree.store_, bytes, asked, options}.run(end);
    if (consumed != nullptr) *consumed = end;
    return tree;
  }

  Value root() const& { return {store_, root_}; }
  Value root() const&& = delete;

 private:
  detail::Store store_;
  std::uint32_t root_ = 0;
};

}  // namespace dcp::pickle
