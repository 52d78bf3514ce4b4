// SPDX-License-Identifier: Apache-2.0
#pragma once
// Pickles of protocol 2, for Python to read.
// Source    CPython 3.11: Lib/pickle.py; torch 2.15: torch/_weights_only_unpickler.py (which opcodes it knows)

#include <dcp/base/config.hpp>
#include <dcp/base/algorithms.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/text.hpp>
#include <dcp/formats/pickle_opcodes.hpp>
#include <dcp/formats/strict_json.hpp>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp::pickle {

/// Writes a pickle of protocol 2, one instruction a call, with the opcodes that PyTorch's weights_only unpickler knows. That they make one
/// value is for the caller to see to.
///
/// Example   Writer{}.empty_dict().mark().text("a").integer(1).text("b").none().setitems().take()  ->  {"a": 1, "b": None}
class Writer {
 public:
  template <class = Deferred>
  Writer() {
    byte(detail::op::proto).byte(2);
  }

  Writer& none() { return byte(detail::op::none); }
  Writer& boolean(bool value) { return byte(value ? detail::op::newtrue : detail::op::newfalse); }
  template <class = Deferred>
  Writer& integer(std::int64_t value) {
    if (value >= 0 && value <= 0xFF) return byte(detail::op::binint1).number(static_cast<std::uint8_t>(value));
    if (value >= 0 && value <= 0xFFFF) return byte(detail::op::binint2).number(static_cast<std::uint16_t>(value));
    if (value >= INT32_MIN && value <= INT32_MAX) return byte(detail::op::binint).number(static_cast<std::int32_t>(value));
    unsigned size = 5;
    while (size < 8 && (value >> (8 * size - 1)) != 0 && (value >> (8 * size - 1)) != -1) ++size;
    byte(detail::op::long1).byte(static_cast<unsigned char>(size));
    for (unsigned k = 0; k < size; ++k) byte(static_cast<unsigned char>(value >> 8 * k));
    return *this;
  }
  template <class = Deferred>
  Writer& natural(std::uint64_t value) {
    if (value <= INT64_MAX) return integer(static_cast<std::int64_t>(value));
    return byte(detail::op::long1).byte(9).number(value).byte(0);
  }
  /// An integer of up to 255 bytes: two's complement, little-endian. Throws Error(limit).
  template <class = Deferred>
  Writer& large_integer(ConstByteSpan digits) {
    if (digits.size() > 255) throw Error{ErrorCode::limit, "an integer of " + std::to_string(digits.size()) + " bytes cannot be written into a pickle"};
    return byte(detail::op::long1).byte(static_cast<unsigned char>(digits.size())).raw(as_text(digits));
  }
  Writer& real(double value) { return byte(detail::op::binfloat).number(__builtin_bswap64(std::bit_cast<std::uint64_t>(value))); }

  /// Throws    Error(bad_utf8), Error(limit) from 4 GiB
  template <class = Deferred>
  Writer& text(std::string_view value) {
    if (first_invalid_utf8(value) != std::string_view::npos) throw Error{ErrorCode::bad_utf8, "a text that is not UTF-8 cannot be written into a pickle"};
    return byte(detail::op::binunicode).size(value.size()).raw(value);
  }
  /// As text(), but from its second time on two or five bytes, and one object in Python.
  template <class = Deferred>
  Writer& repeated_text(std::string_view value) {
    if (recall({value, {}})) return *this;
    text(value);
    return memoize(out_.size() - value.size(), value.size(), 0);
  }
  /// Throws    Error(invalid_argument) for a name with a newline, Error(bad_utf8)
  template <class = Deferred>
  Writer& global(std::string_view module, std::string_view name) {
    if (recall({module, name})) return *this;
    for (auto const part : {module, name}) {
      if (part.empty() || part.find('\n') != std::string_view::npos) throw Error{ErrorCode::invalid_argument, "no global can be called " + dcp::detail::shown(part)};
      if (first_invalid_utf8(part) != std::string_view::npos) throw Error{ErrorCode::bad_utf8, "a global whose name is not UTF-8 cannot be written into a pickle"};
    }
    byte(detail::op::global).raw(module).raw("\n").raw(name).raw("\n");
    return memoize(out_.size() - module.size() - name.size() - 2, module.size(), name.size());
  }
  /// As CPython writes bytes in protocol 2, which has no opcode for them: encode(text, 'latin1'). Empty ones, too: CPython calls the class
  /// bytes for them, which the weights_only unpickler refuses.
  template <class = Deferred>
  Writer& bytes(ConstByteSpan value) {
    global("_codecs", "encode");
    auto const high = static_cast<std::size_t>(std::count_if(value.begin(), value.end(), [](std::byte b) { return b >= std::byte{0x80}; }));
    byte(detail::op::binunicode).size(value.size() + high);
    for (std::byte const b : value) {
      auto const code = std::to_integer<unsigned>(b);
      if (code >= 0x80) byte(static_cast<unsigned char>(0xC0 | code >> 6)).byte(static_cast<unsigned char>(0x80 | (code & 0x3F)));
      else byte(static_cast<unsigned char>(code));
    }
    return repeated_text("latin1").tuple2().reduce();
  }

