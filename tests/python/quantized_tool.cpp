// SPDX-License-Identifier: Apache-2.0
// Quantizes and reads quantized checkpoints for the tests in Python.
//
//   quantized_tool save SCHEME IN PLACE RANKS     the tensors of IN, a .safetensors file, in shards; those named "q." and more are quantized.
//                                                 SCHEME: fp8_block, mxfp4 and so on, or gguf:Q8_0 and so on, or gguf:
//   quantized_tool load KIND PLACE RANKS DTYPE OUT FOUND   KIND: safetensors or gguf. Whole and in shards, which are compared; quantized tensors become DTYPE.
//                                                 The directory OUT gets them in plain safetensors
//
// FOUND is JSON: {"schemes": {name: scheme}, "values": {name: JSON text}, "warnings": [...]}. A GGUF file gets the values of `metadata`.
#include <dcp/dcp.hpp>
#include <dcp/ext/json.hpp>

#include "support/some_layout.hpp"
#include "support/whole_tensor.hpp"

#include <nlohmann/json.hpp>

#include <atomic>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <limits>

namespace {

using dcp::DType;
using dcp::test::HeldTensors;
using dcp::test::layouts;
using dcp::test::WholeTensor;
using Tensors = std::vector<WholeTensor>;

constexpr std::string_view gguf_prefix = "gguf:";

struct Metadata {
  bool flag = true;
  std::uint8_t u8 = 255;
  std::int8_t i8 = -128;
  std::uint16_t u16 = 65535;
  std::int16_t i16 = -32768;
  std::uint32_t u32 = 4294967295u;
  std::int32_t i32 = std::numeric_limits<std::int32_t>::min();
  std::uint64_t u64 = 18446744073709551615u;
  std::int64_t i64 = std::numeric_limits<std::int64_t>::min();
  float f32 = 0.1f;
  double f64 = 1e-300;
  std::string architecture = "llama", text = "größe \"quoted\" 重み";
  std::vector<bool> flags{true, false, true};
  std::vector<std::int32_t> numbers{1, -2, 3};
  std::vector<float> scores{0.5f, -1.25f};
  nlohmann::json tokens = nlohmann::json::array({"<s>", "größe", ""});
  nlohmann::json other = nlohmann::json::object({{"no", "type of GGUF"}});

  void add_to(dcp::StateDict& state) {
    state.add("general.architecture", architecture).add("test.text", text).add("test.bool", flag).add("test.u8", u8).add("test.i8", i8).add("test.u16", u16).add("test.i16", i16).add("test.u32", u32).add("test.i32", i32);
    state.add("test.u64", u64).add("test.i64", i64).add("test.f32", f32).add("test.f64", f64).add("test.flags", flags).add("test.numbers", numbers).add("test.scores", scores).add("tokenizer.ggml.tokens", tokens).add("test.other", other);
  }
};

Tensors read_all(std::string const& file) {
  dcp::SelfComm self;
  auto const state = dcp::load_from_keys<dcp::SafeTensors>(self, file);
  Tensors tensors;
  for (auto const& [name, tensor] : state.tensors()) tensors.push_back({name, tensor.dtype(), tensor.shape(), dcp::Bytes(tensor.bytes().begin(), tensor.bytes().end())});
  return tensors;
}

bool is_marked(std::string_view name, DType, dcp::Extents const&) { return name.starts_with("q."); }

template <class S>
void save(dcp::SaveOptions<S> const& options, std::string const& in, std::string const& place, int ranks) {
  Tensors const tensors = read_all(in);
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    HeldTensors held{tensors, layouts(tensors, ranks), world.rank(), true};
    Metadata metadata;
    if constexpr (std::is_same_v<S, dcp::Gguf>) metadata.add_to(held.state);
    dcp::save<S>(world, place, held.state, options);
  });
}
template <class Scheme>
void save_quantized(std::string const& in, std::string const& place, int ranks) {
  using S = dcp::Quantized<Scheme, dcp::SafeTensors>;
  dcp::SaveOptions<S> options;
  options.storage.base.max_file_bytes = 100'000;
  options.storage.quantize = is_marked;
  options.storage.group = 32;
  save<S>(options, in, place, ranks);
}
void save(std::string const& scheme, std::string const& in, std::string const& place, int ranks) {
  if (scheme.starts_with(gguf_prefix)) return save<dcp::Gguf>({.storage = {.quantize_to = scheme.substr(gguf_prefix.size()), .quantize = is_marked}}, in, place, ranks);
  if (scheme == "fp8_block") return save_quantized<dcp::Fp8Block<>>(in, place, ranks);
  if (scheme == "fp8_tensor") return save_quantized<dcp::Fp8Tensor>(in, place, ranks);
  if (scheme == "fp8_channel") return save_quantized<dcp::Fp8Channel>(in, place, ranks);
  if (scheme == "mxfp8") return save_quantized<dcp::Mxfp8>(in, place, ranks);
  if (scheme == "mxfp4") return save_quantized<dcp::Mxfp4>(in, place, ranks);
  if (scheme == "nvfp4") return save_quantized<dcp::Nvfp4>(in, place, ranks);
  if (scheme == "int8_channel") return save_quantized<dcp::Int8Channel>(in, place, ranks);
  if (scheme == "int8_group") return save_quantized<dcp::Int8Group>(in, place, ranks);
  if (scheme == "int4_packed") return save_quantized<dcp::Int4Packed>(in, place, ranks);
  if (scheme == "gptq") return save_quantized<dcp::Gptq>(in, place, ranks);
  throw std::runtime_error{"no such scheme: " + scheme};
}

