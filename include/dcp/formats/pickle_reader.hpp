// SPDX-License-Identifier: Apache-2.0
#pragma once
// The machine that a pickle is a program for: its stack, its memo, and the nodes that its instructions make. pickle.hpp shows them as values.

#include <dcp/base/config.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/text.hpp>
#include <dcp/formats/pickle_opcodes.hpp>
#include <dcp/formats/strict_json.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

namespace dcp::pickle {

enum class Kind : std::uint8_t {
  none,
  boolean,
  integer,         // fits std::int64_t
  large_integer,   // does not
  real,
  text,            // str; also Python 2's str where it is UTF-8
  bytes,           // bytes and bytearray; also Python 2's str where it is not UTF-8
  list,
  tuple,
  dict,
  set,             // and frozenset
  global,          // what a module calls by a name: a class, a function
  object,          // what a call of a global gives
  persistent,      // what the program around the pickle keeps under an id: the storages of torch.save
};
inline constexpr std::array kind_names{"None",   "a bool",  "an integer", "an integer beyond 64 bits", "a float",  "a text",    "bytes",
                                       "a list", "a tuple", "a dict", "a set", "a global", "an object", "a persistent object"};

/// What a stream may hold; beyond it, Error(limit) names the limit.
struct Limits {
  std::uint64_t max_bytes = std::uint64_t{1} << 30;   // of the stream; at most 4 GiB, whatever is said here
  std::uint64_t max_nodes = std::uint64_t{1} << 26;   // values, each counted once however many places it has
  std::uint32_t max_depth = 1000;                     // MARKs open at once. Values also nest without MARKs: see expanded_nodes
  std::uint64_t max_memo = std::uint64_t{1} << 26;    // entries of the memo, whatever their numbers
};

struct ParseOptions {
  Limits limits = {};
  bool allow_trailing_bytes = false;   // after STOP; max_bytes is then the most that is looked at
  bool opaque = false;                 // a global that is not allowed becomes a node whose is_allowed() is false
  std::uint64_t first_byte = 0;        // where the stream lies in its file, for messages
};

namespace detail {

using dcp::detail::shown;

inline constexpr std::uint32_t absent = UINT32_MAX;
inline constexpr std::uint32_t none_node = 0, false_node = 1, true_node = 2, empty_tuple_node = 3;   // there once in every tree

namespace flags {
inline constexpr std::uint8_t allowed = 1;    // a global
inline constexpr std::uint8_t own = 2;        // the characters lie in Store::own, not in the stream
inline constexpr std::uint8_t newobj = 4;     // an object
inline constexpr std::uint8_t pairs = 8;      // an object with items: those of a dict, rather than of a list
}  // namespace flags

// What a and b are:
//   boolean, integer, real          the 64 bits of the value, lower half in a
//   text, bytes, large_integer      position and size
//   tuple                           position in the pool
//   list, dict, set                 first and last batch, 0 if there is none
//   global                          the nodes of module and name
//   object                          index of its ObjectParts
//   persistent                      the node of the id
struct Node {
  Kind kind = Kind::none;
  std::uint8_t flags = 0;
  std::uint32_t count = 0;   // entries of the pool that belong to it; of a pair, two
  std::uint32_t a = 0, b = 0;

  std::uint64_t bits() const { return std::uint64_t{b} << 32 | a; }
};
static_assert(sizeof(Node) == 16);

/// Some items of a container, side by side in the pool, and the batch that goes on. Pickles fill containers 1000 items at a time.
struct Batch {
  std::uint32_t begin = 0, count = 0, next = 0;
};
struct ObjectParts {
  std::uint32_t callable = absent, arguments = absent, keywords = absent, state = absent;
  std::uint32_t first = 0, last = 0;   // batches
};

struct Store {
  ConstByteSpan input;
  std::string own;   // texts that the stream spells with escapes, and integers that it spells in decimal
  std::vector<Node> nodes;
  std::vector<std::uint32_t> pool;
  std::vector<Batch> batches;
  std::vector<ObjectParts> objects;

  ConstByteSpan characters(Node const& node) const {
    return ((node.flags & flags::own) != 0 ? as_byte_span(own) : input).subspan(node.a, node.b);
  }

