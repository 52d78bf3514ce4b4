// SPDX-License-Identifier: Apache-2.0
// Saves that quantize, as a user sees them: what is quantized, what is refused, what stands beside the tensors, and the same bytes whichever way
// they are saved.
#include <dcp/checkpoint/async_save.hpp>
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/manager.hpp>
#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/checkpoint/simulate.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/gguf.hpp>
#include <dcp/storage/quantized.hpp>
#include <dcp/storage/safetensors.hpp>

#include "support/outcome.hpp"
#include "support/plain_safetensors.hpp"
#include "support/temporary_directory.hpp"
#include "support/whole_tensor.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace {

using dcp::DType, dcp::ErrorCode, dcp::Extents;
using dcp::test::error_of, dcp::test::files_in, dcp::test::HeldTensors, dcp::test::TemporaryDirectory, dcp::test::WholeTensor;
using dcp::SafeTensors;
template <class Scheme>
using Quantized = dcp::Quantized<Scheme, SafeTensors>;
// For cases of many saves, which would wait for the disk most of the time.
template <class Scheme>
using QuantizedInMemory = dcp::Quantized<Scheme, dcp::BasicSafeTensors<dcp::Memory>>;
using GgufInMemory = dcp::BasicGguf<dcp::Memory>;
template <class S>
using Options = dcp::SaveOptions<S>;
using Deferred = dcp::BasicDeferredStager<false>;
using Guarded = dcp::BasicDeferredStager<true>;
namespace plain = dcp::test::plain;

constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();

WholeTensor tensor_of(std::string name, Extents const& shape, std::function<float(std::int64_t)> const& value = [](std::int64_t i) { return std::sin(static_cast<float>(i)); }) {
  WholeTensor tensor{std::move(name), DType::f32, shape, dcp::Bytes(static_cast<std::size_t>(4 * shape.elements()))};
  for (std::int64_t i = 0; i < shape.elements(); ++i) {
    float const x = value(i);
    std::memcpy(tensor.bytes.data() + 4 * i, &x, 4);
  }
  return tensor;
}
std::vector<float> floats_of(dcp::ConstByteSpan bytes) {
  std::vector<float> values(bytes.size() / 4);
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

// Dimension `dim` over all ranks.
HeldTensors::LayoutOf split(std::int64_t ranks, int dim) {
  return [=](WholeTensor const& tensor) {
    dcp::Layout layout = dcp::replicated_layout(tensor.shape, ranks);
    if (dim < tensor.shape.rank()) layout.rules[0] = {dcp::RuleKind::shard, dim, -1};
    return layout;
  };
}
HeldTensors everywhere(std::vector<WholeTensor> const& tensors, bool filled = true) {
  return {tensors, [](WholeTensor const& tensor) { return dcp::plain_layout(tensor.shape); }, 0, filled};
}

std::set<std::string> names_in(plain::File const& file) {
  std::set<std::string> names;
  for (auto const& [name, tensor] : file.tensors) names.insert(name);
  return names;
}
using Names = std::set<std::string>;

nlohmann::json json_in(std::string const& path) { return nlohmann::json::parse(plain::text_of(path)); }
std::map<std::string, std::string> data_in(std::string const& directory) {
  auto files = files_in(directory);
  files.erase("dcp.json");   // has its id
  return files;
}
std::map<std::string, dcp::Bytes> data_in(dcp::Memory const& store, std::string const& directory) {
  std::map<std::string, dcp::Bytes> files;
  dcp::MediumModel<dcp::Memory> medium{store};
  for (auto const& entry : medium.list(directory))
    if (entry.name != "dcp.json") files[entry.name] = dcp::read_file(medium, directory + '/' + entry.name, 1u << 30);
  return files;
}
constexpr char const* only_file = "model-00001-of-00001.safetensors";

// The error of a save, which must be the same on all ranks.
template <class S>
dcp::Error refused_on_all(int ranks, std::string const& place, std::vector<WholeTensor> const& tensors, int dim, std::function<Options<S>(int)> const& options) {
  std::vector<std::optional<dcp::Error>> errors(static_cast<std::size_t>(ranks));
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    HeldTensors const held{tensors, split(ranks, dim), world.rank(), true};
    errors[static_cast<std::size_t>(world.rank())] = error_of([&] { dcp::save<S>(world, place, held.state, options(world.rank())); });
    world.barrier();
  });
  for (auto const& error : errors) {
    REQUIRE(error);
    CHECK(error->code() == errors[0]->code());
    CHECK(error->message() == errors[0]->message());
  }
  return *errors[0];
}
bool says(dcp::Error const& error, std::string const& text) { return std::string{error.what()}.find(text) != std::string::npos; }

// An embedding that stays, and two matrices.
std::vector<WholeTensor> small_model(float factor = 1) {
  auto const values = [factor](std::int64_t i) { return factor * std::sin(static_cast<float>(i)); };
  return {tensor_of("model.embed_tokens.weight", {10, 64}, values), tensor_of("model.layers.0.down_proj.weight", {24, 96}, values), tensor_of("model.layers.0.up_proj.weight", {40, 64}, values)};
}

// Loads all of some tensors as floats, and how far off the furthest element of each is.
template <class S>
std::map<std::string, double> errors_of(std::string const& place, std::vector<WholeTensor> const& tensors, dcp::LoadOptions<S> options = {}) {
  dcp::SelfComm self;
  std::map<std::string, std::vector<float>> read;
  dcp::StateDict state;
  for (auto const& tensor : tensors) {
    auto& values = read[tensor.name];
    values.assign(static_cast<std::size_t>(tensor.shape.elements()), not_a_number);
    state.add_tensor(tensor.name, DType::f32, dcp::plain_layout(tensor.shape), {reinterpret_cast<std::byte*>(values.data()), dcp::row_major_strides(tensor.shape)});
  }
  dcp::load<S>(self, place, state, options);
  std::map<std::string, double> errors;
  for (auto const& tensor : tensors) {
    auto const wanted = floats_of(tensor.bytes);
    double& most = errors[tensor.name];
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      double const error = std::abs(double{wanted[i]} - double{read[tensor.name][i]});
      if (!(error <= most)) most = error;
    }
  }
  return errors;
}

}  // namespace

// ---- what is quantized

