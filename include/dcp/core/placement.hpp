// SPDX-License-Identifier: Apache-2.0
#pragma once
// Placements: what each mesh axis does to a tensor, in types. `Placement<...>` is the only canonical spelling; named axes resolve
// to it before any type is formed, so that errors print one short name.

#include <dcp/core/mesh.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace dcp {

enum class RuleKind : std::uint8_t { replicate, shard, partial, flat };

/// A rule as a value.
struct Rule {
  RuleKind kind = RuleKind::replicate;
  int dim = 0;       // of a shard
  int step = -1;     // of an ordered shard; -1: mesh order
  friend constexpr bool operator==(Rule const&, Rule const&) = default;
};

namespace detail {
template <int Dim>
struct dim_counts_from_zero {
  static_assert(Dim >= 0, "dcp: a sharded dimension is counted from 0; negative dimensions do not count from the end here [Dim >= 0]");
};
template <int Step>
struct step_counts_from_zero {
  static_assert(Step >= 0, "dcp: the Step of an OrderedShard is counted from 0; Step 0 cuts first [Step >= 0]");
};
}  // namespace detail

/// Splits dimension `Dim`. Among axes that split the same dimension, the first in mesh order cuts first (as PyTorch DTensor).
template <int Dim>
struct Shard : detail::dim_counts_from_zero<Dim> {
  static constexpr Rule rule{RuleKind::shard, Dim, -1};
};
/// Splits dimension `Dim`, where the order of cuts is not mesh order: Step 0 cuts first.
///
/// Example   FSDP over tensor parallelism on a (dp, tp) mesh: Placement<OrderedShard<0, 1>, OrderedShard<0, 0>>, tp cuts first
template <int Dim, int Step>
struct OrderedShard : detail::dim_counts_from_zero<Dim>, detail::step_counts_from_zero<Step> {
  static constexpr Rule rule{RuleKind::shard, Dim, Step};
};
/// Every rank along the axis holds the same.
struct Replicate {
  static constexpr Rule rule{RuleKind::replicate, 0, -1};
};
/// Splits the elements, in row-major order, of what the Shard rules of the other axes leave: a ZeRO-style flat shard. Alone, a tensor is
/// split evenly (as ZeRO stage 3 does); tensors that lie one behind the other in a buffer are split with it, see FlatBucket.
///
/// Example   Placement<FlatShard, Shard<0>> on a (dp, tp) mesh: rows over tp, and each rank's rows, flattened, over dp
struct FlatShard {
  static constexpr Rule rule{RuleKind::flat, 0, -1};
};
/// The ranks along the axis hold terms of a sum. Cannot be saved: there is no single value before the all-reduce.
struct Partial {
  static constexpr Rule rule{RuleKind::partial, 0, -1};
};

