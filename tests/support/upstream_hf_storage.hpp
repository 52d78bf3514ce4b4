// SPDX-License-Identifier: Apache-2.0
#pragma once
// The rows of PyTorch's test_hf_storage.py, test_consolidate_hf_safetensors.py, and those of test_file_system_checkpoint_cpu.py that need
// no sharding, for any communicator. Include one of ranks_on_*.hpp before.

#include "support/plain_safetensors.hpp"
#include "support/upstream_resharding.hpp"
#include "support/upstream_training.hpp"

#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/plan/transfer.hpp>

#include <array>

namespace dcp::test {

inline nlohmann::json index_of(std::string const& place) { return nlohmann::json::parse(plain::text_of(place + "/model.safetensors.index.json")); }

// Upstream, mapping {tensor_0: 1, tensor_1: 2}: the write results name model-00001-of-00002.safetensors and model-00002-of-00002.safetensors,
// offset 0, length = elements x 4.
TEST_CASE("test_write_data_hf: tensors mapped to files 1 and 2 are model-00001-of-00002 and model-00002-of-00002") {
  on_ranks(1, [](auto& world, std::string const& directory) {
    auto first = Random{1}(9), second = Random{2}(25);
    std::string const place = directory + "/ckpt";
    dcp::save<SafeTensors>(world, place, {{"tensor_0", TensorView<float>{first, {3, 3}}}, {"tensor_1", TensorView<float>{second, {5, 5}}}}, {.storage = {.file_of = {{"tensor_0", 1}, {"tensor_1", 2}}}});
    CHECK(data_files(place) == std::vector<std::string>{"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"});
    auto const one = plain::read(place + "/model-00001-of-00002.safetensors"), two = plain::read(place + "/model-00002-of-00002.safetensors");
    CHECK(one.tensors.size() == 1);
    CHECK(one.tensors.at("tensor_0").bytes.size() == 9 * 4);
    CHECK(one.tensors.at("tensor_0").template as<float>() == first);
    CHECK(two.tensors.size() == 1);
    CHECK(two.tensors.at("tensor_1").bytes.size() == 25 * 4);
    CHECK(two.tensors.at("tensor_1").template as<float>() == second);
  });
}

// Upstream, storage data {shard_index: 1}: both write results name shard-00001-model-00001-of-00001.safetensors.
TEST_CASE("test_write_data_with_sharding: both tensors of the first shard are in shard-00001-model-00001-of-00001") {
  on_ranks(1, [](auto& world, std::string const& directory) {
    auto first = Random{1}(9), second = Random{2}(25);
    std::string const place = directory + "/ckpt", name = "shard-00001-model-00001-of-00001.safetensors";
    dcp::save<SafeTensors>(world, place, {{"tensor_0", TensorView<float>{first, {3, 3}}}, {"tensor_1", TensorView<float>{second, {5, 5}}}}, {.storage = {.layout = FileLayout::sharded}});
    CHECK(data_files(place) == std::vector<std::string>{name});
    auto const file = plain::read(place + "/" + name);
    CHECK(file.tensors.size() == 2);
    CHECK(file.metadata.at("DCP_VERSION") == "1.0");
    auto const sharding = nlohmann::json::parse(file.metadata.at("DCP_SHARDING_INFO"));
    CHECK(sharding == nlohmann::json{{"tensor_0", {{"saved_offsets", {0, 0}}}}, {"tensor_1", {{"saved_offsets", {0, 0}}}}});
  });
}

// Upstream: of a hand-made file with the header [1, 4] F32 (not padded) the target equals the data.
TEST_CASE("test_read_data_hf: a hand-made file whose header is not padded fills its tensor") {
  on_ranks(1, [](auto& world, std::string const& directory) {
    std::string const header = R"({"tensor_0":{"dtype":"F32","shape":[1, 4],"data_offsets":[0,16]}})";
    CHECK(header.size() % 8 != 0);
    std::array<float, 4> const data{1, 2, 3, 4};
    std::uint64_t const length = header.size();
    std::ofstream out{directory + "/model.safetensors", std::ios::binary};
    out.write(reinterpret_cast<char const*>(&length), 8) << header;
    out.write(reinterpret_cast<char const*>(data.data()), 16);
    out.close();
    std::vector<float> target(4);
    dcp::load<SafeTensors>(world, directory, {{"tensor_0", TensorView<float>{target, {1, 4}}}});
    CHECK(target == std::vector<float>{1, 2, 3, 4});
  });
}

// Upstream, of two results of length 100: the index is exactly {metadata: {total_size: 200}, weight_map: {...}}.
TEST_CASE("test_write_metadata_hf: the index holds the total size 200 and the file of each tensor, nothing else") {
  on_ranks(1, [](auto& world, std::string const& directory) {
    auto first = arange(25), second = arange(25);
    std::string const place = directory + "/ckpt";
    dcp::save<SafeTensors>(world, place, {{"tensor_0", TensorView<float>{first, {25}}}, {"tensor_1", TensorView<float>{second, {25}}}}, {.storage = {.file_of = {{"tensor_0", 1}, {"tensor_1", 2}}}});
    CHECK(index_of(place) == nlohmann::json{{"metadata", {{"total_size", 200}}}, {"weight_map", {{"tensor_0", "model-00001-of-00002.safetensors"}, {"tensor_1", "model-00002-of-00002.safetensors"}}}});
  });
}

// Upstream: of a hand-made file with a tensor [5, 10] the metadata has that size, one chunk of all of it, and float32.
TEST_CASE("test_read_metadata_hf: a hand-made file says the shape [5, 10] and the type of its tensor") {
  on_ranks(1, [](auto& world, std::string const& directory) {
    plain::File file;
    file.tensors["tensor_0"] = plain::tensor_of("F32", {5, 10}, arange(50));
    plain::write(directory + "/model.safetensors", file);
    auto const state = dcp::load_from_keys<SafeTensors>(world, directory);
    CHECK(state.tensors().size() == 1);
    CHECK(state.tensors().at("tensor_0").shape() == Extents{5, 10});
    CHECK(state.tensors().at("tensor_0").dtype() == DType::f32);
    CHECK(state.report().duplicates.empty());
  });
}

/// Upstream's setup: dtensor = Shard(0) and dtensor_col = Shard(1) of arange(16), saved by all ranks. Here straight at the final place.
template <class C>
void save_rows_and_columns(C& world, std::string const& place, std::map<std::string, int> const& file_of) {
  Held<float, S1> rows{mesh_1d(world), {4, 4}};
  Held<float, Placement<Shard<1>>> columns{mesh_1d(world), {4, 4}};
  rows.fill(arange(16));
  columns.fill(arange(16));
  dcp::save<SafeTensors>(world, place, {{"dtensor", rows.tensor}, {"dtensor_col", columns.tensor}}, {.storage = {.file_of = file_of}});
}
// Upstream, mapping both -> 1: model-00001-of-00001.safetensors holds both, both equal arange(16) as 4 x 4; total_size is 128, weight_map names
// that file.
TEST_CASE("test_consolidate_to_one_file: rows and columns of all ranks are two whole tensors in one file") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    std::string const place = directory + "/ckpt", name = "model-00001-of-00001.safetensors";
    save_rows_and_columns(world, place, {{"dtensor", 1}, {"dtensor_col", 1}});
    CHECK(data_files(place) == std::vector<std::string>{name});
    auto const file = plain::read(place + "/" + name);
    CHECK(file.tensors.size() == 2);
    for (auto const& [key, tensor] : file.tensors) CHECK(tensor.template as<float>() == arange(16));
    CHECK(index_of(place) == nlohmann::json{{"metadata", {{"total_size", 128}}}, {"weight_map", {{"dtensor", name}, {"dtensor_col", name}}}});
  });
}
template <class C>
void check_two_files(C& world, std::string const& directory) {
  std::string const place = directory + "/ckpt";
  save_rows_and_columns(world, place, {{"dtensor", 1}, {"dtensor_col", 2}});
  std::vector<std::string> const names{"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"};
  CHECK(data_files(place) == names);
  CHECK(plain::read(place + "/" + names[0]).tensors.size() == 1);
  CHECK(plain::read(place + "/" + names[1]).tensors.size() == 1);
  CHECK(plain::read(place + "/" + names[0]).tensors.at("dtensor").template as<float>() == arange(16));
  CHECK(plain::read(place + "/" + names[1]).tensors.at("dtensor_col").template as<float>() == arange(16));
  CHECK(index_of(place) == nlohmann::json{{"metadata", {{"total_size", 128}}}, {"weight_map", {{"dtensor", names[0]}, {"dtensor_col", names[1]}}}});
}
// Upstream, mapping 1 and 2: two files with one tensor each, equal to arange(16) as 4 x 4; total_size is 128; weight_map.
TEST_CASE("test_consolidate_to_two_files: rows and columns of all ranks are one whole tensor in each of two files") {
  on_ranks(4, [](auto& world, std::string const& directory) { check_two_files(world, directory); });
}
// Upstream, every rank consolidates: both files and the index with total_size 128 are there.
TEST_CASE("test_consolidate_with_two_ranks: two ranks write two files together") {
  on_ranks(2, [](auto& world, std::string const& directory) { check_two_files(world, directory); });
}
// Upstream: with one file and two ranks, the rank without work must not hang.
TEST_CASE("test_consolidate_one_file_with_two_ranks: a rank that writes nothing does not hang the others") {
  on_ranks(2, [](auto& world, std::string const& directory) {
    Held<float, Placement<>> held{mesh_1d(world).template sub<>({0}), {4, 4}};
    if (world.rank() == 0) held.fill(arange(16));
    dcp::save<SafeTensors>(world, directory + "/ckpt", {{"dtensor", held.tensor}}, {.writers_per_file = 1});
    CHECK(plain::read(directory + "/ckpt/model-00001-of-00001.safetensors").tensors.at("dtensor").template as<float>() == arange(16));
  });
}