  /// visit(node number) for each item of a container or object, in order.
  template <class F>
  void for_each_item(Node const& node, F visit) const {
    if (node.kind == Kind::tuple) {
      for (std::uint32_t i = 0; i < node.count; ++i) visit(pool[node.a + i]);
      return;
    }
    for (std::uint32_t batch = node.kind == Kind::object ? objects[node.a].first : node.a; batch != 0; batch = batches[batch].next)
      for (std::uint32_t i = 0; i < batches[batch].count; ++i) visit(pool[batches[batch].begin + i]);
  }
  /// visit(node number) for everything that a node consists of.
  template <class F>
  void for_each_part(Node const& node, F visit) const {
    switch (node.kind) {
      case Kind::global: visit(node.a), visit(node.b); break;
      case Kind::persistent: visit(node.a); break;
      case Kind::object:
        for (std::uint32_t const part : {objects[node.a].callable, objects[node.a].arguments, objects[node.a].keywords, objects[node.a].state})
          if (part != absent) visit(part);
        [[fallthrough]];
      case Kind::list:
      case Kind::tuple:
      case Kind::dict:
      case Kind::set: for_each_item(node, visit); break;
      default: break;
    }
  }
};

/// allowed(module, name), without the type of who answers: the reader is compiled once for all of them.
struct AllowedRef {
  void* callable;
  bool (*call)(void* callable, std::string_view module, std::string_view name);
};

template <class = Deferred>
class Reader {
 public:
  Reader(Store& store, ConstByteSpan bytes, AllowedRef allowed, ParseOptions const& options)
      : store_{store}, allowed_{allowed}, options_{options}, total_{bytes.size()}, max_nodes_{std::min<std::uint64_t>(options.limits.max_nodes, absent)} {
    std::uint64_t const most = std::min<std::uint64_t>(options.limits.max_bytes, UINT32_MAX);   // positions have 32 bits
    if (bytes.size() > most) {
      if (!options.allow_trailing_bytes) throw Error{ErrorCode::limit, "a pickle of " + std::to_string(bytes.size()) + " bytes; max_bytes is " + std::to_string(most)};
      bytes = bytes.first(static_cast<std::size_t>(most));
      clipped_ = true;
    }
    store_.input = bytes;
    begin_ = at_ = instruction_ = bytes.data();
    end_ = begin_ + bytes.size();
    // Growing would copy, and touch twice the memory. `.metadata` has a node per 7 to 12 bytes; the cap is for a few large texts or bytes.
    auto const nodes = static_cast<std::size_t>(std::min({std::uint64_t{bytes.size()} / 6 + 4, max_nodes_ + 4, std::uint64_t{1} << 21}));
    store_.nodes.reserve(nodes);
    store_.pool.reserve(nodes);
    store_.nodes = {Node{}, Node{.kind = Kind::boolean}, Node{.kind = Kind::boolean, .a = 1}, Node{.kind = Kind::tuple}};
    store_.batches = {Batch{}};   // 0 stands for none
  }

  /// The node that STOP finds; `consumed` counts STOP.
  std::uint32_t run(std::size_t& consumed) {
    for (;;) {
      instruction_ = at_;
      need(1, "ends without STOP");
      auto const code = static_cast<unsigned char>(*at_++);
      if (code == op::stop) break;
      execute(code);
    }
    if (!marks_.empty()) fault("stops inside a MARK");
    if (stack_.empty()) fault("stops without a value");
    if (stack_.size() > 1) fault("stops with " + std::to_string(stack_.size()) + " values where there is to be one");
    consumed = static_cast<std::size_t>(at_ - begin_);
    if (consumed < total_ && !options_.allow_trailing_bytes) {
      instruction_ = at_;
      fault(ErrorCode::trailing_data, "is followed by " + std::to_string(total_ - consumed) + " more bytes");
    }
    return stack_.front();
  }

