// SPDX-License-Identifier: Apache-2.0
#pragma once
// The checkpoints of torch.distributed.checkpoint (FileSystemWriter, FileSystemReader): .metadata, which says what lies where, and __<rank>_<n>.distcp, in which
// every tensor chunk and every object is an archive of torch.save. Read as data: nothing in them is run.
//
// Written   one file per rank, with the boxes that it stores; objects are in that of rank 0. PyTorch knows no tied tensors: .metadata has both names, for the same
//           archives. The commit record and the checksums lie beside them, and PyTorch does not look at them.

#include <dcp/base/algorithms.hpp>
#include <dcp/base/checksum.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/problems.hpp>
#include <dcp/formats/torch_metadata.hpp>
#include <dcp/formats/torch_objects.hpp>
#include <dcp/formats/zip.hpp>
#include <dcp/media/local_fs.hpp>
#include <dcp/storage/pieces.hpp>
#include <dcp/storage/safetensors.hpp>
#include <dcp/storage/storage.hpp>
#include <dcp/storage/torch_archive.hpp>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp {

struct TorchDcpOptions {
  // Reading: each gives up one refusal.
  bool opaque_objects = false;   // an object of an unknown class becomes {"__type__": "opaque", "class": ...}
};

namespace detail {

/// What .metadata says, or what several do that ranks wrote each for itself.
struct TorchListing {
  std::uint64_t digest = 0;                       // of the texts that it was read from
  std::vector<torch::Metadata> parts;
  std::map<std::pair<std::string, std::uint64_t>, std::vector<std::string>> transforms;   // by path and offset, where there are some

  template <class = Deferred>
  static TorchListing of(Scan const& scan) {
    TorchListing listing;
    listing.digest = digest_of(scan);
    for (auto const& [name, text] : scan.texts) {
      try {
        listing.parts.push_back(torch::parse_metadata(as_byte_span(text)));
        for (auto const& entry : listing.parts.back().entries) {
          auto const check = [&](torch::ItemPlace const& place) {
            require_inside(place.path, "the metadata");
            if (!place.transforms.empty()) listing.transforms[{place.path, place.offset}] = place.transforms;
          };
          if (!entry.is_tensor) check(entry.place);
          for (auto const& chunk : entry.chunks) check(chunk.place);
        }
      } catch (Error& error) {
        throw error.with_path(scan.directory + '/' + name);
      }
    }
    return listing;
  }
  template <class = Deferred>
  static std::uint64_t digest_of(Scan const& scan) {
    std::uint64_t digest = scan.texts.size();
    for (auto const& [name, text] : scan.texts) digest = digest * 0x9E3779B97F4A7C15u ^ crc64(as_byte_span(text));
    return digest;
  }
};

template <class D = Deferred>
class TorchDcpDriver final : public AnyStorage {
 public:
  explicit TorchDcpDriver(TorchDcpOptions options) : options_{std::move(options)} {}

  std::string_view name() const override { return "torch_dcp"; }
  std::string file_layout() const override { return "sharded"; }
  std::string options_text() const override { return options_.opaque_objects ? "opaque_objects" : ""; }
  std::vector<RecordGroup> groups() const override { return {}; }
  std::vector<std::pair<std::string, Bytes>> extra_files() const override { return {}; }
  bool holds_values() const override { return true; }
  bool files_have_headers() const override { return false; }

