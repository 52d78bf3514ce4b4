// SPDX-License-Identifier: Apache-2.0
#pragma once
// What the JSON of a safetensors header says, before anybody asks whether its numbers fit together: see safetensors_header.hpp.

#include <dcp/base/config.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/algorithms.hpp>
#include <dcp/core/dtype.hpp>
#include <dcp/core/shape.hpp>
#include <dcp/formats/strict_json.hpp>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp::safetensors {

/// The one key of the header that is no tensor.
inline constexpr std::string_view metadata_key = "__metadata__";

/// Texts beside the tensors, sorted by key.
using Metadata = std::vector<std::pair<std::string, std::string>>;

/// Each option gives up one refusal, or adds one. The reference accepts duplicate names and unknown fields, and refuses trailing bytes.
struct ParseOptions {
  bool allow_duplicate_names = false;    // of tensors and of metadata keys: the last one counts
  bool allow_trailing_bytes = false;     // bytes after the last tensor, as some old files have them
  bool refuse_unknown_fields = false;    // fields of a tensor beside dtype, shape and data_offsets
};

namespace detail {

using namespace dcp::detail;

template <class = Deferred>
std::string tensor_called(std::string_view name) { return "tensor " + shown(name); }

/// A tensor as the JSON gave it. A million of them must stay small until all rules are checked.
struct RawTensor {
  std::uint64_t begin = 0, end = 0;
  std::uint32_t name_at = 0, name_bytes = 0, sizes_at = 0;
  std::uint8_t rank = 0;
  DType dtype = DType::u8;
  bool huge = false;   // a dimension of 2^63 or more
};

class HeaderReader : public JsonReader<HeaderReader> {
 public:
  explicit HeaderReader(ParseOptions const& options) : options_{options} {}

  std::vector<RawTensor> tensors;
  Metadata metadata;   // in the order of the file

  std::string_view name(RawTensor const& tensor) const { return std::string_view{names_}.substr(tensor.name_at, tensor.name_bytes); }
  template <class = Deferred>
  std::span<std::int64_t const> sizes(RawTensor const& tensor) const { return std::span{sizes_}.subspan(tensor.sizes_at, tensor.rank); }

  template <class = Deferred>
  void on_key(std::string_view key) {
    if (place_ == Place::names) {
      in_metadata_ = key == metadata_key;
      if (!in_metadata_) return start_tensor(key);
      if (seen_metadata_) fault(ErrorCode::duplicate_key, "the header has __metadata__ twice");
      seen_metadata_ = true;
    } else if (place_ == Place::metadata) {
      metadata.emplace_back(key, std::string{});
    } else {
      field_ = key == "dtype" ? dtype : key == "shape" ? shape : key == "data_offsets" ? offsets : unknown;
      if (field_ == unknown) {
        if (options_.refuse_unknown_fields) wrong("has the unknown field " + shown(key));
        return;
      }
      if ((seen_fields_ & field_) != 0) fault(ErrorCode::duplicate_key, tensor_called(name(tensor_)) + " has the field " + std::string{key} + " twice");
      seen_fields_ |= field_;
    }
  }

  template <class = Deferred>
  void on_open(bool object) {
    switch (place_) {
      case Place::document:
        if (!object) return fault(ErrorCode::bad_schema, "the header is an array; it must be an object");
        place_ = Place::names;
        return;
      case Place::names:
        if (!object)
          return in_metadata_ ? fault(ErrorCode::bad_schema, "__metadata__ is an array; it must be an object") : wrong("is an array; it must be an object");
        place_ = in_metadata_ ? Place::metadata : Place::tensor;
        return;
      case Place::metadata: return fault(ErrorCode::bad_schema, "__metadata__ has a value that is no string, for key " + shown(metadata.back().first));
      case Place::tensor:
        if (field_ == unknown) return skip();
        if (object || field_ == dtype) return wrong(std::string{"has a "} + field_name() + " of the wrong type");
        place_ = Place::numbers;
        return;
      case Place::numbers: return wrong(std::string{"has a "} + field_name() + " with something else than numbers");
    }
  }

  template <class = Deferred>
  void on_close() {
    switch (place_) {
      case Place::numbers:
        if (field_ == offsets && offset_count_ != 2) return wrong("has " + std::to_string(offset_count_) + " data_offsets; there must be 2");
        place_ = Place::tensor;
        return;
      case Place::tensor:
        if (seen_fields_ != (dtype | shape | offsets))
          return wrong(std::string{"has no "} + ((seen_fields_ & dtype) == 0 ? "dtype" : (seen_fields_ & shape) == 0 ? "shape" : "data_offsets"));
        tensors.push_back(tensor_);
        place_ = Place::names;
        return;
      case Place::metadata: place_ = Place::names; return;
      default: return;
    }
  }

  template <class = Deferred>
  void on_scalar(JsonScalar const& scalar) {
    auto const kind = [&] { return std::string{to_string(scalar.kind)}; };   // for faults only: this runs for every number
    switch (place_) {
      case Place::document: return fault(ErrorCode::bad_schema, "the header is " + kind() + "; it must be an object");
      case Place::names:
        if (!in_metadata_) return wrong("is " + kind() + "; it must be an object");
        if (scalar.kind != JsonKind::null) fault(ErrorCode::bad_schema, "__metadata__ is " + kind() + "; it must be an object");
        return;
      case Place::metadata:
        if (scalar.kind != JsonKind::string)
          return fault(ErrorCode::bad_schema, "__metadata__ has " + kind() + " for key " + shown(metadata.back().first) + "; it must be a string");
        metadata.back().second = scalar.text;
        return;
      case Place::tensor:
        if (field_ == unknown) return;
        if (field_ != dtype || scalar.kind != JsonKind::string) return wrong(std::string{"has a "} + field_name() + " that is " + kind());
        if (scalar.text != to_string(last_dtype_) && !(parse_dtype(scalar.text, last_dtype_) && in_safetensors(last_dtype_)))
          return fault(ErrorCode::unsupported_dtype, tensor_called(name(tensor_)) + " has the unknown dtype " + shown(scalar.text));
        tensor_.dtype = last_dtype_;
        return;
      case Place::numbers:
        if (scalar.kind != JsonKind::natural) return wrong(std::string{"has a "} + field_name() + " with " + kind());
        field_ == shape ? add_size(scalar.natural) : add_offset(scalar.natural);
    }
  }

