// SPDX-License-Identifier: Apache-2.0
#pragma once
// What PyTorch puts into the archives of torch.save: tensors over storages, and plain Python objects, as data. Both ways.
//
// Python has types that JSON lacks. As JSON they are objects with a member "__type__":
//   tuple, torch.Size, set, frozenset   {"__type__": "tuple", "items": [...]}
//   bytes, bytearray, io.BytesIO        {"__type__": "bytes", "hex": "00ff"}; io.BytesIO with its position, "pos"
//   float that is not finite            {"__type__": "float", "repr": "-inf"}
//   int beyond 2^53                     {"__type__": "int", "decimal": "12089258196146291747061"}
//   complex                             {"__type__": "complex", "re": 1.5, "im": -2.0}
//   dict with keys that are no text     {"__type__": "dict", "items": [[key, value], ...]}
//   torch.dtype, torch.device, a path   {"__type__": "torch.dtype", "name": "bfloat16"}
//   tensor                              {"__type__": "tensor", "dtype": "F32", "shape": [2], "hex": "..."}
//   an object of another class          {"__type__": "opaque", "class": "module.Name"}

#include <dcp/base/config.hpp>
#include <dcp/base/text.hpp>
#include <dcp/core/box.hpp>
#include <dcp/core/dtype.hpp>
#include <dcp/core/value.hpp>
#include <dcp/formats/json_tree.hpp>
#include <dcp/formats/pickle.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp::torch {

namespace detail {
struct DTypeNames {
  std::string_view name;      // in module torch; empty: it has no such dtype
  std::string_view storage;   // the class of its storages; empty: they are stored as torch.storage.UntypedStorage
};
// By DType.
inline constexpr std::array<DTypeNames, dtype_count> dtype_names{{
    {"bool", "BoolStorage"}, {"float4_e2m1fn_x2", ""}, {}, {}, {"uint8", "ByteStorage"}, {"int8", "CharStorage"}, {"float8_e5m2", ""}, {"float8_e4m3fn", ""}, {"float8_e8m0fnu", ""},
    {"float8_e4m3fnuz", ""}, {"float8_e5m2fnuz", ""}, {"int16", "ShortStorage"}, {"uint16", ""}, {"float16", "HalfStorage"}, {"bfloat16", "BFloat16Storage"}, {"int32", "IntStorage"}, {"uint32", ""},
    {"float32", "FloatStorage"}, {"complex64", "ComplexFloatStorage"}, {"float64", "DoubleStorage"}, {"int64", "LongStorage"}, {"uint64", ""}, {"complex32", ""}, {"complex128", "ComplexDoubleStorage"},
}};
}  // namespace detail

/// "float32" for F32; empty for a dtype that PyTorch lacks (the two of six bits).
constexpr std::string_view dtype_name(DType dtype) { return detail::dtype_names[static_cast<std::size_t>(dtype)].name; }
/// False for names that are none, and for dtypes that are unknown here (the quantized ones).
constexpr bool dtype_called(std::string_view name, DType& dtype) {
  for (std::size_t i = 0; i < detail::dtype_names.size(); ++i)
    if (!name.empty() && detail::dtype_names[i].name == name) return dtype = static_cast<DType>(i), true;
  return false;
}

/// Of an element as PyTorch counts them: of F4, a pair.
constexpr std::uint64_t element_bytes(DType dtype) { return dtype == DType::f4 ? 1 : static_cast<std::uint64_t>(bits_of(dtype)) / 8; }

/// Elements of PyTorch's F4 are pairs: as its last dimension counts them, and as ours does. Throws Error(unsupported) for a scalar of pairs and for an odd number.
template <class = Deferred>
Extents shape_from_torch(DType dtype, Extents shape) {
  if (dtype != DType::f4) return shape;
  std::uint64_t doubled = 0;
  if (shape.rank() == 0 || !checked_multiply(static_cast<std::uint64_t>(shape[shape.rank() - 1]), 2, doubled) || doubled > INT64_MAX) throw Error{ErrorCode::unsupported, "pairs of F4 with the shape " + to_string(shape)};
  shape[shape.rank() - 1] = static_cast<std::int64_t>(doubled);
  return shape;
}
template <class = Deferred>
Extents shape_to_torch(DType dtype, Extents shape) {
  if (dtype != DType::f4) return shape;
  if (shape.rank() == 0 || shape[shape.rank() - 1] % 2 != 0) throw Error{ErrorCode::unsupported, "PyTorch stores F4 in pairs, and a row of " + to_string(shape) + " has no whole number of them"};
  shape[shape.rank() - 1] /= 2;
  return shape;
}

