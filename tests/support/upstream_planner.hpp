// SPDX-License-Identifier: Apache-2.0
#pragma once
// The rows of PyTorch's test_planner.py, for any communicator. Include one of ranks_on_*.hpp before. There ranks propose plans that a
// coordinator merges; here every rank computes its part, and what upstream asserts of items is asserted of stored boxes and transfers.

#include "support/plain_safetensors.hpp"
#include "support/upstream_resharding.hpp"

#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/plan/save_plan.hpp>
#include <dcp/plan/shares.hpp>

#include <set>
#include <tuple>

namespace dcp::test {

/// The files that each of 4 ranks plans for upstream's state: a plain tensor [10], and st [32] split over the ranks. (Its third entry, a
/// list, is a value and in no file.)
struct UpstreamPlans {
  static constexpr std::int64_t ranks = 4;
  std::vector<TensorSpec> tensors;
  std::vector<FilePlan> of_rank;

  UpstreamPlans() {
    struct Place {
      int rank() const { return 0; }
      int size() const { return ranks; }
    };
    tensors = {{"st", DType::f32, layout_of<S1>(DeviceMesh<1>{Place{}, {ranks}}, Extents{32})}, {"tensor", DType::f32, replicated_layout({10}, ranks)}};
    Shares const shares{tensors, ranks};
    auto const storage = SafeTensors::open({.layout = FileLayout::sharded});
    std::vector<Tie> const ties;
    for (std::int64_t rank = 0; rank < ranks; ++rank) of_rank.push_back(storage->plan_files({tensors, shares, ties, rank, ranks}));
  }
  /// The boxes of a tensor that `rank` stores.
  std::vector<Box> boxes(std::int64_t rank, std::string const& name) const {
    std::vector<Box> boxes;
    for (auto const& stored : of_rank[static_cast<std::size_t>(rank)].stored)
      if (tensors[stored.tensor].name == name) boxes.push_back(stored.box);
    return boxes;
  }
};

// Upstream, rank 1 of 4 with {tensor [10], a list, st}: items TENSOR (tensor, [0]), BYTE_IO and SHARD (st, [8]) with their sizes; the same
// number on the coordinator.
TEST_CASE("test_local_plan: rank 1 of 4 stores elements 8 to 16 of the sharded tensor, and the plain one is not split") {
  UpstreamPlans const plans;
  for (std::int64_t rank = 0; rank < 4; ++rank) CHECK(plans.boxes(rank, "st") == std::vector<Box>{{Extents{8 * rank}, Extents{8}}});
  std::vector<Box> whole;
  for (std::int64_t rank = 0; rank < 4; ++rank)
    for (auto const& box : plans.boxes(rank, "tensor")) whole.push_back(box);
  CHECK(whole == std::vector<Box>{{Extents{0}, Extents{10}}});
}

// Upstream: after deduplication indices are unchanged, each hint points to the item's own chunk, and metadata types are right.
TEST_CASE("test_global_plan: the plans of all ranks together store every element once, each box inside its own file") {
  UpstreamPlans const plans;
  std::vector<int> times(42, 0);
  std::set<std::string> paths;
  for (auto const& plan : plans.of_rank) {
    for (auto const& stored : plan.stored) {
      auto const& file = plan.files[stored.file];
      paths.insert(file.path);
      CHECK(stored.offset + bytes_of(DType::f32, static_cast<std::int64_t>(stored.box.size())) <= file.size);
      std::int64_t const first = plans.tensors[stored.tensor].name == "st" ? 0 : 32;
      for (std::int64_t i = 0; i < stored.box.shape[0]; ++i) ++times[static_cast<std::size_t>(first + stored.box.origin[0] + i)];
    }
  }
  CHECK(times == std::vector<int>(42, 1));
  CHECK(paths.size() == 4);
}

// Upstream: the plans that went in are untouched, and every rank's plan gets strictly smaller.
TEST_CASE("test_dedup_plans: of a tensor that four ranks hold each writes strictly less than all, together once") {
  std::vector<TensorSpec> const tensors{{"a", DType::f32, replicated_layout({1 << 20}, 4)}, {"b", DType::f32, replicated_layout({1 << 20, 2}, 4)}};
  Shares const shares{tensors, 4};
  std::int64_t sum = 0;
  for (auto const load : shares.loads()) {
    CHECK(load > 0);
    CHECK(load < 3 * 4 * (1 << 20));
    sum += load;
  }
  CHECK(sum == 3 * 4 * (1 << 20));
}

/// What upstream's read items say, in elements: which piece, where in it, where in the target, how many.
using ReadItem = std::tuple<std::uint32_t, std::int64_t, std::int64_t, std::int64_t>;
/// The reads that fill [begin, begin + size) of a tensor stored in pieces of the given sizes.
inline std::vector<ReadItem> read_items(std::vector<std::int64_t> const& pieces, std::int64_t begin, std::int64_t size) {
  CatalogTensor stored{"st", DType::f32, {}, {}, {}};
  std::int64_t at = 0;
  for (auto const piece : pieces) {
    stored.pieces.push_back({static_cast<std::uint32_t>(stored.pieces.size()), 0, {Extents{at}, Extents{piece}}});
    at += piece;
  }
  stored.shape = Extents{at};
  std::vector<float> memory(static_cast<std::size_t>(size));
  auto* const start = reinterpret_cast<std::byte*>(memory.data());
  detail::ReadPlan plan;
  detail::plan_reads(stored, DType::f32, {Extents{begin}, Extents{size}}, {start, Extents{1}}, true, false, plan);
  std::vector<ReadItem> items;
  for (auto const& transfer : plan.transfers)
    items.emplace_back(transfer.file, static_cast<std::int64_t>(transfer.offset / 4), (transfer.memory.data - start) / 4, transfer.end - transfer.begin);
  std::ranges::sort(items);
  return items;
}

// Upstream: each read item of a load in the layout of the save copies a chunk exactly: offsets 0 on both sides, all of it.
TEST_CASE("test_local_load_plan: in the layout of the save a rank reads its own piece, from 0 to 0, whole") {
  for (std::uint32_t rank = 0; rank < 4; ++rank) CHECK(read_items({8, 8, 8, 8}, 8 * rank, 8) == std::vector<ReadItem>{{rank, 0, 0, 8}});
}
// Upstream: from 8 ranks to 4, two items with destinations 0 and 16 and length 16; from 4 ranks to 8, one item of storage offset 16.
TEST_CASE("test_load_with_resharding: from 8 ranks to 4 two pieces at 0 and 16, from 4 to 8 half a piece from 16") {
  std::vector<std::int64_t> const eight(8, 16), four(4, 32);
  CHECK(read_items(eight, 32, 32) == std::vector<ReadItem>{{2, 0, 0, 16}, {3, 0, 16, 16}});
  CHECK(read_items(four, 16, 16) == std::vector<ReadItem>{{0, 16, 0, 16}});
}
// Upstream, 120 elements from 4 ranks to 3, on rank 1: chunk [30] from 10 to destination 0, length 20, and [60] from 0 to 20, length 20.
TEST_CASE("test_load_with_world_size_diff_by_one: from 4 ranks to 3 the middle rank reads the end of one piece and the beginning of the next") {
  CHECK(read_items({30, 30, 30, 30}, 40, 40) == std::vector<ReadItem>{{1, 10, 0, 20}, {2, 0, 20, 20}});
}
// Upstream: [4, 11) out of [0, 8) and [8, 16) is (storage 4, destination 0, length 4) and (0, 4, 3).
TEST_CASE("test_create_read_item_from_chunks: elements 4 to 11 are 4 of the first piece and 3 of the second") {
  CHECK(read_items({8, 8}, 4, 7) == std::vector<ReadItem>{{0, 4, 0, 4}, {1, 0, 4, 3}});
}

// Upstream keeps plans between saves: the first is cached; of an equal state nothing is sent and the metadata is the same; when a tensor grew
// from 10 to 20 only that plan is sent again and the metadata differs. Here plans cost no communication and are made anew; what a cache
// must not break is asserted: the third save, and one of which only the type changed, are not those before.
TEST_CASE("test_global_plan_with_caching: saves of an equal state are equal bytes, and one of a tensor that grew or changed its type is not the old one") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    std::string const place = directory + "/ckpt", file = "/model-00001-of-00001.safetensors";
    auto const saves = [&](auto& memory, Extents const& shape) {
      using T = typename std::remove_reference_t<decltype(memory)>::value_type;
      dcp::save<SafeTensors>(world, place, {{"tensor", TensorView<T>{memory, shape}}}, {.if_exists = IfExists::replace});
      auto text = plain::text_of(place + file);
      world.barrier();
      return text;
    };
    auto ten = arange(10), twenty = arange(20);
    auto integers = arange<std::int32_t>(20);
    auto const first = saves(ten, {10}), second = saves(ten, {10});
    CHECK(first == second);
    saves(twenty, {20});
    CHECK(plain::read(place + file).tensors.at("tensor").template as<float>() == twenty);
    world.barrier();
    saves(integers, {20});
    CHECK(plain::read(place + file).tensors.at("tensor").dtype == "I32");
    CHECK(plain::read(place + file).tensors.at("tensor").template as<std::int32_t>() == integers);
  });
}

