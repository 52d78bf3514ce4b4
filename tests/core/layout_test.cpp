// SPDX-License-Identifier: Apache-2.0
#include <dcp/core/layout.hpp>

#include "../support/generate.hpp"
#include "../support/torch_layouts.hpp"

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <tuple>
#include <vector>

using namespace dcp;
using namespace dcp::test;

namespace {
constexpr int rounds = 6000;

template <class P, int N>
Box box_for(std::array<std::int64_t, static_cast<std::size_t>(N)> const& extents, std::int64_t rank, Extents const& shape) {
  std::int64_t size = 1;
  for (auto const extent : extents) size *= extent;
  return local_box<P>(DeviceMesh<N>{Ranks{rank, size}, extents}, shape);
}

// The indices of dimension `dim` that a coordinate holds, by the words of the rule: lists cut into chunks, no arithmetic shared with the library.
std::vector<std::int64_t> indices_by_chunks(Layout const& layout, MeshGeometry::Coordinate const& coordinate, int dim) {
  std::vector<std::int64_t> list(static_cast<std::size_t>(layout.split_shape[dim]));
  std::iota(list.begin(), list.end(), std::int64_t{0});
  std::vector<std::pair<int, std::size_t>> cuts;   // (step, or mesh order, axis)
  for (std::size_t a = 0; a < static_cast<std::size_t>(layout.mesh.axes); ++a)
    if (layout.rules[a].kind == RuleKind::shard && layout.rules[a].dim == dim) cuts.emplace_back(layout.rules[a].step < 0 ? static_cast<int>(a) : layout.rules[a].step, a);
  std::sort(cuts.begin(), cuts.end());
  for (auto const& [order, axis] : cuts) {
    std::vector<std::vector<std::int64_t>> chunks(static_cast<std::size_t>(layout.mesh.extents[axis]));
    std::size_t const chunk = (list.size() + chunks.size() - 1) / chunks.size();
    for (std::size_t i = 0; i < list.size(); ++i) chunks[i / chunk].push_back(list[i]);
    list = chunks[static_cast<std::size_t>(coordinate[axis])];
  }
  std::erase_if(list, [&](std::int64_t i) { return i >= layout.shape[dim]; });   // padding
  return list;
}

template <class Visit>
void for_each_coordinate(MeshGeometry const& mesh, Visit visit) {
  MeshGeometry::Coordinate at{};
  for (std::int64_t i = 0; i < mesh.size(); ++i) {
    std::int64_t rest = i;
    for (auto a = static_cast<std::size_t>(mesh.axes); a-- > 0; rest /= mesh.extents[a]) at[a] = rest % mesh.extents[a];
    visit(at);
  }
}

nlohmann::json json_of(std::filesystem::path const& file) {
  std::ifstream in{file};
  REQUIRE_MESSAGE(in, file.string());
  return nlohmann::json::parse(in);
}

// Whether every rank holds what torch says it holds; `boxes`: rank -> (offsets, sizes).
void check_boxes(Layout const& layout, std::map<std::int64_t, Box> const& boxes) {
  for (std::int64_t rank = 0; rank < layout.mesh.world; ++rank) {
    CAPTURE(rank);
    auto const found = box_of_rank(layout, rank);
    auto const wanted = boxes.find(rank);
    REQUIRE(found.has_value() == (wanted != boxes.end()));
    if (found) CHECK(*found == wanted->second);
  }
}
}  // namespace

// ---- compile time --------------------------------------------------------------------------------------------------------------

static_assert(local_box<Placement<Shard<0>>>(DeviceMesh<1>{Ranks{3, 4}, {4}}, {7, 3}) == Box{{6, 0}, {1, 3}});
static_assert(local_box<Placement<Replicate, Shard<1>>>(DeviceMesh<2>{Ranks{5, 6}, {2, 3}}, {4, 8}) == Box{{0, 6}, {4, 2}});
static_assert(local_box<Placement<Shard<0>>>(DeviceMesh<1>{Ranks{7, 8}, {8}}, Padded{{50257, 768}, {50304, 768}}).shape == Extents{6288, 768});
static_assert(split(5, 4, 0).size == 2 && split(5, 4, 2).size == 1 && split(5, 4, 3).size == 0 && split(5, 4, 3).begin == 5);
static_assert(replicas(layout_of<Placement<Replicate, Shard<0>>>(DeviceMesh<2>{Ranks{0, 6}, {2, 3}}, Extents{4})) == 2);
static_assert([] {
  constexpr DeviceMesh<3> mesh{Ranks{5, 8}, {2, 2, 2}};
  constexpr auto part = mesh.sub<0, 2>();
  return part.rank_at({1, 1}) == 5 && local_box<Placement<Shard<0>, Shard<0>>>(part, {8}) == Box{{6}, {2}};
}());