/// Whether a pickle may name this: what tensors and plain objects consist of. Nothing named is ever called.
/// Source    torch._utils, torch.storage; the globals of torch.save that PyTorch's weights_only unpickler knows
template <class = Deferred>
bool is_known_global(std::string_view module, std::string_view name) {
  if (module == "torch") {
    DType dtype{};
    return name == "Size" || name == "device" || dtype_called(name, dtype) || std::any_of(detail::dtype_names.begin(), detail::dtype_names.end(), [&](auto const& names) { return !names.storage.empty() && names.storage == name; });
  }
  constexpr std::array<std::pair<std::string_view, std::string_view>, 35> known{{
      {"torch._utils", "_rebuild_tensor_v2"}, {"torch._utils", "_rebuild_tensor_v3"}, {"torch._utils", "_rebuild_tensor"}, {"torch._utils", "_rebuild_parameter"},
      {"torch._utils", "_rebuild_parameter_with_state"}, {"torch.storage", "UntypedStorage"}, {"torch.serialization", "_get_layout"}, {"collections", "OrderedDict"},
      {"collections", "defaultdict"}, {"_codecs", "encode"}, {"_io", "BytesIO"}, {"io", "BytesIO"},
      {"__builtin__", "bytes"}, {"__builtin__", "bytearray"}, {"__builtin__", "set"}, {"__builtin__", "frozenset"}, {"__builtin__", "complex"}, {"__builtin__", "list"}, {"__builtin__", "dict"},
      {"__builtin__", "int"}, {"__builtin__", "float"},
      {"builtins", "bytes"}, {"builtins", "bytearray"}, {"builtins", "set"}, {"builtins", "frozenset"}, {"builtins", "complex"}, {"builtins", "list"}, {"builtins", "dict"}, {"builtins", "int"},
      {"pathlib", "PosixPath"}, {"pathlib", "PurePosixPath"}, {"pathlib", "WindowsPath"}, {"pathlib", "PureWindowsPath"}, {"pathlib._local", "PosixPath"}, {"pathlib._local", "PurePosixPath"},
  }};
  return std::any_of(known.begin(), known.end(), [&](auto const& entry) { return entry.first == module && entry.second == name; });
}

/// A tensor as a pickle describes it: a view of a storage.
struct TensorObject {
  std::string_view key;                         // of the storage: its bytes are the record data/<key>
  DType dtype{};
  std::uint64_t storage_bytes = 0;              // that the pickle says it has
  std::uint64_t first = 0;                      // in elements (pairs, of F4), where the view begins
  Extents shape;                                // as PyTorch counts
  std::vector<std::uint64_t> strides{};         // in elements
  bool conjugate = false, negative = false;     // what is stored is to be conjugated, or negated
};

namespace detail {
template <class = Deferred>
[[noreturn]] void bad_object(std::string sentence) { throw Error{ErrorCode::bad_schema, std::move(sentence)}; }

template <class = Deferred>
Extents sizes_of(pickle::Value const& value) {
  pickle::Value const list = value.kind() == pickle::Kind::object && value.is_call_of("torch", "Size") ? value.arguments().item(0) : value;
  if (list.size() > static_cast<std::size_t>(max_rank)) throw Error{ErrorCode::unsupported, "a tensor of " + std::to_string(list.size()) + " dimensions; at most " + std::to_string(max_rank) + " are supported"};
  std::vector<std::int64_t> sizes;
  list.for_each([&](pickle::Value const& size) {
    if (size.integer() < 0) bad_object("a size of " + std::to_string(size.integer()));
    sizes.push_back(size.integer());
  });
  return Extents{sizes};
}

}  // namespace detail

/// Whether it is a tensor, or a parameter.
template <class = Deferred>
bool is_tensor(pickle::Value const& value) {
  if (value.kind() != pickle::Kind::object || value.module() != "torch._utils") return false;
  std::string_view const name = value.name();
  return name == "_rebuild_tensor_v2" || name == "_rebuild_tensor_v3" || name == "_rebuild_tensor" || name == "_rebuild_parameter" || name == "_rebuild_parameter_with_state";
}

