// SPDX-License-Identifier: Apache-2.0
#pragma once
// The index of a sharded Hugging Face checkpoint, model.safetensors.index.json, and the names of the files it speaks of.
//
// The index comes from strangers and names files to open: every name is checked to be a plain file name before anybody sees it.
// Source    transformers and huggingface_hub (index), torch.distributed.checkpoint (names of sharded files)

#include <dcp/base/config.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/algorithms.hpp>
#include <dcp/base/text.hpp>
#include <dcp/formats/strict_json.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp::hf {

inline constexpr std::string_view index_file_name = "model.safetensors.index.json";
/// The one file of a checkpoint that needs no index.
inline constexpr std::string_view single_file_name = "model.safetensors";

struct Index {
  std::optional<std::uint64_t> total_size;                            // bytes of all tensors, without headers
  std::vector<std::pair<std::string, std::string>> weight_map;        // tensor name -> file name, sorted by tensor name
  std::vector<std::pair<std::string, std::string>> metadata;          // further texts (a tied name -> the name it is stored under), sorted by key

  friend bool operator==(Index const&, Index const&) = default;

  /// The file that holds `tensor`.
  template <class = Deferred>
  std::optional<std::string_view> find_file(std::string_view tensor) const {
    auto const found =
        std::lower_bound(weight_map.begin(), weight_map.end(), tensor, [](auto const& entry, std::string_view wanted) { return entry.first < wanted; });
    if (found == weight_map.end() || found->first != tensor) return std::nullopt;
    return found->second;
  }
};

struct IndexOptions {
  bool allow_subdirectories = false;            // "part/model-00001-of-00002.safetensors"; ".." stays forbidden
  bool ignore_bad_total_size = false;           // some real checkpoints have a float there
  std::uint64_t max_bytes = 256ull << 20;       // of the text
  std::uint64_t max_entries = 2'000'000;        // the largest models have about 100,000 tensors
};

/// Accepts plain names of safetensors files and nothing that any operating system or shell could take for more.
///
/// Throws    Error(unsafe_path)
template <class = Deferred>
void check_file_name(std::string_view name, bool allow_subdirectories = false) {
  auto const refused = [&](char const* problem) { return Error{ErrorCode::unsafe_path, "the file name " + detail::shown(name) + ' ' + problem}; };
  constexpr std::string_view extension = ".safetensors";
  if (first_invalid_utf8(name) != std::string_view::npos) throw Error{ErrorCode::unsafe_path, "a file name that is not UTF-8"};
  if (std::any_of(name.begin(), name.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7F; }))
    throw refused("contains a control character");
  if (name.find_first_of("\\:") != std::string_view::npos) throw refused("contains a backslash or a colon");
  if (!name.ends_with(extension)) throw refused("does not end in .safetensors");
  if (!allow_subdirectories && name.find('/') != std::string_view::npos)
    throw refused("contains a slash").with_hint("IndexOptions::allow_subdirectories accepts files below the directory of the index");
  for (std::string_view rest = name; !rest.empty();) {
    std::string_view const part = rest.substr(0, rest.find('/'));
    if (part.empty()) throw refused("has an empty part");
    if (part.size() > 255) throw refused("is longer than 255 bytes");
    if (part[0] == '.' || part[0] == '~' || part[0] == '$')
      throw refused("has a part that starts with a dot, a tilde or a dollar sign");  // "..", homes, variables
    rest.remove_prefix(std::min(rest.size(), part.size() + 1));
  }
}

namespace detail {

using namespace dcp::detail;

template <class = Deferred>
std::string numbered(char const* format, int a, int b, int c = 0) {
  std::array<char, 96> text{};
  std::snprintf(text.data(), text.size(), format, a, b, c);
  return text.data();
}

class IndexReader : public JsonReader<IndexReader> {
 public:
  explicit IndexReader(IndexOptions const& options) : options_{options} {}

  Index index;
  std::vector<std::string> metadata_keys;   // all of them, to find duplicates
  bool has_map = false;

