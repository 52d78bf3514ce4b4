// SPDX-License-Identifier: Apache-2.0
#include <dcp/core/mesh.hpp>

#include "../support/generate.hpp"

#include <doctest/doctest.h>

#include <limits>
#include <numeric>
#include <set>
#include <vector>

using namespace dcp;
using namespace dcp::test;

static_assert(DeviceMesh<2>{Ranks{5, 6}, {2, 3}}.coordinate() == std::array<std::int64_t, 2>{1, 2});
static_assert(DeviceMesh<2>{Ranks{5, 6}, {2, 3}}.rank_at({1, 0}) == 3);
static_assert(DeviceMesh<3>{Ranks{7, 12}, {2, 2, 3}}.sub<2>().rank_at({2}) == 8);

namespace {
using Lists = std::vector<std::int64_t>;

// Every rank is where rank_at says, and ranks that no coordinate has are nowhere.
void check_inverse(MeshGeometry const& mesh) {
  std::set<std::int64_t> members;
  MeshGeometry::Coordinate at{};
  for (std::int64_t i = 0; i < mesh.size(); ++i) {
    std::int64_t rest = i;
    for (auto a = static_cast<std::size_t>(mesh.axes); a-- > 0; rest /= mesh.extents[a]) at[a] = rest % mesh.extents[a];
    auto const rank = mesh.rank_at(at);
    REQUIRE(rank >= 0);
    REQUIRE(rank < mesh.world);
    REQUIRE(mesh.coordinate_of(rank) == at);
    members.insert(rank);
  }
  REQUIRE(static_cast<std::int64_t>(members.size()) == mesh.size());
  for (std::int64_t rank = -3; rank < mesh.world + 3; ++rank) REQUIRE(mesh.coordinate_of(rank).has_value() == members.contains(rank));
}

// sub<Axis...> at all coordinates of the other axes, as every rank sees it.
template <int... Axis>
void check_sub_meshes() {
  constexpr std::size_t others = 3 - sizeof...(Axis);
  constexpr std::array<int, sizeof...(Axis)> axes{Axis...};
  std::vector<std::size_t> fixed_axes;
  for (std::size_t a = 0; a < 3; ++a)
    if (std::find(axes.begin(), axes.end(), static_cast<int>(a)) == axes.end()) fixed_axes.push_back(a);
  std::set<std::int64_t> all;
  for (std::size_t number = 0; number < (std::size_t{1} << others); ++number) {
    std::array<std::int64_t, others> fixed{};
    for (std::size_t i = 0; i < others; ++i) fixed[i] = static_cast<std::int64_t>(number >> i & 1);
    Lists wanted;
    for (std::int64_t i = 0; i < (1 << axes.size()); ++i) {
      std::array<std::int64_t, 3> at{};
      for (std::size_t k = 0; k < axes.size(); ++k) at[static_cast<std::size_t>(axes[k])] = i >> (axes.size() - 1 - k) & 1;
      for (std::size_t k = 0; k < others; ++k) at[fixed_axes[k]] = fixed[k];
      wanted.push_back(at[0] * 4 + at[1] * 2 + at[2]);
    }
    for (std::int64_t rank = 0; rank < 8; ++rank) {
      CAPTURE(rank);
      DeviceMesh<3> const mesh{Ranks{rank, 8}, {2, 2, 2}};
      auto const part = mesh.sub<Axis...>(fixed);
      REQUIRE(part.ranks() == wanted);
      REQUIRE(part.size() == static_cast<std::int64_t>(wanted.size()));
      REQUIRE(part.rank() == rank);
      auto const place = std::find(wanted.begin(), wanted.end(), rank);
      REQUIRE(part.contains_this_rank() == (place != wanted.end()));
      if (place != wanted.end()) {
        REQUIRE(part.rank_at(*part.coordinate()) == rank);
        REQUIRE(mesh.sub<Axis...>().ranks() == wanted);   // the one through this rank is this one
      }
      REQUIRE(part.geometry().world == 8);
      check_inverse(part.geometry());
    }
    all.insert(wanted.begin(), wanted.end());
  }
  REQUIRE(all.size() == 8);   // together they are the mesh
}
}  // namespace

TEST_CASE("DeviceMesh: the last axis is the fastest") {
  DeviceMesh<3> const mesh{Ranks{17, 24}, {2, 3, 4}};
  CHECK(mesh.rank_at({1, 1, 1}) == 17);
  CHECK(mesh.coordinate() == std::array<std::int64_t, 3>{1, 1, 1});
  CHECK(mesh.extent(2) == 4);
  CHECK(mesh.size() == 24);
  Lists all(24);
  std::iota(all.begin(), all.end(), 0);
  CHECK(mesh.ranks() == all);
}