 private:
  void execute(unsigned char code) {
    switch (code) {
      case op::mark:
        if (marks_.size() >= options_.limits.max_depth) fault(ErrorCode::limit, "nests deeper than " + std::to_string(options_.limits.max_depth) + " MARKs (max_depth)");
        marks_.push_back(stack_.size());
        break;
      case op::pop:
        if (!marks_.empty() && marks_.back() == stack_.size()) marks_.pop_back();   // as in CPython
        else pop();
        break;
      case op::pop_mark: stack_.resize(pop_mark()); break;
      case op::dup: push(top()); break;

      case op::none: push(none_node); break;
      case op::newtrue: push(true_node); break;
      case op::newfalse: push(false_node); break;
      case op::binint: push_integer(number<std::int32_t>()); break;
      case op::binint1: push_small(number<std::uint8_t>()); break;
      case op::binint2: push_integer(number<std::uint16_t>()); break;
      case op::long1: push_long(take(number<std::uint8_t>())); break;
      case op::long4: push_long(take(size_of(number<std::int32_t>()))); break;
      case op::int_line: int_line(); break;
      case op::long_line: {
        std::string_view digits = line();
        if (digits.ends_with('L')) digits.remove_suffix(1);
        push_decimal(digits);
        break;
      }
      case op::binfloat: push_real(__builtin_bswap64(number<std::uint64_t>())); break;
      case op::float_line: float_line(); break;

      case op::short_binunicode: push_text(take(number<std::uint8_t>())); break;
      case op::binunicode: push_text(take(number<std::uint32_t>())); break;
      case op::binunicode8: push_text(take(number<std::uint64_t>())); break;
      case op::unicode_line: unicode_line(); break;
      case op::short_binstring: push_string(take(number<std::uint8_t>())); break;
      case op::binstring: push_string(take(size_of(number<std::int32_t>()))); break;
      case op::string_line: string_line(); break;
      case op::short_binbytes: push(add_span(Kind::bytes, take(number<std::uint8_t>()))); break;
      case op::binbytes: push(add_span(Kind::bytes, take(number<std::uint32_t>()))); break;
      case op::binbytes8:
      case op::bytearray8: push(add_span(Kind::bytes, take(number<std::uint64_t>()))); break;

      case op::empty_tuple: push(empty_tuple_node); break;
      case op::tuple1: make_tuple(room(1)); break;
      case op::tuple2: make_tuple(room(2)); break;
      case op::tuple3: make_tuple(room(3)); break;
      case op::tuple: make_tuple(pop_mark()); break;
      case op::empty_list: push(add({.kind = Kind::list})); break;
      case op::empty_dict: push(add({.kind = Kind::dict})); break;
      case op::empty_set: push(add({.kind = Kind::set})); break;
      case op::list: make_container(Kind::list); break;
      case op::dict: make_container(Kind::dict); break;
      case op::frozenset: make_container(Kind::set); break;
      case op::append: fill(room(2) + 1, Kind::list); break;
      case op::appends: fill(mark_above_container(), Kind::list); break;
      case op::setitem: fill(room(3) + 1, Kind::dict); break;
      case op::setitems: fill(mark_above_container(), Kind::dict); break;
      case op::additems: fill(mark_above_container(), Kind::set); break;

      case op::binput: memoize(number<std::uint8_t>()); break;
      case op::long_binput: memoize(number<std::uint32_t>()); break;
      case op::put: memoize(index_line()); break;
      case op::memoize: memoize(memo_entries_); break;
      case op::binget: recall(number<std::uint8_t>()); break;
      case op::long_binget: recall(number<std::uint32_t>()); break;
      case op::get: recall(index_line()); break;

      case op::global: {
        std::string_view const module = line(), name = line();
        std::uint32_t const first = add_text(as_byte_span(module));
        push_global(first, add_text(as_byte_span(name)));
        break;
      }
      case op::stack_global: {
        std::size_t const from = room(2);
        std::uint32_t const module = stack_[from], name = stack_[from + 1];
        if (kind_of(module) != Kind::text || kind_of(name) != Kind::text) fault("names a global by something else than two texts");
        stack_.resize(from);
        push_global(module, name);
        break;
      }
      case op::reduce: {
        std::size_t const from = room(2);
        make_object(from, {.callable = stack_[from], .arguments = stack_[from + 1]}, 0);
        break;
      }
      case op::newobj: {
        std::size_t const from = room(2);
        make_object(from, {.callable = stack_[from], .arguments = stack_[from + 1]}, flags::newobj);
        break;
      }
      case op::newobj_ex: {
        std::size_t const from = room(3);
        if (kind_of(stack_[from + 2]) != Kind::dict) misplaced("NEWOBJ_EX gives as keywords", stack_[from + 2]);
        make_object(from, {.callable = stack_[from], .arguments = stack_[from + 1], .keywords = stack_[from + 2]}, flags::newobj);
        break;
      }
      case op::build: {
        std::size_t const from = room(2);
        Node const& object = store_.nodes[stack_[from]];
        if (object.kind != Kind::object) misplaced("BUILD gives a state to", stack_[from]);
        if (store_.objects[object.a].state != absent) fault("gives an object its state twice");
        store_.objects[object.a].state = stack_[from + 1];
        stack_.pop_back();
        break;
      }
      case op::binpersid: {
        std::uint32_t const id = pop();
        push(add({.kind = Kind::persistent, .a = id}));
        break;
      }
      case op::persid: {
        std::uint32_t const id = add_text(as_byte_span(line()));
        push(add({.kind = Kind::persistent, .a = id}));
        break;
      }

      case op::proto:
        if (unsigned const version = number<std::uint8_t>(); version > 5) fault(ErrorCode::bad_version, "has protocol " + std::to_string(version) + "; 0 to 5 are known");
        break;
      case op::frame: {
        auto const bytes = number<std::uint64_t>();
        need(bytes, "has a frame");   // it may be skipped, and what it holds is then read as if it had none
        break;
      }
      default: refuse(code);
    }
  }