// Upstream: a header with I32 gives the element size 4 (it was an error once).
TEST_CASE("test_parse_input_metadata_supports_integer_and_bool_dtypes: integers and booleans of all ranks are whole in the file") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    Held<std::int32_t, S1> integers{mesh_1d(world), {10}};
    integers.fill(arange<std::int32_t>(10));
    Held<std::int64_t, S1> large{mesh_1d(world), {4, 2}};
    large.fill(arange<std::int64_t>(8));
    auto const box = local_box<S1>(mesh_1d(world), {8});
    std::array<bool, 2> flags{world.rank() % 2 == 0, true};
    REQUIRE(box.size() == flags.size());
    ShardedTensor<bool, S1> flag{mesh_1d(world), {8}, flags};
    std::string const place = directory + "/ckpt";
    dcp::save<SafeTensors>(world, place, {{"int", integers.tensor}, {"long", large.tensor}, {"bool", flag}});
    auto const file = plain::read(place + "/model-00001-of-00001.safetensors");
    CHECK(file.tensors.at("int").dtype == "I32");
    CHECK(file.tensors.at("int").bytes.size() == 10 * 4);
    CHECK(file.tensors.at("int").template as<std::int32_t>() == arange<std::int32_t>(10));
    CHECK(file.tensors.at("long").template as<std::int64_t>() == arange<std::int64_t>(8));
    CHECK(file.tensors.at("bool").dtype == "BOOL");
    CHECK(file.tensors.at("bool").template as<char>() == std::vector<char>{1, 1, 0, 1, 1, 1, 0, 1});
  });
}

