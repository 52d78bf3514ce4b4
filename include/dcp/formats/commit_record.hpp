// SPDX-License-Identifier: Apache-2.0
#pragma once
// dcp.json, the commit record: what a checkpoint consists of, and that it is complete. A directory whose record says "committed" and
// whose files have the sizes and checksums listed there is a checkpoint, wherever it was copied.
//
// The file is JSON. Its first line holds the CRC-64/NVME of everything after that line, so that a changed byte in a value or in the
// list of files is noticed like one in the data. dcp.crc, beside it, holds the chunk checksums of the data files: 8 bytes each,
// little-endian, the tables of the files in the order of the list.

#include <dcp/base/config.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/checksum.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/text.hpp>
#include <dcp/core/shape.hpp>
#include <dcp/core/value.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp {

inline constexpr std::string_view record_name = "dcp.json";
inline constexpr std::string_view checksums_name = "dcp.crc";
inline constexpr std::string_view values_name = "dcp.values";   // values too large for the record
inline constexpr std::string_view lease_name = "dcp.lease";
inline constexpr int record_format = 1;                          // readers refuse records of a larger number
inline constexpr std::uint64_t chunk_bytes = 1 << 20;            // of data per checksum; a fixed part of the format
inline constexpr std::uint64_t most_record_bytes = std::uint64_t{1} << 30;
inline constexpr std::size_t inline_value_bytes = 16 << 10;      // values above it go to dcp.values

struct RecordFile {
  std::string path;
  std::uint64_t size = 0;
  std::uint64_t crc = 0;            // of the whole file
  std::uint64_t table_crc = 0;      // of its chunk checksums
  bool data = false;                // holds tensors; the others are indexes, values, and files that were copied in
  std::uint64_t chunks() const { return ceil_div(size, chunk_bytes); }
};
/// A group of names that lives in a directory of its own.
struct RecordGroup {
  std::string prefix;      // of the names, whole components
  std::string directory;   // "" is the checkpoint's own
  bool strip = false;      // whether the files hold the names without the prefix
  friend bool operator==(RecordGroup const&, RecordGroup const&) = default;
};
/// Nothing of how it lay over ranks stands in the record: the same state gives the same record on any mesh.
struct RecordTensor {
  std::string name;
  DType dtype{};
  Extents shape;
};
struct CommitRecord {
  std::string id;                   // 16 hexadecimal digits, random
  std::uint64_t sequence = 0;       // grows with every save to a place
  bool committed = false;
  std::string storage;              // "safetensors"
  std::string file_layout;          // "final", "sharded"
  std::vector<RecordFile> files;    // sorted by path
  std::vector<RecordGroup> groups;
  std::vector<RecordTensor> tensors;
  std::vector<std::pair<std::string, Value>> values;
  std::vector<std::pair<std::string, std::string>> ties;   // dropped, kept
};

