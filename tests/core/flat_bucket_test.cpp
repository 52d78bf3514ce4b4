// SPDX-License-Identifier: Apache-2.0
#include <dcp/core/flat_bucket.hpp>
#include <dcp/core/layout.hpp>
#include <dcp/core/sharded_tensor.hpp>

#include "../support/generate.hpp"

#include <doctest/doctest.h>

#include <numeric>
#include <string>
#include <vector>

using namespace dcp;
using namespace dcp::test;

namespace {

// Positions of the row-major global tensor that a rank holds, in the order of its memory; by walking elements, no arithmetic shared with the library.
std::vector<std::int64_t> positions_by_walking(Layout const& layout, MeshGeometry::Coordinate const& coordinate) {
  HeldPart const held = held_at(layout, coordinate);
  Extents const strides = row_major_strides(layout.shape);
  std::vector<std::int64_t> positions;
  std::int64_t element = 0;
  for_each_element(held.box, [&](Extents const& index) {
    if (element >= held.begin && element < held.end) positions.push_back(linear(index, strides));
    ++element;
  });
  return positions;
}

// A bucket by the words of its rule: every buffer element is a (tensor, element) or padding.
struct PlainBucket {
  std::vector<std::pair<std::size_t, std::int64_t>> owner;   // of each element of the buffer; tensor npos is padding
  static constexpr std::size_t npos = static_cast<std::size_t>(-1);

  PlainBucket(std::vector<Extents> const& shapes, std::int64_t alignment, std::int64_t ranks, std::int64_t multiple) {
    for (std::size_t t = 0; t < shapes.size(); ++t) {
      while (owner.size() % static_cast<std::size_t>(alignment) != 0) owner.emplace_back(npos, 0);
      for (std::int64_t e = 0; e < shapes[t].elements(); ++e) owner.emplace_back(t, e);
    }
    auto const whole = static_cast<std::size_t>(multiple == 0 ? alignment : multiple);
    auto const done = [&] {
      std::size_t const shard = owner.size() / static_cast<std::size_t>(ranks);
      return owner.size() % static_cast<std::size_t>(ranks) == 0 && (multiple == 0 ? shard % whole == 0 : owner.size() % whole == 0);
    };
    while (!done()) owner.emplace_back(npos, 0);
  }
};

}  // namespace

TEST_CASE("law: parts of flat layouts are disjoint and cover the tensor, and coordinate_holding finds each element") {
  auto const seed = first_seed();
  for (std::uint64_t round = 0; round < 2000; ++round) {
    INFO("DCP_SEED=", seed + round);
    Random random{seed + round};
    Layout const layout = any_flat_layout(random);
    std::vector<int> times(static_cast<std::size_t>(layout.shape.elements()), 0);
    for (std::int64_t cell = 0; cell < cells(layout); ++cell) {
      auto const coordinate = cell_coordinate(layout, cell);
      for (std::int64_t const position : positions_by_walking(layout, coordinate)) ++times[static_cast<std::size_t>(position)];
      HeldPart const held = held_at(layout, coordinate);
      std::int64_t element = 0;
      for_each_element(held.box, [&](Extents const& index) {
        if (element >= held.begin && element < held.end) REQUIRE(coordinate_holding(layout, index) == coordinate);
        ++element;
      });
    }
    for (int const count : times) REQUIRE(count == 1);
  }
}

TEST_CASE("law: a range of a box's elements is at most 2 * rank - 1 boxes, in order and disjoint") {
  auto const seed = first_seed();
  for (std::uint64_t round = 0; round < 2000; ++round) {
    INFO("DCP_SEED=", seed + round);
    Random random{seed + round};
    Extents const shape = any_shape(random, 5, 500);
    Box whole{Extents::filled(shape.rank(), 0), shape};
    for (int d = 0; d < shape.rank(); ++d) whole.origin[d] = random.between(0, 9);
    std::int64_t const count = shape.elements(), begin = random.between(0, count), end = random.between(begin, count);
    std::vector<std::vector<std::int64_t>> all, found;
    for_each_element(whole, [&](Extents const& index) { all.emplace_back(index.begin(), index.end()); });
    int boxes = 0;
    for_each_box(whole, begin, end, [&](Box const& box, std::int64_t first) {
      ++boxes;
      REQUIRE(first == begin + static_cast<std::int64_t>(found.size()));
      for_each_element(box, [&](Extents const& index) { found.emplace_back(index.begin(), index.end()); });
    });
    REQUIRE(found == std::vector(all.begin() + begin, all.begin() + end));
    REQUIRE(boxes <= std::max(1, 2 * shape.rank() - 1));
  }
}

