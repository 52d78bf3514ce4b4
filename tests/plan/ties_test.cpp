// SPDX-License-Identifier: Apache-2.0
#include <dcp/plan/ties.hpp>

#include "../support/generate.hpp"

#include <doctest/doctest.h>

#include <string>
#include <vector>

using namespace dcp;
using namespace dcp::test;

namespace {
using Rows = Placement<Shard<0>>;
using List = std::vector<Tie>;

std::string refusal(StateDict const& state) {
  try {
    find_ties(state, 0);
  } catch (Error const& error) {
    CHECK(error.code() == ErrorCode::overlapping_memory);
    return error.message();
  }
  return "accepted";
}
}  // namespace

TEST_CASE("find_ties: the same memory under several names is one tensor, kept under the first name") {
  std::vector<float> memory(12), other(12);
  TensorView<float> const w{memory, {3, 4}};
  StateDict const state{{"z", w}, {"b", w}, {"other", TensorView<float>{other, {3, 4}}}, {"c", w}};
  CHECK(find_ties(state, 0) == List{{"c", "b"}, {"z", "b"}});
  CHECK(find_ties(StateDict{}, 0).empty());
}

TEST_CASE("find_ties: a tie knows where the levels of its name meet, found or declared, also after a journey as bytes") {
  std::vector<float> memory(12);
  TensorView<float> const w{memory, {3, 4}};
  StateDict state{{"a", {{"w", w}}}, {"b", {{"c", {{"x.w", w}}}}}};
  CHECK(find_ties(state, 0) == List{{"b.c.x.w", "a.w", {1, 3}}});
  StateDict model{{"w", w}};
  model.tie("head.w", "w");
  StateDict const nested{{"model", model}};
  Schema const schema = local_schema(nested, false);
  CHECK(schema.ties == List{{"model.head.w", "model.w", {5}}});
  CHECK(decode_schema(encode(schema)).ties == schema.ties);
}

TEST_CASE("find_ties: sharded tensors are tied where their layouts are equal") {
  std::vector<float> memory(10);
  DeviceMesh<1> const mesh{Ranks{1, 4}, {4}};
  ShardedTensor<float, Rows> const w{mesh, {7, 5}, memory};
  CHECK(find_ties(StateDict{{"embed", w}, {"head", w}}, 1) == List{{"head", "embed"}});
}

TEST_CASE("find_ties: memory that overlaps in any other way is an error that names both tensors") {
  std::vector<float> memory(24);
  TensorView<float> const all{memory, {4, 6}};
  CHECK(refusal({{"all", all}, {"row", all.slice(0, 1, 2)}}).starts_with("all and row share memory, but are not the same tensor"));
  CHECK(refusal({{"flat", TensorView<float>{memory, {24}}}, {"all", all}}).find("share memory") != std::string::npos);
  CHECK(refusal({{"a", all.slice(0, 0, 3)}, {"b", all.slice(0, 2, 4)}}).find("a and b share memory") != std::string::npos);
  CHECK(refusal({{"a", all.slice(1, 0, 3)}, {"b", all.slice(1, 2, 4)}}).find("a and b share memory") != std::string::npos);
  // Of another type: the same bytes.
  TensorView<std::int32_t> const integers{std::span{reinterpret_cast<std::int32_t*>(memory.data()), 24}, {4, 6}};
  CHECK(refusal({{"f", all}, {"i", integers}}) != "accepted");
  // All of them, not only the first.
  std::string const message = refusal({{"all", all}, {"first", all.slice(0, 0, 1)}, {"last", all.slice(0, 3, 4)}});
  CHECK(message.find("all and first") != std::string::npos);
  CHECK(message.find("all and last") != std::string::npos);
}

TEST_CASE("find_ties: a tensor that overlaps one of tied tensors is found, though it comes later") {
  std::vector<float> memory(24);
  TensorView<float> const all{memory, {4, 6}};
  std::string const message = refusal({{"a", all}, {"b", all}, {"part", all.slice(0, 2, 3)}});
  CHECK(message.starts_with("a and part share memory"));
  CHECK(message.find("b and part") == std::string::npos);   // said once
}

