// SPDX-License-Identifier: Apache-2.0
// convert between storages on any number of ranks, verify, and CheckpointReader.
#include <dcp/dcp.hpp>

#include "formats/golden.hpp"
#include "support/outcome.hpp"
#include "support/sha256.hpp"
#include "support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

namespace fs = std::filesystem;
using dcp::DType;
using dcp::test::error_of;
using dcp::test::TemporaryDirectory;
using golden::outcome;
using Quantized = dcp::Quantized<dcp::AnyScheme, dcp::SafeTensors>;

namespace {

/// Names to dtype, shape and digest; and values as JSON.
using Summary = std::map<std::string, std::string>;
template <class S>
Summary summary(fs::path const& place, std::vector<std::string> const& keys = {}) {
  dcp::SelfComm self;
  auto const state = dcp::load_from_keys<S>(self, place, keys);
  Summary all;
  for (auto const& [name, tensor] : state.tensors()) all[name] = std::string{to_string(tensor.dtype())} + ' ' + to_string(tensor.shape()) + ' ' + dcp::test::sha256(tensor.bytes());
  for (auto const& [name, value] : state.values()) all[name] = dcp::to_json(value);
  return all;
}
template <class From, class To>
dcp::Report converted(int ranks, fs::path const& from, fs::path const& to, dcp::ConvertOptions<From, To> const& options = {}) {
  dcp::Report report;
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    dcp::Report mine = dcp::convert<From, To>(world, from, to, options);
    if (world.rank() == 0) report = std::move(mine);
  });
  return report;
}
fs::path torch_case(std::string const& name) { return golden::root() / "torch_dcp" / name / "ckpt"; }

}  // namespace

TEST_CASE("convert: PyTorch's checkpoints become Hugging Face's and back, on 1 to 4 ranks, with every tensor and value as it was") {
  for (std::string const name : {"fsdp2_adam_2", "mesh_2x2", "strided_sources", "zstd", "sharded_4", "no_collectives_2"}) {
    CAPTURE(name);
    Summary const before = summary<dcp::TorchDcp>(torch_case(name));
    for (int ranks = 1; ranks <= 4; ++ranks) {
      CAPTURE(ranks);
      TemporaryDirectory const directory;
      auto const report = converted<dcp::TorchDcp, dcp::SafeTensors>(ranks, torch_case(name), directory / "hf");
      CHECK(report.operation == "convert");
      CHECK(report.tensors + report.values == before.size());
      CHECK(summary<dcp::SafeTensors>(directory / "hf") == before);
      converted<dcp::SafeTensors, dcp::TorchDcp>(5 - ranks, directory / "hf", directory / "torch");
      CHECK(summary<dcp::TorchDcp>(directory / "torch") == before);
      // As PyTorch sees it: without what this library knows beside.
      fs::remove(fs::path{directory / "torch"} / "dcp.json");
      fs::remove(fs::path{directory / "torch"} / "dcp.crc");
      CHECK(summary<dcp::TorchDcp>(directory / "torch") == before);
    }
  }
}

TEST_CASE("convert: the same source gives the same bytes on any number of ranks, where files are shared") {
  TemporaryDirectory const directory;
  std::map<std::string, std::string> first;
  for (int ranks = 1; ranks <= 4; ++ranks) {
    fs::path const to = directory / std::to_string(ranks);
    converted<dcp::TorchDcp, dcp::SafeTensors>(ranks, torch_case("fsdp_tp_2x2"), to);
    auto files = dcp::test::files_in(to);
    files.erase("dcp.json");   // which has a random id
    if (first.empty()) first = files;
    CHECK(files == first);
  }
}

