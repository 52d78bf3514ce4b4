// SPDX-License-Identifier: Apache-2.0
#include <dcp/core/placement.hpp>

#include <doctest/doctest.h>

#include <type_traits>

using namespace dcp;

namespace {
using Mesh = Axes<struct pp, struct dp, struct tp>;

static_assert(Mesh::count == 3 && Mesh::index<pp> == 0 && Mesh::index<tp> == 2);
static_assert(Mesh::occurrences<dp> == 1 && Mesh::occurrences<struct other> == 0);

// Aliases vanish: what a user spells with names is the one canonical type.
static_assert(std::is_same_v<PlacementOn<Mesh, On<tp, Shard<0>>>, Placement<Replicate, Replicate, Shard<0>>>);
static_assert(std::is_same_v<PlacementOn<Mesh, On<tp, Shard<0>>, On<pp, Shard<1>>>, Placement<Shard<1>, Replicate, Shard<0>>>);
static_assert(std::is_same_v<PlacementOn<Mesh, On<pp, Shard<1>>, On<tp, Shard<0>>>, PlacementOn<Mesh, On<tp, Shard<0>>, On<pp, Shard<1>>>>);
static_assert(std::is_same_v<PlacementOn<Mesh>, Placement<Replicate, Replicate, Replicate>>);
static_assert(std::is_same_v<PlacementOn<Mesh, On<dp, OrderedShard<0, 1>>, On<tp, OrderedShard<0, 0>>>, Placement<Replicate, OrderedShard<0, 1>, OrderedShard<0, 0>>>);
static_assert(std::is_same_v<PlacementOn<Axes<>>, Placement<>>);

// The same rule on several axes is an ordinary placement.
static_assert(Placement<Replicate, Replicate, Replicate>::mesh_rank == 3);
static_assert(Placement<Shard<0>, Shard<0>, Shard<0>>::needed_rank == 1);
static_assert(Placement<Partial, Partial>::partial_axes == 2);
static_assert(Placement<>::mesh_rank == 0 && Placement<>::needed_rank == 0);

static_assert(Placement<Shard<3>, Replicate, Shard<1>>::needed_rank == 4);
static_assert(Placement<Replicate, Partial>::needed_rank == 0 && Placement<Replicate, Partial>::partial_axes == 1);
static_assert(Placement<Shard<0>, OrderedShard<1, 4>>::rules == std::array<Rule, 2>{Rule{RuleKind::shard, 0, -1}, Rule{RuleKind::shard, 1, 4}});
}  // namespace

TEST_CASE("Placement: ordered and plain cuts mix on different dimensions, and steps repeat across dimensions") {
  using P = Placement<OrderedShard<0, 1>, Shard<1>, OrderedShard<0, 0>, OrderedShard<2, 0>>;
  CHECK(P::needed_rank == 3);
  CHECK(P::rules[0] == Rule{RuleKind::shard, 0, 1});
  CHECK(detail::mixed_orders(P::rules) == 0);
  CHECK(detail::repeated_steps(P::rules) == 0);
}

TEST_CASE("Placement: the checks behind its compile errors count what is wrong") {
  constexpr Rule plain{RuleKind::shard, 0, -1}, first{RuleKind::shard, 0, 0}, other{RuleKind::shard, 1, 0}, none{}, partial{RuleKind::partial, 0, -1};
  CHECK(detail::mixed_orders(std::array{plain, first}) == 1);
  CHECK(detail::mixed_orders(std::array{first, plain, plain}) == 2);
  CHECK(detail::mixed_orders(std::array{plain, other, none, partial}) == 0);
  CHECK(detail::repeated_steps(std::array{first, none, first}) == 1);
  CHECK(detail::repeated_steps(std::array{first, other}) == 0);
  CHECK(detail::repeated_steps(std::array{plain, plain}) == 0);
  CHECK(detail::needed_rank(std::array{none, other}) == 2);
  CHECK(detail::partial_axes(std::array{none, partial, partial}) == 2);
}
