// SPDX-License-Identifier: Apache-2.0
#pragma once
// The rows of PyTorch's test_format_utils.py, and those of other files that read compressed checkpoints, for any communicator. Include one of ranks_on_*.hpp before. The
// files are those that PyTorch wrote.

#include <dcp/checkpoint/convert.hpp>
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/storage/safetensors.hpp>
#include <dcp/storage/torch_dcp.hpp>
#include <dcp/storage/torch_file.hpp>

#include <doctest/doctest.h>

#include "support/held_tensor.hpp"

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

namespace dcp::test {

inline std::string golden_torch(std::string const& name) { return std::string{DCP_TESTS_DIR} + "/golden/torch_dcp/" + name; }

inline void check_same_state(OwnedState const& a, OwnedState const& b) {
  CHECK(a.tensors().size() == b.tensors().size());
  for (auto const& entry : a.tensors()) {
    CAPTURE(entry.first);
    auto const other = b.tensors().find(entry.first);
    REQUIRE(other != b.tensors().end());
    CHECK(entry.second.dtype() == other->second.dtype());
    CHECK(entry.second.shape() == other->second.shape());
    CHECK(std::ranges::equal(entry.second.bytes(), other->second.bytes()));
  }
  CHECK(a.values() == b.values());
}

// Upstream: a checkpoint of dcp.save becomes a file by dcp_to_torch_save, and torch.load of it is the state that was saved.
TEST_CASE("test_dcp_to_torch_save: the file that PyTorch made of its checkpoint holds the same as the checkpoint, and so does one that we convert it into") {
  on_ranks(2, [](auto& world, std::string const& directory) {
    auto const of_checkpoint = load_from_keys<TorchDcp>(world, golden_torch("torch_save_roundtrip/ckpt"));
    check_same_state(load_from_keys<TorchFile>(world, golden_torch("torch_save_roundtrip/from_dcp.pt")), of_checkpoint);
    dcp::convert<TorchDcp, SafeTensors>(world, golden_torch("torch_save_roundtrip/ckpt"), directory + "/converted");
    check_same_state(load_from_keys<SafeTensors>(world, directory + "/converted"), of_checkpoint);
  });
}

// Upstream: a file of torch.save becomes a checkpoint by torch_save_to_dcp, which a model loads.
TEST_CASE("test_torch_save_to_dcp: a file of torch.save becomes a checkpoint in PyTorch's format with the same tensors and values") {
  on_ranks(2, [](auto& world, std::string const& directory) {
    dcp::convert<TorchFile, TorchDcp>(world, golden_torch("torch_save_roundtrip/plain.pt"), directory + "/ckpt");
    check_same_state(load_from_keys<TorchFile>(world, golden_torch("torch_save_roundtrip/plain.pt")), load_from_keys<TorchDcp>(world, directory + "/ckpt"));
  });
}

// Upstream: DynamicMetaLoadPlanner and BroadcastingTorchSaveReader load a file of torch.save into an FSDP model.
TEST_CASE("test_online_torch_save_to_dcp: a file of torch.save loads straight into tensors that ranks share") {
  on_ranks(4, [](auto& world, std::string const&) {
    std::string const file = golden_torch("torch_save_roundtrip/plain.pt");
    auto const whole = load_from_keys<TorchFile>(world, file, {"model.w", "model.tied", "model.t"});
    DeviceMesh<1> const mesh{world, {4}};
    auto const check = [&]<class P>(std::type_identity<P>, std::string const& name) {
      auto const& expected = whole.tensors().at(name);
      Held<float, P> held{mesh, expected.shape(), -1.0f};
      dcp::load<TorchFile>(world, file, {{name, held.tensor}}, {.on_unexpected = OnUnexpected::ignore});
      std::vector<float> values(static_cast<std::size_t>(expected.shape().elements()));
      std::memcpy(values.data(), expected.bytes().data(), expected.bytes().size());
      held.each([&](float& element, std::size_t at) { CHECK(element == values[at]); });
    };
    for (std::string const name : {"model.w", "model.tied", "model.t"}) {   // dense, a storage that two share, and a transposed view of it
      check(std::type_identity<Placement<Shard<0>>>{}, name);
      check(std::type_identity<Placement<Shard<1>>>{}, name);
      check(std::type_identity<Placement<Replicate>>{}, name);
    }
  });
}

// Upstream: what was written with _extensions=[ZStandard()] is read without being told so; here onto other placements.
TEST_CASE("test_1d_to_1d_reshard_placement_change, test_read_write_only_tensor (zstd): a compressed checkpoint loads into each placement, its metadata says how") {
  on_ranks(4, [](auto& world, std::string const&) {
    std::string const place = golden_torch("zstd/ckpt");
    auto const whole = load_from_keys<TorchDcp>(world, place);
    auto const& expected = whole.tensors().at("w");
    std::vector<float> values(static_cast<std::size_t>(expected.shape().elements()));
    std::memcpy(values.data(), expected.bytes().data(), expected.bytes().size());
    DeviceMesh<1> const mesh{world, {4}};
    auto const check = [&]<class P>(std::type_identity<P>) {
      Held<float, P> held{mesh, expected.shape(), -1.0f};
      dcp::load<TorchDcp>(world, place, {{"w", held.tensor}}, {.on_unexpected = OnUnexpected::ignore});
      held.each([&](float& element, std::size_t at) { CHECK(element == values[at]); });
    };
    check(std::type_identity<Placement<Shard<0>>>{});
    check(std::type_identity<Placement<Replicate>>{});
  });
}

}  // namespace dcp::test
