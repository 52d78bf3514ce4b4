// SPDX-License-Identifier: Apache-2.0
#pragma once
// The rows of PyTorch's test_dtensor_resharding.py, test_dtensor_checkpoint.py, test_hsdp_checkpoint.py, e2e/test_fine_tuning.py,
// e2e/test_fsdp_ep.py, test_dedup_tensors.py and the sharded ones of test_file_system_checkpoint_cpu.py, for any communicator. Include one
// of ranks_on_*.hpp before. Upstream saves most of them in its own format, here they are safetensors.

#include "support/plain_safetensors.hpp"
#include "support/upstream_resharding.hpp"
#include "support/upstream_training.hpp"

#include <dcp/checkpoint/flat_ranges.hpp>

#include <array>
#include <numeric>
#include <set>

namespace dcp::test {

// Upstream: [14, 1] as Shard(0) over 4 ranks (4, 4, 4 and 2 rows) is saved and loaded into a plain tensor; it must not fail. Here the value
// is compared too.
TEST_CASE("test_dtensor_checkpoint_with_uneven_shards: 14 rows as 4, 4, 4 and 2 load into a plain tensor") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    in_each_layout(directory, [&](std::string const& place, FileLayout layout) {
      Held<float, S1> held{mesh_1d(world), {14, 1}};
      CHECK(held.memory.size() == (world.rank() == 3 ? 2u : 4u));
      held.fill(arange(14));
      dcp::save<SafeTensors>(world, place, {{"dtensor", held.tensor}}, {.storage = {.layout = layout}});
      std::vector<float> whole(14);
      dcp::load<SafeTensors>(world, place, {{"dtensor", TensorView<float>{whole, {14, 1}}}});
      CHECK(whole == arange(14));
    });
  });
}

// Rows (begin, length) that only the rank itself knows, one run each, saved and loaded in other runs.
template <class World, std::size_t Ranks>
void reshard_runs(World& world, std::string const& directory, std::array<FlatRange, Ranks> const& saved, std::array<FlatRange, Ranks> const& wanted) {
  auto const me = static_cast<std::size_t>(world.rank());
  auto const bucket_of = [&](FlatRange const& mine) { return exchange_flat_ranges(world, mesh_1d(world), 0, {{16}}, 1, mine); };
  auto const fill = [](FlatRange const& range) {
    std::vector<float> memory(static_cast<std::size_t>(range.size()));
    std::iota(memory.begin(), memory.end(), static_cast<float>(range.begin));
    return memory;
  };
  using Runs = ShardedTensor<float, Placement<FlatShard>>;
  in_each_layout(directory, [&](std::string const& place, FileLayout layout) {
    auto memory = fill(saved[me]);
    dcp::save<SafeTensors>(world, place, {{"ckpt", Runs{mesh_1d(world), {16}, bucket_of(saved[me])[0], memory}}}, {.storage = {.layout = layout}});
    std::vector<float> loaded(static_cast<std::size_t>(wanted[me].size()), -1.0f);
    dcp::load<SafeTensors>(world, place, {{"ckpt", Runs{mesh_1d(world), {16}, bucket_of(wanted[me])[0], loaded}}});
    CHECK(loaded == fill(wanted[me]));
  });
}

// Upstream: arange(16), saved as (0, 4) (4, 3) (7, 4) (11, 5), loads as (0, 2) (2, 4) (6, 6) (12, 4); each local part equals its arange.
TEST_CASE("test_uneven_reshard_with_checkpointable_api: runs that only their ranks know load as other runs") {
  on_ranks(4, [](auto& world, std::string const& directory) { reshard_runs(world, directory, std::array<FlatRange, 4>{{{0, 4}, {4, 7}, {7, 11}, {11, 16}}}, {{{0, 2}, {2, 6}, {6, 12}, {12, 16}}}); });
}
// Upstream: the same, loaded as (0, 6) (6, 2) (8, 1) (9, 7).
TEST_CASE("test_uneven_reshard_with_dtensor_shards_wrapper_api: a run of one element, and one of nearly half") {
  on_ranks(4, [](auto& world, std::string const& directory) { reshard_runs(world, directory, std::array<FlatRange, 4>{{{0, 4}, {4, 7}, {7, 11}, {11, 16}}}, {{{0, 6}, {6, 8}, {8, 9}, {9, 16}}}); });
}