TEST_CASE("find_ties: fused buffers interleave without overlapping") {
  std::vector<float> memory(6 * 12);
  TensorView<float> const fused{memory, {6, 10}, {12, 1}};
  CHECK(find_ties(StateDict{{"gate", fused.slice(1, 0, 5)}, {"up", fused.slice(1, 5, 10)}}, 0).empty());
  CHECK(find_ties(StateDict{{"q", fused.slice(0, 0, 2)}, {"k", fused.slice(0, 2, 4)}, {"v", fused.slice(0, 4, 6)}}, 0).empty());
  TensorView<float> const gate = fused.slice(1, 0, 5);
  CHECK(find_ties(StateDict{{"gate", gate}, {"tied", gate}, {"up", fused.slice(1, 5, 10)}}, 0) == List{{"tied", "gate"}});
}

TEST_CASE("find_ties: parts without elements share nothing, wherever they point") {
  std::vector<float> memory(6);
  TensorView<float> const all{memory, {2, 3}};
  CHECK(find_ties(StateDict{{"a", all}, {"none", TensorView<float>{memory, {0, 3}}}, {"nothing", TensorView<float>{memory, {0, 5}}}, {"null", TensorView<float>{}}, {"nil", TensorView<float>{}}}, 0).empty());
  DeviceMesh<1> const mesh{Ranks{3, 4}, {4}};
  ShardedTensor<float, Rows> const empty{mesh, {5, 2}, memory};
  CHECK(find_ties(StateDict{{"a", all}, {"empty", empty}}, 3).empty());
  CHECK_FALSE(has_elements(empty.layout(), 3));
  CHECK(has_elements(empty.layout(), 2));
  CHECK(has_elements(plain_layout({}), 0));
  CHECK_FALSE(has_elements(plain_layout({0}), 0));
  CHECK_FALSE(has_elements(single_rank_layout({3}, 1, 4), 0));
}

TEST_CASE("law: tensors are reported to overlap exactly if they share an element, whatever their strides") {
  auto const seed = first_seed();
  int overlaps = 0;
  for (std::uint64_t round = 0; round < 1500; ++round) {
    INFO("DCP_SEED=", seed + round);
    Random random{seed + round};
    std::vector<std::int16_t> memory(200);
    std::vector<int> users(200, 0);
    StateDict state;
    auto const all = TensorView<std::int16_t>{memory, {10, 20}};
    bool shared = false, same = false;
    std::vector<std::pair<Extents, std::int16_t*>> seen;
    for (auto n = random.between(2, 4); n > 0; --n) {
      auto const [top, bottom] = std::minmax({random.between(0, 10), random.between(0, 10)});
      auto const [left, right] = std::minmax({random.between(0, 20), random.between(0, 20)});
      auto const part = all.slice(0, top, bottom).slice(1, left, right);
      if (part.shape().empty()) continue;
      for (auto const& [shape, data] : seen) same = same || (shape == part.shape() && data == part.data());
      seen.emplace_back(part.shape(), part.data());
      for (auto r = top; r < bottom; ++r)
        for (auto c = left; c < right; ++c) shared = shared || ++users[static_cast<std::size_t>(r * 20 + c)] > 1;
      state.add("t" + std::to_string(n), part);
    }
    if (same) continue;
    overlaps += shared ? 1 : 0;
    REQUIRE((refusal(state) == "accepted") != shared);
  }
  CHECK(overlaps > 100);
}

TEST_CASE("find_ties: column slices of a large buffer, many of them, are told apart before the time is up") {   // ctest's: pair by pair they would take hours
  std::vector<float> memory(4096 * 64);
  TensorView<float> const all{memory, {4096, 64}};
  StateDict state;
  for (int i = 0; i < 64; ++i) state.add("c" + std::to_string(i), all.slice(1, i, i + 1));
  CHECK(find_ties(state, 0).empty());
}