template <class S>
void load(std::string const& place, int ranks, DType dtype, std::string const& out, std::string const& found) {
  dcp::SelfComm self;
  auto const contents = dcp::contents<S>(self, place);
  nlohmann::json json = {{"schemes", nlohmann::json::object()}, {"values", nlohmann::json::object()}, {"warnings", contents.warnings}};
  Tensors tensors;
  for (auto const& tensor : contents.tensors) {
    if (!tensor.scheme.empty()) json["schemes"][tensor.name] = tensor.scheme;
    DType const wanted = tensor.scheme.empty() ? tensor.dtype : dtype;
    auto& whole = tensors.emplace_back(WholeTensor{tensor.name, wanted, tensor.shape, dcp::Bytes(static_cast<std::size_t>(dcp::bytes_of(wanted, tensor.shape.elements())), std::byte{0xEE})});
    whole.bytes.reserve(1);
  }
  for (auto const& [name, value] : contents.values) json["values"][name] = dcp::to_json(value);
  dcp::StateDict state;
  for (auto& tensor : tensors) state.add_tensor(tensor.name, tensor.dtype, dcp::plain_layout(tensor.shape), {tensor.bytes.data(), dcp::row_major_strides(tensor.shape)});
  dcp::load<S>(self, place, state, {.on_unexpected = dcp::OnUnexpected::ignore});
  std::atomic<bool> complete{true};
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    HeldTensors held{tensors, layouts(tensors, ranks), world.rank(), false};
    dcp::load<S>(world, place, held.state, {.on_unexpected = dcp::OnUnexpected::ignore});
    if (!held.complete()) complete = false;
  });
  if (!complete) throw std::runtime_error{"a shard differs from its part of the whole tensor"};
  dcp::save<dcp::SafeTensors>(self, out, state, {.if_exists = dcp::IfExists::replace});
  std::ofstream file{found};
  file << json.dump(1) << '\n';
  if (!file.flush()) throw std::runtime_error{"cannot write " + found};
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> const arguments(argv + 1, argv + argc);
  auto const is = [&](char const* command, std::size_t count) { return arguments.size() == count && arguments[0] == command; };
  auto const number = [&](std::size_t at) { return std::atoi(arguments[at].c_str()); };
  try {
    if (is("save", 5)) {
      save(arguments[1], arguments[2], arguments[3], number(4));
    } else if (is("load", 7)) {
      DType dtype{};
      if (!dcp::parse_dtype(arguments[4], dtype)) throw std::runtime_error{"no such dtype: " + arguments[4]};
      if (arguments[1] == "gguf") load<dcp::Gguf>(arguments[2], number(3), dtype, arguments[5], arguments[6]);
      else load<dcp::Quantized<dcp::AnyScheme, dcp::SafeTensors>>(arguments[2], number(3), dtype, arguments[5], arguments[6]);
    } else {
      return std::cerr << "usage: see the first lines of quantized_tool.cpp\n", 2;
    }
  } catch (std::exception const& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
