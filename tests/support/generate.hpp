// SPDX-License-Identifier: Apache-2.0
#pragma once
// Random meshes, placements, shapes and states, for laws. A law prints the seed of the round that broke it; DCP_SEED=<seed>
// in the environment runs that round first.

#include <dcp/core/layout.hpp>
#include <dcp/core/tensor_view.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

namespace dcp::test {

/// The seed that a law starts from; round i uses first_seed() + i.
inline std::uint64_t first_seed() {
  if (char const* const wanted = std::getenv("DCP_SEED")) return std::strtoull(wanted, nullptr, 10);
  return std::random_device{}();
}

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_{seed} {}
  /// In [low, high], both included.
  std::int64_t between(std::int64_t low, std::int64_t high) { return std::uniform_int_distribution<std::int64_t>{low, high}(engine_); }
  bool one_in(std::int64_t n) { return between(1, n) == 1; }
  template <class List>
  auto any_of(List const& list) {
    return *(std::begin(list) + between(0, static_cast<std::int64_t>(std::size(list)) - 1));
  }
  template <class T>
  void shuffle(std::vector<T>& list) {
    std::shuffle(list.begin(), list.end(), engine_);
  }
  Bytes bytes(std::size_t size) {
    Bytes result(size);
    for (auto& byte : result) byte = static_cast<std::byte>(engine_() >> 24);
    return result;
  }

 private:
  std::mt19937_64 engine_;
};

/// A mesh over `extents` ranks, as DeviceMesh makes it.
inline MeshGeometry mesh_of(std::vector<std::int64_t> const& extents) {
  MeshGeometry mesh;
  mesh.axes = static_cast<int>(extents.size());
  mesh.world = 1;
  for (std::size_t a = extents.size(); a-- > 0;) {
    mesh.extents[a] = extents[a];
    mesh.strides[a] = mesh.world;
    mesh.world *= extents[a];
  }
  return mesh;
}

/// 1 to `axes` axes of together at most `ranks` ranks; extents 1, 2, 3, ... all occur.
inline MeshGeometry any_mesh(Random& random, int axes, std::int64_t ranks) {
  std::vector<std::int64_t> extents;
  for (auto count = random.between(1, axes); count > 0; --count) {
    extents.push_back(random.between(1, std::min<std::int64_t>(ranks, 7)));
    ranks /= extents.back();
  }
  random.shuffle(extents);
  return mesh_of(extents);
}

/// The mesh of a part of the axes in any order, at any coordinate of the others, as DeviceMesh::sub makes it.
inline MeshGeometry any_sub_mesh(Random& random, MeshGeometry const& mesh) {
  MeshGeometry part;
  part.world = mesh.world;
  part.base = mesh.base;
  std::vector<std::size_t> kept;
  for (std::size_t a = 0; a < static_cast<std::size_t>(mesh.axes); ++a) {
    if (random.one_in(2)) kept.push_back(a);
    else part.base += random.between(0, mesh.extents[a] - 1) * mesh.strides[a];
  }
  random.shuffle(kept);
  for (auto const a : kept) {
    part.extents[static_cast<std::size_t>(part.axes)] = mesh.extents[a];
    part.strides[static_cast<std::size_t>(part.axes++)] = mesh.strides[a];
  }
  return part;
}

/// 0 to `rank` dimensions; sizes 0, 1, primes, and fewer than ranks all occur.
inline Extents any_shape(Random& random, int rank, std::int64_t elements) {
  static constexpr std::array<std::int64_t, 14> sizes{1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 11, 13, 16, 23};
  Extents shape = Extents::filled(static_cast<int>(random.between(0, rank)), 1);
  for (int d = 0; d < shape.rank(); ++d) {
    shape[d] = random.one_in(25) ? 0 : std::min(random.any_of(sizes), elements);
    elements /= std::max<std::int64_t>(1, shape[d]);
  }
  return shape;
}

/// One rule per axis of the mesh: replicating or splitting a dimension, some dimensions with numbered steps in any order.
inline std::array<Rule, max_axes> any_rules(Random& random, int axes, int rank) {
  std::array<Rule, max_axes> rules{};
  std::vector<std::int64_t> steps(max_axes + 2);
  std::iota(steps.begin(), steps.end(), 0);
  random.shuffle(steps);
  std::array<bool, max_rank> ordered{};
  for (auto& is_ordered : ordered) is_ordered = random.one_in(3);
  for (std::size_t a = 0; a < static_cast<std::size_t>(axes); ++a) {
    if (rank == 0 || random.one_in(3)) continue;
    auto const dim = random.between(0, rank - 1);
    rules[a] = {RuleKind::shard, static_cast<int>(dim), ordered[static_cast<std::size_t>(dim)] ? static_cast<int>(steps[a]) : -1};
  }
  return rules;
}

