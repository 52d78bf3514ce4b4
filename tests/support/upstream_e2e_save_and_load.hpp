// SPDX-License-Identifier: Apache-2.0
#pragma once
// The rows of PyTorch's e2e/test_e2e_save_and_load.py, with its steps and asserts, for any communicator. Include one of ranks_on_*.hpp
// before. (Its parameter compile = True is about Python's compiler.)

#include "support/upstream_training.hpp"

#include <dcp/checkpoint/async_save.hpp>
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/manager.hpp>
#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/storage/safetensors.hpp>
#include <dcp/storage/torch_dcp.hpp>

#include <doctest/doctest.h>

#include <filesystem>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include <unistd.h>

namespace dcp::test {

/// Upstream's TrainState: two scalars as 0-d tensors, and the losses as bytes that only it understands.
struct TrainState {
  std::int32_t step = 0;
  float current_loss = -1;
  std::vector<float> losses;
  Bytes packed;

  void record(std::vector<float> const& more) {
    for (float const loss : more) ++step, current_loss = loss, losses.push_back(loss);
    ByteWriter out;
    out.number<std::uint32_t>(static_cast<std::uint32_t>(losses.size()));
    for (float const loss : losses) out.number(loss);
    packed = out.take();
  }
  StateDict state() {
    return {{"step", TensorView<std::int32_t>{std::span{&step, 1}, Extents{}}}, {"current_loss", TensorView<float>{std::span{&current_loss, 1}, Extents{}}}, {"losses", packed}};
  }
  void after_load() {
    ByteReader in{packed};
    losses.resize(in.number<std::uint32_t>());
    for (auto& loss : losses) loss = in.number<float>();
  }
  friend bool operator==(TrainState const&, TrainState const&) = default;
};

/// Upstream's StatefulObj: rand [10, 10].
struct StatefulObject {
  std::vector<float> data;
  explicit StatefulObject(std::uint32_t seed) : data{Random{seed}(100)} {}
  StateDict state() { return {{"data", TensorView<float>{data, {10, 10}}}}; }
};

/// Calls visit(type of a storage, place) for safetensors and for PyTorch's own format, which is upstream's.
template <class Visit>
void in_each_storage(std::string const& directory, Visit visit) {
  visit(std::type_identity<SafeTensors>{}, directory + "/ckpt");
  visit(std::type_identity<TorchDcp>{}, directory + "/torch_dcp");
}

// `save`(state, train on): saves, and returns the place; with train on(), once the state may change, training goes on.
template <class Strategy, class S, class C, class Save>
void save_and_load_with(C& world, Save save) {
  // The reference: one process alone, two steps.
  SelfComm alone;
  auto reference = dummy<Ddp>(alone);
  Adam<Ddp> reference_optimizer{alone, reference, 0.1f};
  auto const reference_losses = train(alone, reference, reference_optimizer, 2);

  auto model = dummy<Strategy>(world);
  Adam<Strategy> optimizer{world, model, 0.1f};
  TrainState trained;
  trained.record(train(world, model, optimizer, 2));
  CHECK(trained.losses == reference_losses);
  CHECK(trained.losses[0] != trained.losses[1]);
  StatefulObject object{17};
  TrainState const saved = trained;
  std::string const place = save({{"model", model}, {"optimizer", optimizer}, {"s", object}, {"train_state", trained}}, [&] { trained.record(train(world, model, optimizer, 1)); });

  auto loaded = dummy<Strategy>(world, 1);
  Adam<Strategy> loaded_optimizer{world, loaded, 0.2f};
  StatefulObject loaded_object{18};
  TrainState loaded_state;
  CHECK(loaded.gather(world) != reference.gather(alone));
  dcp::load<S>(world, place, {{"model", loaded}, {"optimizer", loaded_optimizer}, {"s", loaded_object}, {"train_state", loaded_state}});

  CHECK(loaded_object.data == object.data);
  CHECK(loaded_state == saved);
  CHECK(loaded_state.step == 2);
  CHECK(loaded_state.losses == reference_losses);
  CHECK(loaded.gather(world) == reference.gather(alone));
  CHECK(loaded_optimizer.gather(world) == reference_optimizer.gather(alone));
  CHECK(loaded_optimizer.learning_rate == 0.1f);

  // Upstream compares optimizers by loading the state into a plain one.
  auto plain_model = dummy<Ddp>(alone, 2);
  Adam<Ddp> plain_optimizer{alone, plain_model, 0.3f};
  dcp::load<S>(alone, place, {{"optimizer", plain_optimizer}}, {.on_unexpected = OnUnexpected::ignore});
  CHECK(plain_optimizer.gather(alone) == reference_optimizer.gather(alone));
  CHECK(plain_optimizer.learning_rate == reference_optimizer.learning_rate);
  CHECK(plain_optimizer.betas == reference_optimizer.betas);
  CHECK(plain_optimizer.epsilon == reference_optimizer.epsilon);

  auto const next = train(world, loaded, loaded_optimizer, 1), expected = train(alone, reference, reference_optimizer, 1);
  CHECK(next == expected);
  CHECK(expected[0] != 0);
  CHECK(loaded.gather(world) == reference.gather(alone));
}

template <class Strategy, class C>
void save_and_load(C& world, std::string const& directory) {
  in_each_storage(directory, [&]<class S>(std::type_identity<S>, std::string const& place) {
    save_and_load_with<Strategy, S>(world, [&](StateDict const& state, auto) {
      dcp::save<S>(world, place, state);
      return place;
    });
  });
}

// A save in the background, by T and `executor`; `cached`: with the staging memory of an earlier one.
template <class T, class C>
void async_cached(C& world, std::string const& directory, bool cached, Executor executor) {
  CheckpointManager<SafeTensors, T> manager{world, directory, {.save = {.executor = executor, .saver_program = DCP_SAVER_PROGRAM}}};
  save_and_load_with<Fsdp, SafeTensors>(world, [&](StateDict const& state, auto train_on) {
    std::vector<std::int64_t> earlier;
    if (cached) earlier = manager.save(1, state).saver_processes;
    Pending pending = manager.async_save(2, state);
    pending.wait_staged();
    train_on();
    Report const report = pending.wait();
    CHECK(report.pool_reused == cached);
    CHECK(report.plan_reused == cached);
    CHECK(report.deferred == (T::name == "deferred"));
    CHECK(report.stager == T::name);
    CHECK(report.saver_processes.size() == (executor == Executor::process ? static_cast<std::size_t>(world.size()) : 0u));
    for (auto const process : report.saver_processes) CHECK(process != static_cast<std::int64_t>(::getpid()));
    if (cached) CHECK(report.saver_processes == earlier);   // the same process serves
    return directory + "/step-00000002";
  });
}

// Upstream, after two steps, save, and load into new objects: the Stateful object equal; step, current_loss and losses equal; the loss of
// one more step equal on reference and loaded model; the gathered model equal to the reference; the optimizer state equal to it as well.
TEST_CASE("test_e2e: FSDP, a training of four ranks goes on from a checkpoint as one process alone does") {
  on_ranks(4, [](auto& world, std::string const& directory) { save_and_load<Fsdp>(world, directory); });
}
// The same asserts.
TEST_CASE("test_e2e: HSDP, a training of four ranks goes on from a checkpoint as one process alone does") {
  on_ranks(4, [](auto& world, std::string const& directory) { save_and_load<Hsdp>(world, directory); });
}
// The same asserts.
TEST_CASE("test_e2e: DDP, a training of four ranks goes on from a checkpoint as one process alone does") {
  on_ranks(4, [](auto& world, std::string const& directory) { save_and_load<Ddp>(world, directory); });
}

// The same asserts with FSDP and async_save, for (cache, executor, zero-overhead copy); upstream polls the future, here training goes on meanwhile. That each
// mechanism ran is in the report.
TEST_CASE("test_e2e_async_cached: (False, THREAD, False), staging memory of its own, threads, the copy inside the call") {
  on_ranks(4, [](auto& world, std::string const& directory) { async_cached<CopyStager>(world, directory, false, Executor::thread); });
}
TEST_CASE("test_e2e_async_cached: (True, THREAD, False), staging memory used again, threads, the copy inside the call") {
  on_ranks(4, [](auto& world, std::string const& directory) { async_cached<CopyStager>(world, directory, true, Executor::thread); });
}
TEST_CASE("test_e2e_async_cached: (False, PROCESS, False), staging memory of its own, another process, the copy inside the call") {
  on_ranks(4, [](auto& world, std::string const& directory) { async_cached<CopyStager>(world, directory, false, Executor::process); });
}
TEST_CASE("test_e2e_async_cached: (True, PROCESS, False), staging memory used again, another process, the copy inside the call") {
  on_ranks(4, [](auto& world, std::string const& directory) { async_cached<CopyStager>(world, directory, true, Executor::process); });
}
TEST_CASE("test_e2e_async_cached: (False, PROCESS, True), staging memory of its own, another process, the copy behind the call") {
  on_ranks(4, [](auto& world, std::string const& directory) { async_cached<BasicDeferredStager<true>>(world, directory, false, Executor::process); });
}
TEST_CASE("test_e2e_async_cached: (False, THREAD, True), staging memory of its own, threads, the copy behind the call") {
  on_ranks(4, [](auto& world, std::string const& directory) { async_cached<BasicDeferredStager<true>>(world, directory, false, Executor::thread); });
}

// Upstream: async_save({}) of ranks without a CPU backend is an AssertionError "A CPU backend must be enabled for async save;". What stages here is host
// memory.
TEST_CASE("test_no_cpu: async_save with nothing that can stage it says what to enable, on all ranks, and nothing is on disk") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    StatefulObject object{17};
    for (StateDict const& state : {StateDict{}, StateDict{{"s", object}}}) {
      try {
        static_cast<void>(async_save<SafeTensors>(world, directory + "/ckpt", state, {.staging_bytes = 0}));
        FAIL("it was begun");
      } catch (Error const& error) {
        CHECK(error.code() == ErrorCode::unsupported);
        CHECK(std::string{error.what()}.find("enable it with staging_bytes") != std::string::npos);
      }
    }
    CHECK(std::filesystem::is_empty(directory));
  });
}

