// SPDX-License-Identifier: Apache-2.0
#pragma once
// Hugging Face safetensors checkpoints, as the ecosystem reads and writes them.
//
//   final     model-0000i-of-0000n.safetensors and model.safetensors.index.json: whole tensors under bare names. Every rank's bytes
//             go straight to their final positions; nothing is gathered or consolidated
//   sharded   shard-<rank + 1>-model-... per rank, with DCP_SHARDING_INFO, as PyTorch's HuggingFaceStorageWriter writes them

#include <dcp/base/config.hpp>
#include <dcp/base/algorithms.hpp>
#include <dcp/formats/hf_index.hpp>
#include <dcp/formats/safetensors_header.hpp>
#include <dcp/media/local_fs.hpp>
#include <dcp/storage/pieces.hpp>
#include <dcp/storage/storage.hpp>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace dcp {

enum class FileLayout : std::uint8_t { final, sharded };
/// Whether files hold names with or without the prefix of their group.
enum class Prefix : std::uint8_t { keep, strip };

/// Names under `prefix` (whole components between dots) go to a directory of their own: loaders of the ecosystem take every
/// *.safetensors beside an index, and want a model's bare names.
///
/// Example   .groups = {{"model", ".", dcp::Prefix::strip}, {"optimizer", "optimizer"}}
struct SafeTensorsGroup {
  std::string prefix;
  std::string directory = ".";
  Prefix names = Prefix::keep;
};

struct SafeTensorsOptions {
  FileLayout layout = FileLayout::final;
  std::uint64_t max_file_bytes = 5'000'000'000;                 // of tensor data per file; a larger tensor gets a file of its own
  std::map<std::string, int> file_of = {};                      // name -> number of its file, from 1; then every tensor must be listed
  std::vector<std::pair<std::string, std::string>> metadata = {};   // texts for every file's header, beside {"format", "pt"}
  std::vector<SafeTensorsGroup> groups = {};                    // the first whose prefix matches; names outside all groups stay at the top
  std::vector<std::filesystem::path> extra_files = {};          // copied into the checkpoint: config.json, tokenizer.json, ...
  // Reading what others wrote: each gives up one refusal.
  bool allow_trailing_bytes = false;                            // behind the last tensor of a file
  bool allow_duplicate_names = false;                           // in a header; the last one counts
  bool ignore_total_size = false;                               // of the index
};

namespace detail {

/// Whether `name` is `prefix` or begins with it and a dot.
template <class = Deferred>
bool under_prefix(std::string_view name, std::string_view prefix) {
  return prefix.empty() || (name.starts_with(prefix) && (name.size() == prefix.size() || name[prefix.size()] == '.'));
}

template <class = Deferred>
std::string normal_directory(std::string const& directory) {
  std::string out;
  for (std::size_t at = 0; at <= directory.size();) {
    auto const slash = std::min(directory.find('/', at), directory.size());
    auto const part = directory.substr(at, slash - at);
    if (part == ".." || part.find('\\') != std::string::npos || part.find('\0') != std::string::npos)
      throw Error{ErrorCode::unsafe_path, "a group's directory is " + json_quoted(directory) + "; it must lie inside the checkpoint"};
    if (!part.empty() && part != ".") out += (out.empty() ? "" : "/") + part;
    at = slash + 1;
  }
  return out;
}

template <class D = Deferred>
class SafeTensorsDriver final : public AnyStorage {
 public:
  explicit SafeTensorsDriver(SafeTensorsOptions options) : options_{std::move(options)} {
    for (auto const& [key, value] : options_.metadata)
      if (key == safetensors::sharding_info_key) throw Error{ErrorCode::invalid_argument, "the metadata key " + key + " tells readers that a file holds pieces of tensors; FileLayout::sharded sets it"};
    for (auto const& group : options_.groups) groups_.push_back({group.prefix, normal_directory(group.directory), group.names == Prefix::strip});
  }

