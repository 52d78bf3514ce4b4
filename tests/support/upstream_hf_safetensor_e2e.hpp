// SPDX-License-Identifier: Apache-2.0
#pragma once
// The rows of PyTorch's test_hf_safetensor_e2e.py, with its steps and asserts, for any communicator. Include one of ranks_on_*.hpp before.

#include "support/plain_safetensors.hpp"
#include "support/upstream_resharding.hpp"
#include "support/upstream_training.hpp"

#include <dcp/checkpoint/owned_state.hpp>

#include <map>

namespace dcp::test {

/// Upstream's module: linear_1 [5, 5] and [5], linear_2 [1, 5] and [1], emb [5, 10], random.
struct Mod {
  std::map<std::string, std::pair<Extents, std::vector<float>>> parameters{
      {"emb.weight", {{5, 10}, {}}}, {"linear_1.bias", {Extents{5}, {}}}, {"linear_1.weight", {{5, 5}, {}}}, {"linear_2.bias", {Extents{1}, {}}}, {"linear_2.weight", {{1, 5}, {}}}};

  explicit Mod(std::uint32_t seed) {
    Random random{seed};
    for (auto& [name, parameter] : parameters) parameter.second = random(static_cast<std::size_t>(parameter.first.elements()));
  }
  StateDict state() {
    StateDict state;
    for (auto& [name, parameter] : parameters) state.add(name, TensorView<float>{parameter.second, parameter.first});
    return state;
  }
  plain::File file() const {
    plain::File file;
    for (auto const& [name, parameter] : parameters)
      file.tensors[name] = plain::tensor_of("F32", {parameter.first.begin(), parameter.first.end()}, parameter.second);
    return file;
  }
  std::vector<std::string> keys() const {
    std::vector<std::string> keys;
    for (auto const& [name, parameter] : parameters) keys.push_back(name);
    return keys;
  }
};
inline bool bit_equal(std::vector<float> const& a, std::vector<float> const& b) { return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0; }
inline bool bit_equal(Mod const& a, Mod const& b) {
  return std::equal(a.parameters.begin(), a.parameters.end(), b.parameters.begin(), b.parameters.end(),
                    [](auto const& p, auto const& q) { return p.first == q.first && p.second.first == q.second.first && bit_equal(p.second.second, q.second.second); });
}

/// Rows that upstream runs in one process: alone, and by four ranks that hold the same.
template <class Body>
void on_one_and_on_four_ranks(Body const& body) {
  on_ranks(1, body);
  on_ranks(4, body);
}

// Upstream: a generic safetensors loader opens model-00001-of-00001.safetensors; its sorted keys equal those of the module (5), and each
// tensor equals the module's bit for bit.
TEST_CASE("test_save: a module saved with the defaults is one file that a generic loader reads, the same keys, every tensor bit-equal") {
  on_one_and_on_four_ranks([](auto& world, std::string const& directory) {
    Mod module{1};
    std::string const place = directory + "/ckpt";
    dcp::save<SafeTensors>(world, place, module);
    CHECK(data_files(place) == std::vector<std::string>{"model-00001-of-00001.safetensors"});
    auto const file = plain::read(place + "/model-00001-of-00001.safetensors");
    std::vector<std::string> keys;
    for (auto const& [name, tensor] : file.tensors) {
      keys.push_back(name);
      auto const& [shape, values] = module.parameters.at(name);
      CHECK(tensor.dtype == "F32");
      CHECK(Extents{tensor.shape} == shape);
      CHECK(bit_equal(tensor.template as<float>(), values));
    }
    CHECK(keys == module.keys());
  });
}

// Upstream: after the load the sorted keys of both modules are equal, and each tensor of the second equals what the file holds bit for bit.
TEST_CASE("test_load: a file of the plain safetensors library, without index or metadata, loads into another module, every tensor bit-equal") {
  on_one_and_on_four_ranks([](auto& world, std::string const& directory) {
    Mod const saved{1};
    if (world.rank() == 0) plain::write(directory + "/model-00001-of-00001.safetensors", saved.file());
    world.barrier();
    Mod loaded{2};
    CHECK(!bit_equal(loaded, saved));
    auto const report = dcp::load<SafeTensors>(world, directory, loaded);
    CHECK(report.foreign);
    CHECK(report.tensors == 5);
    CHECK(loaded.keys() == saved.keys());
    CHECK(bit_equal(loaded, saved));
  });
}

// Upstream: the dict that "load from keys" without a key filter returns has the file's keys, and tensors that are equal bit for bit.
TEST_CASE("test_load_into_empty_dict: load_from_keys without keys returns all of a foreign file, the same keys, tensors bit-equal") {
  on_one_and_on_four_ranks([](auto& world, std::string const& directory) {
    Mod const saved{1};
    if (world.rank() == 0) plain::write(directory + "/model-00001-of-00001.safetensors", saved.file());
    world.barrier();
    auto const state = dcp::load_from_keys<SafeTensors>(world, directory);
    CHECK(state.values().empty());
    std::vector<std::string> keys;
    for (auto const& [name, tensor] : state.tensors()) {
      keys.push_back(name);
      auto const& [shape, values] = saved.parameters.at(name);
      CHECK(tensor.shape() == shape);
      auto const loaded = tensor.template as<float>();
      CHECK(bit_equal({loaded.begin(), loaded.end()}, values));
    }
    CHECK(keys == saved.keys());
  });
}

// Upstream: with the i-th key in file (i mod 2) + 1 of 2, and a reader of 2 threads, keys are equal and tensors bit-equal.
TEST_CASE("test_load_with_multiple_threads: keys dealt to two files load with two threads, the same keys, every tensor bit-equal") {
  on_one_and_on_four_ranks([](auto& world, std::string const& directory) {
    Mod saved{1};
    SafeTensorsOptions options;
    std::map<std::string, std::string> file_of;
    auto const keys = saved.keys();
    for (std::size_t i = 0; i < keys.size(); ++i) {
      options.file_of[keys[i]] = static_cast<int>(i % 2) + 1;
      file_of[keys[i]] = "model-0000" + std::to_string(i % 2 + 1) + "-of-00002.safetensors";
    }
    std::string const place = directory + "/ckpt";
    dcp::save<SafeTensors>(world, place, saved, {.storage = options});
    CHECK(data_files(place) == std::vector<std::string>{"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"});
    for (auto const& [name, file] : file_of) CHECK(plain::read(place + "/" + file).tensors.contains(name));
    Mod loaded{2};
    dcp::load<SafeTensors>(world, place, loaded, {.threads = 2});
    CHECK(loaded.keys() == saved.keys());
    CHECK(bit_equal(loaded, saved));
  });
}

// Upstream: on rank 0 <dir>/model-00001-of-00001.safetensors has the one key dtensor, and it equals arange(16) as 4 x 4.
TEST_CASE("test_consolidate_to_one_file: rows of four ranks are one whole tensor in one file, equal to arange(16)") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    Held<float, S1> held{mesh_1d(world), {4, 4}};
    CHECK(held.memory.size() == 4);
    for (std::size_t i = 0; i < 4; ++i) held.memory[i] = static_cast<float>(4 * world.rank()) + static_cast<float>(i);
    std::string const place = directory + "/ckpt";
    dcp::save<SafeTensors>(world, place, {{"dtensor", held.tensor}});
    world.barrier();
    if (world.rank() != 0) return;
    CHECK(data_files(place) == std::vector<std::string>{"model-00001-of-00001.safetensors"});
    auto const file = plain::read(place + "/model-00001-of-00001.safetensors");
    CHECK(file.tensors.size() == 1);
    CHECK(file.tensors.at("dtensor").shape == std::vector<std::int64_t>{4, 4});
    CHECK(file.tensors.at("dtensor").template as<float>() == arange(16));
  });
}

