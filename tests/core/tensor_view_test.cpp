// SPDX-License-Identifier: Apache-2.0
#include <dcp/core/tensor_view.hpp>

#include <doctest/doctest.h>

#include <array>
#include <vector>

using namespace dcp;

namespace {
std::string refusal(auto const& make) {
  try {
    make();
  } catch (Error const& error) {
    CHECK(error.code() == ErrorCode::invalid_argument);
    return error.message();
  }
  return "accepted";
}
}  // namespace

TEST_CASE("TensorView: views what it is given, dense unless strides say otherwise") {
  std::vector<float> memory(12);
  TensorView<float> const dense{memory, {3, 4}};
  CHECK(dense.data() == memory.data());
  CHECK(dense.strides() == Extents{4, 1});
  CHECK(dense.dtype() == DType::f32);
  CHECK(dense.memory().data == reinterpret_cast<std::byte*>(memory.data()));
  TensorView<float> const pitched{memory, {3, 2}, {4, 1}};
  CHECK(pitched.strides() == Extents{4, 1});
  std::array<bf16, 2> two{};
  CHECK(TensorView<bf16>{two, {2}}.data() == two.data());
  CHECK(TensorView<bf16>{std::span{two}, {2}}.data() == two.data());
  CHECK(TensorView<bf16>{two, {}}.shape().elements() == 1);
}

TEST_CASE("TensorView: a default one has no elements") {
  TensorView<float> const none;
  CHECK(none.shape().empty());
  CHECK(none.data() == nullptr);
}

TEST_CASE("TensorView: memory is checked against the farthest element, and not more is asked for") {
  std::vector<float> memory(10);
  CHECK(refusal([&] { TensorView<float>{memory, {3, 4}}; }) == "a tensor of shape [3, 4] needs memory of 12 elements, but was given 10");
  CHECK(refusal([&] { TensorView<float>{memory, {3, 2}, {4, 1}}; }) == "accepted");   // the last row needs no pitch: 2 * 4 + 1 + 1
  CHECK(refusal([&] { TensorView<float>{memory, {3, 3}, {4, 1}}; }) == "a tensor of shape [3, 3] needs memory of 11 elements, but was given 10");
  CHECK(refusal([&] { TensorView<float>{memory, {0, 1000}}; }) == "accepted");
  CHECK(refusal([&] { TensorView<float>{memory, {1000, 0}, {1000, 1}}; }) == "accepted");
  CHECK(refusal([&] { TensorView<float>{memory, {2, 3}, {3}}; }) == "a tensor of shape [2, 3] with strides [3]");
}

TEST_CASE("TensorView: strides that reach in front of the memory or wrap around are refused") {
  std::vector<float> memory(10);
  Extents negative{3, 1};
  negative[1] = -1;
  CHECK(refusal([&] { TensorView<float>{memory, {3, 2}, negative}; }).find("strides [3, -1]") != std::string::npos);
  std::int64_t const huge = std::int64_t{1} << 62;
  CHECK(refusal([&] { TensorView<float>{memory, {5}, {huge}}; }) != "accepted");            // 4 * 2^62 wraps to 0
  CHECK(refusal([&] { TensorView<float>{memory, {3, 3, 2}, {huge, huge, 1}}; }) != "accepted");
  CHECK(refusal([&] { TensorView<float>{memory, {std::int64_t{1} << 61}}; }) != "accepted");
  CHECK(refusal([&] { TensorView<float>{memory, {huge, huge, huge}}; }) != "accepted");
  std::vector<std::byte> bytes(6);
  CHECK(refusal([&] { TensorView<f4>{bytes, {(std::int64_t{1} << 62) + 1}}; }) != "accepted");   // times 4 bits wraps
}

TEST_CASE("TensorView: elements smaller than a byte are bytes, dense, and counted in bits") {
  std::vector<std::byte> memory(6);
  CHECK(refusal([&] { TensorView<f4>{memory, {3, 4}}; }) == "accepted");
  CHECK(refusal([&] { TensorView<f4>{memory, {13}}; }).find("needs memory of 7") != std::string::npos);
  CHECK(refusal([&] { TensorView<f6_e2m3>{memory, {8}}; }) == "accepted");
  CHECK(refusal([&] { TensorView<f6_e2m3>{memory, {9}}; }).find("needs memory of 7") != std::string::npos);
  CHECK(refusal([&] { TensorView<f4>{memory, {2, 2}, {4, 1}}; }).find("must be dense") != std::string::npos);
}

TEST_CASE("TensorView: slices view parts of the same memory") {
  std::vector<float> memory(5 * 7);
  TensorView<float> const whole{memory, {5, 7}};
  auto const rows = whole.slice(0, 2, 4), columns = whole.slice(1, 3, 5), corner = rows.slice(1, 6, 7);
  CHECK(rows.shape() == Extents{2, 7});
  CHECK(rows.data() == memory.data() + 14);
  CHECK(columns.shape() == Extents{5, 2});
  CHECK(columns.data() == memory.data() + 3);
  CHECK(columns.strides() == Extents{7, 1});
  CHECK(corner.data() == memory.data() + 20);
  CHECK(whole.slice(0, 5, 5).shape() == Extents{0, 7});
  for (auto const& cut : std::vector<std::array<std::int64_t, 3>>{{2, 0, 1}, {-1, 0, 1}, {0, -1, 2}, {0, 3, 2}, {0, 0, 6}})
    CHECK(refusal([&] { static_cast<void>(whole.slice(static_cast<int>(cut[0]), cut[1], cut[2])); }).find("of a tensor [5, 7]") != std::string::npos);
}