/// Throws    Error(bad_schema), Error(unsupported), Error(unsupported_dtype)
template <class = Deferred>
TensorObject parse_tensor(pickle::Value value) {
  // A parameter is a tensor, and whether it wants gradients.
  while (is_tensor(value) && value.name().starts_with("_rebuild_parameter")) value = value.arguments().item(0);
  if (!is_tensor(value)) detail::bad_object(value.kind() == pickle::Kind::object ? "a " + std::string{value.module()} + "." + std::string{value.name()} + " where a tensor belongs" : "no tensor");
  pickle::Value const arguments = value.arguments(), reference = arguments.item(0);
  if (reference.kind() != pickle::Kind::persistent) detail::bad_object("a tensor over something that is no storage");
  pickle::Value const storage = reference.persistent_id();
  if (storage.size() < 5 || storage.item(0).text() != "storage" || storage.item(1).kind() != pickle::Kind::global) detail::bad_object("a persistent object that is no storage");
  TensorObject tensor;
  tensor.key = storage.item(2).text();
  std::uint64_t const count = storage.item(4).natural();
  bool const untyped = storage.item(1).name() == "UntypedStorage";
  if (value.name() == "_rebuild_tensor_v3") {
    if (!untyped) detail::bad_object("a tensor with a dtype of its own over a typed storage");
    pickle::Value const dtype = arguments.item(6);
    if (dtype.kind() != pickle::Kind::global || dtype.module() != "torch" || !dtype_called(dtype.name(), tensor.dtype)) throw Error{ErrorCode::unsupported_dtype, "a tensor of an unknown dtype"};
    tensor.storage_bytes = count;
  } else {
    auto const known = std::find_if(detail::dtype_names.begin(), detail::dtype_names.end(), [&](auto const& names) { return !names.storage.empty() && names.storage == storage.item(1).name(); });
    if (storage.item(1).module() != "torch" || known == detail::dtype_names.end()) throw Error{ErrorCode::unsupported_dtype, "a storage of the unknown class " + std::string{storage.item(1).module()} + "." + std::string{storage.item(1).name()}};
    tensor.dtype = static_cast<DType>(known - detail::dtype_names.begin());
    if (!checked_multiply(count, element_bytes(tensor.dtype), tensor.storage_bytes)) throw Error{ErrorCode::overflow, "a storage of " + std::to_string(count) + " elements"};
  }
  tensor.first = arguments.item(1).natural();
  tensor.shape = detail::sizes_of(arguments.item(2));
  arguments.item(3).for_each([&](pickle::Value const& stride) { tensor.strides.push_back(stride.natural()); });
  if (tensor.strides.size() != static_cast<std::size_t>(tensor.shape.rank())) detail::bad_object("a tensor of " + std::to_string(tensor.shape.rank()) + " dimensions with " + std::to_string(tensor.strides.size()) + " strides");
  std::size_t const bits = value.name() == "_rebuild_tensor_v3" ? 7 : 6;
  if (arguments.size() > bits && arguments.item(bits).kind() == pickle::Kind::dict)
    arguments.item(bits).for_each_pair([&](pickle::Value const& name, pickle::Value const& set) {
      if (name.text() == "conj") tensor.conjugate = set.boolean();
      else if (name.text() == "neg") tensor.negative = set.boolean();
      else throw Error{ErrorCode::unsupported, "a tensor with the property " + json_quoted(name.text())};
    });
  // What the view reaches must lie in the storage.
  std::uint64_t last = tensor.first, end = 0;
  bool fits = true, empty = false;
  for (int d = 0; d < tensor.shape.rank(); ++d) {
    std::uint64_t reach = 0;
    if (tensor.shape[d] == 0) empty = true;
    else fits = fits && checked_multiply(static_cast<std::uint64_t>(tensor.shape[d] - 1), tensor.strides[static_cast<std::size_t>(d)], reach) && checked_add(last, reach, last);
  }
  if (empty) last = 0;
  fits = fits && (empty || (checked_add(last, 1, end) && checked_multiply(end, element_bytes(tensor.dtype), end) && end <= tensor.storage_bytes));
  if (!fits) throw Error{ErrorCode::size_mismatch, "a tensor of shape " + to_string(tensor.shape) + " reaches beyond its storage of " + std::to_string(tensor.storage_bytes) + " bytes"};
  return tensor;
}

/// The data.pkl of a tensor that is the whole of its storage, "0". `shape` as PyTorch counts.
template <class = Deferred>
void write_tensor(pickle::Writer& out, DType dtype, Extents const& shape, std::string_view key = "0") {
  auto const& names = detail::dtype_names[static_cast<std::size_t>(dtype)];
  if (names.name.empty()) throw Error{ErrorCode::unsupported_dtype, "PyTorch has no tensors of " + std::string{to_string(dtype)}};
  bool const untyped = names.storage.empty();
  std::int64_t const elements = shape.elements();
  out.global("torch._utils", untyped ? "_rebuild_tensor_v3" : "_rebuild_tensor_v2").mark();
  out.mark().text("storage").global(untyped ? "torch.storage" : "torch", untyped ? "UntypedStorage" : names.storage).text(key).text("cpu");
  out.integer(untyped && dtype != DType::f4 ? elements * bits_of(dtype) / 8 : elements).tuple().persistent_id();
  out.integer(0).size_tuple(shape).size_tuple(row_major_strides(shape)).boolean(false);
  out.global("collections", "OrderedDict").empty_tuple().reduce();
  if (untyped) out.global("torch", names.name);
  out.tuple().reduce();
}

// ---- objects as values

struct ObjectOptions {
  bool opaque = false;                              // objects of unknown classes are listed as such, instead of being an error
  std::uint64_t max_nodes = 2'000'000;              // that are met while an object is walked
  std::uint64_t max_text_bytes = 1ull << 30;        // of the JSON it becomes
  int max_depth = 200;
};

namespace detail {

template <class Records>
class ObjectReader {
 public:
  /// `records(key)`: the bytes of the storage `key`
  ObjectReader(Records records, ObjectOptions const& options) : records_{std::move(records)}, options_{options} {}

  /// As the most specific kind of value: a number, text, bytes, an array of numbers of one type; else JSON.
  Value value(pickle::Value const& object) {
    Value result;
    switch (object.kind()) {
      case pickle::Kind::boolean: return number(object.boolean());
      case pickle::Kind::integer: return number(object.integer());
      case pickle::Kind::real: return number(object.real());
      case pickle::Kind::text: return dcp::detail::make_value(ValueKind::text, DType::u8, as_byte_span(object.text()));
      case pickle::Kind::bytes: return dcp::detail::make_value(ValueKind::bytes, DType::u8, object.bytes());
      case pickle::Kind::list:
        if (numbers(object, result)) return result;
        break;
      case pickle::Kind::object: {
        Bytes bytes;
        if (is_bytes(object)) return dcp::detail::make_value(ValueKind::bytes, DType::u8, (bytes = bytes_of_object(object)));
        break;
      }
      default: break;
    }
    write(object, 0);
    return dcp::detail::make_value(ValueKind::json, DType::u8, as_byte_span(out_));
  }

 private:
  template <class T>
  static Value number(T x) { return dcp::detail::make_value(ValueKind::number, dtype_of<T>, std::as_bytes(std::span{&x, 1})); }

