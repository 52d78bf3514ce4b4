// SPDX-License-Identifier: Apache-2.0
#pragma once
// The header of a GGUF file, versions 2 and 3: keys with values, and which tensor lies where. Bytes to structs and back; files are somebody
// else's.
//
//   4 bytes "GGUF", u32 version, u64 tensors, u64 keys
//   each key      text key, u32 type, value                        text = u64 bytes, then the bytes; array = u32 type, u64 count, elements
//   each tensor   text name, u32 dimensions, u64 sizes, innermost first, u32 type, u64 offset
//   zeros up to a multiple of the alignment (general.alignment, else 32), then the tensors in that order, each padded to the alignment
//
// The reader refuses what ggml refuses, what ggml overlooks (sizes that wrap around, data behind the last tensor) and what two readers
// would take for different things. It reads through a window, because the words of a tokenizer alone may make 100 MB.
// Source    ggml's docs/gguf.md and the behaviour of its gguf.cpp

#include <dcp/base/config.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/algorithms.hpp>
#include <dcp/base/text.hpp>
#include <dcp/core/dtype.hpp>
#include <dcp/core/shape.hpp>
#include <dcp/core/value.hpp>
#include <dcp/formats/strict_json.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp::gguf {

/// What the elements of a tensor are: ggml's numbers.
namespace types {
inline constexpr std::uint32_t f32 = 0, f16 = 1, q4_0 = 2, q4_1 = 3, q5_0 = 6, q5_1 = 7, q8_0 = 8, q8_1 = 9, q2_k = 10, q3_k = 11, q4_k = 12, q5_k = 13, q6_k = 14,
                               q8_k = 15, iq2_xxs = 16, iq2_xs = 17, iq3_xxs = 18, iq1_s = 19, iq4_nl = 20, iq3_s = 21, iq2_s = 22, iq4_xs = 23, i8 = 24, i16 = 25,
                               i32 = 26, i64 = 27, f64 = 28, iq1_m = 29, bf16 = 30, tq1_0 = 34, tq2_0 = 35, mxfp4 = 39, nvfp4 = 40, q1_0 = 41, q2_0 = 42;
}

struct TypeFacts {
  std::string_view name;
  int elements;   // of a block, which is a piece of one row
  int bytes;      // of a block
};

namespace detail {

using namespace dcp::detail;

// Types that have been removed have no bytes.
inline constexpr std::array<TypeFacts, 43> type_facts{{
    {"F32", 1, 4},        {"F16", 1, 2},       {"Q4_0", 32, 18},    {"Q4_1", 32, 20},   {"Q4_2", 0, 0},       {"Q4_3", 0, 0},     {"Q5_0", 32, 22},
    {"Q5_1", 32, 24},     {"Q8_0", 32, 34},    {"Q8_1", 32, 36},    {"Q2_K", 256, 84},  {"Q3_K", 256, 110},   {"Q4_K", 256, 144}, {"Q5_K", 256, 176},
    {"Q6_K", 256, 210},   {"Q8_K", 256, 292},  {"IQ2_XXS", 256, 66}, {"IQ2_XS", 256, 74}, {"IQ3_XXS", 256, 98}, {"IQ1_S", 256, 50}, {"IQ4_NL", 32, 18},
    {"IQ3_S", 256, 110},  {"IQ2_S", 256, 82},  {"IQ4_XS", 256, 136}, {"I8", 1, 1},       {"I16", 1, 2},        {"I32", 1, 4},      {"I64", 1, 8},
    {"F64", 1, 8},        {"IQ1_M", 256, 56},  {"BF16", 1, 2},      {"Q4_0_4_4", 0, 0}, {"Q4_0_4_8", 0, 0},   {"Q4_0_8_8", 0, 0}, {"TQ1_0", 256, 54},
    {"TQ2_0", 256, 66},   {"IQ4_NL_4_4", 0, 0}, {"IQ4_NL_4_8", 0, 0}, {"IQ4_NL_8_8", 0, 0}, {"MXFP4", 32, 17},  {"NVFP4", 64, 36},  {"Q1_0", 128, 18},
    {"Q2_0", 64, 18},
}};

}  // namespace detail

/// Name and block of a type; nullptr for numbers that ggml does not know, or no longer.
template <class = Deferred>
TypeFacts const* type_facts(std::uint32_t type) {
  return type < detail::type_facts.size() && detail::type_facts[type].bytes > 0 ? &detail::type_facts[type] : nullptr;
}

/// The type with this name ("Q4_K"; case matters); false if there is none.
template <class = Deferred>
bool parse_type(std::string_view name, std::uint32_t& type) {
  for (std::uint32_t i = 0; i < detail::type_facts.size(); ++i)
    if (detail::type_facts[i].name == name && detail::type_facts[i].bytes > 0) return type = i, true;
  return false;
}

/// The dtype whose elements are stored as they are in memory; false for blocks.
template <class = Deferred>
bool plain_dtype(std::uint32_t type, DType& dtype) {
  switch (type) {
    case types::f32: return dtype = DType::f32, true;
    case types::f16: return dtype = DType::f16, true;
    case types::bf16: return dtype = DType::bf16, true;
    case types::f64: return dtype = DType::f64, true;
    case types::i8: return dtype = DType::i8, true;
    case types::i16: return dtype = DType::i16, true;
    case types::i32: return dtype = DType::i32, true;
    case types::i64: return dtype = DType::i64, true;
    default: return false;
  }
}
/// The reverse; false for dtypes that GGUF lacks.
template <class = Deferred>
bool plain_type(DType dtype, std::uint32_t& type) {
  for (std::uint32_t i = 0; i < detail::type_facts.size(); ++i)
    if (DType here{}; plain_dtype(i, here) && here == dtype) return type = i, true;
  return false;
}

