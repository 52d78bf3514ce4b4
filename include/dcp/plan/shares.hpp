// SPDX-License-Identifier: Apache-2.0
#pragma once
// Who writes what: every element of a tensor exactly once, replicated elements split over the ranks that hold them, so that no
// rank writes much more than the others. A pure function that every rank computes for itself.
//
// Tensors with equal layout and dtype form a group: their cells (the boxes of the sharding axes) have equal sizes, so the cells
// of one coordinate, laid end to end over the group's tensors, are a line whose positions need no table. The replicas of a cell
// cut that line into one interval each. The lengths are found by filling up the least loaded replicas first, groups with few
// replicas (least freedom) before groups with many.

#include <dcp/base/config.hpp>
#include <dcp/base/algorithms.hpp>
#include <dcp/core/layout.hpp>
#include <dcp/core/value.hpp>
#include <dcp/plan/transfer.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <numeric>
#include <vector>

namespace dcp {

/// A tensor to be stored: what every rank knows of it.
struct TensorSpec {
  std::string name;
  DType dtype{};
  Layout layout;
  NameJoints joints{};
};

/// Elements [begin, end) of a cell (what the ranks at one coordinate of the splitting axes hold), in its row-major order.
struct CellRange {
  std::int64_t begin, end;
};

/// Cost      O(tensors + distinct layouts x ranks of their meshes) time; memory the same, where layouts replicate
/// Law       for every tensor and cell, the ranges of its replicas are disjoint and cover the cell
/// Balance   the largest writer has at most max(largest load that only it holds, 1.1 x mean) + 1 MiB, when replicas reach over
///           the whole mesh
class Shares {
 public:
  // Cuts fall on multiples of this many bytes of a cell: a multiple of every element size (6 bits included) and of 4 KiB, small
  // enough that rounding stays within the 1 MiB of the law, large enough that each piece is one good write.
  static constexpr std::int64_t grain_bytes = 3 << 16;

