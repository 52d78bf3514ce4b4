// SPDX-License-Identifier: Apache-2.0
#pragma once
// Archives of torch.save, as items of a checkpoint or files of their own: where in one the bytes of a tensor lie, and what object is in one.

#include <dcp/base/algorithms.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/crc32.hpp>
#include <dcp/base/zstd_library.hpp>
#include <dcp/core/strided_tensor.hpp>
#include <dcp/formats/pickle.hpp>
#include <dcp/formats/torch_objects.hpp>
#include <dcp/formats/zip.hpp>
#include <dcp/plan/catalog.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp::detail {

/// An archive of torch.save in memory.
class TorchArchive {
 public:
  template <class = Deferred>
  explicit TorchArchive(ConstByteSpan bytes) : bytes_{bytes}, directory_{zip::read_directory(bytes)} {
    // All records are below one directory, whose name is that of the file that was first written.
    for (auto const& entry : directory_.entries)
      if (entry.name.ends_with(pickle_name) && entry.name.find('/') == entry.name.size() - pickle_name.size()) root_ = entry.name.substr(0, entry.name.size() - pickle_name.size());
    if (root_.empty()) throw Error{ErrorCode::bad_schema, "an archive without a data.pkl"};
    if (auto const* order = find("byteorder")) {
      std::string_view const text = as_text(zip::data_of(bytes_, *order));
      if (text != "little" && text != "big") throw Error{ErrorCode::bad_schema, "the byte order " + shown(text)};
      swapped_ = text == "big";
    }
  }

  /// The pickle, once its CRC-32 has been compared.
  template <class = Deferred>
  ConstByteSpan pickle() const { return data(*find("data.pkl")); }
  /// The bytes of storage `key`, compared.
  template <class = Deferred>
  ConstByteSpan storage(std::string_view key) const { return data(record(key)); }
  /// Where they are.
  template <class = Deferred>
  zip::BasicEntry<std::string_view> const& record(std::string_view key) const {
    auto const* entry = find("data/" + std::string{key});
    if (entry == nullptr) throw Error{ErrorCode::missing_tensor, "an archive without the storage " + shown(key) + " of its tensor"};
    return *entry;
  }
  bool swapped() const { return swapped_; }

 private:
  static constexpr std::string_view pickle_name = "/data.pkl";

  template <class = Deferred>
  zip::BasicEntry<std::string_view> const* find(std::string const& name) const { return directory_.find(std::string{root_} + '/' + name); }
  template <class = Deferred>
  ConstByteSpan data(zip::BasicEntry<std::string_view> const& entry) const {
    ConstByteSpan const data = zip::data_of(bytes_, entry);
    zip::check_crc(entry, crc32(data));
    return data;
  }

  ConstByteSpan bytes_;
  zip::DirectoryView directory_;
  std::string_view root_;
  bool swapped_ = false;
};

/// The tensor of an archive, and where its storage lies.
struct ArchivedTensor {
  torch::TensorObject object;    // but for its key
  std::uint64_t data = 0;        // position of the storage in the archive
  std::uint64_t record_bytes = 0;
  std::uint32_t crc32 = 0;       // of the record
  bool swapped = false;

  ElementTransform transform() const { return {object.conjugate, object.negative, swapped && number_bytes(object.dtype) > 1}; }
};