inline constexpr std::string_view alignment_key = "general.alignment";
inline constexpr std::uint64_t default_alignment = 32, max_alignment = 1 << 20;
inline constexpr std::size_t max_key_bytes = 65535;
/// ggml keeps names in arrays of 64 bytes, the last of which is NUL.
inline constexpr std::size_t max_name_bytes = 63;
inline constexpr int max_dimensions = 4;
/// Arrays of arrays go this deep and no deeper.
inline constexpr int max_array_depth = 4;

/// Keys in the order of the file. Numbers and booleans are numbers, arrays of them arrays, strings texts; an array of strings or of arrays is
/// the JSON of it.
using Metadata = std::vector<std::pair<std::string, Value>>;

struct TensorInfo {
  std::string name;
  std::uint32_t type = 0;
  Extents shape;                          // rows first: the reverse of the file's order; [] for a scalar
  std::uint64_t offset = 0, bytes = 0;    // from the start of the file; without padding

  friend bool operator==(TensorInfo const&, TensorInfo const&) = default;
};

struct Header {
  std::uint32_t version = 3;
  std::uint64_t alignment = default_alignment;
  std::uint64_t data_begin = 0;           // where the first tensor starts, or would start, in the file
  Metadata metadata;
  std::vector<TensorInfo> tensors;        // in the order of the file, which is that of their bytes

  /// The value of `key`, or nullptr.
  template <class = Deferred>
  Value const* find_metadata(std::string_view key) const {
    for (auto const& [name, value] : metadata)
      if (name == key) return &value;
    return nullptr;
  }
  friend bool operator==(Header const&, Header const&) = default;
};

struct ParseOptions {
  bool allow_trailing_bytes = false;            // after the last tensor
  bool allow_missing_final_padding = false;     // of the last tensor
  std::uint64_t max_tensors = 4'000'000;        // the largest models have about 100,000
  std::uint64_t max_keys = 1'000'000;
  std::uint64_t max_text_bytes = 1ull << 30;    // of one string
  std::uint64_t max_array_elements = 1ull << 30;
};

namespace detail {

enum class ValueType : std::uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, text, array, u64, i64, f64 };
inline constexpr std::uint32_t value_type_count = 13;

/// The dtypes of value types; texts and arrays have none and stand here as F4.
inline constexpr std::array<DType, value_type_count> value_dtypes{DType::u8,      DType::i8, DType::u16, DType::i16, DType::u32, DType::i32, DType::f32,
                                                                  DType::boolean, DType::f4, DType::f4,  DType::u64, DType::i64, DType::f64};

template <class = Deferred>
bool value_type_of(DType dtype, ValueType& type) {
  if (dtype == DType::f4) return false;
  for (std::uint32_t i = 0; i < value_type_count; ++i)
    if (value_dtypes[i] == dtype) return type = static_cast<ValueType>(i), true;
  return false;
}

template <class = Deferred>
std::string tensor_called(std::string_view name) { return "tensor " + shown(name); }
template <class = Deferred>
std::string key_called(std::string_view key) { return "key " + shown(key); }

/// Keys are ASCII without control characters.
template <class = Deferred>
void check_key(std::string_view key) {
  if (key.empty()) throw Error{ErrorCode::bad_schema, "an empty key"};
  if (key.size() > max_key_bytes) throw Error{ErrorCode::limit, "a key of " + std::to_string(key.size()) + " bytes; at most 65535 are allowed"};
  if (std::any_of(key.begin(), key.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) >= 0x7F; }))
    throw Error{ErrorCode::bad_schema, "a key that is not printable ASCII"};
}
template <class = Deferred>
void check_name(std::string_view name) {
  if (name.empty()) throw Error{ErrorCode::bad_schema, "a tensor with an empty name"};
  if (name.size() > max_name_bytes)
    throw Error{ErrorCode::limit, "a tensor whose name has " + std::to_string(name.size()) + " bytes; at most 63 are allowed"};
  if (first_invalid_utf8(name) != std::string_view::npos) throw Error{ErrorCode::bad_utf8, "a tensor whose name is not UTF-8"};
  if (name.find('\0') != std::string_view::npos) throw Error{ErrorCode::bad_schema, tensor_called(name) + " has a NUL in its name"};
}
template <class = Deferred>
void check_alignment(std::uint64_t alignment) {
  if (alignment > max_alignment) throw Error{ErrorCode::limit, "an alignment of " + std::to_string(alignment) + "; at most 1048576 is allowed"};
  if (!std::has_single_bit(alignment)) throw Error{ErrorCode::bad_schema, "an alignment of " + std::to_string(alignment) + ", which is no power of two"};
}