// Upstream: rdt = Replicate [4 .. 7], sdt = Shard(0) [0 .. 3], extra_state {int 1, tensor [0.]} nested twice; loaded into ten times the
// values, all are as saved, the int too.
TEST_CASE("test_distributed_tensor_planner: replicated, sharded and nested extra state are restored over ten times their values") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    struct State {
      Held<float, R1> rdt;
      Held<float, S1> sdt;
      std::int64_t extra = 1, nested_extra = 1;
      std::vector<float> tensor{0.0f}, nested_tensor{0.0f};

      State(DeviceMesh<1> const& mesh, float factor) : rdt{mesh, {4}}, sdt{mesh, {4}} {
        rdt.fill({4 * factor, 5 * factor, 6 * factor, 7 * factor});
        sdt.fill({0, factor, 2 * factor, 3 * factor});
      }
      StateDict state() {
        return {{"rdt", rdt.tensor},
                {"sdt", sdt.tensor},
                {"extra_state", {{"int", extra}, {"tensor", TensorView<float>{tensor, {1}}}, {"nested", {{"int", nested_extra}, {"tensor", TensorView<float>{nested_tensor, {1}}}}}}}};
      }
    };
    State saved{mesh_1d(world), 1}, loaded{mesh_1d(world), 10};
    loaded.extra = loaded.nested_extra = 10;
    loaded.tensor = loaded.nested_tensor = {10.0f};
    CHECK(loaded.rdt.memory != saved.rdt.memory);
    dcp::save<SafeTensors>(world, directory + "/ckpt", saved);
    dcp::load<SafeTensors>(world, directory + "/ckpt", loaded);
    CHECK(loaded.rdt.memory == std::vector<float>{4, 5, 6, 7});
    CHECK(loaded.sdt.memory == std::vector<float>{static_cast<float>(world.rank())});
    CHECK(loaded.extra == 1);
    CHECK(loaded.nested_extra == 1);
    CHECK(loaded.tensor == std::vector<float>{0});
    CHECK(loaded.nested_tensor == std::vector<float>{0});
  });
}

/// What `saved` holds of `values` is saved and loaded into `loaded`.
template <class C, class From, class To>
void from_plan_to_plan(C& world, std::string const& place, From& saved, To& loaded, std::vector<float> const& values) {
  saved.fill(values);
  std::ranges::fill(loaded.memory, -1.0f);
  dcp::save<SafeTensors>(world, place, {{"tensor", saved.tensor}}, {.if_exists = IfExists::replace, .storage = {.layout = FileLayout::sharded}});
  dcp::load<SafeTensors>(world, place, {{"tensor", loaded.tensor}});
  loaded.each([&](float& x, std::size_t at) { CHECK(x == values[at]); });
  CHECK(replicated_view(world, loaded) == values);
}

// Upstream: [10, 20] between all ordered pairs of 4 plans of 2 ranks, in the same directory; what was gathered after the load equals what
// was saved. Its plans are rows in chunks (5, 5), rows 8 and 2, and two in which a rank holds several boxes of rows (2, 1, 3, 3, 1), which
// no Placement says; here a split of columns and one replica stand in their place.
TEST_CASE("test_load_with_different_shard_plan: equal rows, 8 and 2 rows, columns and replicas of [10, 20] load as each other") {
  on_ranks(2, [](auto& world, std::string const& directory) {
    DeviceMesh<1> const mesh = mesh_1d(world);
    std::string const place = directory + "/ckpt";
    auto const values = Random{11}(200);
    Padded const eight_and_two{{10, 20}, {16, 20}};
    auto const each_plan = [&](auto visit) {
      { Held<float, S1> held{mesh, {10, 20}}; visit(held); }
      { Held<float, S1> held{mesh, eight_and_two}; CHECK(held.tensor.local_box().shape == Extents{world.rank() == 0 ? 8 : 2, 20}); visit(held); }
      { Held<float, Placement<Shard<1>>> held{mesh, {10, 20}}; visit(held); }
      { Held<float, R1> held{mesh, {10, 20}}; visit(held); }
    };
    each_plan([&](auto& saved) { each_plan([&](auto& loaded) { from_plan_to_plan(world, place, saved, loaded, values); }); });
  });
}

