// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a rank reads, and what it does with it: bytes that go to memory as they are or cast, and boxes that are decoded.

#include <dcp/base/config.hpp>
#include <dcp/base/crc32.hpp>
#include <dcp/checkpoint/devices.hpp>
#include <dcp/core/name_map.hpp>
#include <dcp/media/medium.hpp>
#include <dcp/plan/catalog.hpp>
#include <dcp/plan/transfer.hpp>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace dcp::detail {

/// What a transfer is for, beside its bytes.
struct ReadPurpose {
  bool counts = true;      // false where two entries read one stored tensor: its bytes can be added up for one of them only
  bool compare = false;    // a piece stored twice: compared with what memory holds, not written to it
  std::optional<std::uint32_t> crc32{};   // of all its bytes, where they are a record whose CRC-32 is known
  std::shared_ptr<DeviceHere const> device{};   // whose memory it goes to, if not the host's
};
/// A record with a CRC-32 that no transfer has all bytes of as they are.
struct SummedRecord {
  std::uint32_t file;
  std::uint64_t offset, bytes;
  std::uint32_t crc32;
};
/// The record that a piece is, or is decoded from. Pre: piece.crc32
template <class = Deferred>
SummedRecord record_of(DType dtype, StoredPiece const& piece) {
  Box const& all = piece.inside != nullptr ? piece.inside->array : piece.box;
  return {piece.file, piece.offset, piece.decoded != nullptr && piece.container_bytes != 0 ? piece.container_bytes : bytes_of(dtype, static_cast<std::int64_t>(all.size())), *piece.crc32};
}
template <class = Deferred>
Error wrong_record(std::string const& path, std::uint64_t begin, std::uint64_t end, std::string const& tensors) {
  return Error{ErrorCode::corrupt, "a record of an archive does not have the CRC-32 that was written with it; it holds " + tensors}.with_path(path).with_range(begin, end);
}
/// Reads and compares one. Throws Error(corrupt).
template <class = Deferred>
void verify_record(ReadableFile& file, std::string const& path, SummedRecord const& record, std::string const& tensors, Bytes& buffer) {
  constexpr std::uint64_t piece = 1 << 20;   // stays in cache until it is summed up
  buffer.resize(static_cast<std::size_t>(std::min(piece, record.bytes)));
  std::uint32_t crc = 0;
  for (std::uint64_t at = 0; at < record.bytes; at += piece) {
    ByteSpan const part{buffer.data(), static_cast<std::size_t>(std::min(piece, record.bytes - at))};
    file.read_at(record.offset + at, part);
    crc = crc32(part, crc);
  }
  if (crc != record.crc32) throw wrong_record(path, record.offset, record.offset + record.bytes, tensors);
}

/// A box of a tensor that is to be decoded into memory.
struct Decode {
  CatalogTensor const* tensor;
  Box held;
  DType memory_dtype;
  MemoryView memory;       // of the box's first element
  bool counts;             // as of a ReadPurpose
  std::shared_ptr<DeviceHere const> device{};
};

struct ReadPlan {
  std::vector<Transfer> transfers;
  std::vector<ReadPurpose> purposes;
  std::vector<Decode> decodes;
  std::vector<SummedRecord> records;   // to be read for their CRC-32, where everything is to be verified
};

/// Calls visit(dtype, piece) for everything that a tensor is stored as.
template <class Visit>
void for_each_stored_piece(CatalogTensor const& tensor, Visit const& visit) {
  for (auto const& piece : tensor.pieces)
    if (piece.decoded != nullptr) for_each_stored_piece(*piece.decoded, visit);
    else visit(tensor.dtype, piece);
  for (std::size_t p = 0; p < tensor.parts.size(); ++p)
    for (auto const& piece : tensor.parts[p]) visit(tensor.encoding->parts()[p].dtype, piece);
}
/// Calls visit(begin, end) for the ranges of its file that a piece is.
template <class Visit>
void for_each_range_of(DType dtype, StoredPiece const& piece, Visit visit) {
  if (piece.inside == nullptr || piece.box.size() == piece.inside->array.size()) {
    Box const& all = piece.inside != nullptr ? piece.inside->array : piece.box;
    return static_cast<void>(visit(piece.offset, piece.offset + bytes_of(dtype, static_cast<std::int64_t>(all.size()))));
  }
  Box const part = permuted(piece.box, piece.inside->order);
  Transfer const transfer = make_transfer(dtype, dtype, part, part, {nullptr, row_major_strides(part.shape)}, piece.inside->array, piece.offset);   // of which only the file matters
  transfer.for_each_file_run(0, transfer.end, [&](std::uint64_t at, std::uint64_t bytes) { visit(at, at + bytes); });
}