/// Bytes of a tensor, computed as if its zero dimensions were ones: a size that wraps around is one, whatever stands beside it.
template <class = Deferred>
std::uint64_t checked_bytes(std::uint32_t type, Extents const& shape) {
  TypeFacts const* const facts = gguf::type_facts(type);
  if (facts == nullptr) throw Error{ErrorCode::unsupported_dtype, "ggml type " + std::to_string(type) + " is unknown or has been removed"};
  std::uint64_t elements = 1;
  bool empty = false;
  for (auto const size : shape) {
    if (size == 0) empty = true;
    else if (!checked_multiply(elements, static_cast<std::uint64_t>(size), elements) || elements > INT64_MAX)
      throw Error{ErrorCode::overflow, "the number of elements does not fit into 63 bits"};
  }
  auto const block = static_cast<std::uint64_t>(facts->elements);
  std::uint64_t const row = shape.rank() == 0 ? 1 : static_cast<std::uint64_t>(shape[shape.rank() - 1]);
  if (row % block != 0)
    throw Error{ErrorCode::misaligned, "rows of " + std::to_string(row) + " elements are no whole blocks of " + std::string{facts->name} + ", which have " + std::to_string(block)};
  std::uint64_t bytes = 0;
  if (!checked_multiply(ceil_div(elements, block), static_cast<std::uint64_t>(facts->bytes), bytes) || bytes > INT64_MAX)
    throw Error{ErrorCode::overflow, "the number of bytes does not fit into 63 bits"};
  return empty ? 0 : bytes;
}

/// The bytes of a file from its start, through a window.
template <class ReadAt>
class Window {
 public:
  Window(ReadAt& read, std::uint64_t file_size) : read_{read}, file_size_{file_size} {}

  std::uint64_t position() const { return next_ - held(); }
  std::uint64_t remaining() const { return file_size_ - position(); }

  /// The next `size` bytes, at most as many as a window has; valid until the next call.
  ConstByteSpan take(std::size_t size) {
    if (held() < size) {
      require(size);
      std::size_t const kept = held();
      if (kept > 0) std::memmove(buffer_.data(), buffer_.data() + at_, kept);
      at_ = 0;
      buffer_.resize(static_cast<std::size_t>(std::min<std::uint64_t>(window_bytes, kept + (file_size_ - next_))));
      read_(next_, ByteSpan{buffer_}.subspan(kept));
      next_ += buffer_.size() - kept;
    }
    return ConstByteSpan{buffer_}.subspan(std::exchange(at_, at_ + size), size);
  }
  template <class T>
  T number() {
    return load_little_endian<T>(take(sizeof(T)).data());
  }
  /// Appends the next `size` bytes, as many as there are, to `out`, a string or Bytes.
  template <class Out>
  void append_to(Out& out, std::uint64_t size) {
    require(size);
    std::size_t const begin = out.size();
    out.resize(begin + static_cast<std::size_t>(size));
    ByteSpan to = std::as_writable_bytes(std::span{out.data() + begin, static_cast<std::size_t>(size)});
    std::size_t const first = std::min(to.size(), held());
    if (first > 0) std::memcpy(to.data(), buffer_.data() + at_, first);
    at_ += first;
    to = to.subspan(first);
    if (to.size() < window_bytes / 2) {
      if (ConstByteSpan const rest = take(to.size()); !rest.empty()) std::memcpy(to.data(), rest.data(), rest.size());
    } else {
      read_(next_, to);
      next_ += to.size();
    }
  }
  void require(std::uint64_t size) {
    if (remaining() < size)
      throw Error{ErrorCode::truncated, "the file ends " + std::to_string(size - remaining()) + " bytes too early"};
  }

 private:
  static constexpr std::size_t window_bytes = 256 << 10;

  std::size_t held() const { return buffer_.size() - at_; }

  ReadAt& read_;
  std::uint64_t file_size_, next_ = 0;   // next_: where the window ends in the file
  Bytes buffer_;
  std::size_t at_ = 0;
};

/// Reads one header; read() throws an Error at the first fault, and context() says what was being read then.
template <class ReadAt>
class HeaderReader {
 public:
  HeaderReader(ReadAt& read, std::uint64_t file_size, ParseOptions const& options) : in_{read, file_size}, file_size_{file_size}, options_{options} {}

  Header read() {
    check_magic();
    auto const tensors = in_.template number<std::uint64_t>(), keys = in_.template number<std::uint64_t>();
    // The smallest tensor takes 24 bytes and the smallest key 13, so that a claim beyond those is known to be one before anything is read.
    check_count(tensors, options_.max_tensors, 24, "tensors");
    check_count(keys, options_.max_keys, 13, "keys");
    for (std::uint64_t i = 0; i < keys; ++i) read_key();
    context_.clear();
    refuse_twice(header_.metadata, key_positions_, [](auto const& entry) { return std::string_view{entry.first}; }, [](std::string_view key) { return key_called(key); });
    for (std::uint64_t i = 0; i < tensors; ++i) read_tensor();
    context_.clear();
    refuse_twice(header_.tensors, tensor_positions_, [](auto const& tensor) { return std::string_view{tensor.name}; }, [](std::string_view name) { return tensor_called(name); });
    place_tensors();
    return std::move(header_);
  }
  /// Of a fault at the place where the reader stands.
  Error located(Error const& error) const {
    std::string const where = context_.empty() ? std::string{"the header"} : context_;
    Error result{error.code(), where + ", at byte " + std::to_string(item_begin_) + ": " + error.message()};
    return result.with_hint(error.hint()).with_range(item_begin_, std::max(item_begin_ + 1, in_.position()));
  }