/// A directory of shard files by somebody else: pieces [begin, begin + size) of a tensor, one a file, whose element i is i.
inline void write_pieces(std::string const& directory, std::vector<std::pair<std::int64_t, std::int64_t>> const& pieces) {
  std::filesystem::create_directories(directory);
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    auto const [begin, size] = pieces[i];
    std::vector<float> values(static_cast<std::size_t>(size));
    std::iota(values.begin(), values.end(), static_cast<float>(begin));
    plain::File file;
    file.tensors["t"] = plain::tensor_of("F32", {size}, values);
    file.metadata = {{"DCP_SHARDING_INFO", R"({"t": {"saved_offsets": [)" + std::to_string(begin) + "]}}"}, {"DCP_VERSION", "1.0"}};
    plain::write(directory + "/shard-0000" + std::to_string(i + 1) + "-model-00001-of-00001.safetensors", file);
  }
}
// Upstream: four chunks of one element each are a valid plan.
TEST_CASE("test_non_overlapping_chunks: four pieces of one element are a tensor of four, none stored twice") {
  on_ranks(1, [](auto& world, std::string const& directory) {
    write_pieces(directory + "/ckpt", {{0, 1}, {1, 1}, {2, 1}, {3, 1}});
    auto const state = dcp::load_from_keys<SafeTensors>(world, directory + "/ckpt");
    auto const values = state.tensors().at("t").template as<float>();
    CHECK(std::vector<float>(values.begin(), values.end()) == arange(4));
    CHECK(state.report().duplicates.empty());
  });
}
// Upstream: chunks [0, 2) and [1, 3) are an invalid plan. Here layouts cannot overlap, so that no save has them; in a directory by somebody
// else they are found and reported, and a hole is an error.
TEST_CASE("test_detect_overlapping_chunks: pieces [0, 2) and [1, 3) are reported as stored twice, and a hole is refused") {
  on_ranks(1, [](auto& world, std::string const& directory) {
    write_pieces(directory + "/overlap", {{0, 2}, {1, 2}});
    auto const state = dcp::load_from_keys<SafeTensors>(world, directory + "/overlap");
    CHECK(state.tensors().at("t").shape() == Extents{3});
    REQUIRE(state.report().warnings.size() == 1);
    CHECK(state.report().warnings[0].find("t [1] at [1] is stored twice") == 0);
    write_pieces(directory + "/hole", {{0, 2}, {3, 1}});
    ErrorCode code{};
    try {
      dcp::load_from_keys<SafeTensors>(world, directory + "/hole");
    } catch (Error const& error) {
      code = error.code();
    }
    CHECK(code == ErrorCode::incomplete);
  });
}