TEST_CASE("Quantized: matrices of floats named weight are quantized unless told otherwise, but no embedding, norm, router or head") {
  TemporaryDirectory const directory;
  std::vector<WholeTensor> tensors;
  for (auto const* name : {"weight", "model.layers.0.q_proj.weight", "model.layers.0.mlp.experts.3.gate_proj.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight",
                           "model.norm.weight", "lm_head.weight", "model.layers.0.mlp.router.weight", "model.layers.0.mlp.gate.weight", "transformer.wte.weight", "model.layers.0.q_proj.bias", "weights"})
    tensors.push_back(tensor_of(name, {8, 32}));
  tensors.push_back(tensor_of("model.layers.0.scale.weight", {32}));
  tensors.push_back(tensor_of("model.layers.0.empty.weight", {0, 32}));
  tensors.push_back(dcp::test::made_tensor("model.layers.0.counts.weight", DType::i64, {8, 32}));
  auto held = everywhere(tensors);
  dcp::SelfComm self;
  dcp::save<Quantized<dcp::Fp8Channel>>(self, directory / "ckpt", held.state);
  auto const file = plain::read(directory / "ckpt/" + only_file);
  Names quantized;
  for (auto const& [name, tensor] : file.tensors)
    if (tensor.dtype == "F8_E4M3") quantized.insert(name);
  CHECK(quantized == Names{"model.layers.0.mlp.experts.3.gate_proj.weight", "model.layers.0.q_proj.weight", "weight"});
  for (auto const& name : quantized) {
    CHECK(file.tensors.at(name).shape == std::vector<std::int64_t>{8, 32});
    CHECK(file.tensors.at(name + "_scale").dtype == "F32");
    CHECK(file.tensors.at(name + "_scale").shape == std::vector<std::int64_t>{8, 1});
  }
  CHECK(file.tensors.size() == tensors.size() + quantized.size());
  for (auto const& tensor : tensors)
    if (!quantized.contains(tensor.name)) CHECK(file.tensors.at(tensor.name).bytes == std::string{reinterpret_cast<char const*>(tensor.bytes.data()), tensor.bytes.size()});
  auto const ignored = json_in(directory / "ckpt/config.json")["quantization_config"]["ignore"].get<std::vector<std::string>>();
  CHECK(std::count(ignored.begin(), ignored.end(), "lm_head") == 1);
  CHECK(std::count(ignored.begin(), ignored.end(), "model.layers.0.q_proj") == 0);
}

TEST_CASE("Quantized: a predicate decides by name, dtype and global shape, on every rank") {
  TemporaryDirectory const directory;
  auto const tensors = small_model();
  dcp::run_threads(3, [&](dcp::ThreadComm& world) {
    HeldTensors const held{tensors, split(3, 0), world.rank(), true};
    Options<Quantized<dcp::Mxfp4>> options;
    options.storage.quantize = [](std::string_view name, DType dtype, Extents const& shape) { return dtype == DType::f32 && shape == Extents{10, 64} && name.ends_with("embed_tokens.weight"); };
    dcp::save<Quantized<dcp::Mxfp4>>(world, directory / "ckpt", held.state, options);
  });
  CHECK(names_in(plain::read(directory / "ckpt/" + only_file)) == Names{"model.embed_tokens.weight_packed", "model.embed_tokens.weight_scale", "model.layers.0.down_proj.weight", "model.layers.0.up_proj.weight"});
  auto const errors = errors_of<Quantized<dcp::Mxfp4>>(directory / "ckpt", tensors);
  CHECK(errors.at("model.embed_tokens.weight") > 0);
  CHECK(errors.at("model.embed_tokens.weight") <= 0.2);
  CHECK(errors.at("model.layers.0.up_proj.weight") == 0);
}

TEST_CASE("Quantized: a predicate that says different things on different ranks is refused on all of them, and nothing is written") {
  TemporaryDirectory const directory;
  auto const error = refused_on_all<Quantized<dcp::Fp8Block<>>>(3, directory / "ckpt", small_model(), 0, [](int rank) {
    Options<Quantized<dcp::Fp8Block<>>> options;
    options.storage.quantize = [rank](std::string_view name, DType, Extents const&) { return name.ends_with("up_proj.weight") || (rank == 2 && name.ends_with("down_proj.weight")); };
    return options;
  });
  CHECK(error.code() == ErrorCode::ranks_disagree);
  CHECK(says(error, "rank 0 and rank 2 would quantize different tensors"));
  CHECK(std::filesystem::is_empty(directory.path()));
}

// ---- what is refused

TEST_CASE("Quantized: what cannot be quantized is refused before anything is written, all of it in one error") {
  TemporaryDirectory const directory;
  auto const refused = [&]<class Scheme>(Scheme, std::vector<WholeTensor> const& tensors, std::vector<std::string> const& sentences, std::int64_t group = 128) {
    auto const error = refused_on_all<Quantized<Scheme>>(2, directory / "ckpt", tensors, 0, [&](int) {
      Options<Quantized<Scheme>> options;
      options.storage.quantize = [](std::string_view name, DType, Extents const&) { return !name.ends_with("kept"); };
      options.storage.group = group;
      return options;
    });
    CHECK(error.code() == ErrorCode::invalid_argument);
    for (auto const& sentence : sentences) {
      CAPTURE(sentence);
      CAPTURE(std::string{error.what()});
      CHECK(says(error, sentence));
    }
    CHECK(!says(error, "kept"));
    CHECK(says(error, "QuantizedOptions::quantize says which tensors are quantized"));
    CHECK(std::filesystem::is_empty(directory.path()));
  };
  auto const integers = dcp::test::made_tensor("c.weight", DType::i32, {8, 64});
  std::vector<WholeTensor> const uneven{tensor_of("a.weight", {4, 33}), tensor_of("b.weight", {4, 64}), integers, tensor_of("d.weight", {64}), tensor_of("e.kept", {3})};
  std::string const no_floats = "c.weight [8, 64] I32: is to be quantized, and holds no floats";
  refused(dcp::Mxfp4{}, uneven, {"a.weight [4, 33] F32: its 33 columns are no whole groups of 32", no_floats, "d.weight [64] F32: is to be quantized as mxfp4, which is for matrices"});
  refused(dcp::Mxfp8{}, uneven, {"its 33 columns are no whole groups of 32", no_floats});
  refused(dcp::Nvfp4{}, uneven, {"its 33 columns are no whole groups of 16", no_floats});
  refused(dcp::Fp8Block<>{}, uneven, {no_floats, "d.weight [64] F32: is to be quantized as fp8_block"});
  refused(dcp::Fp8Tensor{}, {integers}, {no_floats});
  refused(dcp::Int8Group{}, uneven, {"its 33 columns are no whole groups of 64", "b.weight [4, 64] F32: its 64 columns are one group; Int8Channel says that"}, 64);
  refused(dcp::Int4Packed{}, {tensor_of("a.weight", {4, 33}), tensor_of("b", {4, 32})}, {"its 33 columns are no whole groups of 32", "b [4, 32] F32: is to be quantized as int4_packed, whose names end in \"weight\""}, 32);
  refused(dcp::Gptq{}, {tensor_of("a.weight", {9, 64}), tensor_of("b.weight", {2, 8, 64}), tensor_of("c", {8, 64}), tensor_of("d.weight", {8, 72})},
          {"a.weight [9, 64] F32: GPTQ packs eight inputs and eight outputs into words", "b.weight [2, 8, 64] F32: is to be quantized as gptq, which is for matrices", "c [8, 64] F32: is to be quantized as gptq", "d.weight [8, 72] F32: its 72 columns are no whole groups of 32"}, 32);
  refused(dcp::Gptq{}, {tensor_of("a.weight", {8, 24})}, {"groups of 12 inputs do not fill words"}, 12);
}