// Upstream: rows on 2 ranks are saved and loaded as columns; the gathered tensors are equal.
TEST_CASE("test_load_rowwise_to_colwise: rows saved, columns loaded, and back") {
  on_ranks(2, [](auto& world, std::string const& directory) {
    Held<float, S1> rows{mesh_1d(world), {6, 20}};
    Held<float, Placement<Shard<1>>> columns{mesh_1d(world), {6, 20}};
    from_plan_to_plan(world, directory + "/ckpt", rows, columns, Random{12}(120));
    from_plan_to_plan(world, directory + "/ckpt", columns, rows, Random{13}(120));
  });
}

// Upstream: 32 elements, over 4 x 4 specs: a sharded tensor is saved and a plain one loaded, and the reverse; the tensors are equal.
TEST_CASE("test_switch_between_sharded_tensor_to_tensor: sharded saved and plain loaded, plain saved and sharded loaded") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    std::string const place = directory + "/ckpt";
    auto const values = Random{14}(32);
    auto const both_ways = [&]<class P, int N>(std::type_identity<P>, DeviceMesh<N> const& mesh) {
      Held<float, P> sharded{mesh, {32}};
      sharded.fill(values);
      std::vector<float> plain_values(32);
      StateDict const one{{"tensor", sharded.tensor}}, other{{"tensor", TensorView<float>{plain_values, {32}}}};
      dcp::save<SafeTensors>(world, place, one, {.if_exists = IfExists::replace});
      dcp::load<SafeTensors>(world, place, other);
      CHECK(plain_values == values);
      std::ranges::reverse(plain_values);
      dcp::save<SafeTensors>(world, place, other, {.if_exists = IfExists::replace});
      dcp::load<SafeTensors>(world, place, one);
      CHECK(gathered(world, sharded) == plain_values);
    };
    TwoDPlacements::each([&](auto placement) { both_ways(placement, mesh_2d(world)); });
    OneDPlacements::each([&](auto placement) { both_ways(placement, mesh_1d(world)); });
  });
}

// Upstream: the sharded model of 2 ranks is saved and loaded into another one; the gathered tensors differ before and are equal after.
TEST_CASE("test_read_write_shard_tensor: the sharded model of two ranks goes into another model of two ranks") {
  on_ranks(2, [](auto& world, std::string const& directory) {
    auto saved = dummy<Fsdp>(world, 1), loaded = dummy<Fsdp>(world, 2);
    dcp::save<SafeTensors>(world, directory + "/ckpt", saved);
    CHECK(loaded.gather(world) != saved.gather(world));
    dcp::load<SafeTensors>(world, directory + "/ckpt", loaded);
    CHECK(loaded.gather(world) == saved.gather(world));
  });
}

// Upstream: tensor_0 is in the plans of both ranks, r0 and r1 in one each; after deduplication plan 0 has 2 items and plan 1 has r1 alone.
TEST_CASE("test_dedup_shards: what two ranks hold both is stored once, what each holds alone is stored by it") {
  on_ranks(2, [](auto& world, std::string const& directory) {
    DeviceMesh<1> const mesh = mesh_1d(world);
    std::vector<float> shared = arange(100);
    Held<float, Placement<>> r0{mesh.sub<>({0}), {3}, 3.0f}, r1{mesh.sub<>({1}), {5}, 5.0f};
    std::string const place = directory + "/ckpt";
    auto const report = dcp::save<SafeTensors>(world, place, {{"tensor_0", TensorView<float>{shared, {100}}}, {"r0", r0.tensor}, {"r1", r1.tensor}}, {.storage = {.layout = FileLayout::sharded}});
    CHECK(report.tensors == 3);
    CHECK(report.tensor_bytes == 4 * 108);
    auto const file = [&](int rank) { return plain::read(place + "/shard-0000" + std::to_string(rank + 1) + "-model-00001-of-00001.safetensors"); };
    auto const first = file(0), second = file(1);
    CHECK(first.tensors.size() + second.tensors.size() == 3);
    CHECK(first.tensors.at("r0").template as<float>() == std::vector<float>(3, 3.0f));
    CHECK(second.tensors.at("r1").template as<float>() == std::vector<float>(5, 5.0f));
  });
}