  Writer& mark() { return byte(detail::op::mark); }
  Writer& tuple() { return byte(detail::op::tuple); }   // of what stands above the mark
  Writer& tuple1() { return byte(detail::op::tuple1); }
  Writer& tuple2() { return byte(detail::op::tuple2); }
  Writer& tuple3() { return byte(detail::op::tuple3); }
  Writer& empty_tuple() { return byte(detail::op::empty_tuple); }
  Writer& empty_list() { return byte(detail::op::empty_list); }
  Writer& empty_dict() { return byte(detail::op::empty_dict); }
  Writer& append() { return byte(detail::op::append); }
  Writer& appends() { return byte(detail::op::appends); }     // what stands above the mark
  Writer& setitem() { return byte(detail::op::setitem); }
  Writer& setitems() { return byte(detail::op::setitems); }   // what stands above the mark
  Writer& reduce() { return byte(detail::op::reduce); }
  Writer& newobj() { return byte(detail::op::newobj); }
  Writer& build() { return byte(detail::op::build); }
  Writer& persistent_id() { return byte(detail::op::binpersid); }

  /// A tuple of integers, in its shortest form.
  template <class Range>
  Writer& size_tuple(Range const& sizes) {
    auto const count = static_cast<std::size_t>(sizes.end() - sizes.begin());
    if (count == 0) return empty_tuple();
    if (count > 3) mark();
    for (auto const size : sizes) integer(static_cast<std::int64_t>(size));
    return count == 1 ? tuple1() : count == 2 ? tuple2() : count == 3 ? tuple3() : tuple();
  }

  /// The pickle, with STOP. The writer is then spent.
  template <class = Deferred>
  Bytes take() {
    byte(detail::op::stop);
    return std::move(out_);
  }

 private:
  // What was memoized: a text, or, if `name` is not empty, a global. It is found again where it was written.
  struct Entry {
    std::uint64_t at = 0;
    std::uint32_t size = 0, name_size = 0, number = UINT32_MAX;   // UINT32_MAX: nothing is here
  };
  struct Wanted {
    std::string_view text, name;
  };

  Writer& byte(unsigned char value) {
    out_.push_back(static_cast<std::byte>(value));
    return *this;
  }
  template <class T>
  Writer& number(T value) {
    return raw({reinterpret_cast<char const*>(&value), sizeof value});
  }
  template <class = Deferred>
  Writer& size(std::size_t bytes) {
    if (bytes > UINT32_MAX) throw Error{ErrorCode::limit, "a text of " + std::to_string(bytes) + " bytes in a pickle; protocol 2 has none of 4 GiB or more"};
    return number(static_cast<std::uint32_t>(bytes));
  }
  template <class = Deferred>
  Writer& raw(std::string_view part) {
    dcp::detail::append(out_, as_byte_span(part));
    return *this;
  }

  template <class = Deferred>
  Wanted written(Entry const& entry) const {
    auto const all = as_text(out_);
    auto const at = static_cast<std::size_t>(entry.at);
    return {all.substr(at, entry.size), entry.name_size == 0 ? std::string_view{} : all.substr(at + entry.size + 1, entry.name_size)};
  }
  template <class = Deferred>
  static std::size_t hash(Wanted const& wanted) { return std::hash<std::string_view>{}(wanted.text) ^ std::hash<std::string_view>{}(wanted.name) * 31; }
  /// Where it is in the table, or where it goes.
  template <class = Deferred>
  Entry& slot(Wanted const& wanted) {
    for (std::size_t i = hash(wanted);; ++i) {
      Entry& entry = table_[i & (table_.size() - 1)];
      if (entry.number == UINT32_MAX) return entry;
      if (auto const here = written(entry); here.text == wanted.text && here.name == wanted.name) return entry;
    }
  }
  template <class = Deferred>
  bool recall(Wanted const& wanted) {
    if (table_.empty()) return false;
    std::uint32_t const number = slot(wanted).number;
    if (number == UINT32_MAX) return false;
    indexed(detail::op::binget, detail::op::long_binget, number);
    return true;
  }
  template <class = Deferred>
  Writer& memoize(std::size_t at, std::size_t size, std::size_t name_size) {
    if (2 * entries_ >= table_.size()) {
      std::vector<Entry> const old = std::exchange(table_, std::vector<Entry>(std::max<std::size_t>(64, 2 * table_.size())));
      for (Entry const& entry : old)
        if (entry.number != UINT32_MAX) slot(written(entry)) = entry;
    }
    Entry const entry{at, static_cast<std::uint32_t>(size), static_cast<std::uint32_t>(name_size), entries_++};
    slot(written(entry)) = entry;
    return indexed(detail::op::binput, detail::op::long_binput, entry.number);
  }
  template <class = Deferred>
  Writer& indexed(unsigned char short_code, unsigned char long_code, std::uint32_t index) {
    if (index <= 0xFF) return byte(short_code).number(static_cast<std::uint8_t>(index));
    return byte(long_code).number(index);
  }

  Bytes out_;
  std::vector<Entry> table_;   // open addressing; its size is a power of two
  std::uint32_t entries_ = 0;
};

}  // namespace dcp::pickle