template <class = Deferred>
ArchivedTensor archived_tensor(ConstByteSpan pickle_bytes, bool swapped, torch::TensorObject& object) {
  auto const tree = pickle::Tree::parse(pickle_bytes, torch::is_known_global<>);
  object = torch::parse_tensor(tree.root());
  return {object, 0, 0, 0, swapped};
}
template <class = Deferred>
void require_record(ArchivedTensor const& tensor) {
  if (tensor.record_bytes < tensor.object.storage_bytes)
    throw Error{ErrorCode::size_mismatch, "a storage of " + std::to_string(tensor.object.storage_bytes) + " bytes has a record of " + std::to_string(tensor.record_bytes)};
}
/// Of an archive in memory.
template <class = Deferred>
ArchivedTensor archived_tensor(TorchArchive const& archive) {
  torch::TensorObject object;
  ArchivedTensor tensor = archived_tensor(archive.pickle(), archive.swapped(), object);
  auto const& record = archive.record(object.key);
  tensor.data = record.data, tensor.record_bytes = record.size, tensor.crc32 = record.crc;
  tensor.object.key = {};
  require_record(tensor);
  return tensor;
}
/// Of an archive of which only what is needed is read, by read(position, bytes).
template <class Read>
ArchivedTensor archived_tensor(std::uint64_t size, Read read) {
  zip::Directory directory = zip::read_directory(size, read);
  constexpr std::string_view pickle_name = "/data.pkl";
  auto const pickle_at = std::find_if(directory.entries.begin(), directory.entries.end(), [&](auto const& entry) { return entry.name.ends_with(pickle_name) && entry.name.find('/') == entry.name.size() - pickle_name.size(); });
  if (pickle_at == directory.entries.end()) throw Error{ErrorCode::bad_schema, "an archive without a data.pkl"};
  std::string const root = pickle_at->name.substr(0, pickle_at->name.size() - pickle_name.size() + 1);
  auto const read_record = [&](zip::Entry& entry) {
    if (entry.size > (64 << 20)) throw Error{ErrorCode::limit, "a record " + entry.name + " of " + std::to_string(entry.size) + " bytes"};
    zip::locate(entry, read);
    Bytes bytes(static_cast<std::size_t>(entry.size));
    read(entry.data, ByteSpan{bytes});
    zip::check_crc(entry, crc32(bytes));
    return bytes;
  };
  auto const find = [&](std::string const& name) { return std::find_if(directory.entries.begin(), directory.entries.end(), [&](auto const& entry) { return entry.name == root + name; }); };
  bool swapped = false;
  if (auto const order = find("byteorder"); order != directory.entries.end()) {
    Bytes const text = read_record(*order);
    if (as_text(text) != "little" && as_text(text) != "big") throw Error{ErrorCode::bad_schema, "the byte order " + shown(as_text(text))};
    swapped = as_text(text) == "big";
  }
  Bytes const pickle_bytes = read_record(*pickle_at);
  torch::TensorObject object;
  ArchivedTensor tensor = archived_tensor(pickle_bytes, swapped, object);
  auto const record = find("data/" + std::string{object.key});
  if (record == directory.entries.end()) throw Error{ErrorCode::missing_tensor, "an archive without the storage " + shown(object.key) + " of its tensor"};
  zip::locate(*record, read);
  tensor.data = record->data, tensor.record_bytes = record->size, tensor.crc32 = record->crc;
  tensor.object.key = {};
  require_record(tensor);
  return tensor;
}

/// Undoes what the bytes of an item went through: `transforms` as .metadata lists them.
///
/// Throws    Error(unsupported) for a transform that is unknown
template <class = Deferred>
Bytes undo_transforms(ConstByteSpan stored, std::vector<std::string> const& transforms, std::uint64_t most_bytes) {
  Bytes bytes(stored.begin(), stored.end());
  // The last of the list is what the stored bytes went through last.
  for (auto one = transforms.rbegin(); one != transforms.rend(); ++one) {
    if (*one != "stream.zstd/1" && !one->starts_with("stream.zstd/1.")) throw Error{ErrorCode::unsupported, "an item that went through " + json_quoted(*one) + ", which this library cannot undo; stream.zstd/1 can be"};
    bytes = ZstdLibrary::get().decompress(bytes, most_bytes);
  }
  return bytes;
}

/// Whether `tensor` is what the chunk of shape `shape` is said to hold.
template <class = Deferred>
void require_chunk(ArchivedTensor const& tensor, DType dtype, Extents const& shape) {
  Extents const found = torch::shape_from_torch(tensor.object.dtype, tensor.object.shape);
  if (tensor.object.dtype != dtype || !(found == shape))
    throw Error{ErrorCode::index_mismatch, "the metadata speaks of " + describe(dtype, shape) + ", and its archive holds " + describe(tensor.object.dtype, found)};
}