  bool numbers(pickle::Value const& list, Value& result) {
    if (list.size() == 0) return false;
    auto const kind = list.item(0).kind();
    if (kind != pickle::Kind::integer && kind != pickle::Kind::real && kind != pickle::Kind::boolean) return false;
    bool same = true;
    list.for_each([&](pickle::Value const& item) { same = same && item.kind() == kind; });
    if (!same) return false;
    result.kind = ValueKind::array;
    result.dtype = kind == pickle::Kind::integer ? DType::i64 : kind == pickle::Kind::real ? DType::f64 : DType::boolean;
    list.for_each([&](pickle::Value const& item) {
      Value const one = kind == pickle::Kind::integer ? number(item.integer()) : kind == pickle::Kind::real ? number(item.real()) : number(item.boolean());
      dcp::detail::append(result.payload, one.payload);
    });
    return true;
  }

  static bool is_builtin(pickle::Value const& object, std::string_view name) { return object.is_call_of("__builtin__", name) || object.is_call_of("builtins", name); }
  static bool is_stream(pickle::Value const& object) { return object.is_call_of("_io", "BytesIO") || object.is_call_of("io", "BytesIO"); }
  static bool is_bytes(pickle::Value const& object) { return object.is_call_of("_codecs", "encode") || is_builtin(object, "bytes") || is_stream(object); }
  static Bytes bytes_of_object(pickle::Value const& object) {
    if (is_stream(object)) {
      auto const state = object.state();
      if (!state) return {};
      if (state->kind() != pickle::Kind::tuple) bad_object("a BytesIO of an unknown form");
      return bytes_of_object(state->item(0));
    }
    if (object.kind() == pickle::Kind::bytes) return Bytes(object.bytes().begin(), object.bytes().end());
    if (object.kind() != pickle::Kind::object) bad_object("bytes of an unknown form");
    if (is_builtin(object, "bytes")) {
      if (object.arguments().size() == 0) return {};
      return bytes_of_object(object.arguments().item(0));
    }
    // Protocols before 3 hold bytes as text of the code points 0 to 255.
    if (!object.is_call_of("_codecs", "encode") || object.arguments().size() != 2 || (object.arguments().item(1).text() != "latin1" && object.arguments().item(1).text() != "latin-1")) bad_object("bytes of an unknown form");
    std::string_view const text = object.arguments().item(0).text();
    Bytes bytes;
    for (std::size_t i = 0; i < text.size(); ++i) {
      auto const lead = static_cast<unsigned char>(text[i]);
      if (lead < 0x80) bytes.push_back(static_cast<std::byte>(lead));
      else if ((lead == 0xC2 || lead == 0xC3) && i + 1 < text.size()) bytes.push_back(static_cast<std::byte>(((lead & 3u) << 6) | (static_cast<unsigned char>(text[++i]) & 0x3Fu)));
      else bad_object("bytes with a character beyond 255");
    }
    return bytes;
  }