/// Rows of test_hsdp_checkpoint.py, on a model of the given sizes.
template <class Strategy, class C>
Network<Strategy> hsdp_model(C const& world, std::vector<std::int64_t> const& sizes, std::uint32_t seed) {
  return {world, sizes, seed, [](std::size_t i) { return "net" + std::to_string(i); }};
}
inline std::vector<std::vector<std::int64_t>> const hsdp_sizes{{5, 8, 4, 12}, {5, 10, 15, 30, 5}};   // that 4 ranks split evenly, and not

// Upstream, mesh (2, W/2), models 5-8-4-12 and 5-10-15-30-5: after save and one step all parameters differ from what was saved; after the
// load local tensors, mesh and placements are equal to it.
TEST_CASE("test_hsdp_checkpoint: a step later the saved parameters come back, even and uneven shards") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    for (auto const& sizes : hsdp_sizes) {
      std::string const place = directory + "/" + std::to_string(sizes.size());
      auto model = hsdp_model<Hsdp>(world, sizes, 0);
      Adam<Hsdp> optimizer{world, model, 0.1f};
      std::vector<std::vector<float>> saved;
      for (auto const& parameter : model.parameters()) saved.push_back(parameter.value.memory);
      dcp::save<SafeTensors>(world, place, {{"model", model}});
      train(world, model, optimizer, 1);
      std::size_t i = 0, changed = 0;
      for (auto const& parameter : model.parameters()) changed += parameter.value.memory != saved[i++] ? 1 : 0;
      CHECK(changed > 0);
      auto const layout = model.parameters().front().value.tensor.layout();
      dcp::load<SafeTensors>(world, place, {{"model", model}});
      i = 0;
      for (auto const& parameter : model.parameters()) CHECK(parameter.value.memory == saved[i++]);
      CHECK(model.parameters().front().value.tensor.layout() == layout);
    }
  });
}

// Upstream: what HSDP on (2, W/2) saved is loaded by FSDP on W; the gathered tensors differ before, and are equal after.
TEST_CASE("test_hsdp_fsdp_checkpoint_conversion: what HSDP saved FSDP loads, even and uneven shards") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    for (auto const& sizes : hsdp_sizes) {
      std::string const place = directory + "/" + std::to_string(sizes.size());
      auto saved = hsdp_model<Hsdp>(world, sizes, 0);
      dcp::save<SafeTensors>(world, place, {{"model", saved}});
      auto loaded = hsdp_model<Fsdp>(world, sizes, 1);
      auto const wanted = saved.gather(world), before = loaded.gather(world);
      for (auto const& [name, values] : before) CHECK(values != wanted.at(name));
      dcp::load<SafeTensors>(world, place, {{"model", loaded}});
      CHECK(loaded.gather(world) == wanted);
    }
  });
}

// Upstream asserts nothing: it trains 3 linear layers with FSDP for 3 steps and saves {model, optim}; then, twice, a model that contains
// them frozen loads the pretrained part (strict=False) and its own checkpoint (missing the first time only), trains 3 steps and saves. Here
// what is loaded is compared, and what is frozen must stay. (Layers of 50, upstream's are of 500.)
TEST_CASE("test_fine_tuning: a frozen pretrained part and its own trained head come from two checkpoints") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    auto const name = [](std::size_t i) { return i <= 3 ? "pretrain.layer" + std::to_string(i) : std::string{"head"}; };
    std::string const base = directory + "/pretrain", own = directory + "/finetune";
    Whole pretrained, tuned;
    {
      Network<Fsdp> model{world, {50, 50, 50, 50}, 0, name};
      Adam<Fsdp> optimizer{world, model, 0.01f};
      train(world, model, optimizer, 3);
      pretrained = model.gather(world);
      dcp::save<SafeTensors>(world, base, {{"model", model}, {"optim", optimizer}});
    }
    for (int round = 0; round < 2; ++round) {
      Network<Fsdp> model{world, {50, 50, 50, 50, 50}, 7, name};
      Adam<Fsdp> optimizer{world, model, 0.01f, [](std::string const& parameter) { return parameter.starts_with("head"); }};
      auto const report = dcp::load<SafeTensors>(world, base, {{"model", model}}, {.on_missing = OnMissing::keep, .on_unexpected = OnUnexpected::ignore});
      CHECK(report.missing == std::vector<std::string>{"model.head.bias", "model.head.weight"});
      bool resumed = true;
      try {
        dcp::load<SafeTensors>(world, own, {{"model", model}, {"optim", optimizer}});
      } catch (Error const& error) {
        CHECK(error.code() == ErrorCode::not_found);
        resumed = false;
      }
      CHECK(resumed == (round == 1));
      if (resumed) CHECK(model.gather(world) == tuned);
      train(world, model, optimizer, 3);
      auto after = model.gather(world);
      for (auto const& [parameter, values] : pretrained) CHECK(after.at(parameter) == values);
      CHECK(after.at("head.weight") != (resumed ? tuned.at("head.weight") : Whole{}["head.weight"]));
      CHECK(optimizer.moments().front().step == 3.0f * static_cast<float>(round + 1));
      tuned = std::move(after);
      dcp::save<SafeTensors>(world, own, {{"model", model}, {"optim", optimizer}}, {.if_exists = IfExists::replace});
    }
  });
}

