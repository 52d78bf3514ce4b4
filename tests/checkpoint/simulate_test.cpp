// SPDX-License-Identifier: Apache-2.0
#include <dcp/checkpoint/simulate.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#include "support/fault_medium.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

namespace {

using Storage = dcp::BasicSafeTensors<dcp::Memory>;
using dcp::Placement;
using dcp::Replicate;
using dcp::Shard;

// The states below are described once, for ranks that run and for ranks that do not: `memory(n)` are n floats of the rank.
template <class Rank, class Memory>
dcp::StateDict hybrid(Rank& rank, Memory memory, int layers, std::int64_t width) {
  dcp::DeviceMesh<2> const mesh{rank, {static_cast<std::int64_t>(rank.size()) / 2, 2}};
  dcp::StateDict state;
  auto const add = [&]<class P>(P, std::string const& name, dcp::Extents const& shape) {
    state.add(name, dcp::ShardedTensor<float, P>{mesh, shape, memory(static_cast<std::int64_t>(dcp::local_box<P>(mesh, shape).size()))});
  };
  for (int layer = 0; layer < layers; ++layer) {
    std::string const at = "layers." + std::to_string(layer);
    add(Placement<Shard<0>, Shard<1>>{}, at + ".up", {width, width + 5});
    add(Placement<Shard<0>, Replicate>{}, at + ".down", {width + 3, width});
    add(Placement<Replicate, Shard<0>>{}, at + ".gate", {width, 40});
    add(Placement<Replicate, Replicate>{}, at + ".norm", {width});
  }
  return state;
}

// A communicator that counts what it is asked for.
struct Counting {
  dcp::ThreadComm& comm;
  std::uint64_t* count;
  int rank() const { return comm.rank(); }
  int size() const { return comm.size(); }
  void barrier() { ++*count, comm.barrier(); }
  void broadcast(dcp::ByteSpan bytes, int root) { ++*count, comm.broadcast(bytes, root); }
  void all_gather(dcp::ConstByteSpan mine, dcp::ByteSpan all) { ++*count, comm.all_gather(mine, all); }
  std::vector<dcp::Message> exchange(std::vector<dcp::Message> out) { return ++*count, comm.exchange(std::move(out)); }
  dcp::ThreadComm split(int color, int key) { return comm.split(color, key); }
  void progress() { comm.progress(); }
};

dcp::Phase const* phase_of(dcp::Report const& report, std::string const& name) {
  for (auto const& phase : report.phases)
    if (phase.name == name) return &phase;
  return nullptr;
}

std::uint64_t sum_of(std::vector<dcp::SimulatedPlan> const& plans, std::uint64_t dcp::SimulatedPlan::* what) {
  return std::accumulate(plans.begin(), plans.end(), std::uint64_t{0}, [&](std::uint64_t sum, auto const& plan) { return sum + plan.*what; });
}

// The schemas of the example, with fewer layers: what is asserted does not depend on their number.
dcp::StateDict dense(dcp::SimulatedRank& rank, int layers) {
  using Columns = Placement<dcp::OrderedShard<0, 1>, dcp::OrderedShard<0, 0>>;
  using Rows = Placement<Shard<0>, Shard<1>>;
  using Vector = Placement<Shard<0>, Replicate>;
  dcp::DeviceMesh<2> const mesh{rank, {rank.size() / 8, 8}};
  dcp::StateDict state;
  auto const add = [&]<class P>(P, std::string const& name, dcp::Extents const& shape) {
    state.add("model." + name, rank.tensor<dcp::bf16, P>(mesh, shape));
    for (auto const* part : {"exp_avg.", "exp_avg_sq."}) state.add("optimizer." + (part + name), rank.tensor<float, P>(mesh, shape));
  };
  add(Columns{}, "embed", {128256, 16384});
  for (int layer = 0; layer < layers; ++layer) {
    std::string const at = "layers." + std::to_string(layer) + '.';
    for (auto const* name : {"q", "k", "v"}) add(Columns{}, at + name, {*name == 'q' ? 16384 : 1024, 16384});
    add(Rows{}, at + "o", {16384, 16384});
    add(Columns{}, at + "gate", {53248, 16384});
    add(Columns{}, at + "up", {53248, 16384});
    add(Rows{}, at + "down", {16384, 53248});
    add(Vector{}, at + "norm_1", {16384});
    add(Vector{}, at + "norm_2", {16384});
  }
  add(Vector{}, "norm", {16384});
  add(Columns{}, "head", {128256, 16384});
  return state;
}

}  // namespace

