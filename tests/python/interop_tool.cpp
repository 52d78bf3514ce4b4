// SPDX-License-Identifier: Apache-2.0
// Saves and loads for the tests in Python, and says what it saved and loaded.
//
//   interop_tool write final|sharded safetensors|torch DIRECTORY RANKS FILE_BYTES EXPECTED   tensors of the dtypes that this library can read
//   interop_tool write-model DIRECTORY RANKS FILE_BYTES EXPECTED                             a trainer's state: groups, tied weights, values
//   interop_tool write-golden final|sharded DIRECTORY                                        golden/own; once per version of the format
//   interop_tool load PLACE RANKS FOUND                                                      whole and in shards, which are compared
//
// EXPECTED and FOUND are JSON: {"tensors": {name: {"dtype", "shape", "sha256"}}, "values": {...}, ...}.
#include <dcp/dcp.hpp>

#include "support/golden_state.hpp"
#include "support/sha256.hpp"
#include "support/some_layout.hpp"
#include "support/whole_tensor.hpp"

#include <atomic>
#include <cstdlib>
#include <fstream>
#include <iostream>

namespace {

using dcp::DType;
using dcp::test::HeldTensors;
using dcp::test::layouts;
using dcp::test::made_tensor;
using dcp::test::WholeTensor;
using Tensors = std::vector<WholeTensor>;

nlohmann::json facts(DType dtype, dcp::Extents const& shape, dcp::ConstByteSpan bytes) {
  return {{"dtype", to_string(dtype)}, {"shape", std::vector<std::int64_t>(shape.begin(), shape.end())}, {"sha256", dcp::test::sha256(bytes)}};
}
nlohmann::json facts(Tensors const& tensors) {
  nlohmann::json all = nlohmann::json::object();
  for (auto const& t : tensors) all[t.name] = facts(t.dtype, t.shape, t.bytes);
  return all;
}
void write_json(std::string const& file, nlohmann::json const& json) {
  std::ofstream out{file};
  out << json.dump(1) << '\n';
  if (!out.flush()) throw std::runtime_error{"cannot write " + file};
}

void write(dcp::FileLayout layout, std::string const& reader, std::string const& directory, int ranks, std::uint64_t file_bytes, std::string const& expected) {
  Tensors tensors;
  for (int i = 0; i < dcp::safetensors_dtype_count; ++i) {
    auto const dtype = static_cast<DType>(i);
    std::string const name{to_string(dtype)};
    bool const torch = reader == "torch";
    if (dtype == DType::f6_e2m3 || dtype == DType::f6_e3m2 || (torch && (dtype == DType::f4 || dtype == DType::f8_e8m0))) continue;
    tensors.push_back(made_tensor(name + ".matrix", dtype, {7, 8}));
    tensors.push_back(made_tensor(name + ".few_rows", dtype, {2, 16}));
    if (dtype == DType::f4) continue;
    tensors.push_back(made_tensor(name + ".vector", dtype, {11}));
    tensors.push_back(made_tensor(name + ".cube", dtype, {3, 5, 4}));
    tensors.push_back(made_tensor(name + ".scalar", dtype, {}));
    tensors.push_back(made_tensor(name + ".one", dtype, {1, 1}));
    tensors.push_back(made_tensor(name + ".empty", dtype, {0, 4}));
  }
  tensors.push_back(made_tensor("model.layers.0.self_attn.q_proj.weight", DType::bf16, {300, 257}));
  tensors.push_back(made_tensor("größe.重み 🚀 \"quoted\\\"", DType::f32, {5}));
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    HeldTensors held{tensors, layouts(tensors, ranks), world.rank(), true};
    dcp::save<dcp::SafeTensors>(world, directory, held.state, {.storage = {.layout = layout, .max_file_bytes = file_bytes}});
  });
  write_json(expected, {{"tensors", facts(tensors)}});
}