  // --- faults: functions of their own, so that what calls them is small enough to be inlined
  [[noreturn, gnu::cold, gnu::noinline]] void fault(ErrorCode code, std::string const& problem) const {
    auto const position = static_cast<std::uint64_t>(instruction_ - begin_);
    Error error{code, "the pickle " + problem + " (byte " + std::to_string(position) + " of " + std::to_string(total_) + ")"};
    throw error.with_range(options_.first_byte + position, options_.first_byte + position + 1);
  }
  [[noreturn, gnu::cold, gnu::noinline]] void fault(std::string const& problem) const { fault(ErrorCode::bad_schema, problem); }
  [[noreturn, gnu::cold, gnu::noinline]] void misplaced(std::string const& what, std::uint32_t node) const {
    fault("is wrong: " + what + ' ' + kind_names[static_cast<std::size_t>(kind_of(node))]);
  }
  [[noreturn, gnu::cold, gnu::noinline]] void refuse(unsigned char code) const {
    struct Refused {
      unsigned char code;
      char const* name;
    };
    for (Refused const& refused : std::initializer_list<Refused>{{op::inst, "INST"}, {op::obj, "OBJ"}, {op::ext1, "EXT1"}, {op::ext2, "EXT2"}, {op::ext4, "EXT4"},
                                                                 {op::next_buffer, "NEXT_BUFFER"}, {op::readonly_buffer, "READONLY_BUFFER"}})
      if (code == refused.code) fault(ErrorCode::unsupported, std::string{"uses "} + refused.name + ", which is not supported");
    fault(ErrorCode::unsupported, "uses the opcode 0x" + hex16(code).substr(14) + ", which is not known");
  }

