// SPDX-License-Identifier: Apache-2.0
// test: {tmp}
//
// FSDP over tensor parallelism, in the type of each tensor: trained on 2 x 4 ranks, continued on 4 x 2, served on 3 by tensor
// parallelism alone, in another number format. The ranks are threads here; over MPI only `world` changes.
//
//   fsdp_tp DIR
#include <dcp/dcp.hpp>

#include <cstdint>
#include <filesystem>
#include <iostream>
#include <stdexcept>
#include <type_traits>
#include <vector>

namespace {

constexpr std::int64_t width = 96, hidden = 384;

using Mesh = dcp::Axes<struct dp, struct tp>;
// tp cuts first, since that is how the layer computes; FSDP cuts what each rank then has. Mesh order would cut the other way round.
using ColumnParallel = dcp::PlacementOn<Mesh, dcp::On<tp, dcp::OrderedShard<0, 0>>, dcp::On<dp, dcp::OrderedShard<0, 1>>>;
using RowParallel = dcp::PlacementOn<Mesh, dcp::On<tp, dcp::Shard<1>>, dcp::On<dp, dcp::Shard<0>>>;
using Norm = dcp::PlacementOn<Mesh, dcp::On<dp, dcp::Shard<0>>>;                                   // the same along tp
static_assert(std::is_same_v<ColumnParallel, dcp::Placement<dcp::OrderedShard<0, 1>, dcp::OrderedShard<0, 0>>>);

/// A block of a model. `T` and the placements are the trainer's choice; names and global shapes are the model.
template <class T, class Up, class Down, class Scale>
struct Block {
  std::vector<T> up_memory, down_memory, norm_memory;
  dcp::ShardedTensor<T, Up> up;
  dcp::ShardedTensor<T, Down, dcp::Shape<width, hidden>> down;         // with the global shape in the type, too
  dcp::ShardedTensor<T, Scale> norm;

  template <int N>
  explicit Block(dcp::DeviceMesh<N> const& mesh)
      : up_memory(dcp::local_box<Up>(mesh, {hidden, width}).size()),
        down_memory(dcp::local_box<Down>(mesh, {width, hidden}).size()),
        norm_memory(dcp::local_box<Scale>(mesh, {width}).size()),
        up{mesh, {hidden, width}, up_memory},
        down{mesh, down_memory},
        norm{mesh, {width}, norm_memory} {}

  dcp::StateDict state() { return {{"up.weight", up}, {"down.weight", down}, {"norm.weight", norm}}; }
};
using TrainedBlock = Block<float, ColumnParallel, RowParallel, Norm>;
using ServedBlock = Block<dcp::bf16, dcp::Placement<dcp::Shard<0>>, dcp::Placement<dcp::Shard<1>>, dcp::Placement<dcp::Replicate>>;

/// What stands at a row and column of a tensor here, instead of something that was learned. Exact in bfloat16.
float value_at(std::int64_t row, std::int64_t column) { return static_cast<float>((7 * row + 3 * column) % 128); }

// Takes only tensors that are laid out so: another layout does not compile.
void visit_up(dcp::ShardedTensor<float, ColumnParallel> const& up, auto visit) {
  auto const box = up.local_box();
  for (std::size_t i = 0; i < box.size(); ++i) visit(up.data()[i], box.origin[0] + static_cast<std::int64_t>(i) / width, static_cast<std::int64_t>(i) % width);
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 2) throw std::runtime_error("usage: fsdp_tp DIR");
  auto const place = std::filesystem::path{argv[1]} / "checkpoint";

  dcp::run_threads(8, [&](dcp::ThreadComm& world) {
    dcp::DeviceMesh<2> mesh{world, {2, 4}};
    TrainedBlock block{mesh};
    visit_up(block.up, [](float& x, std::int64_t row, std::int64_t column) { x = value_at(row, column); });
    auto const report = dcp::save<dcp::SafeTensors>(world, place, {{"block", block}}, {.if_exists = dcp::IfExists::replace});
    if (world.rank() == 0) std::cout << report << '\n';
  });

  dcp::run_threads(8, [&](dcp::ThreadComm& world) {
    dcp::DeviceMesh<2> mesh{world, {4, 2}};
    TrainedBlock block{mesh};
    dcp::load<dcp::SafeTensors>(world, place, {{"block", block}});
    visit_up(block.up, [](float x, std::int64_t row, std::int64_t column) {
      if (x != value_at(row, column)) throw std::runtime_error("not what was saved");
    });
  });

  dcp::run_threads(3, [&](dcp::ThreadComm& world) {
    dcp::DeviceMesh<1> mesh{world, {3}};
    ServedBlock block{mesh};
    // A checkpoint in one number format and memory in another is an error, unless the cast is asked for; then the report names it.
    auto const report = dcp::load<dcp::SafeTensors>(world, place, {{"block", block}}, {.on_dtype = dcp::OnDType::cast});
    auto const box = block.up.local_box();
    for (std::size_t i = 0; i < box.size(); ++i)
      if (static_cast<float>(block.up_memory[i]) != value_at(box.origin[0] + static_cast<std::int64_t>(i) / width, static_cast<std::int64_t>(i) % width))
        throw std::runtime_error("not what was saved");
    if (world.rank() == 0) std::cout << report << '\n';
  });
  std::cout << "ok\n";
} catch (std::exception const& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
