// SPDX-License-Identifier: Apache-2.0
#include <dcp/core/sharded_tensor.hpp>

#include "../support/generate.hpp"

#include <doctest/doctest.h>

#include <numeric>
#include <type_traits>
#include <vector>

using namespace dcp;
using dcp::test::Ranks;

namespace {
using Rows = Placement<Shard<0>>;
using Columns = Placement<Shard<1>>;

static_assert(std::is_convertible_v<ShardedTensor<float, Rows, Shape<7, 5>>, ShardedTensor<float, Rows>>);
static_assert(!std::is_convertible_v<ShardedTensor<float, Rows>, ShardedTensor<float, Rows, Shape<7, 5>>>);
static_assert(!std::is_convertible_v<ShardedTensor<float, Rows>, ShardedTensor<float, Columns>>);
static_assert(!std::is_convertible_v<ShardedTensor<float, Rows>, ShardedTensor<bf16, Rows>>);
static_assert(std::is_copy_constructible_v<ShardedTensor<float, Rows>>);

DeviceMesh<1> line(std::int64_t rank, std::int64_t size) { return {Ranks{rank, size}, {size}}; }

std::string refusal(auto const& make) {
  try {
    make();
  } catch (Error const& error) {
    CHECK(error.code() == ErrorCode::invalid_argument);
    return error.message();
  }
  return "accepted";
}

// Writes into every element of a tensor's local part, through its view only, the position that it has in the global tensor.
template <class Tensor>
void number_elements(Tensor const& tensor) {
  Extents const global = row_major_strides(tensor.shape());
  test::for_each_element(tensor.local_box(), [&](Extents const& index) {
    Extents inside = index;
    for (int d = 0; d < index.rank(); ++d) inside[d] -= tensor.local_box().origin[d];
    tensor.data()[test::linear(inside, tensor.memory().strides)] = static_cast<float>(test::linear(index, global));
  });
}
}  // namespace

TEST_CASE("ShardedTensor: views this rank's part, dense in what it is given") {
  std::vector<float> memory(10);
  ShardedTensor<float, Rows> const w{line(1, 4), {7, 5}, memory};
  CHECK(w.local_box() == Box{{2, 0}, {2, 5}});
  CHECK(w.shape() == Extents{7, 5});
  CHECK(w.data() == memory.data());
  CHECK(w.memory().strides == Extents{5, 1});
  CHECK(w.held_here());
  CHECK(w.dtype() == DType::f32);
  CHECK(refusal([&] { ShardedTensor<float, Rows>{line(1, 4), {9, 5}, memory}; }).find("needs memory of 15 elements, but was given 10") != std::string::npos);
}

TEST_CASE("ShardedTensor: a shape in the type becomes one at run time, and comes back checked") {
  std::vector<float> memory(10);
  ShardedTensor<float, Rows, Shape<7, 5>> const fixed{line(1, 4), memory};
  ShardedTensor<float, Rows> const any = fixed;
  CHECK(any.shape() == Extents{7, 5});
  CHECK(any.data() == memory.data());
  auto const back = any.as_shape<Shape<7, 5>>();
  REQUIRE(back);
  CHECK(back->local_box() == fixed.local_box());
  auto const wrong = any.as_shape<Shape<7, 6>>();
  REQUIRE_FALSE(wrong);
  CHECK(wrong.error().code() == ErrorCode::shape_mismatch);
  CHECK(wrong.error().message() == "a tensor of shape [7, 5] seen as one of [7, 6]");
}

TEST_CASE("ShardedTensor: an empty part needs no memory, a scalar one element") {
  std::vector<float> none, one(1);
  ShardedTensor<float, Rows> const empty{line(3, 4), {5, 2}, none};
  CHECK(empty.local_box() == Box{{5, 0}, {0, 2}});
  CHECK(empty.held_here());
  ShardedTensor<float, Placement<Replicate>> const scalar{line(3, 4), Extents{}, one};
  CHECK(scalar.local_box().size() == 1);
  CHECK(refusal([&] { ShardedTensor<float, Placement<Replicate>>{line(3, 4), Extents{}, none}; }) != "accepted");
}

