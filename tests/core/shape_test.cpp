// SPDX-License-Identifier: Apache-2.0
#include <dcp/core/shape.hpp>

#include <doctest/doctest.h>

#include <cstdint>
#include <sstream>
#include <utility>
#include <vector>

using namespace dcp;

static_assert(Extents{7, 5}.elements() == 35 && Extents{}.elements() == 1 && Extents{3, 0}.elements() == 0);
static_assert(Extents{2, 3} == Extents{2, 3} && !(Extents{2, 3} == Extents{2, 3, 1}) && !(Extents{} == Extents{1}));
static_assert(Shape<4, 8>::rank == 2 && Shape<4, 8>::sizes[1] == 8 && Shape<>::rank == 0);
static_assert(Extents::filled(3, 2) == Extents{2, 2, 2});

TEST_CASE("Extents: made from lists, vectors and spans, of any integer type") {
  std::vector<std::int64_t> const list{2, 3, 4};
  CHECK(Extents{list} == Extents{2, 3, 4});
  CHECK(Extents{std::span<std::int64_t const>{list}.first(2)} == Extents{2, 3});
  int const small = 2;
  std::size_t const large = 3;
  CHECK(Extents{small, large}.rank() == 2);
}

TEST_CASE("Extents: print as a list") {
  std::ostringstream out;
  out << Extents{7, 0, 5} << Extents{};
  CHECK(out.str() == "[7, 0, 5][]");
}

TEST_CASE("Extents: negative sizes and more than 16 dimensions are refused") {
  CHECK_THROWS_WITH_AS((Extents{3, -1}), doctest::Contains("a dimension of size -1"), Error);
  CHECK_NOTHROW((Extents{std::vector<std::int64_t>(16, 1)}));
  CHECK_THROWS_WITH_AS((Extents{std::vector<std::int64_t>(17, 1)}), doctest::Contains("17 dimensions"), Error);
  CHECK_THROWS_AS(Extents::filled(17, 1), Error);
  CHECK_THROWS_AS(Extents::filled(-1, 1), Error);
}

TEST_CASE("Extents: a number of elements beyond 63 bits is an overflow, a zero anywhere notwithstanding") {
  std::int64_t const big = std::int64_t{1} << 32, most = INT64_MAX;
  CHECK(Extents{most}.elements() == most);
  for (Extents const& shape : {Extents{big, big}, Extents{most, 2}, Extents{2, most}, Extents{big, big, 0}, Extents{0, big, big}, Extents{std::int64_t{1} << 62, 2}, Extents{most, most, most}}) {
    CAPTURE(shape);
    try {
      shape.elements();
      FAIL("no overflow");
    } catch (Error const& error) {
      CHECK(error.code() == ErrorCode::overflow);
    }
  }
  CHECK(Extents{0, most}.elements() == 0);
  CHECK(Extents{0, most}.empty());
}

TEST_CASE("Extents: copied, moved and assigned between few dimensions and many") {
  std::vector<dcp::Extents> all;
  for (int rank = 0; rank <= dcp::max_rank; ++rank) {
    all.push_back(dcp::Extents::filled(rank, rank + 2));
    if (rank > 0) all.back()[rank - 1] = 1;
  }
  for (auto const& from : all)
    for (auto const& before : all) {
      CAPTURE(from);
      CAPTURE(before);
      dcp::Extents copied{before}, moved{before}, source{from};
      copied = from;
      CHECK(copied == from);
      moved = std::move(source);
      CHECK(moved == from);
      dcp::Extents const kept{moved}, taken{std::move(moved)};
      CHECK(kept == from);
      CHECK(taken == from);
      auto const& itself = copied;
      copied = itself;
      CHECK(copied == from);
      if (from.rank() > 0) {   // a copy is a copy
        copied[0] = 77;
        CHECK(from[0] != 77);
      }
    }
  static_assert([] {
    dcp::Extents many = dcp::Extents::filled(12, 2), few{3};
    few = many;
    many[11] = 1;
    return few.elements() == 4096 && many.elements() == 2048;
  }());
}