  std::string_view name() const override { return "safetensors"; }
  std::string file_layout() const override { return options_.layout == FileLayout::final ? "final" : "sharded"; }
  std::vector<RecordGroup> groups() const override { return groups_; }
  std::string options_text() const override {
    std::string text = file_layout() + " max_file_bytes=" + std::to_string(options_.max_file_bytes);
    for (auto const& [name, file] : options_.file_of) text += " file_of " + json_quoted(name) + '=' + std::to_string(file);
    for (auto const& [key, value] : options_.metadata) text += " metadata " + json_quoted(key) + '=' + json_quoted(value);
    for (auto const& group : groups_) text += " group " + json_quoted(group.prefix) + '=' + json_quoted(group.directory) + (group.strip ? " strip" : "");
    for (auto const& file : options_.extra_files) text += " extra " + json_quoted(file.string());
    return text;
  }

  std::vector<std::pair<std::string, Bytes>> extra_files() const override {
    std::vector<std::pair<std::string, Bytes>> files;
    MediumModel<typename DeferredType<LocalFs, D>::type> local{LocalFs{}};
    for (auto const& path : options_.extra_files) {
      if (!path.has_filename()) throw Error{ErrorCode::invalid_argument, "an extra file without a name"}.with_path(path.string());
      files.emplace_back(path.filename().string(), read_file(local, path.string(), most_record_bytes));
    }
    return files;
  }

  FilePlan plan_files(SaveRequest const& request) const override {
    Targets const targets = choose_files(request);
    return options_.layout == FileLayout::final ? plan_final(request, targets) : plan_sharded(request, targets);
  }

  Scan scan(AnyMedium& medium, std::string const& path, CommitRecord const* record) const override {
    Scan scan;
    scan.directory = path;
    if (record != nullptr) {
      scan.files = data_files(*record);
      return scan;
    }
    if (medium.kind(path) == EntryKind::file) {
      scan.files.push_back(in_directory(path, scan.directory));
      return scan;
    }
    std::vector<std::string> indexes;
    bool single = false;
    for (auto const& entry : medium.list(path)) {
      if (entry.name.ends_with(".safetensors")) scan.files.push_back(entry.name), single = single || entry.name == hf::single_file_name;
      else if (entry.name.find(".safetensors.index") != std::string::npos && entry.name.ends_with(".json")) indexes.push_back(entry.name);
    }
    if (indexes.size() > 1) {
      if (std::find(indexes.begin(), indexes.end(), hf::index_file_name) == indexes.end())
        throw Error{ErrorCode::index_mismatch, "the directory has several indexes (" + indexes[0] + ", " + indexes[1] + ") and none of the usual name"}.with_path(path).with_hint("name one file to load");
      scan.warnings.push_back("of several indexes, " + std::string{hf::index_file_name} + " is used");
      indexes = {std::string{hf::index_file_name}};
    }
    if (single && !indexes.empty() && scan.files.size() > 1) {
      // As transformers: the single file comes first.
      scan.warnings.push_back("the directory has " + std::string{hf::single_file_name} + " and an index; the single file is used");
      scan.files = {std::string{hf::single_file_name}};
      return scan;
    }
    if (!indexes.empty()) {
      std::string const file = path + '/' + indexes[0];
      try {
        hf::IndexOptions options;
        options.ignore_bad_total_size = options_.ignore_total_size;
        hf::Index index = hf::parse_index(read_file(medium, file, options.max_bytes), options);
        scan.indexed = true;
        if (index.total_size) scan.total_size = static_cast<std::int64_t>(std::min<std::uint64_t>(*index.total_size, INT64_MAX));
        scan.index = std::move(index.weight_map);
      } catch (Error& error) {
        throw error.with_path(file);
      }
      std::vector<std::string> named;
      for (auto const& [tensor, name] : scan.index) named.push_back(name);
      detail::sort(named);
      named.erase(std::unique(named.begin(), named.end()), named.end());
      if (single && !sorted_contains(named, hf::single_file_name)) {
        // Its files are gone, or it would have been decided above.
        scan = Scan{};
        scan.directory = path;
        scan.warnings.push_back("the directory has " + std::string{hf::single_file_name} + " and an index of other files; the single file is used");
        scan.files = {std::string{hf::single_file_name}};
        return scan;
      }
      if (auto const files = files_by_name(named); files != 0 && files != named.size()) scan.warnings.push_back("the index names " + std::to_string(named.size()) + " files, and their names speak of " + std::to_string(files));
      for (auto const& name : scan.files)
        if (!sorted_contains(named, name)) scan.warnings.push_back(name + " is not in the index and is left out");
      for (auto const& name : named)
        if (medium.kind(path + '/' + name) == EntryKind::missing) throw Error{ErrorCode::missing_file, "the index names the file " + name + ", which is not there"}.with_path(file);
      scan.files = std::move(named);
    }
    if (scan.files.empty()) throw Error{ErrorCode::not_found, "the directory holds no .safetensors file"}.with_path(path);
    return scan;
  }