TEST_CASE("simulate_save: says of every rank what the save then does: bytes sent, bytes written, files opened") {
  struct Job {
    int ranks;
    std::int64_t writers_per_file;
  };
  for (auto const& job : {Job{1, 16}, Job{2, 16}, Job{4, 2}, Job{8, 3}, Job{20, 16}, Job{6, 1}})
    for (auto const layout : {dcp::FileLayout::final, dcp::FileLayout::sharded}) {
      CAPTURE(job.ranks);
      CAPTURE(job.writers_per_file);
      CAPTURE(static_cast<int>(layout));
      if (job.ranks == 1) continue;   // the mesh below is of pairs
      dcp::SaveOptions<Storage> options;
      options.writers_per_file = job.writers_per_file;
      options.storage.layout = layout;
      options.storage.max_file_bytes = 20'000'000;
      options.memory_bytes = 16 << 20;

      dcp::SimulatedJob simulated;
      simulated.ranks = job.ranks;
      simulated.state = [](dcp::SimulatedRank& rank) { return hybrid(rank, [&](std::int64_t n) { return rank.memory<float>(n); }, 4, 900); };
      simulated.kind_of = [](std::int64_t) { return 0; };
      for (std::int64_t r = 0; r < job.ranks; ++r) simulated.planned.push_back(r);
      auto const simulation = dcp::simulate_save<Storage>(simulated, options);

      dcp::Memory store;
      dcp::Report report;
      dcp::run_threads(job.ranks, [&](dcp::ThreadComm& world) {
        std::deque<std::vector<float>> memory;
        auto const state = hybrid(world, [&](std::int64_t n) -> std::span<float> { return memory.emplace_back(static_cast<std::size_t>(n), 1.0f); }, 4, 900);
        auto const mine = dcp::save<Storage>(world, {store, "ckpt"}, state, options);
        if (world.rank() == 0) report = mine;
      });

      REQUIRE(simulation.plans.size() == static_cast<std::size_t>(job.ranks));
      CHECK(simulation.kinds == 1);
      CHECK(simulation.tensors == 16);
      CHECK(simulation.tensor_bytes == report.tensor_bytes);
      auto const* exchange = phase_of(report, "exchange");
      auto const* write = phase_of(report, "write");
      auto const* sync = phase_of(report, "sync");
      REQUIRE((exchange != nullptr && write != nullptr && sync != nullptr));
      for (std::size_t r = 0; r < simulation.plans.size(); ++r) {
        CAPTURE(r);
        CHECK(simulation.plans[r].sent_bytes == exchange->ranks[r].bytes);
        CHECK(simulation.plans[r].written_bytes == write->ranks[r].bytes);
        CHECK(simulation.plans[r].files == sync->ranks[r].operations);
        CHECK(simulation.plans[r].plan_bytes > 0);
      }
      // What is sent is received, and all of it is written.
      CHECK(sum_of(simulation.plans, &dcp::SimulatedPlan::sent_bytes) == sum_of(simulation.plans, &dcp::SimulatedPlan::received_bytes));
      std::uint64_t data = 0;
      for (auto const& file : simulation.files) {
        data += file.bytes;
        CHECK(file.writers >= 1);
        CHECK(file.writers <= (layout == dcp::FileLayout::sharded ? 1 : std::min<std::int64_t>(job.ranks, job.writers_per_file)));
        CHECK(store.open_read("ckpt/" + file.path)->size() == file.bytes);
      }
      CHECK(sum_of(simulation.plans, &dcp::SimulatedPlan::written_bytes) == data);
      if (layout == dcp::FileLayout::final) {
        CHECK(std::accumulate(simulation.written.begin(), simulation.written.end(), std::uint64_t{0}) == data);
        CHECK(simulation.index_bytes == store.open_read("ckpt/model.safetensors.index.json")->size());
        CHECK(simulation.checksums_bytes == store.open_read("ckpt/dcp.crc")->size());
        // The record also holds an id of 16 digits and a sequence number.
        CHECK(simulation.record_bytes <= store.open_read("ckpt/dcp.json")->size() + 24);
        CHECK(simulation.record_bytes + 24 >= store.open_read("ckpt/dcp.json")->size());
      }
    }
}

TEST_CASE("save: the number of collectives before the first call to the storage depends neither on the number of tensors nor, without values, on that of ranks") {
  using Watched = dcp::BasicSafeTensors<dcp::test::FaultMedium<dcp::Memory>>;
  std::vector<std::uint64_t> counts;
  for (int const ranks : {2, 8})
    for (int const layers : {1, 40}) {
      dcp::test::FaultMedium<dcp::Memory> medium{dcp::Memory{}};
      std::uint64_t count = 0, until_plan = 0;
      medium.add({.hook = [&](dcp::test::Call, std::string const&) { until_plan = count; }});   // rank 0 comes first, and alone
      dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
        std::deque<std::vector<float>> memory;
        std::uint64_t mine = 0;
        Counting comm{world, world.rank() == 0 ? &count : &mine};
        auto const state = hybrid(comm, [&](std::int64_t n) -> std::span<float> { return memory.emplace_back(static_cast<std::size_t>(n), 1.0f); }, layers, 20);
        dcp::save<Watched>(comm, {medium, "ckpt"}, state);
      });
      counts.push_back(until_plan);
    }
  for (auto const count : counts) CHECK(count == counts[0]);
  CHECK(counts[0] >= 1);
  CHECK(counts[0] <= 9);
}