TEST_CASE("Quantized: two tensors that would be stored under one name are refused") {
  TemporaryDirectory const directory;
  dcp::SelfComm self;
  auto const held = everywhere({tensor_of("a.weight", {8, 32}), tensor_of("a.weight_scale", {8, 1})});
  auto const error = error_of([&] { dcp::save<Quantized<dcp::Fp8Channel>>(self, directory / "ckpt", held.state); });
  REQUIRE(error);
  CHECK(error->code() == ErrorCode::duplicate_entry);
  CHECK(says(*error, "a.weight_scale"));
}

TEST_CASE("Quantized: files of pieces are refused, and so are groups of no columns") {
  TemporaryDirectory const directory;
  auto const error = refused_on_all<Quantized<dcp::Fp8Block<>>>(2, directory / "ckpt", small_model(), 0, [](int) {
    Options<Quantized<dcp::Fp8Block<>>> options;
    options.storage.base.layout = dcp::FileLayout::sharded;
    return options;
  });
  CHECK(error.code() == ErrorCode::unsupported);
  CHECK(says(error, "the layout of files must be final"));
  dcp::SelfComm self;
  auto const held = everywhere(small_model());
  for (std::int64_t const group : {std::int64_t{0}, std::int64_t{-128}, std::int64_t{1} << 40}) {
    Options<Quantized<dcp::Int4Packed>> options;
    options.storage.group = group;
    CHECK_THROWS_AS(dcp::save<Quantized<dcp::Int4Packed>>(self, directory / "ckpt", held.state, options), dcp::Error);
  }
  CHECK(std::filesystem::is_empty(directory.path()));
}

TEST_CASE("Quantized: NaN and infinity fail the save on all ranks, which names tensor and element, and the checkpoint before stays as it was") {
  TemporaryDirectory const directory;
  auto const failing = [&]<class Scheme>(Scheme, std::int64_t at, float value, std::string const& element, int dim) {
    CAPTURE(element);
    auto tensors = small_model();
    dcp::SelfComm self;
    dcp::save<Quantized<Scheme>>(self, directory / "ckpt", everywhere(tensors).state, {.if_exists = dcp::IfExists::replace, .storage = {.group = 32}});
    auto const before = files_in(directory.path());
    std::memcpy(tensors[1].bytes.data() + 4 * at, &value, 4);
    auto const error = refused_on_all<Quantized<Scheme>>(3, directory / "ckpt", tensors, dim, [](int) { return Options<Quantized<Scheme>>{.if_exists = dcp::IfExists::replace, .storage = {.group = 32}}; });
    CHECK(error.code() == ErrorCode::invalid_argument);
    CAPTURE(std::string{error.what()});
    CHECK(says(error, "model.layers.0.down_proj.weight: element " + element + (std::isnan(value) ? " is NaN" : " is infinite")));
    CHECK(files_in(directory.path()) == before);
  };
  for (int const dim : {0, 1}) {
    CAPTURE(dim);
    // Looked at before anything is written: groups of several rows, rows, tensors.
    failing(dcp::Fp8Block<>{}, 2 * 96 + 5, not_a_number, "[2, 5]", dim);
    failing(dcp::Fp8Tensor{}, 23 * 96 + 95, infinity, "[23, 95]", dim);
    failing(dcp::Nvfp4{}, 7, -infinity, "[0, 7]", dim);
    failing(dcp::Gptq{}, 12 * 96 + 64, not_a_number, "[12, 64]", dim);
    // Found when they are written: groups inside rows.
    failing(dcp::Fp8Channel{}, 22 * 96 + 31, not_a_number, "[22, 31]", dim);
    failing(dcp::Mxfp4{}, 12 * 96 + 31, not_a_number, "[12, 31]", dim);
    failing(dcp::Mxfp8{}, 12 * 96 + 32, infinity, "[12, 32]", dim);
    failing(dcp::Int8Channel{}, 96, -infinity, "[1, 0]", dim);
    failing(dcp::Int8Group{}, 23 * 96 + 94, not_a_number, "[23, 94]", dim);
    failing(dcp::Int4Packed{}, 0, not_a_number, "[0, 0]", dim);
  }
}

TEST_CASE("Quantized: in a tensor that is stored as it is, NaN and infinity are numbers like others") {
  TemporaryDirectory const directory;
  auto tensors = small_model();
  std::memcpy(tensors[0].bytes.data(), &not_a_number, 4);
  dcp::SelfComm self;
  dcp::save<Quantized<dcp::Mxfp4>>(self, directory / "ckpt", everywhere(tensors).state);
  CHECK(std::isnan(plain::read(directory / "ckpt/" + only_file).tensors.at("model.embed_tokens.weight").as<float>()[0]));
}

// ---- what stands beside the tensors

