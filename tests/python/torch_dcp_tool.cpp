// SPDX-License-Identifier: Apache-2.0
// Loads and saves PyTorch's distributed checkpoints for the tests in Python.
//
//   torch_dcp_tool load PLACE TURN FOUND                     whole, and in shards of 1, 2, 3 and 4 ranks, which are compared with it; another TURN, other placements
//   torch_dcp_tool save PLACE RANKS TURN plain|all EXPECTED  tensors of every dtype of PyTorch, values of every kind; `all`: a thousand small tensors, too, and objects
//                                                           that torch.load does not build with weights_only
//   torch_dcp_tool copy FROM PATHS RANKS TURN TO             loads everything into shards and variables of C++, and saves it from them
//
// FOUND and EXPECTED are JSON: {"tensors": {name: {"dtype", "shape", "sha256"}}, "values": {name: {"kind", "json"}}, "paths": {name: [...]}, ...}, and
// EXPECTED.raw has the bytes of the tensors, in the order of "order". PATHS is JSON, too: {name: [the names that it consists of]}.
#include <dcp/dcp.hpp>
#include <dcp/ext/json.hpp>

#include "support/sha256.hpp"
#include "support/some_layout.hpp"
#include "support/whole_tensor.hpp"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <iostream>
#include <limits>
#include <map>
#include <variant>

namespace {

using dcp::DType;
using dcp::test::HeldTensors;
using dcp::test::made_tensor;
using dcp::test::WholeTensor;
using Json = nlohmann::json;
using Paths = std::map<std::string, std::vector<std::string>>;
using Tensors = std::vector<WholeTensor>;

HeldTensors::LayoutOf layouts(Tensors const& tensors, int ranks, int turn) {
  return [&tensors, ranks, turn](WholeTensor const& tensor) { return dcp::test::some_layout(tensor, static_cast<std::size_t>(&tensor - tensors.data()) + static_cast<std::size_t>(turn), ranks); };
}

Json facts(Tensors const& tensors) {
  Json all = Json::object();
  for (auto const& t : tensors) all[t.name] = {{"dtype", to_string(t.dtype)}, {"shape", std::vector<std::int64_t>(t.shape.begin(), t.shape.end())}, {"sha256", dcp::test::sha256(t.bytes)}};
  return all;
}

void write_json(std::string const& file, Json const& json) {
  std::ofstream out{file};
  out << json.dump(1) << '\n';
  if (!out.flush()) throw std::runtime_error{"cannot write " + file};
}

std::string joined(std::vector<std::string> const& path) {
  std::string name = path.front();
  for (std::size_t i = 1; i < path.size(); ++i) name += '.' + path[i];
  return name;
}

/// The same entries in states within states.
dcp::StateDict nested(dcp::StateDict const& flat, Paths const& paths) {
  dcp::StateDict state;
  for (auto const& entry : flat.entries()) {
    auto const at = paths.find(entry.name);
    std::vector<std::string> const path = at == paths.end() ? std::vector{entry.name} : at->second;
    dcp::StateDict one;
    if (entry.tensor) one.add_tensor(path.back(), entry.tensor->dtype, entry.tensor->layout, entry.tensor->memory);
    else one.add_value(path.back(), entry.value);
    for (std::size_t i = path.size() - 1; i-- > 0;) {
      dcp::StateDict outer;
      outer.add(path[i], one);
      one = std::move(outer);
    }
    state.append({}, one);
  }
  return state;
}

// ---- load

Tensors tensors_of(dcp::OwnedState const& whole) {
  Tensors tensors;
  for (auto const& [name, tensor] : whole.tensors()) tensors.push_back({name, tensor.dtype(), tensor.shape(), dcp::Bytes(tensor.bytes().begin(), tensor.bytes().end())});
  return tensors;
}

void load(std::string const& place, int turn, std::string const& found) {
  dcp::SelfComm self;
  auto const whole = dcp::load_from_keys<dcp::TorchDcp>(self, place);
  Tensors const tensors = tensors_of(whole);
  Json json = {{"tensors", facts(tensors)}, {"values", Json::object()}, {"foreign", whole.report().foreign}, {"warnings", whole.report().warnings}};
  for (auto const& [name, value] : whole.values()) json["values"][name] = {{"kind", to_string(value.kind)}, {"json", dcp::to_json(value)}};
  for (int ranks = 1; ranks <= 4; ++ranks) {
    std::atomic<bool> complete{true};
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      HeldTensors held{tensors, layouts(tensors, ranks, turn + ranks), world.rank(), false};
      dcp::load<dcp::TorchDcp>(world, place, held.state, {.on_unexpected = dcp::OnUnexpected::ignore});
      if (!held.complete()) complete = false;
    });
    if (!complete) throw std::runtime_error{"on " + std::to_string(ranks) + " ranks a shard differs from its part of the whole tensor"};
  }
  write_json(found, json);
}