 private:
  enum class Place : std::uint8_t { document, names, metadata, tensor, numbers };
  enum Field : std::uint8_t { unknown = 0, dtype = 1, shape = 2, offsets = 4 };

  char const* field_name() const { return field_ == dtype ? "dtype" : field_ == shape ? "shape" : "data_offsets"; }
  template <class = Deferred>
  void wrong(std::string const& problem) { fault(ErrorCode::bad_schema, tensor_called(name(tensor_)) + ' ' + problem); }

  template <class = Deferred>
  void start_tensor(std::string_view name) {
    tensor_ = {};
    tensor_.name_at = static_cast<std::uint32_t>(names_.size());   // fits: a header has at most 100,000,000 bytes
    tensor_.name_bytes = static_cast<std::uint32_t>(name.size());
    tensor_.sizes_at = static_cast<std::uint32_t>(sizes_.size());
    names_ += name;
    seen_fields_ = 0, offset_count_ = 0;
  }
  template <class = Deferred>
  void add_size(std::uint64_t size) {
    if (tensor_.rank == max_rank) return fault(ErrorCode::limit, tensor_called(name(tensor_)) + " has more than " + std::to_string(max_rank) + " dimensions");
    ++tensor_.rank;
    tensor_.huge |= size > INT64_MAX;
    sizes_.push_back(static_cast<std::int64_t>(size));
  }
  template <class = Deferred>
  void add_offset(std::uint64_t offset) {
    if (offset_count_ == 0) tensor_.begin = offset;
    if (offset_count_ == 1) tensor_.end = offset;
    ++offset_count_;
  }

  ParseOptions options_;
  std::string names_;
  std::vector<std::int64_t> sizes_;
  Place place_ = Place::document;
  bool in_metadata_ = false, seen_metadata_ = false;
  RawTensor tensor_;   // the one being read
  Field field_ = unknown;
  unsigned seen_fields_ = 0;
  std::size_t offset_count_ = 0;
  DType last_dtype_ = DType::u8;   // nearly all tensors of a file have the same
};

/// Finds names that occur twice: refused, or all but the last one dropped.
/// Cost      linear where names differ; n log n whatever they are, while a hash table could be flooded by its enemy
template <class = Deferred>
void settle_duplicates(HeaderReader& reader, bool allow) {
  struct Key {
    std::uint64_t hash;
    std::uint32_t index;
  };
  auto& tensors = reader.tensors;
  // Writers sort, the names of one dtype at least.
  if (std::adjacent_find(tensors.begin(), tensors.end(), [&](RawTensor const& a, RawTensor const& b) { return reader.name(a) >= reader.name(b); }) == tensors.end()) return;
  // Only names whose hash falls where another's did can be the same.
  std::size_t const slots = std::bit_ceil(tensors.size()) * 16;
  std::vector<bool> taken(slots), shared(slots);
  std::vector<std::uint64_t> hashes(tensors.size());
  for (std::size_t i = 0; i < hashes.size(); ++i) {
    hashes[i] = std::hash<std::string_view>{}(reader.name(tensors[i]));
    std::size_t const slot = hashes[i] & (slots - 1);
    if (taken[slot]) shared[slot] = true;
    taken[slot] = true;
  }
  std::vector<Key> keys;
  for (std::size_t i = 0; i < hashes.size(); ++i)
    if (shared[hashes[i] & (slots - 1)]) keys.push_back({hashes[i], static_cast<std::uint32_t>(i)});
  auto const name = [&](Key const& key) { return reader.name(tensors[key.index]); };
  std::sort(keys.begin(), keys.end(), [&](Key const& a, Key const& b) {
    if (a.hash != b.hash) return a.hash < b.hash;
    int const order = name(a).compare(name(b));
    return order != 0 ? order < 0 : a.index < b.index;
  });
  std::vector<std::uint32_t> dropped;
  for (std::size_t i = 1; i < keys.size(); ++i) {
    if (keys[i - 1].hash != keys[i].hash || name(keys[i - 1]) != name(keys[i])) continue;
    if (!allow) throw Error{ErrorCode::duplicate_key, tensor_called(name(keys[i])) + " is in the header twice"};
    dropped.push_back(keys[i - 1].index);
  }
  if (dropped.empty()) return;
  detail::sort(dropped);
  std::size_t kept = 0, next = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (next < dropped.size() && dropped[next] == i) ++next;
    else tensors[kept++] = tensors[i];
  }
  tensors.resize(kept);
}

template <class = Deferred>
Metadata settled_metadata(Metadata metadata, bool allow_duplicates) {
  std::stable_sort(metadata.begin(), metadata.end(), [](auto const& a, auto const& b) { return a.first < b.first; });
  Metadata kept;
  for (auto& entry : metadata) {
    if (kept.empty() || kept.back().first != entry.first) kept.push_back(std::move(entry));
    else if (allow_duplicates) kept.back() = std::move(entry);
    else throw Error{ErrorCode::duplicate_key, "__metadata__ has the key " + shown(entry.first) + " twice"};
  }
  return kept;
}

}  // namespace detail

}  // namespace dcp::safetensors