TEST_CASE("convert: a file of torch.save, GGUF and quantized checkpoints become plain ones, and a plain one becomes quantized") {
  TemporaryDirectory const directory;
  fs::path pt;
  for (auto const& entry : fs::recursive_directory_iterator{golden::root() / "torch_dcp" / "torch_save_roundtrip"})
    if (entry.path().filename() == "plain.pt") pt = entry.path();
  converted<dcp::TorchFile, dcp::TorchDcp>(3, pt, directory / "pt");
  CHECK(summary<dcp::TorchDcp>(directory / "pt") == summary<dcp::TorchFile>(pt));

  fs::path const model = golden::root() / "quantized" / "fp8_block128" / "ckpt";
  converted<Quantized, dcp::SafeTensors>(2, model, directory / "fp8", {.decode_to = DType::f32});
  CHECK(summary<dcp::SafeTensors>(directory / "fp8") == summary<Quantized>(model));
  converted<Quantized, dcp::SafeTensors>(2, model, directory / "bf16");
  for (auto const& [name, text] : summary<dcp::SafeTensors>(directory / "bf16")) CHECK(text.starts_with("BF16"));

  fs::path const gguf = golden::root() / "gguf" / "alignment_64";
  fs::path file;
  for (auto const& entry : fs::directory_iterator{gguf})
    if (entry.path().extension() == ".gguf") file = entry.path();
  converted<dcp::Gguf, dcp::SafeTensors>(2, file, directory / "gguf", {.decode_to = DType::f32});
  for (auto const& [name, text] : summary<dcp::Gguf>(file))
    if (auto const all = summary<dcp::SafeTensors>(directory / "gguf"); all.contains(name)) CHECK(all.at(name) == text);

  // From a checkpoint to codes: as if the state itself had been saved so.
  dcp::SelfComm self;
  std::vector<float> weights(256 * 384);
  for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = static_cast<float>(i % 1013) * 0.37f - 100.0f;
  dcp::TensorView<float> const view{weights, {256, 384}};
  using Fp8 = dcp::Quantized<dcp::Fp8Block<128, 128>, dcp::SafeTensors>;
  dcp::save<dcp::SafeTensors>(self, directory / "plain", {{"layers.0.weight", view}});
  dcp::save<Fp8>(self, directory / "direct", {{"layers.0.weight", view}});
  converted<dcp::SafeTensors, Fp8>(3, directory / "plain", directory / "codes");
  CHECK(summary<Fp8>(directory / "codes") == summary<Fp8>(directory / "direct"));
}

TEST_CASE("convert: elements smaller than a byte arrive, whatever windows they are written in") {
  TemporaryDirectory const directory;
  dcp::SelfComm self;
  dcp::StateDict state;
  std::vector<dcp::Bytes> memory;
  std::uint32_t x = 1;
  for (auto const& [dtype, shape] : std::vector<std::pair<DType, dcp::Extents>>{{DType::f4, {3, 1001, 2}}, {DType::f6_e2m3, {1000, 4}}, {DType::f6_e3m2, {8, 3}}, {DType::f4, {200000}}, {DType::f6_e2m3, {1 << 20, 12}}}) {
    auto& bytes = memory.emplace_back(static_cast<std::size_t>(dcp::bytes_of(dtype, shape.elements())));
    for (auto& byte : bytes) byte = static_cast<std::byte>((x = x * 1664525u + 1013904223u) >> 24);
    state.add_tensor("t" + std::to_string(memory.size()), dtype, dcp::plain_layout(shape), {bytes.data(), dcp::row_major_strides(shape)});
  }
  dcp::save<dcp::SafeTensors>(self, directory / "a", state);
  for (int ranks = 1; ranks <= 3; ++ranks) {
    converted<dcp::SafeTensors, dcp::SafeTensors>(ranks, directory / "a", directory / ("b" + std::to_string(ranks)), {.save = {.memory_bytes = 16 << 20}});
    CHECK(summary<dcp::SafeTensors>(directory / ("b" + std::to_string(ranks))) == summary<dcp::SafeTensors>(directory / "a"));
  }
}