// ---- save

struct Values {
  bool flag = true;
  std::uint8_t u8 = 255;
  std::int8_t i8 = -128;
  std::uint16_t u16 = 65535;
  std::int16_t i16 = -32768;
  std::uint32_t u32 = 4294967295u;
  std::int32_t i32 = std::numeric_limits<std::int32_t>::min();
  std::uint64_t u64 = 18446744073709551615u;
  std::int64_t i64 = std::numeric_limits<std::int64_t>::min();
  std::int64_t beyond_double = 9007199254740993;
  float f32 = 0.1f;
  double f64 = 1e-300, infinite = -std::numeric_limits<double>::infinity(), no_number = std::numeric_limits<double>::quiet_NaN(), minus_zero = -0.0;
  std::string text = "größe \"quoted\" 重み 🚀\n", no_text;
  std::vector<std::byte> bytes, no_bytes;
  std::vector<bool> flags{true, false, true};
  std::vector<std::int32_t> numbers{1, -2, 70000}, no_numbers;
  std::vector<std::uint64_t> naturals{18446744073709551615u, 0};
  std::vector<float> scores{0.5f, -1.25f};
  std::vector<double> reals{0.1, std::numeric_limits<double>::infinity()};
  std::int64_t position;   // of each rank
  std::vector<std::pair<std::string, Json>> json;

  Values(std::int64_t rank, bool all) : position{100 + rank} {
    for (int i = 0; i < 256; ++i) bytes.push_back(static_cast<std::byte>(i));
    for (auto const* const text_of : {
             R"(["none", null])", R"(["true", true])", R"(["list", [1, 2.5, "x", null, [], {}]])", R"(["dict", {"a": {"b": [1, {"c": "größe"}]}, "": 0}])", R"(["empty list", []])", R"(["empty dict", {}])",
             R"(["betas", {"__type__": "tuple", "items": [0.9, 0.999]}])", R"(["empty tuple", {"__type__": "tuple", "items": []}])",
             R"(["tuples", {"__type__": "tuple", "items": [{"__type__": "tuple", "items": [1]}, [{"__type__": "tuple", "items": [null, true]}]]}])",
             R"(["torch size", {"__type__": "torch.Size", "items": [2, 3]}])", R"(["set", {"__type__": "set", "items": [5, 6]}])",
             R"(["some bytes", {"__type__": "bytes", "hex": "00ff80"}])", R"(["bytearray", {"__type__": "bytearray", "hex": "00ff80"}])",
             R"(["infinity", {"__type__": "float", "repr": "-inf"}])", R"(["large", {"__type__": "int", "decimal": "12089258196146291747061"}])",
             R"(["negative", {"__type__": "int", "decimal": "-1267650600228229401496703205376"}])", R"(["int keys", {"__type__": "dict", "items": [[1, 2.5], ["a", null]]}])",
             R"(["dtype", {"__type__": "torch.dtype", "name": "bfloat16"}])", R"(["device", {"__type__": "torch.device", "name": "cpu"}])", R"(["complex", {"__type__": "complex", "re": 1.5, "im": -2.0}])",
             R"(["tensor", {"__type__": "tensor", "dtype": "I16", "shape": [2, 1], "hex": "0100ffff"}])",
             R"(["tensors", {"__type__": "tuple", "items": [{"__type__": "tensor", "dtype": "F32", "shape": [], "hex": "0000c03f"}, {"__type__": "tensor", "dtype": "F8_E4M3", "shape": [2], "hex": "3840"}]}])",
         })
      add(text_of);
    if (!all) return;
    add(R"(["stream", {"__type__": "io.BytesIO", "hex": "00ff80", "pos": 2}])");
    add(R"(["frozenset", {"__type__": "frozenset", "items": [7]}])");
  }
  void add(std::string_view name_and_value) {
    auto const pair = Json::parse(name_and_value);
    json.emplace_back(pair[0], pair[1]);
  }
  void add_to(dcp::StateDict& state) {
    state.add("flag", flag).add("u8", u8).add("i8", i8).add("u16", u16).add("i16", i16).add("u32", u32).add("i32", i32).add("u64", u64).add("i64", i64).add("beyond double", beyond_double).add("f32", f32).add("f64", f64);
    state.add("infinite", infinite).add("no number", no_number).add("minus zero", minus_zero).add("text", text).add("no text", no_text).add("bytes", bytes).add("no bytes", no_bytes).add("flags", flags);
    state.add("numbers", numbers).add("no numbers", no_numbers).add("naturals", naturals).add("scores", scores).add("reals", reals).add("position", dcp::per_rank(position));
    for (auto& [name, value] : json) state.add(name, value);
  }
};