/// Upstream's Foo with an empty state, which is told of a load and must not be assigned to.
struct Told {
  int loads = 0, assignments = 0;
  Told() = default;
  Told(Told const&) = default;
  Told& operator=(Told const&) {
    ++assignments;
    return *this;
  }
  StateDict state() { return {}; }
  void after_load() { ++loads; }
};

// Upstream: (1) {foo: a Stateful with an empty state}: its hook was called, and nothing was assigned to the dict. (2) {foo: {replicated:
// rand [10, 10], bytes: [1, 2, 3, 4]}}: the dict was assigned to.
TEST_CASE("test_stateful_and_non_stateful_loads: a stateful entry is told and not replaced, plain entries get the stored values") {
  on_ranks(1, [](auto& world, std::string const& directory) {
    Told foo;
    dcp::save<SafeTensors>(world, directory + "/stateful", {{"foo", foo}});
    CHECK(foo.loads == 0);
    dcp::load<SafeTensors>(world, directory + "/stateful", {{"foo", foo}});
    CHECK(foo.loads == 1);
    CHECK(foo.assignments == 0);

    auto const saved = Random{3}(100);
    std::vector<float> replicated = saved;
    std::vector<std::int64_t> bytes{1, 2, 3, 4};
    auto const state = [&] { return StateDict{{"foo", {{"replicated", TensorView<float>{replicated, {10, 10}}}, {"bytes", bytes}}}}; };
    dcp::save<SafeTensors>(world, directory + "/plain", state());
    replicated.assign(100, 0.0f);
    bytes = {5};
    dcp::load<SafeTensors>(world, directory + "/plain", state());
    CHECK(replicated == saved);
    CHECK(bytes == std::vector<std::int64_t>{1, 2, 3, 4});
  });
}