namespace detail {
// What rules say, without instantiating them: a mistake in a type that takes part in a constant expression is reported over and
// over by clang++. What is wrong counts as Replicate, and has its sentence in placement_checks.
template <class R>
struct rule_facts {
  static constexpr bool is_rule = false;
  static constexpr int dim = 0, step = 0;
  static constexpr Rule rule{};
};
template <int Dim>
struct rule_facts<Shard<Dim>> {
  static constexpr bool is_rule = true;
  static constexpr int dim = Dim, step = 0;
  static constexpr Rule rule = Dim >= 0 ? Rule{RuleKind::shard, Dim, -1} : Rule{};
};
template <int Dim, int Step>
struct rule_facts<OrderedShard<Dim, Step>> {
  static constexpr bool is_rule = true;
  static constexpr int dim = Dim, step = Step;
  static constexpr Rule rule = Dim >= 0 && Step >= 0 ? Rule{RuleKind::shard, Dim, Step} : Rule{};
};
template <>
struct rule_facts<Replicate> {
  static constexpr bool is_rule = true;
  static constexpr int dim = 0, step = 0;
  static constexpr Rule rule = Replicate::rule;
};
template <>
struct rule_facts<FlatShard> {
  static constexpr bool is_rule = true;
  static constexpr int dim = 0, step = 0;
  static constexpr Rule rule = FlatShard::rule;
};
template <>
struct rule_facts<Partial> {
  static constexpr bool is_rule = true;
  static constexpr int dim = 0, step = 0;
  static constexpr Rule rule = Partial::rule;
};
template <class... Rules>
inline constexpr std::array<Rule, sizeof...(Rules)> rules_of{rule_facts<Rules>::rule...};

template <class... Rules>
struct a_placement_lists_rules {
  static_assert((rule_facts<Rules>::is_rule && ... && true), "dcp: a Placement lists rules; each is Shard<Dim>, OrderedShard<Dim, Step>, FlatShard, Replicate or Partial");
};

template <std::size_t K>
constexpr int needed_rank(std::array<Rule, K> const& rules) {
  int rank = 0;
  for (auto const& rule : rules)
    if (rule.kind == RuleKind::shard && rule.dim >= rank) rank = rule.dim + 1;
  return rank;
}
template <std::size_t K>
constexpr int partial_axes(std::array<Rule, K> const& rules) {
  int count = 0;
  for (auto const& rule : rules) count += rule.kind == RuleKind::partial ? 1 : 0;
  return count;
}
template <std::size_t K>
constexpr int flat_axes(std::array<Rule, K> const& rules) {
  int count = 0;
  for (auto const& rule : rules) count += rule.kind == RuleKind::flat ? 1 : 0;
  return count;
}
// Pairs of rules that split one dimension of which one is ordered and one is not.
template <std::size_t K>
constexpr int mixed_orders(std::array<Rule, K> const& rules) {
  int count = 0;
  for (auto const& a : rules)
    for (auto const& b : rules)
      if (a.kind == RuleKind::shard && b.kind == RuleKind::shard && a.dim == b.dim && a.step < 0 && b.step >= 0) ++count;
  return count;
}
template <std::size_t K>
constexpr int repeated_steps(std::array<Rule, K> const& rules) {
  int count = 0;
  for (std::size_t i = 0; i < K; ++i)
    for (std::size_t j = i + 1; j < K; ++j)
      if (rules[i].kind == RuleKind::shard && rules[j].kind == RuleKind::shard && rules[i].dim == rules[j].dim && rules[i].step >= 0 && rules[i].step == rules[j].step) ++count;
  return count;
}
template <int Mixed>
struct one_way_to_order_a_dim {
  static_assert(Mixed == 0, "dcp: a dimension is split by Shard and OrderedShard at once; give all its axes a Step, or none [mixed pairs == 0]");
};
template <int Repeated>
struct each_step_once {
  static_assert(Repeated == 0, "dcp: two axes split a dimension with the same Step; number the cuts 0, 1, ... in the order they are made [repeated steps == 0]");
};
template <int Axes>
struct one_flat_axis {
  static_assert(Axes <= 1, "dcp: a Placement splits the flattened elements along two axes; use one FlatShard, over a mesh axis of all those ranks [FlatShard axes <= 1]");
};
// All that can be wrong with a Placement by itself.
template <class... Rules>
struct placement_checks : a_placement_lists_rules<Rules...>,
                          dim_counts_from_zero<std::min({0, rule_facts<Rules>::dim...})>,
                          step_counts_from_zero<std::min({0, rule_facts<Rules>::step...})>,
                          one_way_to_order_a_dim<mixed_orders(rules_of<Rules...>)>,
                          each_step_once<repeated_steps(rules_of<Rules...>)>,
                          one_flat_axis<flat_axes(rules_of<Rules...>)> {};
}  // namespace detail

/// One rule per mesh axis.
///
/// Example   Placement<Replicate, Shard<0>> on a (dp, tp) mesh: rows split over tp, copies along dp
template <class... Rules>
struct Placement : detail::placement_checks<Rules...> {
  static constexpr int mesh_rank = static_cast<int>(sizeof...(Rules));
  static constexpr std::array<Rule, sizeof...(Rules)> rules = detail::rules_of<Rules...>;
  static constexpr int needed_rank = detail::needed_rank(rules);       // the least rank of a tensor that can be placed so
  static constexpr int partial_axes = detail::partial_axes(rules);
};

// ---- named axes -------------------------------------------------------------------------------------------------------------

namespace detail {
template <class... Tags>
inline constexpr int distinct_tags = 0;
template <class First, class... Rest>
inline constexpr int distinct_tags<First, Rest...> = distinct_tags<Rest...> + ((std::is_same_v<First, Rest> || ...) ? 0 : 1);
template <int Named, int Distinct>
struct axes_have_own_tags {
  static_assert(Named == Distinct, "dcp: Axes names an axis twice; give each axis of the mesh a tag of its own [axes named == distinct axes]");
};
}  // namespace detail