// Upstream, for Replicate -> Shard(0) and Shard(0) -> Replicate on a mesh of 4, one directory: the replicated view of what was loaded into
// zeros equals arange(16) as 4 x 4; and redistributed to the first placement, the local shard equals the local shard that was saved.
TEST_CASE("test_1d_to_1d_reshard_placement_change: both placements load as each other, and reshard back to the shard that was saved") {
  on_ranks(4, [](auto& world, std::string const& directory) { reshard_1d_to_1d(world, directory); });
}

// Upstream, for all 12 ordered pairs of different placements from {R R, R S0, S0 R, S0 S0} on a 2 x 2 mesh, one directory: the same two
// asserts. There the directory fills with files of earlier saves; here each save replaces the last, so no piece is stored twice.
TEST_CASE("test_2d_to_2d_reshard_placement_change: each of 12 pairs of placements loads, and reshards back to the shard that was saved") {
  on_ranks(4, [](auto& world, std::string const& directory) { reshard_2d_to_2d(world, directory); });
}

// Upstream, from Shard(0) and from Replicate on a mesh of 4 to each of the four placements on 2 x 2, one directory: the replicated view
// equals arange(16) as 4 x 4. (That the shard comes back is asserted here too.)
TEST_CASE("test_1d_to_2d_reshard_mesh_change: what a mesh of 4 saved loads on 2 x 2 in each of four placements, and reshards back") {
  on_ranks(4, [](auto& world, std::string const& directory) { reshard_1d_to_2d(world, directory); });
}