void save(std::string const& place, int ranks, int turn, bool all, std::string const& expected) {
  Tensors tensors;
  Paths paths;
  auto const add = [&](std::string const& name, DType dtype, dcp::Extents const& shape) {
    std::vector<std::vector<std::string>> const choices{{name}, {"model", name}, {"optimizer", "state", name, "exp_avg"}, {"trainer.parts", name}};
    auto const& path = choices[tensors.size() % choices.size()];
    tensors.push_back(made_tensor(joined(path), dtype, shape));
    paths[tensors.back().name] = path;
  };
  for (int i = 0; i < dcp::dtype_count; ++i) {
    auto const dtype = static_cast<DType>(i);
    if (dtype == DType::f6_e2m3 || dtype == DType::f6_e3m2) continue;
    std::string const name{to_string(dtype)};
    add(name + ".matrix", dtype, {7, 8});
    add(name + ".few_rows", dtype, {2, 16});
    if (dtype == DType::f4) continue;
    add(name + ".vector", dtype, {11});
    add(name + ".cube", dtype, {3, 5, 4});
    add(name + ".scalar", dtype, {});
    add(name + ".one", dtype, {1, 1});
    add(name + ".empty", dtype, {0, 4});
  }
  add("layers.0.self_attn.q_proj.weight", DType::bf16, {300, 257});
  add("größe.重み 🚀 \"quoted\\\"", DType::f32, {5});
  if (all)
    for (int i = 0; i < 1100; ++i) add("many." + std::to_string(i), DType::i16, {3});
  // One tensor under three names, in its memory and declared.
  WholeTensor const embedding = made_tensor("tied.embed.weight", DType::bf16, {30, 7});
  tensors.push_back(embedding);
  paths[embedding.name] = {"tied", "embed.weight"};
  paths["tied.head.weight"] = {"tied", "head.weight"};
  Values names{0, all};
  dcp::StateDict of_values;
  names.add_to(of_values);
  std::size_t turn_of_name = 0;
  for (auto const& entry : of_values.entries()) {
    if (++turn_of_name % 3 == 0) continue;
    paths["values." + entry.name] = {"values", entry.name};
  }
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    HeldTensors held{tensors, layouts(tensors, ranks, turn), world.rank(), true};
    Values values{world.rank(), all};
    dcp::StateDict with_values;
    values.add_to(with_values);
    for (auto const& entry : with_values.entries()) held.state.add_value("values." + entry.name, entry.value);
    dcp::TensorEntry const& tied = *std::find_if(held.state.entries().begin(), held.state.entries().end(), [&](auto const& entry) { return entry.name == embedding.name; })->tensor;
    held.state.add_tensor("tied.head.weight", tied.dtype, tied.layout, tied.memory);
    dcp::StateDict state = nested(held.state, paths);
    state.tie("declared", embedding.name);
    dcp::save<dcp::TorchDcp>(world, place, state);
  });
  for (auto const* const name : {"tied.head.weight", "declared"}) {
    tensors.push_back(embedding);
    tensors.back().name = name;
  }
  Json json = {{"tensors", facts(tensors)}, {"paths", paths}, {"order", Json::array()}};
  std::ofstream raw{expected + ".raw", std::ios::binary};
  for (auto const& tensor : tensors) {
    json["order"].push_back(tensor.name);
    raw.write(reinterpret_cast<char const*>(tensor.bytes.data()), static_cast<std::streamsize>(tensor.bytes.size()));
  }
  if (!raw.flush()) throw std::runtime_error{"cannot write " + expected + ".raw"};
  write_json(expected, json);
}