  void typed(std::string_view type) { out_ += "{\"__type__\":\"" + std::string{type} + '"'; }
  void items(pickle::Value const& list, int depth) {
    out_ += '[';
    bool first = true;
    list.for_each([&](pickle::Value const& item) {
      if (!first) out_ += ',';
      first = false;
      write(item, depth + 1);
    });
    out_ += ']';
  }
  void typed_items(std::string_view type, pickle::Value const& list, int depth) {
    typed(type);
    out_ += ",\"items\":";
    items(list, depth);
    out_ += '}';
  }
  void hex(std::string_view type, ConstByteSpan bytes) {
    typed(type);
    out_ += ",\"hex\":\"" + hex_text(bytes) + '"';
  }
  void named(std::string_view type, std::string_view name) {
    typed(type);
    out_ += ",\"name\":" + json_quoted(name) + '}';
  }
  void real(double x) {
    if (std::isfinite(x)) {
      out_ += dcp::detail::number_to_json(x);
      return;
    }
    typed("float");
    out_ += std::isnan(x) ? ",\"repr\":\"nan\"}" : x > 0 ? ",\"repr\":\"inf\"}" : ",\"repr\":\"-inf\"}";
  }
  static std::string plain_real(double x) { return std::isfinite(x) ? dcp::detail::number_to_json(x) : std::isnan(x) ? "\"nan\"" : x > 0 ? "\"inf\"" : "\"-inf\""; }
  void dictionary(pickle::Value const& dict, int depth) {
    bool plain = true;
    dict.for_each_pair([&](pickle::Value const& key, pickle::Value const&) { plain = plain && key.kind() == pickle::Kind::text && key.text() != "__type__"; });
    if (!plain) {
      typed("dict");
      out_ += ",\"items\":[";
    } else {
      out_ += '{';
    }
    bool first = true;
    dict.for_each_pair([&](pickle::Value const& key, pickle::Value const& item) {
      if (!first) out_ += ',';
      first = false;
      if (plain) {
        out_ += json_quoted(key.text()) + ':';
        write(item, depth + 1);
      } else {
        out_ += '[';
        write(key, depth + 1);
        out_ += ',';
        write(item, depth + 1);
        out_ += ']';
      }
    });
    out_ += plain ? "}" : "]}";
  }
  // Two's complement, little-endian, to decimal digits.
  static std::string decimal(ConstByteSpan bytes) {
    std::vector<std::uint32_t> words;   // of the magnitude, base 2^32
    bool const negative = !bytes.empty() && (static_cast<unsigned>(bytes.back()) & 0x80u) != 0;
    std::uint32_t carry = negative ? 1 : 0;
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      std::uint32_t byte = static_cast<std::uint32_t>(bytes[i]);
      if (negative) byte = (~byte & 0xFFu) + carry, carry = byte >> 8, byte &= 0xFFu;
      if (i % 4 == 0) words.push_back(0);
      words.back() |= byte << (i % 4 * 8);
    }
    std::string digits;
    while (!words.empty()) {
      std::uint64_t rest = 0;
      for (std::size_t w = words.size(); w-- > 0;) {
        rest = rest << 32 | words[w];
        words[w] = static_cast<std::uint32_t>(rest / 1'000'000'000);
        rest %= 1'000'000'000;
      }
      while (!words.empty() && words.back() == 0) words.pop_back();
      for (int k = 0; k < 9 && (rest != 0 || !words.empty()); ++k, rest /= 10) digits += static_cast<char>('0' + rest % 10);
    }
    if (digits.empty()) digits = "0";
    if (negative) digits += '-';
    return {digits.rbegin(), digits.rend()};
  }
  void tensor(pickle::Value const& object) {
    TensorObject const view = parse_tensor(object);
    ConstByteSpan const storage = records_(view.key);
    if (storage.size() < view.storage_bytes) throw Error{ErrorCode::size_mismatch, "a storage of " + std::to_string(view.storage_bytes) + " bytes has a record of " + std::to_string(storage.size())};
    if (view.conjugate || view.negative) throw Error{ErrorCode::unsupported, "a conjugate or negated tensor inside an object"};
    std::uint64_t const each = element_bytes(view.dtype), count = static_cast<std::uint64_t>(view.shape.elements());
    if (count > options_.max_text_bytes / (2 * each)) throw Error{ErrorCode::limit, "a tensor of " + std::to_string(count) + " elements inside an object"};
    Bytes bytes;
    bytes.reserve(static_cast<std::size_t>(count * each));
    for_each_index(Box::whole(view.shape), view.shape.rank(), [&](Extents const& index) {
      std::uint64_t at = view.first;
      for (int d = 0; d < view.shape.rank(); ++d) at += static_cast<std::uint64_t>(index[d]) * view.strides[static_cast<std::size_t>(d)];
      dcp::detail::append(bytes, storage.subspan(static_cast<std::size_t>(at * each), static_cast<std::size_t>(each)));
    });
    typed("tensor");
    out_ += ",\"dtype\":\"" + std::string{to_string(view.dtype)} + "\",\"shape\":[";
    Extents const shape = shape_from_torch(view.dtype, view.shape);
    for (int d = 0; d < shape.rank(); ++d) out_ += (d > 0 ? "," : "") + std::to_string(shape[d]);
    out_ += "],\"hex\":\"" + hex_text(bytes) + "\"}";
  }
  void object(pickle::Value const& value, int depth) {
    if (is_tensor(value)) return tensor(value);
    if (is_stream(value)) {
      Bytes const bytes = bytes_of_object(value);
      hex("io.BytesIO", bytes);
      auto const state = value.state();
      out_ += ",\"pos\":" + std::to_string(state ? state->item(1).natural() : 0) + '}';
      return;
    }
    if (is_bytes(value)) {
      Bytes const bytes = bytes_of_object(value);
      hex("bytes", bytes);
      out_ += '}';
      return;
    }
    pickle::Value const arguments = value.arguments();
    if (is_builtin(value, "bytearray")) {
      hex("bytearray", arguments.size() == 0 ? Bytes{} : bytes_of_object(arguments.item(0)));
      out_ += '}';
      return;
    }
    if (value.is_call_of("torch", "Size")) return typed_items("torch.Size", arguments.item(0), depth);
    if (value.is_call_of("torch", "device")) return named("torch.device", arguments.item(0).text());
    if (is_builtin(value, "set") || is_builtin(value, "frozenset")) {
      if (arguments.size() == 0) out_ += "{\"__type__\":\"" + std::string{value.name()} + "\",\"items\":[]}";
      else typed_items(value.name(), arguments.item(0), depth);
      return;
    }
    if (is_builtin(value, "complex")) {
      if (arguments.size() != 2) bad_object("a complex number of " + std::to_string(arguments.size()) + " parts");
      typed("complex");
      out_ += ",\"re\":" + plain_real(arguments.item(0).real()) + ",\"im\":" + plain_real(arguments.item(1).real()) + '}';
      return;
    }
    if (value.module() == "collections") return dictionary(value, depth);
    if (value.module().starts_with("pathlib")) {
      std::string path;
      arguments.for_each([&](pickle::Value const& part) { path += (path.empty() || path.back() == '/' ? "" : "/") + std::string{part.text()}; });
      return named("pathlib." + std::string{value.name()}, path);
    }
    opaque(value);
  }
  void opaque(pickle::Value const& value) {
    std::string const name = std::string{value.module()} + '.' + std::string{value.name()};
    if (!options_.opaque) throw Error{ErrorCode::unsupported, "an object of the class " + name};
    typed("opaque");
    out_ += ",\"class\":" + json_quoted(name) + '}';
  }