/// Makes `axis` a flat one: the tensor split by itself, or lying somewhere in a bucket, cut evenly or anyhow. `between(low, high)` draws.
template <class Between>
void make_flat(Layout& layout, std::size_t axis, Between between) {
  layout.rules[axis] = FlatShard::rule;
  for (int d = 1; d < layout.shape.rank(); ++d) layout.split_shape[d] = layout.shape[d];
  layout.flat = {};
  std::int64_t const extent = layout.mesh.extents[axis], elements = padded_box_at(layout, {}).shape.elements();
  bool even = true;
  for (std::int64_t cell = 0; cell < cells(layout); ++cell) even = even && padded_box_at(layout, cell_coordinate(layout, cell)).shape.elements() == elements;
  if (!even || between(0, 2) == 0) return;
  layout.flat.offset = between(0, 40);
  layout.flat.elements = elements;
  layout.flat.ranks = extent;
  std::int64_t const end = layout.flat.offset + elements + between(0, 30);
  if (between(0, 1) == 0) {
    layout.flat.shard = std::max<std::int64_t>(1, ceil_div(end, extent));
    return;
  }
  std::vector<std::int64_t> cuts{0, end};
  for (std::int64_t i = 1; i < extent; ++i) cuts.push_back(between(0, end));
  std::sort(cuts.begin(), cuts.end());
  std::vector<FlatRange> ranges;
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) ranges.insert(ranges.begin() + between(0, static_cast<std::int64_t>(i)), {cuts[i], cuts[i + 1]});
  layout.flat.ranges = detail::SharedRanges{std::move(ranges)};
}

struct Sizes {
  int axes = 3;
  std::int64_t ranks = 24;
  int rank = 4;
  std::int64_t elements = 600;
};

/// A mesh (one in three a part of a larger one), rules, and a shape (one in five padded before it was split).
inline Layout any_layout(Random& random, Sizes const& limits = {}) {
  Layout layout;
  layout.mesh = any_mesh(random, limits.axes, limits.ranks);
  if (random.one_in(3)) layout.mesh = any_sub_mesh(random, layout.mesh);
  layout.shape = layout.split_shape = any_shape(random, limits.rank, limits.elements);
  layout.rules = any_rules(random, layout.mesh.axes, layout.shape.rank());
  if (random.one_in(5))
    for (int d = 0; d < layout.shape.rank(); ++d) layout.split_shape[d] += random.between(0, 9);
  return layout;
}
/// The same with a flat axis.
inline Layout any_flat_layout(Random& random, Sizes const& limits = {}) {
  for (;;) {
    Layout layout = any_layout(random, limits);
    if (layout.mesh.axes == 0) continue;
    make_flat(layout, static_cast<std::size_t>(random.between(0, layout.mesh.axes - 1)), [&](std::int64_t low, std::int64_t high) { return random.between(low, high); });
    return layout;
  }
}

/// A rank and the size of its communicator: all that a DeviceMesh wants to know.
struct Ranks {
  std::int64_t rank_, size_;
  constexpr std::int64_t rank() const { return rank_; }
  constexpr std::int64_t size() const { return size_; }
};

/// The element after `index` in row-major order of `shape`; false after the last.
inline bool next_index(Extents& index, Extents const& shape) {
  for (int d = shape.rank(); d-- > 0;) {
    if (++index[d] < shape[d]) return true;
    index[d] = 0;
  }
  return false;
}

/// Calls visit(index) for all elements of `box`, as positions in the global tensor.
template <class Visit>
void for_each_element(Box const& box, Visit visit) {
  if (box.empty()) return;
  Extents index = Extents::filled(box.rank(), 0);
  do {
    Extents global = index;
    for (int d = 0; d < box.rank(); ++d) global[d] += box.origin[d];
    visit(global);
  } while (next_index(index, box.shape));
}

inline std::int64_t linear(Extents const& index, Extents const& strides) {
  std::int64_t at = 0;
  for (int d = 0; d < index.rank(); ++d) at += index[d] * strides[d];
  return at;
}

}  // namespace dcp::test
