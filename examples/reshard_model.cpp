// SPDX-License-Identifier: Apache-2.0
// test: {source}/tests/golden/hf/transformers_index/ckpt {tmp}
// test: {model} {tmp}
//
// A published Hugging Face model, cut over ranks, written again, and compared.
//
//   reshard_model MODEL OUT      MODEL: a directory with *.safetensors; OUT/4-ranks and OUT/3-ranks are made, or replaced
//
// The program knows nothing about the model: names, dtypes and shapes come from its files. Four ranks load it, each a part of the rows
// of each tensor, and save it; three ranks load that by columns and save it again. Every tensor must come out as it went in, bit for bit.
#include <dcp/dcp.hpp>

#include <algorithm>
#include <cstddef>
#include <deque>
#include <filesystem>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Rows = dcp::Placement<dcp::Shard<0>>;
using Columns = dcp::Placement<dcp::Shard<1>>;
using Whole = dcp::Placement<dcp::Replicate>;

/// Tensors that are known only at run time: this rank's part of each, and the state that views them.
class Shards {
 public:
  Shards(dcp::DeviceMesh<1> const& mesh, dcp::OwnedState const& model, bool by_columns) {
    for (auto const& [name, tensor] : model.tensors()) {
      dcp::Extents const& shape = tensor.shape();
      dcp::Layout const layout = shape.rank() == 0                 ? dcp::layout_of<Whole>(mesh, shape)
                                 : by_columns && shape.rank() > 1 ? dcp::layout_of<Columns>(mesh, shape)
                                                                  : dcp::layout_of<Rows>(mesh, shape);
      dcp::Box const box = *dcp::box_of_rank(layout, mesh.rank());
      auto& bytes = memory_.emplace_back(static_cast<std::size_t>(dcp::bytes_of(tensor.dtype(), box.shape.elements())));
      state_.add_tensor(name, tensor.dtype(), layout, {bytes.data(), dcp::row_major_strides(box.shape)});
    }
  }
  dcp::StateDict& state() { return state_; }

 private:
  std::deque<std::vector<std::byte>> memory_;
  dcp::StateDict state_;
};

/// What lies beside the weights and belongs to the model: its configuration, its tokenizer, its card. (Not what lies in subfolders.)
std::vector<std::filesystem::path> companions(std::filesystem::path const& model) {
  std::vector<std::filesystem::path> files;
  for (auto const& entry : std::filesystem::directory_iterator{model}) {
    auto const name = entry.path().filename().string(), kind = entry.path().extension().string();
    bool const ours = name.ends_with(".safetensors.index.json") || name == "dcp.json";
    if (entry.is_regular_file() && !ours && (kind == ".json" || kind == ".txt" || kind == ".model" || kind == ".md")) files.push_back(entry.path());
  }
  std::ranges::sort(files);
  return files;
}

void load_and_save(int ranks, bool by_columns, dcp::OwnedState const& model, std::filesystem::path const& from, std::filesystem::path const& to,
                   std::vector<std::filesystem::path> const& extra_files) {
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    dcp::DeviceMesh<1> mesh{world, {ranks}};
    Shards shards{mesh, model, by_columns};
    auto const loaded = dcp::load<dcp::SafeTensors>(world, from, shards.state());
    auto const saved = dcp::save<dcp::SafeTensors>(world, to, shards.state(), {.if_exists = dcp::IfExists::replace, .storage = {.extra_files = extra_files}});
    if (world.rank() == 0) std::cout << loaded << '\n' << saved << '\n';
  });
}

std::size_t compare(dcp::OwnedState const& want, dcp::OwnedState const& got) {
  if (want.tensors().size() != got.tensors().size()) throw std::runtime_error("tensors were lost or added");
  std::size_t bytes = 0;
  for (auto const& [name, tensor] : want.tensors()) {
    auto const& other = got.tensors().at(name);
    if (tensor.dtype() != other.dtype() || !(tensor.shape() == other.shape()) || !std::ranges::equal(tensor.bytes(), other.bytes()))
      throw std::runtime_error(name + " differs");
    bytes += tensor.bytes().size();
  }
  return bytes;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 3) throw std::runtime_error("usage: reshard_model MODEL OUT");
  std::filesystem::path const from = argv[1], out = argv[2];
  dcp::SelfComm self;
  auto const model = dcp::load_from_keys<dcp::SafeTensors>(self, from);
  auto const extra_files = companions(from);

  load_and_save(4, false, model, from, out / "4-ranks", extra_files);
  load_and_save(3, true, model, out / "4-ranks", out / "3-ranks", extra_files);

  auto const bytes = compare(model, dcp::load_from_keys<dcp::SafeTensors>(self, out / "4-ranks"));
  compare(model, dcp::load_from_keys<dcp::SafeTensors>(self, out / "3-ranks"));
  std::cout << model.tensors().size() << " tensors, " << bytes
            << " bytes: the same after 4 ranks by rows and 3 ranks by columns, and "
            << extra_files.size() << " other files came along\n";
} catch (std::exception const& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
