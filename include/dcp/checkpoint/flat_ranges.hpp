// SPDX-License-Identifier: Apache-2.0
#pragma once
// Flat buckets whose cuts only the ranks themselves know: exchanged once, then every rank derives every rank's elements.

#include <dcp/base/config.hpp>
#include <dcp/comm/agree.hpp>
#include <dcp/core/flat_bucket.hpp>
#include <dcp/core/mesh.hpp>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace dcp {
namespace detail {

template <class = Deferred>
FlatBucket gather_flat_bucket(CommRef comm, MeshGeometry const& mesh, int axis, std::vector<Extents> const& shapes, std::int64_t alignment, FlatRange mine) {
  constexpr std::string_view phase = "exchange of flat ranges";
  agree(comm, phase, [&] {
    if (axis < 0 || axis >= mesh.axes) throw Error{ErrorCode::invalid_argument, "a mesh of " + std::to_string(mesh.axes) + " axes has no axis " + std::to_string(axis)};
    if (mesh.world != comm.size())
      throw Error{ErrorCode::invalid_argument, "the mesh was made for a communicator of " + std::to_string(mesh.world) + " ranks, and this one has " + std::to_string(comm.size())};
  });
  struct Known {
    std::uint64_t digest;   // of everything that must be equal
    FlatRange range;
  };
  ByteWriter bytes;
  bytes.number(alignment).number(axis).number(mesh.axes).number(mesh.base);
  for (std::size_t a = 0; a < static_cast<std::size_t>(mesh.axes); ++a) bytes.number(mesh.extents[a]).number(mesh.strides[a]);
  for (auto const& shape : shapes) bytes.number(shape.elements());
  auto const all = all_gather_value(comm, Known{crc64(bytes.bytes()), mine});
  // From here on every rank sees the same.
  auto const refuse = [&](ErrorCode code, std::string sentence) { throw Error{code, std::move(sentence)}.with_phase(std::string{phase}); };
  std::vector<FlatRange> ranges(static_cast<std::size_t>(mesh.extents[static_cast<std::size_t>(axis)]));
  std::vector<std::int64_t> from(ranges.size(), -1);
  std::int64_t first = -1;
  for (std::int64_t rank = 0; rank < comm.size(); ++rank) {
    auto const coordinate = mesh.coordinate_of(rank);
    if (!coordinate) continue;
    Known const& known = all[static_cast<std::size_t>(rank)];
    if (first < 0) first = rank;
    if (known.digest != all[static_cast<std::size_t>(first)].digest) refuse(ErrorCode::ranks_disagree, "rank " + std::to_string(first) + " and rank " + std::to_string(rank) + " were given different shapes, alignment or mesh");
    auto const at = static_cast<std::size_t>((*coordinate)[static_cast<std::size_t>(axis)]);
    if (from[at] >= 0 && !(ranges[at] == known.range))
      refuse(ErrorCode::ranks_disagree, "rank " + std::to_string(from[at]) + " and rank " + std::to_string(rank) + " are copies of each other along the other axes, and hold [" + std::to_string(ranges[at].begin) + ", " +
                                            std::to_string(ranges[at].end) + ") and [" + std::to_string(known.range.begin) + ", " + std::to_string(known.range.end) + ")");
    ranges[at] = known.range;
    from[at] = rank;
  }
  try {
    return FlatBucket{shapes, alignment, std::move(ranges)};
  } catch (Error& error) {
    throw error.with_phase(std::string{phase});
  }
}

}  // namespace detail

/// A FlatBucket cut as the ranks say: `mine`, in elements of the buffer, is what this rank holds. Ranks that differ only along other
/// axes of the mesh hold the same. Collective over `comm`, 24 bytes per rank; ranks outside the mesh take part, and what they give is ignored.
///
/// Throws    the same Error on all ranks: ranks_disagree for different shapes or ranges of copies, incomplete for elements that nobody
///           or two ranks hold
/// Example   auto bucket = dcp::exchange_flat_ranges(world, mesh, 0, {{4096, 1024}, {1024}}, 64, {begin, end});
template <class C, int N>
FlatBucket exchange_flat_ranges(C& comm, DeviceMesh<N> const& mesh, int axis, std::vector<Extents> const& shapes, std::int64_t alignment, FlatRange mine) {
  [[maybe_unused]] detail::a_communicator<C> check;
  if constexpr (Communicator<C>) return detail::gather_flat_bucket(CommRef{comm}, mesh.geometry(), axis, shapes, alignment, mine);
  else return FlatBucket{{}, 1, 1};
}

}  // namespace dcp
