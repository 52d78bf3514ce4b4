// SPDX-License-Identifier: Apache-2.0
#pragma once
// The rows of PyTorch's tests about quantized checkpoints: test_quantized_hf_storage.py, and the one of test_hf_safetensor_e2e.py, for any communicator.
// Include one of ranks_on_*.hpp before.

#include "support/plain_safetensors.hpp"
#include "support/upstream_resharding.hpp"
#include "support/upstream_training.hpp"

#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/checkpoint/read.hpp>
#include <dcp/storage/quantized.hpp>

#include <cmath>
#include <map>

namespace dcp::test {

/// A file of the plain safetensors library for every name, and an index beside it.
inline void write_with_index(std::string const& directory, std::map<std::string, plain::File> const& files) {
  nlohmann::json index{{"metadata", nlohmann::json::object()}, {"weight_map", nlohmann::json::object()}};
  for (auto const& [name, file] : files) {
    plain::write(directory + "/" + name, file);
    for (auto const& [tensor, data] : file.tensors) index["weight_map"][tensor] = name;
  }
  std::ofstream{directory + "/model.safetensors.index.json"} << index.dump();
}

// Upstream, for float tensors [256, 128], [128, 64] and [512, 256] that are stored halved beside grids of scales 2.0 in blocks of 128: loaded into zeros of
// the original shapes with two threads, keys, shapes and dtypes are the same, and values close to the originals (1e-5). Here they are equal: halves are exact.
TEST_CASE("test_quantized_checkpoint_loading: halved weights beside scales of 2 in blocks of 128 load into zeros as the original values") {
  for (int const ranks : {1, 4})
    on_ranks(ranks, [](auto& world, std::string const& directory) {
      struct Weight {
        Extents shape;
        float factor;
        std::vector<float> values{};
      };
      std::map<std::string, Weight> weights{{"embedding.weight", {{512, 256}, 3.0f}}, {"linear1.weight", {{256, 128}, 2.0f}}, {"linear2.weight", {{128, 64}, 1.5f}}};
      plain::File file;
      Random random{1};
      for (auto& [name, weight] : weights) {
        weight.values = random(static_cast<std::size_t>(weight.shape.elements()));
        std::vector<float> halves;
        for (auto& value : weight.values) {
          value = (value - 0.5f) * weight.factor;
          halves.push_back(value / 2);
        }
        std::int64_t const rows = (weight.shape[0] + 127) / 128, columns = (weight.shape[1] + 127) / 128;
        file.tensors[name] = plain::tensor_of("F32", {weight.shape[0], weight.shape[1]}, halves);
        file.tensors[name + "_scale_inv"] = plain::tensor_of("F32", {rows, columns}, std::vector<float>(static_cast<std::size_t>(rows * columns), 2.0f));
      }
      if (world.rank() == 0) write_with_index(directory, {{"model.safetensors", file}});
      world.barrier();

      using Storage = Quantized<Fp8Block<128>, SafeTensors>;
      std::map<std::string, std::vector<float>> loaded;
      StateDict state;
      for (auto const& [name, weight] : weights) {
        auto& memory = loaded[name] = std::vector<float>(weight.values.size());
        state.add(name, TensorView<float>{memory, weight.shape});
      }
      auto const report = dcp::load<Storage>(world, directory, state, {.threads = 2});
      CHECK(report.decoded.size() == 3);
      for (auto const& [name, weight] : weights) CHECK(loaded.at(name) == weight.values);
      auto const owned = dcp::load_from_keys<Storage>(world, directory);
      CHECK(owned.tensors().size() == 3);
      for (auto const& [name, weight] : weights) {
        CHECK(owned.tensors().at(name).dtype() == DType::f32);
        CHECK(owned.tensors().at(name).shape() == weight.shape);
      }

      // Upstream loads whole tensors; here in rows and in columns too.
      auto const in_shards = [&]<class P>(std::type_identity<P>) {
        auto const mesh = DeviceMesh<1>{world, {world.size()}};
        Held<float, P> held{mesh, {512, 256}}, expected{mesh, {512, 256}};
        expected.fill(weights.at("embedding.weight").values);
        dcp::load<Storage>(world, directory, {{"embedding.weight", held.tensor}}, {.on_unexpected = OnUnexpected::ignore});
        CHECK(held.memory == expected.memory);
      };
      in_shards(std::type_identity<Placement<Shard<0>>>{});
      in_shards(std::type_identity<Placement<Shard<1>>>{});
    });
}

// Upstream: ones with a scale of 2 in the same file become 2; threes with a scale of 0.5 in another file become 1.5, and that file is opened once, by its
// full path.
TEST_CASE("test_dequantization: ones with a scale of 2 become 2, and threes with a scale of 0.5 in another file become 1.5") {
  for (int const ranks : {1, 4})
    on_ranks(ranks, [](auto& world, std::string const& directory) {
      std::vector<float> const ones(16, 1.0f), threes(16, 3.0f);
      plain::File first, second;
      first.tensors["a.weight"] = plain::tensor_of("F32", {4, 4}, ones);
      first.tensors["a.weight_scale_inv"] = plain::tensor_of("F32", {1, 1}, std::vector<float>{2});
      first.tensors["b.weight"] = plain::tensor_of("F32", {4, 4}, threes);
      second.tensors["b.weight_scale_inv"] = plain::tensor_of("F32", {1, 1}, std::vector<float>{0.5f});
      if (world.rank() == 0) write_with_index(directory, {{"model-00001-of-00002.safetensors", first}, {"model-00002-of-00002.safetensors", second}});
      world.barrier();
      std::vector<float> a(16), b(16);
      dcp::load<Quantized<Fp8Block<128>, SafeTensors>>(world, directory, {{"a.weight", TensorView<float>{a, {4, 4}}}, {"b.weight", TensorView<float>{b, {4, 4}}}});
      CHECK(a == std::vector<float>(16, 2.0f));
      CHECK(b == std::vector<float>(16, 1.5f));
    });
}

// Upstream: of 8 x 8 twos in blocks of 4 with scales [[1, 2], [3, 4]], the slice [2:6, 1:5] is 2, 4, 6 and 8 in its quadrants [0:2, 0:3], [0:2, 3:4], [2:4, 0:3]
// and [2:4, 3:4]: a scale goes by where an element stands in the whole tensor. The slice is no shard of any mesh, so the reader behind load is asked for it.
TEST_CASE("test_dtensor_slice_dequantization_block_alignment: a slice across four blocks has the scale of each in its quadrant") {
  on_ranks(1, [](auto& world, std::string const& directory) {
    plain::File file;
    file.tensors["a.weight"] = plain::tensor_of("F32", {8, 8}, std::vector<float>(64, 2.0f));
    file.tensors["a.weight_scale_inv"] = plain::tensor_of("F32", {2, 2}, std::vector<float>{1, 2, 3, 4});
    write_with_index(directory, {{"model.safetensors", file}});
    using Storage = Quantized<Fp8Block<4, 4>, SafeTensors>;
    PlaceRef const place = Storage::locate(directory);
    detail::Sighting seen;
    auto opened = detail::open_checkpoint(CommRef{world}, *Storage::open({}), *place.medium, place.path, Verify::none, seen);
    auto const* const tensor = opened.catalog.find_tensor("a.weight");
    REQUIRE(tensor != nullptr);
    std::vector<float> slice(16);
    LoadSettings const settings{.verify = Verify::none};
    detail::ReadPlan plan;
    detail::plan_reads(*tensor, DType::f32, Box{{2, 1}, {4, 4}}, MemoryView{reinterpret_cast<std::byte*>(slice.data()), row_major_strides({4, 4})}, true, false, plan);
    detail::Stopwatch watch;
    watch.enter("read");
    detail::Reader<> reader{CommRef{world}, *place.medium, opened, std::move(plan), std::vector<std::vector<FileRange>>(opened.catalog.files.size()), settings, watch};
    reader.open_files();
    reader.read();
    CHECK(slice == std::vector<float>{2, 2, 2, 4, 2, 2, 2, 4, 6, 6, 6, 8, 6, 6, 6, 8});
  });
  // And as shards of four ranks, which are cut inside the blocks.
  on_ranks(4, [](auto& world, std::string const& directory) {
    plain::File file;
    file.tensors["a.weight"] = plain::tensor_of("F32", {8, 8}, std::vector<float>(64, 2.0f));
    file.tensors["a.weight_scale_inv"] = plain::tensor_of("F32", {2, 2}, std::vector<float>{1, 2, 3, 4});
    if (world.rank() == 0) write_with_index(directory, {{"model.safetensors", file}});
    world.barrier();
    std::vector<float> whole;
    for (int row = 0; row < 8; ++row)
      for (int column = 0; column < 8; ++column) whole.push_back(2.0f * static_cast<float>(1 + column / 4 + 2 * (row / 4)));
    auto const in_shards = [&]<class P>(std::type_identity<P>) {
      DeviceMesh<1> const mesh{world, {4}};
      Held<float, P> held{mesh, {8, 8}}, expected{mesh, {8, 8}};
      expected.fill(whole);
      dcp::load<Quantized<Fp8Block<4, 4>, SafeTensors>>(world, directory, {{"a.weight", held.tensor}});
      CHECK(held.memory == expected.memory);
    };
    in_shards(std::type_identity<Placement<Shard<0>>>{});
    in_shards(std::type_identity<Placement<Shard<1>>>{});
  });
}

}  // namespace dcp::test