TEST_CASE("ShardedTensor: outside the mesh it views nothing, whatever memory it is given") {
  std::vector<float> memory;
  auto const part = DeviceMesh<2>{Ranks{5, 6}, {2, 3}}.sub<1>({0});
  ShardedTensor<float, Rows> const w{part, {7, 5}, memory};
  CHECK_FALSE(w.held_here());
  CHECK(w.local_box().empty());
  CHECK(w.memory().data == nullptr);
}

TEST_CASE("ShardedTensor: a view must have the rank of the tensor, and hold the part") {
  std::vector<float> memory(100);
  CHECK(refusal([&] { ShardedTensor<float, Rows>{line(0, 2), {8, 5}, TensorView<float>{memory, {4, 5}}}; }) == "accepted");
  CHECK(refusal([&] { ShardedTensor<float, Rows>{line(0, 2), {8, 5}, TensorView<float>{memory, {6, 9}}}; }) == "accepted");
  CHECK(refusal([&] { ShardedTensor<float, Rows>{line(0, 2), {8, 5}, TensorView<float>{memory, {3, 5}}}; }).find("has a local part [4, 5] here, but its memory is [3, 5]") != std::string::npos);
  CHECK(refusal([&] { ShardedTensor<float, Rows>{line(0, 2), {8, 5}, TensorView<float>{memory, {20}}}; }) != "accepted");
  CHECK(refusal([&] { ShardedTensor<float, Rows>{line(0, 2), {8, 5}, TensorView<float>{memory, {4, 5, 1}}}; }) != "accepted");
  CHECK(refusal([&] { ShardedTensor<float, Placement<Replicate>>{line(0, 2), Extents{}, TensorView<float>{memory, {}}}; }) == "accepted");
  CHECK(refusal([&] { ShardedTensor<float, Placement<Replicate>>{line(0, 2), Extents{}, TensorView<float>{}}; }) != "accepted");   // no element at all
}

// ---- what trainers do ----------------------------------------------------------------------------------------------------------

TEST_CASE("a vocabulary padded to 8 shards: the checkpoint's tensor has the logical rows, and padding is nobody's") {
  Padded const vocabulary{{50257, 4}, {50304, 4}};
  std::int64_t rows = 0;
  for (std::int64_t rank = 0; rank < 8; ++rank) {
    CAPTURE(rank);
    auto const mesh = line(rank, 8);
    Box const allocated = local_box<Rows>(mesh, vocabulary);
    CHECK(allocated == Box{{6288 * rank, 0}, {6288, 4}});
    std::vector<float> memory(allocated.size(), -1.0f);
    ShardedTensor<float, Rows> const embedding{mesh, vocabulary, memory};
    CHECK(embedding.shape() == Extents{50257, 4});
    CHECK(embedding.local_box().origin == Extents{6288 * rank, 0});
    CHECK(embedding.local_box().shape == Extents{rank < 7 ? 6288 : 6241, 4});
    CHECK(embedding.layout().split_shape == Extents{50304, 4});
    rows += embedding.local_box().shape[0];
    number_elements(embedding);
    CHECK(std::count(memory.begin(), memory.end(), -1.0f) == (rank < 7 ? 0 : 47 * 4));
    CHECK(memory[0] == static_cast<float>(6288 * 4 * rank));
  }
  CHECK(rows == 50257);
  std::vector<float> small(6241 * 4);   // without the padding that the split counts
  CHECK(refusal([&] { ShardedTensor<float, Rows>{line(7, 8), vocabulary, small}; }) != "accepted");
  // A view of the rows alone is enough.
  CHECK(refusal([&] { ShardedTensor<float, Rows>{line(7, 8), vocabulary, TensorView<float>{small, {6241, 4}}}; }) == "accepted");
}