  void write(pickle::Value const& value, int depth) {
    if (++nodes_ > options_.max_nodes || depth > options_.max_depth || out_.size() > options_.max_text_bytes)
      throw Error{ErrorCode::limit, depth > options_.max_depth ? "an object in more than " + std::to_string(options_.max_depth) + " levels" : "an object of too many parts"};
    switch (value.kind()) {
      case pickle::Kind::none: out_ += "null"; return;
      case pickle::Kind::boolean: out_ += value.boolean() ? "true" : "false"; return;
      case pickle::Kind::integer: {
        constexpr std::int64_t exact = std::int64_t{1} << 53;   // what readers of JSON that have doubles only can tell apart
        std::int64_t const x = value.integer();
        out_ += x >= -exact && x <= exact ? std::to_string(x) : "{\"__type__\":\"int\",\"decimal\":\"" + std::to_string(x) + "\"}";
        return;
      }
      case pickle::Kind::large_integer:
        if (value.bytes().size() > 4096) throw Error{ErrorCode::limit, "an integer of " + std::to_string(value.bytes().size()) + " bytes"};
        out_ += "{\"__type__\":\"int\",\"decimal\":\"" + decimal(value.bytes()) + "\"}";
        return;
      case pickle::Kind::real: real(value.real()); return;
      case pickle::Kind::text: out_ += json_quoted(value.text()); return;
      case pickle::Kind::bytes:
        hex("bytes", value.bytes());
        out_ += '}';
        return;
      case pickle::Kind::list: items(value, depth); return;
      case pickle::Kind::tuple: typed_items("tuple", value, depth); return;
      case pickle::Kind::set: typed_items("set", value, depth); return;
      case pickle::Kind::dict: dictionary(value, depth); return;
      case pickle::Kind::global: {
        DType dtype{};
        if (value.module() == "torch" && dtype_called(value.name(), dtype)) return named("torch.dtype", value.name());
        return opaque(value);
      }
      case pickle::Kind::object: object(value, depth); return;
      case pickle::Kind::persistent: bad_object("a storage without a tensor");
    }
  }

  Records records_;
  ObjectOptions options_;
  std::string out_;
  std::uint64_t nodes_ = 0;
};

}  // namespace detail

/// An object as a value: a number (integers as I64, floats as F64), text, bytes (of a BytesIO: what it holds), an array of numbers of one type, or JSON as above.
///
/// records   records(key) gives the bytes of storage `key`, for tensors inside the object
/// Throws    Error(unsupported) that names a class which is unknown here; Error(bad_schema), Error(limit)
template <class Records>
Value to_value(pickle::Value const& object, Records records, ObjectOptions const& options = {}) {
  return detail::ObjectReader<Records>{std::move(records), options}.value(object);
}

/// A leaf of a nested state: its name, the keys of dicts and positions in lists joined by dots, and where they are joined.
struct Leaf {
  std::string name;
  NameJoints joints;
};

/// Calls visit(Leaf const&, value) for the leaves of nested dicts and lists, in order, as PyTorch flattens a state: a dict is always descended into, and a list that holds
/// a tensor, a dict, or a list that is. Tuples are leaves; here not those that hold tensors.
///
/// Throws    Error(limit), Error(unsupported) for a dict whose keys are neither texts nor integers and that holds tensors
/// Source    torch.distributed.checkpoint._traverse
template <class Visit>
void for_each_leaf(pickle::Value const& root, Visit visit) {
  constexpr std::uint64_t most = 10'000'000;
  pickle::expanded_nodes(root, most, 200);   // which bounds every walk
  struct Walk {
    Visit& visit;
    static bool is_dict(pickle::Value const& value) { return value.kind() == pickle::Kind::dict || (value.kind() == pickle::Kind::object && value.module() == "collections"); }
    static bool is_sequence(pickle::Value const& value) { return value.kind() == pickle::Kind::list || value.kind() == pickle::Kind::tuple; }
    static bool holds_tensor(pickle::Value const& value) {
      bool found = is_tensor(value);
      if (is_sequence(value)) value.for_each([&](pickle::Value const& item) { found = found || holds_tensor(item); });
      if (is_dict(value)) value.for_each_pair([&](pickle::Value const&, pickle::Value const& item) { found = found || holds_tensor(item); });
      return found;
    }
    static bool descends(pickle::Value const& list) {
      bool found = false;
      list.for_each([&](pickle::Value const& item) { found = found || is_tensor(item) || is_dict(item) || (item.kind() == pickle::Kind::list && descends(item)); });
      return found;
    }
    static Leaf below(Leaf const& leaf, std::string const& name, bool at_root) {
      if (at_root) return {name, {}};
      Leaf next{leaf.name + '.' + name, leaf.joints};
      next.joints.push_back(static_cast<std::uint32_t>(leaf.name.size()));
      return next;
    }
    void walk(pickle::Value const& value, Leaf const& leaf, bool at_root) {
      if (is_dict(value)) {
        bool names = true;
        value.for_each_pair([&](pickle::Value const& key, pickle::Value const&) { names = names && (key.kind() == pickle::Kind::text || key.kind() == pickle::Kind::integer); });
        if (!names && holds_tensor(value)) throw Error{ErrorCode::unsupported, "a dict" + (at_root ? std::string{} : " at " + leaf.name) + " with tensors, and with a key that is neither text nor an integer"};
        if (!names) return visit(leaf, value);
        value.for_each_pair([&](pickle::Value const& key, pickle::Value const& item) { walk(item, below(leaf, key.kind() == pickle::Kind::integer ? std::to_string(key.integer()) : std::string{key.text()}, at_root), false); });
      } else if ((value.kind() == pickle::Kind::list && descends(value)) || (value.kind() == pickle::Kind::tuple && holds_tensor(value))) {
        std::size_t position = 0;
        value.for_each([&](pickle::Value const& item) { walk(item, below(leaf, std::to_string(position++), at_root), false); });
      } else {
        visit(leaf, value);
      }
    }
  };
  Walk{visit}.walk(root, {is_tensor(root) ? "tensor" : "value", {}}, true);
}