// ---- the rows of torch's arithmetic --------------------------------------------------------------------------------------------

TEST_CASE("local_box: one axis over rows gives the boxes of torch") {
  using P = Placement<Shard<0>>;
  CHECK(box_for<P, 1>({4}, 0, {14, 1}) == Box{{0, 0}, {4, 1}});
  CHECK(box_for<P, 1>({4}, 1, {14, 1}) == Box{{4, 0}, {4, 1}});
  CHECK(box_for<P, 1>({4}, 2, {14, 1}) == Box{{8, 0}, {4, 1}});
  CHECK(box_for<P, 1>({4}, 3, {14, 1}) == Box{{12, 0}, {2, 1}});
  CHECK(box_for<P, 1>({4}, 0, {5, 2}) == Box{{0, 0}, {2, 2}});
  CHECK(box_for<P, 1>({4}, 1, {5, 2}) == Box{{2, 0}, {2, 2}});
  CHECK(box_for<P, 1>({4}, 2, {5, 2}) == Box{{4, 0}, {1, 2}});
  CHECK(box_for<P, 1>({4}, 3, {5, 2}) == Box{{5, 0}, {0, 2}});
  CHECK(box_for<P, 1>({4}, 0, {1}) == Box{{0}, {1}});
  for (int rank = 1; rank < 4; ++rank) CHECK(box_for<P, 1>({4}, rank, {1}) == Box{{1}, {0}});
}

TEST_CASE("local_box: two axes that cut the same dimension cut what the first left, and empty boxes lie at the global end") {
  using P = Placement<Shard<0>, Shard<0>>;
  CHECK(box_for<P, 2>({2, 2}, 0, {1}) == Box{{0}, {1}});
  for (int rank = 1; rank < 4; ++rank) CHECK(box_for<P, 2>({2, 2}, rank, {1}) == Box{{1}, {0}});
  CHECK(box_for<P, 2>({2, 2}, 0, {5}) == Box{{0}, {2}});
  CHECK(box_for<P, 2>({2, 2}, 1, {5}) == Box{{2}, {1}});
  CHECK(box_for<P, 2>({2, 2}, 2, {5}) == Box{{3}, {1}});
  CHECK(box_for<P, 2>({2, 2}, 3, {5}) == Box{{4}, {1}});
  CHECK(box_for<P, 2>({2, 2}, 0, {10, 4}) == Box{{0, 0}, {3, 4}});
  CHECK(box_for<P, 2>({2, 2}, 1, {10, 4}) == Box{{3, 0}, {2, 4}});
  CHECK(box_for<P, 2>({2, 2}, 2, {10, 4}) == Box{{5, 0}, {3, 4}});
  CHECK(box_for<P, 2>({2, 2}, 3, {10, 4}) == Box{{8, 0}, {2, 4}});
  // The first half's second part is empty, and lies at the end of the tensor, not of the half.
  CHECK(box_for<P, 2>({2, 2}, 1, {2}) == Box{{2}, {0}});
}

TEST_CASE("local_box: replicating and crossing axes give the boxes of torch") {
  using Hsdp = Placement<Replicate, Shard<0>>;
  for (int replica = 0; replica < 2; ++replica) {
    CHECK(box_for<Hsdp, 2>({2, 2}, 2 * replica, {15}) == Box{{0}, {8}});
    CHECK(box_for<Hsdp, 2>({2, 2}, 2 * replica + 1, {15}) == Box{{8}, {7}});
  }
  using Crossed = Placement<Shard<1>, Shard<0>>;
  for (int j = 0; j < 3; ++j) {
    CHECK(box_for<Crossed, 2>({2, 3}, j, {3, 7}) == Box{{j, 0}, {1, 4}});
    CHECK(box_for<Crossed, 2>({2, 3}, 3 + j, {3, 7}) == Box{{j, 4}, {1, 3}});
  }
}