 private:
  void check_magic() {
    in_.require(4);
    if (auto const magic = in_.take(4); as_text(magic) != "GGUF") throw Error{ErrorCode::bad_magic, "the file does not begin with GGUF but with " + hex_text(magic)};
    if (header_.version = in_.template number<std::uint32_t>(); header_.version != 2 && header_.version != 3) {
      Error error{ErrorCode::bad_version, "GGUF version " + std::to_string(header_.version) + "; versions 2 and 3 can be read"};
      if (header_.version != 0 && header_.version % 65536 == 0) error.with_hint("the file was written on a big-endian machine; convert it there");
      throw error;
    }
  }
  void check_count(std::uint64_t count, std::uint64_t most, std::uint64_t least_bytes, char const* what) const {
    auto const claim = [&] { return "the file claims " + std::to_string(count) + ' ' + what; };
    if (count > most) throw Error{ErrorCode::limit, claim() + "; the limit is " + std::to_string(most)}.with_hint(std::string{"ParseOptions::max_"} + what + " raises it");
    if (count > in_.remaining() / least_bytes) throw Error{ErrorCode::truncated, claim() + ", for which it is too short"};
  }

  void read_key() {
    item_begin_ = in_.position();
    context_ = "key " + std::to_string(header_.metadata.size());
    std::string key;
    auto const bytes = in_.template number<std::uint64_t>();
    if (bytes > max_key_bytes) throw Error{ErrorCode::limit, "it has " + std::to_string(bytes) + " bytes; at most 65535 are allowed"};
    in_.append_to(key, bytes);
    check_key(key);
    context_ = key_called(key);
    auto const type = value_type();
    Value value = read_value(type);
    if (key == alignment_key) {
      if (type != ValueType::u32) throw Error{ErrorCode::bad_schema, "the alignment must be a 32-bit unsigned integer"};
      check_alignment(header_.alignment = load_little_endian<std::uint32_t>(value.payload.data()));
    }
    key_positions_.push_back(item_begin_);
    header_.metadata.emplace_back(std::move(key), std::move(value));
  }
  ValueType value_type() {
    auto const type = in_.template number<std::uint32_t>();
    if (type >= value_type_count) throw Error{ErrorCode::bad_schema, "value type " + std::to_string(type) + " does not exist"};
    return static_cast<ValueType>(type);
  }
  static DType dtype_of_value(ValueType type) { return value_dtypes[static_cast<std::size_t>(type)]; }

  Value read_value(ValueType type) {
    Value value;
    if (type == ValueType::text) {
      read_text(value.payload);
    } else if (type != ValueType::array) {
      value.kind = ValueKind::number;
      value.dtype = dtype_of_value(type);
      read_numbers(value, 1);
    } else {
      auto const [element, count] = array_head();
      if (element == ValueType::text || element == ValueType::array) {
        value.kind = ValueKind::json;
        JsonText json{value.payload};
        append_array(json, element, count, 1);
      } else {
        value.kind = ValueKind::array;
        value.dtype = dtype_of_value(element);
        read_numbers(value, count);
      }
    }
    return value;
  }
  template <class Out>
  void read_text(Out& out) {
    auto const bytes = in_.template number<std::uint64_t>();
    if (bytes > options_.max_text_bytes)
      throw Error{ErrorCode::limit, "a string of " + std::to_string(bytes) + " bytes; the limit is " + std::to_string(options_.max_text_bytes)}.with_hint("ParseOptions::max_text_bytes raises it");
    in_.append_to(out, bytes);
    if (first_invalid_utf8({reinterpret_cast<char const*>(out.data()), out.size()}) != std::string_view::npos) throw Error{ErrorCode::bad_utf8, "a string that is not UTF-8"};
  }
  void read_numbers(Value& value, std::uint64_t count) {
    in_.append_to(value.payload, count * static_cast<std::uint64_t>(bits_of(value.dtype) / 8));
    if (value.dtype == DType::boolean && std::any_of(value.payload.begin(), value.payload.end(), [](std::byte b) { return b > std::byte{1}; }))
      throw Error{ErrorCode::bad_schema, "a boolean that is neither 0 nor 1"};
  }

  struct ArrayHead {
    ValueType element;
    std::uint64_t count;
  };
  ArrayHead array_head() {
    auto const element = value_type();
    auto const count = in_.template number<std::uint64_t>();
    if (count > options_.max_array_elements)
      throw Error{ErrorCode::limit, "an array of " + std::to_string(count) + " elements; the limit is " + std::to_string(options_.max_array_elements)}.with_hint("ParseOptions::max_array_elements raises it");
    std::uint64_t const least = element == ValueType::text ? 8 : element == ValueType::array ? 12 : static_cast<std::uint64_t>(bits_of(dtype_of_value(element)) / 8);
    if (count > in_.remaining() / least) throw Error{ErrorCode::truncated, "an array of " + std::to_string(count) + " elements, for which the file is too short"};
    return {element, count};
  }