  // --- operands
  void need(std::uint64_t bytes, char const* problem) const {
    if (bytes > static_cast<std::uint64_t>(end_ - at_)) [[unlikely]] too_short(bytes, problem);
  }
  [[noreturn, gnu::cold, gnu::noinline]] void too_short(std::uint64_t bytes, char const* problem) const {
    if (clipped_) fault(ErrorCode::limit, "is longer than " + std::to_string(store_.input.size()) + " bytes (max_bytes)");
    fault(ErrorCode::truncated, std::string{problem} + ": " + std::to_string(bytes) + " bytes are wanted and " + std::to_string(end_ - at_) + " are left");
  }
  ConstByteSpan take(std::uint64_t bytes) {
    need(bytes, "ends inside an operand");
    ConstByteSpan const part{at_, static_cast<std::size_t>(bytes)};
    at_ += bytes;
    return part;
  }
  template <class T>
  T number() {
    need(sizeof(T), "ends inside an operand");
    T const value = load_little_endian<T>(at_);
    at_ += sizeof(T);
    return value;
  }
  std::uint64_t size_of(std::int32_t size) const {
    if (size < 0) fault("has an operand of " + std::to_string(size) + " bytes");
    return static_cast<std::uint64_t>(size);
  }
  /// Up to the next newline, which is passed and left out.
  std::string_view line() {
    std::string_view const rest = as_text({at_, end_});
    std::size_t const size = rest.find('\n');
    if (size == std::string_view::npos) need(rest.size() + 1, "ends inside a line");
    at_ += size + 1;
    return rest.substr(0, size);
  }
  std::uint64_t index_line() {
    std::string_view const digits = line();
    std::uint64_t value = 0;
    auto const result = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (result.ec != std::errc{} || result.ptr != digits.data() + digits.size()) fault("numbers an entry of the memo " + shown_line(digits));
    return value;
  }
  static std::string shown_line(std::string_view text) { return first_invalid_utf8(text) == std::string_view::npos ? shown(text) : "by bytes that are not UTF-8"; }

  // --- the stack. What lies below the innermost MARK is out of reach.
  std::size_t floor() const { return marks_.empty() ? 0 : marks_.back(); }
  void push(std::uint32_t node) { stack_.push_back(node); }
  /// The index of the `count` topmost values.
  std::size_t room(std::size_t count) const {
    if (stack_.size() - floor() < count) [[unlikely]] underflow(count);
    return stack_.size() - count;
  }
  [[noreturn, gnu::cold, gnu::noinline]] void underflow(std::size_t count) const {
    fault("takes " + std::to_string(count) + " values from a stack of " + std::to_string(stack_.size() - floor()));
  }
  std::uint32_t top() const { return stack_[room(1)]; }
  std::uint32_t pop() {
    std::uint32_t const node = top();
    stack_.pop_back();
    return node;
  }
  std::size_t pop_mark() {
    if (marks_.empty()) fault("goes back to a MARK where there is none");
    std::size_t const at = marks_.back();
    marks_.pop_back();
    return at;
  }
  std::size_t mark_above_container() {
    std::size_t const at = pop_mark();
    if (at == floor()) fault("has nothing below a MARK that could take what is above it");
    return at;
  }

  // --- nodes
  [[noreturn, gnu::cold, gnu::noinline]] void too_many(char const* what, std::uint64_t limit) const { fault(ErrorCode::limit, "has more than " + std::to_string(limit) + ' ' + what); }
  Kind kind_of(std::uint32_t node) const { return store_.nodes[node].kind; }
  std::uint32_t add(Node const& node) {
    if (store_.nodes.size() >= max_nodes_) [[unlikely]] too_many("values (max_nodes)", max_nodes_);
    store_.nodes.push_back(node);
    return static_cast<std::uint32_t>(store_.nodes.size() - 1);
  }
  std::uint32_t add_bits(Kind kind, std::uint64_t bits) { return add({.kind = kind, .a = static_cast<std::uint32_t>(bits), .b = static_cast<std::uint32_t>(bits >> 32)}); }
  void push_integer(std::int64_t value) { push(add_bits(Kind::integer, static_cast<std::uint64_t>(value))); }
  /// One node for all that are equal, as CPython has one object: most shapes and indices are such.
  void push_small(std::uint8_t value) {
    std::uint32_t& node = small_[value];
    if (node == 0) node = add_bits(Kind::integer, value);
    push(node);
  }
  void push_real(std::uint64_t bits) { push(add_bits(Kind::real, bits)); }
  std::uint32_t add_span(Kind kind, ConstByteSpan part) {
    return add({.kind = kind, .a = static_cast<std::uint32_t>(part.data() - begin_), .b = static_cast<std::uint32_t>(part.size())});
  }
  std::uint32_t add_own(Kind kind, std::string_view part) {
    if (store_.own.size() + part.size() > UINT32_MAX) fault(ErrorCode::limit, "has more than 4 GiB of texts");
    auto const at = static_cast<std::uint32_t>(store_.own.size());
    store_.own.append(part);
    return add({.kind = kind, .flags = flags::own, .a = at, .b = static_cast<std::uint32_t>(part.size())});
  }
  std::uint32_t add_text(ConstByteSpan part) {
    if (first_invalid_utf8(as_text(part)) != std::string_view::npos) fault(ErrorCode::bad_utf8, "has a text that is not UTF-8");
    return add_span(Kind::text, part);
  }
  void push_text(ConstByteSpan part) { push(add_text(part)); }
  void push_string(ConstByteSpan part) { push(add_span(first_invalid_utf8(as_text(part)) == std::string_view::npos ? Kind::text : Kind::bytes, part)); }