// Upstream: save({}) and load({}) without a process group succeed.
TEST_CASE("test_no_dist: an empty state saves and loads, without a launcher and by four ranks") {
  on_ranks(1, [](auto&, std::string const& directory) {
    SelfComm self;
    CHECK(dcp::save<SafeTensors>(self, directory + "/ckpt", {}).tensors == 0);
    CHECK(dcp::load<SafeTensors>(self, directory + "/ckpt", {}).tensors == 0);
  });
  on_ranks(4, [](auto& world, std::string const& directory) {
    dcp::save<SafeTensors>(world, directory + "/ckpt", {});
    CHECK(!dcp::load<SafeTensors>(world, directory + "/ckpt", {}).foreign);
  });
}

// Upstream saves {model, optimizer} with FSDP. (a) Loading {model} alone equals the reference. (b) load-from-keys "model" equals it. (c)
// load-from-keys "optimizer.state": no param_groups, and for each parameter exp_avg, exp_avg_sq and step equal the optimizer's.
TEST_CASE("test_partial_load: the model alone, the keys under model, and the keys under optimizer.state without param_groups") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    SelfComm alone;
    auto reference = dummy<Ddp>(alone);
    Adam<Ddp> reference_optimizer{alone, reference, 0.1f};
    train(alone, reference, reference_optimizer, 2);
    auto const weights = reference.gather(alone), moments = reference_optimizer.gather(alone);
    auto model = dummy<Fsdp>(world);
    Adam<Fsdp> optimizer{world, model, 0.1f};
    train(world, model, optimizer, 2);
    in_each_storage(directory, [&]<class S>(std::type_identity<S>, std::string const& place) {
      dcp::save<S>(world, place, {{"model", model}, {"optimizer", optimizer}});

      auto loaded = dummy<Fsdp>(world, 1);
      auto const report = dcp::load<S>(world, place, {{"model", loaded}}, {.on_unexpected = OnUnexpected::ignore});
      CHECK(loaded.gather(world) == weights);
      CHECK(report.tensors == 8);
      CHECK(report.unexpected.size() == 8 * 3 + 3);   // moments and steps of 8 parameters, three numbers of the group

      auto const by_model = dcp::load_from_keys<S>(world, place, {"model"});
      CHECK(by_model.values().empty());
      CHECK(by_model.tensors().size() == weights.size());
      for (auto const& [name, values] : weights) {
        auto const got = by_model.tensors().at("model." + name).template as<float>();
        CHECK(std::vector<float>(got.begin(), got.end()) == values);
      }

      auto const by_state = dcp::load_from_keys<S>(world, place, {"optimizer.state"});
      CHECK(by_state.values().empty());   // param_groups are values, and the checkpoint has some
      CHECK(dcp::load_from_keys<S>(world, place, {"optimizer.param_groups"}).values().size() == 3);
      CHECK(by_state.tensors().size() == moments.size());
      for (auto const& [name, values] : moments) {
        auto const got = by_state.tensors().at("optimizer." + name).template as<float>();
        CHECK(std::vector<float>(got.begin(), got.end()) == values);
      }
      CHECK(by_state.tensors().at("optimizer.state.net1.0.weight.step").template as<float>()[0] == 2.0f);
    });
  });
}