namespace detail {

// Numbers keep their bits: floats are written as the double of the same value, infinities and NaNs as their bits.
template <class = Deferred>
std::string exact_numbers(Value const& value) {
  std::string out;
  with_number_type(value.dtype, [&](auto type) {
    using T = decltype(type);
    for (std::size_t at = 0; at + sizeof(T) <= value.payload.size(); at += sizeof(T)) {
      if (!out.empty()) out += ',';
      if constexpr (std::is_same_v<T, bool>) out += value.payload[at] != std::byte{0} ? "true" : "false";
      else if constexpr (std::is_same_v<T, float>) {
        float const x = load_little_endian<float>(value.payload.data() + at);
        out += std::isfinite(x) ? number_to_json(static_cast<double>(x)) : number_to_json(x);
      } else out += number_to_json(load_little_endian<T>(value.payload.data() + at));
    }
  });
  return out;
}

template <class = Deferred>
bool parse_bits(std::string const& text, std::size_t digits, std::uint64_t& bits) {
  return text.size() == digits + 2 && text.starts_with("0x") && parse_hex16(std::string(16 - digits, '0') + text.substr(2), bits);
}

template <class = Deferred>
[[noreturn]] void bad_record(std::string const& what) { throw Error{ErrorCode::bad_schema, "the commit record is not as this library writes it: " + what}; }

// Whoever can write a record must not thereby make others read outside the checkpoint.
template <class = Deferred>
void require_inside(std::string const& path) {
  bool safe = !path.empty() && path.find('\0') == std::string::npos && path.find('\\') == std::string::npos;
  for (std::size_t at = 0; safe && at <= path.size();) {
    auto const slash = std::min(path.find('/', at), path.size());
    auto const part = std::string_view{path}.substr(at, slash - at);
    safe = !part.empty() && part != "." && part != "..";
    at = slash + 1;
  }
  if (!safe) throw Error{ErrorCode::unsafe_path, "the commit record lists the file " + json_quoted(path) + ", which does not stay inside the checkpoint"};
}

template <class = Deferred>
void append_number(nlohmann::json const& item, DType dtype, Bytes& out) {
  bool fits = false;
  with_number_type(dtype, [&](auto type) {
    using T = decltype(type);
    T number{};
    if constexpr (std::is_same_v<T, bool>) {
      if (!(fits = item.is_boolean())) return;
      out.push_back(item.get<bool>() ? std::byte{1} : std::byte{0});
      return;
    } else if constexpr (std::is_floating_point_v<T>) {
      std::uint64_t bits = 0;
      if (item.is_string() && parse_bits(item.get_ref<std::string const&>(), 2 * sizeof(T), bits)) {
        std::memcpy(&number, &bits, sizeof number);
        fits = true;
      } else if ((fits = item.is_number())) {
        number = static_cast<T>(item.get<double>());
      }
    } else if constexpr (std::is_signed_v<T>) {
      if (item.is_number_integer() && (!item.is_number_unsigned() || item.get<std::uint64_t>() <= static_cast<std::uint64_t>(INT64_MAX))) {
        auto const wide = item.get<std::int64_t>();
        number = static_cast<T>(wide);
        fits = number == wide;
      }
    } else {
      if (item.is_number_unsigned()) {
        auto const wide = item.get<std::uint64_t>();
        number = static_cast<T>(wide);
        fits = number == wide;
      }
    }
    auto const bytes = std::as_bytes(std::span{&number, 1});
    out.insert(out.end(), bytes.begin(), bytes.end());
  });
  if (!fits) bad_record("a number of type " + std::string{to_string(dtype)} + " is " + item.dump());
}

template <class = Deferred>
Bytes parse_hex_text(std::string const& text) {
  auto const digit = [](char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1; };
  Bytes bytes;
  if (text.size() % 2 != 0) bad_record("an odd number of hexadecimal digits");
  bytes.reserve(text.size() / 2);
  for (std::size_t i = 0; i < text.size(); i += 2) {
    if (digit(text[i]) < 0 || digit(text[i + 1]) < 0) bad_record("a byte that is not hexadecimal");
    bytes.push_back(static_cast<std::byte>(digit(text[i]) * 16 + digit(text[i + 1])));
  }
  return bytes;
}

// A value's fields, without the braces. Large payloads go to `large` instead.
template <class = Deferred>
std::string value_fields(Value const& value, Bytes& large) {
  std::string out = "\"kind\":\"" + std::string{to_string(value.kind)} + '"';
  if (value.kind == ValueKind::number || value.kind == ValueKind::array) out += ",\"dtype\":\"" + std::string{to_string(value.dtype)} + '"';
  if (value.kind == ValueKind::per_rank) {
    out += ",\"ranks\":[";
    for (std::size_t r = 0; r < value.ranks.size(); ++r) out += (r > 0 ? "," : "") + ("{" + value_fields(value.ranks[r], large) + "}");
    return out + ']';
  }
  if (value.payload.size() > inline_value_bytes) {
    out += ",\"at\":[" + std::to_string(large.size()) + ',' + std::to_string(value.payload.size()) + ']';
    large.insert(large.end(), value.payload.begin(), value.payload.end());
    return out;
  }
  out += ",\"value\":";
  switch (value.kind) {
    case ValueKind::number: return out + exact_numbers(value);
    case ValueKind::array: return out + '[' + exact_numbers(value) + ']';
    case ValueKind::bytes: return out + '"' + hex_text(value.payload) + '"';
    default: return out + json_quoted(as_text(value.payload));   // text; a JSON document as text, so that its own spelling is kept
  }
}

template <class = Deferred>
Value parse_value(nlohmann::json const& from, ConstByteSpan large) {
  Value value;
  auto const kind = from.at("kind").get<std::string>();
  auto const known = std::find(value_kind_names.begin(), value_kind_names.end(), kind);
  if (known == value_kind_names.end()) bad_record("a value of kind " + kind);
  value.kind = static_cast<ValueKind>(known - value_kind_names.begin());
  if (from.contains("dtype") && !parse_dtype(from.at("dtype").get<std::string>(), value.dtype)) bad_record("a value of dtype " + from.at("dtype").dump());
  if (value.kind == ValueKind::per_rank) {
    for (auto const& one : from.at("ranks")) value.ranks.push_back(parse_value(one, large));
    return value;
  }
  if (from.contains("at")) {
    auto const offset = from.at("at").at(0).get<std::uint64_t>(), size = from.at("at").at(1).get<std::uint64_t>();
    if (offset > large.size() || size > large.size() - offset) bad_record("a value lies outside " + std::string{values_name});
    auto const payload = large.subspan(static_cast<std::size_t>(offset), static_cast<std::size_t>(size));
    value.payload.assign(payload.begin(), payload.end());
    return value;
  }
  auto const& item = from.at("value");
  if (value.kind == ValueKind::number) append_number(item, value.dtype, value.payload);
  else if (value.kind == ValueKind::array) for (auto const& number : item) append_number(number, value.dtype, value.payload);
  else if (value.kind == ValueKind::bytes) value.payload = parse_hex_text(item.get_ref<std::string const&>());
  else {
    auto const text = as_byte_span(item.get_ref<std::string const&>());
    value.payload.assign(text.begin(), text.end());
  }
  return value;
}

template <class = Deferred>
std::string numbers_text(Extents const& extents) {
  std::string out{'['};
  for (int d = 0; d < extents.rank(); ++d) out += (d > 0 ? "," : "") + std::to_string(extents[d]);
  return out + ']';
}

template <class = Deferred>
std::vector<std::int64_t> integers(nlohmann::json const& list, std::size_t most) {
  if (!list.is_array() || list.size() > most) bad_record("a shape is too long or no list");
  std::vector<std::int64_t> result;
  for (auto const& item : list) {
    if (!item.is_number_integer()) bad_record("a size is " + item.dump());
    result.push_back(item.get<std::int64_t>());
  }
  return result;
}
}  // namespace detail