  /// Characters at the end of a payload.
  struct JsonText {
    Bytes& bytes;
    void append(std::string_view text) { dcp::detail::append(bytes, as_byte_span(text)); }
  };
  void append_array(JsonText& json, ValueType element, std::uint64_t count, int depth) {
    if (depth > max_array_depth) throw Error{ErrorCode::limit, "arrays nested deeper than " + std::to_string(max_array_depth) + " levels"};
    json.append("[");
    if (element == ValueType::text) {
      std::string text;
      for (std::uint64_t i = 0; i < count; ++i) {
        text.clear();
        read_text(text);
        if (i > 0) json.append(",");
        append_json_quoted(json, text);
      }
    } else if (element == ValueType::array) {
      for (std::uint64_t i = 0; i < count; ++i) {
        if (i > 0) json.append(",");
        ArrayHead const inner = array_head();
        append_array(json, inner.element, inner.count, depth + 1);
      }
    } else {
      Value numbers{ValueKind::array, dtype_of_value(element), {}, {}};
      read_numbers(numbers, count);
      json.append(numbers_to_json(numbers));
    }
    json.append("]");
  }

  void read_tensor() {
    item_begin_ = in_.position();
    context_ = "tensor " + std::to_string(header_.tensors.size());
    TensorInfo tensor;
    auto const name_bytes = in_.template number<std::uint64_t>();
    if (name_bytes > max_name_bytes) throw Error{ErrorCode::limit, "its name has " + std::to_string(name_bytes) + " bytes; at most 63 are allowed"};
    in_.append_to(tensor.name, name_bytes);
    check_name(tensor.name);
    context_ = tensor_called(tensor.name);
    auto const dimensions = in_.template number<std::uint32_t>();
    if (dimensions > max_dimensions) throw Error{ErrorCode::limit, std::to_string(dimensions) + " dimensions; at most 4 are allowed"};
    tensor.shape = Extents::filled(static_cast<int>(dimensions), 0);
    bool huge = false;
    for (int d = static_cast<int>(dimensions); d-- > 0;) {
      auto const size = in_.template number<std::uint64_t>();
      huge = huge || size > INT64_MAX;
      tensor.shape[d] = static_cast<std::int64_t>(size & INT64_MAX);
    }
    tensor.type = in_.template number<std::uint32_t>();
    tensor.offset = in_.template number<std::uint64_t>();
    if (huge) throw Error{ErrorCode::overflow, "a dimension of 2^63 or more"};
    tensor.bytes = checked_bytes(tensor.type, tensor.shape);
    if (tensor.offset != data_bytes_)
      throw Error{ErrorCode::bad_offsets, "it lies at data offset " + std::to_string(tensor.offset) + "; what is before it ends at " + std::to_string(data_bytes_)};
    data_end_ = data_bytes_ + tensor.bytes;   // both are below 2^63
    data_bytes_ = round_up(data_end_, header_.alignment);
    if (data_bytes_ > INT64_MAX) throw Error{ErrorCode::overflow, "the tensors together make 2^63 bytes or more"};
    tensor_positions_.push_back(item_begin_);
    header_.tensors.push_back(std::move(tensor));
  }

  /// Looks for equal names in a sorted list: in linear time but for the sorting, whatever names somebody has chosen.
  template <class List, class NameOf, class Called>
  void refuse_twice(List const& list, std::vector<std::uint64_t> const& positions, NameOf name_of, Called called) {
    std::vector<std::pair<std::string_view, std::uint64_t>> names;
    names.reserve(list.size());
    for (std::size_t i = 0; i < list.size(); ++i) names.emplace_back(name_of(list[i]), positions[i]);
    dcp::detail::sort(names);
    auto const twice = std::adjacent_find(names.begin(), names.end(), [](auto const& a, auto const& b) { return a.first == b.first; });
    if (twice == names.end()) return;
    item_begin_ = (twice + 1)->second;
    context_ = called(twice->first);
    throw Error{ErrorCode::duplicate_key, "it was there before, at byte " + std::to_string(twice->second)};
  }

  void place_tensors() {
    item_begin_ = in_.position();
    context_ = "the data";
    header_.data_begin = round_up(item_begin_, header_.alignment);
    std::uint64_t end = header_.data_begin;
    if (header_.tensors.empty()) {
      // ggml writes no padding here, and others do.
      if (file_size_ < header_.data_begin || (!options_.allow_trailing_bytes && file_size_ == item_begin_)) end = item_begin_;
    } else {
      std::uint64_t const present = file_size_ < header_.data_begin ? 0 : file_size_ - header_.data_begin;
      bool const all = file_size_ >= header_.data_begin && present >= (options_.allow_missing_final_padding ? data_end_ : data_bytes_);
      if (!all)
        throw Error{ErrorCode::truncated, "the tensors need " + std::to_string(data_bytes_) + " bytes from byte " + std::to_string(header_.data_begin) + " on, and the file has " + std::to_string(present)};
      end = std::min(file_size_, header_.data_begin + data_bytes_);
    }
    if (end < file_size_ && !options_.allow_trailing_bytes) {
      item_begin_ = end;
      throw Error{ErrorCode::trailing_data, std::to_string(file_size_ - end) + " bytes after the last tensor"};
    }
    for (auto& tensor : header_.tensors) tensor.offset += header_.data_begin;
  }

