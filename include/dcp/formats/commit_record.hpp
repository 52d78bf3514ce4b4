// SPDX-License-Identifier: Apache-2.0
#pragma once
// dcp.json, the commit record: what a checkpoint consists of, and that it is complete. A directory whose record says "committed" and
// whose files have the sizes and checksums listed there is a checkpoint, wherever it was copied.
//
// On media that rename directories the files lie beside the record. On others they lie in a directory below it that the record names, a fresh one
// for every save, and the record is written when all of them are there; a copy of the whole is a checkpoint on any medium.
//
// The file is JSON. Its first line holds the CRC-64/NVME of everything after that line and nothing else, so that a changed byte anywhere
// is noticed like one in the data. dcp.crc, beside it, holds the chunk checksums of the data files: 8 bytes each,
// little-endian, the tables of the files in the order of the list.

#include <dcp/base/config.hpp>
#include <dcp/base/algorithms.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/checksum.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/text.hpp>
#include <dcp/core/shape.hpp>
#include <dcp/core/value.hpp>
#include <dcp/formats/json_tree.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace dcp {

inline constexpr std::string_view record_name = "dcp.json";
inline constexpr std::string_view checksums_name = "dcp.crc";
inline constexpr std::string_view values_name = "dcp.values";   // values too large for the record
inline constexpr std::string_view lease_name = "dcp.lease";
inline constexpr int record_format = 2;                          // readers refuse records of a larger number; 1: the files lie beside the record
inline constexpr std::uint64_t chunk_bytes = 1 << 20;            // of data per checksum; a fixed part of the format
inline constexpr std::uint64_t most_record_bytes = std::uint64_t{1} << 30;
inline constexpr std::size_t inline_value_bytes = 16 << 10;      // values above it go to dcp.values

