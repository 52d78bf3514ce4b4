// SPDX-License-Identifier: Apache-2.0
#pragma once
// The run-time twin of a placement: mesh, rules and global shape as one small value, from which every rank derives every rank's
// box. All algorithms are written on this value; the types only make it.

#include <dcp/base/result.hpp>
#include <dcp/core/box.hpp>
#include <dcp/core/dtype.hpp>
#include <dcp/core/flat_bucket.hpp>
#include <dcp/core/mesh.hpp>
#include <dcp/core/placement.hpp>

#include <array>
#include <concepts>
#include <cstdint>
#include <optional>
#include <span>

namespace dcp {

/// [begin, begin + size) of a dimension.
struct Interval {
  std::int64_t begin, size;
};

/// Part `i` of `k` of an interval of `n` elements: ceil(n / k) elements to every part until they run out.
///
/// Source    the torch.chunk rule, as in PyTorch DTensor
/// Example   5 over 4: sizes 2, 2, 1, 0
constexpr Interval split(std::int64_t n, std::int64_t k, std::int64_t i) {
  std::int64_t const part = ceil_div(n, k);
  std::int64_t const begin = std::min(n, part * i);
  return {begin, std::min(part, n - begin)};
}

/// A global shape that trainers padded before they split it: what is stored has the logical shape, what is split the padded one.
///
/// Example   Padded{{50257, 768}, {50304, 768}}: a vocabulary of 50257 rows in 8 shards of 6288, the last of which holds 47 rows of padding
struct Padded {
  Extents logical;
  Extents padded;
};

/// How a tensor lies over ranks.
struct Layout {
  Extents shape;            // what the checkpoint holds
  Extents split_shape;      // what is cut into shards; larger than shape only for padded tensors
  MeshGeometry mesh;
  std::array<Rule, max_axes> rules{};
  FlatSlot flat{};          // for a flat axis: where the tensor lies in its buffer
  bool everywhere = false;  // a plain tensor, the same on every rank that lists it; mesh and rules are then set by the planner

  friend constexpr bool operator==(Layout const&, Layout const&) = default;
};

/// A tensor that is the same on every rank that lists it.
constexpr Layout plain_layout(Extents const& shape) {
  Layout layout;
  layout.shape = layout.split_shape = shape;
  layout.everywhere = true;
  return layout;
}

/// A plain layout bound to the ranks that hold it: all `size` ranks of a communicator, or only `rank`.
constexpr Layout replicated_layout(Extents const& shape, std::int64_t size) {
  Layout layout;
  layout.shape = layout.split_shape = shape;
  layout.mesh.axes = 1;
  layout.mesh.world = size;
  layout.mesh.extents[0] = size;
  layout.mesh.strides[0] = 1;
  return layout;
}
constexpr Layout single_rank_layout(Extents const& shape, std::int64_t rank, std::int64_t size) {
  Layout layout;
  layout.shape = layout.split_shape = shape;
  layout.mesh.world = size;
  layout.mesh.base = rank;
  return layout;
}

/// The axes that cut dimension `dim`, in the order in which they cut.
struct CutOrder {
  std::array<int, max_axes> axis{};
  int count = 0;
};
constexpr CutOrder cuts_of(Layout const& layout, int dim) {
  CutOrder cuts;
  for (int a = 0; a < layout.mesh.axes; ++a) {
    Rule const& rule = layout.rules[static_cast<std::size_t>(a)];
    if (rule.kind != RuleKind::shard || rule.dim != dim) continue;
    int at = cuts.count++;
    // Insertion by step; rules without a step keep mesh order.
    for (; at > 0 && layout.rules[static_cast<std::size_t>(cuts.axis[static_cast<std::size_t>(at - 1)])].step > rule.step; --at)
      cuts.axis[static_cast<std::size_t>(at)] = cuts.axis[static_cast<std::size_t>(at - 1)];
    cuts.axis[static_cast<std::size_t>(at)] = a;
  }
  return cuts;
}

/// The box of the split shape, padding included, that a mesh coordinate holds.
constexpr Box padded_box_at(Layout const& layout, MeshGeometry::Coordinate const& coordinate) {
  Box box = Box::whole(layout.split_shape);
  for (int d = 0; d < box.rank(); ++d) {
    CutOrder const cuts = cuts_of(layout, d);
    for (int i = 0; i < cuts.count; ++i) {
      auto const a = static_cast<std::size_t>(cuts.axis[static_cast<std::size_t>(i)]);
      Interval const part = split(box.shape[d], layout.mesh.extents[a], coordinate[a]);
      box.origin[d] += part.begin;
      box.shape[d] = part.size;
    }
  }
  return box;
}

/// The box of the logical shape that a mesh coordinate holds; of a flat shard, the box that it is a part of. Exactly one, possibly empty.
///
/// Law       the boxes of all coordinates that differ in a Shard axis are disjoint, and together they cover the tensor
constexpr Box box_at(Layout const& layout, MeshGeometry::Coordinate const& coordinate) {
  Box box = padded_box_at(layout, coordinate);
  for (int d = 0; d < box.rank(); ++d) {
    box.shape[d] = std::max<std::int64_t>(0, std::min(box.origin[d] + box.shape[d], layout.shape[d]) - box.origin[d]);
    if (box.shape[d] == 0) box.origin[d] = layout.shape[d];
  }
  return box;
}

/// The same for `rank` of the communicator; nothing if it is outside the tensor's mesh.
template <class = Deferred>
std::optional<Box> box_of_rank(Layout const& layout, std::int64_t rank) {
  auto const coordinate = layout.mesh.coordinate_of(rank);
  if (!coordinate) return std::nullopt;
  return box_at(layout, *coordinate);
}

/// The mesh axis that is flat, or -1.
constexpr int flat_axis(Layout const& layout) {
  for (int a = 0; a < layout.mesh.axes; ++a)
    if (layout.rules[static_cast<std::size_t>(a)].kind == RuleKind::flat) return a;
  return -1;
}

/// How many coordinates of the flat axis hold the tensor, about.
constexpr std::int64_t flat_parts(Layout const& layout, int axis) {
  std::int64_t const extent = layout.mesh.extents[static_cast<std::size_t>(axis)];
  if (layout.flat.shard == 0) return extent;
  auto const [first, last] = layout.flat.coordinates(extent);
  return last + 1 - first;
}

/// What a rank holds of a tensor: elements [begin, end) of a box, in its row-major order; all of them, unless an axis is flat.
struct HeldPart {
  Box box;
  std::int64_t begin = 0, end = 0;
  bool flat = false;        // whether memory holds just these elements, one behind the other, rather than the box