/// Upstream's Foo and Bar: empty states whose hooks are collective.
template <class C>
struct Gathers {
  C* world;
  std::vector<int> ranks;
  StateDict state() { return {}; }
  void after_load() { ranks = all_gather_value(*world, world->rank()); }
};
template <class C>
struct Reduces {
  C* world;
  std::uint64_t sum = 0;
  StateDict state() { return {}; }
  void after_load() { sum = all_reduce_sum(*world, static_cast<std::uint64_t>(world->rank())); }
};

// Upstream: with {A: Foo, B: Bar} on rank 0 and {B: Bar, A: Foo} elsewhere, where Foo's hook does an all_gather and Bar's an all_reduce,
// save and load do not deadlock. Here the results of both are compared as well.
TEST_CASE("test_different_ordered_state_dict_keys: ranks list entries in different orders, and hooks that are collective still meet") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    using C = std::remove_reference_t<decltype(world)>;
    Gathers<C> foo{&world, {}};
    Reduces<C> bar{&world};
    StateDict const state = world.rank() == 0 ? StateDict{{"A", foo}, {"B", bar}} : StateDict{{"B", bar}, {"A", foo}};
    dcp::save<SafeTensors>(world, directory + "/ckpt", state);
    CHECK(foo.ranks.empty());
    dcp::load<SafeTensors>(world, directory + "/ckpt", state);
    CHECK(foo.ranks == std::vector<int>{0, 1, 2, 3});
    CHECK(bar.sum == 6);
  });
}