TEST_CASE("Quantized: config.json is written where there is none, and one that is given keeps what else it says") {
  TemporaryDirectory const directory;
  dcp::SelfComm self;
  auto const held = everywhere(small_model());
  dcp::save<Quantized<dcp::Fp8Block<4, 8>>>(self, directory / "new", held.state);
  auto const config = json_in(directory / "new/config.json");
  CHECK(config.size() == 1);
  CHECK(config["quantization_config"]["quant_method"] == "fp8");
  CHECK(config["quantization_config"]["weight_block_size"] == nlohmann::json{4, 8});

  std::filesystem::create_directory(directory / "from");
  std::ofstream{directory / "from/config.json"} << R"({"architectures": ["Some"], "hidden_size": 64, "quantization_config": {"quant_method": "old"}, "rope": {"theta": 1e6, "on": [true, null]}})";
  std::ofstream{directory / "from/tokenizer.json"} << "{}";
  Options<Quantized<dcp::Int4Packed>> options;
  options.storage.group = 32;
  options.storage.base.extra_files = {directory / "from/tokenizer.json", directory / "from/config.json"};
  dcp::save<Quantized<dcp::Int4Packed>>(self, directory / "given", held.state, options);
  auto const given = json_in(directory / "given/config.json");
  CHECK(given["architectures"] == nlohmann::json{"Some"});
  CHECK(given["hidden_size"] == 64);
  CHECK(given["rope"] == nlohmann::json{{"theta", 1e6}, {"on", {true, nullptr}}});
  CHECK(given["quantization_config"]["quant_method"] == "compressed-tensors");
  CHECK(given["quantization_config"]["format"] == "pack-quantized");
  CHECK(given["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 32);
  CHECK(plain::text_of(directory / "given/tokenizer.json") == "{}");
  CHECK(errors_of<Quantized<dcp::Int4Packed>>(directory / "given", small_model()).at("model.layers.0.up_proj.weight") <= 0.51 / 7.5);

  // Nothing to say of a model of which nothing is quantized.
  Options<Quantized<dcp::Mxfp4>> none;
  none.storage.quantize = [](std::string_view, DType, Extents const&) { return false; };
  dcp::save<Quantized<dcp::Mxfp4>>(self, directory / "none", held.state, none);
  CHECK(!std::filesystem::exists(directory / "none/config.json"));
  dcp::save<SafeTensors>(self, directory / "plain", held.state);
  CHECK(files_in(directory / "none").at(only_file) == files_in(directory / "plain").at(only_file));

  // One that cannot be read is not written over.
  std::ofstream{directory / "from/config.json"} << "{\"broken\": ";
  CHECK_THROWS_AS(dcp::save<Quantized<dcp::Int4Packed>>(self, directory / "broken", held.state, options), dcp::Error);
  CHECK(!std::filesystem::exists(directory / "broken"));
}

TEST_CASE("Quantized: index and record list the parts, and to a plain storage they are tensors like others") {
  TemporaryDirectory const directory;
  dcp::SelfComm self;
  auto const tensors = small_model();
  dcp::save<Quantized<dcp::Nvfp4>>(self, directory / "ckpt", everywhere(tensors).state);
  Names const names{"model.embed_tokens.weight", "model.layers.0.down_proj.weight", "model.layers.0.down_proj.weight_scale", "model.layers.0.down_proj.weight_scale_2",
                    "model.layers.0.up_proj.weight", "model.layers.0.up_proj.weight_scale", "model.layers.0.up_proj.weight_scale_2"};
  auto const file = plain::read(directory / "ckpt/" + only_file);
  CHECK(names_in(file) == names);
  auto const index = json_in(directory / "ckpt/model.safetensors.index.json");
  Names indexed;
  for (auto const& [name, in] : index["weight_map"].items()) indexed.insert(name);
  CHECK(indexed == names);
  std::size_t bytes = 0;
  for (auto const& [name, tensor] : file.tensors) bytes += tensor.bytes.size();
  CHECK(index["metadata"]["total_size"] == bytes);
  std::string const record = plain::text_of(directory / "ckpt/dcp.json");
  for (auto const& name : names) CHECK(record.find('"' + name + '"') != std::string::npos);

  auto const loaded = dcp::load_from_keys<SafeTensors>(self, directory / "ckpt");
  Names seen;
  for (auto const& [name, tensor] : loaded.tensors()) {
    seen.insert(name);
    CHECK(std::string{reinterpret_cast<char const*>(tensor.bytes().data()), tensor.bytes().size()} == file.tensors.at(name).bytes);
  }
  CHECK(seen == names);
  CHECK(file.tensors.at("model.layers.0.up_proj.weight").dtype == "U8");
  CHECK(file.tensors.at("model.layers.0.up_proj.weight").shape == std::vector<std::int64_t>{40, 32});
  CHECK(file.tensors.at("model.layers.0.up_proj.weight_scale_2").shape.empty());

  // Without the record it is a model as others write them.
  std::filesystem::remove(directory / "ckpt/dcp.json");
  std::filesystem::remove(directory / "ckpt/dcp.crc");
  for (auto const& [name, error] : errors_of<Quantized<dcp::AnyScheme>>(directory / "ckpt", tensors)) CHECK(error <= 0.2);
}

TEST_CASE("Quantized: files of a given size, names without the prefix of their group, and tied tensors") {
  TemporaryDirectory const directory;
  auto tensors = small_model();
  tensors.push_back(tensor_of("optimizer.exp_avg", {40, 64}));
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    HeldTensors held{tensors, split(2, 1), world.rank(), true};
    held.state.tie("model.layers.1.up_proj.weight", "model.layers.0.up_proj.weight");
    Options<Quantized<dcp::Fp8Block<5, 7>>> options;
    options.storage.base.max_file_bytes = 3000;
    options.storage.base.groups = {{"model", ".", dcp::Prefix::strip}, {"optimizer", "optimizer"}};
    dcp::save<Quantized<dcp::Fp8Block<5, 7>>>(world, directory / "ckpt", held.state, options);
  });
  Names names;
  std::size_t files = 0;
  for (auto const& entry : std::filesystem::directory_iterator{directory / "ckpt"})
    if (entry.path().extension() == ".safetensors") ++files, names.merge(names_in(plain::read(entry.path().string())));
  CHECK(files > 1);
  CHECK(names == Names{"embed_tokens.weight", "layers.0.down_proj.weight", "layers.0.down_proj.weight_scale_inv", "layers.0.up_proj.weight", "layers.0.up_proj.weight_scale_inv"});
  CHECK(names_in(plain::read(directory / "ckpt/optimizer/" + only_file)) == Names{"optimizer.exp_avg"});
  CHECK(json_in(directory / "ckpt/config.json")["quantization_config"]["modules_to_not_convert"] == nlohmann::json{"embed_tokens"});   // as the files name it

  auto wanted = tensors;
  wanted.push_back(tensors[2]);
  wanted.back().name = "model.layers.1.up_proj.weight";
  auto const errors = errors_of<Quantized<dcp::Fp8Block<5, 7>>>(directory / "ckpt", wanted);
  CHECK(errors.at("optimizer.exp_avg") == 0);
  CHECK(errors.at("model.embed_tokens.weight") == 0);
  CHECK(errors.at("model.layers.0.down_proj.weight") > 0);
  CHECK(errors.at("model.layers.0.down_proj.weight") <= 1.0 / 28);
  CHECK(errors.at("model.layers.1.up_proj.weight") == errors.at("model.layers.0.up_proj.weight"));
}

