// SPDX-License-Identifier: Apache-2.0
#pragma once
// The header of a safetensors file: which tensor lies where. Bytes to structs and back; files are somebody else's.
//
//   offset 0      8 bytes   N, little-endian
//   offset 8      N bytes   one JSON object: "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, and texts in "__metadata__"
//   offset 8 + N            the tensors back to back, from offset 0 of this section to the end of the file
//
// The reader refuses what the reference parser refuses, in the same order of rules, and what two parsers would read differently.
// The writer gives the bytes of the reference writer, whose order keeps every tensor aligned to its element.
// Source    safetensors crate 0.8 (README, "Format"; its parser's behaviour)

#include <dcp/base/config.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/algorithms.hpp>
#include <dcp/base/text.hpp>
#include <dcp/core/dtype.hpp>
#include <dcp/core/shape.hpp>
#include <dcp/formats/safetensors_reader.hpp>
#include <dcp/formats/strict_json.hpp>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp::safetensors {

/// The reference refuses longer headers, on reading and on writing.
inline constexpr std::uint64_t max_header_bytes = 100'000'000;
struct TensorInfo {
  std::string name;
  DType dtype = DType::u8;
  Extents shape;
  std::uint64_t begin = 0, end = 0;   // bytes, counted from the start of the data section

  friend bool operator==(TensorInfo const&, TensorInfo const&) = default;
};

struct Header {
  std::vector<TensorInfo> tensors;   // in the order of their bytes
  Metadata metadata;
  std::uint64_t data_begin = 8;      // where the data section starts in the file

  template <class = Deferred>
  std::optional<std::string_view> find_metadata(std::string_view key) const {
    auto const found = std::lower_bound(metadata.begin(), metadata.end(), key, [](auto const& entry, std::string_view wanted) { return entry.first < wanted; });
    if (found == metadata.end() || found->first != key) return std::nullopt;
    return found->second;
  }
};

namespace detail {

/// Bytes of a tensor, computed as if its zero dimensions were ones, so that strides cannot overflow either.
template <class = Deferred>
std::uint64_t checked_bytes(DType dtype, std::span<std::int64_t const> sizes) {
  std::uint64_t bits = static_cast<std::uint64_t>(bits_of(dtype));
  bool empty = false;
  for (auto const size : sizes) {
    if (size == 0) empty = true;
    else if (!checked_multiply(bits, static_cast<std::uint64_t>(size), bits))
      throw Error{ErrorCode::overflow, "the size of a tensor in bits does not fit into 64 bits"};
  }
  if (empty) return 0;
  if (bits % 8 != 0) throw Error{ErrorCode::misaligned, "a tensor of " + std::to_string(bits) + " bits, which is no whole number of bytes"};
  return bits / 8;
}

template <class = Deferred>
std::string_view foreign_format(ConstByteSpan first) {
  std::string_view const text = as_text(first);
  if (text.size() >= 2 && text[0] == '\x80' && text[1] >= 2 && text[1] <= 5) return "looks like a pickle (torch.save)";
  if (text.starts_with("GGUF")) return "looks like a GGUF file";
  if (text.starts_with("PK\x03\x04")) return "looks like a zip archive (torch.save)";
  if (text.starts_with("version ")) return "looks like a git-lfs pointer; fetch the file itself with git lfs pull";
  if (text.starts_with("<!") || text.starts_with("<h") || text.starts_with("<H")) return "looks like an HTML page; was the download refused?";
  return {};
}

/// Rules 7 to 11 of the reference for one tensor; `cursor` is where the one before it ended.
template <class = Deferred>
void check_span(std::string_view name, DType dtype, std::span<std::int64_t const> sizes, bool huge, std::uint64_t begin, std::uint64_t end,
                       std::uint64_t cursor) {
  auto const named = [&] { return tensor_called(name) + " at data offsets [" + std::to_string(begin) + ", " + std::to_string(end) + ")"; };
  if (end < begin) throw Error{ErrorCode::bad_offsets, named() + " ends before it begins"};
  if (begin > cursor) throw Error{ErrorCode::bad_offsets, named() + " leaves a hole after byte " + std::to_string(cursor)};
  if (begin < cursor) throw Error{ErrorCode::bad_offsets, named() + " overlaps what ends at byte " + std::to_string(cursor)};
  try {
    if (huge) throw Error{ErrorCode::overflow, "a dimension of 2^63 or more"};
    if (std::uint64_t const bytes = checked_bytes(dtype, sizes); bytes != end - begin)
      throw Error{ErrorCode::size_mismatch, "shape and dtype make " + std::to_string(bytes) + " bytes, the offsets " + std::to_string(end - begin)};
  } catch (Error const& error) {
    throw Error{error.code(), named() + ": " + error.message()};
  }
}

}  // namespace detail

