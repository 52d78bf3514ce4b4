// SPDX-License-Identifier: Apache-2.0
// Rows of PyTorch's tests, of e2e/test_e2e_save_and_load.py and of those that reshard, once more with all tensors on devices: of each rank its own, or one that ranks share.
// Names and asserts are those of the rows on the host (support/upstream_*.hpp).
#include <dcp/checkpoint/async_save.hpp>
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/manager.hpp>
#include <dcp/checkpoint/reshard.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/storage/safetensors.hpp>
#include <dcp/storage/torch_dcp.hpp>

#include <doctest/doctest.h>

#include "support/device_twin.hpp"
#include "support/ranks_on_threads.hpp"
#include "support/upstream_training.hpp"

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

namespace {

using dcp::test::Adam, dcp::test::Ddp, dcp::test::DeviceTwin, dcp::test::Fsdp, dcp::test::Held, dcp::test::Hsdp, dcp::test::Random, dcp::test::SimulatedDevices;
using dcp::test::arange, dcp::test::gathered, dcp::test::on_ranks;

/// What runs a body on ranks, each of which has a device; `directory` is one that they share.
struct Here {
  dcp::ThreadComm& world;
  std::string const& directory;
  SimulatedDevices& devices;
  std::vector<int> ordinals;   // of the rank
};
template <class Body>
void on_devices(std::vector<int> const& rank_counts, Body const& body) {
  for (int const ranks : rank_counts)
    for (bool const own : {true, false}) {
      if (ranks == 1 && !own) continue;
      CAPTURE(ranks);
      CAPTURE(own);
      SimulatedDevices devices{ranks, static_cast<std::uint64_t>(ranks)};
      on_ranks(ranks, [&](dcp::ThreadComm& world, std::string const& directory) { body(Here{world, directory, devices, {own ? world.rank() : 0}}); });
      for (int const used : devices.api->contexts()) CHECK((own || used == 0));
      CHECK(devices.api->last_error() == 0);
    }
}

/// Saves of `state`, which is on the host, from the device; the tensors there come late, and are something else when save() has returned.
template <class S>
dcp::Report save(Here const& here, std::string const& place, dcp::StateDict const& state, dcp::SaveOptions<S> options = {}) {
  DeviceTwin twin{here.devices, here.world.rank(), here.ordinals, state};
  twin.upload();
  options.on = twin.on();
  auto const report = dcp::save<S>(here.world, place, twin.state, options);
  twin.overwrite();
  here.devices.api->drain();
  return report;
}
/// And loads of it; what is there before is written late, too.
template <class S>
dcp::Report load(Here const& here, std::string const& place, dcp::StateDict const& state, dcp::LoadOptions<S> options = {}) {
  DeviceTwin twin{here.devices, here.world.rank(), here.ordinals, state};
  twin.upload();
  options.on = twin.on();
  auto const report = dcp::load<S>(here.world, place, twin.state, options);
  here.devices.api->drain();
  twin.download();
  return report;
}
void reshard(Here const& here, dcp::StateDict const& from, dcp::StateDict const& to) {
  DeviceTwin source{here.devices, here.world.rank(), here.ordinals, from}, target{here.devices, here.world.rank(), here.ordinals, to};
  source.upload();
  target.upload();
  // One stream of a device is enough, if it comes behind the other.
  here.devices.api->synchronize(source.stream(here.ordinals[0]));
  dcp::reshard(here.world, source.state, target.state, {.on = target.on()});
  target.download();
}

/// As of the rows on the host.
struct TrainState {
  std::int32_t step = 0;
  float current_loss = -1;
  std::vector<float> losses;