  /// Two's complement, little-endian.
  void push_long(ConstByteSpan digits, bool own = false) {
    auto const sign_of = [](std::byte digit) { return (digit & std::byte{0x80}) != std::byte{0} ? std::byte{0xFF} : std::byte{0}; };
    while (digits.size() > 1 && digits.back() == sign_of(digits[digits.size() - 2])) digits = digits.first(digits.size() - 1);
    if (digits.size() > 8) return push(own ? add_own(Kind::large_integer, as_text(digits)) : add_span(Kind::large_integer, digits));
    std::array<std::byte, 8> value{};
    if (!digits.empty()) value.fill(sign_of(digits.back()));
    std::copy(digits.begin(), digits.end(), value.begin());
    push_integer(load_little_endian<std::int64_t>(value.data()));
  }
  void push_decimal(std::string_view text) {
    std::string_view digits = text;
    bool const negative = digits.starts_with('-');
    if (negative || digits.starts_with('+')) digits.remove_prefix(1);
    bool const plain = !digits.empty() && digits.find_first_not_of("0123456789") == std::string_view::npos && (digits.size() == 1 || digits[0] != '0');
    if (!plain) fault("has the integer " + shown_line(text));
    // CPython's own limit. The time per byte of the stream grows with it.
    if (digits.size() > 4300) fault(ErrorCode::limit, "has an integer of " + std::to_string(digits.size()) + " decimal digits; at most 4300 are read");
    std::vector<std::uint32_t> limbs(1);
    for (std::size_t at = 0; at < digits.size();) {
      std::size_t const count = std::min<std::size_t>(9, digits.size() - at);
      std::uint64_t carry = 0, scale = 1;
      for (std::size_t k = 0; k < count; ++k, scale *= 10) carry = carry * 10 + static_cast<std::uint64_t>(digits[at + k] - '0');
      for (auto& limb : limbs) {
        carry += limb * scale;
        limb = static_cast<std::uint32_t>(carry);
        carry >>= 32;
      }
      if (carry != 0) limbs.push_back(static_cast<std::uint32_t>(carry));
      at += count;
    }
    limbs.push_back(0);   // the sign
    if (negative) {
      std::uint64_t carry = 1;
      for (auto& limb : limbs) {
        carry += static_cast<std::uint32_t>(~limb);
        limb = static_cast<std::uint32_t>(carry);
        carry >>= 32;
      }
    }
    push_long(std::as_bytes(std::span{limbs}), true);
  }
  void int_line() {
    std::string_view const digits = line();
    if (digits == "00" || digits == "01") push(digits == "01" ? true_node : false_node);   // how protocol 0 spells bools
    else push_decimal(digits);
  }
  void float_line() {
    std::string_view const digits = line();
    double value = 0;
    auto const result = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (result.ec != std::errc{} || result.ptr != digits.data() + digits.size()) fault("has the float " + shown_line(digits));
    push_real(std::bit_cast<std::uint64_t>(value));
  }
  /// Latin-1 with \uXXXX and \UXXXXXXXX; no other escapes.
  void unicode_line() {
    std::string_view const text = line();
    std::string utf8;
    for (std::size_t i = 0; i < text.size(); ++i) {
      std::uint32_t point = static_cast<unsigned char>(text[i]);
      if (point == '\\' && i + 1 < text.size()) {
        std::size_t const digits = text[i + 1] == 'u' ? 4 : text[i + 1] == 'U' ? 8 : 0;
        if (digits == 0) {
          utf8 += '\\';
          point = static_cast<unsigned char>(text[++i]);
        } else {
          if (!hexadecimal(text, i + 2, digits, point)) fault("has a text with an escape that is cut short");
          i += 1 + digits;
        }
      }
      if (!append_utf8(utf8, point)) fault(ErrorCode::bad_utf8, "has a text with a character that UTF-8 does not have");
    }
    push(add_own(Kind::text, utf8));
  }
  /// Python 2's repr of a str.
  void string_line() {
    std::string_view text = line();
    if (text.size() < 2 || text.front() != text.back() || (text.front() != '\'' && text.front() != '"')) fault("has a string without its quotes");
    text = text.substr(1, text.size() - 2);
    std::string raw;
    for (std::size_t i = 0; i < text.size(); ++i) {
      if (text[i] != '\\') {
        raw += text[i];
        continue;
      }
      constexpr std::string_view letters = "\\'\"nrtabfv", meanings = "\\'\"\n\r\t\a\b\f\v";
      std::uint32_t value = 0;
      if (std::size_t const which = ++i < text.size() ? letters.find(text[i]) : std::string_view::npos; which != std::string_view::npos) {
        raw += meanings[which];
      } else if (i < text.size() && text[i] == 'x' && hexadecimal(text, i + 1, 2, value)) {
        raw += static_cast<char>(value);
        i += 2;
      } else {
        fault("has a string with an escape that is not known");
      }
    }
    push(add_own(first_invalid_utf8(raw) == std::string_view::npos ? Kind::text : Kind::bytes, raw));
  }
  static bool hexadecimal(std::string_view text, std::size_t at, std::size_t digits, std::uint32_t& value) {
    if (text.size() < at + digits) return false;
    auto const result = std::from_chars(text.data() + at, text.data() + at + digits, value, 16);
    return result.ec == std::errc{} && result.ptr == text.data() + at + digits;
  }
  static bool append_utf8(std::string& out, std::uint32_t point) {
    if (point > 0x10FFFF || (point >= 0xD800 && point < 0xE000)) return false;
    int const more = point < 0x80 ? 0 : point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
    constexpr std::array<std::uint32_t, 4> leads{0, 0xC0, 0xE0, 0xF0};
    out += static_cast<char>(leads[static_cast<std::size_t>(more)] | point >> 6 * more);
    for (int k = more; k-- > 0;) out += static_cast<char>(0x80 | (point >> 6 * k & 0x3F));
    return true;
  }