TEST_CASE("OrderedShard: FSDP over tensor parallelism gives the boxes of torch's strided shards") {
  using P = Placement<OrderedShard<0, 1>, OrderedShard<0, 0>>;
  CHECK(box_for<P, 2>({2, 2}, 0, {8}) == Box{{0}, {2}});
  CHECK(box_for<P, 2>({2, 2}, 1, {8}) == Box{{4}, {2}});
  CHECK(box_for<P, 2>({2, 2}, 2, {8}) == Box{{2}, {2}});
  CHECK(box_for<P, 2>({2, 2}, 3, {8}) == Box{{6}, {2}});
  CHECK(box_for<P, 2>({2, 2}, 0, {10}) == Box{{0}, {3}});
  CHECK(box_for<P, 2>({2, 2}, 1, {10}) == Box{{5}, {3}});
  CHECK(box_for<P, 2>({2, 2}, 2, {10}) == Box{{3}, {2}});
  CHECK(box_for<P, 2>({2, 2}, 3, {10}) == Box{{8}, {2}});
  // 11 rows on (3, 2): what torch 2.15.0 wrote
  std::vector<std::int64_t> const starts{0, 6, 2, 8, 4, 10};
  for (std::int64_t rank = 0; rank < 6; ++rank) CHECK(box_for<P, 2>({3, 2}, rank, {11}).origin == Extents{starts[static_cast<std::size_t>(rank)]});
  CHECK(box_for<P, 2>({3, 2}, 5, {11}).shape == Extents{1});
}

TEST_CASE("OrderedShard: steps in mesh order are Shard, and gaps between steps do not matter") {
  for (std::int64_t n : {0, 1, 5, 10, 11, 23})
    for (std::int64_t rank = 0; rank < 6; ++rank) {
      auto const plain = box_for<Placement<Shard<0>, Shard<0>>, 2>({3, 2}, rank, {n});
      CHECK(box_for<Placement<OrderedShard<0, 0>, OrderedShard<0, 1>>, 2>({3, 2}, rank, {n}) == plain);
      CHECK(box_for<Placement<OrderedShard<0, 3>, OrderedShard<0, 9>>, 2>({3, 2}, rank, {n}) == plain);
    }
}

// ---- what torch wrote ----------------------------------------------------------------------------------------------------------

TEST_CASE("layouts: every rank's box is the one that torch.distributed.checkpoint wrote, strided orders and parts of meshes included") {
  int cases = 0, strided = 0;
  for (auto const& golden : json_of(std::filesystem::path{DCP_TESTS_DIR} / "golden/layouts.json")) {
    std::string const name = golden.at("name");
    CAPTURE(name);
    Layout layout;
    layout.shape = layout.split_shape = Extents{golden.at("shape").get<std::vector<std::int64_t>>()};
    layout.mesh = mesh_from_lists(golden.at("mesh"), golden.at("world_size"));
    std::vector<std::string> const placements = golden.at("placements");
    layout.rules = rules_from_text(placements, layout.mesh);
    std::map<std::int64_t, Box> boxes;
    for (auto const& box : golden.at("boxes"))
      boxes[box.at(0)] = {Extents{box.at(1).get<std::vector<std::int64_t>>()}, Extents{box.at(2).get<std::vector<std::int64_t>>()}};
    check_boxes(layout, boxes);
    ++cases;
    strided += placements[0].starts_with('_') ? 1 : 0;
  }
  CHECK(cases == 69);
  CHECK(strided == 5);
}

TEST_CASE("layouts: every rank's box is the one in the Hugging Face checkpoints that torch wrote") {
  int cases = 0;
  for (auto const& folder : std::filesystem::directory_iterator{std::filesystem::path{DCP_TESTS_DIR} / "golden/hf"}) {
    auto const expected = json_of(folder.path() / "expected.json");
    if (!expected.contains("placements")) continue;
    for (auto const& item : expected.at("placements").items()) {
      std::string const name = item.key();
      CAPTURE(folder.path().string());
      CAPTURE(name);
      Layout layout;
      layout.shape = layout.split_shape = Extents{expected.at("tensors").at(name).at("shape").get<std::vector<std::int64_t>>()};
      layout.mesh = mesh_from_lists(expected.at("meshes").at(name), expected.at("world_size"));
      layout.rules = rules_from_text(item.value().get<std::vector<std::string>>(), layout.mesh);
      std::map<std::int64_t, Box> boxes;
      for (auto const& box : expected.at("shards").at(name))
        boxes[box.at("rank")] = {Extents{box.at("offsets").get<std::vector<std::int64_t>>()}, Extents{box.at("sizes").get<std::vector<std::int64_t>>()}};
      check_boxes(layout, boxes);
      ++cases;
    }
  }
  CHECK(cases == 68);
}

