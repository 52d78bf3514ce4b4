// SPDX-License-Identifier: Apache-2.0
// Checkpoints over NcclComm, on simulated calls of NCCL: what is written on some ranks is read on as many, on fewer and on more.
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#include "support/simulated_nccl.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace {

using Storage = dcp::BasicSafeTensors<dcp::Memory>;
using dcp::test::communicator;
using dcp::test::on_simulated_ranks;
using dcp::test::SimulatedNccl;
using dcp::test::SimulatedNcclComm;

constexpr std::int64_t rows = 37, columns = 50;

// The part of a rank in tensors cut by rows, by columns and not at all, in memory of its own.
struct Held {
  dcp::DeviceMesh<1> mesh;
  std::vector<std::vector<float>> memory;
  dcp::StateDict state;

  explicit Held(SimulatedNcclComm const& world) : mesh{world, {world.size()}} {
    memory.reserve(3);
    add<dcp::Placement<dcp::Shard<0>>>("by_rows");
    add<dcp::Placement<dcp::Shard<1>>>("by_columns");
    add<dcp::Placement<dcp::Replicate>>("whole");
  }
  template <class P>
  void add(char const* name) {
    memory.emplace_back(dcp::local_box<P>(mesh, {rows, columns}).size());
    state.add(name, dcp::ShardedTensor<float, P>{mesh, {rows, columns}, memory.back()});
  }
  // Each element as its place in its tensor says.
  template <class Visit>
  void each(Visit visit) {
    dcp::Box const boxes[] = {dcp::local_box<dcp::Placement<dcp::Shard<0>>>(mesh, {rows, columns}), dcp::local_box<dcp::Placement<dcp::Shard<1>>>(mesh, {rows, columns}),
                              dcp::local_box<dcp::Placement<dcp::Replicate>>(mesh, {rows, columns})};
    for (std::size_t t = 0; t < memory.size(); ++t) {
      auto at = memory[t].begin();
      for (std::int64_t r = 0; r < boxes[t].shape[0]; ++r)
        for (std::int64_t c = 0; c < boxes[t].shape[1]; ++c)
          visit(*at++, static_cast<float>(static_cast<std::int64_t>(t) * 10'000 + (boxes[t].origin[0] + r) * columns + boxes[t].origin[1] + c));
    }
  }
};

}  // namespace

TEST_CASE("save, load: over simulated NCCL on 2 and 4 ranks a checkpoint comes back, also on another number of ranks") {
  for (bool const nonblocking : {false, true})
    for (int const writers : {2, 4}) {
      CAPTURE(nonblocking);
      CAPTURE(writers);
      dcp::Memory store;
      {
        SimulatedNccl nccl{writers, nonblocking};
        on_simulated_ranks(nccl, writers, [&](int rank) {
          auto world = communicator(nccl, rank, {std::chrono::seconds{60}, 4096});   // many rounds
          Held held{world};
          held.each([](float& element, float value) { element = value; });
          dcp::save<Storage>(world, {store, "ckpt"}, held.state);
        });
        CHECK(nccl.violations() == "");
      }
      for (int const readers : {1, 2, 3, 4}) {
        CAPTURE(readers);
        SimulatedNccl nccl{readers, nonblocking};
        std::atomic<int> wrong = 0;
        on_simulated_ranks(nccl, readers, [&](int rank) {
          auto world = communicator(nccl, rank);
          Held held{world};
          dcp::load<Storage>(world, {store, "ckpt"}, held.state);
          held.each([&](float& element, float value) { wrong += element != value; });
        });
        CHECK(wrong == 0);
        CHECK(nccl.violations() == "");
      }
    }
}

TEST_CASE("save: over simulated NCCL a rank that fails is told on all ranks, and the communicator can be used on") {
  SimulatedNccl nccl{2};
  dcp::Memory store;
  std::atomic<int> told = 0;
  on_simulated_ranks(nccl, 2, [&](int rank) {
    auto world = communicator(nccl, rank);
    Held held{world};
    held.each([](float& element, float value) { element = value; });
    dcp::save<Storage>(world, {store, "ckpt"}, held.state);
    try {
      dcp::save<Storage>(world, {store, "ckpt"}, held.state);
    } catch (dcp::Error const& error) {
      told += error.code() == dcp::ErrorCode::already_exists;
    }
    world.barrier();
  });
  CHECK(told == 2);
  CHECK(nccl.violations() == "");
}