  Window<ReadAt> in_;
  std::uint64_t file_size_;
  ParseOptions options_;
  Header header_;
  std::string context_;                                         // what is being read, for errors
  std::uint64_t item_begin_ = 0, data_end_ = 0, data_bytes_ = 0;   // the end of the last tensor without and with its padding, from the start of the data
  std::vector<std::uint64_t> key_positions_, tensor_positions_;
};

}  // namespace detail

/// Bytes of a tensor in a file, without padding. `shape`: rows first.
///
/// Throws    Error: unsupported_dtype, overflow, misaligned for rows that are no whole blocks
template <class = Deferred>
std::uint64_t tensor_bytes(std::uint32_t type, Extents const& shape) { return detail::checked_bytes(type, shape); }

/// The header of a file of `file_size` bytes. `read(position, bytes)` fills the ByteSpan `bytes` from the file or throws.
///
/// Throws    Error: truncated, bad_magic, bad_version; limit, bad_schema, bad_utf8, duplicate_key for keys and names; unsupported_dtype,
///           overflow, misaligned, bad_offsets for tensors; last truncated and trailing_data
/// Memory    proportional to what the header holds
template <class ReadAt>
Header parse_header(ReadAt read, std::uint64_t file_size, ParseOptions const& options = {}) {
  detail::HeaderReader<ReadAt> reader{read, file_size, options};
  try {
    return reader.read();
  } catch (Error const& error) {
    if (error.code() == ErrorCode::io) throw;   // the caller's, who knows more of it
    throw reader.located(error);
  }
}
/// The header of a whole file in memory.
template <class = Deferred>
Header parse_header(ConstByteSpan file, ParseOptions const& options = {}) {
  return parse_header([&](std::uint64_t position, ByteSpan to) { if (!to.empty()) std::memcpy(to.data(), file.data() + position, to.size()); }, file.size(), options);
}

/// Which part of a split model a file is.
struct Split {
  int number = 0, count = 1;       // number: from 0
  std::int64_t tensors = 0;        // of all parts together

  friend bool operator==(Split const&, Split const&) = default;
};

/// What the keys split.* say; nothing for a file that is no part. A merged file keeps a count of 0.
///
/// Throws    Error: bad_schema for keys that are missing or of another type, index_mismatch for those that contradict each other or the file
template <class = Deferred>
std::optional<Split> split_of(Header const& header) {
  auto const number = [&](std::string_view key, DType dtype) -> std::int64_t {
    Value const* const value = header.find_metadata(key);
    if (value == nullptr) throw Error{ErrorCode::bad_schema, "a part of a split model has no " + detail::key_called(key)};
    if (value->kind != ValueKind::number || value->dtype != dtype || value->payload.size() != static_cast<std::size_t>(bits_of(dtype) / 8))
      throw Error{ErrorCode::bad_schema, detail::key_called(key) + " must be a number of type " + std::string{to_string(dtype)}};
    return dtype == DType::u16 ? load_little_endian<std::uint16_t>(value->payload.data()) : load_little_endian<std::int32_t>(value->payload.data());
  };
  if (header.find_metadata("split.count") == nullptr && header.find_metadata("split.no") == nullptr) return std::nullopt;
  std::int64_t const count = number("split.count", DType::u16);
  if (count == 0) return std::nullopt;
  Split const split{static_cast<int>(number("split.no", DType::u16)), static_cast<int>(count), number("split.tensors.count", DType::i32)};
  if (split.number >= split.count)
    throw Error{ErrorCode::index_mismatch, "the file is part " + std::to_string(split.number) + ", counted from 0, of " + std::to_string(split.count)};
  if (split.tensors < static_cast<std::int64_t>(header.tensors.size()))
    throw Error{ErrorCode::index_mismatch, "a part with " + std::to_string(header.tensors.size()) + " tensors of a model with " + std::to_string(split.tensors)};
  return split;
}

/// model-00001-of-00003.gguf for the prefix "model"; `number` from 1.
template <class = Deferred>
std::string split_file_name(std::string_view prefix, int number, int count) {
  if (number < 1 || count < number || count > 99999)
    throw Error{ErrorCode::invalid_argument, "there is no part " + std::to_string(number) + " of " + std::to_string(count)};
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "-%05d-of-%05d.gguf", number, count);
  return std::string{prefix} + text.data();
}

struct SplitName {
  std::string prefix;
  int number = 1, count = 1;   // number: from 1

  friend bool operator==(SplitName const&, SplitName const&) = default;
};

/// The parts of a name that split_file_name gives; nothing for other names.
template <class = Deferred>
std::optional<SplitName> parse_split_file_name(std::string_view name) {
  constexpr std::string_view pattern = "-00000-of-00000.gguf";
  if (name.size() <= pattern.size()) return std::nullopt;
  std::string_view const tail = name.substr(name.size() - pattern.size());
  int numbers[2] = {0, 0};
  for (std::size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] != '0') {
      if (tail[i] != pattern[i]) return std::nullopt;
      continue;
    }
    if (tail[i] < '0' || tail[i] > '9') return std::nullopt;
    int& number = numbers[i < 6 ? 0 : 1];
    number = 10 * number + (tail[i] - '0');
  }
  if (numbers[0] < 1 || numbers[1] < numbers[0]) return std::nullopt;
  return SplitName{std::string{name.substr(0, name.size() - pattern.size())}, numbers[0], numbers[1]};
}

