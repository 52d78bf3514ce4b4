// SPDX-License-Identifier: Apache-2.0
#pragma once
// A file of torch.save (.pt, .pth, .bin, .ckpt): one archive, whose pickle holds nested dicts and lists with tensors over shared storages. Read as data, and only read.

#include <dcp/base/algorithms.hpp>
#include <dcp/base/config.hpp>
#include <dcp/core/strided_tensor.hpp>
#include <dcp/formats/pickle.hpp>
#include <dcp/formats/torch_objects.hpp>
#include <dcp/media/local_fs.hpp>
#include <dcp/storage/safetensors.hpp>
#include <dcp/storage/storage.hpp>
#include <dcp/storage/torch_archive.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp {

struct TorchFileOptions {
  bool opaque_objects = false;   // an object of an unknown class becomes {"__type__": "opaque", "class": ...}, instead of being an error
};

namespace detail {

template <class D = Deferred>
class TorchFileDriver final : public AnyStorage {
 public:
  explicit TorchFileDriver(TorchFileOptions options) : options_{std::move(options)} {}

  std::string_view name() const override { return "torch_file"; }
  std::string file_layout() const override { return "final"; }
  std::string options_text() const override { return options_.opaque_objects ? "opaque_objects" : ""; }
  std::vector<RecordGroup> groups() const override { return {}; }
  std::vector<std::pair<std::string, Bytes>> extra_files() const override { return {}; }
  FilePlan plan_files(SaveRequest const&) const override { throw Error{ErrorCode::unsupported, "files of torch.save are only read; TorchDcp is what PyTorch loads"}; }

  Scan scan(AnyMedium& medium, std::string const& path, CommitRecord const*) const override {
    Scan scan;
    if (medium.kind(path) != EntryKind::file) throw Error{ErrorCode::not_found, "there is no file here"}.with_path(path).with_hint("a directory with .metadata is a checkpoint of TorchDcp");
    scan.files.push_back(in_directory(path, scan.directory));
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
      require_zip(*in, found.size);
      read_archive(*in, found);
      return found;
    } catch (Error& error) {
      throw error.with_path(path);
    }
  }

  Catalog assemble(Scan const& scan, std::vector<FoundFile> found, CommitRecord const*) const override {
    std::map<std::string, Bytes> contents;
    std::vector<std::pair<std::string, Value>> values;
    std::vector<std::pair<std::string, NameJoints>> joints;
    for (auto& file : found) {
      for (auto& tensor : file.tensors) contents[tensor.name] = std::move(tensor.content);
      values = std::move(file.values);
      joints = std::move(file.joints);
    }
    Catalog catalog = dcp::assemble(std::move(found));
    for (auto& tensor : catalog.tensors) settle(tensor, contents[tensor.name]);
    std::sort(values.begin(), values.end(), [](auto const& a, auto const& b) { return a.first < b.first; });
    detail::sort(joints);
    catalog.values = std::move(values);
    catalog.joints = std::move(joints);
    append(catalog.warnings, scan.warnings);
    return catalog;
  }

 private:
  static void require_zip(ReadableFile& in, std::uint64_t size) {
    std::array<std::byte, 4> first{};
    if (size >= first.size()) in.read_at(0, first);
    if (as_text(first).starts_with("PK")) return;
    Error error{ErrorCode::bad_magic, "this is no zip archive, as torch.save makes them"};
    if (as_text(first)[0] == '\x80') error.with_hint("it looks like a pickle: a file of PyTorch before 1.6, or of torch.save with _use_new_zipfile_serialization=False; load and save it again with PyTorch");
    throw error;
  }

  // What settle() needs of a tensor.
  struct View {
    std::uint64_t record = 0, record_bytes = 0;   // of its storage, in the file
    std::uint32_t crc = 0;
    ElementTransform how;
    std::vector<std::uint64_t> strides;

    Bytes encode() const {
      ByteWriter out;
      out.number(record).number(record_bytes).number(crc).number(how.conjugate).number(how.negative).number(how.swapped).number(static_cast<std::uint64_t>(strides.size()));
      for (auto const stride : strides) out.number(stride);
      return out.take();
    }
    static View decode(ConstByteSpan bytes) {
      ByteReader in{bytes};
      View view;
      view.record = in.number<std::uint64_t>(), view.record_bytes = in.number<std::uint64_t>(), view.crc = in.number<std::uint32_t>();
      view.how.conjugate = in.number<bool>(), view.how.negative = in.number<bool>(), view.how.swapped = in.number<bool>();
      for (auto count = in.number<std::uint64_t>(); count > 0 && in.ok(); --count) view.strides.push_back(in.number<std::uint64_t>());
      return view;
    }
  };