// Upstream: a state with one parameter more than the checkpoint loads when partial loads are allowed, and else raises a CheckpointException
// "Missing key in checkpoint".
TEST_CASE("test_strict: a missing key is an error on every rank, Missing key in checkpoint, unless it may be missing") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    auto const original = arange(4);
    auto weight = original, extra = std::vector<float>(2, 7.0f);
    dcp::save<SafeTensors>(world, directory + "/ckpt", {{"weight", TensorView<float>{weight, {4}}}});
    std::ranges::fill(weight, 0.0f);
    StateDict const state{{"weight", TensorView<float>{weight, {4}}}, {"extra", TensorView<float>{extra, {2}}}};
    std::string refused;
    try {
      dcp::load<SafeTensors>(world, directory + "/ckpt", state);
    } catch (Error const& error) {
      CHECK(error.code() == ErrorCode::missing_entry);
      refused = error.what();
    }
    CHECK(refused.find("extra: Missing key in checkpoint") != std::string::npos);
    CHECK(weight == std::vector<float>(4, 0.0f));
    CHECK(dcp::load<SafeTensors>(world, directory + "/ckpt", state, {.on_missing = OnMissing::keep}).missing == std::vector<std::string>{"extra"});
    CHECK(weight == original);
    CHECK(extra == std::vector<float>(2, 7.0f));
  });
}
// Upstream: Linear(2, 2) saved, Linear(3, 2) loaded raises a CheckpointException "Size mismatch".
TEST_CASE("test_load_different_sizes_throws: [2, 2] does not load into [2, 3], Size mismatch") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    auto saved = arange(4), loaded = std::vector<float>(6, -1.0f);
    dcp::save<SafeTensors>(world, directory + "/ckpt", {{"weight", TensorView<float>{saved, {2, 2}}}});
    std::string refused;
    try {
      dcp::load<SafeTensors>(world, directory + "/ckpt", {{"weight", TensorView<float>{loaded, {2, 3}}}});
    } catch (Error const& error) {
      CHECK(error.code() == ErrorCode::shape_mismatch);
      refused = error.what();
    }
    CHECK(refused.find("Size mismatch") != std::string::npos);
    CHECK(loaded == std::vector<float>(6, -1.0f));
  });
}
// Upstream: after a load metadata.version is "1.0.0".
TEST_CASE("test_version_key_in_planner_data: the record of a checkpoint has a format number") {
  on_ranks(1, [](auto& world, std::string const& directory) {
    dcp::save<SafeTensors>(world, directory + "/ckpt", {});
    CHECK(nlohmann::json::parse(plain::text_of(directory + "/ckpt/dcp.json")).at("format") == 1);
  });
}

}  // namespace dcp::test