/// The record as the bytes of dcp.json. `large` receives the payloads that belong into dcp.values. Deterministic.
template <class = Deferred>
Bytes write_record(CommitRecord const& record, Bytes& large) {
  std::string out;
  auto const field = [&](std::string_view name) -> std::string& { return out += ",\n \"" + std::string{name} + "\": "; };
  out += " \"format\": " + std::to_string(record_format);
  field("id") += json_quoted(record.id);
  field("sequence") += std::to_string(record.sequence);
  field("state") += record.committed ? "\"committed\"" : "\"open\"";
  field("storage") += json_quoted(record.storage);
  field("file_layout") += json_quoted(record.file_layout);
  field("chunk_bytes") += std::to_string(chunk_bytes);
  auto const list = [&](std::string_view name, auto const& items, auto line) {
    field(name) += '[';
    bool first = true;
    for (auto const& item : items) {
      out += first ? "\n  " : ",\n  ";
      first = false;
      line(item);
    }
    out += first ? "]" : "\n ]";
  };
  list("files", record.files, [&](RecordFile const& f) {
    out += "{\"path\":" + json_quoted(f.path) + ",\"size\":" + std::to_string(f.size) + ",\"crc64\":\"" + hex16(f.crc) + "\",\"chunks_crc64\":\"" + hex16(f.table_crc) + (f.data ? "\",\"data\":true}" : "\"}");
  });
  list("groups", record.groups, [&](RecordGroup const& g) {
    out += "{\"prefix\":" + json_quoted(g.prefix) + ",\"directory\":" + json_quoted(g.directory) + ",\"strip\":" + (g.strip ? "true" : "false") + "}";
  });
  list("tensors", record.tensors, [&](RecordTensor const& t) {
    out += "{\"name\":" + json_quoted(t.name) + ",\"dtype\":\"" + std::string{to_string(t.dtype)} + "\",\"shape\":" + detail::numbers_text(t.shape) + '}';
  });
  list("values", record.values, [&](auto const& v) { out += "{\"name\":" + json_quoted(v.first) + ',' + detail::value_fields(v.second, large) + '}'; });
  list("ties", record.ties, [&](auto const& t) { out += '[' + json_quoted(t.first) + ',' + json_quoted(t.second) + ']'; });
  out += "\n}\n";
  std::string const text = "{\"dcp_crc64\": \"" + hex16(crc64(as_byte_span(out))) + "\",\n" + out;
  auto const bytes = as_byte_span(text);
  return Bytes(bytes.begin(), bytes.end());
}