  void record(std::vector<float> const& more) {
    for (float const loss : more) ++step, current_loss = loss, losses.push_back(loss);
  }
  dcp::StateDict state() {
    return {{"step", dcp::TensorView<std::int32_t>{std::span{&step, 1}, dcp::Extents{}}}, {"current_loss", dcp::TensorView<float>{std::span{&current_loss, 1}, dcp::Extents{}}}, {"losses", losses}};
  }
  friend bool operator==(TrainState const&, TrainState const&) = default;
};
struct StatefulObject {
  std::vector<float> data;
  explicit StatefulObject(std::uint32_t seed) : data{Random{seed}(100)} {}
  dcp::StateDict state() { return {{"data", dcp::TensorView<float>{data, {10, 10}}}}; }
};

// `save`(state): saves, and returns the place.
template <class Strategy, class S, class Save>
void save_and_load_with(Here const& here, Save save_it) {
  auto& world = here.world;
  dcp::SelfComm alone;
  auto reference = dcp::test::dummy<Ddp>(alone);
  Adam<Ddp> reference_optimizer{alone, reference, 0.1f};
  auto const reference_losses = dcp::test::train(alone, reference, reference_optimizer, 2);

  auto model = dcp::test::dummy<Strategy>(world);
  Adam<Strategy> optimizer{world, model, 0.1f};
  TrainState trained;
  trained.record(dcp::test::train(world, model, optimizer, 2));
  CHECK(trained.losses == reference_losses);
  StatefulObject object{17};
  std::string const place = save_it(dcp::StateDict{{"model", model}, {"optimizer", optimizer}, {"s", object}, {"train_state", trained}});

  auto loaded = dcp::test::dummy<Strategy>(world, 1);
  Adam<Strategy> loaded_optimizer{world, loaded, 0.2f};
  StatefulObject loaded_object{18};
  TrainState loaded_state;
  CHECK(loaded.gather(world) != reference.gather(alone));
  load<S>(here, place, {{"model", loaded}, {"optimizer", loaded_optimizer}, {"s", loaded_object}, {"train_state", loaded_state}});

  CHECK(loaded_object.data == object.data);
  CHECK(loaded_state == trained);
  CHECK(loaded_state.step == 2);
  CHECK(loaded_state.losses == reference_losses);
  CHECK(loaded.gather(world) == reference.gather(alone));
  CHECK(loaded_optimizer.gather(world) == reference_optimizer.gather(alone));
  CHECK(loaded_optimizer.learning_rate == 0.1f);

  // The optimizer into a plain one of one process, on the host.
  auto plain_model = dcp::test::dummy<Ddp>(alone, 2);
  Adam<Ddp> plain_optimizer{alone, plain_model, 0.3f};
  dcp::load<S>(alone, place, {{"optimizer", plain_optimizer}}, {.on_unexpected = dcp::OnUnexpected::ignore});
  CHECK(plain_optimizer.gather(alone) == reference_optimizer.gather(alone));
  CHECK(plain_optimizer.betas == reference_optimizer.betas);

  auto const next = dcp::test::train(world, loaded, loaded_optimizer, 1), expected = dcp::test::train(alone, reference, reference_optimizer, 1);
  CHECK(next == expected);
  CHECK(expected[0] != 0);
  CHECK(loaded.gather(world) == reference.gather(alone));
}

template <class Strategy>
void save_and_load(Here const& here) {
  auto const through = [&]<class S>(std::type_identity<S>, std::string const& place) {
    save_and_load_with<Strategy, S>(here, [&](dcp::StateDict const& state) {
      save<S>(here, place, state);
      return place;
    });
  };
  through(std::type_identity<dcp::SafeTensors>{}, here.directory + "/ckpt");
  through(std::type_identity<dcp::TorchDcp>{}, here.directory + "/torch_dcp");
}

// A save in the background, by T and `executor`; `cached`: with the plan and the staging memory of an earlier one.
template <class T>
void async_cached(Here const& here, bool cached, dcp::Executor executor) {
  constexpr bool deferred = T::name == "deferred";
  save_and_load_with<Fsdp, dcp::SafeTensors>(here, [&](dcp::StateDict const& state) {
    DeviceTwin twin{here.devices, here.world.rank(), here.ordinals, state};
    dcp::CheckpointManager<dcp::SafeTensors, T> manager{here.world, here.directory, {.save = {.on = twin.on(), .executor = executor, .saver_program = DCP_SAVER_PROGRAM}}};
    if (cached) {
      twin.overwrite();
      manager.save(1, twin.state);   // of what is not saved later
    }
    twin.upload();
    dcp::Pending pending = manager.async_save(2, twin.state);
    pending.staged_event().before(twin.on()[0]);
    twin.overwrite();              // training goes on
    here.devices.api->drain();
    pending.wait_staged();
    auto const report = pending.wait();
    CHECK(report.pool_reused == cached);
    CHECK(report.plan_reused == cached);
    CHECK(report.deferred == deferred);
    CHECK(report.warnings.empty());
    CHECK(report.saver_processes.size() == (executor == dcp::Executor::process ? static_cast<std::size_t>(here.world.size()) : 0u));
    return here.directory + "/step-00000002";
  });
}

template <class P>
dcp::StateDict as_dtensor(Held<float, P>& held) {
  return {{"dtensor", held.tensor}};
}
/// One step of the reshard rows: saved in one layout, loaded in another, resharded back, all of it on devices.
template <class From, class To, int N, int M>
void reshard_through(Here const& here, std::string const& place, dcp::DeviceMesh<N> const& saving, dcp::DeviceMesh<M> const& loading) {
  auto const values = arange(16);
  Held<float, From> saved{saving, {4, 4}}, back{saving, {4, 4}, -1.0f};
  saved.fill(values);
  Held<float, To> loaded{loading, {4, 4}, -1.0f};
  auto const through = [&]<class S>(std::type_identity<S>, std::string const& at, typename S::Options const& storage) {
    std::ranges::fill(loaded.memory, -1.0f);
    save<S>(here, at, as_dtensor(saved), {.if_exists = dcp::IfExists::replace, .storage = storage});
    auto const report = load<S>(here, at, as_dtensor(loaded));
    CHECK(report.duplicates.empty());
    CHECK(report.unverified_bytes == 0);
    CHECK(gathered(here.world, loaded) == values);
  };
  through(std::type_identity<dcp::SafeTensors>{}, place + "/final", {.layout = dcp::FileLayout::final});
  through(std::type_identity<dcp::SafeTensors>{}, place + "/sharded", {.layout = dcp::FileLayout::sharded});
  through(std::type_identity<dcp::TorchDcp>{}, place + "/torch_dcp", {});
  reshard(here, as_dtensor(loaded), as_dtensor(back));
  CHECK(back.memory == saved.memory);
}
dcp::DeviceMesh<1> mesh_1d(Here const& here) { return {here.world, {here.world.size()}}; }
dcp::DeviceMesh<2> mesh_2d(Here const& here) { return {here.world, {2, here.world.size() / 2}}; }

using R1 = dcp::Placement<dcp::Replicate>;
using S1 = dcp::Placement<dcp::Shard<0>>;
using RS = dcp::Placement<dcp::Replicate, dcp::Shard<0>>;
using SR = dcp::Placement<dcp::Shard<0>, dcp::Replicate>;

}  // namespace

