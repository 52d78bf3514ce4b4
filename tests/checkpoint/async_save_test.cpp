// SPDX-License-Identifier: Apache-2.0
#include <dcp/checkpoint/async_save.hpp>
#include <dcp/checkpoint/load.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#include "support/fault_medium.hpp"
#include "support/generations.hpp"
#include "support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <chrono>
#include <string>
#include <vector>

using namespace std::chrono_literals;
using dcp::test::GenerationState;

TEST_CASE("async_save: what the state held at the call is saved, whatever becomes of the memory") {
  for (int const ranks : {1, 2, 3}) {
    CAPTURE(ranks);
    dcp::test::TemporaryDirectory directory;
    std::string const place = directory / "ckpt";
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      GenerationState state{world, 300};
      state.fill(7);
      dcp::Pending pending = dcp::async_save<dcp::SafeTensors>(world, place, state);
      state.scribble();
      auto const report = pending.wait();
      CHECK(report.ranks == ranks);
      CHECK(report.staged_bytes > 0);
      CHECK(pending.done());
      dcp::load<dcp::SafeTensors>(world, place, state);
      CHECK(state.generation() == 7);
    });
  }
}