/// One tensor of a header, whoever keeps its name and shape.
struct TensorLine {
  std::string_view name;
  std::uint32_t type;
  Extents const* shape;   // rows first
};

/// Zeros between two tensors, or behind the last one.
struct Padding {
  std::uint64_t offset, bytes;

  friend bool operator==(Padding const&, Padding const&) = default;
};

/// A file that is to be written: its first bytes, and what goes where behind them.
struct Layout {
  Bytes header;                         // everything before the data, padding included; empty if only sizes were asked for
  std::uint64_t data_begin = 0;         // as many bytes
  std::vector<std::uint64_t> offsets;   // of each tensor, from the start of the file
  std::vector<Padding> paddings;
  std::uint64_t file_size = 0;
};

namespace detail {

class HeaderBytes {
 public:
  void append(std::string_view text) { dcp::detail::append(bytes_, as_byte_span(text)); }
  std::size_t size() const { return bytes_.size(); }
  Bytes take() { return std::move(bytes_); }

 private:
  Bytes bytes_;
};

template <class Out, class T>
void append_raw(Out& out, T number) {
  std::array<char, sizeof(T)> bytes;
  std::memcpy(bytes.data(), &number, sizeof number);
  out.append(std::string_view{bytes.data(), bytes.size()});
}
template <class Out>
void append_text(Out& out, std::string_view text) {
  append_raw<Out, std::uint64_t>(out, text.size());
  out.append(text);
}

/// Takes the strings out of a JSON array of strings.
class StringsReader : public JsonReader<StringsReader> {
 public:
  HeaderBytes strings;
  std::uint64_t count = 0;

  template <class = Deferred>
  void on_key(std::string_view) {}
  template <class = Deferred>
  void on_open(bool object) {
    if (object || open_) return refuse();
    open_ = true;
  }
  template <class = Deferred>
  void on_close() {}
  template <class = Deferred>
  void on_scalar(JsonScalar const& scalar) {
    if (!open_ || scalar.kind != JsonKind::string) return refuse();
    append_text(strings, scalar.text);
    ++count;
  }

 private:
  template <class = Deferred>
  void refuse() { fault(ErrorCode::unsupported, "GGUF takes the JSON of an array of strings and no other"); }

  bool open_ = false;
};

template <class Out>
void append_value(Out& out, Value const& value) {
  auto const numbers = [&](bool array) {
    ValueType type{};
    if (!value_type_of(value.dtype, type)) throw Error{ErrorCode::unsupported, "GGUF has no values of type " + std::string{to_string(value.dtype)}};
    std::size_t const element = static_cast<std::size_t>(bits_of(value.dtype) / 8);
    if (array ? value.payload.size() % element != 0 : value.payload.size() != element)
      throw Error{ErrorCode::invalid_argument, std::to_string(value.payload.size()) + " bytes for elements of " + std::to_string(element)};
    if (value.dtype == DType::boolean && std::any_of(value.payload.begin(), value.payload.end(), [](std::byte b) { return b > std::byte{1}; }))
      throw Error{ErrorCode::bad_schema, "a boolean that is neither 0 nor 1"};
    if (array) append_raw(out, ValueType::array);
    append_raw(out, type);
    if (array) append_raw<Out, std::uint64_t>(out, value.payload.size() / element);
    out.append(as_text(value.payload));
  };
  switch (value.kind) {
    case ValueKind::number: return numbers(false);
    case ValueKind::array: return numbers(true);
    case ValueKind::text:
      if (first_invalid_utf8(as_text(value.payload)) != std::string_view::npos) throw Error{ErrorCode::bad_utf8, "a string that is not UTF-8"};
      append_raw(out, ValueType::text);
      return append_text(out, as_text(value.payload));
    case ValueKind::json: {
      StringsReader reader;
      read_json(value.payload, "the value", 0, reader);
      append_raw(out, ValueType::array);
      append_raw(out, ValueType::text);
      append_raw<Out, std::uint64_t>(out, reader.count);
      return out.append(as_text(reader.strings.take())), void();
    }
    case ValueKind::bytes:
    case ValueKind::per_rank: break;
  }
  throw Error{ErrorCode::unsupported, "GGUF has no values of kind " + std::string{to_string(value.kind)}};
}

template <class Names>
void refuse_twice(Names& names, char const* what) {
  dcp::detail::sort(names);
  if (auto const twice = std::adjacent_find(names.begin(), names.end()); twice != names.end())
    throw Error{ErrorCode::duplicate_key, std::string{what} + ' ' + shown(*twice) + " would be in one file twice"};
}

/// Appends everything up to the padding before the data, and fills `layout` as if the data began at 0.
template <class Out, class TensorAt>
void append_header(Out& out, Layout& layout, std::size_t count, TensorAt tensor_at, Metadata const& metadata, std::uint64_t alignment) {
  std::vector<std::string_view> names;
  names.reserve(std::max(count, metadata.size()));
  for (auto const& entry : metadata) names.push_back(entry.first);
  refuse_twice(names, "key");
  bool const has_alignment = sorted_contains(names, alignment_key);
  bool const adds_alignment = !has_alignment && alignment != default_alignment;

  out.append("GGUF");
  append_raw<Out, std::uint32_t>(out, 3);
  append_raw<Out, std::uint64_t>(out, count);
  append_raw<Out, std::uint64_t>(out, metadata.size() + (adds_alignment ? 1 : 0));
  for (auto const& [key, value] : metadata) {
    check_key(key);
    append_text(out, key);
    if (key == alignment_key && (value.kind != ValueKind::number || value.dtype != DType::u32 || value.payload.size() != 4 ||
                                 load_little_endian<std::uint32_t>(value.payload.data()) != alignment))
      throw Error{ErrorCode::invalid_argument, "the key general.alignment contradicts the alignment of " + std::to_string(alignment)};
    try {
      append_value(out, value);
    } catch (Error const& error) {
      throw Error{error.code(), key_called(key) + ": " + error.message()};
    }
  }
  if (adds_alignment) {
    append_text(out, alignment_key);
    append_raw(out, ValueType::u32);
    append_raw(out, static_cast<std::uint32_t>(alignment));
  }

  names.clear();
  std::uint64_t cursor = 0;
  for (std::size_t i = 0; i < count; ++i) {
    TensorLine const tensor = tensor_at(i);
    check_name(tensor.name);
    Extents const& shape = *tensor.shape;
    try {
      if (shape.rank() > max_dimensions) throw Error{ErrorCode::limit, std::to_string(shape.rank()) + " dimensions; GGUF has at most 4"};
      std::uint64_t const bytes = checked_bytes(tensor.type, shape), end = cursor + bytes, next = round_up(end, alignment);
      if (next > INT64_MAX) throw Error{ErrorCode::overflow, "the tensors together make 2^63 bytes or more"};
      append_text(out, tensor.name);
      append_raw(out, static_cast<std::uint32_t>(shape.rank()));
      for (int d = shape.rank(); d-- > 0;) append_raw(out, static_cast<std::uint64_t>(shape[d]));
      append_raw(out, tensor.type);
      append_raw(out, cursor);
      layout.offsets.push_back(cursor);
      if (next > end) layout.paddings.push_back({end, next - end});
      cursor = next;
    } catch (Error const& error) {
      throw Error{error.code(), tensor_called(tensor.name) + ": " + error.message()};
    }
    names.push_back(tensor.name);
  }
  refuse_twice(names, "tensor");
  layout.file_size = cursor;
}

}  // namespace detail