TEST_CASE("Quantized: the parts of a tensor lie in one file, whatever the size of files and whichever number a tensor was given") {
  TemporaryDirectory const directory;
  std::vector<WholeTensor> tensors;
  for (int i = 0; i < 5; ++i) tensors.push_back(tensor_of("layers." + std::to_string(i) + ".up.weight", {16, 48}));
  auto const saved_with = [&](dcp::SafeTensorsOptions const& base, std::string const& place) {
    dcp::run_threads(2, [&](dcp::ThreadComm& world) {
      HeldTensors held{tensors, split(2, 0), world.rank(), true};
      Options<Quantized<dcp::Nvfp4>> options;
      options.storage.base = base;
      dcp::save<Quantized<dcp::Nvfp4>>(world, directory / place, held.state, options);
    });
    std::map<std::string, std::set<std::string>> files;   // of each tensor
    for (auto const& entry : std::filesystem::directory_iterator{directory / place})
      if (entry.path().extension() == ".safetensors")
        for (auto const& name : names_in(plain::read(entry.path().string()))) files[name.substr(0, name.find(".up."))].insert(entry.path().filename().string());
    return files;
  };
  for (std::uint64_t const size : {1u, 100u, 400u, 440u, 500u, 900u, 1000u}) {
    CAPTURE(size);
    auto const files = saved_with({.max_file_bytes = size}, "size-" + std::to_string(size));
    CHECK(files.size() == tensors.size());
    for (auto const& [name, of] : files) CHECK(of.size() == 1);
    CHECK((*files.begin()->second.begin() == *files.rbegin()->second.begin()) == false);
  }
  dcp::SafeTensorsOptions numbered;
  for (int i = 0; i < 5; ++i) numbered.file_of["layers." + std::to_string(i) + ".up.weight"] = 1 + i % 2;
  for (auto const& [name, of] : saved_with(numbered, "numbered")) CHECK(of == std::set<std::string>{name.back() % 2 == 0 ? "model-00001-of-00002.safetensors" : "model-00002-of-00002.safetensors"});
}

TEST_CASE("Quantized: words that hold elements of several groups, and of several ranks, are those of one rank") {
  TemporaryDirectory const directory;
  std::vector<WholeTensor> const tensors{tensor_of("layer.weight", {6, 60}, [](std::int64_t i) { return std::ldexp(std::sin(static_cast<float>(i)), static_cast<int>(i / 3 % 9)); })};
  for (std::int64_t const group : {3, 4, 12, 20}) {
    CAPTURE(group);
    std::string const alone = directory / "alone-" + std::to_string(group);
    dcp::SelfComm self;
    dcp::save<Quantized<dcp::Int4Packed>>(self, alone, everywhere(tensors).state, {.storage = {.group = group}});
    for (int const ranks : {2, 3, 4}) {
      std::string const shared = directory / "shared-" + std::to_string(group) + '-' + std::to_string(ranks);
      dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
        HeldTensors const held{tensors, split(ranks, 1), world.rank(), true};
        dcp::save<Quantized<dcp::Int4Packed>>(world, shared, held.state, {.storage = {.group = group}});
      });
      CHECK(data_in(shared) == data_in(alone));
    }
  }
}

// ---- saves in the background

TEST_CASE("async_save: what it quantizes is, byte by byte, what save does, with every stager") {
  for (int const ranks : {1, 3}) {
    CAPTURE(ranks);
    dcp::Memory const store;
    auto const tensors = small_model();
    auto const each = [&]<class S>(std::type_identity<S>, std::string const& label, Options<S> const& options) {
      CAPTURE(label);
      dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
        HeldTensors held{tensors, split(ranks, 1), world.rank(), true};
        dcp::save<S>(world, {store, label}, held.state, options);
        auto copied = dcp::async_save<S>(world, {store, label + "-copied"}, held.state, options);
        copied.wait();
        auto deferred = dcp::async_save<S, Deferred>(world, {store, label + "-deferred"}, held.state, options);
        deferred.wait_staged();
        deferred.wait();
        auto guarded = dcp::async_save<S, Guarded>(world, {store, label + "-guarded"}, held.state, options);
        guarded.wait_staged();
        guarded.wait();
      });
      for (auto const* how : {"-copied", "-deferred", "-guarded"}) CHECK(data_in(store, label + how) == data_in(store, label));
    };
    each(std::type_identity<QuantizedInMemory<dcp::Mxfp4>>{}, "mxfp4", {});
    each(std::type_identity<QuantizedInMemory<dcp::Fp8Block<>>>{}, "fp8", {});
    each(std::type_identity<QuantizedInMemory<dcp::Nvfp4>>{}, "nvfp4", {});
    each(std::type_identity<QuantizedInMemory<dcp::Gptq>>{}, "gptq", {.storage = {.group = 32}});
    each(std::type_identity<GgufInMemory>{}, "gguf", {.storage = {.quantize_to = "Q8_0"}});
  }
}