// Upstream, on (2, 4): FSDP parameters live on all ranks, those of expert i only on the ranks with rank % 4 == i, and the keys of the
// optimizer equal those of the model. Nothing is saved there; here, on (2, 2), it is, and loaded by ranks that place the experts otherwise.
TEST_CASE("test_fsdp_ep: experts are entries of their ranks only, saved together and loaded where experts live elsewhere") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    DeviceMesh<2> const mesh = mesh_2d(world);   // (data, expert)
    struct Trained {
      Held<float, SS> shared, shared_moment;
      Held<float, S1> expert0, expert1, moment0, moment1;
      Trained(DeviceMesh<2> const& all, DeviceMesh<1> const& of0, DeviceMesh<1> const& of1)
          : shared{all, {6, 3}}, shared_moment{all, {6, 3}}, expert0{of0, {5, 2}}, expert1{of1, {5, 2}}, moment0{of0, {5, 2}}, moment1{of1, {5, 2}} {}
      StateDict model() { return {{"layer", shared.tensor}, {"experts.0", expert0.tensor}, {"experts.1", expert1.tensor}}; }
      StateDict optimizer() { return {{"layer", shared_moment.tensor}, {"experts.0", moment0.tensor}, {"experts.1", moment1.tensor}}; }
      StateDict state() { return {{"model", model()}, {"optimizer", optimizer()}}; }
    };
    auto const keys = [](StateDict const& state) {
      std::set<std::string> names;
      for (auto const& entry : state.entries()) names.insert(entry.name);
      return names;
    };
    Trained saved{mesh, mesh.sub<0>({0}), mesh.sub<0>({1})};
    CHECK(keys(saved.model()) == std::set<std::string>{"layer", "experts." + std::to_string(world.rank() % 2)});
    CHECK(keys(saved.optimizer()) == keys(saved.model()));
    auto const shared = Random{1}(18), expert0 = Random{2}(10), expert1 = Random{3}(10);
    for (auto* part : {&saved.shared, &saved.shared_moment}) part->fill(shared);
    for (auto* part : {&saved.expert0, &saved.moment0}) part->fill(expert0);
    for (auto* part : {&saved.expert1, &saved.moment1}) part->fill(expert1);
    dcp::save<SafeTensors>(world, directory + "/ckpt", saved);

    // Expert 0 on the first data group, expert 1 on the second.
    Trained loaded{mesh, mesh.sub<1>({0}), mesh.sub<1>({1})}, expected{mesh, mesh.sub<1>({0}), mesh.sub<1>({1})};
    dcp::load<SafeTensors>(world, directory + "/ckpt", loaded);
    expected.shared.fill(shared), expected.expert0.fill(expert0), expected.expert1.fill(expert1);
    CHECK(loaded.shared.memory == expected.shared.memory);
    CHECK(loaded.shared_moment.memory == expected.shared.memory);
    CHECK(loaded.expert0.memory == expected.expert0.memory);
    CHECK(loaded.moment1.memory == expected.expert1.memory);
    CHECK(loaded.expert0.memory.size() + loaded.expert1.memory.size() > 0);
  });
}

}  // namespace dcp::test