TEST_CASE("on a device: test_e2e: FSDP, a training goes on from a checkpoint as one process alone does") { on_devices({1, 2, 4}, save_and_load<Fsdp>); }
TEST_CASE("on a device: test_e2e: HSDP, a training goes on from a checkpoint as one process alone does") { on_devices({2, 4}, save_and_load<Hsdp>); }
TEST_CASE("on a device: test_e2e: DDP, a training goes on from a checkpoint as one process alone does") { on_devices({1, 2, 4}, save_and_load<Ddp>); }

TEST_CASE("on a device: test_e2e_async_cached: (False, THREAD, False), staging memory of its own, threads, the copy inside the call") {
  on_devices({1, 2, 4}, [](Here const& here) { async_cached<dcp::CopyStager>(here, false, dcp::Executor::thread); });
}
TEST_CASE("on a device: test_e2e_async_cached: (True, THREAD, False), staging memory used again, threads, the copy inside the call") {
  on_devices({1, 2, 4}, [](Here const& here) { async_cached<dcp::CopyStager>(here, true, dcp::Executor::thread); });
}
TEST_CASE("on a device: test_e2e_async_cached: (True, PROCESS, False), staging memory used again, another process, the copy inside the call") {
  on_devices({2}, [](Here const& here) { async_cached<dcp::CopyStager>(here, true, dcp::Executor::process); });
}
TEST_CASE("on a device: test_e2e_async_cached: (False, PROCESS, True), staging memory of its own, another process, the copy behind the call") {
  on_devices({2}, [](Here const& here) { async_cached<dcp::BasicDeferredStager<true>>(here, false, dcp::Executor::process); });
}
TEST_CASE("on a device: test_e2e_async_cached: (False, THREAD, True), staging memory of its own, threads, the copy behind the call") {
  on_devices({1, 2, 4}, [](Here const& here) { async_cached<dcp::BasicDeferredStager<true>>(here, false, dcp::Executor::thread); });
}
TEST_CASE("on a device: test_e2e_async_cached: (True, THREAD, True), staging memory used again, threads, the copy behind the call") {
  on_devices({1, 2, 4}, [](Here const& here) { async_cached<dcp::BasicDeferredStager<false>>(here, true, dcp::Executor::thread); });
}