  FoundFile read_header(AnyMedium& medium, Scan const& scan, std::string const& file) const override {
    std::string const path = scan.directory + '/' + file;
    try {
      auto const in = medium.open_read(path);
      FoundFile found;
      found.path = file;
      found.size = in->size();
      found.version = in->version();
      Bytes first(static_cast<std::size_t>(std::min<std::uint64_t>(8, found.size)));
      in->read_at(0, first);
      Bytes text(static_cast<std::size_t>(safetensors::header_bytes(first, found.size)));
      in->read_at(8, text);
      safetensors::ParseOptions options;
      options.allow_trailing_bytes = options_.allow_trailing_bytes;
      options.allow_duplicate_names = options_.allow_duplicate_names;
      safetensors::Header const header = safetensors::parse_header(text, found.size, options);
      safetensors::ShardingInfo info;
      if (auto const json = header.find_metadata(safetensors::sharding_info_key)) {
        found.pieces = true;
        info = safetensors::parse_sharding_info(*json);
      }
      found.tensors.reserve(header.tensors.size());
      for (auto const& tensor : header.tensors) {
        Extents origin = Extents::filled(tensor.shape.rank(), 0);
        if (found.pieces) origin = Extents{safetensors::saved_offsets(info, tensor)};
        found.tensors.push_back({tensor.name, tensor.dtype, tensor.shape, header.data_begin + tensor.begin, origin});
      }
      std::vector<std::string_view> names;
      if (std::any_of(header.metadata.begin(), header.metadata.end(), [](auto const& entry) { return entry.first != "format"; }))
        for (auto const& tensor : header.tensors) names.push_back(tensor.name);
      detail::sort(names);
      auto const is_tensor = [&](std::string_view name) { return sorted_contains(names, name); };
      // "dropped": "kept" is how Hugging Face notes tied weights; other texts may be anything.
      for (auto const& [key, value] : header.metadata)
        if (key != "format" && is_tensor(value) && !is_tensor(key)) found.ties.push_back({key, value});
      return found;
    } catch (Error& error) {
      throw error.with_path(path);
    }
  }

  Catalog assemble(Scan const& scan, std::vector<FoundFile> found, CommitRecord const* record) const override {
    if (scan.indexed) check_index(scan, found);
    if (record != nullptr)
      for (auto& file : found) restore_names(file, record->groups);
    Catalog catalog = dcp::assemble(std::move(found));
    append(catalog.warnings, scan.warnings);
    return catalog;
  }

 private:
  // The n that all of the names end in, as in model-00001-of-0000n.safetensors; 0 if there is none.
  static std::uint64_t files_by_name(std::vector<std::string> const& names) {
    std::uint64_t common = 0;
    for (auto const& name : names) {
      auto const at = name.rfind("-of-");
      std::uint64_t files = 0;
      if (at != std::string::npos) std::from_chars(name.data() + at + 4, name.data() + name.size(), files);
      if (files == 0 || (common != 0 && files != common)) return 0;
      common = files;
    }
    return common;
  }