  FilePlan plan_files(SaveRequest const& request) const override {
    FilePlan plan;
    PlannedFile file;
    file.path = data_file_name(request.rank);
    file.only_rank = request.rank;
    torch::Metadata metadata;
    std::vector<NameJoints> joints;                                                     // of its entries
    bool const all = request.rank == 0;                                                 // whose metadata lists what every rank stores
    std::vector<std::uint64_t> ends(static_cast<std::size_t>(all ? request.ranks : 1), 0);   // of the ranks' files, so far
    Problems problems;
    if (all && request.values != nullptr)
      for (std::size_t v = 0; v < request.values->size(); ++v) {
        auto const& [name, value] = (*request.values)[v];
        try {
          Bytes bytes = object_archive(value);
          torch::MetadataEntry& entry = metadata.entries.emplace_back();
          entry.name = name;
          entry.is_tensor = false;
          entry.place = {file.path, ends[0], bytes.size(), {}};
          ends[0] += bytes.size();
          joints.push_back(request.value_joints == nullptr ? NameJoints{} : (*request.value_joints)[v]);
          file.literals.push_back({entry.place.offset, std::move(bytes)});
        } catch (Error const& error) {
          problems.add(error.code(), name + ": " + error.message());
        }
      }
    std::size_t const first_tensor = metadata.entries.size();
    Archives archives;
    for (std::uint32_t t = 0; t < request.tensors.size(); ++t) {
      TensorSpec const& tensor = request.tensors[t];
      torch::MetadataEntry* entry = nullptr;
      if (all) {
        entry = &metadata.entries.emplace_back();
        entry->name = tensor.name;
        entry->dtype = tensor.dtype;
        entry->shape = tensor.layout.shape;
        joints.push_back(tensor.joints);
      }
      try {
        if (torch::dtype_name(tensor.dtype).empty()) throw Error{ErrorCode::unsupported_dtype, "PyTorch has no tensors of " + std::string{to_string(tensor.dtype)}};
        for (std::int64_t rank = all ? 0 : request.rank; rank < (all ? request.ranks : request.rank + 1); ++rank)
          for_each_piece(request, t, rank, [&](Box const& box) {
            std::uint64_t& end = ends[static_cast<std::size_t>(all ? rank : 0)];
            Archive const& archive = archives.of(tensor.dtype, box.shape, rank == request.rank);
            if (entry != nullptr) entry->chunks.push_back({box, {rank == request.rank ? file.path : data_file_name(rank), end, archive.layout.size, {}}});
            if (rank == request.rank) add_archive(plan, file, t, box, archive, end);
            end += archive.layout.size;
          });
      } catch (Error const& error) {
        problems.add(error.code(), error.message().starts_with(tensor.name) ? error.message() : tensor.name + ": " + error.message());
      }
    }
    problems.raise();
    if (all)
      for (auto const& tie : request.ties) {
        auto const kept = std::lower_bound(request.tensors.begin(), request.tensors.end(), tie.kept, [](TensorSpec const& tensor, std::string const& name) { return tensor.name < name; });
        if (kept == request.tensors.end() || kept->name != tie.kept) continue;   // encoded, and so nothing that PyTorch reads
        torch::MetadataEntry entry = metadata.entries[first_tensor + static_cast<std::size_t>(kept - request.tensors.begin())];
        entry.name = tie.dropped;
        metadata.entries.push_back(std::move(entry));
        joints.push_back(tie.joints);
      }
    file.size = ends[0];
    if (file.size > 0) plan.files.push_back(std::move(file));
    if (all) plan.commit_files.emplace_back(std::string{metadata_name}, torch::write_metadata(metadata, joints));
    return plan;
  }