struct RecordFile {
  std::string path;
  std::uint64_t size = 0;
  std::uint64_t crc = 0;            // of the whole file
  std::uint64_t table_crc = 0;      // of its chunk checksums
  bool data = false;                // holds tensors; the others are indexes, values, and files that were copied in
  bool summed = true;               // false: saved without checksums, so that its bytes cannot be verified
  std::uint64_t chunks() const { return summed ? ceil_div(size, chunk_bytes) : 0; }
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
/// Of a checkpoint that a manager keeps: where in a training run it stands.
struct RecordRun {
  std::int64_t step = -1;           // -1: no manager's
  bool measured = false;
  double metric = 0;                // if measured: what keep_best compares
  friend bool operator==(RecordRun const&, RecordRun const&) = default;
};
struct CommitRecord {
  std::string id;                   // 16 hexadecimal digits, random
  std::uint64_t sequence = 0;       // grows with every save to a place; with every save of a manager to any step
  bool committed = false;
  std::string storage;              // "safetensors"
  std::string file_layout;          // "final", "sharded"
  std::string directory;            // that files are relative to, below that of the record; "" is the same
  std::vector<RecordFile> files;    // sorted by path
  std::vector<RecordGroup> groups;
  std::vector<RecordTensor> tensors;
  std::vector<std::pair<std::string, Value>> values;
  std::vector<std::pair<std::string, std::string>> ties;   // dropped, kept
  RecordRun run;
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
bool parse_bits(std::string_view text, std::size_t digits, std::uint64_t& bits) {
  return text.size() == digits + 2 && text.starts_with("0x") && parse_hex16(std::string(16 - digits, '0') += text.substr(2), bits);
}

template <class = Deferred>
[[noreturn]] void bad_record(std::string what) { throw Error{ErrorCode::bad_schema, std::move(what)}; }   // parse_record says of what

// Whoever can write a record, or another list of files, must not thereby make others read outside the checkpoint.
template <class = Deferred>
void require_inside(std::string const& path, std::string const& list = "the commit record") {
  bool safe = !path.empty() && path.find('\0') == std::string::npos && path.find('\\') == std::string::npos;
  for (std::size_t at = 0; safe && at <= path.size();) {
    auto const slash = std::min(path.find('/', at), path.size());
    auto const part = std::string_view{path}.substr(at, slash - at);
    safe = !part.empty() && part != "." && part != "..";
    at = slash + 1;
  }
  if (!safe) throw Error{ErrorCode::unsafe_path, list + " lists " + json_quoted(path) + ", which does not stay inside the checkpoint"};
}

template <class = Deferred>
void append_number(JsonValue const& item, DType dtype, Bytes& out) {
  bool fits = false;
  with_number_type(dtype, [&](auto type) {
    using T = decltype(type);
    T number{};
    if constexpr (std::is_same_v<T, bool>) {
      out.push_back(item.boolean() ? std::byte{1} : std::byte{0});
      fits = true;
    } else {
      if constexpr (std::is_floating_point_v<T>) {
        if (std::uint64_t bits = 0; item.is_string() && parse_bits(item.text(), 2 * sizeof(T), bits)) {
          std::memcpy(&number, &bits, sizeof number);
          fits = true;
        }
      }
      fits = fits || item.number(number);   // a float was written as the double of the same value: its text is nearest to that float, too
      auto const bytes = std::as_bytes(std::span{&number, 1});
      append(out, bytes);
    }
  });
  if (!fits) bad_record("a number of type " + std::string{to_string(dtype)} + " is " + shown(item.spelling()));
}

template <class = Deferred>
Bytes parse_hex_text(std::string_view text) {
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
    append(large, value.payload);
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
DType parse_dtype_of(JsonValue const& from) {
  DType dtype{};
  if (auto const name = from.at("dtype").text(); !parse_dtype(name, dtype)) bad_record("the unknown dtype " + shown(name));
  return dtype;
}

template <class = Deferred>
Value parse_value(JsonValue const& from, ConstByteSpan large) {
  Value value;
  auto const kind = from.at("kind").text();
  auto const known = std::find(value_kind_names.begin(), value_kind_names.end(), kind);
  if (known == value_kind_names.end()) bad_record("a value of the unknown kind " + shown(kind));
  value.kind = static_cast<ValueKind>(known - value_kind_names.begin());
  bool const numbers = value.kind == ValueKind::number || value.kind == ValueKind::array;
  std::uint64_t element_bytes = 1;
  if (numbers) {
    value.dtype = parse_dtype_of(from);
    if (!with_number_type(value.dtype, [&](auto type) { element_bytes = sizeof type; })) bad_record("a value of dtype " + std::string{to_string(value.dtype)});
  }
  if (value.kind == ValueKind::per_rank) {
    for (auto const& one : from.at("ranks").items()) value.ranks.push_back(parse_value(one, large));
    return value;
  }
  if (from.contains("at")) {
    auto const at = from.at("at").items();
    if (at.size() != 2) bad_record("a value at no pair of numbers");
    auto const offset = at[0].template number<std::uint64_t>(), size = at[1].template number<std::uint64_t>();
    if (offset > large.size() || size > large.size() - offset) bad_record("a value lies outside " + std::string{values_name});
    if (value.kind == ValueKind::number || size % element_bytes != 0) bad_record("a value of the wrong size in " + std::string{values_name});
    auto const payload = large.subspan(static_cast<std::size_t>(offset), static_cast<std::size_t>(size));
    if (numbers && value.dtype == DType::boolean && std::any_of(payload.begin(), payload.end(), [](std::byte byte) { return byte > std::byte{1}; }))
      bad_record("a bool in " + std::string{values_name} + " that is neither 0 nor 1");   // which C++ has no meaning for
    value.payload.assign(payload.begin(), payload.end());
    return value;
  }
  auto const item = from.at("value");
  if (value.kind == ValueKind::number) append_number(item, value.dtype, value.payload);
  else if (value.kind == ValueKind::array) for (auto const& number : item.items()) append_number(number, value.dtype, value.payload);
  else if (value.kind == ValueKind::bytes) value.payload = parse_hex_text(item.text());
  else {
    auto const text = as_byte_span(item.text());
    value.payload.assign(text.begin(), text.end());
  }
  return value;
}

template <class = Deferred>
std::string numbers_text(Extents const& extents) {
  std::string out{'['};
  for (int d = 0; d < extents.rank(); ++d) {
    if (d > 0) out += ',';
    out += std::to_string(extents[d]);
  }
  out += ']';
  return out;
}

template <class = Deferred>
Extents parse_shape(JsonValue const& list) {
  std::vector<std::int64_t> sizes;
  for (auto const& item : list.items()) sizes.push_back(item.template number<std::int64_t>());
  if (sizes.size() > max_rank || std::any_of(sizes.begin(), sizes.end(), [](auto size) { return size < 0; })) bad_record("a shape of too many or negative sizes");
  return Extents{sizes};
}

template <class = Deferred>
std::string first_line(std::uint64_t crc) { return "{\"dcp_crc64\": \"" + hex16(crc) + "\",\n"; }

template <class = Deferred>
CommitRecord parse_fields(JsonValue const& json, ConstByteSpan large, bool with_values) {
  auto const text = [](JsonValue const& from, std::string_view name) { return std::string{from.at(name).text()}; };
  auto const checksum = [](JsonValue const& from, std::string_view name) {
    std::uint64_t crc = 0;
    if (!parse_hex16(from.at(name).text(), crc)) bad_record("a checksum that is not 16 hexadecimal digits");
    return crc;
  };
  if (json.at("chunk_bytes").template number<std::uint64_t>() != chunk_bytes) bad_record("chunks of another size");
  CommitRecord record;
  record.id = text(json, "id");
  record.sequence = json.at("sequence").template number<std::uint64_t>();
  record.committed = text(json, "state") == "committed";
  record.storage = text(json, "storage");
  record.file_layout = text(json, "file_layout");
  if (json.contains("directory")) require_inside(record.directory = text(json, "directory"));
  if (json.contains("step")) record.run.step = json.at("step").template number<std::int64_t>();
  if (json.contains("metric")) record.run.measured = true, record.run.metric = json.at("metric").template number<double>();
  for (auto const& f : json.at("files").items()) {
    bool const summed = f.contains("crc64");
    RecordFile file{text(f, "path"), f.at("size").template number<std::uint64_t>(), summed ? checksum(f, "crc64") : 0, summed ? checksum(f, "chunks_crc64") : 0,
                    f.contains("data") && f.at("data").boolean(), summed};
    require_inside(file.path);
    if (!record.files.empty() && file.path <= record.files.back().path) bad_record("its files are not sorted by path, each once");
    record.files.push_back(std::move(file));
  }
  for (auto const& g : json.at("groups").items()) record.groups.push_back({text(g, "prefix"), text(g, "directory"), g.at("strip").boolean()});
  for (auto const& t : json.at("tensors").items()) record.tensors.push_back({text(t, "name"), parse_dtype_of(t), parse_shape(t.at("shape"))});
  if (with_values)
    for (auto const& v : json.at("values").items()) record.values.emplace_back(text(v, "name"), parse_value(v, large));
  for (auto const& t : json.at("ties").items()) {
    auto const names = t.items();
    if (names.size() != 2) bad_record("a tie of no pair of names");
    record.ties.emplace_back(names[0].text(), names[1].text());
  }
  return record;
}
}  // namespace detail

/// The record as the bytes of dcp.json. `large` receives the payloads that belong into dcp.values. Deterministic.
template <class = Deferred>
Bytes write_record(CommitRecord const& record, Bytes& large) {
  std::string out;
  auto const field = [&](std::string_view name) -> std::string& { return out += ",\n \"" + std::string{name} + "\": "; };
  out += " \"format\": " + std::to_string(record.directory.empty() ? 1 : record_format);   // what older readers can read is of the older format
  field("id") += json_quoted(record.id);
  field("sequence") += std::to_string(record.sequence);
  field("state") += record.committed ? "\"committed\"" : "\"open\"";
  field("storage") += json_quoted(record.storage);
  field("file_layout") += json_quoted(record.file_layout);
  if (!record.directory.empty()) field("directory") += json_quoted(record.directory);
  if (record.run.step >= 0) field("step") += std::to_string(record.run.step);
  if (record.run.measured) field("metric") += detail::number_to_json(record.run.metric);
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
    out += "{\"path\":" + json_quoted(f.path) + ",\"size\":" + std::to_string(f.size);
    if (f.summed) out += ",\"crc64\":\"" + hex16(f.crc) + "\",\"chunks_crc64\":\"" + hex16(f.table_crc) + '"';
    out += f.data ? ",\"data\":true}" : "}";
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
  std::string const text = detail::first_line(crc64(as_byte_span(out))) + out;
  auto const bytes = as_byte_span(text);
  return Bytes(bytes.begin(), bytes.end());
}

/// What belongs into dcp.values: the payloads of the record's large values, one after the other; nothing if all are in the record.
template <class = Deferred>
Bytes large_values(CommitRecord const& record) {
  Bytes large;
  for (auto const& value : record.values) static_cast<void>(detail::value_fields(value.second, large));
  return large;
}

/// Reads dcp.json. `large`: the bytes of dcp.values, if the record lists that file; pass nothing to learn only what files there are.
///
/// Throws    Error(bad_utf8, bad_json, limit, bad_schema, bad_version, corrupt, unsafe_path)
template <class = Deferred>
CommitRecord parse_record(ConstByteSpan bytes, ConstByteSpan large, bool with_values = true) {
  auto const tree = detail::JsonTree::parse(bytes, "the commit record");
  auto const json = tree.root();
  try {
    if (json.kind() != detail::JsonNodeKind::object || !json.contains("dcp_crc64") || !json.contains("format")) detail::bad_record("it is JSON of another kind");
    // Before the checksum: what a later format's is of is not known here.
    auto const format = json.at("format");
    if (format.template number<std::uint64_t>() == 0) detail::bad_record("it has the format 0");
    if (format.template number<std::uint64_t>() > record_format)
      throw Error{ErrorCode::bad_version, "the checkpoint has record format " + std::string{format.spelling()} + ", and this library reads up to " + std::to_string(record_format)}.with_hint("read it with a newer version of dcp");
    auto const text = as_text(bytes);
    auto const line = text.find('\n');
    std::uint64_t crc = 0;
    if (!parse_hex16(json.at("dcp_crc64").text(), crc) || line == std::string_view::npos || text.substr(0, line + 1) != detail::first_line(crc))
      detail::bad_record("it does not begin with its checksum");
    if (crc != crc64(as_byte_span(text.substr(line + 1)))) throw Error{ErrorCode::corrupt, "the commit record does not have the checksum that stands in its first line"};
    return detail::parse_fields(json, large, with_values);
  } catch (Error const& error) {
    if (error.code() != ErrorCode::bad_schema) throw;
    throw Error{ErrorCode::bad_schema, "the commit record is not as this library writes it: " + error.message()};
  }
}

}  // namespace dcp