  // A directory of the checkpoint: its files are numbered, and bear the same number of files in their names.
  struct Directory {
    std::string path;
    int files = 0;
    std::uint64_t bytes = 0, header = 0;   // of the file that is being filled
    RecordGroup const* group = nullptr;    // of its first tensor
  };
  // Where one tensor goes.
  struct Target {
    std::string_view stored_name;          // a part of the tensor's name
    std::uint32_t directory = 0;
    int file = 1;
  };
  struct Targets {
    std::vector<Directory> directories;
    std::vector<Target> of;                // of each tensor
  };

  RecordGroup const* group_of(std::string_view name) const {
    for (auto const& group : groups_)
      if (under_prefix(name, group.prefix)) return &group;
    return nullptr;
  }
  static std::string_view stripped(std::string_view name, RecordGroup const* group) {
    if (group == nullptr || !group->strip || group->prefix.empty() || name.size() <= group->prefix.size() + 1) return name;
    return name.substr(group->prefix.size() + 1);
  }

  Targets choose_files(SaveRequest const& request) const {
    Targets targets;
    targets.of.reserve(request.tensors.size());
    auto const directory_of = [&](RecordGroup const* group) {
      std::string_view const path = group == nullptr ? std::string_view{} : group->directory;
      for (std::uint32_t d = 0; d < targets.directories.size(); ++d)
        if (targets.directories[d].path == path) return d;
      targets.directories.push_back({std::string{path}, 0, 0, 0, group});
      return static_cast<std::uint32_t>(targets.directories.size() - 1);
    };
    Problems problems;
    std::vector<std::string> mixed;
    // Parts of one tensor go to one file, whatever the size and wherever its name says.
    std::map<std::string_view, std::uint64_t> bytes_of_parts;
    std::map<std::pair<std::string_view, std::uint32_t>, int> file_of_parts;   // name, directory
    if (request.parts_of != nullptr)
      for (std::size_t t = 0; t < request.tensors.size(); ++t) bytes_of_parts[(*request.parts_of)[t]] += bytes_of(request.tensors[t].dtype, request.tensors[t].layout.shape.elements());
    for (std::size_t number = 0; number < request.tensors.size(); ++number) {
      TensorSpec const& tensor = request.tensors[number];
      std::string const& name = request.parts_of == nullptr ? tensor.name : (*request.parts_of)[number];
      RecordGroup const* group = group_of(tensor.name);
      Target target{stripped(tensor.name, group), directory_of(group), 1};
      Directory& directory = targets.directories[target.directory];
      RecordGroup const* other = directory.group;
      if ((other != group && ((group != nullptr && group->strip) || (other != nullptr && other->strip))) || (group != nullptr && group->strip && tensor.name == group->prefix))
        mixed.push_back(tensor.name + ": directory ./" + directory.path + " holds names without their prefix, so names of other groups cannot stand there");
      std::uint64_t bytes = 0;
      try {
        bytes = safetensors::tensor_bytes(tensor.dtype, tensor.layout.shape);
      } catch (Error const& error) {
        problems.add(error.code(), tensor.name + ": " + error.message());
      }
      std::uint64_t const header = 128 + 6 * target.stored_name.size() + 48 * static_cast<std::size_t>(tensor.layout.shape.rank());   // an upper bound
      if (request.parts_of != nullptr) bytes = bytes_of_parts[name];
      if (auto const known = file_of_parts.find({name, target.directory}); known != file_of_parts.end()) {
        target.file = known->second;
        directory.header += header;
      } else if (options_.file_of.empty()) {
        if (directory.files == 0 || (directory.bytes > 0 && directory.bytes + bytes > options_.max_file_bytes) || directory.header + header > safetensors::max_header_bytes / 2)
          ++directory.files, directory.bytes = directory.header = 0;
        directory.bytes += bytes;
        directory.header += header;
        target.file = directory.files;
      } else if (auto const at = options_.file_of.find(name); at == options_.file_of.end() || at->second < 1) {
        problems.add(ErrorCode::invalid_argument, name + ": file_of has no file number from 1 for it");
      } else {
        target.file = at->second;
        directory.files = std::max(directory.files, at->second);
      }
      if (request.parts_of != nullptr) file_of_parts.emplace(std::pair{std::string_view{name}, target.directory}, target.file);
      targets.of.push_back(target);
    }
    if (!mixed.empty()) {   // the one way in which names that differ can become the same
      std::map<std::pair<std::uint32_t, std::string_view>, std::size_t> stored;
      for (std::size_t t = 0; t < targets.of.size(); ++t)
        if (auto const [at, fresh] = stored.try_emplace({targets.of[t].directory, targets.of[t].stored_name}, t); !fresh)
          problems.add(ErrorCode::duplicate_entry, request.tensors[t].name + " and " + request.tensors[at->second].name + " would both be " + std::string{targets.of[t].stored_name} + " in directory ./" +
                                                       targets.directories[targets.of[t].directory].path);
      for (auto& sentence : mixed) problems.add(ErrorCode::invalid_argument, std::move(sentence));
    }
    problems.raise();
    return targets;
  }