  void read_archive(ReadableFile& in, FoundFile& found) const {
    TorchArchive const archive{found.size, [&](std::uint64_t position, ByteSpan bytes) { in.read_at(position, bytes); }};
    Bytes const text = archive.pickle();
    pickle::ParseOptions parse;
    parse.opaque = options_.opaque_objects;
    auto const tree = pickle::Tree::parse(text, torch::is_known_global<>, parse);
    torch::ObjectOptions object;
    object.opaque = options_.opaque_objects;
    std::set<std::string> names;
    std::map<std::pair<std::uint64_t, Bytes>, std::string> views;   // of the names that are stored, by position and content
    torch::for_each_leaf(tree.root(), [&](torch::Leaf const& leaf, pickle::Value const& value) {
      try {
        if (!names.insert(leaf.name).second) throw Error{ErrorCode::duplicate_entry, "two entries of nested dicts have this name"};
        if (!leaf.joints.empty()) found.joints.emplace_back(leaf.name, leaf.joints);
        if (!torch::is_tensor(value)) {
          found.values.emplace_back(leaf.name, object_of(archive, value, object));
          return;
        }
        ArchivedTensor const tensor = archived_tensor(archive, value);
        Extents const shape = torch::shape_from_torch(tensor.object.dtype, tensor.object.shape);
        FoundTensor entry{leaf.name, tensor.object.dtype, shape, tensor.data + tensor.object.first * torch::element_bytes(tensor.object.dtype), Extents::filled(shape.rank(), 0),
                          View{tensor.data, tensor.record_bytes, tensor.crc32, tensor.transform(), tensor.object.strides}.encode()};
        // Names of one view are tied: the same elements, in the same shape, looked at in the same way.
        Bytes what = entry.content;
        ByteWriter form;
        form.number(entry.dtype);
        for (auto const size : shape) form.number(size);
        append(what, form.take());
        auto const [same, fresh] = views.try_emplace({entry.offset, std::move(what)}, leaf.name);
        if (fresh || shape.empty()) found.tensors.push_back(std::move(entry));
        else found.ties.push_back({leaf.name, same->second});
      } catch (Error const& error) {
        Error named{error.code(), leaf.name + ": " + error.message()};
        if (error.code() == ErrorCode::unsupported && !options_.opaque_objects) named.with_hint("TorchFileOptions::opaque_objects lists objects of unknown classes without what is in them");
        throw named;
      }
    });
  }

  static void settle(CatalogTensor& tensor, ConstByteSpan content) {
    View const view = View::decode(content);
    StoredPiece& piece = tensor.pieces.at(0);
    Extents const torch_shape = torch::shape_to_torch(tensor.dtype, tensor.shape);
    if (is_dense(torch_shape, view.strides) && !view.how.any()) {
      if (piece.offset == view.record && bytes_of(tensor.dtype, tensor.shape.elements()) == view.record_bytes) piece.crc32 = view.crc;
      return;
    }
    make_view(tensor.name, tensor.dtype, piece, piece.offset, view.strides, (view.record + view.record_bytes - piece.offset) / torch::element_bytes(tensor.dtype), view.how);
  }

  TorchFileOptions options_;
};
}  // namespace detail

/// One file of torch.save over any medium. Place: the file.
template <class M>
struct BasicTorchFile {
  using Medium = M;
  using Place = typename MediumPlace<M>::type;
  using Options = TorchFileOptions;
  static constexpr bool writable = false;
  template <class D = Deferred>
  static std::unique_ptr<AnyStorage> open(Options const& options) { return std::make_unique<detail::TorchFileDriver<D>>(options); }
  static PlaceRef locate(Place const& place) { return MediumPlace<M>::locate(place); }
};

/// What torch.save wrote to a file (PyTorch 1.6 and later), read-only: tensors with any strides over shared storages, and every object that PyTorch's weights_only
/// unpickler loads.
///
/// Names     the keys of nested dicts and positions in lists, joined by dots; a tensor alone is "tensor", another object "value". Names of one and the same view are tied
/// Example   auto state = dcp::load_from_keys<dcp::TorchFile>(self, "model.pt", {"model"});
using TorchFile = BasicTorchFile<LocalFs>;
static_assert(Storage<TorchFile>);

}  // namespace dcp