// Upstream, of a position in a part of a tensor: how many elements from there on are contiguous in both. Position, part, tensor = result:
// ([2], [5], [10]) = 3; ([1, 0], [3, 4], [6, 4]) = 8; ([1, 2], [3, 4], [6, 8]) = 2; ([1, 0, 0], [3, 2, 4], [5, 2, 4]) = 16; ([2, 3], [3, 4],
// [6, 8]) = 1; ([0, 0], [2, 5], [4, 5]) = 10; ([1, 0], [3, 2], [4, 8]) = 2; ([0, 0], [2, 3], [6, 10]) = 3.
TEST_CASE("test_calculate_max_contiguous_elements_valid_cases: runs of a part in its tensor are as long as they can be") {
  struct Case {
    Extents position, part, tensor;
    std::int64_t expected;
  };
  std::vector<Case> const cases{{{2}, {5}, {10}, 3},          {{1, 0}, {3, 4}, {6, 4}, 8},  {{1, 2}, {3, 4}, {6, 8}, 2}, {{1, 0, 0}, {3, 2, 4}, {5, 2, 4}, 16},
                                {{2, 3}, {3, 4}, {6, 8}, 1},  {{0, 0}, {2, 5}, {4, 5}, 10}, {{1, 0}, {3, 2}, {4, 8}, 2}, {{0, 0}, {2, 3}, {6, 10}, 3}};
  for (auto const& one : cases) {
    CAPTURE(one.part);
    CAPTURE(one.tensor);
    auto const strides = row_major_strides(one.part);
    std::int64_t const from = linear_origin({one.position, one.part}, strides);
    std::vector<std::int64_t> runs;
    for_each_run(one.part, row_major_strides(one.tensor), strides, from, one.part.elements(), [&](std::int64_t, std::int64_t, std::int64_t, std::int64_t length) { runs.push_back(length); });
    REQUIRE(!runs.empty());
    CHECK(runs.front() == one.expected);
  }
}
// Upstream: empty lists, lists of different lengths, a position outside and a part larger than the tensor are a ValueError each. Here such
// numbers come from files, and the file is refused.
TEST_CASE("test_calculate_max_contiguous_elements_validations: pieces of another rank, at negative or impossible offsets are refused") {
  on_ranks(1, [](auto& world, std::string const&) {
    for (std::string const name : {"hf_dcp_offset_rank", "hf_dcp_offset_negative", "hf_dcp_offset_2_63", "hf_dcp_hole", "hf_dcp_info_lacks_tensor"}) {
      CAPTURE(name);
      CHECK_THROWS_AS(dcp::load_from_keys<SafeTensors>(world, std::string{DCP_TESTS_DIR} + "/golden/bad/" + name), Error);
    }
    CHECK(!dcp::load_from_keys<SafeTensors>(world, std::string{DCP_TESTS_DIR} + "/golden/bad/hf_dcp_ok").tensors().empty());
  });
}
// Upstream: the rows [2, 6] at (1, 0) of a [4, 6] and the columns [3, 2] at (0, 3) of a [3, 8] are written at their places in the file, and
// nothing else is.
TEST_CASE("test_write_sub_tensor_to_file_optimized: a block of rows is one run of the file, a block of columns one run a row, all at their place") {
  auto const written = [](Box const& part, Extents const& whole, std::size_t& runs) {
    std::vector<float> values = arange(part.size()), file(static_cast<std::size_t>(whole.elements()), -1.0f);
    auto const transfer = make_transfer(DType::f32, DType::f32, part, part, {reinterpret_cast<std::byte*>(values.data()), row_major_strides(part.shape)}, Box::whole(whole), 0);
    runs = 0;
    transfer.for_each_file_run(0, transfer.end, [&](std::uint64_t, std::uint64_t) { ++runs; });
    transfer.for_each_run(0, transfer.end, [&](std::uint64_t at, std::byte const* memory, std::size_t bytes) { std::memcpy(reinterpret_cast<std::byte*>(file.data()) + at, memory, bytes); });
    return file;
  };
  std::size_t runs = 0;
  auto const rows = written({{1, 0}, {2, 6}}, {4, 6}, runs);
  CHECK(runs == 1);
  for (std::size_t i = 0; i < rows.size(); ++i) CHECK(rows[i] == (i >= 6 && i < 18 ? static_cast<float>(i - 6) : -1.0f));
  auto const columns = written({{0, 3}, {3, 2}}, {3, 8}, runs);
  CHECK(runs == 3);
  for (std::size_t i = 0; i < columns.size(); ++i) {
    std::size_t const row = i / 8, column = i % 8;
    CHECK(columns[i] == (column == 3 || column == 4 ? static_cast<float>(2 * row + column - 3) : -1.0f));
  }
}