  Scan scan(AnyMedium& medium, std::string const& path, CommitRecord const* record) const override {
    Scan scan;
    scan.directory = path;
    if (medium.kind(path) == EntryKind::file)
      throw Error{ErrorCode::unsupported, "a checkpoint of torch.distributed.checkpoint is a directory, and this is a file"}.with_path(path).with_hint("TorchFile reads what torch.save wrote to a file");
    constexpr std::uint64_t most = 4ull << 30;
    auto const text_of = [&](std::string const& name) {
      Bytes const bytes = read_file(medium, path + '/' + name, most);
      return std::string{as_text(bytes)};
    };
    std::vector<std::pair<std::uint64_t, std::string>> of_ranks;   // __<rank>.metadata
    bool whole = false;
    std::vector<std::string> data;   // files with something in them: PyTorch's threads leave empty ones where they have nothing to write
    for (auto const& entry : medium.list(path)) {
      std::uint64_t rank = 0;
      if (entry.name == metadata_name) whole = true;
      else if (entry.name.ends_with(".distcp") && entry.size > 0) data.push_back(entry.name);
      else if (is_rank_metadata(entry.name, rank)) of_ranks.emplace_back(rank, entry.name);
    }
    if (!whole && of_ranks.empty()) {
      Error error{ErrorCode::not_found, "the directory holds no " + std::string{metadata_name}};
      error.with_path(path);
      if (!data.empty()) error.with_hint("PyTorch writes it last: this save did not end");
      throw error;
    }
    if (whole) {
      scan.texts.emplace_back(std::string{metadata_name}, text_of(std::string{metadata_name}));
    } else {
      detail::sort(of_ranks);
      for (std::uint64_t r = 0; r < of_ranks.size(); ++r)
        if (of_ranks[static_cast<std::size_t>(r)].first != r) throw Error{ErrorCode::missing_file, "ranks have written their own metadata, and that of rank " + std::to_string(r) + " is missing"}.with_path(path);
      for (auto const& [rank, name] : of_ranks) scan.texts.emplace_back(name, text_of(name));
    }
    if (record != nullptr) {
      scan.files = data_files(*record);
      return scan;
    }
    for (auto const& part : listing(scan).parts)
      for (auto const& entry : part.entries) {
        if (!entry.is_tensor) scan.files.push_back(entry.place.path);
        for (auto const& chunk : entry.chunks) scan.files.push_back(chunk.place.path);
      }
    detail::sort(scan.files);
    scan.files.erase(std::unique(scan.files.begin(), scan.files.end()), scan.files.end());
    std::size_t stale = 0;
    for (auto const& name : data)
      if (!sorted_contains(scan.files, name)) ++stale;
    if (stale > 0) scan.warnings.push_back(std::to_string(stale) + " files with names of data files are not part of the checkpoint");
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
      found.pieces = true;
      if (!scan.foreign) return found;   // the commit record has the values
      for (auto const& part : listing(scan).parts)
        for (auto const& entry : part.entries)
          if (!entry.is_tensor && entry.place.path == file) found.values.emplace_back(entry.name, read_object(*in, found.size, entry));
      return found;
    } catch (Error& error) {
      throw error.with_path(path);
    }
  }

