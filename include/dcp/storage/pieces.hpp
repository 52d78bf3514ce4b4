// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a rank stores of a tensor in files of its own: boxes that are its share of what it holds.

#include <dcp/base/config.hpp>
#include <dcp/plan/shares.hpp>
#include <dcp/storage/storage.hpp>

#include <cstdint>

namespace dcp::detail {

/// The rows of a share of a cell. Shares cut between elements; here both ends move up to the next whole row.
template <class = Deferred>
Box rows_of_share(Box const& cell, CellRange range) {
  if (cell.rank() == 0) return range.begin < range.end ? cell : nothing_of(cell.shape);
  int outer = 0;
  while (outer + 1 < cell.rank() && cell.shape[outer] == 1) ++outer;
  std::int64_t row = 1;
  for (int d = outer + 1; d < cell.rank(); ++d) row *= cell.shape[d];
  if (row == 0) return nothing_of(cell.shape);
  Box box = cell;
  std::int64_t const from = ceil_div(range.begin, row), to = ceil_div(range.end, row);
  box.origin[outer] += from;
  box.shape[outer] = to - from;
  return box;
}

/// Calls visit(box) for the boxes that `rank` writes of tensor `t` of the state: of all ranks together they are the tensor, each element once. A tensor without elements
/// is one box of one rank.
template <class Visit>
void for_each_own_box(TensorSpec const& tensor, std::size_t t, Shares const& shares, std::int64_t rank, Visit visit) {
  Layout const& layout = tensor.layout;
  auto const coordinate = layout.mesh.coordinate_of(rank);
  if (!coordinate) return;
  if (layout.shape.empty()) {
    if (layout.mesh.rank_at(MeshGeometry::Coordinate{}) == rank) visit(Box::whole(layout.shape));
    return;
  }
  CellRange const range = shares.range_of(t, *coordinate);
  if (HeldPart const held = held_at(layout, *coordinate); held.flat) for_each_box(held.box, held.begin + range.begin, held.begin + range.end, [&](Box const& box, std::int64_t) { visit(box); });
  else if (Box const box = rows_of_share(held.box, range); box.size() > 0) visit(box);
}

/// The same of stored tensor `t` of `request`, whose files each belong to one rank.
///
/// Throws    Error(misaligned) where a layout cuts elements smaller than a byte inside a byte
template <class Visit>
void for_each_piece(SaveRequest const& request, std::size_t t, std::int64_t rank, Visit visit) {
  TensorSpec const& stored = request.tensors[t];
  if (request.arrangement != nullptr && request.arrangement->cut(t)) {
    MappedTensor const& mapped = request.arrangement->from[t];
    for (auto const& placed : mapped.from)
      for_each_own_box((*request.state)[placed.tensor], placed.tensor, request.shares, rank, [&](Box const& box) {
        Box common;
        if (intersect(box, placed.from, common)) visit(placed.placed(common));
      });
    if (mapped.from.empty() && rank == 0) visit(Box::whole(mapped.shape));
    return;
  }
  std::size_t const number = request.arrangement != nullptr ? request.arrangement->from[t].from[0].tensor : t;
  for_each_own_box(stored, number, request.shares, rank, [&](Box const& box) {
    if (!on_byte_boundaries(stored.dtype, box, Box::whole(stored.layout.shape))) throw Error{ErrorCode::misaligned, stored.name + ": its layout cuts a byte of " + std::string{to_string(stored.dtype)} + " elements"};
    visit(box);
  });
}

}  // namespace dcp::detail