// Upstream, with 1 and 2 threads: a module saved and loaded without a process group differs before and is equal after.
TEST_CASE("test_read_write_only_tensor: a module goes into another one, with one thread and with two") {
  on_ranks(1, [](auto& world, std::string const& directory) {
    for (int threads : {1, 2}) {
      std::string const place = directory + "/" + std::to_string(threads);
      auto saved = dummy<Ddp>(world, 1), loaded = dummy<Ddp>(world, 2);
      dcp::save<SafeTensors>(world, place, saved, {.threads = threads});
      CHECK(loaded.gather(world) != saved.gather(world));
      dcp::load<SafeTensors>(world, place, loaded, {.threads = threads});
      CHECK(loaded.gather(world) == saved.gather(world));
    }
  });
}
// Upstream (proposed): float32 is silently cast to bfloat16 by default; a strict planner raises "dtype mismatch"; bfloat16 to float32 is
// always fine. Here every cast is asked for, and the report lists it.
TEST_CASE("test_dtype_mismatch_casting: a cast between float32 and bfloat16 is refused unless asked for, and then reported") {
  on_ranks(1, [](auto& world, std::string const& directory) {
    std::string const place = directory + "/ckpt";
    std::vector<float> full{1.0f, -2.5f, 3.140625f, 65536.0f};   // bfloat16 has them all
    std::vector<bf16> half(4);
    dcp::save<SafeTensors>(world, place, {{"x", TensorView<float>{full, {4}}}});
    StateDict const state{{"x", TensorView<bf16>{half, {4}}}};
    ErrorCode refused{};
    try {
      dcp::load<SafeTensors>(world, place, state);
    } catch (Error const& error) {
      refused = error.code();
    }
    CHECK(refused == ErrorCode::dtype_mismatch);
    CHECK(dcp::load<SafeTensors>(world, place, state, {.on_dtype = OnDType::cast}).cast == std::vector<std::string>{"x: F32 to BF16"});
    for (std::size_t i = 0; i < 4; ++i) CHECK(static_cast<float>(half[i]) == full[i]);
    dcp::save<SafeTensors>(world, place, state, {.if_exists = IfExists::replace});
    std::vector<float> back(4);
    CHECK(dcp::load<SafeTensors>(world, place, {{"x", TensorView<float>{back, {4}}}}, {.on_dtype = OnDType::cast}).cast == std::vector<std::string>{"x: BF16 to F32"});
    CHECK(back == full);
  });
}
// Upstream: {bytes0: [1], bytes1: "string"} replaces {bytes0: [2], bytes1: "other"}.
TEST_CASE("test_save_load_bytes: a list and a string take the place of others") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    std::vector<std::int64_t> bytes0{1};
    std::string bytes1 = "string";
    StateDict const state{{"bytes0", bytes0}, {"bytes1", bytes1}};
    dcp::save<SafeTensors>(world, directory + "/ckpt", state);
    bytes0 = {2};
    bytes1 = "other";
    dcp::load<SafeTensors>(world, directory + "/ckpt", state);
    CHECK(bytes0 == std::vector<std::int64_t>{1});
    CHECK(bytes1 == "string");
  });
}

}  // namespace dcp::test