TEST_CASE("convert: names are selected as load_from_keys selects them, ties stay, and nested names stay nested") {
  TemporaryDirectory const directory;
  dcp::SelfComm self;
  std::vector<float> weight(12, 2.0f), other(3, 1.0f);
  dcp::TensorView<float> const embed{weight, {4, 3}}, head{weight, {4, 3}}, bias{other, {3}};
  std::int64_t step = 7;
  dcp::save<dcp::SafeTensors>(self, directory / "a", {{"model", {{"embed", embed}, {"head", head}, {"bias", bias}}}, {"step", step}});
  converted<dcp::SafeTensors, dcp::TorchDcp>(2, directory / "a", directory / "b");
  CHECK(summary<dcp::TorchDcp>(directory / "b") == summary<dcp::SafeTensors>(directory / "a"));
  auto const contents = dcp::contents<dcp::TorchDcp>(self, directory / "b");
  REQUIRE(contents.ties.size() == 1);
  CHECK(contents.ties[0] == std::pair<std::string, std::string>{"model.head", "model.embed"});
  converted<dcp::SafeTensors, dcp::SafeTensors>(2, directory / "a", directory / "c", {.only = {"model.head", "step"}});
  CHECK(summary<dcp::SafeTensors>(directory / "c") == summary<dcp::SafeTensors>(directory / "a", {"model.head", "step"}));
  CHECK(outcome([&] { dcp::convert<dcp::SafeTensors, dcp::TorchDcp>(self, directory / "a", directory / "d", {.only = {"nothing"}}); }) == "missing_entry");
  CHECK_FALSE(fs::exists(directory / "d"));
  converted<dcp::TorchDcp, dcp::TorchDcp>(3, torch_case("single_nested"), directory / "nested");
  auto const joints = [](fs::path const& place) {
    std::ifstream in{place / ".metadata", std::ios::binary};
    std::string const text{std::istreambuf_iterator<char>{in}, {}};
    return dcp::torch::parse_metadata(dcp::as_byte_span(text)).joints;
  };
  CHECK(joints(directory / "nested") == joints(torch_case("single_nested")));
}

TEST_CASE("convert: a damaged source is noticed, whatever is asked for, and nothing is left at the target") {
  TemporaryDirectory const directory;
  dcp::SelfComm self;
  converted<dcp::TorchDcp, dcp::TorchDcp>(2, torch_case("sharded_2"), directory / "a");
  fs::path const data = fs::path{directory / "a"} / "__0_0.distcp";
  auto const size = fs::file_size(data);
  for (std::uintmax_t at = 1; at < size; at += size / 9) {
    std::fstream file{data, std::ios::in | std::ios::out | std::ios::binary};
    file.seekg(static_cast<std::streamoff>(at));
    auto const byte = static_cast<char>(file.get());
    auto const put = [&](char value) {
      file.seekp(static_cast<std::streamoff>(at));
      file.put(value);
      file.flush();
    };
    put(static_cast<char>(byte ^ 1));
    CHECK(outcome([&] { dcp::convert<dcp::TorchDcp, dcp::SafeTensors>(self, directory / "a", directory / "b"); }) == "corrupt");
    CHECK_FALSE(fs::exists(directory / "b"));
    auto const error = error_of([&] { dcp::verify<dcp::TorchDcp>(self, directory / "a"); });
    REQUIRE(error);
    CHECK(error->code() == dcp::ErrorCode::corrupt);
    CHECK(std::string{error->what()}.find("__0_0.distcp") != std::string::npos);
    put(byte);
  }
  CHECK(outcome([&] { dcp::verify<dcp::TorchDcp>(self, directory / "a"); }) == "ok");
  CHECK(outcome([&] { dcp::convert<dcp::TorchDcp, dcp::SafeTensors>(self, golden::root() / "bad_torch" / "dcp_crc_flip", directory / "b"); }) == "corrupt");
}

TEST_CASE("verify: says what was compared, and what has no checksum") {
  dcp::run_threads(3, [&](dcp::ThreadComm& world) {
    auto const torch = dcp::verify<dcp::TorchDcp>(world, torch_case("fsdp2_adam_2"));
    if (torch.foreign == false || torch.verified_bytes < torch.tensor_bytes || torch.unverified_bytes != 0 || torch.tensors != 27) throw std::runtime_error("PyTorch's");
    auto const foreign = dcp::verify<dcp::SafeTensors>(world, golden::root() / "hf" / "plain_one_process" / "ckpt");
    if (foreign.verified_bytes != 0 || foreign.unverified_bytes != foreign.tensor_bytes) throw std::runtime_error("Hugging Face's");
  });
  dcp::SelfComm self;
  CHECK(outcome([&] { dcp::verify<dcp::TorchDcp>(self, golden::root() / "bad_torch" / "dcp_crc_flip"); }) == "corrupt");
}

