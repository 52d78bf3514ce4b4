// SPDX-License-Identifier: Apache-2.0
#include <dcp/core/box.hpp>

#include "../support/generate.hpp"

#include <doctest/doctest.h>

#include <sstream>
#include <vector>

using namespace dcp;
using namespace dcp::test;

static_assert(Box::whole(Extents{3, 4}) == Box{{0, 0}, {3, 4}});
static_assert(row_major_strides(Extents{2, 3, 4}) == Extents{12, 4, 1});
static_assert([] {
  Box common;
  return intersect(Box{{0, 2}, {3, 4}}, Box{{1, 0}, {5, 4}}, common) && common == Box{{1, 2}, {2, 2}};
}());
static_assert([] {
  std::int64_t sum = 0;
  for_each_run(Extents{2, 3}, Extents{10, 1}, Extents{3, 1}, 0, 6, [&](std::int64_t, std::int64_t first, std::int64_t second, std::int64_t length) { sum += 100 * first + 10 * second + length; });
  return sum == 100 * 10 + 10 * 3 + 6;
}());

TEST_CASE("Box: says where it lies, and knows whether it is empty") {
  std::ostringstream out;
  out << Box{{6, 0}, {1, 3}};
  CHECK(out.str() == "[1, 3] at [6, 0]");
  CHECK(Box{{5, 0}, {0, 2}}.empty());
  CHECK(Box{{5, 0}, {0, 2}}.size() == 0);
  CHECK_FALSE(Box::whole({}).empty());
  CHECK(Box::whole({}).size() == 1);
}

TEST_CASE("intersect: boxes that touch or are empty share nothing, scalars always meet") {
  Box common;
  CHECK_FALSE(intersect({{0}, {3}}, {{3}, {3}}, common));
  CHECK_FALSE(intersect({{0}, {3}}, {{1}, {0}}, common));
  CHECK_FALSE(intersect({{3, 0}, {0, 5}}, {{0, 0}, {3, 5}}, common));
  CHECK(intersect({{}, {}}, {{}, {}}, common));
  CHECK(common == Box{{}, {}});
}

TEST_CASE("law: the intersection holds the elements that lie in both") {
  auto const seed = first_seed();
  for (std::uint64_t round = 0; round < 5000; ++round) {
    INFO("DCP_SEED=", seed + round);
    Random random{seed + round};
    auto const any_box = [&](int rank) {
      Box box = Box::whole(Extents::filled(rank, 0));
      for (int d = 0; d < rank; ++d) box.origin[d] = random.between(0, 6), box.shape[d] = random.between(0, 6);
      return box;
    };
    int const rank = static_cast<int>(random.between(0, 3));
    Box const a = any_box(rank), b = any_box(rank);
    Box common;
    bool const meet = intersect(a, b, common);
    auto const inside = [](Box const& box, Extents const& index) {
      for (int d = 0; d < box.rank(); ++d)
        if (index[d] < box.origin[d] || index[d] >= box.origin[d] + box.shape[d]) return false;
      return true;
    };
    std::int64_t both = 0;
    bool right = true;
    for_each_element(a, [&](Extents const& index) {
      bool const in_b = inside(b, index);
      both += in_b ? 1 : 0;
      right = right && (!meet || in_b == inside(common, index));
    });
    REQUIRE(right);
    REQUIRE(meet == (both > 0));
    if (meet) REQUIRE(common.shape.elements() == both);
  }
}

TEST_CASE("law: runs visit the elements [begin, end) in order, once, where both arrays have them, and are as long as can be") {
  auto const seed = first_seed();
  for (std::uint64_t round = 0; round < 6000; ++round) {
    INFO("DCP_SEED=", seed + round);
    Random random{seed + round};
    Extents const shape = any_shape(random, 4, 300);
    auto const strides = [&] {
      Extents pitch = shape;
      for (int d = 0; d < pitch.rank(); ++d) pitch[d] += random.one_in(2) ? 0 : random.between(0, 3);
      Extents result = row_major_strides(pitch);
      if (random.one_in(6))   // no two elements are neighbours
        for (int d = 0; d < result.rank(); ++d) result[d] *= 2;
      return result;
    };
    Extents const first = strides(), second = strides();
    std::int64_t const a = random.between(0, shape.elements()), b = random.between(0, shape.elements());
    std::int64_t const begin = std::min(a, b), end = std::max(a, b);
    CAPTURE(shape);
    CAPTURE(first);
    CAPTURE(second);
    std::vector<std::pair<std::int64_t, std::int64_t>> places;   // of every element, in both
    for_each_element(Box::whole(shape), [&](Extents const& index) { places.emplace_back(linear(index, first), linear(index, second)); });
    std::int64_t next = begin;
    bool right = true;
    for_each_run(shape, first, second, begin, end, [&](std::int64_t position, std::int64_t in_first, std::int64_t in_second, std::int64_t length) {
      right = right && position == next && length > 0 && position + length <= end;
      for (std::int64_t i = 0; right && i < length; ++i) right = places[static_cast<std::size_t>(position + i)] == std::pair{in_first + i, in_second + i};
      next = position + length;
      // What follows is not a neighbour in both arrays.
      if (right && next < end) right = places[static_cast<std::size_t>(next)] != std::pair{in_first + length, in_second + length};
    });
    REQUIRE(right);
    REQUIRE(next == std::max(begin, end));
  }
}

TEST_CASE("for_each_run: dense arrays are one run, rows with a pitch one run each, and dimensions of size 1 do not cut") {
  auto const runs = [](Extents const& shape, Extents const& first, Extents const& second) {
    std::vector<std::vector<std::int64_t>> list;
    for_each_run(shape, first, second, 0, shape.elements(), [&](std::int64_t p, std::int64_t a, std::int64_t b, std::int64_t n) { list.push_back({p, a, b, n}); });
    return list;
  };
  CHECK(runs({2, 3}, {3, 1}, {3, 1}) == std::vector<std::vector<std::int64_t>>{{0, 0, 0, 6}});
  CHECK(runs({2, 3}, {10, 1}, {3, 1}) == std::vector<std::vector<std::int64_t>>{{0, 0, 0, 3}, {3, 10, 3, 3}});
  CHECK(runs({2, 1, 3}, {3, 50, 1}, {3, 70, 1}) == std::vector<std::vector<std::int64_t>>{{0, 0, 0, 6}});
  CHECK(runs({1, 4}, {99, 1}, {77, 1}) == std::vector<std::vector<std::int64_t>>{{0, 0, 0, 4}});
  CHECK(runs({}, {}, {}) == std::vector<std::vector<std::int64_t>>{{0, 0, 0, 1}});
  CHECK(runs({2, 2}, {4, 2}, {2, 1}) == std::vector<std::vector<std::int64_t>>{{0, 0, 0, 1}, {1, 2, 1, 1}, {2, 4, 2, 1}, {3, 6, 3, 1}});
}

TEST_CASE("for_each_run: a box without elements has no runs, whichever dimension is empty and however it is strided") {
  for (Extents const& shape : {Extents{0}, Extents{0, 3}, Extents{3, 0}, Extents{2, 0, 3}}) {
    Extents pitch = shape;
    for (int d = 0; d < pitch.rank(); ++d) pitch[d] += 2;
    for_each_run(shape, row_major_strides(pitch), row_major_strides(shape), 0, 0, [](auto...) { FAIL("a run"); });
  }
}

TEST_CASE("linear_origin: the position of a box's first element") {
  CHECK(linear_origin({{2, 3}, {1, 1}}, {10, 1}) == 23);
  CHECK(linear_origin({{}, {}}, {}) == 0);
}