  template <class = Deferred>
  Shares(std::vector<TensorSpec> const& tensors, std::int64_t ranks) : loads_(static_cast<std::size_t>(ranks), 0), place_(tensors.size()) {
    std::multimap<std::uint64_t, std::size_t> known;
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      std::size_t const g = find_group(tensors[t], known);
      place_[t] = {g, groups_[g].count++};
    }
    std::vector<std::size_t> order(groups_.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return groups_[a].copies < groups_[b].copies; });
    // Tensors of one copy leave nothing to choose, and those of one layout are walked together, whatever their dtypes.
    std::multimap<std::uint64_t, std::size_t> walked;
    std::vector<std::int64_t> bits(groups_.size(), 0);   // of all tensors, for an element of each
    for (auto const g : order) {
      Group const& group = groups_[g];
      if (group.copies > 1) break;
      std::size_t first = g;
      for (auto [at, end] = walked.equal_range(group.hash); at != end; ++at)
        if (groups_[at->second].layout == group.layout) first = at->second;
      if (first == g) walked.emplace(group.hash, g);
      bits[first] += group.count * bits_of(group.dtype);
    }
    for (auto const g : order) fill(groups_[g], bits[g]);
  }

  /// What the rank at `coordinate` writes of tensor `t`.
  template <class = Deferred>
  CellRange range_of(std::size_t t, MeshGeometry::Coordinate const& coordinate) const { return range_of(t, coordinate, held_at(groups_[place_[t].group].layout, coordinate)); }
  /// The same where `part`, what it holds, is known.
  template <class = Deferred>
  CellRange range_of(std::size_t t, MeshGeometry::Coordinate const& coordinate, HeldPart const& part) const {
    auto const& [g, index] = place_[t];
    Group const& group = groups_[g];
    if (group.copies == 1 || part.empty()) return {0, part.elements()};
    std::int64_t const replica = replica_index(group.layout, coordinate);
    std::int64_t const bytes = static_cast<std::int64_t>(bytes_of(group.dtype, part.elements())), line = index * bytes;
    std::int64_t const* cuts = cuts_of_cell(group, coordinate);
    std::int64_t const begin = std::clamp(cuts[replica] - line, std::int64_t{0}, bytes), end = std::clamp(cuts[replica + 1] - line, std::int64_t{0}, bytes);
    return {begin * 8 / bits_of(group.dtype), end * 8 / bits_of(group.dtype)};
  }

  /// The rank that writes the element at `index` of tensor `t`.
  template <class = Deferred>
  std::int64_t writer_of(std::size_t t, Extents const& index) const {
    auto const& [g, position] = place_[t];
    Group const& group = groups_[g];
    auto const coordinate = coordinate_holding(group.layout, index);
    if (group.copies == 1) return group.layout.mesh.rank_at(coordinate);
    HeldPart const part = held_at(group.layout, coordinate);
    std::int64_t element = 0;
    for (int d = 0; d < part.box.rank(); ++d) element = element * part.box.shape[d] + (index[d] - part.box.origin[d]);
    std::int64_t const at = position * static_cast<std::int64_t>(bytes_of(group.dtype, part.elements())) + static_cast<std::int64_t>(bytes_of(group.dtype, element - part.begin));
    std::int64_t const* cuts = cuts_of_cell(group, coordinate);
    std::int64_t const replica = std::upper_bound(cuts + 1, cuts + group.copies, at) - (cuts + 1);
    return group.layout.mesh.rank_at(replica_coordinate(group.layout, coordinate, replica));
  }

  /// Tensors of one group, by number, have equal layouts and dtypes.
  std::size_t groups() const { return groups_.size(); }
  std::size_t group_of(std::size_t t) const { return place_[t].group; }

  /// Bytes that each rank writes.
  std::vector<std::int64_t> const& loads() const { return loads_; }
  template <class = Deferred>
  std::uint64_t memory_bytes() const {
    std::uint64_t bytes = groups_.capacity() * sizeof(Group) + loads_.capacity() * sizeof(std::int64_t) + place_.capacity() * sizeof(Place);
    for (auto const& group : groups_) bytes += group.cuts.capacity() * sizeof(std::int64_t);
    return bytes;
  }

 private:
  struct Group {
    Layout layout;
    DType dtype;
    std::uint64_t hash = 0;                // of the layout
    std::int64_t count = 0;                // tensors
    std::int64_t copies = 1;               // replicas of each cell
    int flat = -1;                         // the flat axis, and the first of its coordinates that holds an element
    std::int64_t first = 0;
    Layout numbered;                       // the mesh without coordinates of the flat axis that hold nothing: numbers the cells
    std::vector<std::int64_t> cuts;        // with several copies, per cell: copies + 1 positions on its line
  };
  struct Place {
    std::size_t group;
    std::int64_t index;   // among the tensors of the group
  };

  static std::uint64_t hash_of(TensorSpec const& tensor) {
    std::uint64_t hash = 0;
    auto const mix = [&](std::int64_t value) { hash = (hash ^ static_cast<std::uint64_t>(value)) * 0x9E3779B97F4A7C15u, hash ^= hash >> 29; };
    Layout const& layout = tensor.layout;
    for (int d = 0; d < layout.shape.rank(); ++d) mix(layout.shape[d]), mix(layout.split_shape[d]);
    mix(layout.mesh.base);
    for (std::size_t a = 0; a < static_cast<std::size_t>(layout.mesh.axes); ++a) {
      mix(layout.mesh.extents[a] * 64 + static_cast<std::int64_t>(layout.rules[a].kind) * 16 + layout.rules[a].dim);
      mix(layout.mesh.strides[a]);
    }
    mix(layout.flat.offset);
    return hash;
  }
  template <class = Deferred>
  std::size_t find_group(TensorSpec const& tensor, std::multimap<std::uint64_t, std::size_t>& known) {
    // Models list layers, and the tensors of a layer come in an order: mostly it is a group seen before.
    std::uint64_t const layout_hash = hash_of(tensor), hash = layout_hash + static_cast<std::uint64_t>(tensor.dtype) * 0x9E3779B97F4A7C15u;
    for (auto [at, end] = known.equal_range(hash); at != end; ++at)
      if (groups_[at->second].dtype == tensor.dtype && groups_[at->second].layout == tensor.layout) return at->second;
    known.emplace(hash, groups_.size());
    Group& group = groups_.emplace_back();
    group.layout = group.numbered = tensor.layout;
    group.dtype = tensor.dtype;
    group.hash = layout_hash;
    group.copies = replicas(tensor.layout);
    group.flat = flat_axis(tensor.layout);
    if (group.flat >= 0) {
      std::int64_t& extent = group.numbered.mesh.extents[static_cast<std::size_t>(group.flat)];
      auto const [first, last] = tensor.layout.flat.coordinates(extent);
      group.first = first;
      extent = last + 1 - first;
    }
    return groups_.size() - 1;
  }

  template <class = Deferred>
  static std::int64_t const* cuts_of_cell(Group const& group, MeshGeometry::Coordinate coordinate) {
    if (group.flat >= 0) coordinate[static_cast<std::size_t>(group.flat)] -= group.first;
    return group.cuts.data() + cell_index(group.numbered, coordinate) * (group.copies + 1);
  }

  // Calls visit(cell, rank of its first replica, elements) for every cell of a group. A job has many ranks, so a cell must cost little
  // more than a multiplication: its box is known axis by axis.
  template <class Visit>
  static void for_each_cell(Group const& group, Visit visit) {
    Layout const& layout = group.numbered;
    if (group.flat >= 0) {
      for (std::int64_t cell = 0, count = cells(layout); cell < count; ++cell) {
        auto coordinate = cell_coordinate(layout, cell);
        coordinate[static_cast<std::size_t>(group.flat)] += group.first;
        visit(cell, group.layout.mesh.rank_at(coordinate), held_at(group.layout, coordinate).elements());
      }
      return;
    }
    CellAxes axes;
    for (int d = 0; d < layout.shape.rank(); ++d) {
      CutOrder const cuts = cuts_of(layout, d);
      if (cuts.count == 0) axes.uncut *= layout.shape[d];
      for (int i = 0; i < cuts.count; ++i) {
        auto const a = static_cast<std::size_t>(cuts.axis[static_cast<std::size_t>(i)]);
        std::int64_t weight = 1;   // in the number of a cell
        for (std::size_t later = a + 1; later < static_cast<std::size_t>(layout.mesh.axes); ++later)
          if (splits(layout.rules[later])) weight *= layout.mesh.extents[later];
        axes.list[axes.count++] = {d, i == 0, i + 1 == cuts.count, layout.mesh.extents[a], layout.mesh.strides[a], weight};
      }
    }
    for_each_cell_from(layout, axes, 0, {0, layout.mesh.base, axes.uncut, 0, 0}, visit);
  }

  struct CellAxes {
    struct Axis {
      int dim;
      bool first, last;   // of those that cut the dimension
      std::int64_t extent, stride, weight;
    };
    std::array<Axis, max_axes> list{};
    std::size_t count = 0;
    std::int64_t uncut = 1;   // elements of the dimensions that no axis cuts
  };
  struct CellPrefix {
    std::int64_t cell, rank, elements;   // so far
    std::int64_t origin, size;           // of the dimension that is being cut
  };
  template <class Visit>
  static void for_each_cell_from(Layout const& layout, CellAxes const& axes, std::size_t at, CellPrefix prefix, Visit& visit) {
    if (at == axes.count) return static_cast<void>(visit(prefix.cell, prefix.rank, prefix.elements));
    auto const& axis = axes.list[at];
    if (axis.first) prefix.origin = 0, prefix.size = layout.split_shape[axis.dim];
    std::int64_t const part = ceil_div(prefix.size, axis.extent), logical = layout.shape[axis.dim];
    CellPrefix next = prefix;
    for (std::int64_t c = 0; c < axis.extent; ++c) {
      std::int64_t const begin = std::min(prefix.size, part * c);
      next.origin = prefix.origin + begin;
      next.size = std::min(part, prefix.size - begin);
      if (axis.last) next.elements = prefix.elements * std::max<std::int64_t>(0, std::min(next.origin + next.size, logical) - next.origin);
      if (at + 1 == axes.count) visit(next.cell, next.rank, next.elements);
      else for_each_cell_from(layout, axes, at + 1, next, visit);
      next.cell += axis.weight;
      next.rank += axis.stride;
    }
  }

  template <class = Deferred>
  void fill(Group& group, std::int64_t bits) {
    if (group.copies == 1) {
      if (bits > 0) for_each_cell(group, [&](std::int64_t, std::int64_t rank, std::int64_t elements) { loads_[static_cast<std::size_t>(rank)] += elements * bits / 8; });
      return;
    }
    auto const copies = static_cast<std::size_t>(group.copies);
    group.cuts.resize(static_cast<std::size_t>(cells(group.numbered)) * (copies + 1));
    // The ranks of a cell's replicas, counted from the first of them.
    std::vector<std::int64_t> replica(copies), loads(copies);
    for (std::size_t r = 0; r < copies; ++r) replica[r] = group.layout.mesh.rank_at(replica_coordinate(group.layout, {}, static_cast<std::int64_t>(r))) - group.layout.mesh.base;
    for_each_cell(group, [&](std::int64_t cell, std::int64_t first, std::int64_t elements) {
      std::int64_t const bytes = static_cast<std::int64_t>(bytes_of(group.dtype, elements)), line = bytes * group.count;
      std::int64_t* cuts = group.cuts.data() + static_cast<std::size_t>(cell) * (copies + 1);
      for (std::size_t r = 0; r < copies; ++r) loads[r] = loads_[static_cast<std::size_t>(first + replica[r])];
      std::int64_t const level = level_that_holds(loads, line);
      // Ideal lengths in replica order; each cut is rounded, and what rounding moves is seen by the groups filled later.
      std::int64_t ideal = 0;
      cuts[0] = 0;
      for (std::size_t r = 0; r < copies; ++r) {
        std::int64_t& load = loads_[static_cast<std::size_t>(first + replica[r])];
        ideal += std::max<std::int64_t>(0, level - load);
        cuts[r + 1] = r + 1 == copies ? line : std::max(cuts[r], rounded(std::min(ideal, line), bytes));
        load += cuts[r + 1] - cuts[r];
      }
    });
  }

  // The level to which the least of `loads` can be filled with `bytes`: sum over them of max(0, level - load) >= bytes. Those above the
  // level that the others would have together take no part in it; without them it is lower, and more may be above.
  static std::int64_t level_that_holds(std::vector<std::int64_t> const& loads, std::int64_t bytes) {
    std::int64_t level = INT64_MAX;
    for (;;) {
      std::int64_t sum = 0, below = 0;
      for (auto const load : loads)
        if (load <= level) sum += load, ++below;
      std::int64_t const next = ceil_div(bytes + sum, below);
      if (next >= level) return level;
      level = next;
    }
  }

  // The position near `at` where a line of cells of `bytes` bytes may be cut: between cells, or, in large cells, on the grain.
  static std::int64_t rounded(std::int64_t at, std::int64_t bytes) {
    if (bytes == 0) return at;
    std::int64_t const cell = at / bytes, inside = at % bytes;
    if (bytes <= grain_bytes) return (cell + (2 * inside >= bytes ? 1 : 0)) * bytes;
    std::int64_t const grains = (inside + grain_bytes / 2) / grain_bytes * grain_bytes;
    return cell * bytes + std::min(grains, bytes);
  }

  std::vector<Group> groups_;
  std::vector<std::int64_t> loads_;
  std::vector<Place> place_;
};

}  // namespace dcp