  Catalog assemble(Scan const& scan, std::vector<FoundFile> found, CommitRecord const* record) const override {
    TorchListing const& metadata = listing(scan);
    std::sort(found.begin(), found.end(), [](FoundFile const& a, FoundFile const& b) { return a.path < b.path; });
    Problems problems;
    Archives archives;
    std::vector<std::pair<std::string_view, torch::MetadataEntry const*>> known;
    FoundFile* last = nullptr;   // most items are in the file of the one before
    auto const file_of = [&](std::string const& name, torch::ItemPlace const& place) -> FoundFile* {
      if (last == nullptr || last->path != place.path) {
        auto const at = std::lower_bound(found.begin(), found.end(), place.path, [](FoundFile const& file, std::string const& wanted) { return file.path < wanted; });
        last = at != found.end() && at->path == place.path ? &*at : nullptr;
      }
      if (last == nullptr) problems.add(ErrorCode::index_mismatch, name + ": the metadata puts it into " + json_quoted(place.path) + ", which the commit record does not list");
      else if (place.offset > last->size || place.length > last->size - place.offset)
        problems.add(ErrorCode::truncated, name + ": the metadata puts it at " + std::to_string(place.length) + " bytes from byte " + std::to_string(place.offset) + " of " + place.path + ", which has " + std::to_string(last->size));
      else return last;
      return nullptr;
    };
    std::vector<std::string> tied;   // as the commit record has them
    if (record != nullptr)
      for (auto const& [dropped, kept] : record->ties) tied.push_back(dropped);
    detail::sort(tied);
    for (auto const& part : metadata.parts)
      for (auto const& entry : part.entries) {
        if (sorted_contains(tied, entry.name)) continue;
        if (!entry.is_tensor) {
          file_of(entry.name, entry.place);
          continue;
        }
        known.emplace_back(entry.name, &entry);
        for (auto const& chunk : entry.chunks) {
          FoundFile* const file = file_of(entry.name, chunk.place);
          if (file == nullptr) continue;
          FoundTensor tensor{entry.name, entry.dtype, chunk.box.shape, chunk.place.offset, chunk.box.origin, {}, std::max<std::uint64_t>(1, chunk.place.length)};
          // Where this library has written it, it lies where this library puts it.
          if (record != nullptr && chunk.place.transforms.empty())
            if (Archive const& archive = archives.of(entry.dtype, chunk.box.shape, false); archive.layout.size == chunk.place.length) tensor.offset += archive.data(), tensor.container_bytes = 0;
          file->tensors.push_back(std::move(tensor));
        }
      }
    problems.raise();
    std::vector<std::pair<std::string, Value>> values;
    for (auto& file : found) append(values, file.values);
    Catalog catalog = dcp::assemble(std::move(found));
    std::stable_sort(known.begin(), known.end(), [](auto const& a, auto const& b) { return a.first < b.first; });
    for (std::size_t i = 0; i < known.size(); ++i) {
      torch::MetadataEntry const& entry = *known[i].second;
      if (i > 0 && known[i].first == known[i - 1].first) {
        if (!(entry.shape == known[i - 1].second->shape)) problems.add(ErrorCode::index_mismatch, entry.name + ": ranks speak of " + to_string(known[i - 1].second->shape) + " and " + to_string(entry.shape));
        continue;
      }
      CatalogTensor const* tensor = catalog.find_tensor(entry.name);
      if (tensor != nullptr && tensor->shape == entry.shape) continue;
      if (tensor == nullptr && entry.shape.empty()) catalog.tensors.push_back({entry.name, entry.dtype, entry.shape, {}, {}});
      else problems.add(ErrorCode::incomplete, entry.name + ": its chunks do not make up " + to_string(entry.shape));
    }
    problems.raise();
    std::sort(catalog.tensors.begin(), catalog.tensors.end(), [](CatalogTensor const& a, CatalogTensor const& b) { return a.name < b.name; });
    // Of ranks that wrote metadata of their own, the value of the lowest counts, as of files in their order.
    std::stable_sort(values.begin(), values.end(), [](auto const& a, auto const& b) { return a.first < b.first; });
    values.erase(std::unique(values.begin(), values.end(), [](auto const& a, auto const& b) { return a.first == b.first; }), values.end());
    catalog.values = std::move(values);
    for (auto const& part : metadata.parts) append(catalog.joints, part.joints);
    if (metadata.parts.size() > 1) std::stable_sort(catalog.joints.begin(), catalog.joints.end());
    append(catalog.warnings, scan.warnings);
    return catalog;
  }

  void locate(AnyMedium& medium, std::string const& directory, Catalog const& catalog, std::vector<CatalogTensor*> const& tensors) const override {
    struct Wanted {
      CatalogTensor* tensor;
      StoredPiece* piece;
    };
    std::vector<Wanted> wanted;
    for (auto* tensor : tensors)
      for (auto* pieces : {&tensor->pieces, &tensor->copies})
        for (auto& piece : *pieces)
          if (piece.container_bytes != 0 && !piece.box.empty()) wanted.push_back({tensor, &piece});
    std::sort(wanted.begin(), wanted.end(), [](Wanted const& a, Wanted const& b) { return a.piece->file != b.piece->file ? a.piece->file < b.piece->file : a.piece->offset < b.piece->offset; });
    std::unique_ptr<ReadableFile> file;
    Window window;
    std::uint32_t open = ~0u;
    for (auto const& [tensor, piece] : wanted) {
      CatalogFile const& known = catalog.files[piece->file];
      if (piece->file != open) {
        file = medium.open_read(directory + '/' + known.path);
        window = Window{file.get(), known.size, {}, 0};
        open = piece->file;
      }
      std::uint64_t const begin = piece->offset, length = piece->container_bytes;
      try {
        if (auto const at = transforms(known.path, begin); at != nullptr) {
          auto decoded = std::make_shared<CatalogTensor>();
          decoded->name = tensor->name;
          decoded->dtype = tensor->dtype;
          decoded->shape = piece->box.shape;
          decoded->encoding = std::make_shared<TransformedEncoding<>>(tensor->name, tensor->dtype, piece->box.shape, length, *at);
          decoded->parts.push_back({{piece->file, begin, Box::whole(Extents{static_cast<std::int64_t>(length)}), 0, {}, {}}});
          piece->decoded = std::move(decoded);
        } else if (length <= Window::small_bytes) {
          settle_piece(tensor->name, tensor->dtype, *piece, archived_tensor(archive_in(window.bytes(begin, length))), begin);
        } else {
          settle_piece(tensor->name, tensor->dtype, *piece, archived_tensor(TorchArchive{length, [&](std::uint64_t position, ByteSpan bytes) { file->read_at(begin + position, bytes); }}), begin);
        }
      } catch (Error const& error) {
        throw Error{error.code(), tensor->name + ": " + error.message()}.with_path(directory + '/' + known.path).with_range(begin, begin + length).with_hint(error.hint());
      }
    }
  }

