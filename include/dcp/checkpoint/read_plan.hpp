// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a rank reads, and what it does with it: bytes that go to memory as they are or cast, and boxes that are decoded.

#include <dcp/base/config.hpp>
#include <dcp/plan/catalog.hpp>
#include <dcp/plan/transfer.hpp>

#include <cstdint>
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
};
/// A record with a CRC-32 that no transfer has all bytes of as they are.
struct SummedRecord {
  std::uint32_t file;
  std::uint64_t offset, bytes;
  std::uint32_t crc32;
};

/// A box of a tensor that is to be decoded into memory.
struct Decode {
  CatalogTensor const* tensor;
  Box held;
  DType memory_dtype;
  MemoryView memory;       // of the box's first element
  bool counts;             // as of a ReadPurpose
};

struct ReadPlan {
  std::vector<Transfer> transfers;
  std::vector<ReadPurpose> purposes;
  std::vector<Decode> decodes;
  std::vector<SummedRecord> records;   // to be read for their CRC-32, where everything is to be verified
};

/// Calls visit(dtype, piece) for everything that a tensor is stored as.
template <class Visit>
void for_each_stored_piece(CatalogTensor const& tensor, Visit visit) {
  for (auto const& piece : tensor.pieces) visit(tensor.dtype, piece);
  for (std::size_t p = 0; p < tensor.parts.size(); ++p)
    for (auto const& piece : tensor.parts[p]) visit(tensor.encoding->parts()[p].dtype, piece);
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

/// The transfers that fill `held` of a tensor from its stored pieces, or what decodes it. Where pieces overlap, the first fills and the others are compared;
/// `all`: so are those that are stored twice, and everything is verified.
template <class = Deferred>
void plan_reads(CatalogTensor const& stored, DType memory_dtype, Box const& held, MemoryView const& memory, bool counts, bool all, ReadPlan& plan) {
  auto const add = [&](StoredPiece const& piece, Box const& part, bool compare) {
    if (!on_byte_boundaries(stored.dtype, part, piece.box))
      throw Error{ErrorCode::misaligned, stored.name + ": the part " + to_string(part) + " of " + std::string{to_string(stored.dtype)} + " elements does not begin and end on a byte"};
    if (piece.decoded != nullptr) {
      if (compare) return;   // it would have to be decoded to memory of its own
      Box inside = part;
      std::int64_t at = 0;
      for (int d = 0; d < part.rank(); ++d) inside.origin[d] -= piece.box.origin[d], at += (part.origin[d] - held.origin[d]) * memory.strides[d];
      plan.decodes.push_back({piece.decoded.get(), inside, memory_dtype, {memory.data + static_cast<std::ptrdiff_t>(bytes_of(memory_dtype, at)), memory.strides}, counts});
      if (all && piece.crc32) plan.records.push_back({piece.file, piece.offset, piece.container_bytes, *piece.crc32});
      return;
    }
    Transfer transfer = make_transfer(stored.dtype, memory_dtype, part, held, memory, piece.box, piece.offset);
    transfer.file = piece.file;
    bool const whole = piece.crc32 && !compare && stored.dtype == memory_dtype && part == piece.box;
    plan.transfers.push_back(transfer);
    plan.purposes.push_back({counts, compare, whole ? piece.crc32 : std::nullopt});
    if (all && piece.crc32 && !whole) plan.records.push_back({piece.file, piece.offset, bytes_of(stored.dtype, static_cast<std::int64_t>(piece.box.size())), *piece.crc32});
  };
  if (held.empty()) return;
  if (stored.encoding != nullptr) return plan.decodes.push_back({&stored, held, memory_dtype, memory, counts});
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
