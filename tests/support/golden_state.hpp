// SPDX-License-Identifier: Apache-2.0
#pragma once
// The state of golden/own: a bit of everything that a checkpoint can hold. Checkpoints of it stay in the repository and must load for
// ever, so nothing here may change; another state is another version.

#include <dcp/checkpoint/options.hpp>
#include <dcp/core/state_dict.hpp>
#include <dcp/ext/json.hpp>
#include <dcp/storage/safetensors.hpp>

#include "support/generate.hpp"
#include "support/whole_tensor.hpp"

#include <nlohmann/json.hpp>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace dcp::test::golden_v1 {

inline constexpr int ranks = 3;

inline std::vector<WholeTensor> tensors() {
  std::vector<WholeTensor> list;
  for (int i = 0; i < safetensors_dtype_count; ++i) {
    auto const dtype = static_cast<DType>(i);
    list.push_back(made_tensor("model.dtypes." + std::string{to_string(dtype)}, dtype, {5, 8}));
  }
  list.push_back(made_tensor("model.embed.weight", DType::bf16, {13, 6}));
  list.push_back(made_tensor("model.größe.重み", DType::f32, {4}));
  list.push_back(made_tensor("model.scalar", DType::f64, {}));
  list.push_back(made_tensor("model.empty", DType::f32, {0, 7}));
  list.push_back(made_tensor("optimizer.state.embed.exp_avg", DType::f32, {13, 6}));
  list.push_back(made_tensor("optimizer.state.cube", DType::f16, {3, 5, 2}));
  list.push_back(made_tensor("loose", DType::i64, {9}));
  return list;
}

/// By rows where the rows are whole bytes, some by columns, some replicated, one on rank 1 alone.
inline Layout layout_of(WholeTensor const& tensor) {
  Layout layout;
  layout.shape = layout.split_shape = tensor.shape;
  layout.mesh = mesh_of({ranks});
  if (tensor.shape.rank() >= 1) layout.rules[0] = {RuleKind::shard, tensor.shape.rank() >= 2 && bits_of(tensor.dtype) >= 16 ? 1 : 0, -1};
  if (tensor.name == "loose") return single_rank_layout(tensor.shape, 1, ranks);
  if (tensor.name == "model.größe.重み") return plain_layout(tensor.shape);
  return layout;
}

struct Values {
  bool flag = false;
  std::int8_t small = 0;
  std::uint64_t big = 0;
  std::int64_t step = 0;
  float rate = 0;
  double loss = 0, infinite = 0, negative_zero = 0;
  std::string text, empty_text, rng;
  std::vector<float> schedule;
  std::vector<bool> mask;
  std::vector<std::int32_t> nothing;
  Bytes blob, large;
  nlohmann::json config;
  std::int64_t position = 0;

  /// What is saved; `rank` matters for what is per rank.
  static Values filled(int rank) {
    Values v;
    v.flag = true, v.small = -128, v.big = 18446744073709551615u, v.step = 123456789012345, v.rate = 0.1f, v.loss = 1e-300;
    v.infinite = -std::numeric_limits<double>::infinity(), v.negative_zero = -0.0;
    v.text = "ünïcode \"quoted\"\n\t日本語 🚀", v.rng = "state of rank " + std::to_string(rank) + std::string(static_cast<std::size_t>(rank), '!');
    v.schedule = {1.5f, -0.0f, 3.4028235e38f}, v.mask = {true, false, true};
    for (int i = 0; i < 256; ++i) v.blob.push_back(static_cast<std::byte>(i));
    v.large.assign(40'000, std::byte{7});
    v.large[12'345] = std::byte{8};
    v.config = nlohmann::json::parse(R"({"layers": [1, 2.5, null, {"name": "größe"}], "tie": true})");
    v.position = 1000 + rank;
    return v;
  }

  StateDict state() {
    return {{"flag", flag}, {"small", small}, {"big", big}, {"step", step}, {"rate", rate}, {"loss", loss}, {"infinite", infinite}, {"negative_zero", negative_zero}, {"text", text},
            {"empty_text", empty_text}, {"schedule", schedule}, {"mask", mask}, {"nothing", nothing}, {"blob", blob}, {"large", large}, {"config", config}, {"rng", per_rank(rng)}, {"position", per_rank(position)}};
  }
  bool equals(Values const& other) const {
    return flag == other.flag && small == other.small && big == other.big && step == other.step && rate == other.rate && loss == other.loss && infinite == other.infinite &&
           std::signbit(negative_zero) == std::signbit(other.negative_zero) && text == other.text && empty_text == other.empty_text && rng == other.rng && schedule == other.schedule &&
           std::signbit(schedule.at(1)) && mask == other.mask && nothing == other.nothing && blob == other.blob && large == other.large && config == other.config && position == other.position;
  }
};

inline std::pair<std::string, std::string> const tie{"model.lm_head.weight", "model.embed.weight"};   // dropped, kept

inline SafeTensorsOptions options(FileLayout layout) {
  SafeTensorsOptions options;
  options.layout = layout;
  options.max_file_bytes = 1500;
  options.metadata = {{"note", "golden"}};
  options.groups = {{"model", ".", Prefix::strip}, {"loose", "rest"}, {"optimizer", "optimizer"}};
  return options;
}

}  // namespace dcp::test::golden_v1
