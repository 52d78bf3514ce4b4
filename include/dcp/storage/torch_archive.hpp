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
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp::detail {

/// An archive of torch.save, of which only what is asked for is read, by read(position, bytes). What is read is compared with its CRC-32.
template <class Read>
class TorchArchive {
 public:
  TorchArchive(std::uint64_t size, Read read) : read_{std::move(read)}, directory_{zip::read_directory(size, read_)} {
    // All records are below one directory, whose name is that of the file that was first written.
    constexpr std::string_view pickle_name = "/data.pkl";
    for (auto const& entry : directory_.entries)
      if (entry.name.ends_with(pickle_name) && entry.name.find('/') == entry.name.size() - pickle_name.size()) root_ = entry.name.substr(0, entry.name.size() - pickle_name.size() + 1);
    if (root_.empty()) throw Error{ErrorCode::bad_schema, "an archive without a data.pkl"};
    if (auto const* order = find("byteorder")) {
      Bytes const bytes = data(*order, 16);
      std::string_view const text = as_text(bytes);
      if (text != "little" && text != "big") throw Error{ErrorCode::bad_schema, "the byte order " + shown(text)};
      swapped_ = text == "big";
    }
  }

  Bytes pickle() const { return data(*find("data.pkl"), most_object_bytes); }
  /// The storage `key`: where its bytes lie; and these.
  zip::Entry const& record(std::string_view key) const {
    auto const* entry = find("data/" + std::string{key});
    if (entry == nullptr) throw Error{ErrorCode::missing_tensor, "an archive without the storage " + shown(key) + " of its tensor"};
    return *entry;
  }
  Bytes storage(std::string_view key) const { return data(record(key), most_object_bytes); }
  /// Whether numbers have their most significant byte first.
  bool swapped() const { return swapped_; }

 private:
  static constexpr std::uint64_t most_object_bytes = 1ull << 30;   // that are in memory at once

  zip::Entry const* find(std::string const& name) const {
    auto const* const entry = directory_.find(root_ + name);
    if (entry == nullptr) return nullptr;
    zip::Entry& found = directory_.entries[static_cast<std::size_t>(entry - directory_.entries.data())];
    if (found.data == 0) zip::locate(found, read_);   // data never begin at 0, where a header is
    return &found;
  }
  Bytes data(zip::Entry const& entry, std::uint64_t most) const {
    if (entry.size > most) throw Error{ErrorCode::limit, "a record " + entry.name + " of " + std::to_string(entry.size) + " bytes"};
    Bytes bytes(static_cast<std::size_t>(entry.size));
    read_(entry.data, ByteSpan{bytes});
    zip::check_crc(entry, crc32(bytes));
    return bytes;
  }

  Read read_;
  mutable zip::Directory directory_;   // whose records are located when they are asked for
  std::string root_;
  bool swapped_ = false;
};
/// An archive in memory.
template <class = Deferred>
auto archive_in(ConstByteSpan bytes) {
  return TorchArchive{bytes.size(), [bytes](std::uint64_t position, ByteSpan to) {
                        if (position > bytes.size() || to.size() > bytes.size() - position) throw Error{ErrorCode::truncated, "an archive ends before a record of it"};
                        if (!to.empty()) std::memcpy(to.data(), bytes.data() + position, to.size());
                      }};
}

/// A tensor of an archive, and where its storage lies.
struct ArchivedTensor {
  torch::TensorObject object;    // but for its key
  std::uint64_t data = 0;        // position of the storage in the archive
  std::uint64_t record_bytes = 0;
  std::uint32_t crc32 = 0;       // of the record
  bool swapped = false;

  ElementTransform transform() const { return {object.conjugate, object.negative, swapped && number_bytes(object.dtype) > 1}; }
};

/// Throws    what parsing the tensor throws; Error(missing_tensor), Error(size_mismatch) for a storage that is not there, or smaller than it says
template <class Read>
ArchivedTensor archived_tensor(TorchArchive<Read> const& archive, pickle::Value const& value) {
  torch::TensorObject object = torch::parse_tensor(value);
  zip::Entry const& record = archive.record(object.key);
  if (record.size < object.storage_bytes) throw Error{ErrorCode::size_mismatch, "a storage of " + std::to_string(object.storage_bytes) + " bytes has a record of " + std::to_string(record.size)};
  object.key = {};   // a part of the pickle
  return {std::move(object), record.data, record.size, record.crc, archive.swapped()};
}
/// The tensor that an archive consists of.
template <class Read>
ArchivedTensor archived_tensor(TorchArchive<Read> const& archive) {
  Bytes const bytes = archive.pickle();
  auto const tree = pickle::Tree::parse(bytes, torch::is_known_global<>);
  return archived_tensor(archive, tree.root());
}

/// An object of an archive.
template <class Read>
Value object_of(TorchArchive<Read> const& archive, pickle::Value const& value, torch::ObjectOptions const& options) {
  Bytes storage;   // of the tensor that is being looked at
  return torch::to_value(
      value,
      [&](std::string_view key) {
        if (archive.swapped()) throw Error{ErrorCode::unsupported, "a tensor with the most significant byte first inside an object"};
        storage = archive.storage(key);
        return ConstByteSpan{storage};
      },
      options);
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
    std::uint64_t const element = torch::element_bytes(dtype_), most = static_cast<std::uint64_t>(this->shape().elements()) * element * 2 + (16 << 20);
    Bytes const bytes = undo_transforms({given[0].data, static_cast<std::size_t>(given[0].box.size())}, transforms_, most);
    ArchivedTensor const tensor = archived_tensor(archive_in(bytes));
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
  std::uint64_t const record = archive + tensor.data, first = record + object.first * torch::element_bytes(dtype);
  if (is_dense(object.shape, object.strides) && !tensor.transform().any()) {
    if (tensor.record_bytes == bytes_of(dtype, static_cast<std::int64_t>(piece.box.size()))) piece.crc32 = tensor.crc32;
    piece.offset = first;
    piece.container_bytes = 0;
    return;
  }
  make_view(name, dtype, piece, first, object.strides, tensor.record_bytes / torch::element_bytes(dtype) - object.first, tensor.transform());
  piece.offset = record;
  piece.container_bytes = tensor.record_bytes;
  piece.crc32 = tensor.crc32;
}

}  // namespace dcp::detail