// ---- laws ----------------------------------------------------------------------------------------------------------------------

TEST_CASE("law: a box is the indices that chunking leaves, and an empty one lies at the global end of its dimension") {
  auto const seed = first_seed();
  for (std::uint64_t round = 0; round < rounds; ++round) {
    INFO("DCP_SEED=", seed + round);
    Random random{seed + round};
    Layout const layout = any_layout(random);
    bool right = true;
    for_each_coordinate(layout.mesh, [&](auto const& coordinate) {
      Box const box = box_at(layout, coordinate);
      for (int d = 0; d < layout.shape.rank(); ++d) {
        auto const indices = indices_by_chunks(layout, coordinate, d);
        right = right && box.shape[d] == static_cast<std::int64_t>(indices.size());
        right = right && box.origin[d] == (indices.empty() ? layout.shape[d] : indices.front());
        right = right && (indices.empty() || indices.back() == indices.front() + box.shape[d] - 1);
      }
    });
    REQUIRE(right);
  }
}

TEST_CASE("law: every element is held exactly `replicas` times, by ranks of the mesh only") {
  auto const seed = first_seed();
  for (std::uint64_t round = 0; round < rounds; ++round) {
    INFO("DCP_SEED=", seed + round);
    Random random{seed + round};
    Layout const layout = any_layout(random);
    Extents const strides = row_major_strides(layout.shape);
    std::vector<std::int64_t> held(static_cast<std::size_t>(layout.shape.elements()), 0);
    std::int64_t members = 0;
    for (std::int64_t rank = 0; rank < layout.mesh.world; ++rank) {
      auto const box = box_of_rank(layout, rank);
      if (!box) continue;
      ++members;
      for_each_element(*box, [&](Extents const& index) { ++held[static_cast<std::size_t>(linear(index, strides))]; });
    }
    REQUIRE(members == layout.mesh.size());
    REQUIRE(std::count(held.begin(), held.end(), replicas(layout)) == static_cast<std::ptrdiff_t>(held.size()));
  }
}

TEST_CASE("law: the boxes of cells are disjoint and cover, and coordinate_holding finds the cell of an element") {
  auto const seed = first_seed();
  for (std::uint64_t round = 0; round < rounds; ++round) {
    INFO("DCP_SEED=", seed + round);
    Random random{seed + round};
    Layout const layout = any_layout(random);
    Extents const strides = row_major_strides(layout.shape);
    std::vector<std::int64_t> cell_of(static_cast<std::size_t>(layout.shape.elements()), -1);
    bool disjoint = true, found = true;
    for (std::int64_t cell = 0; cell < cells(layout); ++cell) {
      auto const coordinate = cell_coordinate(layout, cell);
      for_each_element(box_at(layout, coordinate), [&](Extents const& index) {
        auto& holder = cell_of[static_cast<std::size_t>(linear(index, strides))];
        disjoint = disjoint && holder == -1;
        holder = cell;
        found = found && coordinate_holding(layout, index) == coordinate;
      });
    }
    REQUIRE(disjoint);
    REQUIRE(found);
    REQUIRE(std::count(cell_of.begin(), cell_of.end(), -1) == 0);
  }
}

TEST_CASE("law: cell and replica numbers invert their coordinates, and together name every coordinate once") {
  auto const seed = first_seed();
  for (std::uint64_t round = 0; round < rounds; ++round) {
    INFO("DCP_SEED=", seed + round);
    Random random{seed + round};
    Layout const layout = any_layout(random);
    REQUIRE(cells(layout) * replicas(layout) == layout.mesh.size());
    std::vector<bool> seen(static_cast<std::size_t>(layout.mesh.size()), false);
    bool right = true;
    for_each_coordinate(layout.mesh, [&](auto const& coordinate) {
      auto const cell = cell_index(layout, coordinate), replica = replica_index(layout, coordinate);
      right = right && cell >= 0 && cell < cells(layout) && replica >= 0 && replica < replicas(layout);
      if (!right) return;
      right = right && replica_coordinate(layout, cell_coordinate(layout, cell), replica) == coordinate;
      right = right && box_at(layout, cell_coordinate(layout, cell)) == box_at(layout, coordinate);
      auto const number = static_cast<std::size_t>(cell * replicas(layout) + replica);
      right = right && !seen[number];
      seen[number] = true;
    });
    REQUIRE(right);
  }
}