/// Calls visit(piece, box) for the boxes of pieces that together are `box` of what the pieces are of; of pieces that overlap, the first counts. What nothing is stored for
/// goes to missing(box).
template <class Visit, class Missing>
void for_each_source(std::vector<StoredPiece> const& pieces, Box const& box, Visit visit, Missing missing) {
  std::vector<Box> holes{box}, rest;
  for (auto const& piece : pieces) {
    rest.clear();
    for (auto const& hole : holes) {
      Box from;
      if (intersect(hole, piece.box, from)) visit(piece, from);
      subtract(hole, piece.box, rest);
    }
    std::swap(holes, rest);
  }
  for (auto const& hole : holes)
    if (!hole.empty()) missing(hole);
}

/// How many elements of `held` a tile has that needs about `tile_bytes` of parts.
template <class = Deferred>
std::int64_t elements_of_tile(Encoding const& encoding, Box const& held, std::uint64_t tile_bytes) {
  std::int64_t const elements = held.shape.elements();
  std::uint64_t const bytes = std::max<std::uint64_t>(1, encoding.bytes_needed(held));
  return bytes <= tile_bytes ? elements : std::max<std::int64_t>(1, static_cast<std::int64_t>(static_cast<double>(elements) * static_cast<double>(tile_bytes) / static_cast<double>(bytes)));
}

/// The transfers that fill `held` of a tensor from its stored pieces, or what decodes it. Where pieces overlap, the first fills and the others are compared;
/// `all`: so are those that are stored twice, and everything is verified.
template <class = Deferred>
void plan_reads(CatalogTensor const& stored, DType memory_dtype, Box const& held, MemoryView const& memory, bool counts, bool all, ReadPlan& plan, std::shared_ptr<DeviceHere const> const& device = nullptr) {
  // In the order of dimensions in which the piece is stored.
  auto const add_in_order = [&](StoredPiece const& piece, Box const& array, Box const& part, Box const& held_there, MemoryView const& memory_there, bool compare) {
    if (!on_byte_boundaries(stored.dtype, part, array))
      throw Error{ErrorCode::misaligned, stored.name + ": the part " + to_string(part) + " of " + std::string{to_string(stored.dtype)} + " elements does not begin and end on a byte"};
    if (piece.decoded != nullptr) {
      if (compare) return;   // it would have to be decoded to memory of its own
      Box inside = part;
      std::int64_t at = 0;
      for (int d = 0; d < part.rank(); ++d) inside.origin[d] -= array.origin[d], at += (part.origin[d] - held_there.origin[d]) * memory_there.strides[d];
      plan.decodes.push_back({piece.decoded.get(), inside, memory_dtype, {memory_there.data + static_cast<std::ptrdiff_t>(bytes_of(memory_dtype, at)), memory_there.strides}, counts, device});
      if (all && piece.crc32) plan.records.push_back(record_of(stored.dtype, piece));
      return;
    }
    Transfer transfer = make_transfer(stored.dtype, memory_dtype, part, held_there, memory_there, array, piece.offset);
    transfer.file = piece.file;
    bool const whole = piece.crc32 && !compare && device == nullptr && stored.dtype == memory_dtype && part == array;
    plan.transfers.push_back(transfer);
    plan.purposes.push_back({counts, compare, whole ? piece.crc32 : std::nullopt, device});
    if (all && piece.crc32 && !whole) plan.records.push_back(record_of(stored.dtype, piece));
  };
  auto const add = [&](StoredPiece const& piece, Box const& part, bool compare) {
    if (piece.inside == nullptr) return add_in_order(piece, piece.box, part, held, memory, compare);
    Extents const& order = piece.inside->order;
    add_in_order(piece, piece.inside->array, permuted(part, order), permuted(held, order), {memory.data, permuted(memory.strides, order)}, compare);
  };
  if (held.empty()) return;
  if (stored.encoding != nullptr) return plan.decodes.push_back({&stored, held, memory_dtype, memory, counts, device});
  if (all) {
    Box part;
    for (auto const& copy : stored.copies)
      if (intersect(held, copy.box, part)) add(copy, part, true);
  }
  if (!any_overlap(stored.pieces, stored.shape)) {
    Box part;
    for (auto const& piece : stored.pieces)
      if (!piece.box.empty() && intersect(held, piece.box, part)) add(piece, part, false);
    return;
  }
  std::vector<Box> missing{held}, rest, filled;
  for (auto const& piece : stored.pieces) {
    Box part;
    for (auto const& box : filled)
      if (intersect(box, piece.box, part)) add(piece, part, true);
    rest.clear();
    for (auto const& box : missing) {
      if (intersect(box, piece.box, part)) {
        add(piece, part, false);
        filled.push_back(part);
      }
      subtract(box, piece.box, rest);
    }
    std::swap(missing, rest);
  }
}

}  // namespace dcp::detail