TEST_CASE("a vocabulary with so much padding that the last shard is all padding: that rank holds nothing") {
  Padded const vocabulary{{9, 2}, {16, 2}};
  std::vector<float> memory(4 * 2);
  ShardedTensor<float, Rows> const last{line(3, 4), vocabulary, memory};
  CHECK(last.local_box() == Box{{9, 0}, {0, 2}});
  CHECK(last.held_here());
  ShardedTensor<float, Rows> const third{line(2, 4), vocabulary, memory};
  CHECK(third.local_box() == Box{{8, 0}, {1, 2}});
}

TEST_CASE("a fused QKV buffer: query, key and value are views of its rows, each sharded over heads") {
  constexpr std::int64_t hidden = 16, query_rows = 32, key_rows = 8, ranks = 4;
  for (std::int64_t rank = 0; rank < ranks; ++rank) {
    CAPTURE(rank);
    auto const mesh = line(rank, ranks);
    // One buffer a rank: 8 rows of queries, 2 of keys, 2 of values.
    std::vector<float> memory((query_rows + 2 * key_rows) / ranks * hidden, -1.0f);
    TensorView<float> const fused{memory, {(query_rows + 2 * key_rows) / ranks, hidden}};
    ShardedTensor<float, Rows, Shape<query_rows, hidden>> const q{mesh, fused.slice(0, 0, 8)};
    ShardedTensor<float, Rows, Shape<key_rows, hidden>> const k{mesh, fused.slice(0, 8, 10)};
    ShardedTensor<float, Rows> const v{mesh, {key_rows, hidden}, fused.slice(0, 10, 12)};
    CHECK(q.local_box() == Box{{8 * rank, 0}, {8, hidden}});
    CHECK(k.local_box() == Box{{2 * rank, 0}, {2, hidden}});
    CHECK(v.data() == memory.data() + 10 * hidden);
    number_elements(q);
    number_elements(k);
    number_elements(v);
    CHECK(std::count(memory.begin(), memory.end(), -1.0f) == 0);
    for (std::int64_t i = 0; i < 8 * hidden; ++i) REQUIRE(memory[static_cast<std::size_t>(i)] == static_cast<float>(8 * rank * hidden + i));
    for (std::int64_t i = 0; i < 2 * hidden; ++i) {
      REQUIRE(memory[static_cast<std::size_t>(8 * hidden + i)] == static_cast<float>(2 * rank * hidden + i));
      REQUIRE(memory[static_cast<std::size_t>(10 * hidden + i)] == static_cast<float>(2 * rank * hidden + i));
    }
  }
}

TEST_CASE("a fused gate-up buffer: gate and up are views of its columns, with the pitch of the whole") {
  constexpr std::int64_t hidden = 6, inner = 20, ranks = 4;   // stored transposed: [hidden, inner], split along inner
  for (std::int64_t rank = 0; rank < ranks; ++rank) {
    CAPTURE(rank);
    auto const mesh = line(rank, ranks);
    std::vector<float> memory(hidden * 12, -1.0f);   // 5 columns of gate, 5 of up, and 2 that pad the pitch
    TensorView<float> const fused{memory, {hidden, 10}, {12, 1}};
    ShardedTensor<float, Columns> const gate{mesh, {hidden, inner}, fused.slice(1, 0, 5)}, up{mesh, {hidden, inner}, fused.slice(1, 5, 10)};
    CHECK(gate.local_box() == Box{{0, 5 * rank}, {hidden, 5}});
    CHECK(up.memory().strides == Extents{12, 1});
    number_elements(gate);
    number_elements(up);
    for (std::int64_t row = 0; row < hidden; ++row)
      for (std::int64_t column = 0; column < 12; ++column) {
        float const wanted = column < 10 ? static_cast<float>(row * inner + 5 * rank + column % 5) : -1.0f;
        REQUIRE(memory[static_cast<std::size_t>(row * 12 + column)] == wanted);
      }
  }
}