TEST_CASE("law: buckets as ZeRO and Megatron fill them: every rank's memory holds the elements that the rule says, over tensor parallelism too") {
  auto const seed = first_seed();
  using P = Placement<FlatShard, Shard<0>>;
  for (std::uint64_t round = 0; round < 2000; ++round) {
    INFO("DCP_SEED=", seed + round);
    Random random{seed + round};
    std::int64_t const dp = random.between(1, 7), tp = random.between(1, 3);
    bool const megatron = random.one_in(2);
    std::int64_t const alignment = megatron ? random.any_of(std::array<std::int64_t, 3>{4, 16, 64}) : 1;
    std::int64_t const multiple = megatron ? random.any_of(std::array<std::int64_t, 3>{0, 12, 128}) : random.any_of(std::array<std::int64_t, 2>{0, 2 * dp});
    std::vector<Extents> shapes, local;
    for (auto count = random.between(1, 6); count > 0; --count) {
      Extents shape = any_shape(random, 3, 120);
      if (shape.rank() == 0) shape = Extents{1};
      local.push_back(shape);
      shape[0] *= tp;
      shapes.push_back(shape);
    }
    FlatBucket const bucket{local, alignment, dp, multiple};
    PlainBucket const plain{local, alignment, dp, multiple};
    REQUIRE(bucket.elements() == static_cast<std::int64_t>(plain.owner.size()));
    REQUIRE(bucket.shard_elements() * dp == bucket.elements());
    for (std::int64_t rank = 0; rank < dp * tp; ++rank) {
      DeviceMesh<2> const mesh{Ranks{rank, dp * tp}, {dp, tp}};
      std::int64_t const at_dp = rank / tp, at_tp = rank % tp;
      // Each element of memory: where it is in the global tensor that owns it, and which one that is.
      std::vector<std::int64_t> memory(static_cast<std::size_t>(bucket.shard_elements()), -1), wanted = memory;
      for (std::size_t i = 0; i < memory.size(); ++i) {
        auto const [t, element] = plain.owner[static_cast<std::size_t>(at_dp * bucket.shard_elements()) + i];
        if (t != PlainBucket::npos) wanted[i] = static_cast<std::int64_t>(t) * 1'000'000 + at_tp * local[t].elements() + element;
      }
      for (std::size_t t = 0; t < shapes.size(); ++t) {
        ShardedTensor<std::int64_t, P> const tensor{mesh, shapes[t], bucket[t], memory};
        auto const positions = positions_by_walking(tensor.layout(), *mesh.geometry().coordinate_of(rank));
        REQUIRE(static_cast<std::int64_t>(positions.size()) == tensor.local_part().elements());
        for (std::size_t i = 0; i < positions.size(); ++i) {
          REQUIRE(tensor.data() + i < memory.data() + memory.size());
          REQUIRE(tensor.data()[i] == -1);
          tensor.data()[i] = static_cast<std::int64_t>(t) * 1'000'000 + positions[i];
        }
      }
      REQUIRE(memory == wanted);
    }
  }
}

TEST_CASE("a flat bucket refuses ranges that leave an element to nobody or to two, and shapes that are not those of the tensor") {
  std::vector<Extents> const shapes{{4, 3}, {5}};
  CHECK_NOTHROW(FlatBucket{shapes, 1, std::vector<FlatRange>{{10, 17}, {0, 4}, {4, 10}}});
  CHECK_NOTHROW(FlatBucket{shapes, 8, std::vector<FlatRange>{{0, 12}, {16, 21}}});   // the gap is padding
  auto const text = [&](std::vector<FlatRange> ranges) -> std::string {
    try {
      FlatBucket{shapes, 1, std::move(ranges)};
    } catch (Error const& error) {
      CHECK(error.code() == ErrorCode::incomplete);
      return error.message();
    }
    return "";
  };
  CHECK(text({{0, 4}, {5, 17}}) == "the ranges of a flat bucket: nobody holds element 4, of tensor 0");
  CHECK(text({{0, 12}, {12, 16}}) == "the ranges of a flat bucket: nobody holds element 16, of tensor 1");
  CHECK(text({{0, 5}, {4, 17}}) == "the ranges of a flat bucket: ranks 0 and 1 of the axis both hold element 4");
  CHECK(text({{0, 17}, {3, 2}}) == "the ranges of a flat bucket: rank 1 of the axis has [3, 2)");
  CHECK_THROWS_AS((FlatBucket{shapes, 0, 2}), Error);
  CHECK_THROWS_AS((FlatBucket{shapes, 4, 0}), Error);
  CHECK_THROWS_AS((FlatBucket{{{std::int64_t{1} << 62}, {std::int64_t{1} << 62}}, 1, 2}), Error);

  FlatBucket const bucket{shapes, 1, 2};
  std::vector<float> memory(static_cast<std::size_t>(bucket.shard_elements()));
  DeviceMesh<1> const mesh{Ranks{0, 2}, {2}};
  using Flat = ShardedTensor<float, Placement<FlatShard>>;
  CHECK_NOTHROW(Flat{mesh, {4, 3}, bucket[0], memory});
  CHECK_THROWS_WITH_AS((Flat{mesh, {4, 4}, bucket[0], memory}), doctest::Contains("its place in the flat bucket is for 12 elements"), Error);
  CHECK_THROWS_WITH_AS((Flat{DeviceMesh<1>{Ranks{0, 3}, {3}}, {4, 3}, bucket[0], memory}), doctest::Contains("a flat bucket of 2 ranks on a mesh axis of 3"), Error);
  CHECK_THROWS_WITH_AS((ShardedTensor<float, Placement<Shard<0>>>{mesh, {4, 3}, bucket[0], memory}), doctest::Contains("whose Placement has no FlatShard"), Error);
  memory.resize(3);
  CHECK_THROWS_AS((Flat{mesh, {4, 3}, bucket[0], memory}), Error);
  CHECK_THROWS_WITH_AS((Flat{mesh, Padded{{4, 3}, {4, 5}}, memory}), doctest::Contains("only its first dimension can be padded"), Error);
}

static_assert(held_at(layout_of<Placement<FlatShard>>(DeviceMesh<1>{Ranks{1, 3}, {3}}, Extents{2, 5}), {1}) == HeldPart{Box::whole(Extents{2, 5}), 4, 8, true});