  template <class = Deferred>
  void on_key(std::string_view key) {
    if (place_ == Place::top) {
      value_ = key == "metadata" ? Value::metadata : key == "weight_map" ? Value::map : Value::other;
      bool& seen = value_ == Value::map ? has_map : has_metadata_;
      if (value_ != Value::other && std::exchange(seen, true)) fault(ErrorCode::duplicate_key, "the index has " + std::string{key} + " twice");
    } else if (place_ == Place::metadata) {
      metadata_keys.emplace_back(key);
    } else {
      if (index.weight_map.size() == options_.max_entries)
        throw Error{ErrorCode::limit, "the index lists more than " + std::to_string(options_.max_entries) + " tensors"}.with_hint(
            "IndexOptions::max_entries raises the limit");
      index.weight_map.emplace_back(key, std::string{});
    }
  }
  template <class = Deferred>
  void on_open(bool object) {
    if (place_ == Place::document && object) {
      place_ = Place::top;
    } else if (place_ == Place::top && object && value_ != Value::other) {
      place_ = value_ == Value::map ? Place::map : Place::metadata;
    } else if (place_ == Place::top && value_ == Value::other) {
      skip();
    } else if (place_ == Place::metadata) {
      if (metadata_keys.back() == "total_size") bad_total_size("is an object or array");
      skip();
    } else {
      wrong(object ? "an object" : "an array");
    }
  }
  template <class = Deferred>
  void on_close() { place_ = place_ == Place::top ? Place::document : Place::top; }
  template <class = Deferred>
  void on_scalar(JsonScalar const& scalar) {
    std::string_view const kind = to_string(scalar.kind);
    if (place_ == Place::map) {
      if (scalar.kind != JsonKind::string) return wrong(kind);
      try {
        if (checked_.empty() || scalar.text != checked_) check_file_name(scalar.text, options_.allow_subdirectories);
      } catch (Error const& error) {
        Error located{error.code(), error.message() + ", for tensor " + shown(index.weight_map.back().first)};
        return fault(located.with_hint(error.hint()));
      }
      index.weight_map.back().second = checked_ = scalar.text;
    } else if (place_ == Place::metadata) {
      if (metadata_keys.back() != "total_size") {
        if (scalar.kind == JsonKind::string) index.metadata.emplace_back(metadata_keys.back(), scalar.text);
      } else if (scalar.kind == JsonKind::natural) {
        index.total_size = scalar.natural;
      } else {
        bad_total_size("is " + std::string{kind});
      }
    } else if (place_ == Place::document || value_ == Value::map || (value_ == Value::metadata && scalar.kind != JsonKind::null)) {
      wrong(kind);
    }
  }

 private:
  enum class Place : std::uint8_t { document, top, metadata, map };
  enum class Value : std::uint8_t { other, metadata, map };

  template <class = Deferred>
  void wrong(std::string_view kind) {
    std::string const where = place_ == Place::document ? "the index"
                              : place_ == Place::map    ? "the file name of tensor " + shown(index.weight_map.back().first)
                              : value_ == Value::map    ? "weight_map"
                                                        : "metadata";
    fault(ErrorCode::bad_schema, where + " is " + std::string{kind} + "; it must be " + (place_ == Place::map ? "a string" : "an object"));
  }
  template <class = Deferred>
  void bad_total_size(std::string const& problem) {
    if (!options_.ignore_bad_total_size)
      fault(Error{ErrorCode::bad_schema, "metadata.total_size " + problem}.with_hint("IndexOptions::ignore_bad_total_size reads the index without it"));
  }

  IndexOptions options_;
  std::string checked_;   // the last file name: tensors of one file follow each other
  Place place_ = Place::document;
  Value value_ = Value::other;
  bool has_metadata_ = false;
};

template <class Map>
void sort_unique(Map& map, char const* what) {
  auto const less = [](auto const& a, auto const& b) { return a.first < b.first; };
  if (!std::is_sorted(map.begin(), map.end(), less)) std::sort(map.begin(), map.end(), less);
  auto const twice = std::adjacent_find(map.begin(), map.end(), [](auto const& a, auto const& b) { return a.first == b.first; });
  if (twice != map.end()) throw Error{ErrorCode::duplicate_key, std::string{what} + " has the key " + shown(twice->first) + " twice"};
}

}  // namespace detail