// ---- values as objects

/// A record that a written object needs beside its pickle.
struct ObjectRecord {
  std::string key;
  Bytes bytes;
};

namespace detail {

template <class = Deferred>
Bytes bytes_of_hex(std::string_view text) {
  auto const digit = [](char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1; };
  Bytes bytes;
  if (text.size() % 2 != 0) bad_object("an odd number of hexadecimal digits");
  for (std::size_t i = 0; i < text.size(); i += 2) {
    if (digit(text[i]) < 0 || digit(text[i + 1]) < 0) bad_object("a byte that is not hexadecimal");
    bytes.push_back(static_cast<std::byte>(digit(text[i]) * 16 + digit(text[i + 1])));
  }
  return bytes;
}

template <class D = Deferred>
class ObjectWriter {
 public:
  ObjectWriter(pickle::Writer& out, std::vector<ObjectRecord>& records) : out_{out}, records_{records} {}

  void value(Value const& value) {
    switch (value.kind) {
      case ValueKind::number: numbers(value); return;
      case ValueKind::array:
        out_.empty_list();
        if (value.payload.empty()) return;
        out_.mark();
        numbers(value);
        out_.appends();
        return;
      case ValueKind::text: out_.text(as_text(value.payload)); return;
      case ValueKind::bytes: out_.bytes(value.payload); return;
      case ValueKind::json: {
        auto const tree = dcp::detail::JsonTree::parse(value.payload, "a JSON value");
        json(tree.root());
        return;
      }
      case ValueKind::per_rank:
        out_.empty_list();
        if (value.ranks.empty()) return;
        out_.mark();
        for (auto const& one : value.ranks) this->value(one);
        out_.appends();
    }
  }