  static std::string joined(std::string const& directory, std::string const& file) { return directory.empty() ? file : directory + '/' + file; }

  safetensors::Metadata file_metadata() const {
    safetensors::Metadata metadata = options_.metadata;
    if (std::none_of(metadata.begin(), metadata.end(), [](auto const& m) { return m.first == "format"; })) metadata.emplace_back("format", "pt");
    return metadata;
  }

  // All ranks plan all files; the text of a header is made by the rank that writes it, and that of an index by rank 0.
  FilePlan plan_final(SaveRequest const& request, Targets const& targets) const {
    FilePlan plan;
    auto const same_file = [&](std::uint32_t a, std::uint32_t b) { return targets.of[a].directory == targets.of[b].directory && targets.of[a].file == targets.of[b].file; };
    std::vector<std::uint32_t> order(targets.of.size());
    std::iota(order.begin(), order.end(), 0u);
    auto const before = [&](std::uint32_t a, std::uint32_t b) {
      Target const &x = targets.of[a], &y = targets.of[b];
      if (x.directory != y.directory) return targets.directories[x.directory].path < targets.directories[y.directory].path;
      return x.file < y.file;
    };
    if (!std::is_sorted(order.begin(), order.end(), before)) std::stable_sort(order.begin(), order.end(), before);
    // As the reference writer orders the tensors of a file: widest dtype first, then by name, as they come.
    for (std::size_t begin = 0, end = 0; begin < order.size(); begin = end) {
      while (end < order.size() && same_file(order[begin], order[end])) ++end;
      auto const first = order.begin() + static_cast<std::ptrdiff_t>(begin), last = order.begin() + static_cast<std::ptrdiff_t>(end);
      auto const in_file = [&](std::uint32_t a, std::uint32_t b) {
        DType const x = request.tensors[a].dtype, y = request.tensors[b].dtype;
        return x != y ? x > y : targets.of[a].stored_name < targets.of[b].stored_name;
      };
      if (!std::is_sorted(first, last, in_file)) std::sort(first, last, in_file);
    }

    std::vector<std::pair<std::string, hf::Index>> indexes;   // of each directory, on rank 0
    std::vector<std::uint64_t> offsets;                       // of the tensors of a file, and the end of the last
    plan.stored.reserve(order.size());
    for (std::size_t begin = 0, end = 0; begin < order.size(); begin = end) {
      Target const& target = targets.of[order[begin]];
      Directory const& directory = targets.directories[target.directory];
      offsets.assign(1, 0);
      for (; end < order.size() && same_file(order[begin], order[end]); ++end) {
        TensorSpec const& tensor = request.tensors[order[end]];
        offsets.push_back(offsets.back() + safetensors::tensor_bytes(tensor.dtype, tensor.layout.shape));
      }
      auto const line = [&](std::size_t i) {
        std::uint32_t const t = order[begin + i];
        return safetensors::TensorLine{targets.of[t].stored_name, request.tensors[t].dtype, &request.tensors[t].layout.shape, offsets[i], offsets[i + 1]};
      };
      std::string const file_name = hf::model_file_name(target.file, directory.files);
      hf::Index* index = nullptr;
      if (request.rank == 0) {
        std::string path = joined(directory.path, std::string{hf::index_file_name});
        if (indexes.empty() || indexes.back().first != path) {
          indexes.emplace_back(std::move(path), hf::Index{});
          indexes.back().second.total_size = 0;
        }
        index = &indexes.back().second;
      }
      safetensors::Metadata metadata = file_metadata();
      for (auto const& tie : request.ties) {
        RecordGroup const* group = group_of(tie.kept);
        if (group != group_of(tie.dropped)) continue;   // the record has it; a reader of these files has no use for it
        auto const kept = std::lower_bound(request.tensors.begin(), request.tensors.end(), tie.kept, [](TensorSpec const& tensor, std::string const& name) { return tensor.name < name; });
        if (kept == request.tensors.end() || kept->name != tie.kept || !same_file(order[begin], static_cast<std::uint32_t>(kept - request.tensors.begin()))) continue;
        metadata.emplace_back(stripped(tie.dropped, group), stripped(tie.kept, group));
        if (index != nullptr && directory.files > 1) index->metadata.push_back(metadata.back());
      }
      auto const f = static_cast<std::uint32_t>(plan.files.size());
      PlannedFile& file = plan.files.emplace_back();
      file.path = joined(directory.path, file_name);
      std::uint64_t data = 0;
      if (header_writer(f, request.ranks) == request.rank) {
        file.literals.push_back({0, safetensors::write_header(end - begin, line, std::move(metadata), 4096)});
        data = file.literals[0].bytes.size();
      } else {
        data = safetensors::header_size(end - begin, line, std::move(metadata), 4096);
      }
      file.size = data + offsets.back();
      for (std::size_t i = 0; i < end - begin; ++i) plan.stored.push_back({order[begin + i], f, data + offsets[i], Box::whole(*line(i).shape)});
      if (index == nullptr) continue;
      *index->total_size += offsets.back();
      for (std::size_t i = 0; i < end - begin; ++i) index->weight_map.emplace_back(line(i).name, file_name);
    }
    for (auto& [path, index] : indexes) {
      auto const text = hf::write_index(std::move(index));
      auto const bytes = as_byte_span(text);
      plan.commit_files.emplace_back(path, Bytes(bytes.begin(), bytes.end()));
    }
    return plan;
  }