/// Bytes of a tensor in a file.
///
/// Throws    Error(overflow) if the bits of the tensor, zero dimensions left out, do not fit into 64 bits; Error(misaligned) if
///           elements smaller than a byte do not fill whole bytes; Error(unsupported_dtype)
template <class = Deferred>
std::uint64_t tensor_bytes(DType dtype, Extents const& shape) {
  if (!in_safetensors(dtype)) throw Error{ErrorCode::unsupported_dtype, "safetensors has no tensors of " + std::string{to_string(dtype)}};
  return detail::checked_bytes(dtype, {shape.begin(), shape.end()});
}

/// N, the length of the header text of a file of `file_size` bytes that starts with `first8` (all there is, if the file is shorter).
///
/// Throws    Error(truncated), Error(limit), Error(bad_header_length), with a hint where the bytes are those of another format
template <class = Deferred>
std::uint64_t header_bytes(ConstByteSpan first8, std::uint64_t file_size) {
  auto const refused = [&](ErrorCode code, std::string const& problem) {
    Error error{code, problem};
    if (auto const hint = detail::foreign_format(first8); !hint.empty()) error.with_hint(std::string{hint});
    return error.with_range(0, std::min<std::uint64_t>(8, file_size));
  };
  if (file_size < 8) throw refused(ErrorCode::truncated, "a file of " + std::to_string(file_size) + " bytes is too short for safetensors");
  if (first8.size() < 8) throw Error{ErrorCode::invalid_argument, "header_bytes needs the first 8 bytes of the file"};
  auto const n = load_little_endian<std::uint64_t>(first8.data());
  if (n > max_header_bytes) throw refused(ErrorCode::limit, "the header claims " + std::to_string(n) + " bytes; at most 100000000 are allowed");
  if (n > file_size - 8)
    throw refused(ErrorCode::bad_header_length, "the header claims " + std::to_string(n) + " bytes of a file of " + std::to_string(file_size));
  return n;
}

/// The header text `json` (the header_bytes() bytes after the first 8) of a file of `file_size` bytes.
///
/// Throws    Error: bad_utf8, bad_json or limit for the text; bad_schema, duplicate_key, unsupported_dtype or limit (dimensions) for what
///           it says; then, in the order of the bytes, bad_offsets, overflow, misaligned, size_mismatch; last truncated and trailing_data
/// Memory    proportional to the text
template <class = Deferred>
Header parse_header(ConstByteSpan json, std::uint64_t file_size, ParseOptions options = {}) {
  if (json.size() > max_header_bytes) throw Error{ErrorCode::limit, "a header of " + std::to_string(json.size()) + " bytes; at most 100000000 are allowed"};
  if (file_size < 8 || json.size() > file_size - 8)
    throw Error{ErrorCode::bad_header_length, "a header of " + std::to_string(json.size()) + " bytes in a file of " + std::to_string(file_size)};
  detail::HeaderReader reader{options};
  detail::read_json(json, "the header", 8, reader);
  detail::settle_duplicates(reader, options.allow_duplicate_names);

  Header header;
  header.metadata = detail::settled_metadata(std::move(reader.metadata), options.allow_duplicate_names);
  header.data_begin = 8 + json.size();
  auto& tensors = reader.tensors;
  auto const in_order = [](detail::RawTensor const& a, detail::RawTensor const& b) { return a.begin != b.begin ? a.begin < b.begin : a.end < b.end; };
  if (!std::is_sorted(tensors.begin(), tensors.end(), in_order)) std::stable_sort(tensors.begin(), tensors.end(), in_order);
  std::uint64_t cursor = 0;
  for (auto const& tensor : tensors) {
    detail::check_span(reader.name(tensor), tensor.dtype, reader.sizes(tensor), tensor.huge, tensor.begin, tensor.end, cursor);
    cursor = tensor.end;
  }
  std::uint64_t const present = file_size - header.data_begin;
  if (cursor > present)
    throw Error{ErrorCode::truncated,
                "the tensors end at data offset " + std::to_string(cursor) + ", but the file has " + std::to_string(present) + " bytes of data"};
  if (cursor < present && !options.allow_trailing_bytes)
    throw Error{ErrorCode::trailing_data, std::to_string(present - cursor) + " bytes after the last tensor"}.with_range(header.data_begin + cursor, file_size);

  header.tensors.reserve(tensors.size());
  for (auto const& tensor : tensors)
    header.tensors.push_back({std::string{reader.name(tensor)}, tensor.dtype, Extents{reader.sizes(tensor)}, tensor.begin, tensor.end});
  return header;
}

