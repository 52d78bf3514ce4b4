// SPDX-License-Identifier: Apache-2.0
// Which elements of a part belong to a box of the tensor, and how boxes are cut for decoding.
#include <dcp/core/encoding.hpp>

#include "support/campaign.hpp"
#include "support/generate.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

using namespace dcp;
using dcp::test::for_each_element;
using dcp::test::Random;

namespace {

struct Part {
  PartGrid grid;
  Extents shape;
};

Extents any_full_shape(Random& random, int least_rank) {
  Extents shape = Extents::filled(static_cast<int>(random.between(least_rank, 4)), 1);
  std::int64_t elements = 300;
  for (int d = 0; d < shape.rank(); ++d) {
    shape[d] = random.between(1, std::min<std::int64_t>(elements, 17));
    elements = std::max<std::int64_t>(1, elements / shape[d]);
  }
  return shape;
}

/// Along some dimensions, in any order, with any numbers of elements for each; some of its own.
Part any_part(Random& random, Extents const& shape) {
  constexpr std::array<std::int64_t, 9> eaches{1, 1, 2, 3, 4, 8, 16, 5, 128};
  std::vector<int> dims;
  for (int d = 0; d < shape.rank(); ++d)
    if (!random.one_in(4)) dims.push_back(d);
  if (random.one_in(2)) random.shuffle(dims);
  std::vector<PartAxis> axes;
  std::vector<std::int64_t> sizes;
  for (int const d : dims) {
    if (random.one_in(6)) axes.push_back({}), sizes.push_back(random.between(1, 3));
    axes.push_back({d, random.any_of(eaches)});
    sizes.push_back(ceil_div(shape[d], axes.back().each));
  }
  if (random.one_in(4)) axes.push_back({}), sizes.push_back(random.between(1, 4));
  return {PartGrid::along(std::move(axes)), Extents{sizes}};
}
Part any_flat_part(Random& random, Extents const& shape) {
  constexpr std::array<std::int64_t, 6> eaches{1, 2, 4, 8, 32, 3};
  std::int64_t const each = random.any_of(eaches);
  return {PartGrid::flat(each), Extents{ceil_div(shape.elements(), each)}};
}

Box any_box(Random& random, Extents const& shape) {
  Box box = Box::whole(shape);
  for (int d = 0; d < shape.rank(); ++d) {
    box.origin[d] = random.one_in(3) ? 0 : random.between(0, shape[d] - 1);
    box.shape[d] = random.one_in(3) ? shape[d] - box.origin[d] : random.between(1, shape[d] - box.origin[d]);
  }
  return box;
}

/// Boxes that together are `box`: cut along any dimension, again and again.
void cut(Random& random, Box const& box, int depth, std::vector<Box>& boxes) {
  int const d = box.rank() == 0 ? -1 : static_cast<int>(random.between(0, box.rank() - 1));
  if (depth == 0 || d < 0 || box.shape[d] < 2) return boxes.push_back(box);
  Box low = box, high = box;
  low.shape[d] = random.between(1, box.shape[d] - 1);
  high.origin[d] += low.shape[d];
  high.shape[d] -= low.shape[d];
  cut(random, low, depth - 1, boxes);
  cut(random, high, depth - 1, boxes);
}
/// The same in whole rows, or in pieces of one.
void cut_in_rows(Random& random, Box const& box, std::vector<Box>& boxes) {
  int d = 0;
  while (d < box.rank() && box.shape[d] < 2) ++d;
  bool const one_row = d + 1 >= box.rank();
  if (d == box.rank() || (d > 0 && !one_row) || random.one_in(4)) return boxes.push_back(box);   // what is cut elsewhere is not whole behind the first dimension
  Box low = box, high = box;
  low.shape[d] = random.between(1, box.shape[d] - 1);
  high.origin[d] += low.shape[d];
  high.shape[d] -= low.shape[d];
  cut_in_rows(random, low, boxes);
  cut_in_rows(random, high, boxes);
}

bool contains(Box const& box, Extents const& index) {
  for (int d = 0; d < box.rank(); ++d)
    if (index[d] < box.origin[d] || index[d] >= box.origin[d] + box.shape[d]) return false;
  return true;
}

/// Whether element `of_part` belongs to element `index` of the tensor, by the definition.
bool belongs(Part const& part, Extents const& of_part, Extents const& index, Extents const& shape) {
  if (part.grid.flat_each > 0) return test::linear(index, row_major_strides(shape)) / part.grid.flat_each == of_part[0];
  for (std::size_t d = 0; d < part.grid.axes.size(); ++d)
    if (auto const [dim, each] = part.grid.axes[d]; dim >= 0 && index[dim] / each != of_part[static_cast<int>(d)]) return false;
  return true;
}

/// An encoding that is only looked at.
class Looked final : public Encoding {
 public:
  Looked(Extents const& shape, std::vector<EncodedPart> parts) : Encoding{"looked at", shape, std::move(parts)} {}
  void decode(Box const&, std::span<PartBytes const>, DType, MemoryView const&) const override {}
};

std::string text(PartGrid const& grid) {
  if (grid.flat_each > 0) return "flat " + std::to_string(grid.flat_each);
  std::string out;
  for (auto const& axis : grid.axes) out += (out.empty() ? "" : ", ") + std::to_string(axis.dim) + " by " + std::to_string(axis.each);
  return '[' + out + ']';
}

}  // namespace