  FilePlan plan_sharded(SaveRequest const& request, Targets const& targets) const {
    struct Piece {
      std::uint32_t tensor;
      Box box;
    };
    // A flat shard is several boxes of one name, and a file holds a name once: they go to as many files.
    std::map<std::tuple<std::string, int, int>, std::vector<Piece>> members;
    for (std::uint32_t t = 0; t < targets.of.size(); ++t) {
      int pieces = 0;
      for_each_piece(request, t, request.rank, [&](Box const& box) { members[{targets.directories[targets.of[t].directory].path, targets.of[t].file, pieces++}].push_back({t, box}); });
    }
    FilePlan plan;
    for (auto const& [key, pieces] : members) {
      auto const f = static_cast<std::uint32_t>(plan.files.size());
      std::map<std::string, Piece const*> by_name;
      std::vector<safetensors::TensorInfo> infos;
      safetensors::ShardingInfo sharding;
      for (auto const& piece : pieces) {
        std::string const name{targets.of[piece.tensor].stored_name};
        infos.push_back({name, request.tensors[piece.tensor].dtype, piece.box.shape, 0, 0});
        by_name[name] = &piece;
        sharding[name] = {piece.box.origin.begin(), piece.box.origin.end()};
      }
      safetensors::assign_offsets(infos);
      safetensors::Metadata metadata = file_metadata();
      metadata.emplace_back(safetensors::sharding_info_key, safetensors::write_sharding_info(sharding));
      metadata.emplace_back("DCP_VERSION", "1.0");
      Bytes header = safetensors::write_header(infos, std::move(metadata), 4096);
      PlannedFile& file = plan.files.emplace_back();
      file.only_rank = request.rank;
      auto const& [directory, number, part] = key;
      file.path = joined(directory, hf::shard_file_name(static_cast<int>(request.rank + part * request.ranks) + 1, number, targets.directories[targets.of[pieces[0].tensor].directory].files));
      file.size = header.size();
      for (auto const& info : infos) {
        Piece const& piece = *by_name[info.name];
        plan.stored.push_back({piece.tensor, f, header.size() + info.begin, piece.box});
        file.size = header.size() + info.end;
      }
      file.literals.push_back({0, std::move(header)});
    }
    return plan;
  }