// Upstream, t1 and t2 [10]: after save(t1) and save(t2, overwrite) a load gives t2; save without overwrite raises what matches
// "Checkpoint already exists".
TEST_CASE("test_overwrite: the second save replaces the first, and without replace it is refused: Checkpoint already exists") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    auto t1 = Random{1}(10), t2 = Random{2}(10);
    in_each_storage(directory, [&]<class S>(std::type_identity<S>, std::string const& place) {
      dcp::save<S>(world, place, {{"random", TensorView<float>{t1, {10}}}});
      dcp::save<S>(world, place, {{"random", TensorView<float>{t2, {10}}}}, {.if_exists = IfExists::replace});
      std::vector<float> loaded(10);
      StateDict const state{{"random", TensorView<float>{loaded, {10}}}};
      dcp::load<S>(world, place, state);
      CHECK(loaded == t2);
      std::string refused;
      try {
        dcp::save<S>(world, place, {{"random", TensorView<float>{t1, {10}}}}, {.if_exists = IfExists::fail});
      } catch (Error const& error) {
        CHECK(error.code() == ErrorCode::already_exists);
        refused = error.what();
      }
      CHECK(refused.find("Checkpoint already exists") != std::string::npos);
      loaded.assign(10, 0.0f);
      dcp::load<S>(world, place, state);
      CHECK(loaded == t2);
    });
  });
}

// Upstream's t1 is different on each rank, and whichever rank wins is what is stored. Here the ranks can be asked to compare.
TEST_CASE("test_overwrite: where ranks hold different values of a replicated tensor, Check::contents names both ranks and saves nothing") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    std::string const place = directory + "/ckpt";
    auto random = Random{world.rank() == 2 ? 5u : 1u}(10);
    StateDict const state{{"random", TensorView<float>{random, {10}}}};
    std::string refused;
    try {
      dcp::save<SafeTensors>(world, place, state, {.check = Check::contents});
    } catch (Error const& error) {
      CHECK(error.code() == ErrorCode::ranks_disagree);
      refused = error.what();
    }
    CHECK(refused.find("random: rank 0 and rank 2 hold different contents") != std::string::npos);
    CHECK(!std::filesystem::exists(place));

    std::ranges::copy(Random{1}(10), random.begin());
    dcp::save<SafeTensors>(world, place, state, {.check = Check::contents});
    std::int64_t step = world.rank() == 3 ? 8 : 7;   // values are always compared
    refused.clear();
    try {
      dcp::save<SafeTensors>(world, place, {{"step", step}}, {.if_exists = IfExists::replace});
    } catch (Error const& error) {
      refused = error.what();
    }
    CHECK(refused.find("step: rank 0 and rank 3 hold different values") != std::string::npos);
    random.assign(10, 0.0f);
    dcp::load<SafeTensors>(world, place, state);
    CHECK(random == Random{1}(10));
  });
}

// Upstream saves a model with Adam(0.1) and loads into the state dicts of a second one with Adam(0.2): the top-level objects keep their
// identity, model and optimizer state equal what was loaded, and the learning rate of the group is 0.1.
TEST_CASE("test_init_state_dict: loading keeps every address, fills what is there, and the learning rate goes from 0.2 to 0.1") {
  on_ranks(1, [](auto& world, std::string const& directory) {
    auto model = dummy<Ddp>(world);
    Adam<Ddp> optimizer{world, model, 0.1f};
    train(world, model, optimizer, 1);
    in_each_storage(directory, [&]<class S>(std::type_identity<S>, std::string const& place) {
      dcp::save<S>(world, place, {{"model", model}, {"optimizer", optimizer}});

      auto second = dummy<Ddp>(world, 1);
      Adam<Ddp> second_optimizer{world, second, 0.2f};
      auto const addresses = [&] {
        std::vector<void const*> all{&second, &second_optimizer, &second_optimizer.learning_rate, second_optimizer.betas.data()};
        for (auto const& parameter : second.parameters()) all.push_back(parameter.value.memory.data());
        for (auto const& of : second_optimizer.moments()) all.insert(all.end(), {of.exp_avg.memory.data(), of.exp_avg_sq.memory.data(), &of.step});
        return all;
      };
      auto const before = addresses();
      CHECK(second_optimizer.learning_rate == 0.2f);
      dcp::load<S>(world, place, {{"model", second}, {"optimizer", second_optimizer}});
      CHECK(addresses() == before);
      CHECK(second.gather(world) == model.gather(world));
      CHECK(second_optimizer.gather(world) == optimizer.gather(world));
      CHECK(second_optimizer.learning_rate == 0.1f);
    });
  });
}

}  // namespace dcp::test