TEST_CASE("async_save: sources may change once they are staged, and a guarded stager names the ones that changed before") {
  TemporaryDirectory const directory;
  dcp::SelfComm self;
  std::vector<float> weight(64 * 64), other(64 * 64, 1.0f);
  for (std::size_t i = 0; i < weight.size(); ++i) weight[i] = std::cos(static_cast<float>(i));
  dcp::StateDict state;
  auto const add = [&](char const* name, std::vector<float>& values) { state.add_tensor(name, DType::f32, dcp::plain_layout({64, 64}), {reinterpret_cast<std::byte*>(values.data()), Extents{64, 1}}); };
  add("changing.weight", weight);
  add("steady.weight", other);
  using S = Quantized<dcp::Fp8Block<16, 16>>;
  dcp::save<S>(self, directory / "wanted", state);
  auto copied = dcp::async_save<S>(self, directory / "copied", state);
  auto const kept = weight;
  std::fill(weight.begin(), weight.end(), 77.0f);
  copied.wait();
  CHECK(data_in(directory / "copied") == data_in(directory / "wanted"));
  weight = kept;
  auto deferred = dcp::async_save<S, Deferred>(self, directory / "deferred", state);
  deferred.wait_staged();
  std::fill(weight.begin(), weight.end(), 77.0f);
  deferred.wait();
  CHECK(data_in(directory / "deferred") == data_in(directory / "wanted"));
  weight = kept;
  auto guarded = dcp::async_save<S, Guarded>(self, directory / "guarded", state);
  weight[100] += 1;
  auto const error = error_of([&] { guarded.wait_staged(); });
  CHECK_THROWS_AS(guarded.wait(), dcp::Error);
  REQUIRE(error);
  CHECK(error->code() == ErrorCode::changed);
  CHECK(says(*error, "changing.weight"));
  CHECK(!says(*error, "steady.weight"));
  CHECK(!std::filesystem::exists(directory / "guarded"));
}

TEST_CASE("async_save: NaN fails it on all ranks, whether it is found before the copy or in it, and the next save works") {
  TemporaryDirectory const directory;
  auto const failing = [&]<class Scheme, class T>(Scheme, T, char const* label) {
    CAPTURE(label);
    auto tensors = small_model();
    std::memcpy(tensors[1].bytes.data() + 4 * 500, &not_a_number, 4);
    dcp::run_threads(3, [&](dcp::ThreadComm& world) {
      HeldTensors const held{tensors, split(3, 0), world.rank(), true}, good{small_model(), split(3, 0), world.rank(), true};
      std::optional<dcp::Pending> pending;
      auto error = error_of([&] { pending = dcp::async_save<Quantized<Scheme>, T>(world, directory / label, held.state); });
      if (pending) {
        error = error_of([&] { pending->wait_staged(); });
        CHECK_THROWS_AS(pending->wait(), dcp::Error);
      }
      REQUIRE(error);
      CHECK(says(*error, "model.layers.0.down_proj.weight: element [5, 20] is NaN"));
      CHECK(!std::filesystem::exists(directory / label));
      world.barrier();
      dcp::async_save<Quantized<Scheme>, T>(world, directory / label, good.state).wait();
    });
    CHECK(errors_of<Quantized<Scheme>>(directory / label, small_model()).at("model.layers.0.down_proj.weight") <= 0.2);
  };
  failing(dcp::Fp8Block<>{}, dcp::CopyStager{}, "before");
  failing(dcp::Mxfp4{}, dcp::CopyStager{}, "in");
  failing(dcp::Fp8Block<>{}, Deferred{}, "before-deferred");
  failing(dcp::Mxfp4{}, Deferred{}, "in-deferred");
}

TEST_CASE("CheckpointManager: saves that quantize use the plan of the one before, and hold the values of their own time") {
  for (int const ranks : {1, 3}) {
    CAPTURE(ranks);
    dcp::Memory const store;
    auto const each = [&]<class S>(std::type_identity<S>, std::string const& label, Options<S> const& options, int dim, bool reuses) {
      CAPTURE(label);
      dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
        auto tensors = small_model();
        HeldTensors held{tensors, split(ranks, dim), world.rank(), true};
        std::int64_t step = 0;
        held.state.add("step", step);
        {
          dcp::CheckpointManager<S> checkpoints{world, {store, label}, {.save = options}};
          for (step = 1; step <= 4; ++step) {
            // In the same memory, larger and smaller, so that old scales would show.
            HeldTensors const next{small_model(static_cast<float>(step % 2 == 0 ? 0.01 : 5.0 * static_cast<double>(step))), split(ranks, dim), world.rank(), true};
            for (std::size_t e = 0; e < next.state.size(); ++e) {
              auto const& from = *next.state.entries()[e].tensor;
              auto const& to = *held.state.entries()[e].tensor;
              std::memcpy(to.memory.data, from.memory.data, static_cast<std::size_t>(4 * dcp::held_by(from.layout, world.rank())->elements()));
            }
            dcp::Report const report = step < 3 ? checkpoints.save(step, held.state) : checkpoints.async_save(step, held.state).wait();
            CHECK(report.plan_reused == (reuses && step > 1));
          }
        }
        for (step = 1; step <= 4; ++step) {
          HeldTensors const now{small_model(static_cast<float>(step % 2 == 0 ? 0.01 : 5.0 * static_cast<double>(step))), split(ranks, dim), world.rank(), true};
          dcp::StateDict state{now.state};
          state.add("step", step);
          dcp::save<S>(world, {store, label + "-alone-" + std::to_string(step)}, state, options);
        }
      });
      for (int step = 1; step <= 4; ++step) CHECK(data_in(store, label + "/step-0000000" + std::to_string(step)) == data_in(store, label + "-alone-" + std::to_string(step)));
    };
    each(std::type_identity<QuantizedInMemory<dcp::Fp8Block<16, 16>>>{}, "fp8", {}, 1, true);
    each(std::type_identity<QuantizedInMemory<dcp::Fp8Tensor>>{}, "fp8-tensor", {}, 0, true);
    each(std::type_identity<QuantizedInMemory<dcp::Nvfp4>>{}, "nvfp4", {}, 1, true);
    each(std::type_identity<QuantizedInMemory<dcp::Int4Packed>>{}, "int4", {.storage = {.group = 32}}, 1, true);
    each(std::type_identity<GgufInMemory>{}, "gguf", {.storage = {.quantize_to = "Q5_1"}}, 1, false);   // its header holds the step
  }
}