/// A chunk whose archive went through a transform: its part is the archive as it is stored.
template <class D = Deferred>
class TransformedEncoding final : public Encoding {
 public:
  TransformedEncoding(std::string name, DType dtype, Extents const& shape, std::uint64_t length, std::vector<std::string> transforms)
      : Encoding{transforms.front(), shape, std::vector<EncodedPart>(1, {std::move(name), DType::u8, Extents{static_cast<std::int64_t>(length)}, PartGrid::along({PartAxis{}})})}, dtype_{dtype}, transforms_{std::move(transforms)} {}

  bool whole() const override { return true; }

  void decode(Box const& box, std::span<PartBytes const> given, DType dtype, MemoryView const& memory) const override {
    std::uint64_t const element = std::max<std::uint64_t>(1, static_cast<std::uint64_t>(bits_of(dtype_)) / 8), most = static_cast<std::uint64_t>(this->shape().elements()) * element * 2 + (16 << 20);
    Bytes const bytes = undo_transforms({given[0].data, static_cast<std::size_t>(given[0].box.size())}, transforms_, most);
    TorchArchive const archive{bytes};
    ArchivedTensor const tensor = archived_tensor(archive);
    require_chunk(tensor, dtype_, this->shape());
    ConstByteSpan const record{bytes.data() + tensor.data, static_cast<std::size_t>(tensor.record_bytes)};
    if (crc32(record) != tensor.crc32) throw Error{ErrorCode::corrupt, this->parts()[0].name + ": a record of its archive does not have the CRC-32 that was written with it"};
    std::vector<std::int64_t> strides;
    std::uint64_t first = tensor.object.first;
    for (int d = 0; d < box.rank(); ++d) {
      strides.push_back(static_cast<std::int64_t>(tensor.object.strides[static_cast<std::size_t>(d)]));
      first += static_cast<std::uint64_t>(box.origin[d]) * tensor.object.strides[static_cast<std::size_t>(d)];
    }
    if (bits_of(dtype_) < 8) throw Error{ErrorCode::unsupported, "transformed tensors of " + std::string{to_string(dtype_)}};
    copy_strided(box.shape, dtype_, record.data() + first * element, strides, tensor.transform(), dtype, memory);
  }

 private:
  DType dtype_;
  std::vector<std::string> transforms_;
};

/// Makes of a piece one that is decoded: a view, whose first element is at `first_byte` of the file, of a storage that has `stored` elements from there on.
template <class = Deferred>
void make_view(std::string const& name, DType dtype, StoredPiece& piece, std::uint64_t first_byte, std::vector<std::uint64_t> const& strides, std::uint64_t stored, ElementTransform how) {
  if (dtype == DType::f4) throw Error{ErrorCode::unsupported, name + ": a view of pairs of F4 that is not dense"};
  auto encoding = std::make_shared<StridedEncoding<>>(name, dtype, piece.box.shape, strides, stored, how);
  auto decoded = std::make_shared<CatalogTensor>();
  decoded->name = name;
  decoded->dtype = dtype;
  decoded->shape = piece.box.shape;
  decoded->parts.push_back({{piece.file, first_byte, Box::whole(encoding->parts()[0].shape), 0, {}, {}}});
  decoded->encoding = std::move(encoding);
  piece.decoded = std::move(decoded);
}

/// Makes of a piece that lies in an archive at `archive` of its file a piece that can be read.
template <class = Deferred>
void settle_piece(std::string const& name, DType dtype, StoredPiece& piece, ArchivedTensor const& tensor, std::uint64_t archive) {
  require_chunk(tensor, dtype, piece.box.shape);
  torch::TensorObject const& object = tensor.object;
  std::uint64_t const record = archive + tensor.data, first = record + object.first * object.element_bytes();
  if (is_dense(object.shape, object.strides) && !tensor.transform().any()) {
    if (tensor.record_bytes == bytes_of(dtype, static_cast<std::int64_t>(piece.box.size()))) piece.crc32 = tensor.crc32;
    piece.offset = first;
    piece.container_bytes = 0;
    return;
  }
  make_view(name, dtype, piece, first, object.strides, tensor.record_bytes / object.element_bytes() - object.first, tensor.transform());
  piece.offset = record;
  piece.container_bytes = tensor.record_bytes;
  piece.crc32 = tensor.crc32;
}

}  // namespace dcp::detail