TEST_CASE("on a device: test_partial_load: the model alone, and the optimizer's state without the model") {
  on_devices({2}, [](Here const& here) {
    auto& world = here.world;
    auto model = dcp::test::dummy<Fsdp>(world);
    Adam<Fsdp> optimizer{world, model, 0.1f};
    dcp::test::train(world, model, optimizer, 2);
    save<dcp::SafeTensors>(here, here.directory + "/ckpt", {{"model", model}, {"optimizer", optimizer}});
    auto loaded = dcp::test::dummy<Fsdp>(world, 1);
    auto const report = load<dcp::SafeTensors>(here, here.directory + "/ckpt", {{"model", loaded}}, {.on_unexpected = dcp::OnUnexpected::ignore});
    CHECK(loaded.gather(world) == model.gather(world));
    CHECK(report.tensors == 8);
    CHECK(report.unexpected.size() == 8 * 3 + 3);
    Adam<Fsdp> loaded_optimizer{world, loaded, 0.3f};
    load<dcp::SafeTensors>(here, here.directory + "/ckpt", {{"optimizer", loaded_optimizer}}, {.on_unexpected = dcp::OnUnexpected::ignore});
    CHECK(loaded_optimizer.gather(world) == optimizer.gather(world));
  });
}

TEST_CASE("on a device: test_hsdp_fsdp_checkpoint_conversion: what HSDP saved FSDP loads, even and uneven shards") {
  on_devices({4}, [](Here const& here) {
    for (auto const& sizes : {std::vector<std::int64_t>{5, 8, 4, 12}, std::vector<std::int64_t>{5, 10, 15, 30, 5}}) {
      auto const name = [](std::size_t i) { return "net" + std::to_string(i); };
      std::string const place = here.directory + "/" + std::to_string(sizes.size());
      dcp::test::Network<Hsdp> saved{here.world, sizes, 0, name};
      dcp::test::Network<Fsdp> loaded{here.world, sizes, 1, name};
      save<dcp::SafeTensors>(here, place, {{"model", saved}});
      load<dcp::SafeTensors>(here, place, {{"model", loaded}});
      CHECK(loaded.gather(here.world) == saved.gather(here.world));
    }
  });
}

TEST_CASE("on a device: test_1d_to_1d_reshard_placement_change: both placements load as each other") {
  on_devices({1, 2, 4}, [](Here const& here) {
    reshard_through<R1, S1>(here, here.directory, mesh_1d(here), mesh_1d(here));
    reshard_through<S1, R1>(here, here.directory, mesh_1d(here), mesh_1d(here));
  });
}
TEST_CASE("on a device: test_2d_to_2d_reshard_placement_change: each placement loads as each other") {
  on_devices({2, 4}, [](Here const& here) {
    reshard_through<RS, SR>(here, here.directory, mesh_2d(here), mesh_2d(here));
    reshard_through<SR, RS>(here, here.directory, mesh_2d(here), mesh_2d(here));
  });
}
TEST_CASE("on a device: test_1d_to_2d_reshard_mesh_change and test_2d_to_1d_reshard_mesh_change: what one mesh saved loads on the other") {
  on_devices({4}, [](Here const& here) {
    reshard_through<S1, RS>(here, here.directory, mesh_1d(here), mesh_2d(here));
    reshard_through<SR, S1>(here, here.directory, mesh_2d(here), mesh_1d(here));
  });
}
TEST_CASE("on a device: test_load_rowwise_to_colwise: rows saved, columns loaded, and back") {
  on_devices({2}, [](Here const& here) {
    Held<float, S1> rows{mesh_1d(here), {6, 20}};
    Held<float, dcp::Placement<dcp::Shard<1>>> columns{mesh_1d(here), {6, 20}, -1.0f};
    auto const values = Random{12}(120);
    rows.fill(values);
    save<dcp::SafeTensors>(here, here.directory + "/ckpt", {{"tensor", rows.tensor}});
    load<dcp::SafeTensors>(here, here.directory + "/ckpt", {{"tensor", columns.tensor}});
    CHECK(gathered(here.world, columns) == values);
    std::ranges::fill(rows.memory, -1.0f);
    save<dcp::SafeTensors>(here, here.directory + "/ckpt", {{"tensor", columns.tensor}}, {.if_exists = dcp::IfExists::replace});
    load<dcp::SafeTensors>(here, here.directory + "/ckpt", {{"tensor", rows.tensor}});
    CHECK(gathered(here.world, rows) == values);
  });
}