TEST_CASE("PartGrid, law: a box needs exactly the elements that belong to one of its own, and of a part along the elements those between") {
  std::uint64_t const first = test::first_seed();
  for (int round = 0; round < test::rounds(1500, 30'000); ++round) {
    std::uint64_t const seed = first + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    Random random{seed};
    Extents const shape = any_full_shape(random, 0);
    Part const part = random.one_in(3) ? any_flat_part(random, shape) : any_part(random, shape);
    Box const box = any_box(random, shape), needed = part.grid.needed(box, shape, part.shape);
    CAPTURE(to_string(box));
    CAPTURE(text(part.grid));
    std::int64_t wrong = 0, first_one = INT64_MAX, last_one = -1;
    for_each_element(Box::whole(part.shape), [&](Extents const& of_part) {
      bool used = false;
      for_each_element(box, [&](Extents const& index) { used = used || belongs(part, of_part, index, shape); });
      if (part.grid.flat_each > 0) {
        if (used) first_one = std::min(first_one, of_part[0]), last_one = of_part[0];
      } else {
        wrong += used != contains(needed, of_part);
      }
    });
    CHECK(wrong == 0);
    if (part.grid.flat_each > 0) CHECK((needed.origin[0] == first_one && needed.origin[0] + needed.shape[0] == last_one + 1));
  }
}

TEST_CASE("PartGrid, law: a box owns, of what it needs, the elements whose first one lies in it; boxes that are the tensor own each element once") {
  std::uint64_t const first = test::first_seed();
  for (int round = 0; round < test::rounds(1500, 30'000); ++round) {
    std::uint64_t const seed = first + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    Random random{seed};
    Extents const shape = any_full_shape(random, 0);
    Part const part = any_part(random, shape);
    CAPTURE(to_string(shape));
    CAPTURE(text(part.grid));
    std::vector<Box> boxes;
    cut(random, Box::whole(shape), static_cast<int>(random.between(0, 5)), boxes);
    std::int64_t wrong = 0, owners = 0;
    for (auto const& box : boxes) {
      owners += PartGrid::owns_scalar(box);
      if (part.shape.rank() == 0) continue;
      Box const needed = part.grid.needed(box, shape, part.shape), owned = part.grid.owned(box, shape, part.shape);
      for_each_element(Box::whole(part.shape), [&](Extents const& of_part) {
        bool const mine = contains(owned, of_part);
        wrong += mine && !contains(needed, of_part);
        wrong += mine != contains(box, part.grid.first_element(of_part, shape));
      });
    }
    CHECK(wrong == 0);
    CHECK(owners == 1);   // of a part without dimensions
    for_each_element(Box::whole(part.shape), [&](Extents const& of_part) { wrong += !belongs(part, of_part, part.grid.first_element(of_part, shape), shape); });
    CHECK(wrong == 0);
    std::int64_t elements = 0;
    if (part.shape.rank() > 0)
      for (auto const& box : boxes) elements += static_cast<std::int64_t>(part.grid.owned(box, shape, part.shape).size());
    if (part.shape.rank() > 0) CHECK(elements == part.shape.elements());
  }
}

TEST_CASE("PartGrid, law: of a part along the elements, boxes that are runs of elements own each once, and others own none twice") {
  std::uint64_t const first = test::first_seed();
  for (int round = 0; round < test::rounds(1500, 30'000); ++round) {
    std::uint64_t const seed = first + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    Random random{seed};
    Extents const shape = any_full_shape(random, 1);
    Part const part = any_flat_part(random, shape);
    CAPTURE(to_string(shape));
    CAPTURE(text(part.grid));
    bool const in_rows = random.one_in(2);
    std::vector<Box> boxes;
    if (in_rows) cut_in_rows(random, Box::whole(shape), boxes);
    else cut(random, Box::whole(shape), static_cast<int>(random.between(0, 5)), boxes);
    std::vector<int> owners(static_cast<std::size_t>(part.shape[0]));
    std::int64_t wrong = 0;
    for (auto const& box : boxes) {
      Box const needed = part.grid.needed(box, shape, part.shape), owned = part.grid.owned(box, shape, part.shape);
      if (owned.empty()) continue;
      for_each_element(owned, [&](Extents const& of_part) {
        ++owners[static_cast<std::size_t>(of_part[0])];
        wrong += !contains(needed, of_part) || !contains(box, part.grid.first_element(of_part, shape));
      });
    }
    CHECK(wrong == 0);
    CHECK(*std::max_element(owners.begin(), owners.end()) <= 1);
    // A box that is rows of several planes, but not whole planes, is no run of elements.
    bool const all_runs = std::all_of(boxes.begin(), boxes.end(), [&](Box const& box) {
      bool whole = true;
      for (int d = 1; d < shape.rank(); ++d) whole = whole && box.shape[d] == shape[d];
      return whole || box.shape.elements() == box.shape[shape.rank() - 1];
    });
    if (all_runs) CHECK(*std::min_element(owners.begin(), owners.end()) == 1);
  }
}

TEST_CASE("for_each_tile, law: tiles are the box, each element once, of about the size, and cut at what parts' elements cover") {
  std::uint64_t const first = test::first_seed();
  int in_many = 0;
  for (int round = 0; round < test::rounds(2000, 40'000); ++round) {
    std::uint64_t const seed = first + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    Random random{seed};
    Extents const shape = any_full_shape(random, 0);
    bool const flat = shape.rank() > 0 && random.one_in(4);
    std::vector<EncodedPart> parts;
    for (std::int64_t count = random.between(1, 4); count > 0; --count) {
      Part const part = flat ? any_flat_part(random, shape) : any_part(random, shape);
      parts.push_back({"part", DType::u8, part.shape, part.grid});
    }
    Looked const encoding{shape, parts};
    Box const box = any_box(random, shape);
    std::int64_t const most = random.between(1, random.one_in(2) ? 20 : 400);
    CAPTURE(to_string(box));
    CAPTURE(most);
    // What a cut along each dimension is to be a multiple of, for all parts and for the codes; and the least that tiles can therefore have.
    Extents grain = Extents::filled(shape.rank(), 1), codes = grain;
    for (std::size_t p = 0; p < parts.size(); ++p)
      for (auto const& axis : parts[p].grid.axes) {
        if (axis.dim >= 0 && axis.each % grain[axis.dim] == 0) grain[axis.dim] = axis.each;
        if (axis.dim >= 0 && p == 0) codes[axis.dim] = axis.each;
      }
    std::int64_t least = 1, size = most;
    bool same_grains = true;
    for (int d = 0; d < shape.rank(); ++d) least *= std::min(box.shape[d], codes[d]), same_grains = same_grains && codes[d] == grain[d];
    bool cut_inside = false;
    for (int d = 1; d < shape.rank(); ++d) cut_inside = cut_inside || box.shape[d] != shape[d];
    if (flat && cut_inside) size = std::min(size, box.shape[shape.rank() - 1]);
    std::map<std::vector<std::int64_t>, int> seen;
    int tiles = 0;
    for_each_tile(encoding, box, most, [&](Box const& tile) {
      ++tiles;
      CAPTURE(to_string(tile));
      CHECK(!tile.empty());
      CHECK(tile.shape.elements() <= std::max(same_grains ? size : 3 * size, least));
      for (int d = 0; d < shape.rank(); ++d) {
        std::int64_t const begin = tile.origin[d], end = begin + tile.shape[d];
        auto const cuts_on = [&](std::int64_t each) { return (begin == box.origin[d] || begin % each == 0) && (end == box.origin[d] + box.shape[d] || end % each == 0); };
        CHECK(cuts_on(codes[d]));
        bool const inside_one = begin / grain[d] == (end - 1) / grain[d];
        CHECK((cuts_on(grain[d]) || inside_one));
      }
      // What runs along the elements is read from the first to the last of a tile: nothing between is another's.
      if (flat && cut_inside) CHECK(tile.shape.elements() == tile.shape[shape.rank() - 1]);
      for_each_element(tile, [&](Extents const& index) { ++seen[{index.begin(), index.end()}]; });
    });
    CHECK(static_cast<std::int64_t>(seen.size()) == box.shape.elements());
    CHECK(std::all_of(seen.begin(), seen.end(), [&](auto const& entry) { return entry.second == 1; }));
    CHECK(std::all_of(seen.begin(), seen.end(), [&](auto const& entry) { return contains(box, Extents{entry.first}); }));
    in_many += tiles > 3;
    if (box.shape.elements() <= size) CHECK(tiles == 1);
  }
  CHECK(in_many > test::rounds(2000, 40'000) / 20);
}

TEST_CASE("for_each_tile: tiles of codes in rows are whole rows, and as many as a scale covers if they are not three times too many") {
  auto const tiles_of = [](std::int64_t columns) {
    Looked const encoding{Extents{1024, columns}, {{"codes", DType::u8, Extents{1024, columns}, PartGrid::along({PartAxis{0, 1}, PartAxis{1, 1}})}, {"scales", DType::f32, Extents{8, ceil_div(columns, std::int64_t{128})}, PartGrid::along({PartAxis{0, 128}, PartAxis{1, 128}})}}};
    std::vector<Box> tiles;
    for_each_tile(encoding, Box{Extents{64, 0}, Extents{960, columns}}, 512 << 10, [&](Box const& tile) { tiles.push_back(tile); });
    for (auto const& tile : tiles) CHECK(tile.shape[1] == columns);
    return tiles;
  };
  CHECK(tiles_of(2048).size() == 4);     // 256 rows each
  CHECK(tiles_of(7168).size() == 8);     // 128 rows, more than was asked for
  CHECK(tiles_of(7168)[1] == Box{Extents{128, 0}, Extents{128, 7168}});
  CHECK(tiles_of(16384).size() == 30);   // 32 rows, four to a scale
  CHECK(tiles_of(53248).size() == 120);  // 8 rows
}

TEST_CASE("for_each_tile: a box without elements has no tiles, and a grain beyond 4,096 does not hold a cut back") {
  Looked const encoding{Extents{4, 10'000}, {{"w", DType::u8, Extents{4, 2}, PartGrid::along({PartAxis{0, 1}, PartAxis{1, 8192}})}}};
  int tiles = 0;
  for_each_tile(encoding, Box{Extents{0, 0}, Extents{4, 0}}, 100, [&](Box const&) { ++tiles; });
  CHECK(tiles == 0);
  for_each_tile(encoding, Box::whole(encoding.shape()), 100, [&](Box const& tile) {
    CHECK(tile.shape.elements() <= 100);
    ++tiles;
  });
  CHECK(tiles == 400);
}

TEST_CASE("Encoding::bytes_needed: the bytes of all parts that a box needs, those smaller than a byte too") {
  Looked const encoding{Extents{4, 64},
                        {{"codes", DType::f4, Extents{4, 64}, PartGrid::along({PartAxis{0, 1}, PartAxis{1, 1}})},
                         {"scales", DType::f32, Extents{4, 2}, PartGrid::along({PartAxis{0, 1}, PartAxis{1, 32}})},
                         {"one", DType::f16, Extents{}, PartGrid::along({})}}};
  CHECK(encoding.bytes_needed(Box::whole(encoding.shape())) == 128 + 32 + 2);
  CHECK(encoding.bytes_needed(Box{Extents{1, 30}, Extents{2, 4}}) == 4 + 16 + 2);
}
