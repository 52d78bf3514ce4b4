// SPDX-License-Identifier: Apache-2.0
// test: --make {tmp}/model 3
// test: --columns --make {tmp}/model 4
// test: {source}/tests/golden/gguf/all_types 2
// test: --columns {source}/tests/golden/gguf/split 3
// test: {source}/tests/golden/hf/transformers_index/ckpt 2
//
// Loads a quantized model onto ranks, and shows that each reads only what its own part needs.
//
//   load_quantized [--columns] [--make] MODEL RANKS [NAME...]
//
//   MODEL       a Hugging Face directory (FP8, MXFP4, NVFP4, INT8, INT4, GPTQ, AWQ, bitsandbytes, or not quantized), or a .gguf file or the directory of one
//   RANKS       threads of this program, each of which takes a part of the rows of every tensor
//   NAME        only tensors of this name, or below it; without one all
//   --columns   a part of the columns instead, of what has any
//   --make      writes a small model in FP8 to MODEL first, or replaces the one that is there
//
// The program knows nothing about the model: names, shapes and schemes come from its headers. It loads one tensor at a time, so that it can say
// what was read for which, and so that models larger than the memory pass through; a trainer loads all of them with one call.
#include <dcp/dcp.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iostream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace {

using Rows = dcp::Placement<dcp::Shard<0>>;
using Columns = dcp::Placement<dcp::Shard<1>>;
using Whole = dcp::Placement<dcp::Replicate>;
using Quantized = dcp::Quantized<dcp::AnyScheme, dcp::SafeTensors>;

struct Arguments {
  std::filesystem::path model;
  int ranks = 0;
  std::vector<std::string> names;
  bool columns = false, make = false;
};

Arguments parse(std::vector<std::string> const& words) {
  Arguments arguments;
  std::vector<std::string> rest;
  for (auto const& word : words) {
    if (word == "--columns") arguments.columns = true;
    else if (word == "--make") arguments.make = true;
    else rest.push_back(word);
  }
  if (rest.size() >= 2 && rest[1].size() < 4 && !rest[1].empty() && std::ranges::all_of(rest[1], [](char c) { return c >= '0' && c <= '9'; })) arguments.ranks = std::stoi(rest[1]);
  if (arguments.ranks == 0) throw std::runtime_error("usage: load_quantized [--columns] [--make] MODEL RANKS [NAME...]; the first lines of load_quantized.cpp say more");
  arguments.model = rest[0];
  arguments.names.assign(rest.begin() + 2, rest.end());
  return arguments;
}

/// A model of two layers, quantized while it is saved: matrices to FP8 in blocks of 128 x 128, the rest as it is.
void make(std::filesystem::path const& place, int ranks) {
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    dcp::DeviceMesh<1> mesh{world, {ranks}};
    auto const filled = [&](dcp::Extents const& shape, float scale) {
      std::vector<dcp::bf16> memory(dcp::local_box<Rows>(mesh, shape).size());
      for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = dcp::bf16{scale * std::sin(static_cast<float>(i + memory.size() * static_cast<std::size_t>(world.rank())))};
      return memory;
    };
    auto up0 = filled({512, 300}, 0.1f), down0 = filled({300, 512}, 0.2f), up1 = filled({512, 300}, 3.f), down1 = filled({300, 512}, 4.f), norm = filled({300}, 1.f);
    dcp::ShardedTensor<dcp::bf16, Rows> const u0{mesh, {512, 300}, up0}, d0{mesh, {300, 512}, down0}, u1{mesh, {512, 300}, up1}, d1{mesh, {300, 512}, down1}, n{mesh, {300}, norm};
    dcp::save<dcp::Quantized<dcp::Fp8Block<128, 128>, dcp::SafeTensors>>(
        world, place, {{"layers.0.up.weight", u0}, {"layers.0.down.weight", d0}, {"layers.1.up.weight", u1}, {"layers.1.down.weight", d1}, {"norm.weight", n}}, {.if_exists = dcp::IfExists::replace});
  });
}

bool is_gguf(std::filesystem::path const& place) {
  if (!std::filesystem::is_directory(place)) return place.extension() == ".gguf";
  return std::ranges::any_of(std::filesystem::directory_iterator{place}, [](auto const& entry) { return entry.path().extension() == ".gguf"; });
}

bool wanted(std::string_view name, std::vector<std::string> const& names) {
  return names.empty() || std::ranges::any_of(names, [&](std::string const& prefix) { return name.starts_with(prefix) && (name.size() == prefix.size() || name[prefix.size()] == '.'); });
}

template <class S>
void load(Arguments const& arguments) {
  dcp::run_threads(arguments.ranks, [&](dcp::ThreadComm& world) {
    dcp::DeviceMesh<1> mesh{world, {arguments.ranks}};
    auto const contents = dcp::contents<S>(world, arguments.model);   // the same on all ranks
    std::uint64_t tensors = 0, stored = 0, held = 0, read = 0;
    for (auto const& tensor : contents.tensors) {
      if (!wanted(tensor.name, arguments.names)) continue;
      dcp::Extents const& shape = tensor.shape;
      // What is quantized becomes bfloat16; what is not stays what it is.
      dcp::DType const dtype = tensor.scheme.empty() ? tensor.dtype : dcp::DType::bf16;
      dcp::Layout const layout = shape.rank() == 0                          ? dcp::layout_of<Whole>(mesh, shape)
                                 : arguments.columns && shape.rank() > 1 ? dcp::layout_of<Columns>(mesh, shape)
                                                                           : dcp::layout_of<Rows>(mesh, shape);
      dcp::Box const box = *dcp::box_of_rank(layout, mesh.rank());
      std::vector<std::byte> memory(static_cast<std::size_t>(dcp::bytes_of(dtype, box.shape.elements())));
      dcp::StateDict state;
      state.add_tensor(tensor.name, dtype, layout, {memory.data(), dcp::row_major_strides(box.shape)});
      auto const report = dcp::load<S>(world, arguments.model, state, {.on_unexpected = dcp::OnUnexpected::ignore});
      ++tensors, stored += tensor.stored_bytes, held += dcp::bytes_of(dtype, shape.elements());
      if (world.rank() != 0) continue;

      std::cout << tensor.name << ' ' << shape << "  " << (tensor.scheme.empty() ? std::string{to_string(tensor.dtype)} : tensor.scheme) << ", " << dcp::human_bytes(tensor.stored_bytes) << " stored\n";
      for (auto const& phase : report.phases) {
        if (phase.name != "read") continue;
        for (int rank = 0; rank < arguments.ranks; ++rank) {
          auto const bytes = phase.ranks[static_cast<std::size_t>(rank)].bytes;
          read += bytes;
          std::cout << "    rank " << rank << " holds " << *dcp::box_of_rank(layout, rank) << ", read " << dcp::human_bytes(bytes) << '\n';
        }
      }
    }
    if (world.rank() != 0) return;
    for (auto const& warning : contents.warnings) std::cout << "warning: " << warning << '\n';
    std::cout << tensors << " tensors, " << dcp::human_bytes(stored) << " stored, " << dcp::human_bytes(read) << " read by all ranks, " << dcp::human_bytes(held) << " in memory\n";
  });
}

}  // namespace

int main(int argc, char** argv) try {
  Arguments const arguments = parse({argv + 1, argv + argc});
  if (arguments.make) make(arguments.model, arguments.ranks);
  if (is_gguf(arguments.model)) load<dcp::Gguf>(arguments);
  else load<Quantized>(arguments);
} catch (std::exception const& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