/// model-00001-of-00003.safetensors, counted from 1.
template <class = Deferred>
std::string model_file_name(int index, int count) {
  if (index < 1 || count < index) throw Error{ErrorCode::invalid_argument, "there is no file " + std::to_string(index) + " of " + std::to_string(count)};
  return detail::numbered("model-%05d-of-%05d.safetensors", index, count);
}

/// shard-00002-model-00001-of-00003.safetensors: the part of a model file that one rank holds; `shard` is the rank + 1.
template <class = Deferred>
std::string shard_file_name(int shard, int index, int count) {
  if (shard < 1 || index < 1 || count < index)
    throw Error{ErrorCode::invalid_argument,
                "there is no shard " + std::to_string(shard) + " of file " + std::to_string(index) + " of " + std::to_string(count)};
  return detail::numbered("shard-%05d-model-%05d-of-%05d.safetensors", shard, index, count);
}

/// The index in `json`. Absent metadata is fine; unknown fields, and metadata that is no text, are ignored.
///
/// Throws    Error: limit, bad_utf8 or bad_json for the text; bad_schema, duplicate_key or unsafe_path for what it says;
///           index_mismatch if it lists no tensor
template <class = Deferred>
Index parse_index(ConstByteSpan json, IndexOptions options = {}) {
  if (json.size() > options.max_bytes)
    throw Error{ErrorCode::limit, "an index of " + std::to_string(json.size()) + " bytes; the limit is " + std::to_string(options.max_bytes)}.with_hint(
        "IndexOptions::max_bytes raises it");
  detail::IndexReader reader{options};
  detail::read_json(json, "the index", 0, reader);
  if (!reader.has_map) throw Error{ErrorCode::bad_schema, "the index has no weight_map"};
  Index index = std::move(reader.index);
  detail::sort_unique(index.weight_map, "weight_map");
  auto& keys = reader.metadata_keys;
  detail::sort(keys);
  if (auto const twice = std::adjacent_find(keys.begin(), keys.end()); twice != keys.end())
    throw Error{ErrorCode::duplicate_key, "the metadata of the index has the key " + detail::shown(*twice) + " twice"};
  detail::sort(index.metadata);
  if (index.weight_map.empty()) throw Error{ErrorCode::index_mismatch, "the weight_map of the index is empty; there is nothing to load"};
  return index;
}

/// The text of `index`, in any order of its entries: indented by 2, all keys sorted, ASCII, with a final newline, as transformers writes it.
///
/// Throws    Error: duplicate_key, unsafe_path for a file name that parse_index would refuse, bad_utf8, and invalid_argument for an
///           index without tensors or with a metadata key total_size
template <class = Deferred>
std::string write_index(Index index, IndexOptions const& options = {}) {
  if (index.weight_map.empty()) throw Error{ErrorCode::invalid_argument, "an index without tensors; no reader accepts one"};
  detail::sort_unique(index.weight_map, "weight_map");
  detail::sort_unique(index.metadata, "the metadata of the index");
  std::vector<std::pair<std::string, std::string>> lines;   // key -> JSON
  for (auto const& [key, value] : index.metadata) {
    if (key == "total_size") throw Error{ErrorCode::invalid_argument, "metadata key total_size is written from Index::total_size"};
    lines.emplace_back(key, detail::python_quoted(value));
  }
  if (index.total_size) lines.emplace_back("total_size", std::to_string(*index.total_size));
  detail::sort(lines);

  std::string text = "{\n  \"metadata\": {";
  char const* separator = "\n";
  for (auto const& [key, value] : lines) text += std::exchange(separator, ",\n") + ("    " + detail::python_quoted(key)) + ": " + value;
  text += lines.empty() ? "},\n  \"weight_map\": {" : "\n  },\n  \"weight_map\": {";
  separator = "\n    ";
  std::string const* known = nullptr;   // tensors of one file follow each other
  std::string quoted_file;
  for (auto const& [tensor, file] : index.weight_map) {
    if (known == nullptr || *known != file) {
      check_file_name(file, options.allow_subdirectories);
      quoted_file = ": " + detail::python_quoted(file);
      known = &file;
    }
    (text += std::exchange(separator, ",\n    ")) += detail::python_quoted(tensor);
    text += quoted_file;
  }
  return text += "\n  }\n}\n";
}

}  // namespace dcp::hf