  constexpr std::int64_t elements() const { return end - begin; }
  constexpr bool empty() const { return begin == end; }
  friend constexpr bool operator==(HeldPart const&, HeldPart const&) = default;
};

/// What the rank at a mesh coordinate holds, without padding.
///
/// Law       the parts of all coordinates that differ in a Shard or FlatShard axis are disjoint, and together they cover the tensor
constexpr HeldPart held_at(Layout const& layout, MeshGeometry::Coordinate const& coordinate) {
  HeldPart held{box_at(layout, coordinate)};
  held.end = held.box.shape.elements();
  int const axis = flat_axis(layout);
  if (axis < 0) return held;
  held.flat = true;
  // Padding is behind the logical elements: only the first dimension of a flat tensor can be padded.
  auto const a = static_cast<std::size_t>(axis);
  std::int64_t const count = padded_box_at(layout, coordinate).shape.elements(), logical = held.end;
  FlatRange const range = layout.flat.range_of(coordinate[a], layout.mesh.extents[a], count);
  held.begin = std::clamp(range.begin - layout.flat.offset, std::int64_t{0}, logical);
  held.end = std::clamp(range.end - layout.flat.offset, held.begin, logical);
  return held;
}

/// What `rank` of the communicator holds; nothing if it is outside the tensor's mesh.
template <class = Deferred>
std::optional<HeldPart> held_by(Layout const& layout, std::int64_t rank) {
  auto const coordinate = layout.mesh.coordinate_of(rank);
  if (!coordinate) return std::nullopt;
  return held_at(layout, *coordinate);
}

/// Calls visit(box, first) for the fewest boxes that together are elements [begin, end) of `whole` in row-major order: at most
/// 2 * rank - 1. `first` is the number of a box's first element, and inside a box elements keep the strides of `whole`.
///
/// Law       boxes are disjoint, in order, and their sizes sum to end - begin
/// Example   elements [2, 11) of a [4, 3] box: [1, 1] at [0, 2], [2, 3] at [1, 0], [1, 2] at [3, 0]
template <class Visit>
constexpr void for_each_box(Box const& whole, std::int64_t begin, std::int64_t end, Visit visit) {
  if (begin >= end) return;
  int const rank = whole.rank();
  if (rank == 0) return static_cast<void>(visit(whole, std::int64_t{0}));
  Extents const strides = row_major_strides(whole.shape);
  for (std::int64_t at = begin; at < end;) {
    // The outermost dimension of which whole slices begin here.
    int d = 0;
    while (d + 1 < rank && (at % strides[d] != 0 || end - at < strides[d])) ++d;
    Box box = whole;
    std::int64_t rest = at;
    for (int outer = 0; outer <= d; ++outer) {
      box.origin[outer] += rest / strides[outer];
      box.shape[outer] = 1;
      rest %= strides[outer];
    }
    std::int64_t const left = whole.origin[d] + whole.shape[d] - box.origin[d];
    box.shape[d] = std::min(left, (end - at) / strides[d]);
    visit(box, at);
    at += box.shape[d] * strides[d];
  }
}

/// The coordinate, 0 on replicating axes, whose part holds the element at `index`.
constexpr MeshGeometry::Coordinate coordinate_holding(Layout const& layout, Extents const& index) {
  MeshGeometry::Coordinate coordinate{};
  for (int d = 0; d < layout.shape.rank(); ++d) {
    CutOrder const cuts = cuts_of(layout, d);
    std::int64_t length = layout.split_shape[d], at = index[d];
    for (int i = 0; i < cuts.count; ++i) {
      auto const a = static_cast<std::size_t>(cuts.axis[static_cast<std::size_t>(i)]);
      std::int64_t const part = ceil_div(length, layout.mesh.extents[a]);
      coordinate[a] = at / part;
      at -= coordinate[a] * part;
      length = split(length, layout.mesh.extents[a], coordinate[a]).size;
    }
  }
  if (int const axis = flat_axis(layout); axis >= 0) {
    auto const a = static_cast<std::size_t>(axis);
    Box const box = padded_box_at(layout, coordinate);
    std::int64_t element = 0;
    for (int d = 0; d < box.rank(); ++d) element = element * box.shape[d] + (index[d] - box.origin[d]);
    coordinate[a] = layout.flat.coordinate_of(element, layout.mesh.extents[a], box.shape.elements());
  }
  return coordinate;
}

/// Whether different ranks along an axis of this rule hold different elements.
constexpr bool splits(Rule const& rule) { return rule.kind == RuleKind::shard || rule.kind == RuleKind::flat; }

/// How many ranks hold each element: the product of the extents of the replicating axes.
constexpr std::int64_t replicas(Layout const& layout) {
  std::int64_t count = 1;
  for (int a = 0; a < layout.mesh.axes; ++a)
    if (!splits(layout.rules[static_cast<std::size_t>(a)])) count *= layout.mesh.extents[static_cast<std::size_t>(a)];
  return count;
}

/// Which replica a coordinate is, 0 to replicas() - 1, last axis fastest; and the coordinate of replica `index` of the same box.
constexpr std::int64_t replica_index(Layout const& layout, MeshGeometry::Coordinate const& coordinate) {
  std::int64_t index = 0;
  for (int a = 0; a < layout.mesh.axes; ++a)
    if (!splits(layout.rules[static_cast<std::size_t>(a)])) index = index * layout.mesh.extents[static_cast<std::size_t>(a)] + coordinate[static_cast<std::size_t>(a)];
  return index;
}
constexpr MeshGeometry::Coordinate replica_coordinate(Layout const& layout, MeshGeometry::Coordinate coordinate, std::int64_t index) {
  for (int a = layout.mesh.axes; a-- > 0;) {
    if (splits(layout.rules[static_cast<std::size_t>(a)])) continue;
    coordinate[static_cast<std::size_t>(a)] = index % layout.mesh.extents[static_cast<std::size_t>(a)];
    index /= layout.mesh.extents[static_cast<std::size_t>(a)];
  }
  return coordinate;
}

/// The number of different boxes (cells), and cell number `index` as a coordinate with 0 on replicating axes.
constexpr std::int64_t cells(Layout const& layout) { return layout.mesh.size() / replicas(layout); }
constexpr MeshGeometry::Coordinate cell_coordinate(Layout const& layout, std::int64_t index) {
  MeshGeometry::Coordinate coordinate{};
  for (int a = layout.mesh.axes; a-- > 0;) {
    if (!splits(layout.rules[static_cast<std::size_t>(a)])) continue;
    coordinate[static_cast<std::size_t>(a)] = index % layout.mesh.extents[static_cast<std::size_t>(a)];
    index /= layout.mesh.extents[static_cast<std::size_t>(a)];
  }
  return coordinate;
}
constexpr std::int64_t cell_index(Layout const& layout, MeshGeometry::Coordinate const& coordinate) {
  std::int64_t index = 0;
  for (int a = 0; a < layout.mesh.axes; ++a)
    if (splits(layout.rules[static_cast<std::size_t>(a)])) index = index * layout.mesh.extents[static_cast<std::size_t>(a)] + coordinate[static_cast<std::size_t>(a)];
  return index;
}

// ---- from types ----------------------------------------------------------------------------------------------------------------

template <class P>
inline constexpr bool is_placement = false;
template <class... Rules>
inline constexpr bool is_placement<Placement<Rules...>> = true;

namespace detail {
template <class P>
struct a_placement {
  static_assert(is_placement<P>, "dcp: a layout is a dcp::Placement<...> (or a PlacementOn<...>); this type is none");
};
template <class... Rules>
struct a_placement<Placement<Rules...>> : placement_checks<Rules...> {};
// Of what is no Placement: numbers that raise no second complaint.
template <class P, int Axes>
inline constexpr int rules_given = Axes;
template <class... Rules, int Axes>
inline constexpr int rules_given<Placement<Rules...>, Axes> = static_cast<int>(sizeof...(Rules));
template <class P>
inline constexpr int needed_rank_of = 0;
template <class... Rules>
inline constexpr int needed_rank_of<Placement<Rules...>> = needed_rank(rules_of<Rules...>);
template <class P>
inline constexpr int partial_axes_of = 0;
template <class... Rules>
inline constexpr int partial_axes_of<Placement<Rules...>> = partial_axes(rules_of<Rules...>);
template <int Rules, int Axes>
struct one_rule_per_axis {
  static_assert(Rules == Axes, "dcp: a Placement lists one rule per mesh axis; write Replicate for the axes it ignores [rules given == mesh axes]");
};
template <int TensorRank, int Needed>
struct dims_exist {
  static_assert(TensorRank >= Needed, "dcp: this Placement shards a dimension that the tensor does not have [tensor rank >= rank the Placement needs; dimensions count from 0]");
};

// A bucket is the same on every rank, so every part of its tensors has the size that it was told.
constexpr void check_slot(Layout const& layout, int axis) {
  auto const coordinates = [&](auto visit) {
    MeshGeometry::Coordinate coordinate{};
    visit(coordinate);
    // Parts of a ceil(n / k) split are largest at the first and smallest at the last coordinate.
    for (int a = 0; a < layout.mesh.axes; ++a)
      if (layout.rules[static_cast<std::size_t>(a)].kind == RuleKind::shard) coordinate[static_cast<std::size_t>(a)] = layout.mesh.extents[static_cast<std::size_t>(a)] - 1;
    visit(coordinate);
  };
  coordinates([&](MeshGeometry::Coordinate const& coordinate) {
    if (Box const box = padded_box_at(layout, coordinate); box.shape.elements() != layout.flat.elements)
      throw Error{ErrorCode::invalid_argument, "a tensor " + to_string(layout.shape) + " has a part " + to_string(box.shape) + " on some rank, and its place in the flat bucket is for " + std::to_string(layout.flat.elements) + " elements"}
          .with_hint("a bucket is the same on all ranks; pad the tensor (dcp::Padded) so that its parts are equal");
  });
  if (std::int64_t const extent = layout.mesh.extents[static_cast<std::size_t>(axis)]; extent != layout.flat.ranks)
    throw Error{ErrorCode::invalid_argument, "a flat bucket of " + std::to_string(layout.flat.ranks) + " ranks on a mesh axis of " + std::to_string(extent)};
}

// The layout of rules as values: one body for all placements.
constexpr Layout layout_of_rules(MeshGeometry const& mesh, Padded const& shape, std::span<Rule const> rules, int needed_rank, FlatSlot const& flat = {}) {
  Layout layout;
  layout.shape = shape.logical;
  layout.split_shape = shape.padded;
  layout.mesh = mesh;
  for (std::size_t a = 0; a < rules.size() && a < max_axes; ++a) layout.rules[a] = rules[a];
  if (shape.logical.rank() != shape.padded.rank())
    throw Error{ErrorCode::invalid_argument, "logical shape " + to_string(shape.logical) + " and padded shape " + to_string(shape.padded) + " differ in rank"};
  for (int d = 0; d < shape.logical.rank(); ++d)
    if (shape.logical[d] > shape.padded[d])
      throw Error{ErrorCode::invalid_argument, "logical shape " + to_string(shape.logical) + " is larger than the padded shape " + to_string(shape.padded)};
  if (shape.logical.rank() < needed_rank)
    throw Error{ErrorCode::invalid_argument, "a tensor of shape " + to_string(shape.logical) + " has no dimension " + std::to_string(needed_rank - 1) + ", which its Placement shards"};
  if (int const axis = flat_axis(layout); axis >= 0) {
    for (int d = 1; d < shape.logical.rank(); ++d)
      if (shape.logical[d] != shape.padded[d])
        throw Error{ErrorCode::invalid_argument, "a flat tensor " + to_string(shape.logical) + " padded to " + to_string(shape.padded) + "; only its first dimension can be padded"};
    layout.flat = flat;
    if (flat.in_bucket()) check_slot(layout, axis);
  } else if (flat.in_bucket()) {
    throw Error{ErrorCode::invalid_argument, "a tensor " + to_string(shape.logical) + " of a flat bucket, whose Placement has no FlatShard"};
  }
  return layout;
}
}  // namespace detail

/// The layout of a tensor of global `shape` placed as `P` on `mesh`.
///
/// Throws    Error(invalid_argument) if the shape has fewer dimensions than P shards
template <class P, int N>
constexpr Layout layout_of(DeviceMesh<N> const& mesh, Padded const& shape, FlatSlot const& flat = {}) {
  [[maybe_unused]] detail::a_placement<P> placement;
  [[maybe_unused]] detail::one_rule_per_axis<detail::rules_given<P, N>, N> rules;
  std::span<Rule const> of_placement;
  if constexpr (is_placement<P>) of_placement = P::rules;
  return detail::layout_of_rules(mesh.geometry(), shape, of_placement, detail::needed_rank_of<P>, flat);
}
template <class P, int N>
constexpr Layout layout_of(DeviceMesh<N> const& mesh, Extents const& shape) {
  return layout_of<P>(mesh, Padded{shape, shape});
}

/// A box of no elements, for a rank that holds no part of a tensor of this shape. (A scalar's box is never empty, so it becomes [0].)
constexpr Box nothing_of(Extents const& shape) {
  Box box = Box::whole(shape);
  if (box.rank() == 0) return {Extents{0}, Extents{0}};
  box.origin[0] = shape[0];
  box.shape[0] = 0;
  return box;
}

/// The part of a tensor of global `shape` that this rank holds under `P`: what to allocate, before the tensor exists. Empty on a
/// rank outside the mesh.
///
/// Example   std::vector<float> memory(dcp::local_box<Placement<Shard<0>>>(mesh, {7, 3}).size());   // rank 3 of 4: [1, 3] at [6, 0]
template <class P, int N>
constexpr Box local_box(DeviceMesh<N> const& mesh, Extents const& shape) {
  [[maybe_unused]] detail::a_placement<P> placement;   // here as well: the fewer calls between, the shorter the compiler's message
  [[maybe_unused]] detail::one_rule_per_axis<detail::rules_given<P, N>, N> rules;
  Layout const layout = layout_of<P>(mesh, shape);
  auto const coordinate = layout.mesh.coordinate_of(mesh.rank());
  return coordinate ? box_at(layout, *coordinate) : nothing_of(shape);
}
template <class P, int N, std::size_t K>
constexpr Box local_box(DeviceMesh<N> const& mesh, std::int64_t const (&shape)[K]) {
  [[maybe_unused]] detail::a_placement<P> placement;
  [[maybe_unused]] detail::one_rule_per_axis<detail::rules_given<P, N>, N> rules;
  [[maybe_unused]] detail::dims_exist<static_cast<int>(K), detail::needed_rank_of<P>> dims;
  return local_box<P>(mesh, Extents{shape});
}
/// The same with the padding that is split along: what to allocate for a padded tensor.
template <class P, int N>
constexpr Box local_box(DeviceMesh<N> const& mesh, Padded const& shape) {
  [[maybe_unused]] detail::a_placement<P> placement;
  [[maybe_unused]] detail::one_rule_per_axis<detail::rules_given<P, N>, N> rules;
  Layout const layout = layout_of<P>(mesh, shape);
  auto const coordinate = layout.mesh.coordinate_of(mesh.rank());
  return coordinate ? padded_box_at(layout, *coordinate) : nothing_of(shape.padded);
}

/// `layout` seen as placed by `P`, checked at run time: the way back from a value to a type.
///
/// Returns   the layout, or Error(invalid_argument) saying where the rules differ
template <class P>
Result<Layout> as_placement(Layout const& layout) {
  [[maybe_unused]] detail::a_placement<P> placement;
  if constexpr (is_placement<P>) {
    if (layout.mesh.axes != P::mesh_rank)
      return Error{ErrorCode::invalid_argument, "the layout has " + std::to_string(layout.mesh.axes) + " mesh axes, the Placement " + std::to_string(P::mesh_rank) + " rules"};
    for (std::size_t a = 0; a < P::rules.size(); ++a)
      if (!(layout.rules[a] == P::rules[a])) return Error{ErrorCode::invalid_argument, "the layout and the Placement differ on mesh axis " + std::to_string(a)};
  }
  return layout;
}

}  // namespace dcp