// Upstream, from each of the four placements on 2 x 2 to Shard(0) and to Replicate on a mesh of 4, one directory: the replicated view
// equals arange(16) as 4 x 4. (That the shard comes back is asserted here too.)
TEST_CASE("test_2d_to_1d_reshard_mesh_change: what 2 x 2 saved in each of four placements loads on a mesh of 4, and reshards back") {
  on_ranks(4, [](auto& world, std::string const& directory) { reshard_2d_to_1d(world, directory); });
}

// Upstream's own reused directory: PyTorch saved [8, 4] on 2 x 2 as [R, S0] and then as [S0, R]. Files 1 and 3 are of the second save, file
// 2 is a leftover of the first whose rows 4 .. 7 file 3 has too. A plain reader of files 1 and 3 says what the tensor is.
TEST_CASE("test_2d_to_2d_reshard_placement_change: a directory that PyTorch reused, with a stale file, loads in all placements and says what is stored twice") {
  std::string const place = std::string{DCP_TESTS_DIR} + "/golden/hf/reused_dir_2x2/ckpt";
  auto whole = plain::read(place + "/shard-00001-model-00001-of-00001.safetensors").tensors.at("w").as<float>();
  auto const below = plain::read(place + "/shard-00003-model-00001-of-00001.safetensors").tensors.at("w").as<float>();
  whole.insert(whole.end(), below.begin(), below.end());
  REQUIRE(whole.size() == 32);
  on_ranks(4, [&](auto& world, std::string const&) {
    auto const loads = [&]<class P, int N>(std::type_identity<P>, DeviceMesh<N> const& mesh) {
      Held<float, P> loaded{mesh, {8, 4}};
      auto const report = dcp::load<SafeTensors>(world, place, {{"w", loaded.tensor}});
      CHECK(report.foreign);
      REQUIRE(report.duplicates.size() == 1);
      CHECK(report.duplicates[0].find("w") != std::string::npos);
      CHECK(replicated_view(world, loaded) == whole);
      Held<float, P> expected{mesh, {8, 4}};
      expected.fill(whole);
      CHECK(loaded.memory == expected.memory);
    };
    TwoDPlacements::each([&](auto placement) { loads(placement, mesh_2d(world)); });
    OneDPlacements::each([&](auto placement) { loads(placement, mesh_1d(world)); });
  });
}

// Upstream asserts nothing: [1] over 4 ranks with Shard(0), three of them empty, loads on 2 x 2 with Shard(0) Shard(0). Here every rank
// compares the value.
TEST_CASE("test_dtensor_checkpoint_resharding_with_empty_shard: one element over four ranks loads on 2 x 2, equal on all ranks") {
  on_ranks(4, [](auto& world, std::string const& directory) { reshard_empty_shards(world, directory); });
}

}  // namespace dcp::test
