// SPDX-License-Identifier: Apache-2.0
// test: {tmp}
//
// Tensors that only some ranks have: the layers of pipeline stages, and experts. Saved by 8 ranks, then loaded and saved by 4, 1 and 3,
// each with other stages and other owners of the experts. The checkpoint does not know how many ranks wrote it. Ranks are threads here.
//
//   pipeline_experts DIR
#include <dcp/dcp.hpp>

#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <iostream>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr std::int64_t layers = 6, experts = 10, width = 32, vocabulary = 100;

using Pipeline = dcp::Axes<struct stage, struct ep>;
using SplitInStage = dcp::Placement<dcp::Shard<0>>;     // on the mesh of one stage
using OfOneRank = dcp::Placement<>;                     // on the mesh of one rank: no axes, no rules

/// A model whose layers are spread over the stages of a pipeline. Within a stage the ranks share the attention weights, and each
/// expert lives on one of them.
class Model {
 public:
  explicit Model(dcp::DeviceMesh<2> const& mesh) {
    auto const stages = mesh.extent(Pipeline::index<stage>), owners = mesh.extent(Pipeline::index<ep>);
    for (std::int64_t layer = 0; layer < layers; ++layer) {
      auto const at = layer * stages / layers;                                        // the stage of the layer
      auto const name = "layers." + std::to_string(layer);
      // The same value on every rank, also on those of other stages: to them the tensor views nothing and adds no entry.
      add<SplitInStage>(name + ".attention.weight", mesh.sub<1>({at}), {4 * width, width});
      for (std::int64_t expert = 0; expert < experts; ++expert)
        add<OfOneRank>(name + ".experts." + std::to_string(expert) + ".weight", mesh.sub<>({at, expert % owners}), {width, width});
    }
    add<SplitInStage>("embedding.weight", mesh.sub<1>({0}), {vocabulary, width});            // the first stage's
    add<SplitInStage>("head.weight", mesh.sub<1>({stages - 1}), {vocabulary, width});        // the last stage's
  }

  dcp::StateDict state() { return state_; }

  /// Calls visit(element, number) for what this rank has; the number is the element's own, in its tensor.
  void each(auto visit) {
    for (auto& part : parts_)
      for (std::size_t i = 0; i < part.memory.size(); ++i) visit(part.memory[i], part.seed + part.box.origin[0] * width + static_cast<std::int64_t>(i));
  }
  std::size_t tensors_here() const { return parts_.size(); }

 private:
  struct Part {
    std::vector<float> memory;
    dcp::Box box;
    std::int64_t seed;
  };
  template <class P, int N>
  void add(std::string const& name, dcp::DeviceMesh<N> const& mesh, dcp::Extents const& shape) {
    if (!mesh.contains_this_rank()) return;
    dcp::Box const box = dcp::local_box<P>(mesh, shape);
    auto& part = parts_.emplace_back(Part{std::vector<float>(box.size()), box, static_cast<std::int64_t>(std::hash<std::string>{}(name) % 1000)});
    state_.add(name, dcp::ShardedTensor<float, P>{mesh, shape, part.memory});
  }

  std::deque<Part> parts_;              // a deque: the memory stays where it is
  dcp::StateDict state_;
};

float value_of(std::int64_t number) { return static_cast<float>(number % 4096); }

/// What every rank has for itself. On another number of ranks it needs a rule: here each takes that of rank r mod the number that saved.
struct Random {
  std::mt19937 engine;
  std::string text;

  dcp::StateDict state() {
    std::ostringstream out;
    out << engine;
    text = out.str();
    return {{"engine", dcp::per_rank(text, dcp::RankPolicy::wrap)}};
  }
  void after_load() { std::istringstream{text} >> engine; }
};

void load_and_save(dcp::ThreadComm& world, std::int64_t stages, std::filesystem::path const& from, std::filesystem::path const& to) {
  dcp::DeviceMesh<2> mesh{world, {stages, world.size() / stages}};
  Model model{mesh};
  Random random{std::mt19937{static_cast<unsigned>(world.rank())}, {}};
  std::int64_t step = 0;
  dcp::StateDict const state{{"model", model}, {"random", random}, {"step", step}};
  if (from.empty()) {
    model.each([](float& x, std::int64_t number) { x = value_of(number); });
    step = 1000;
  } else {
    dcp::load<dcp::SafeTensors>(world, from, state);
    model.each([](float x, std::int64_t number) {
      if (x != value_of(number)) throw std::runtime_error("not what was saved");
    });
    if (step != 1000) throw std::runtime_error("not the step that was saved");
  }
  auto const report = dcp::save<dcp::SafeTensors>(world, to, state, {.if_exists = dcp::IfExists::replace});
  if (world.rank() == 0) std::cout << model.tensors_here() << " tensors on rank 0 of a mesh of " << stages << " stages; " << report << '\n';
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 2) throw std::runtime_error("usage: pipeline_experts DIR");
  std::filesystem::path const root = argv[1];
  dcp::run_threads(8, [&](dcp::ThreadComm& world) { load_and_save(world, 2, {}, root / "8"); });
  dcp::run_threads(4, [&](dcp::ThreadComm& world) { load_and_save(world, 4, root / "8", root / "4"); });
  dcp::run_threads(1, [&](dcp::ThreadComm& world) { load_and_save(world, 1, root / "4", root / "1"); });
  dcp::run_threads(3, [&](dcp::ThreadComm& world) { load_and_save(world, 3, root / "1", root / "3"); });
  std::cout << "ok\n";
} catch (std::exception const& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