  void check_index(Scan const& scan, std::vector<FoundFile> const& found) const {
    Problems problems;
    std::uint64_t total = 0;
    std::vector<std::pair<std::string_view, std::string_view>> held;
    for (auto const& file : found)
      for (auto const& tensor : file.tensors) {
        held.emplace_back(tensor.name, file.path);
        total += safetensors::tensor_bytes(tensor.dtype, tensor.shape);
        auto const at = std::lower_bound(scan.index.begin(), scan.index.end(), tensor.name, [](auto const& entry, std::string const& name) { return entry.first < name; });
        if (at == scan.index.end() || at->first != tensor.name) problems.add(ErrorCode::index_mismatch, tensor.name + ": in " + file.path + ", but not in the index");
        else if (at->second != file.path) problems.add(ErrorCode::index_mismatch, tensor.name + ": in " + file.path + ", but the index puts it into " + at->second);
      }
    detail::sort(held);
    for (auto const& [name, file] : scan.index)
      if (!sorted_contains(held, std::pair<std::string_view, std::string_view>{name, file})) problems.add(ErrorCode::missing_tensor, name + ": the index puts it into " + file + ", which does not hold it");
    if (problems.empty() && !options_.ignore_total_size && scan.total_size >= 0 && static_cast<std::uint64_t>(scan.total_size) != total) {
      problems.add(ErrorCode::index_mismatch, "the index says that tensors have " + std::to_string(scan.total_size) + " bytes in all, and they have " + std::to_string(total));
      problems.hint("SafeTensorsOptions::ignore_total_size loads it nevertheless");
    }
    problems.raise();
  }

  static void restore_names(FoundFile& file, std::vector<RecordGroup> const& groups) {
    auto const slash = file.path.rfind('/');
    std::string const directory = slash == std::string::npos ? "" : file.path.substr(0, slash);
    for (auto const& group : groups) {
      if (!group.strip || group.prefix.empty() || group.directory != directory) continue;
      for (auto& tensor : file.tensors) tensor.name = group.prefix + '.' + tensor.name;
      for (auto& tie : file.ties) tie = {group.prefix + '.' + tie.dropped, group.prefix + '.' + tie.kept};
      return;
    }
  }

  SafeTensorsOptions options_;
  std::vector<RecordGroup> groups_;
};
}  // namespace detail

template <std::derived_from<LocalFs> Fs>
struct MediumPlace<Fs> {
  using type = std::filesystem::path;
  template <class M = Fs>   // a parameter, so that the model of the medium waits for a call
  static PlaceRef locate(type const& place) { return {std::make_shared<MediumModel<M>>(M{}), place.string()}; }
};

/// safetensors over any medium. Place: std::filesystem::path for the file system, {medium, prefix} for others.
template <class M>
struct BasicSafeTensors {
  using Medium = M;
  using Place = typename MediumPlace<M>::type;
  using Options = SafeTensorsOptions;
  template <class D = Deferred>
  static std::unique_ptr<AnyStorage> open(Options const& options) { return std::make_unique<detail::SafeTensorsDriver<D>>(options); }
  static PlaceRef locate(Place const& place) { return MediumPlace<M>::locate(place); }
};

/// Example   dcp::save<dcp::SafeTensors>(world, "ckpt/step-100", state);
using SafeTensors = BasicSafeTensors<LocalFs>;
static_assert(Storage<SafeTensors>);

}  // namespace dcp