TEST_CASE("simulate_save: plans what is quantized, without a byte of memory behind it") {
  TemporaryDirectory const directory;
  auto const each = [&]<class S>(std::type_identity<S>, Options<S> const& options, std::string const& label) {
    CAPTURE(label);
    dcp::SimulatedJob job;
    job.ranks = 3;
    job.state = [](dcp::SimulatedRank& rank) {
      dcp::DeviceMesh<1> const mesh{rank, {rank.size()}};
      dcp::StateDict state;
      state.add("a.weight", rank.tensor<float, dcp::Placement<dcp::Shard<1>>>(mesh, Extents{64, 256}));
      state.add("b.weight", rank.tensor<dcp::bf16, dcp::Placement<dcp::Shard<0>>>(mesh, Extents{50, 128}));
      return state;
    };
    auto const simulation = dcp::simulate_save<S>(job, options);
    CHECK(simulation.tensors == 2);
    CHECK(simulation.tensor_bytes == 4 * 64 * 256 + 2 * 50 * 128);
    dcp::run_threads(3, [&](dcp::ThreadComm& world) {
      dcp::DeviceMesh<1> const mesh{world, {3}};
      std::vector<float> a(dcp::local_box<dcp::Placement<dcp::Shard<1>>>(mesh, {64, 256}).size());
      std::vector<dcp::bf16> b(dcp::local_box<dcp::Placement<dcp::Shard<0>>>(mesh, {50, 128}).size());
      dcp::StateDict state;
      state.add("a.weight", dcp::ShardedTensor<float, dcp::Placement<dcp::Shard<1>>>{mesh, {64, 256}, a});
      state.add("b.weight", dcp::ShardedTensor<dcp::bf16, dcp::Placement<dcp::Shard<0>>>{mesh, {50, 128}, b});
      dcp::save<S>(world, directory / label, state, options);
    });
    auto const files = files_in(directory / label);
    for (auto const& file : simulation.files) CHECK(files.at(file.path).size() == file.bytes);
    std::uint64_t written = 0;
    for (auto const bytes : simulation.written) written += bytes;
    CHECK(written == files.at(simulation.files.at(0).path).size());
  };
  each(std::type_identity<Quantized<dcp::Fp8Block<>>>{}, {}, "fp8");
  each(std::type_identity<Quantized<dcp::Mxfp4>>{}, {}, "mxfp4");
  each(std::type_identity<Quantized<dcp::Gptq>>{}, {.storage = {.quantize = [](std::string_view name, DType, Extents const&) { return name == "a.weight"; }}}, "gptq");
  each(std::type_identity<dcp::Gguf>{}, {.storage = {.quantize_to = "Q4_0"}}, "gguf");
}

// ---- GGUF

namespace {

dcp::gguf::Header gguf_header(std::string const& path) {
  std::string const text = plain::text_of(path);
  auto const bytes = dcp::as_byte_span(text);
  return dcp::gguf::parse_header([&](std::uint64_t at, dcp::ByteSpan out) { std::memcpy(out.data(), bytes.data() + at, out.size()); }, bytes.size(), {});
}

// One value of every kind that a file can hold, and two that it cannot.
struct Values {
  bool flag = true;
  std::int8_t i8 = -8;
  std::uint8_t u8 = 200;
  std::int16_t i16 = -300;
  std::uint16_t u16 = 60'000;
  std::int32_t i32 = -70'000;
  std::uint32_t u32 = 4'000'000'000u;
  std::int64_t i64 = std::numeric_limits<std::int64_t>::min();
  std::uint64_t u64 = std::numeric_limits<std::uint64_t>::max();
  float f32 = 0.1f;
  double f64 = -infinity;
  std::string text = "zw\xC3\xB6lf";
  std::string none;
  std::vector<float> floats{1, -0.0f, 3};
  std::vector<std::int64_t> longs{-1, 5};
  std::vector<std::uint16_t> empty;
  std::vector<std::byte> bytes{std::byte{1}, std::byte{0}, std::byte{255}};
  std::int64_t seed = 0;

  dcp::StateDict state(bool own = true) {
    dcp::StateDict state{{"v.flag", flag}, {"v.i8", i8}, {"v.u8", u8}, {"v.i16", i16}, {"v.u16", u16}, {"v.i32", i32}, {"v.u32", u32}, {"v.i64", i64}, {"v.u64", u64},
                         {"v.f32", f32}, {"v.f64", f64}, {"v.text", text}, {"v.none", none}, {"v.floats", floats}, {"v.longs", longs}, {"v.empty", empty}};
    if (own) state.add("v.bytes", bytes).add("v.seed", dcp::per_rank(seed));
    return state;
  }
  friend bool operator==(Values const&, Values const&) = default;
};

}  // namespace

TEST_CASE("Gguf: values become metadata and come back from the file alone; those that GGUF has no type for stay in the record") {
  TemporaryDirectory const directory;
  auto const tensors = small_model();
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    Values values;
    values.seed = 40 + world.rank();
    HeldTensors held{tensors, split(2, 0), world.rank(), true};
    held.state.append("", values.state());
    dcp::save<dcp::Gguf>(world, directory / "ckpt", held.state, {.storage = {.quantize_to = "Q8_0", .architecture = "llama"}});
    Values read;
    read = {false, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, "", "x", {}, {}, {7}, {}, 0};
    dcp::load<dcp::Gguf>(world, directory / "ckpt", read.state(), {.on_unexpected = dcp::OnUnexpected::ignore});
    CHECK(read == values);
  });
  // The record knows what the state held; what the file says besides is not a value of it.
  dcp::SelfComm self;
  auto const recorded = dcp::load_from_keys<dcp::Gguf>(self, directory / "ckpt");
  CHECK(recorded.values().size() == 18);
  CHECK(!recorded.values().contains("general.architecture"));

  std::filesystem::copy_file(directory / "ckpt/model.gguf", directory / "alone.gguf");
  auto const header = gguf_header(directory / "alone.gguf");
  REQUIRE(!header.metadata.empty());
  CHECK(header.metadata[0].first == "general.architecture");
  CHECK(header.find_metadata("general.quantization_version") != nullptr);
  CHECK(header.find_metadata("v.bytes") == nullptr);
  CHECK(header.find_metadata("v.seed") == nullptr);
  Values alone;
  alone = {false, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, "", "x", {}, {}, {7}, Values{}.bytes, 0};
  dcp::load<dcp::Gguf>(self, directory / "alone.gguf", alone.state(false), {.on_unexpected = dcp::OnUnexpected::ignore});
  CHECK(alone == Values{});
  std::string architecture;
  dcp::load<dcp::Gguf>(self, directory / "alone.gguf", {{"general.architecture", architecture}}, {.on_unexpected = dcp::OnUnexpected::ignore});
  CHECK(architecture == "llama");
}