  // --- containers. All make one of what lies on the stack from index `from` on, or put it into what lies below.
  void make_tuple(std::size_t from) {
    std::size_t const count = stack_.size() - from;
    if (count == 0) return push(empty_tuple_node);
    std::uint32_t const tuple = add({.kind = Kind::tuple, .count = static_cast<std::uint32_t>(count), .a = static_cast<std::uint32_t>(store_.pool.size())});
    move_to_pool(from);
    push(tuple);
  }
  void make_container(Kind kind) {
    std::size_t const from = pop_mark();
    stack_.insert(stack_.begin() + static_cast<std::ptrdiff_t>(from), add({.kind = kind}));
    fill(from + 1, kind);
  }
  /// As a container of `kind` is filled; objects are filled as lists or dicts.
  void fill(std::size_t from, Kind kind) {
    Node& node = store_.nodes[stack_[from - 1]];
    bool const pairs = kind == Kind::dict;
    if (node.kind != kind && (node.kind != Kind::object || kind == Kind::set))
      misplaced(std::string{"what is filled as "} + kind_names[static_cast<std::size_t>(kind)] + " is", stack_[from - 1]);
    std::size_t const count = stack_.size() - from;
    if (pairs && count % 2 != 0) fault("puts a key without a value into a dict");
    if (count == 0) return;
    std::uint32_t *first = &node.a, *last = &node.b;
    if (node.kind == Kind::object) {
      if (node.count != 0 && pairs != ((node.flags & flags::pairs) != 0)) fault("puts both items and pairs into an object");
      if (pairs) node.flags |= flags::pairs;
      first = &store_.objects[node.a].first, last = &store_.objects[node.a].last;
    }
    auto const begin = static_cast<std::uint32_t>(store_.pool.size()), added = static_cast<std::uint32_t>(count);
    if (*last != 0 && store_.batches[*last].begin + store_.batches[*last].count == begin) {
      store_.batches[*last].count += added;
    } else {
      auto const batch = static_cast<std::uint32_t>(store_.batches.size());
      store_.batches.push_back({begin, added, 0});
      if (*last != 0) store_.batches[*last].next = batch;
      else *first = batch;
      *last = batch;
    }
    node.count += added;
    move_to_pool(from);
  }
  void move_to_pool(std::size_t from) {
    store_.pool.insert(store_.pool.end(), stack_.begin() + static_cast<std::ptrdiff_t>(from), stack_.end());
    stack_.resize(from);
  }

