// SPDX-License-Identifier: Apache-2.0
#pragma once
// The .metadata of a checkpoint of torch.distributed.checkpoint: which tensors there are, in which chunks, and in which bytes of which files they lie. A pickle,
// which is read as data.

#include <dcp/base/algorithms.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/problems.hpp>
#include <dcp/base/text.hpp>
#include <dcp/core/box.hpp>
#include <dcp/formats/pickle.hpp>
#include <dcp/formats/torch_objects.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp::torch {

/// Where the archive of one item lies.
struct ItemPlace {
  std::string path;                      // relative to the checkpoint, '/' between components
  std::uint64_t offset = 0, length = 0;
  std::vector<std::string> transforms{}; // "stream.zstd/1": what its bytes went through, the last one first
};
struct MetadataChunk {
  Box box;
  ItemPlace place;
};
struct MetadataEntry {
  std::string name;
  bool is_tensor = true;
  DType dtype{};                         // of a tensor
  Extents shape;
  std::vector<MetadataChunk> chunks{};
  ItemPlace place{};                     // of an object
};
struct Metadata {
  std::vector<MetadataEntry> entries;    // as they come
  std::string version;                   // "1.0.0"; empty in what older versions wrote
  std::vector<std::pair<std::string, NameJoints>> joints{};   // of names from nested states, sorted
};