/// Puts `tensors` into the order of the reference writer (widest dtype first, then by name) and gives them their bytes, without gaps.
///
/// Throws    as tensor_bytes; Error(overflow) if the sum does not fit into 64 bits; `tensors` is then unchanged
template <class = Deferred>
void assign_offsets(std::vector<TensorInfo>& tensors) {
  std::vector<std::size_t> order(tensors.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  auto const before = [&](std::size_t a, std::size_t b) { return tensors[a].dtype != tensors[b].dtype ? tensors[a].dtype > tensors[b].dtype : tensors[a].name < tensors[b].name; };
  if (!std::is_sorted(order.begin(), order.end(), before)) std::stable_sort(order.begin(), order.end(), before);
  std::uint64_t cursor = 0;
  std::vector<std::uint64_t> ends;   // all sizes are known to be good before the first tensor moves
  for (auto const index : order) {
    if (!checked_add(cursor, tensor_bytes(tensors[index].dtype, tensors[index].shape), cursor))
      throw Error{ErrorCode::overflow, "the tensors of one file make more than 2^64 bytes"};
    ends.push_back(cursor);
  }
  std::vector<TensorInfo> sorted;
  sorted.reserve(tensors.size());
  for (std::size_t i = 0; i < order.size(); ++i) {
    TensorInfo& tensor = sorted.emplace_back(std::move(tensors[order[i]]));
    tensor.begin = i > 0 ? ends[i - 1] : 0;
    tensor.end = ends[i];
  }
  tensors = std::move(sorted);
}

/// One tensor of a header, whoever keeps its name and shape.
struct TensorLine {
  std::string_view name;
  DType dtype;
  Extents const* shape;
  std::uint64_t begin, end;
};

namespace detail {

template <class = Deferred>
void check_header_length(std::uint64_t bytes) {
  if (bytes > max_header_bytes) throw Error{ErrorCode::limit, "the header would be longer than 100000000 bytes; put the tensors into several files"};
}

/// Appends the JSON of a header to `out`, a std::string or a TextLength. `tensor_at(i)`: a TensorLine, for i below `count`.
template <class Out, class TensorAt>
void append_header(Out& out, std::size_t count, TensorAt tensor_at, Metadata metadata) {
  auto const quoted = [&](std::string_view text) {
    if (first_invalid_utf8(text) != std::string_view::npos) throw Error{ErrorCode::bad_utf8, "a safetensors header holds UTF-8 only; this is not: " + shown(text)};
    append_json_quoted(out, text);
  };
  std::size_t const begin = out.size();
  bool first = true;
  auto const separate = [&] {
    if (!first) out.append(",");
    first = false;
  };
  out.append("{");
  if (!metadata.empty()) {
    out.append("\"__metadata__\":{");
    for (auto const& [key, value] : settled_metadata(std::move(metadata), false)) {
      separate();
      quoted(key);
      out.append(":");
      quoted(value);
    }
    out.append("}");
    first = false;
  }
  std::uint64_t cursor = 0;
  bool sorted = true;
  std::string_view before;
  for (std::size_t i = 0; i < count; ++i) {
    TensorLine const tensor = tensor_at(i);
    Extents const& shape = *tensor.shape;
    if (tensor.name == metadata_key) throw Error{ErrorCode::bad_schema, "no tensor of a safetensors file can be called __metadata__; rename it"};
    check_span(tensor.name, tensor.dtype, {shape.begin(), shape.end()}, false, tensor.begin, tensor.end, cursor);
    cursor = tensor.end;
    sorted = sorted && (i == 0 || before < tensor.name);
    before = tensor.name;
    separate();
    quoted(tensor.name);
    out.append(":{\"dtype\":\"");
    out.append(to_string(tensor.dtype));
    out.append("\",\"shape\":[");
    for (int d = 0; d < shape.rank(); ++d) {
      if (d > 0) out.append(",");
      append_number(out, static_cast<std::uint64_t>(shape[d]));
    }
    out.append("],\"data_offsets\":[");
    append_number(out, tensor.begin);
    out.append(",");
    append_number(out, tensor.end);
    out.append("]}");
    check_header_length(out.size() - begin);
  }
  out.append("}");
  check_header_length(out.size() - begin);
  if (sorted) return;
  std::vector<std::string_view> names;
  names.reserve(count);
  for (std::size_t i = 0; i < count; ++i) names.push_back(tensor_at(i).name);
  dcp::detail::sort(names);
  if (auto const twice = std::adjacent_find(names.begin(), names.end()); twice != names.end())
    throw Error{ErrorCode::duplicate_key, tensor_called(*twice) + " would be in one file twice"};
}

// 8 bytes of length, the text, and spaces up to the alignment.
template <class = Deferred>
std::uint64_t padded_header_bytes(std::uint64_t text, std::uint64_t data_alignment) {
  if (data_alignment < 8 || !std::has_single_bit(data_alignment)) throw Error{ErrorCode::invalid_argument, "data_alignment must be a power of two from 8"};
  std::uint64_t const bytes = round_up(8 + text, data_alignment);
  check_header_length(bytes - 8);
  return bytes;
}

}  // namespace detail

/// The first bytes of a file: length, JSON, and spaces up to the data section, which starts at a multiple of `data_alignment`.
///
/// tensors   in the order of their bytes, without gaps from 0, as assign_offsets leaves them; or tensor_at(i), a TensorLine, for i below count
/// Rule      byte for byte what the reference writes, metadata keys sorted (there their order is random); no metadata: no __metadata__
/// Throws    Error: duplicate_key; bad_schema for a tensor called __metadata__; bad_utf8; bad_offsets, overflow, misaligned or
///           size_mismatch for a wrong span; limit for a header over max_header_bytes; invalid_argument for an alignment that is no
///           power of two from 8
template <class TensorAt>
Bytes write_header(std::size_t count, TensorAt tensor_at, Metadata metadata, std::uint64_t data_alignment) {
  std::string text(8, '\0');
  detail::append_header(text, count, tensor_at, std::move(metadata));
  text.resize(static_cast<std::size_t>(detail::padded_header_bytes(text.size() - 8, data_alignment)), ' ');
  ConstByteSpan const bytes = as_byte_span(text);
  Bytes out(bytes.begin(), bytes.end());
  std::uint64_t const n = text.size() - 8;
  std::memcpy(out.data(), &n, sizeof n);
  return out;
}

template <class = Deferred>
Bytes write_header(std::vector<TensorInfo> const& tensors, Metadata metadata = {}, std::uint64_t data_alignment = 8) {
  return write_header(tensors.size(), [&](std::size_t i) { return TensorLine{tensors[i].name, tensors[i].dtype, &tensors[i].shape, tensors[i].begin, tensors[i].end}; }, std::move(metadata), data_alignment);
}

/// The size of what write_header would return, without the text. Throws the same.
template <class TensorAt>
std::uint64_t header_size(std::size_t count, TensorAt tensor_at, Metadata metadata, std::uint64_t data_alignment) {
  TextLength length;
  detail::append_header(length, count, tensor_at, std::move(metadata));
  return detail::padded_header_bytes(length.size(), data_alignment);
}

/// Where the local tensors of a file lie in the global ones: the text that PyTorch writes as metadata DCP_SHARDING_INFO.
using ShardingInfo = std::map<std::string, std::vector<std::int64_t>, std::less<>>;
inline constexpr std::string_view sharding_info_key = "DCP_SHARDING_INFO";

namespace detail {

class ShardingReader : public JsonReader<ShardingReader> {
 public:
  ShardingInfo info;

  template <class = Deferred>
  void on_key(std::string_view key) {
    if (depth_ == 1) {
      auto const [entry, fresh] = info.try_emplace(std::string{key});
      if (!fresh) fault(ErrorCode::duplicate_key, "DCP_SHARDING_INFO has " + tensor_called(key) + " twice");
      entry_ = &*entry;
      has_offsets_ = false;
    } else {
      wanted_ = key == "saved_offsets";
      if (wanted_ && has_offsets_) fault(ErrorCode::duplicate_key, "DCP_SHARDING_INFO has saved_offsets twice for " + tensor_called(entry_->first));
    }
  }
  template <class = Deferred>
  void on_open(bool object) {
    if (depth_ == 2 && !wanted_) return skip();   // what later versions may add
    if (object != (depth_ < 2) || depth_ > 2) return fault(ErrorCode::bad_schema, wrong());
    if (depth_ == 2) has_offsets_ = true;
    ++depth_;
  }
  template <class = Deferred>
  void on_close() {
    if (--depth_ == 1 && !has_offsets_) fault(ErrorCode::bad_schema, wrong());
  }
  template <class = Deferred>
  void on_scalar(JsonScalar const& scalar) {
    if (depth_ == 2 && !wanted_) return;
    if (depth_ != 3 || scalar.kind != JsonKind::natural) return fault(ErrorCode::bad_schema, wrong());
    if (scalar.natural > INT64_MAX) return fault(ErrorCode::overflow, "DCP_SHARDING_INFO has an offset of 2^63 or more for " + tensor_called(entry_->first));
    if (entry_->second.size() == max_rank) return fault(ErrorCode::limit, "DCP_SHARDING_INFO has more than 16 offsets for " + tensor_called(entry_->first));
    entry_->second.push_back(static_cast<std::int64_t>(scalar.natural));
  }

 private:
  template <class = Deferred>
  std::string wrong() const {
    return "DCP_SHARDING_INFO is not {\"name\": {\"saved_offsets\": [0, ...]}, ...}" +
           (entry_ == nullptr ? std::string{} : " at " + tensor_called(entry_->first));
  }

  int depth_ = 0;   // of what is reported: the map, one tensor, its offsets
  bool wanted_ = false, has_offsets_ = false;
  ShardingInfo::value_type* entry_ = nullptr;
};

}  // namespace detail

/// Throws    Error: bad_schema (also for text that is no JSON), duplicate_key, overflow for an offset of 2^63 or more, limit
/// Source    torch.distributed.checkpoint, HuggingFaceStorageWriter: {"name": {"saved_offsets": [2, 0]}, ...}
template <class = Deferred>
ShardingInfo parse_sharding_info(std::string_view json) {
  detail::ShardingReader reader;
  try {
    detail::read_json(as_byte_span(json), sharding_info_key, 0, reader);
  } catch (Error const& error) {
    if (error.code() != ErrorCode::bad_json && error.code() != ErrorCode::bad_utf8) throw;
    throw Error{ErrorCode::bad_schema, error.message()};
  }
  return std::move(reader.info);
}

/// Byte for byte what Python's json.dumps makes of the same names in sorted order. Throws Error(bad_utf8).
template <class = Deferred>
std::string write_sharding_info(ShardingInfo const& info) {
  std::string text{'{'};
  for (auto const& [name, offsets] : info) {
    if (text.size() > 1) text += ", ";
    text += detail::python_quoted(name) + ": {\"saved_offsets\": [";
    for (std::size_t d = 0; d < offsets.size(); ++d) (text += d > 0 ? ", " : "") += std::to_string(offsets[d]);
    text += "]}";
  }
  return text += '}';
}

/// The offsets of `tensor`, one of a file with this `info`.
///
/// Throws    Error: index_mismatch if it is not listed, bad_schema for another number of dimensions, overflow if the box it makes
///           ends beyond 2^63 - 1
template <class = Deferred>
std::vector<std::int64_t> const& saved_offsets(ShardingInfo const& info, TensorInfo const& tensor) {
  auto const found = info.find(tensor.name);
  if (found == info.end())
    throw Error{ErrorCode::index_mismatch, "DCP_SHARDING_INFO does not list " + detail::tensor_called(tensor.name) + " of the same file"};
  auto const& offsets = found->second;
  if (static_cast<int>(offsets.size()) != tensor.shape.rank())
    throw Error{ErrorCode::bad_schema, "DCP_SHARDING_INFO has " + std::to_string(offsets.size()) + " offsets for " + detail::tensor_called(tensor.name) +
                                           " of shape " + to_string(tensor.shape)};
  for (int d = 0; d < tensor.shape.rank(); ++d)
    if (offsets[static_cast<std::size_t>(d)] > INT64_MAX - tensor.shape[d])
      throw Error{ErrorCode::overflow, "DCP_SHARDING_INFO puts " + detail::tensor_called(tensor.name) + " beyond 2^63 elements"};
  return offsets;
}

}  // namespace dcp::safetensors
