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
#include <dcp/plan/transfer.hpp>

#include <algorithm>
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
};

/// Elements [begin, end) of a cell, in its row-major order.
struct CellRange {
  std::int64_t begin, end;
};

/// Cost      O(tensors + distinct layouts x ranks of their meshes) time and memory
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
    std::map<Key, std::size_t> known;
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      auto const [at, fresh] = known.try_emplace(Key{tensors[t].layout, tensors[t].dtype}, groups_.size());
      if (fresh) groups_.push_back({tensors[t].layout, tensors[t].dtype, 0, {}, {}});
      Group& group = groups_[at->second];
      place_[t] = {at->second, group.count++};
    }
    std::vector<std::size_t> order(groups_.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return replicas(groups_[a].layout) < replicas(groups_[b].layout); });
    for (auto const g : order) fill(groups_[g]);
  }

  /// What the rank at `coordinate` writes of tensor `t`.
  template <class = Deferred>
  CellRange range_of(std::size_t t, MeshGeometry::Coordinate const& coordinate) const {
    auto const& [g, index] = place_[t];
    Group const& group = groups_[g];
    std::int64_t const cell = cell_index(group.layout, coordinate), replica = replica_index(group.layout, coordinate);
    std::int64_t const bytes = group.cell_bytes[static_cast<std::size_t>(cell)], line = index * bytes;
    std::int64_t const* cuts = cuts_of_cell(group, cell);
    std::int64_t const begin = std::clamp(cuts[replica] - line, std::int64_t{0}, bytes), end = std::clamp(cuts[replica + 1] - line, std::int64_t{0}, bytes);
    return {begin * 8 / bits_of(group.dtype), end * 8 / bits_of(group.dtype)};
  }

  /// The rank that writes the element at `index` of tensor `t`.
  template <class = Deferred>
  std::int64_t writer_of(std::size_t t, Extents const& index) const {
    auto const& [g, position] = place_[t];
    Group const& group = groups_[g];
    auto const coordinate = coordinate_holding(group.layout, index);
    std::int64_t const count = replicas(group.layout);
    if (count == 1) return group.layout.mesh.rank_at(coordinate);
    Box const box = box_at(group.layout, coordinate);
    std::int64_t element = 0;
    for (int d = 0; d < box.rank(); ++d) element = element * box.shape[d] + (index[d] - box.origin[d]);
    std::int64_t const cell = cell_index(group.layout, coordinate);
    std::int64_t const at = position * group.cell_bytes[static_cast<std::size_t>(cell)] + static_cast<std::int64_t>(bytes_of(group.dtype, element));
    std::int64_t const* cuts = cuts_of_cell(group, cell);
    std::int64_t const replica = std::upper_bound(cuts + 1, cuts + count, at) - (cuts + 1);
    return group.layout.mesh.rank_at(replica_coordinate(group.layout, coordinate, replica));
  }

  /// Bytes that each rank writes.
  std::vector<std::int64_t> const& loads() const { return loads_; }

 private:
  struct Group {
    Layout layout;
    DType dtype;
    std::int64_t count;                    // tensors
    std::vector<std::int64_t> cell_bytes;  // of one tensor, per cell
    std::vector<std::int64_t> cuts;        // per cell, replicas + 1 positions on its line
  };
  struct Place {
    std::size_t group;
    std::int64_t index;   // among the tensors of the group
  };
  struct Key {
    Layout layout;
    DType dtype;
    template <class = Deferred>
    friend bool operator<(Key const& a, Key const& b) { return a.tuple() < b.tuple(); }
    template <class = Deferred>
    std::array<std::int64_t, 4 + 2 * max_rank + 2 * max_axes + max_axes> tuple() const {
      std::array<std::int64_t, 4 + 2 * max_rank + 2 * max_axes + max_axes> key{};
      std::size_t at = 0;
      key[at++] = static_cast<std::int64_t>(dtype);
      key[at++] = layout.mesh.axes;
      key[at++] = layout.mesh.base;
      key[at++] = layout.shape.rank();
      for (int d = 0; d < layout.shape.rank(); ++d) key[at++] = layout.shape[d], key[at++] = layout.split_shape[d];
      at = 4 + 2 * max_rank;
      for (int a = 0; a < layout.mesh.axes; ++a) {
        auto const i = static_cast<std::size_t>(a);
        key[at++] = layout.mesh.extents[i], key[at++] = layout.mesh.strides[i];
        key[at++] = layout.rules[i].kind == RuleKind::shard ? 1 + layout.rules[i].dim * 64 + layout.rules[i].step + 1 : 0;
      }
      return key;
    }
  };

  template <class = Deferred>
  static std::int64_t const* cuts_of_cell(Group const& group, std::int64_t cell) { return group.cuts.data() + cell * (replicas(group.layout) + 1); }

  template <class = Deferred>
  void fill(Group& group) {
    std::int64_t const count = cells(group.layout), copies = replicas(group.layout);
    group.cell_bytes.resize(static_cast<std::size_t>(count));
    group.cuts.resize(static_cast<std::size_t>(count * (copies + 1)));
    std::vector<std::size_t> ranks(static_cast<std::size_t>(copies));
    for (std::int64_t cell = 0; cell < count; ++cell) {
      auto const coordinate = cell_coordinate(group.layout, cell);
      std::int64_t const bytes = static_cast<std::int64_t>(bytes_of(group.dtype, static_cast<std::int64_t>(box_at(group.layout, coordinate).size())));
      group.cell_bytes[static_cast<std::size_t>(cell)] = bytes;
      for (std::int64_t r = 0; r < copies; ++r)
        ranks[static_cast<std::size_t>(r)] = static_cast<std::size_t>(group.layout.mesh.rank_at(replica_coordinate(group.layout, coordinate, r)));
      std::int64_t* cuts = group.cuts.data() + cell * (copies + 1);
      std::int64_t const line = bytes * group.count;
      std::int64_t const level = level_that_holds(ranks, line);
      // Ideal lengths in replica order; each cut is rounded, and what rounding moves is seen by the groups filled later.
      std::int64_t ideal = 0;
      cuts[0] = 0;
      for (std::size_t r = 0; r < ranks.size(); ++r) {
        ideal += std::max<std::int64_t>(0, level - loads_[ranks[r]]);
        cuts[r + 1] = r + 1 == ranks.size() ? line : std::max(cuts[r], rounded(std::min(ideal, line), bytes));
      }
      for (std::size_t r = 0; r < ranks.size(); ++r) loads_[ranks[r]] += cuts[r + 1] - cuts[r];
    }
  }

  // The level to which the least loaded of `ranks` can be filled with `bytes`: sum over ranks of max(0, level - load) >= bytes.
  template <class = Deferred>
  std::int64_t level_that_holds(std::vector<std::size_t> const& ranks, std::int64_t bytes) const {
    if (ranks.size() == 1) return loads_[ranks[0]] + bytes;
    std::vector<std::int64_t> sorted;
    sorted.reserve(ranks.size());
    for (auto const rank : ranks) sorted.push_back(loads_[rank]);
    detail::sort(sorted);
    std::int64_t sum = 0;
    for (std::size_t i = 0; i < sorted.size(); ++i) {
      sum += sorted[i];
      std::int64_t const level = ceil_div<std::int64_t>(bytes + sum, static_cast<std::int64_t>(i) + 1);
      if (i + 1 == sorted.size() || level <= sorted[i + 1]) return level;
    }
    return 0;
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
