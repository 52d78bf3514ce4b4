// SPDX-License-Identifier: Apache-2.0
#include <dcp/plan/shares.hpp>

#include "../support/generate.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <string>
#include <vector>

using namespace dcp;
using namespace dcp::test;

namespace {

constexpr std::array<DType, 6> dtypes{DType::u8, DType::bf16, DType::f32, DType::f64, DType::f4, DType::f6_e3m2};

bool cells_are_bytes(DType dtype, Layout const& layout) {
  for (std::int64_t cell = 0; cell < cells(layout); ++cell)
    if (static_cast<std::int64_t>(box_at(layout, cell_coordinate(layout, cell)).size()) * bits_of(dtype) % 8 != 0) return false;
  return true;
}

// Several tensors of few layouts on one communicator, so that groups of more than one tensor occur. One in three is large enough to be cut inside.
std::vector<TensorSpec> any_tensors(Random& random, MeshGeometry const& whole) {
  std::vector<TensorSpec> kinds;
  for (auto count = random.between(1, 4); count > 0;) {
    TensorSpec spec;
    spec.dtype = random.any_of(dtypes);
    Layout& layout = spec.layout;
    layout.mesh = random.one_in(4) ? any_sub_mesh(random, whole) : whole;
    layout.shape = any_shape(random, 3, 600);
    if (random.one_in(3)) layout.shape = random.one_in(2) ? Extents{random.between(1, 9), random.between(100000, 300000)} : Extents{random.between(300000, 900000)};
    layout.split_shape = layout.shape;
    if (random.one_in(5))
      for (int d = 0; d < layout.shape.rank(); ++d) layout.split_shape[d] += random.between(0, 9);
    layout.rules = any_rules(random, layout.mesh.axes, layout.shape.rank());
    if (!cells_are_bytes(spec.dtype, layout)) continue;
    kinds.push_back(spec);
    --count;
  }
  std::vector<TensorSpec> tensors;
  for (auto count = random.between(1, 12); count > 0; --count) {
    tensors.push_back(kinds[static_cast<std::size_t>(random.between(0, static_cast<std::int64_t>(kinds.size()) - 1))]);
    tensors.back().name = "t" + std::to_string(tensors.size());
  }
  return tensors;
}

// Bytes that each rank writes, added up from range_of.
std::vector<std::int64_t> loads_by_ranges(std::vector<TensorSpec> const& tensors, Shares const& shares, std::int64_t ranks) {
  std::vector<std::int64_t> loads(static_cast<std::size_t>(ranks), 0);
  for (std::size_t t = 0; t < tensors.size(); ++t)
    for (std::int64_t rank = 0; rank < ranks; ++rank)
      if (auto const coordinate = tensors[t].layout.mesh.coordinate_of(rank)) {
        CellRange const range = shares.range_of(t, *coordinate);
        loads[static_cast<std::size_t>(rank)] += (range.end - range.begin) * bits_of(tensors[t].dtype) / 8;
      }
  return loads;
}

}  // namespace

TEST_CASE("law: the replicas of a cell write it exactly, in replica order, and writer_of says who writes an element") {
  auto const seed = first_seed();
  for (std::uint64_t round = 0; round < 1500; ++round) {
    INFO("DCP_SEED=", seed + round);
    Random random{seed + round};
    MeshGeometry const whole = any_mesh(random, 3, 24);
    auto const tensors = any_tensors(random, whole);
    Shares const shares{tensors, whole.world};
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      CAPTURE(t);
      Layout const& layout = tensors[t].layout;
      for (std::int64_t cell = 0; cell < cells(layout); ++cell) {
        auto const coordinate = cell_coordinate(layout, cell);
        Box const box = box_at(layout, coordinate);
        std::int64_t at = 0;
        for (std::int64_t r = 0; r < replicas(layout); ++r) {
          auto const replica = replica_coordinate(layout, coordinate, r);
          CellRange const range = shares.range_of(t, replica);
          REQUIRE(range.end >= range.begin);
          if (range.begin == range.end) continue;
          REQUIRE(range.begin == at);
          at = range.end;
          REQUIRE(range.begin * bits_of(tensors[t].dtype) % 8 == 0);
          // The first, the last, and some elements between.
          for (std::int64_t const element : {range.begin, range.end - 1, random.between(range.begin, range.end - 1)}) {
            Extents index = box.shape;
            std::int64_t rest = element;
            for (int d = index.rank(); d-- > 0; rest /= box.shape[d]) index[d] = box.origin[d] + rest % box.shape[d];
            REQUIRE(shares.writer_of(t, index) == layout.mesh.rank_at(replica));
          }
        }
        REQUIRE(at == static_cast<std::int64_t>(box.size()));
      }
    }
    REQUIRE(loads_by_ranges(tensors, shares, whole.world) == shares.loads());
  }
}