 private:
  static constexpr std::string_view metadata_name = ".metadata";

  static std::string data_file_name(std::int64_t rank) { return "__" + std::to_string(rank) + "_0.distcp"; }
  static bool is_rank_metadata(std::string_view name, std::uint64_t& rank) {
    constexpr std::string_view before = "__", behind = ".metadata";
    if (!name.starts_with(before) || !name.ends_with(behind) || name.size() <= before.size() + behind.size()) return false;
    std::string_view const digits = name.substr(before.size(), name.size() - before.size() - behind.size());
    auto const [end, problem] = std::from_chars(digits.data(), digits.data() + digits.size(), rank);
    return problem == std::errc{} && end == digits.data() + digits.size();
  }

  // Small archives lie next to each other: they are read many at a time.
  struct Window {
    static constexpr std::uint64_t small_bytes = 64 << 10, most_bytes = 1 << 20;
    ReadableFile* file = nullptr;
    std::uint64_t file_size = 0;
    Bytes held{};
    std::uint64_t begin = 0;

    ConstByteSpan bytes(std::uint64_t at, std::uint64_t size) {
      if (at < begin || at + size > begin + held.size()) {
        // More than is asked for only where the last reading was of use for more than its first archive.
        bool const near = !held.empty() && at >= begin && at <= begin + held.size();
        held.resize(static_cast<std::size_t>(std::min(file_size - at, near ? most_bytes : std::max(size, small_bytes))));
        begin = at;
        file->read_at(at, held);
      }
      return ConstByteSpan{held}.subspan(static_cast<std::size_t>(at - begin), static_cast<std::size_t>(size));
    }
  };

  // The archives of tensors of one shape differ only in the data, and in the CRC-32 of it.
  struct Archive {
    DType dtype{};
    Extents shape;
    bool with_pieces = false;
    zip::Layout layout;

    std::uint64_t data() const { return layout.data[zip::TorchRecords<>::record_of_storage(0)]; }
  };
  class Archives {
   public:
    // The reference holds until the next call.
    Archive const& of(DType dtype, Extents const& shape, bool with_pieces) {
      for (auto& known : known_)
        if (known.dtype == dtype && known.shape == shape && known.with_pieces >= with_pieces) return known;
      Archive made{dtype, shape, with_pieces, {}};
      pickle::Writer pickle;
      torch::write_tensor(pickle, dtype, torch::shape_to_torch(dtype, shape));
      Bytes const bytes = pickle.take();
      zip::Storage const storage{{}, bytes_of(dtype, shape.elements()), true};
      zip::TorchRecords<> const records{bytes, {&storage, 1}};
      made.layout = zip::lay_out(records.records(), with_pieces ? zip::LayoutParts::all : zip::LayoutParts::sizes_only);
      if (known_.size() < most) return known_.emplace_back(std::move(made));
      return known_[next_++ % most] = std::move(made);
    }

   private:
    static constexpr std::size_t most = 16;
    std::vector<Archive> known_;
    std::size_t next_ = 0;
  };

  static void add_archive(FilePlan& plan, PlannedFile& file, std::uint32_t tensor, Box const& box, Archive const& archive, std::uint64_t begin) {
    auto const stored = static_cast<std::uint32_t>(plan.stored.size());
    bool const empty = box.shape.empty();
    if (!empty) plan.stored.push_back({tensor, 0, begin + archive.data(), box});
    for (std::size_t p = 0; p < archive.layout.pieces.size(); ++p) {
      auto const& piece = archive.layout.pieces[p];
      std::vector<std::uint32_t> at;
      for (auto const& place : archive.layout.crcs)
        if (place.piece == p) at.push_back(static_cast<std::uint32_t>(place.at));
      if (at.empty() || empty) file.literals.push_back({begin + piece.offset, piece.bytes});
      else plan.crc_literals.push_back({stored, begin + piece.offset, piece.bytes, std::move(at)});
    }
  }