namespace detail {
inline constexpr std::string_view metadata_module = "torch.distributed.checkpoint.metadata", filesystem_module = "torch.distributed.checkpoint.filesystem",
                                  legacy_module = "torch.distributed._shard.sharded_tensor.metadata";

/// What a .metadata may name.
template <class = Deferred>
bool is_metadata_global(std::string_view module, std::string_view name) {
  constexpr std::array classes{"Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "MetadataIndex", "StorageMeta"};
  if (module == metadata_module) return std::find(classes.begin(), classes.end(), name) != classes.end();
  if (module == filesystem_module) return name == "_StorageInfo";
  if (module == legacy_module) return name == "TensorProperties" || name == "MEM_FORMAT_ENCODING";
  if (module == "builtins" || module == "__builtin__") return name == "getattr";   // of an enumeration and the name of a member, in early CPython 3.11
  return is_known_global(module, name);
}

template <class D = Deferred>
class MetadataReader {
 public:
  static Metadata read(ConstByteSpan bytes) {
    auto const tree = pickle::Tree::parse(bytes, is_metadata_global<>);
    pickle::Value const root = tree.root();
    require(root, metadata_module, "Metadata");
    pickle::Value const state = state_of(root);
    Metadata metadata;
    if (auto const version = state.find("version"); version && version->kind() == pickle::Kind::text) metadata.version = version->text();
    if (!metadata.version.empty() && !metadata.version.starts_with("1.")) throw Error{ErrorCode::bad_version, "the metadata has version " + json_quoted(metadata.version) + ", and this library reads 1"};
    MetadataReader reader;
    reader.index_places(dict_of(state, "storage_data"));
    pickle::Value const entries = dict_of(state, "state_dict_metadata");
    metadata.entries.reserve(entries.size());
    Problems problems;
    entries.for_each_pair([&](pickle::Value const& name, pickle::Value const& value) {
      MetadataEntry& entry = metadata.entries.emplace_back();
      entry.name = name.text();
      try {
        reader.read_entry(value, entry, problems);
      } catch (Error const& error) {
        throw Error{error.code(), entry.name + ": " + error.message()};
      }
    });
    problems.raise();
    if (auto const paths = state.find("planner_data"); paths && paths->kind() == pickle::Kind::dict) {
      paths->for_each_pair([&](pickle::Value const& name, pickle::Value const& path) { add_joints(name.text(), path, metadata.joints); });
      std::sort(metadata.joints.begin(), metadata.joints.end());
    }
    return metadata;
  }

 private:
  // A path is a tuple of keys and positions in lists. One that does not make the name, as of keys that other planners use, is none.
  static void add_joints(std::string_view name, pickle::Value const& path, std::vector<std::pair<std::string, NameJoints>>& all) {
    if (path.kind() != pickle::Kind::tuple || path.size() < 2) return;
    NameJoints joints;
    std::size_t at = 0;
    bool makes = true;
    path.for_each([&](pickle::Value const& element) {
      if (element.kind() != pickle::Kind::text && element.kind() != pickle::Kind::integer) makes = false;
      if (!makes) return;
      std::string const part = element.kind() == pickle::Kind::text ? std::string{element.text()} : std::to_string(element.integer());
      if (at > 0) {
        makes = at < name.size() && name[at] == '.';
        joints.push_back(static_cast<std::uint32_t>(at++));
      }
      makes = makes && name.substr(std::min(at, name.size())).starts_with(part);
      at += part.size();
    });
    if (makes && at == name.size()) all.emplace_back(name, std::move(joints));
  }

  static void require(pickle::Value const& value, std::string_view module, std::string_view name) {
    if (value.kind() != pickle::Kind::object || !value.is_call_of(module, name)) bad_object("something stands where a " + std::string{name} + " belongs");
  }
  static pickle::Value state_of(pickle::Value const& object) {
    auto const state = object.state();
    if (!state) bad_object("a " + std::string{object.name()} + " without contents");
    return *state;
  }

  // Any object may have pairs in a pickle, or none.
  static pickle::Value dict_of(pickle::Value const& state, std::string_view name) {
    pickle::Value const value = state.at(name);
    if (value.kind() != pickle::Kind::dict && !(value.kind() == pickle::Kind::object && value.is_call_of("collections", "OrderedDict"))) bad_object("the " + std::string{name} + " is no dict");
    return value;
  }

  struct Place {
    std::string_view name;
    bool has_offset;
    Extents offset;
    std::size_t info;   // index into infos_
  };
  static bool before(Place const& a, Place const& b) {
    if (a.name != b.name) return a.name < b.name;
    if (a.has_offset != b.has_offset) return b.has_offset;
    return std::lexicographical_compare(a.offset.begin(), a.offset.end(), b.offset.begin(), b.offset.end());
  }
  void index_places(pickle::Value const& storage) {
    places_.reserve(storage.size());
    infos_.reserve(storage.size());
    storage.for_each_pair([&](pickle::Value const& index, pickle::Value const& info) {
      require(index, metadata_module, "MetadataIndex");
      pickle::Value const state = state_of(index);
      auto const offset = state.find("offset");
      bool const has_offset = offset && !offset->is_none();
      places_.push_back({state.at("fqn").text(), has_offset, has_offset ? sizes_of(*offset) : Extents{}, infos_.size()});
      infos_.push_back(info);
    });
    if (!std::is_sorted(places_.begin(), places_.end(), before)) std::stable_sort(places_.begin(), places_.end(), before);
  }
  // The last of equal ones counts, as in a dict of Python.
  pickle::Value const* find(std::string_view name, bool has_offset, Extents const& offset) const {
    Place const wanted{name, has_offset, offset, 0};
    auto const at = std::upper_bound(places_.begin(), places_.end(), wanted, before);
    if (at == places_.begin() || before(*(at - 1), wanted)) return nullptr;
    return &infos_[(at - 1)->info];
  }
  static ItemPlace place_of(pickle::Value const& info) {
    require(info, filesystem_module, "_StorageInfo");
    pickle::Value const state = state_of(info);
    ItemPlace place;
    place.path = state.at("relative_path").text();
    place.offset = state.at("offset").natural();
    place.length = state.at("length").natural();
    if (auto const transforms = state.find("transform_descriptors"); transforms && !transforms->is_none()) transforms->for_each([&](pickle::Value const& one) { place.transforms.emplace_back(one.text()); });
    return place;
  }
  static DType dtype_of(pickle::Value const& properties) {
    if (properties.kind() != pickle::Kind::object || properties.name() != "TensorProperties") bad_object("a tensor without properties");
    pickle::Value const state = state_of(properties);
    bool const dict = state.kind() == pickle::Kind::dict;
    pickle::Value const dtype = dict ? state.at("dtype") : state.item(0), layout = dict ? state.at("layout") : state.item(1);
    DType result{};
    if (dtype.kind() != pickle::Kind::global || dtype.module() != "torch") bad_object("a tensor without a dtype");
    if (!dtype_called(dtype.name(), result)) throw Error{ErrorCode::unsupported_dtype, "the dtype torch." + std::string{dtype.name()}};
    if (layout.kind() == pickle::Kind::object && layout.is_call_of("torch.serialization", "_get_layout") && layout.arguments().item(0).text() != "torch.strided")
      throw Error{ErrorCode::unsupported, "a tensor with the layout " + json_quoted(layout.arguments().item(0).text())};
    return result;
  }
  void read_entry(pickle::Value const& value, MetadataEntry& entry, Problems& problems) {
    if (value.kind() == pickle::Kind::object && value.is_call_of(metadata_module, "BytesStorageMetadata")) {
      entry.is_tensor = false;
      pickle::Value const* const info = find(entry.name, false, {});
      if (info == nullptr) problems.add(ErrorCode::incomplete, entry.name + ": the metadata does not say where it is stored");
      else entry.place = place_of(*info);
      return;
    }
    require(value, metadata_module, "TensorStorageMetadata");
    pickle::Value const state = state_of(value);
    entry.dtype = dtype_of(state.at("properties"));
    Extents const size = sizes_of(state.at("size"));
    entry.shape = shape_from_torch(entry.dtype, size);
    pickle::Value const chunks = state.at("chunks");
    entry.chunks.reserve(chunks.size());
    chunks.for_each([&](pickle::Value const& chunk) {
      require(chunk, metadata_module, "ChunkStorageMetadata");
      pickle::Value const parts = state_of(chunk);
      Extents const offsets = sizes_of(parts.at("offsets")), sizes = sizes_of(parts.at("sizes"));
      Box const box{offsets.rank() == 0 ? offsets : shape_from_torch(entry.dtype, offsets), sizes.rank() == 0 ? sizes : shape_from_torch(entry.dtype, sizes)};
      bool inside = offsets.rank() == size.rank() && sizes.rank() == size.rank();
      for (int d = 0; inside && d < size.rank(); ++d) inside = offsets[d] <= size[d] && sizes[d] <= size[d] - offsets[d];
      if (!inside) return problems.add(ErrorCode::index_mismatch, entry.name + ": a chunk of " + to_string(sizes) + " at " + to_string(offsets) + " is no part of " + to_string(size));
      pickle::Value const* const info = find(entry.name, true, offsets);
      if (info == nullptr) return problems.add(ErrorCode::incomplete, entry.name + ": the metadata does not say where the chunk at " + to_string(offsets) + " is stored");
      entry.chunks.push_back({box, place_of(*info)});
    });
  }

  std::vector<Place> places_;          // sorted
  std::vector<pickle::Value> infos_;   // as they come
};
}  // namespace detail

/// Reads what any version of PyTorch from 2.0 on wrote. Shapes and boxes count elements as this library does.
///
/// Throws    what pickle::Tree::parse throws, naming what a pickle must not have; Error(bad_schema) for what is no metadata; Error(index_mismatch) for chunks outside of
///           their tensors, Error(incomplete) for items without a place: all listed; Error(bad_version), Error(unsupported_dtype), Error(unsupported)
/// Source    torch.distributed.checkpoint.metadata, .filesystem
template <class = Deferred>
Metadata parse_metadata(ConstByteSpan bytes) { return detail::MetadataReader<>::read(bytes); }

/// The bytes of a .metadata. `joints`: of each entry's name, or nothing: what PyTorch rebuilds nested dicts by.
///
/// Source    as parse_metadata; properties have five parts, which all versions read
template <class = Deferred>
Bytes write_metadata(Metadata const& metadata, std::vector<NameJoints> const& joints = {}) {
  constexpr std::size_t batch = 1000;   // as pickle writes large dicts
  pickle::Writer out;
  auto const object = [&](std::string_view module, std::string_view name) -> pickle::Writer& { return out.global(module, name).empty_tuple().newobj(); };
  auto const size = [&](Extents const& sizes) { out.global("torch", "Size").size_tuple(sizes).tuple1().reduce(); };
  auto const field = [&](std::string_view name) -> pickle::Writer& { return out.repeated_text(name); };
  auto const dict = [&](std::size_t count, auto write_pair) {
    out.empty_dict();
    for (std::size_t begin = 0; begin < count; begin += batch) {
      out.mark();
      for (std::size_t i = begin; i < std::min(count, begin + batch); ++i) write_pair(i);
      out.setitems();
    }
  };
  object(detail::metadata_module, "Metadata").empty_dict().mark();

  field("state_dict_metadata");
  dict(metadata.entries.size(), [&](std::size_t i) {
    MetadataEntry const& entry = metadata.entries[i];
    out.repeated_text(entry.name);
    if (!entry.is_tensor) return static_cast<void>(object(detail::metadata_module, "BytesStorageMetadata"));
    if (dtype_name(entry.dtype).empty()) throw Error{ErrorCode::unsupported_dtype, entry.name + ": PyTorch has no tensors of " + std::string{to_string(entry.dtype)}};
    object(detail::metadata_module, "TensorStorageMetadata").empty_dict().mark();
    field("properties");
    object(detail::metadata_module, "TensorProperties").mark().global("torch", dtype_name(entry.dtype));
    out.global("torch.serialization", "_get_layout").repeated_text("torch.strided").tuple1().reduce().boolean(false);
    out.global(detail::metadata_module, "_MEM_FORMAT_ENCODING").integer(0).tuple1().reduce().boolean(false).tuple().build();
    field("size");
    size(shape_to_torch(entry.dtype, entry.shape));
    field("chunks").empty_list().mark();
    for (auto const& chunk : entry.chunks) {
      object(detail::metadata_module, "ChunkStorageMetadata").empty_dict().mark();
      field("offsets");
      size(shape_to_torch(entry.dtype, chunk.box.origin));
      field("sizes");
      size(shape_to_torch(entry.dtype, chunk.box.shape));
      out.setitems().build();
    }
    out.appends().setitems().build();
  });

  field("planner_data");
  dict(metadata.entries.size(), [&](std::size_t i) {
    std::string_view const name = metadata.entries[i].name;
    out.repeated_text(name).mark();
    std::size_t begin = 0;
    if (!joints.empty())
      for (auto const at : joints[i]) out.repeated_text(name.substr(begin, at - begin)), begin = at + std::size_t{1};
    out.repeated_text(name.substr(begin)).tuple();
  });

  field("storage_data").empty_dict();
  std::size_t pairs = 0;
  auto const place = [&](std::string_view name, std::int64_t index, Extents const* offset, ItemPlace const& at) {
    if (pairs++ % batch == 0) {
      if (pairs > 1) out.setitems();
      out.mark();
    }
    object(detail::metadata_module, "MetadataIndex").empty_dict().mark();
    field("fqn").repeated_text(name);
    field("index");
    if (index < 0) out.none();
    else out.integer(index);
    if (offset != nullptr) {
      field("offset");
      size(*offset);
    }
    out.setitems().build();
    object(detail::filesystem_module, "_StorageInfo").empty_dict().mark();
    field("relative_path").repeated_text(at.path);
    field("offset").natural(at.offset);
    field("length").natural(at.length);
    out.setitems().build();
  };
  for (auto const& entry : metadata.entries) {
    if (!entry.is_tensor) place(entry.name, -1, nullptr, entry.place);
    for (std::size_t c = 0; c < entry.chunks.size(); ++c) {
      Extents const offset = shape_to_torch(entry.dtype, entry.chunks[c].box.origin);
      place(entry.name, static_cast<std::int64_t>(c), &offset, entry.chunks[c].place);
    }
  }
  if (pairs > 0) out.setitems();

  field("storage_meta").none();
  field("version").text("1.0.0");
  out.setitems().build();
  return out.take();
}

}  // namespace dcp::torch