TEST_CASE("DeviceMesh: extents that do not make up the communicator are refused, and named") {
  CHECK_THROWS_WITH_AS((DeviceMesh<2>{Ranks{0, 8}, {2, 3}}), doctest::Contains("2 x 3 = 6 ranks on a communicator of 8"), Error);
  CHECK_THROWS_WITH_AS((DeviceMesh<2>{Ranks{0, 8}, {0, 8}}), doctest::Contains("axis 0 has extent 0"), Error);
  CHECK_THROWS_WITH_AS((DeviceMesh<2>{Ranks{0, 8}, {-2, -4}}), doctest::Contains("extent -4"), Error);
  CHECK_THROWS_AS((DeviceMesh<0>{Ranks{0, 2}, std::array<std::int64_t, 0>{}}), Error);
  // 2^32 * 2^32 wraps to 0, and 2^33 * (2^31 + 1) to 2^33
  CHECK_THROWS_AS((DeviceMesh<2>{Ranks{0, 0}, {std::int64_t{1} << 32, std::int64_t{1} << 32}}), Error);
  CHECK_THROWS_AS((DeviceMesh<2>{Ranks{0, std::int64_t{1} << 33}, {std::int64_t{1} << 33, (std::int64_t{1} << 31) + 1}}), Error);
}

TEST_CASE("DeviceMesh<0>: one rank, no axes") {
  DeviceMesh<0> const mesh{Ranks{0, 1}, std::array<std::int64_t, 0>{}};
  CHECK(mesh.size() == 1);
  CHECK(mesh.contains_this_rank());
  CHECK(mesh.ranks() == Lists{0});
  DeviceMesh<2> const world{Ranks{4, 6}, {2, 3}};
  CHECK(world.sub<>().ranks() == Lists{4});
  CHECK(world.sub<>({0, 2}).ranks() == Lists{2});
  CHECK_FALSE(world.sub<>({0, 2}).contains_this_rank());
}

TEST_CASE("law: every sub-mesh of 2 x 2 x 2 has the ranks of its coordinates, in the order of its axes, on every rank") {
  check_sub_meshes<>();
  check_sub_meshes<0>();
  check_sub_meshes<1>();
  check_sub_meshes<2>();
  check_sub_meshes<0, 1>();
  check_sub_meshes<0, 2>();
  check_sub_meshes<1, 2>();
  check_sub_meshes<0, 1, 2>();
  check_sub_meshes<1, 0>();
  check_sub_meshes<2, 0>();
  check_sub_meshes<2, 1>();
  check_sub_meshes<2, 1, 0>();
  check_sub_meshes<1, 2, 0>();
}

TEST_CASE("law: coordinate_of inverts rank_at on every mesh and part of a mesh, axes of extent 1 included") {
  auto const seed = first_seed();
  for (std::uint64_t round = 0; round < 3000; ++round) {
    INFO("DCP_SEED=", seed + round);
    Random random{seed + round};
    MeshGeometry const mesh = any_mesh(random, 5, 48);
    check_inverse(mesh);
    check_inverse(any_sub_mesh(random, mesh));
    check_inverse(any_sub_mesh(random, any_sub_mesh(random, mesh)));
  }
}

TEST_CASE("sub: a part of a part is a part, and a rank outside sees the part through the first rank") {
  DeviceMesh<3> const mesh{Ranks{6, 8}, {2, 2, 2}};
  auto const stage = mesh.sub<1, 2>({0});
  CHECK_FALSE(stage.contains_this_rank());
  CHECK(stage.sub<1>().ranks() == Lists{0, 1});
  CHECK(stage.sub<1>({1}).ranks() == Lists{2, 3});
  CHECK(mesh.sub<1, 2>().sub<0>().ranks() == Lists{4, 6});
}

TEST_CASE("sub: a coordinate outside its axis is refused, and named") {
  DeviceMesh<2> const mesh{Ranks{0, 6}, {2, 3}};
  CHECK_THROWS_WITH_AS(mesh.sub<0>({3}), doctest::Contains("coordinate 3 on mesh axis 1 of extent 3"), Error);
  CHECK_THROWS_AS(mesh.sub<0>({-1}), Error);
}

TEST_CASE("DeviceMesh: equal geometry compares equal whatever the rank") {
  CHECK(DeviceMesh<2>{Ranks{0, 6}, {2, 3}}.geometry() == DeviceMesh<2>{Ranks{5, 6}, {2, 3}}.geometry());
  CHECK_FALSE(DeviceMesh<2>{Ranks{0, 6}, {2, 3}}.geometry() == DeviceMesh<2>{Ranks{0, 6}, {3, 2}}.geometry());
}