TEST_CASE("CheckpointReader: what is damaged is refused every time that it is asked for, and the rest is not") {
  TemporaryDirectory const directory;
  dcp::SelfComm self;
  std::vector<float> first(1 << 20, 1.0f), second(1 << 20, 2.0f);
  dcp::save<dcp::SafeTensors>(self, directory / "a", {{"first", dcp::TensorView<float>{first, {1 << 20}}}, {"second", dcp::TensorView<float>{second, {1 << 20}}}});
  auto reader = dcp::CheckpointReader::open<dcp::SafeTensors>(directory / "a");
  {
    std::fstream file{fs::path{directory / "a"} / "model-00001-of-00001.safetensors", std::ios::in | std::ios::out | std::ios::binary};
    file.seekp(-3, std::ios::end);
    file.put('X');
  }
  dcp::Bytes bytes(4096);
  for (int time = 0; time < 3; ++time) {
    CHECK(outcome([&] { reader.read("second", dcp::Box{{(1 << 20) - 1024}, {1024}}, bytes); }) == "corrupt");
    CHECK(outcome([&] { reader.read("first", dcp::Box{{1024}, {1024}}, bytes); }) == "ok");
  }
  auto foreign = dcp::CheckpointReader::open<dcp::TorchDcp>(golden::root() / "bad_torch" / "dcp_crc_flip");
  dcp::Bytes whole(6 * 4 * 4);
  for (int time = 0; time < 3; ++time) CHECK(outcome([&] { foreign.read("w", dcp::Box{{0, 0}, {6, 4}}, whole); }) == "corrupt");
}

TEST_CASE("CheckpointReader: any box of any tensor, whatever it is stored as; and what is no box of one is refused") {
  auto reader = dcp::CheckpointReader::open<dcp::TorchDcp>(torch_case("mesh_2x2"));
  dcp::SelfComm self;
  auto const whole = dcp::load_from_keys<dcp::TorchDcp>(self, torch_case("mesh_2x2"));
  CHECK(reader.contents().tensors.size() == whole.tensors().size());
  for (auto const& entry : whole.tensors()) {
    std::string const& name = entry.first;
    dcp::OwnedTensor const& tensor = entry.second;
    CAPTURE(name);
    std::size_t const each = static_cast<std::size_t>(dcp::bits_of(tensor.dtype())) / 8;
    std::int64_t const count = tensor.shape().elements();
    // Any range of elements is a few boxes.
    for (auto const& [begin, end] : std::vector<std::pair<std::int64_t, std::int64_t>>{{0, count}, {count / 3, count - count / 4}}) {
      dcp::for_each_box(dcp::Box::whole(tensor.shape()), begin, end, [&](dcp::Box const& box, std::int64_t first) {
        dcp::Bytes bytes(box.size() * each);
        reader.read(name, box, bytes);
        CHECK(std::memcmp(bytes.data(), tensor.bytes().data() + static_cast<std::size_t>(first) * each, bytes.size()) == 0);
      });
    }
  }
  std::string const name = reader.contents().tensors[0].name;
  dcp::Bytes one(4096);
  CHECK(outcome([&] { reader.read("nothing", dcp::Box{{0}, {1}}, one); }) == "missing_entry");
  CHECK(outcome([&] { reader.read(name, dcp::Box{{1 << 20, 0}, {1, 1}}, one); }) == "invalid_argument");
  CHECK(outcome([&] { reader.read(name, dcp::Box{{0}, {1}}, one); }) == "invalid_argument");
  CHECK(outcome([&] { reader.read(name, dcp::Box{{0, 0}, {1, 1}}, one); }) == "invalid_argument");
}