/// Names for the axes of a mesh: tag types, so that a misspelt axis is an undeclared name.
///
/// Example   using Mesh = dcp::Axes<struct dp, struct tp>;   Mesh::index<tp> == 1
template <class... Tags>
struct Axes : detail::axes_have_own_tags<static_cast<int>(sizeof...(Tags)), detail::distinct_tags<Tags...>> {
  static constexpr int count = static_cast<int>(sizeof...(Tags));
  template <class Tag>
  static constexpr int occurrences = (0 + ... + (std::is_same_v<Tag, Tags> ? 1 : 0));
  template <class Tag>
  static constexpr int index = [] {
    int at = 0, found = -1;
    ((std::is_same_v<Tag, Tags> ? static_cast<void>(found = at++) : static_cast<void>(++at)), ...);
    return found;
  }();
};

/// What the axis named `Tag` does, in a PlacementOn.
template <class Tag, class R>
struct On {
  using tag = Tag;
  using rule = R;
};

namespace detail {
// A PlacementOn goes on with what it understands, so that a mistake in it is reported once.
template <class T>
struct on_parts {
  static constexpr bool is_on = false;
  using tag = void;
  using rule = Replicate;
};
template <class Tag, class R>
struct on_parts<On<Tag, R>> {
  static constexpr bool is_on = true;
  using tag = Tag;
  using rule = R;
};
template <class... Ons>
struct rules_of_named_axes {
  static_assert((on_parts<Ons>::is_on && ... && true), "dcp: PlacementOn takes the Axes and then  On<axis, rule>  for each axis that does not replicate");
};
template <class Mesh>
struct names_of_axes {
  static_assert(sizeof(Mesh) == 0, "dcp: PlacementOn takes the names of the mesh axes first, a dcp::Axes<...>");
};
// A base per On: the position keeps the bases of two equal Ons apart.
template <int Position, class Tag, int Occurrences>
struct known_axis {
  static_assert(Occurrences == 1, "dcp: On<axis, rule> names an axis this mesh does not have; use a tag of its Axes [times the axis occurs in the mesh == 1]");
};
template <int Position, class Tag, int Times>
struct axis_placed_once {
  static_assert(Times == 1, "dcp: PlacementOn places an axis twice; give each axis one On [times the axis is placed == 1]");
};
template <class Mesh, class Tag, class... Ons>
struct rule_of_axis {
  using type = Replicate;
};
template <class Mesh, class Tag, class First, class... Rest>
struct rule_of_axis<Mesh, Tag, First, Rest...> {
  using type = typename std::conditional_t<std::is_same_v<typename on_parts<First>::tag, Tag>, std::type_identity<typename on_parts<First>::rule>, rule_of_axis<Mesh, Tag, Rest...>>::type;
};
template <class Tag, class... Ons>
inline constexpr int times_placed = (0 + ... + (std::is_same_v<Tag, typename on_parts<Ons>::tag> ? 1 : 0));
// A mistake is reported once, at the first On that makes it.
template <int Position, class O, class... Ons>
inline constexpr bool is_first_of_its_axis = [] {
  int first = 0;
  static_cast<void>((... || (std::is_same_v<typename on_parts<Ons>::tag, typename on_parts<O>::tag> || (++first, false))));
  return on_parts<O>::is_on && first == Position;
}();
template <class Mesh, class Positions, class... Ons>
struct placement_on : names_of_axes<Mesh> {
  using type = Placement<typename on_parts<Ons>::rule...>;
};
template <class... Tags, std::size_t... Position, class... Ons>
struct placement_on<Axes<Tags...>, std::index_sequence<Position...>, Ons...>
    : rules_of_named_axes<Ons...>,
      known_axis<static_cast<int>(Position), typename on_parts<Ons>::tag, is_first_of_its_axis<Position, Ons, Ons...> ? Axes<Tags...>::template occurrences<typename on_parts<Ons>::tag> : 1>...,
      axis_placed_once<static_cast<int>(Position), typename on_parts<Ons>::tag, is_first_of_its_axis<Position, Ons, Ons...> ? times_placed<typename on_parts<Ons>::tag, Ons...> : 1>... {
  using type = Placement<typename rule_of_axis<Axes<Tags...>, Tags, Ons...>::type...>;
};
}  // namespace detail

/// The Placement with the rules given for named axes and Replicate for all others.
///
/// Example   PlacementOn<Axes<dp, tp>, On<tp, Shard<0>>> is Placement<Replicate, Shard<0>>
template <class Mesh, class... Ons>
using PlacementOn = typename detail::placement_on<Mesh, std::index_sequence_for<Ons...>, Ons...>::type;

}  // namespace dcp