TEST_CASE("law: the padded box holds the logical one, at the same place, and both are what is cut from the split shape") {
  auto const seed = first_seed();
  for (std::uint64_t round = 0; round < rounds; ++round) {
    INFO("DCP_SEED=", seed + round);
    Random random{seed + round};
    Layout const layout = any_layout(random);
    std::int64_t total = 0;
    bool right = true;
    for_each_coordinate(layout.mesh, [&](auto const& coordinate) {
      Box const padded = padded_box_at(layout, coordinate), box = box_at(layout, coordinate);
      for (int d = 0; d < box.rank(); ++d) {
        right = right && box.shape[d] <= padded.shape[d];
        right = right && (box.shape[d] == 0 || box.origin[d] == padded.origin[d]);
        right = right && (layout.split_shape[d] != layout.shape[d] || box.shape[d] == padded.shape[d]);
      }
      total += padded.shape.elements();
    });
    REQUIRE(right);
    REQUIRE(total == layout.split_shape.elements() * replicas(layout));
  }
}

// ---- the rest ------------------------------------------------------------------------------------------------------------------

TEST_CASE("layouts: a rank outside the mesh holds nothing, and is told how much nothing to allocate") {
  DeviceMesh<2> const world{Ranks{5, 6}, {2, 3}};
  auto const stage = world.sub<1>({0});   // ranks 0, 1, 2
  CHECK_FALSE(stage.contains_this_rank());
  CHECK(local_box<Placement<Shard<0>>>(stage, {6, 4}) == Box{{6, 0}, {0, 4}});
  CHECK(local_box<Placement<Replicate>>(stage, Extents{}).size() == 0);
  CHECK_FALSE(box_of_rank(layout_of<Placement<Shard<0>>>(stage, Extents{6, 4}), 5).has_value());
}

TEST_CASE("layout_of: shapes that cannot be placed or padded so are refused") {
  DeviceMesh<1> const mesh{Ranks{0, 2}, {2}};
  CHECK_THROWS_WITH_AS(layout_of<Placement<Shard<1>>>(mesh, Extents{6}), doctest::Contains("no dimension 1"), Error);
  CHECK_THROWS_WITH_AS(layout_of<Placement<Shard<0>>>(mesh, Padded{{6}, {6, 1}}), doctest::Contains("differ in rank"), Error);
  CHECK_THROWS_WITH_AS(layout_of<Placement<Shard<0>>>(mesh, Padded{{6}, {5}}), doctest::Contains("larger than the padded"), Error);
}

TEST_CASE("as_placement: the way back from a value to a type is checked") {
  DeviceMesh<2> const mesh{Ranks{0, 4}, {2, 2}};
  Layout const layout = layout_of<Placement<Replicate, Shard<0>>>(mesh, Extents{6});
  auto const same = as_placement<Placement<Replicate, Shard<0>>>(layout);
  REQUIRE(same);
  CHECK(*same == layout);
  auto const other = as_placement<Placement<Replicate, Shard<1>>>(layout);
  REQUIRE_FALSE(other);
  CHECK(other.error().code() == ErrorCode::invalid_argument);
  CHECK(other.error().message().find("mesh axis 1") != std::string::npos);
  CHECK_FALSE(as_placement<Placement<Replicate, OrderedShard<0, 0>>>(layout));
  CHECK_FALSE(as_placement<Placement<Shard<0>>>(layout));
}

TEST_CASE("replicated and single-rank layouts place all of a tensor") {
  Layout const everywhere = replicated_layout({3, 2}, 4), one = single_rank_layout({3, 2}, 2, 4);
  CHECK(replicas(everywhere) == 4);
  CHECK(cells(everywhere) == 1);
  for (std::int64_t rank = 0; rank < 4; ++rank) {
    CHECK(box_of_rank(everywhere, rank) == Box::whole({3, 2}));
    CHECK(box_of_rank(one, rank).has_value() == (rank == 2));
  }
}