TEST_CASE("Gguf: an architecture that the state names is the one in the file, and tensors lie on the alignment") {
  TemporaryDirectory const directory;
  dcp::SelfComm self;
  std::string architecture = "mamba";
  std::vector<WholeTensor> const tensors{tensor_of("a", {3}), tensor_of("b", {5, 7}), tensor_of("c.weight", {5, 64}), dcp::test::made_tensor("d", DType::i8, {3}), dcp::test::made_tensor("e", DType::bf16, {2, 2, 2, 3})};
  for (std::uint64_t const alignment : {8u, 32u, 64u, 4096u}) {
    CAPTURE(alignment);
    auto held = everywhere(tensors);
    held.state.add("general.architecture", architecture);
    std::string const place = directory / std::to_string(alignment);
    dcp::save<dcp::Gguf>(self, place, held.state, {.storage = {.quantize_to = "Q4_1", .architecture = "llama", .alignment = alignment}});
    auto const header = gguf_header(place + "/model.gguf");
    CHECK(dcp::as_text(header.find_metadata("general.architecture")->payload) == "mamba");
    CHECK(header.tensors.size() == 5);
    for (auto const& tensor : header.tensors) CHECK(tensor.offset % alignment == 0);
    auto again = everywhere(tensors, false);
    dcp::StateDict state;
    for (auto const& entry : again.state.entries())
      if (entry.name != "c.weight") state.add_tensor(entry.name, entry.tensor->dtype, entry.tensor->layout, entry.tensor->memory);
    dcp::load<dcp::Gguf>(self, place, state, {.on_unexpected = dcp::OnUnexpected::ignore});
    for (auto const& tensor : tensors)
      if (tensor.name != "c.weight") {
        auto const bytes = dcp::load_from_keys<dcp::Gguf>(self, place, {tensor.name});
        CHECK(std::ranges::equal(bytes.tensors().at(tensor.name).bytes(), tensor.bytes));
      }
  }
  auto const held = everywhere(tensors);
  CHECK_THROWS_AS(dcp::save<dcp::Gguf>(self, directory / "odd", held.state, {.storage = {.alignment = 33}}), dcp::Error);
  CHECK(!std::filesystem::exists(directory / "odd"));
}

TEST_CASE("Gguf: tensors that the format cannot hold, or not in blocks, are refused, all of them") {
  TemporaryDirectory const directory;
  using dcp::test::made_tensor;
  std::vector<WholeTensor> const tensors{made_tensor("a", DType::u8, {4}),        made_tensor("b", DType::boolean, {4}),      made_tensor("c", DType::f8_e4m3, {4}), made_tensor("d", DType::u64, {4}),
                                         made_tensor("e", DType::f32, {4, 1, 1, 1, 1}), tensor_of("f.weight", {4, 33}), made_tensor("g.weight", DType::i32, {4, 32}), made_tensor("h", DType::c64, {4})};
  auto const error = refused_on_all<dcp::Gguf>(2, directory / "ckpt", tensors, 0, [](int) {
    return Options<dcp::Gguf>{.storage = {.quantize_to = "Q8_0", .quantize = [](std::string_view name, DType, Extents const&) { return name.ends_with(".weight"); }}};
  });
  CAPTURE(std::string{error.what()});
  for (auto const* sentence : {"a [4] U8: GGUF has no tensors of this dtype", "b [4] BOOL: GGUF has no", "c [4] F8_E4M3: GGUF has no", "d [4] U64: GGUF has no", "e [4, 1, 1, 1, 1] F32: GGUF has tensors of at most 4 dimensions",
                               "f.weight [4, 33] F32: its columns are no whole blocks of 32", "g.weight [4, 32] I32: is to be quantized, and holds no floats", "h [4] C64: GGUF has no"})
    CHECK(says(error, sentence));
  CHECK(std::filesystem::is_empty(directory.path()));
  dcp::SelfComm self;
  auto const held = everywhere(small_model());
  for (auto const* type : {"Q4_K", "F16", "q9", "IQ2_XS"}) CHECK_THROWS_WITH_AS(dcp::save<dcp::Gguf>(self, directory / "ckpt", held.state, {.storage = {.quantize_to = type}}), doctest::Contains("cannot be written"), dcp::Error);
}

TEST_CASE("Gguf: NaN, and numbers that no scale reaches, fail the save on all ranks, and the checkpoint before stays as it was") {
  TemporaryDirectory const directory;
  auto tensors = small_model();
  dcp::SelfComm self;
  Options<dcp::Gguf> const options{.if_exists = dcp::IfExists::replace, .storage = {.quantize_to = "Q5_0"}};
  dcp::save<dcp::Gguf>(self, directory / "ckpt", everywhere(tensors).state, options);
  auto const before = files_in(directory.path());
  for (int const dim : {0, 1})
    for (float const value : {not_a_number, infinity, 3e38f}) {
      CAPTURE(value);
      auto wrong = tensors;
      std::memcpy(wrong[1].bytes.data() + 4 * (12 * 96 + 33), &value, 4);
      auto const error = refused_on_all<dcp::Gguf>(3, directory / "ckpt", wrong, dim, [&](int) { return options; });
      CHECK(error.code() == ErrorCode::invalid_argument);
      CAPTURE(std::string{error.what()});
      CHECK(says(error, "model.layers.0.down_proj.weight"));
      if (!std::isfinite(value)) CHECK(says(error, "element [12, 33] is"));
      else CHECK(says(error, "is too large for a block of Q5_0"));
      CHECK(files_in(directory.path()) == before);
    }
}

TEST_CASE("Gguf: under a manager the file holds the values of each save, also where texts grow") {
  TemporaryDirectory const directory;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    HeldTensors held{small_model(), split(2, 0), world.rank(), true};
    std::string text;
    std::int64_t step = 0;
    held.state.add("text", text).add("step", step);
    dcp::CheckpointManager<dcp::Gguf> checkpoints{world, directory / "run", {.save = {.storage = {.quantize_to = "Q4_0"}}}};
    for (step = 1; step <= 3; ++step) {
      text.append(static_cast<std::size_t>(step * 1000), static_cast<char>('a' + step));
      auto pending = checkpoints.async_save(step, held.state);
      std::string const kept = text;
      text = "changed behind the call";
      pending.wait();
      text = kept;
    }
    std::string loaded;
    std::int64_t loaded_step = 0;
    for (step = 1; step <= 3; ++step) {
      std::string const file = directory / "run/step-0000000" + std::to_string(step) + "/model.gguf";
      dcp::load<dcp::Gguf>(world, file, {{"text", loaded}, {"step", loaded_step}}, {.on_unexpected = dcp::OnUnexpected::ignore});
      CHECK(loaded_step == step);
      CHECK(loaded.size() == static_cast<std::size_t>(step * (step + 1) / 2 * 1000));
      CHECK(loaded.back() == static_cast<char>('a' + step));
    }
  });
}