TEST_CASE("simulate_save: a dense model on 8,960 ranks: one schema, no file opened by more than 16 ranks, dcp.json as on 16 ranks") {
  auto const simulate = [&](std::int64_t ranks, std::vector<std::int64_t> planned) {
    dcp::SimulatedJob job;
    job.ranks = ranks;
    job.state = [](dcp::SimulatedRank& rank) { return dense(rank, 126); };
    job.kind_of = [](std::int64_t) { return 0; };
    job.planned = std::move(planned);
    return dcp::simulate_save<dcp::SafeTensors>(job);
  };
  auto const large = simulate(8960, {0, 1, 8, 4480, 8959});
  CHECK(large.kinds == 1);
  CHECK(large.broadcasts == 0);
  CHECK(large.tensors == 3 * (126 * 9 + 3));
  std::uint64_t const layer = 2 * 16384 * 16384 + 2 * 1024 * 16384 + 3 * std::uint64_t{53248} * 16384 + 2 * 16384;
  CHECK(large.tensor_bytes == (2 + 4 + 4) * (126 * layer + 2 * std::uint64_t{128256} * 16384 + 16384));
  std::uint64_t data = 0, largest = 0, written = 0, most = 0;
  for (auto const& file : large.files) {
    data += file.bytes;
    largest = std::max(largest, file.bytes);
    CHECK(file.writers >= 1);
    CHECK(file.writers <= 16);
  }
  CHECK(largest == 4 * std::uint64_t{128256} * 16384 + 4096);
  CHECK(data - large.tensor_bytes == 4096 * large.files.size());
  for (auto const bytes : large.written) written += bytes, most = std::max(most, bytes);
  CHECK(written == data);
  CHECK(large.written.size() == 8960);
  // The largest file is cut into 15 or 16 parts; nobody writes more than one of them.
  CHECK(most <= largest / 15 + 4096);
  CHECK(large.imbalance() < 1.3);
  for (auto const& plan : large.plans) {
    CAPTURE(plan.rank);
    CHECK(plan.files <= 2);
    CHECK(plan.written_bytes == large.written[static_cast<std::size_t>(plan.rank)]);
    CHECK(plan.plan_bytes < 8 << 20);
  }
  auto const small = simulate(16, {7});   // the records are of the job, whichever ranks are planned for
  CHECK(small.record_bytes == large.record_bytes);
  CHECK(small.checksums_bytes == large.checksums_bytes);
  CHECK(small.index_bytes == large.index_bytes);
  CHECK(small.files.size() == large.files.size());
}

TEST_CASE("simulate_save: 64 sets of names are 64 schemas, whatever the number of ranks") {
  for (std::int64_t const ranks : {64, 4096}) {
    CAPTURE(ranks);
    dcp::SimulatedJob job;
    job.ranks = ranks;
    job.state = [](dcp::SimulatedRank& rank) {
      dcp::DeviceMesh<2> const mesh{rank, {rank.size() / 64, 64}};
      auto const expert = rank.rank() % 64;
      dcp::StateDict state;
      for (int layer = 0; layer < 6; ++layer) {
        std::string const at = "layers." + std::to_string(layer) + '.';
        state.add(at + "attention", rank.tensor<dcp::bf16, Placement<Shard<0>, Shard<0>>>(mesh, dcp::Extents{4096, 4096}));
        state.add(at + "expert." + std::to_string(expert), rank.tensor<dcp::bf16, Placement<Shard<0>>>(mesh.sub<0>({expert}), dcp::Extents{4096, 1536}));
      }
      return state;
    };
    job.planned = {0, ranks - 1};
    if (ranks > 64) job.kind_of = [](std::int64_t rank) { return rank % 64; };   // else the states themselves say so
    auto const simulation = dcp::simulate_save<dcp::SafeTensors>(job);
    CHECK(simulation.kinds == 64);
    CHECK(simulation.broadcasts == 64);
    CHECK(simulation.tensors == 6 * 65);
    CHECK(simulation.tensor_bytes == 2 * 6 * (4096 * 4096 + std::uint64_t{64} * 4096 * 1536));
    CHECK(simulation.schema_bytes < 64 * 12 * 400);
    std::uint64_t written = 0;
    for (auto const bytes : simulation.written) written += bytes;
    CHECK(written >= simulation.tensor_bytes);
    CHECK(written <= simulation.tensor_bytes + 4096 * 65 * simulation.files.size());
  }
}

TEST_CASE("simulate_save: what a save would refuse is refused, and a job needs ranks and states") {
  dcp::SimulatedJob job;
  CHECK_THROWS_AS(dcp::simulate_save<Storage>(job), dcp::Error);
  job.state = [](dcp::SimulatedRank& rank) {
    dcp::DeviceMesh<1> const mesh{rank, {rank.size()}};
    dcp::StateDict state;
    state.add("w", rank.tensor<float, Placement<Shard<0>>>(mesh, dcp::Extents{8, rank.rank() == 3 ? 5 : 4}));
    return state;
  };
  job.ranks = 3;
  CHECK(dcp::simulate_save<Storage>(job).tensors == 1);
  job.ranks = 4;
  CHECK_THROWS_WITH_AS(dcp::simulate_save<Storage>(job), doctest::Contains("[8, 5]"), dcp::Error);
  job.ranks = 0;
  CHECK_THROWS_AS(dcp::simulate_save<Storage>(job), dcp::Error);
}