void write_model(std::string const& directory, int ranks, std::uint64_t file_bytes, std::string const& expected) {
  Tensors const tensors{made_tensor("model.embed_tokens.weight", DType::bf16, {50, 16}), made_tensor("model.layers.0.q_proj.weight", DType::bf16, {16, 16}), made_tensor("model.norm.weight", DType::f32, {16}),
                        made_tensor("optimizer.model.embed_tokens.weight.exp_avg", DType::f32, {50, 16})};
  std::ofstream{expected + ".config.json"} << "{\"tie_word_embeddings\": true}";
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    HeldTensors held{tensors, layouts(tensors, ranks), world.rank(), true};
    held.state.tie("model.lm_head.weight", "model.embed_tokens.weight");
    std::int64_t step = 7;
    held.state.add("step", step);
    dcp::SafeTensorsOptions storage;
    storage.max_file_bytes = file_bytes;
    storage.groups = {{"model", ".", dcp::Prefix::strip}, {"optimizer", "optimizer"}};
    storage.extra_files = {expected + ".config.json"};
    dcp::save<dcp::SafeTensors>(world, directory, held.state, {.storage = storage});
  });
  nlohmann::json model = nlohmann::json::object();
  for (auto const& t : tensors)
    if (t.name.starts_with("model.")) model[t.name.substr(6)] = facts(t.dtype, t.shape, t.bytes);
  write_json(expected, {{"tensors", model}, {"tied", {{"lm_head.weight", "embed_tokens.weight"}}}, {"optimizer", facts({tensors[3]})}, {"all", facts(tensors)}});
}

void write_golden(dcp::FileLayout layout, std::string const& directory) {
  namespace v1 = dcp::test::golden_v1;
  auto const tensors = v1::tensors();
  dcp::run_threads(v1::ranks, [&](dcp::ThreadComm& world) {
    HeldTensors held{tensors, v1::layout_of, world.rank(), true};
    auto values = v1::Values::filled(world.rank());
    held.state.tie(v1::tie.first, v1::tie.second).add("values", values);
    dcp::save<dcp::SafeTensors>(world, directory + "/ckpt", held.state, {.storage = v1::options(layout)});
  });
  dcp::SelfComm self;
  auto const back = dcp::load_from_keys<dcp::SafeTensors>(self, directory + "/ckpt");
  nlohmann::json values = nlohmann::json::object();
  for (auto const& [name, value] : back.values()) {
    auto const text = dcp::to_json(value);
    values[name] = {{"kind", to_string(value.kind)}, {"sha256", dcp::test::sha256(dcp::as_byte_span(text))}};
    if (text.size() < 1000) values[name]["json"] = text;   // for people
  }
  write_json(directory + "/expected.json", {{"format", 1}, {"tensors", facts(tensors)}, {"tied", {{v1::tie.first, v1::tie.second}}}, {"values", values}});
}

void load(std::string const& place, int ranks, std::string const& found) {
  dcp::SelfComm self;
  auto const whole = dcp::load_from_keys<dcp::SafeTensors>(self, place);
  nlohmann::json json = {{"tensors", nlohmann::json::object()}, {"values", nlohmann::json::object()}, {"foreign", whole.report().foreign}, {"warnings", whole.report().warnings}, {"duplicates", whole.report().duplicates}};
  Tensors tensors;
  for (auto const& [name, tensor] : whole.tensors()) {
    json["tensors"][name] = facts(tensor.dtype(), tensor.shape(), tensor.bytes());
    tensors.push_back({name, tensor.dtype(), tensor.shape(), dcp::Bytes(tensor.bytes().begin(), tensor.bytes().end())});
  }
  for (auto const& [name, value] : whole.values()) json["values"][name] = dcp::to_json(value);
  std::atomic<bool> complete{true};
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    HeldTensors held{tensors, layouts(tensors, ranks), world.rank(), false};
    dcp::load<dcp::SafeTensors>(world, place, held.state, {.on_unexpected = dcp::OnUnexpected::ignore});
    if (!held.complete()) complete = false;
  });
  if (!complete) throw std::runtime_error{"a shard differs from its part of the whole tensor"};
  write_json(found, json);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> const arguments(argv + 1, argv + argc);
  auto const is = [&](char const* command, std::size_t count) { return arguments.size() == count && arguments[0] == command; };
  auto const number = [&](std::size_t at) { return std::atoi(arguments[at].c_str()); };
  auto const layout = [&] { return arguments[1] == "final" ? dcp::FileLayout::final : dcp::FileLayout::sharded; };
  try {
    if (is("write", 7)) write(layout(), arguments[2], arguments[3], number(4), static_cast<std::uint64_t>(number(5)), arguments[6]);
    else if (is("write-model", 5)) write_model(arguments[1], number(2), static_cast<std::uint64_t>(number(3)), arguments[4]);
    else if (is("write-golden", 3)) write_golden(layout(), arguments[2]);
    else if (is("load", 4)) load(arguments[1], number(2), arguments[3]);
    else return std::cerr << "usage: see the first lines of interop_tool.cpp\n", 2;
  } catch (std::exception const& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