  static Bytes object_archive(Value const& value) {
    std::vector<torch::ObjectRecord> records;
    Bytes const pickle = torch::write_object(value, records);
    std::vector<zip::Storage> storages;
    for (auto const& record : records) storages.push_back({record.bytes, record.bytes.size(), false});
    zip::TorchRecords<> const all{pickle, storages};
    return zip::write(all.records());
  }

  Value read_object(ReadableFile& in, std::uint64_t file_size, torch::MetadataEntry const& entry) const {
    constexpr std::uint64_t most = 1ull << 30;
    torch::ItemPlace const& place = entry.place;
    try {
      if (place.offset > file_size || place.length > file_size - place.offset)
        throw Error{ErrorCode::truncated, "the metadata puts it at " + std::to_string(place.length) + " bytes from byte " + std::to_string(place.offset) + " of " + place.path + ", which has " + std::to_string(file_size)};
      if (place.length > most) throw Error{ErrorCode::limit, "an object of " + std::to_string(place.length) + " bytes"};
      Bytes bytes(static_cast<std::size_t>(place.length));
      in.read_at(place.offset, bytes);
      if (!place.transforms.empty()) bytes = undo_transforms(bytes, place.transforms, most);
      auto const archive = archive_in(bytes);
      Bytes const text = archive.pickle();
      pickle::ParseOptions parse;
      parse.opaque = options_.opaque_objects;
      auto const tree = pickle::Tree::parse(text, torch::is_known_global<>, parse);
      torch::ObjectOptions object;
      object.opaque = options_.opaque_objects;
      return object_of(archive, tree.root(), object);
    } catch (Error const& error) {
      Error named{error.code(), entry.name + ": " + error.message()};
      named.with_range(place.offset, place.offset + place.length);
      if (error.code() == ErrorCode::unsupported && !options_.opaque_objects) named.with_hint("TorchDcpOptions::opaque_objects lists objects of unknown classes without what is in them");
      throw named;
    }
  }

  TorchListing const& listing(Scan const& scan) const {
    if (!listing_ || listing_->digest != TorchListing::digest_of(scan)) listing_.emplace(TorchListing::of(scan));
    return *listing_;
  }
  std::vector<std::string> const* transforms(std::string const& path, std::uint64_t offset) const {
    if (!listing_ || listing_->transforms.empty()) return nullptr;
    auto const at = listing_->transforms.find({path, offset});
    return at == listing_->transforms.end() ? nullptr : &at->second;
  }

  TorchDcpOptions options_;
  mutable std::optional<TorchListing> listing_;   // of the last scan that was looked at
};
}  // namespace detail

/// PyTorch's distributed checkpoints over any medium. Place: as of BasicSafeTensors.
template <class M>
struct BasicTorchDcp {
  using Medium = M;
  using Place = typename MediumPlace<M>::type;
  using Options = TorchDcpOptions;
  template <class D = Deferred>
  static std::unique_ptr<AnyStorage> open(Options const& options) { return std::make_unique<detail::TorchDcpDriver<D>>(options); }
  static PlaceRef locate(Place const& place) { return MediumPlace<M>::locate(place); }
};

/// Reads what torch.distributed.checkpoint wrote (2.0 and later), and writes what it reads.
///
/// Names     those of PyTorch's flattened state: the keys of nested dicts and positions in lists, joined by dots
/// Objects   numbers, text, bytes, lists of numbers load into their C++ types, everything else as JSON: see formats/torch_objects.hpp
/// Example   dcp::load<dcp::TorchDcp>(world, "ckpt/step-100", {{"model", model}, {"step", step}});
using TorchDcp = BasicTorchDcp<LocalFs>;
static_assert(Storage<TorchDcp>);

}  // namespace dcp