 private:
  void numbers(Value const& value) {
    dcp::detail::with_number_type(value.dtype, [&](auto type) {
      using T = decltype(type);
      for (std::size_t at = 0; at + sizeof(T) <= value.payload.size(); at += sizeof(T)) {
        if constexpr (std::is_same_v<T, bool>) out_.boolean(value.payload[at] != std::byte{0});
        else if constexpr (std::is_floating_point_v<T>) out_.real(static_cast<double>(load_little_endian<T>(value.payload.data() + at)));
        else if constexpr (std::is_signed_v<T>) out_.integer(static_cast<std::int64_t>(load_little_endian<T>(value.payload.data() + at)));
        else out_.natural(static_cast<std::uint64_t>(load_little_endian<T>(value.payload.data() + at)));
      }
    });
  }
  void list(dcp::detail::JsonValue const& from) {
    out_.empty_list();
    auto const items = from.items();
    if (items.empty()) return;
    out_.mark();
    for (auto const& item : items) json(item);
    out_.appends();
  }
  void tuple(dcp::detail::JsonValue const& from) {
    auto const items = from.items();
    if (items.empty()) return static_cast<void>(out_.empty_tuple());
    out_.mark();
    for (auto const& item : items) json(item);
    out_.tuple();
  }
  void number(std::string_view text) {
    std::int64_t integer = 0;
    if (auto const [end, problem] = std::from_chars(text.data(), text.data() + text.size(), integer); problem == std::errc{} && end == text.data() + text.size()) return static_cast<void>(out_.integer(integer));
    std::uint64_t natural = 0;
    if (auto const [end, problem] = std::from_chars(text.data(), text.data() + text.size(), natural); problem == std::errc{} && end == text.data() + text.size()) return static_cast<void>(out_.natural(natural));
    double real = 0;
    std::from_chars(text.data(), text.data() + text.size(), real);
    out_.real(real);
  }
  static double real_of(dcp::detail::JsonValue const& from) {
    if (from.is_string()) {
      std::string_view const text = from.text();
      if (text != "nan" && text != "inf" && text != "-inf") bad_object("the float " + json_quoted(text));
      return text == "nan" ? std::numeric_limits<double>::quiet_NaN() : text == "inf" ? std::numeric_limits<double>::infinity() : -std::numeric_limits<double>::infinity();
    }
    return from.template number<double>();
  }
  void typed(std::string_view type, dcp::detail::JsonValue const& from) {
    if (type == "tuple") return tuple(from.at("items"));
    if (type == "torch.Size") {
      out_.global("torch", "Size");
      tuple(from.at("items"));
      return static_cast<void>(out_.tuple1().reduce());
    }
    if (type == "set" || type == "frozenset") {
      out_.global("__builtin__", type);
      list(from.at("items"));
      return static_cast<void>(out_.tuple1().reduce());
    }
    if (type == "bytes") return static_cast<void>(out_.bytes(bytes_of_hex(from.at("hex").text())));
    if (type == "bytearray") {
      out_.global("__builtin__", "bytearray");
      out_.bytes(bytes_of_hex(from.at("hex").text())).tuple1();
      return static_cast<void>(out_.reduce());
    }
    if (type == "io.BytesIO") {
      out_.global("_io", "BytesIO").empty_tuple().newobj().mark();
      out_.bytes(bytes_of_hex(from.at("hex").text())).natural(from.at("pos").template number<std::uint64_t>()).none().tuple();
      return static_cast<void>(out_.build());
    }
    if (type == "float") return static_cast<void>(out_.real(real_of(from.at("repr"))));
    if (type == "complex") {
      out_.global("__builtin__", "complex").real(real_of(from.at("re"))).real(real_of(from.at("im"))).tuple2();
      return static_cast<void>(out_.reduce());
    }
    if (type == "torch.dtype") {
      DType dtype{};
      if (!dtype_called(from.at("name").text(), dtype)) bad_object("the unknown dtype " + json_quoted(from.at("name").text()));
      return static_cast<void>(out_.global("torch", from.at("name").text()));
    }
    if (type == "torch.device") return static_cast<void>(out_.global("torch", "device").text(from.at("name").text()).tuple1().reduce());
    if (type == "dict") {
      out_.empty_dict();
      auto const pairs = from.at("items").items();
      if (pairs.empty()) return;
      out_.mark();
      for (auto const& pair : pairs)
        for (auto const& item : pair.items()) json(item);
      return static_cast<void>(out_.setitems());
    }
    if (type == "int") {
      std::int64_t integer = 0;
      std::string_view const text = from.at("decimal").text();
      if (auto const [end, problem] = std::from_chars(text.data(), text.data() + text.size(), integer); problem == std::errc{} && end == text.data() + text.size()) return static_cast<void>(out_.integer(integer));
      return large_integer(text);
    }
    if (type == "tensor") {
      DType dtype{};
      if (!dcp::parse_dtype(from.at("dtype").text(), dtype)) bad_object("the unknown dtype " + json_quoted(from.at("dtype").text()));
      std::vector<std::int64_t> sizes;
      for (auto const& size : from.at("shape").items()) sizes.push_back(size.template number<std::int64_t>());
      Bytes bytes = bytes_of_hex(from.at("hex").text());
      Extents const shape{sizes};
      if (static_cast<std::uint64_t>(shape.elements()) * static_cast<std::uint64_t>(bits_of(dtype)) != bytes.size() * 8) bad_object("a tensor of " + to_string(shape) + " with " + std::to_string(bytes.size()) + " bytes");
      std::string key = std::to_string(records_.size());
      write_tensor(out_, dtype, shape_to_torch(dtype, shape), key);
      records_.push_back({std::move(key), std::move(bytes)});
      return;
    }
    if (type.starts_with("pathlib.")) return static_cast<void>(out_.text(from.at("name").text()));   // which weights_only loads
    throw Error{ErrorCode::unsupported, "an object of the type " + json_quoted(type) + " cannot be written"};
  }
  // Decimal digits to two's complement, little-endian.
  void large_integer(std::string_view text) {
    bool const negative = text.starts_with('-');
    if (negative) text.remove_prefix(1);
    if (text.empty() || text.size() > 600 || text.find_first_not_of("0123456789") != std::string_view::npos) bad_object("the integer " + json_quoted(text));
    Bytes bytes;
    for (char const c : text) {
      auto carry = static_cast<unsigned>(c - '0');
      for (auto& byte : bytes) carry += static_cast<unsigned>(byte) * 10, byte = static_cast<std::byte>(carry & 0xFFu), carry >>= 8;
      if (carry != 0) bytes.push_back(static_cast<std::byte>(carry));
    }
    bytes.push_back(std::byte{0});
    if (negative) {
      unsigned carry = 1;
      for (auto& byte : bytes) carry += ~static_cast<unsigned>(byte) & 0xFFu, byte = static_cast<std::byte>(carry & 0xFFu), carry >>= 8;
    }
    out_.large_integer(bytes);
  }
  void json(dcp::detail::JsonValue const& from) {
    switch (from.kind()) {
      case dcp::detail::JsonNodeKind::null: out_.none(); return;
      case dcp::detail::JsonNodeKind::boolean: out_.boolean(from.boolean()); return;
      case dcp::detail::JsonNodeKind::number: number(from.spelling()); return;
      case dcp::detail::JsonNodeKind::string: out_.text(from.text()); return;
      case dcp::detail::JsonNodeKind::array: list(from); return;
      case dcp::detail::JsonNodeKind::object: break;
    }
    if (from.contains("__type__") && from.at("__type__").is_string()) return typed(from.at("__type__").text(), from);
    auto const members = from.members();
    out_.empty_dict();
    if (members.empty()) return;
    out_.mark();
    for (auto const& [name, member] : members) {
      out_.text(name);
      json(member);
    }
    out_.setitems();
  }

  pickle::Writer& out_;
  std::vector<ObjectRecord>& records_;
};

}  // namespace detail

/// The data.pkl of a value, and the storages of tensors in it. The way back of to_value; per-rank values become a list.
/// Throws    Error(unsupported), Error(bad_schema) for JSON with a "__type__" that cannot be written
template <class = Deferred>
Bytes write_object(Value const& value, std::vector<ObjectRecord>& records) {
  pickle::Writer out;
  detail::ObjectWriter<>{out, records}.value(value);
  return out.take();
}

}  // namespace dcp::torch
