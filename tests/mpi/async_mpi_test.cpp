// SPDX-License-Identifier: Apache-2.0
// Saves in the background while the program uses its own communicator all the time.
// ranks: 1 2 4
#include "support/campaign.hpp"
#include "support/generations.hpp"
#include "support/ranks_on_mpi.hpp"

#include <dcp/checkpoint/manager.hpp>
#include <dcp/comm/mpi.hpp>
#include <dcp/storage/safetensors.hpp>

#include <doctest/doctest.h>

#include <mpi.h>

#include <cstdint>
#include <string>
#include <vector>

TEST_CASE("CheckpointManager: saves in the background under the trainer's own collectives neither hang nor mix with them") {
  std::int64_t const saves = dcp::test::rounds(100, 1000);
  int ranks = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  dcp::test::on_ranks(ranks, [&](dcp::MpiComm& world, std::string const& directory) {
    dcp::test::GenerationState state{world, 300};
    dcp::CheckpointManager<dcp::SafeTensors> checkpoints{world, directory + "/run", {.keep_last = 3}};
    int const rank = world.rank();
    std::int64_t sum = 0, expected = 0;
    auto const train = [&](std::int64_t step) {
      for (std::int64_t round = 0; round < 20; ++round) {
        std::int64_t mine = step * 1000 + round + rank, all = 0;
        MPI_Allreduce(&mine, &all, 1, MPI_INT64_T, MPI_SUM, MPI_COMM_WORLD);
        sum += all;
        expected += ranks * (step * 1000 + round) + ranks * (ranks - 1) / 2;
        std::int64_t token = rank == 0 ? step : -1;
        MPI_Bcast(&token, 1, MPI_INT64_T, 0, MPI_COMM_WORLD);
        CHECK(token == step);
      }
    };
    std::uint64_t overlapped = 0;
    for (std::int64_t step = 1; step <= saves; ++step) {
      state.fill(static_cast<std::uint64_t>(step));
      dcp::Pending pending = checkpoints.async_save(step, state.state());
      state.scribble();
      overlapped += pending.done() ? 0 : 1;
      train(step);
    }
    checkpoints.wait();
    CHECK(sum == expected);
    CHECK(overlapped > 0);
    CHECK(checkpoints.steps() == std::vector<std::int64_t>{saves - 2, saves - 1, saves});
    for (auto const step : checkpoints.steps()) {
      state.scribble();
      checkpoints.load(step, state.state());
      CHECK(state.generation() == static_cast<std::uint64_t>(step));
    }
  });
}