TEST_CASE("law: the largest writer has at most max(what only it holds, 1.1 x mean) + 1 MiB in mixes of FSDP, HSDP, DDP and tensor parallelism") {
  auto const seed = first_seed();
  for (std::uint64_t round = 0; round < 1500; ++round) {
    INFO("DCP_SEED=", seed + round);
    Random random{seed + round};
    std::int64_t const dp = random.between(1, 8), tp = random.between(1, 8);
    MeshGeometry const mesh = mesh_of({dp, tp});
    constexpr Rule rows{RuleKind::shard, 0, -1}, columns{RuleKind::shard, 1, -1}, copies{};
    // FSDP over all ranks (even and uneven), FSDP over tensor parallelism, HSDP, tensor parallelism, DDP.
    std::vector<std::array<Rule, 2>> const kinds{{rows, rows}, {rows, columns}, {Rule{RuleKind::shard, 0, 1}, Rule{RuleKind::shard, 0, 0}}, {copies, rows}, {rows, copies}, {copies, columns}, {copies, copies}};
    std::vector<TensorSpec> tensors;
    for (auto count = random.between(1, 200); count > 0; --count) {
      TensorSpec spec{"t" + std::to_string(count), random.any_of(std::array{DType::bf16, DType::f32, DType::f64}), {}};
      auto const& rules = random.any_of(kinds);
      spec.layout.mesh = mesh;
      // Cells of one replica group that differ in size cannot be balanced by that group; see the sentence of the law.
      bool const even = std::any_of(rules.begin(), rules.end(), [](Rule const& r) { return r.kind == RuleKind::replicate; });
      auto const size = [&] { return even ? dp * tp * random.between(1, 40) : random.between(1, 2000); };
      spec.layout.shape = spec.layout.split_shape = Extents{size(), size(), random.between(1, 8)};
      std::copy(rules.begin(), rules.end(), spec.layout.rules.begin());
      tensors.push_back(spec);
    }
    if (random.one_in(2)) tensors.push_back({"large", DType::f32, replicated_layout({random.between(1, 400), 65536}, mesh.world)});
    Shares const shares{tensors, mesh.world};
    std::vector<std::int64_t> exclusive(static_cast<std::size_t>(mesh.world), 0);
    for (auto const& spec : tensors)
      for (std::int64_t rank = 0; rank < mesh.world; ++rank)
        if (replicas(spec.layout) == 1) exclusive[static_cast<std::size_t>(rank)] += static_cast<std::int64_t>(bytes_of(spec.dtype, static_cast<std::int64_t>(box_of_rank(spec.layout, rank)->size())));
    auto const& loads = shares.loads();
    double const mean = static_cast<double>(std::accumulate(loads.begin(), loads.end(), std::int64_t{0})) / static_cast<double>(loads.size());
    double const bound = std::max(static_cast<double>(*std::max_element(exclusive.begin(), exclusive.end())), 1.1 * mean) + (1 << 20);
    CAPTURE(dp);
    CAPTURE(tp);
    REQUIRE(static_cast<double>(*std::max_element(loads.begin(), loads.end())) <= bound);
  }
}

TEST_CASE("Shares: a sharded tensor is written by the ranks that hold it, a replicated one by all") {
  Layout sharded = replicated_layout({8, 1 << 20}, 4);
  sharded.rules[0] = {RuleKind::shard, 0, -1};
  std::vector<TensorSpec> const tensors{{"sharded", DType::f32, sharded}, {"replicated", DType::f32, replicated_layout({8, 1 << 20}, 4)}};
  Shares const shares{tensors, 4};
  for (auto const load : shares.loads()) CHECK(std::abs(load - 2 * (8 << 20)) <= Shares::grain_bytes);
  for (std::int64_t rank = 0; rank < 4; ++rank) {
    CHECK(shares.writer_of(0, {2 * rank, 5}) == rank);
    CHECK(shares.range_of(0, {rank}).end == 2 << 20);
  }
}

TEST_CASE("Shares: ranks that already have much write less of what all hold") {
  Layout first = single_rank_layout({3 << 20}, 0, 4);
  std::vector<TensorSpec> const tensors{{"mine", DType::u8, first}, {"all", DType::u8, replicated_layout({9 << 20}, 4)}};
  Shares const shares{tensors, 4};
  for (auto const load : shares.loads()) CHECK(load == 3 << 20);
  CHECK(shares.range_of(1, {0}).begin == shares.range_of(1, {0}).end);
}

TEST_CASE("Shares: many small tensors of one layout are dealt out whole") {
  std::vector<TensorSpec> tensors;
  for (int i = 0; i < 64; ++i) tensors.push_back({"t" + std::to_string(i), DType::f32, replicated_layout({1024}, 8)});
  Shares const shares{tensors, 8};
  for (auto const load : shares.loads()) CHECK(load == 8 * 4096);
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    int writers = 0;
    for (std::int64_t rank = 0; rank < 8; ++rank) {
      CellRange const range = shares.range_of(t, {rank});
      if (range.begin == range.end) continue;
      ++writers;
      CHECK(range.begin == 0);
      CHECK(range.end == 1024);
    }
    CHECK(writers == 1);
  }
}

TEST_CASE("Shares: cuts keep whole bytes of elements of 6 bits") {
  std::vector<TensorSpec> const tensors{{"w", DType::f6_e2m3, replicated_layout({4 << 20}, 3)}};
  Shares const shares{tensors, 3};
  for (std::int64_t rank = 0; rank < 3; ++rank) {
    CellRange const range = shares.range_of(0, {rank});
    CHECK(range.begin % 4 == 0);
    CHECK(range.end > range.begin);
  }
}