  // --- globals and objects
  void push_global(std::uint32_t module, std::uint32_t name) {
    std::string_view const module_text = as_text(store_.characters(store_.nodes[module])), name_text = as_text(store_.characters(store_.nodes[name]));
    bool const allowed = allowed_.call(allowed_.callable, module_text, name_text);
    if (!allowed && !options_.opaque) fault(ErrorCode::unsupported, "refers to " + shown(name_text) + " of the module " + shown(module_text) + ", which is not allowed");
    push(add({.kind = Kind::global, .flags = allowed ? flags::allowed : std::uint8_t{0}, .a = module, .b = name}));
  }
  void make_object(std::size_t from, ObjectParts const& parts, std::uint8_t how) {
    if (kind_of(parts.callable) != Kind::global) misplaced("what it calls is", parts.callable);
    if (kind_of(parts.arguments) != Kind::tuple) misplaced("a global is called with", parts.arguments);
    std::uint32_t const object = add({.kind = Kind::object, .flags = how, .a = static_cast<std::uint32_t>(store_.objects.size())});
    store_.objects.push_back(parts);
    stack_.resize(from);
    push(object);
  }

  // --- the memo: a vector as long as it is at least half full (or short), a map for numbers beyond
  void memoize(std::uint64_t index) {
    std::uint32_t const node = top();
    if (index < memo_.size() && memo_[index] != absent) {
      memo_[index] = node;
      return;
    }
    if (!sparse_.empty())
      if (auto const found = sparse_.find(index); found != sparse_.end()) {
        found->second = node;
        return;
      }
    if (memo_entries_ >= options_.limits.max_memo) [[unlikely]] too_many("entries of the memo (max_memo)", options_.limits.max_memo);
    ++memo_entries_;
    if (index == memo_.size()) return memo_.push_back(node);
    if (index > memo_.size() && index < 2 * memo_entries_ + 256) memo_.resize(static_cast<std::size_t>(index) + 1, absent);
    if (index < memo_.size()) memo_[index] = node;
    else sparse_.emplace(index, node);
  }
  void recall(std::uint64_t index) {
    if (index < memo_.size() && memo_[index] != absent) return push(memo_[index]);
    auto const found = sparse_.find(index);
    if (found == sparse_.end()) fault("wants entry " + std::to_string(index) + " of the memo, which it does not have");
    push(found->second);
  }

  Store& store_;
  AllowedRef allowed_;
  ParseOptions const& options_;
  std::uint64_t total_, max_nodes_;
  bool clipped_ = false;
  std::byte const *begin_ = nullptr, *at_ = nullptr, *end_ = nullptr, *instruction_ = nullptr;
  std::vector<std::uint32_t> stack_;
  std::vector<std::size_t> marks_;   // sizes of the stack
  std::vector<std::uint32_t> memo_;
  std::map<std::uint64_t, std::uint32_t> sparse_;
  std::uint64_t memo_entries_ = 0;
  std::array<std::uint32_t, 256> small_{};   // 0: not made yet
};

}  // namespace detail

}  // namespace dcp::pickle