// ---- copy

using Variable = std::variant<bool, std::int64_t, double, std::string, std::vector<std::byte>, std::vector<bool>, std::vector<std::int64_t>, std::vector<double>, nlohmann::ordered_json>;

Variable variable_for(std::string const& name, dcp::Value const& value) {
  bool const array = value.kind == dcp::ValueKind::array;
  if (value.kind == dcp::ValueKind::number || array) {
    if (value.dtype == DType::boolean) return array ? Variable{std::vector<bool>{}} : Variable{false};
    if (value.dtype == DType::i64) return array ? Variable{std::vector<std::int64_t>{}} : Variable{std::int64_t{}};
    if (value.dtype == DType::f64) return array ? Variable{std::vector<double>{}} : Variable{0.0};
  }
  if (value.kind == dcp::ValueKind::text) return std::string{};
  if (value.kind == dcp::ValueKind::bytes) return std::vector<std::byte>{};
  if (value.kind == dcp::ValueKind::json) return nlohmann::ordered_json{};
  throw std::runtime_error{name + ": a " + std::string{to_string(value.kind)} + " of " + std::string{to_string(value.dtype)} + " in a checkpoint of PyTorch"};
}

void copy(std::string const& from, std::string const& paths_file, int ranks, int turn, std::string const& to) {
  dcp::SelfComm self;
  auto const whole = dcp::load_from_keys<dcp::TorchDcp>(self, from);
  Tensors const tensors = tensors_of(whole);
  Paths const paths = Json::parse(std::ifstream{paths_file}).get<Paths>();
  std::atomic<bool> complete{true};
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    HeldTensors held{tensors, layouts(tensors, ranks, turn), world.rank(), false};
    std::deque<Variable> variables;
    for (auto const& [name, value] : whole.values()) std::visit([&, &name = name](auto& variable) { held.state.add(name, variable); }, variables.emplace_back(variable_for(name, value)));
    dcp::load<dcp::TorchDcp>(world, from, held.state);
    if (!held.complete()) complete = false;
    dcp::save<dcp::TorchDcp>(world, to, nested(held.state, paths));
  });
  if (!complete) throw std::runtime_error{"a shard differs from its part of the whole tensor"};
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> const arguments(argv + 1, argv + argc);
  auto const is = [&](char const* command, std::size_t count) { return arguments.size() == count && arguments[0] == command; };
  auto const number = [&](std::size_t at) { return std::atoi(arguments[at].c_str()); };
  try {
    if (is("load", 4)) load(arguments[1], number(2), arguments[3]);
    else if (is("save", 6)) save(arguments[1], number(2), number(3), arguments[4] == "all", arguments[5]);
    else if (is("copy", 6)) copy(arguments[1], arguments[2], number(3), number(4), arguments[5]);
    else return std::cerr << "usage: see the first lines of torch_dcp_tool.cpp\n", 2;
  } catch (std::exception const& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