/// Whether GGUF has a type for a value: numbers, arrays of them, texts, and the JSON of an array of strings.
template <class = Deferred>
bool can_hold(Value const& value) {
  if (value.kind == ValueKind::text) return true;
  detail::ValueType type{};
  if (value.kind == ValueKind::number || value.kind == ValueKind::array) return detail::value_type_of(value.dtype, type);
  if (value.kind != ValueKind::json) return false;
  try {
    detail::StringsReader reader;
    detail::read_json(value.payload, "the value", 0, reader);
    return true;
  } catch (Error const&) {
    return false;
  }
}

/// Whether it can hold the value under this key, too.
template <class = Deferred>
bool can_hold(std::string_view key, Value const& value) {
  try {
    detail::check_key(key);
    if (value.kind == ValueKind::text && first_invalid_utf8(as_text(value.payload)) != std::string_view::npos) return false;
  } catch (Error const&) {
    return false;
  }
  return can_hold(value);
}

enum class LayoutParts : std::uint8_t { all, sizes_only };

/// A file of version 3 with tensor_at(i), a TensorLine, for i below `count`, in that order, each padded to the alignment, the last one too.
///
/// metadata  numbers, arrays of numbers, texts, and the JSON of arrays of strings; the key general.alignment is added where it is needed
/// Throws    Error: invalid_argument for an alignment that is no power of two up to 2^20, or for a key that says another one; unsupported for
///           values that GGUF lacks; what parse_header throws for keys, names and tensors
template <class TensorAt>
Layout lay_out(std::size_t count, TensorAt tensor_at, Metadata const& metadata, std::uint64_t alignment = default_alignment, LayoutParts parts = LayoutParts::all) {
  if (!std::has_single_bit(alignment) || alignment > max_alignment) throw Error{ErrorCode::invalid_argument, "the alignment must be a power of two up to 1048576"};
  Layout layout;
  auto const place = [&](std::uint64_t text) {
    layout.data_begin = round_up(text, alignment);
    for (auto& offset : layout.offsets) offset += layout.data_begin;
    for (auto& padding : layout.paddings) padding.offset += layout.data_begin;
    layout.file_size += layout.data_begin;
  };
  if (parts == LayoutParts::sizes_only) {
    TextLength length;
    detail::append_header(length, layout, count, tensor_at, metadata, alignment);
    place(length.size());
    return layout;
  }
  detail::HeaderBytes bytes;
  detail::append_header(bytes, layout, count, tensor_at, metadata, alignment);
  place(bytes.size());
  layout.header = bytes.take();
  layout.header.resize(static_cast<std::size_t>(layout.data_begin));
  return layout;
}
/// The same for tensors of which only name, type and shape are read.
template <class = Deferred>
Layout lay_out(std::vector<TensorInfo> const& tensors, Metadata const& metadata, std::uint64_t alignment = default_alignment, LayoutParts parts = LayoutParts::all) {
  return lay_out(tensors.size(), [&](std::size_t i) { return TensorLine{tensors[i].name, tensors[i].type, &tensors[i].shape}; }, metadata, alignment, parts);
}

}  // namespace dcp::gguf