/// Reads dcp.json. `large`: the bytes of dcp.values, if the record lists that file; pass nothing to learn only what files there are.
///
/// Throws    Error(bad_json, bad_schema, bad_version, corrupt)
template <class = Deferred>
CommitRecord parse_record(ConstByteSpan bytes, ConstByteSpan large, bool with_values = true) {
  auto const text = as_text(bytes);
  if (first_invalid_utf8(text) != std::string_view::npos) throw Error{ErrorCode::bad_utf8, "the commit record is not UTF-8"};
  nlohmann::json json;
  try {
    json = nlohmann::json::parse(text);
  } catch (nlohmann::json::exception const& error) {
    throw Error{ErrorCode::bad_json, std::string{"the commit record is not JSON: "} + error.what()};
  }
  try {
    if (!json.is_object() || !json.contains("dcp_crc64") || !json.contains("format")) detail::bad_record("it is JSON of another kind");
    if (json.at("format").get<std::int64_t>() > record_format)
      throw Error{ErrorCode::bad_version, "the checkpoint has record format " + json.at("format").dump() + ", and this library reads up to " + std::to_string(record_format)}.with_hint("read it with a newer version of dcp");
    auto const line = text.find('\n');
    std::uint64_t crc = 0;
    if (line == std::string_view::npos || !parse_hex16(json.at("dcp_crc64").get<std::string>(), crc)) detail::bad_record("it does not begin with its checksum");
    if (crc != crc64(as_byte_span(text.substr(line + 1)))) throw Error{ErrorCode::corrupt, "the commit record does not have the checksum that stands in its first line"};
    if (json.at("chunk_bytes").get<std::uint64_t>() != chunk_bytes) detail::bad_record("chunks of another size");
    CommitRecord record;
    record.id = json.at("id").get<std::string>();
    record.sequence = json.at("sequence").get<std::uint64_t>();
    record.committed = json.at("state").get<std::string>() == "committed";
    record.storage = json.at("storage").get<std::string>();
    record.file_layout = json.at("file_layout").get<std::string>();
    for (auto const& f : json.at("files")) {
      RecordFile file{f.at("path").get<std::string>(), f.at("size").get<std::uint64_t>(), 0, 0, f.value("data", false)};
      detail::require_inside(file.path);
      if (!record.files.empty() && file.path <= record.files.back().path) detail::bad_record("its files are not sorted by path, each once");
      if (!parse_hex16(f.at("crc64").get<std::string>(), file.crc) || !parse_hex16(f.at("chunks_crc64").get<std::string>(), file.table_crc)) detail::bad_record("a checksum");
      record.files.push_back(std::move(file));
    }
    for (auto const& g : json.at("groups")) record.groups.push_back({g.at("prefix").get<std::string>(), g.at("directory").get<std::string>(), g.at("strip").get<bool>()});
    for (auto const& t : json.at("tensors")) {
      RecordTensor tensor;
      tensor.name = t.at("name").get<std::string>();
      if (!parse_dtype(t.at("dtype").get<std::string>(), tensor.dtype)) detail::bad_record("a tensor of dtype " + t.at("dtype").dump());
      tensor.shape = Extents{detail::integers(t.at("shape"), max_rank)};
      record.tensors.push_back(std::move(tensor));
    }
    if (with_values)
      for (auto const& v : json.at("values")) record.values.emplace_back(v.at("name").get<std::string>(), detail::parse_value(v, large));
    for (auto const& t : json.at("ties")) record.ties.emplace_back(t.at(0).get<std::string>(), t.at(1).get<std::string>());
    return record;
  } catch (nlohmann::json::exception const& error) {
    detail::bad_record(error.what());
  }
}

}  // namespace dcp
