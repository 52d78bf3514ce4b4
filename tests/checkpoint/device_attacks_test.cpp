// SPDX-License-Identifier: Apache-2.0
// What programs do to tensors on devices at the worst moment, and what devices do to programs: on simulated ones, which do nothing before they are waited for.
#include <dcp/checkpoint/async_save.hpp>
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/manager.hpp>
#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/checkpoint/reshard.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/quantized.hpp>
#include <dcp/storage/safetensors.hpp>
#include <dcp/storage/torch_dcp.hpp>

#include <doctest/doctest.h>

#include "support/campaign.hpp"
#include "support/device_twin.hpp"
#include "support/generate.hpp"
#include "support/outcome.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using dcp::test::DeviceTwin, dcp::test::error_of, dcp::test::SimulatedApi, dcp::test::SimulatedDevices;
using Files = dcp::BasicSafeTensors<dcp::Memory>;
using Torch = dcp::BasicTorchDcp<dcp::Memory>;
template <bool Guarded>
using Deferred = dcp::BasicDeferredStager<Guarded>;
/// Files in PyTorch's format hold values, so that each save plans them anew.
template <class S>
constexpr bool plans_stay_valid = !std::is_same_v<S, Torch>;
using Wanted = std::map<std::string, std::vector<float>>;

std::vector<float> numbers(std::int64_t count, float first) {
  std::vector<float> values(static_cast<std::size_t>(count));
  for (auto& value : values) value = first++;
  return values;
}

/// Tensors of floats on the host.
class Tensors {
 public:
  /// Elements first, first + 1, ... in the order of memory, `elements` of it; by default as many as the shape has, in row-major order.
  std::vector<float>& add_as(std::string const& name, dcp::Layout const& layout, float first, std::optional<dcp::Extents> strides = {}, std::int64_t elements = -1) {
    auto& values = memory_.emplace_back(numbers(elements < 0 ? layout.shape.elements() : elements, first));
    values.reserve(1);
    state.add_tensor(name, dcp::DType::f32, layout, {reinterpret_cast<std::byte*>(values.data()), strides.value_or(dcp::row_major_strides(layout.shape))});
    by_name_[name] = &values;
    return values;
  }
  std::vector<float>& add(std::string const& name, dcp::Extents const& shape, float first) { return add_as(name, dcp::plain_layout(shape), first); }
  std::vector<float>& at(std::string const& name) { return *by_name_.at(name); }
  Wanted now() const {
    Wanted all;
    for (auto const& [name, values] : by_name_) all[name] = *values;
    return all;
  }
  void set_all(float value) {
    for (auto& values : memory_) std::ranges::fill(values, value);
  }

  dcp::StateDict state;

 private:
  std::deque<std::vector<float>> memory_;
  std::map<std::string, std::vector<float>*> by_name_;
};
/// A few, of all sizes that matter to buffers of 1 MiB and chunks; a scalar and one without elements among them.
Tensors some_tensors(float first, bool large = false) {
  Tensors tensors;
  tensors.add("layer.weight", {37, 129}, first);
  tensors.add("layer.bias", {129}, first + 0.5f);
  tensors.add("scale", dcp::Extents{}, first + 7);
  tensors.add("none", {0, 5}, 0);
  if (large) tensors.add("large", {3, 200'003}, first + 0.25f);
  return tensors;
}

/// All of a checkpoint, to the host.
template <class S>
Wanted stored_in(dcp::Memory const& store, std::string const& place = "ckpt") {
  dcp::SelfComm self;
  auto const stored = dcp::load_from_keys<S>(self, {store, place});
  Wanted all;
  for (auto const& [name, tensor] : stored.tensors()) {
    auto const values = tensor.template as<float>();
    all[name] = {values.begin(), values.end()};
  }
  return all;
}
/// Not a comparison in doctest: of large ones it would print all.
bool same(Wanted const& a, Wanted const& b) { return a == b; }

std::vector<std::string> names_in(dcp::Memory const& store, std::string const& directory) {
  std::vector<std::string> names;
  for (auto const& entry : dcp::MediumModel<dcp::Memory>{store}.list(directory)) names.push_back(entry.name);
  return names;
}

template <class S>
void save_from_host(dcp::Memory const& store, Tensors& tensors) {
  dcp::SelfComm self;
  dcp::save<S>(self, {store, "ckpt"}, tensors.state, {.if_exists = dcp::IfExists::replace});
}

}  // namespace

TEST_CASE("sources may be freed as soon as save has returned, or async_save, or the event of a deferred save is done: nothing reads them later") {
  enum class Way { save, copy, deferred };
  auto const run = [](Way way, bool early) {
    CAPTURE(static_cast<int>(way));
    SimulatedDevices devices{2};
    dcp::Memory store;
    Tensors expected = some_tensors(1, true);
    std::atomic<int> failed{0};
    dcp::run_threads(2, [&](dcp::ThreadComm& world) {
      Tensors tensors = some_tensors(1, true);
      DeviceTwin twin{devices, world.rank(), {world.rank()}, tensors.state};
      twin.upload();
      dcp::SaveOptions<Files> const options{.on = twin.on()};
      std::optional<dcp::Pending> pending;
      if (way == Way::save) dcp::save<Files>(world, {store, "ckpt"}, twin.state, options);
      if (way == Way::copy) pending = dcp::async_save<Files>(world, {store, "ckpt"}, twin.state, options);
      if (way == Way::deferred) pending = dcp::async_save<Files, Deferred<true>>(world, {store, "ckpt"}, twin.state, options);
      if (way == Way::deferred && !early) {
        auto const event = pending->staged_event();
        while (!event.done()) {}
      }
      twin.free();
      if (early) devices.api->drain();
      auto const error = error_of([&] {
        if (pending) pending->wait();
      });
      devices.api->drain();
      if (error) CHECK(error->code() == dcp::ErrorCode::device);
      failed += error ? 1 : 0;
      if (!early) CHECK(devices.api->synchronize(twin.stream(world.rank())) == 0);
      CHECK(devices.api->last_error() == 0);
    });
    CHECK(failed == (early ? 2 : 0));
    if (early) CHECK(names_in(store, "").empty());
    else CHECK(same(stored_in<Files>(store), expected.now()));
  };
  run(Way::save, false);
  run(Way::copy, false);
  run(Way::deferred, false);
  run(Way::deferred, true);   // and before that event, the simulated device notices
}

TEST_CASE("sources are overwritten in the stream right after async_save has returned, a hundred times, and what is saved is what they were") {
  std::uint64_t const base_seed = dcp::test::first_seed();
  for (int round = 0; round < dcp::test::rounds(100, 1000); ++round) {
    std::uint64_t const seed = base_seed + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    dcp::test::Random random{seed};
    SimulatedDevices devices{2, seed};
    if (random.one_in(3)) devices.api->eager(3);
    dcp::Memory store;
    int const ranks = static_cast<int>(random.between(1, 2));
    bool const deferred = random.one_in(2), torch = random.one_in(3), drained = random.one_in(2), late = random.one_in(2), both = random.one_in(3);
    auto const rows = random.between(1, 300), columns = random.between(1, 300);
    auto const tensors_of = [&](float first) {
      Tensors tensors;
      tensors.add("a", {rows, columns}, first);
      tensors.add("b", {columns}, first + 0.5f);
      return tensors;
    };
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      Tensors tensors = tensors_of(3);
      DeviceTwin twin{devices, world.rank(), both ? std::vector<int>{0, 1} : std::vector<int>{world.rank()}, tensors.state};
      if (late)
        for (auto const& on : twin.on()) devices.api->delay(twin.stream(on.ordinal), 5);
      twin.upload();
      auto const attack = [&]<class S, class T>(std::type_identity<S>, std::type_identity<T>) {
        dcp::Pending pending = dcp::async_save<S, T>(world, {store, "ckpt"}, twin.state, {.on = twin.on()});
        auto const event = pending.staged_event();
        for (auto const& on : twin.on()) event.before(on);
        twin.overwrite();
        if (drained) devices.api->drain();
        pending.wait();
      };
      if (torch && deferred) attack(std::type_identity<Torch>{}, std::type_identity<Deferred<false>>{});
      else if (torch) attack(std::type_identity<Torch>{}, std::type_identity<dcp::CopyStager>{});
      else if (deferred) attack(std::type_identity<Files>{}, std::type_identity<Deferred<false>>{});
      else attack(std::type_identity<Files>{}, std::type_identity<dcp::CopyStager>{});
    });
    bool const right = same(torch ? stored_in<Torch>(store) : stored_in<Files>(store), tensors_of(3).now());
    REQUIRE(right);
  }
}

TEST_CASE("a deferred save returns while the program's stream is held up, whatever the format and guarded or not, and reads what the stream then writes") {
  auto const run = [&]<class S, class T>(std::type_identity<S>, std::type_identity<T>) {
    SimulatedDevices devices{1};
    dcp::Memory store;
    dcp::SelfComm self;
    Tensors tensors = some_tensors(5);
    DeviceTwin twin{devices, 0, {0}, tensors.state};
    dcp::CheckpointManager<S, T> manager{self, {store, "run"}, {.save = {.on = twin.on()}}};
    for (std::int64_t step = 1; step <= 3; ++step) {   // the second and third of them, where that can be, by the plan of the first
      CAPTURE(step);
      for (auto const& [name, values] : tensors.now()) std::ranges::fill(tensors.at(name), static_cast<float>(step));
      devices.api->hold(twin.stream(0));
      twin.upload();
      dcp::Pending pending = manager.async_save(step, twin.state);
      auto const event = pending.staged_event();
      event.before(twin.on()[0]);
      twin.overwrite();
      CHECK(!event.done());
      CHECK(!pending.done());
      devices.api->release(twin.stream(0));
      CHECK(pending.wait().plan_reused == (step > 1 && plans_stay_valid<S>));
    }
    for (std::int64_t step = 1; step <= 3; ++step) {
      for (auto const& [name, values] : tensors.now()) std::ranges::fill(tensors.at(name), static_cast<float>(step));
      CHECK(same(stored_in<S>(store, "run/step-0000000" + std::to_string(step)), tensors.now()));
    }
  };
  run(std::type_identity<Files>{}, std::type_identity<Deferred<true>>{});
  run(std::type_identity<Files>{}, std::type_identity<Deferred<false>>{});
  run(std::type_identity<Torch>{}, std::type_identity<Deferred<true>>{});
  run(std::type_identity<Torch>{}, std::type_identity<Deferred<false>>{});
}

TEST_CASE("save, load and reshard wait for producers that are held up, and then come after them") {
  SimulatedDevices devices{1};
  dcp::Memory store;
  dcp::SelfComm self;
  // Once the library asks for the end of its copies, the stream goes on.
  auto const released = [&](DeviceTwin const& twin, auto call) {
    int const asked = devices.api->calls("query");
    std::thread other{[&] {
      while (devices.api->calls("query") < asked + 20) std::this_thread::yield();
      devices.api->release(twin.stream(0));
    }};
    call();
    other.join();
  };
  Tensors tensors = some_tensors(5), target = some_tensors(-9), third = some_tensors(-90);
  DeviceTwin twin{devices, 0, {0}, tensors.state}, loaded{devices, 0, {0}, target.state}, resharded{devices, 0, {0}, third.state};
  devices.api->hold(twin.stream(0));
  twin.upload();
  released(twin, [&] { dcp::save<Files>(self, {store, "ckpt"}, twin.state, {.on = twin.on()}); });
  CHECK(same(stored_in<Files>(store), tensors.now()));
  devices.api->hold(loaded.stream(0));
  loaded.upload();   // what is there before
  released(loaded, [&] { dcp::load<Files>(self, {store, "ckpt"}, loaded.state, {.on = loaded.on()}); });
  devices.api->drain();
  loaded.download();
  CHECK(same(target.now(), tensors.now()));
  devices.api->hold(resharded.stream(0));
  resharded.upload();
  released(resharded, [&] { dcp::reshard(self, loaded.state, resharded.state, {.on = resharded.on()}); });
  devices.api->drain();
  resharded.download();
  CHECK(same(third.now(), tensors.now()));
}

TEST_CASE("the program's streams may be destroyed right after each call, with what is in them") {
  SimulatedDevices devices{2};
  dcp::Memory store;
  dcp::SelfComm self;
  Tensors tensors = some_tensors(5, true), target = some_tensors(-9, true);
  DeviceTwin twin{devices, 0, {0, 1}, tensors.state}, loaded{devices, 0, {1, 0}, target.state};
  twin.upload();
  dcp::save<Files>(self, {store, "ckpt"}, twin.state, {.on = twin.on()});
  twin.new_streams();
  loaded.upload();
  dcp::load<Files>(self, {store, "ckpt"}, loaded.state, {.on = loaded.on()});
  loaded.new_streams();
  devices.api->drain();
  loaded.download();
  CHECK(same(target.now(), tensors.now()));
  for (bool const deferred : {true, false}) {
    CAPTURE(deferred);
    tensors.set_all(deferred ? 3.0f : 4.0f);
    twin.upload();
    dcp::SaveOptions<Files> const options{.if_exists = dcp::IfExists::replace, .on = twin.on()};
    dcp::Pending pending = deferred ? dcp::async_save<Files, Deferred<true>>(self, {store, "ckpt"}, twin.state, options) : dcp::async_save<Files>(self, {store, "ckpt"}, twin.state, options);
    twin.new_streams();
    auto const event = pending.staged_event();
    for (auto const& on : twin.on()) event.before(on);
    twin.overwrite();
    devices.api->drain();
    pending.wait();
    CHECK(same(stored_in<Files>(store), tensors.now()));
  }
}

TEST_CASE("one rank with tensors on two devices and the host, each with a stream; without one of the streams, one error that names the tensors and nothing is done") {
  SimulatedDevices devices{3};
  dcp::Memory store;
  dcp::SelfComm self;
  Tensors tensors = some_tensors(5, true), target = some_tensors(-9, true), third = some_tensors(-90, true);
  DeviceTwin twin{devices, 0, {0, 1, -1}, tensors.state}, loaded{devices, 0, {1, -1, 0}, target.state}, resharded{devices, 0, {-1, 0, 1, 1}, third.state};
  twin.upload();
  std::vector<dcp::DeviceStream> const one{twin.on()[0]};
  auto const refused = [&](auto call) {
    auto const error = error_of(call).value();
    CHECK(error.code() == dcp::ErrorCode::invalid_argument);
    CHECK(std::string{error.what()}.find("layer.bias: its memory is on simulated device device 1") != std::string::npos);
  };
  refused([&] { dcp::save<Files>(self, {store, "ckpt"}, twin.state, {.on = one}); });
  refused([&] { static_cast<void>(dcp::async_save<Files>(self, {store, "ckpt"}, twin.state, {.on = one})); });
  refused([&] { static_cast<void>(dcp::async_save<Files, Deferred<true>>(self, {store, "ckpt"}, twin.state, {.on = one})); });
  refused([&] { dcp::reshard(self, twin.state, third.state, {.on = one}); });
  CHECK(names_in(store, "").empty());
  CHECK(devices.api->contexts() == std::set<int>{0});
  dcp::save<Files>(self, {store, "ckpt"}, twin.state, {.on = twin.on()});
  refused([&] { dcp::load<Files>(self, {store, "ckpt"}, twin.state, {.on = one}); });

  loaded.upload();
  dcp::load<Files>(self, {store, "ckpt"}, loaded.state, {.on = loaded.on(), .threads = 3});
  devices.api->drain();
  loaded.download();
  CHECK(same(target.now(), tensors.now()));
  dcp::reshard(self, loaded.state, resharded.state, {.on = resharded.on()});
  resharded.download();
  CHECK(same(third.now(), tensors.now()));
  dcp::Pending pending = dcp::async_save<Torch, Deferred<true>>(self, {store, "second"}, loaded.state, {.on = loaded.on()});
  for (auto const& on : loaded.on()) pending.staged_event().before(on);
  loaded.overwrite();
  devices.api->drain();
  pending.wait();
  CHECK(same(stored_in<Torch>(store, "second"), target.now()));
  CHECK(devices.api->contexts() == std::set<int>{0, 1});
}

TEST_CASE("a device that is lost in the middle is one error on all ranks and commits nothing: the old checkpoint loads, and the next save from another device is whole") {
  enum class Way { save, copy, deferred, load };
  std::uint64_t const base_seed = dcp::test::first_seed();
  int const rounds = dcp::test::rounds(12, 200);
  auto const run = [&](Way way, std::uint64_t seed, bool at_once) {
    CAPTURE(static_cast<int>(way));
    CAPTURE(seed);
    SimulatedDevices devices{2, seed};
    dcp::Memory store;
    Tensors old = some_tensors(1, true);
    save_from_host<Files>(store, old);
    std::atomic<int> failed{0};
    dcp::run_threads(2, [&](dcp::ThreadComm& world) {
      Tensors tensors = some_tensors(100, true);
      DeviceTwin twin{devices, world.rank(), {0}, tensors.state}, other{devices, world.rank(), {1}, tensors.state};
      twin.upload();
      auto* const api = devices.api.get();
      world.barrier();
      if (world.rank() == 1) {
        // At once: before the first of this rank's copies. Else at any time.
        auto const loser = at_once ? twin.stream(0) : api->create_user_stream(0);
        api->launch(loser, [api] { api->lose(0); });
        if (!at_once) api->eager(static_cast<unsigned>(2 + seed % 40));
      }
      world.barrier();
      auto const error = error_of([&] {
        dcp::SaveOptions<Files> const options{.if_exists = dcp::IfExists::replace, .on = twin.on()};
        if (way == Way::save) dcp::save<Files>(world, {store, "ckpt"}, twin.state, options);
        if (way == Way::copy) dcp::async_save<Files>(world, {store, "ckpt"}, twin.state, options).wait();
        if (way == Way::deferred) dcp::async_save<Files, Deferred<true>>(world, {store, "ckpt"}, twin.state, options).wait();
        if (way == Way::load) dcp::load<Files>(world, {store, "ckpt"}, twin.state, {.on = twin.on()});
      });
      CHECK(api->last_error() == 0);
      if (error) CHECK(error->code() == dcp::ErrorCode::device);
      failed += error ? 1 : 0;
      world.barrier();
      if (world.rank() == 0) {
        CHECK((failed == 0 || failed == 2));
        CHECK(names_in(store, "") == std::vector<std::string>{"ckpt"});
        CHECK(same(stored_in<Files>(store), way == Way::load || error ? old.now() : tensors.now()));
      }
      world.barrier();
      if (way == Way::load) {
        dcp::load<Files>(world, {store, "ckpt"}, other.state, {.on = other.on()});
        other.download();
        CHECK(same(tensors.now(), old.now()));
        return;
      }
      tensors.set_all(8);
      other.upload();
      dcp::save<Files>(world, {store, "ckpt"}, other.state, {.if_exists = dcp::IfExists::replace, .on = other.on()});
      if (world.rank() == 0) CHECK(same(stored_in<Files>(store), tensors.now()));
    });
    if (at_once) CHECK(failed == 2);
  };
  for (auto const way : {Way::save, Way::copy, Way::deferred, Way::load}) {
    run(way, base_seed, true);
    for (int round = 0; round < rounds; ++round) run(way, base_seed + static_cast<std::uint64_t>(round), false);
  }
}

TEST_CASE("a manager whose device is lost goes on with states on the host, and a Pending that is dropped reads nothing more") {
  SimulatedDevices devices{2};
  dcp::Memory store;
  dcp::SelfComm self;
  Tensors tensors = some_tensors(5);
  {
    DeviceTwin twin{devices, 0, {0}, tensors.state};
    dcp::CheckpointManager<Files, Deferred<false>> manager{self, {store, "run"}, {.save = {.on = twin.on()}}};
    twin.upload();
    {
      auto const dropped = manager.async_save(1, twin.state);
    }
    CHECK(error_of([&] { manager.wait(); }).has_value());
    manager.save(2, twin.state);
    devices.api->lose(0);
    auto const error = error_of([&] { manager.save(3, twin.state); }).value();
    CHECK(error.code() == dcp::ErrorCode::device);
    CHECK(manager.steps() == std::vector<std::int64_t>{2});
  }
  DeviceTwin other{devices, 0, {1}, tensors.state};
  other.upload();
  dcp::CheckpointManager<Files, Deferred<false>> manager{self, {store, "run"}, {.save = {.on = other.on()}}};
  manager.save(4, other.state);
  CHECK(same(stored_in<Files>(store, "run/step-00000004"), tensors.now()));
  CHECK(same(stored_in<Files>(store, "run/step-00000002"), tensors.now()));
}

TEST_CASE("where pinned memory runs out, saves, loads, deferred saves and reshard go on with memory that is not, and the report of each says so") {
  for (std::size_t const limit : {std::size_t{0}, std::size_t{200'000}, std::size_t{1'500'000}}) {
    CAPTURE(limit);
    dcp::SelfComm self;
    dcp::Memory store;
    Tensors tensors = some_tensors(5, true), target = some_tensors(-9, true), third = some_tensors(-90, true);
    auto const check = [&](dcp::Report const& report, SimulatedDevices const& devices) {
      bool const unpinned = devices.driver->unpinned_bytes() > 0;
      CHECK((unpinned || limit > 0));
      CHECK(devices.api->pinned_bytes() <= limit);
      REQUIRE(report.warnings.size() == (unpinned ? 1u : 0u));
      if (unpinned) CHECK(report.warnings[0].find("could not be pinned") != std::string::npos);
    };
    {
      SimulatedDevices devices{1};
      devices.api->limit_pinned(limit);
      DeviceTwin twin{devices, 0, {0}, tensors.state};
      twin.upload();
      check(dcp::save<Files>(self, {store, "ckpt"}, twin.state, {.on = twin.on()}), devices);
      CHECK(same(stored_in<Files>(store), tensors.now()));
    }
    {
      SimulatedDevices devices{1};
      devices.api->limit_pinned(limit);
      DeviceTwin twin{devices, 0, {0}, target.state};
      twin.upload();
      check(dcp::load<Files>(self, {store, "ckpt"}, twin.state, {.on = twin.on()}), devices);
      twin.download();
      CHECK(same(target.now(), tensors.now()));
    }
    for (bool const deferred : {true, false}) {
      CAPTURE(deferred);
      SimulatedDevices devices{1};
      devices.api->limit_pinned(limit);
      DeviceTwin twin{devices, 0, {0}, tensors.state};
      twin.upload();
      dcp::SaveOptions<Files> const options{.if_exists = dcp::IfExists::replace, .on = twin.on()};
      dcp::Pending pending = deferred ? dcp::async_save<Files, Deferred<true>>(self, {store, "ckpt"}, twin.state, options) : dcp::async_save<Files>(self, {store, "ckpt"}, twin.state, options);
      pending.staged_event().before(twin.on()[0]);
      twin.overwrite();
      devices.api->drain();
      check(pending.wait(), devices);
      CHECK(same(stored_in<Files>(store), tensors.now()));
    }
    {
      SimulatedDevices devices{1};
      devices.api->limit_pinned(limit);
      DeviceTwin twin{devices, 0, {0}, third.state};
      twin.upload();
      check(dcp::reshard(self, tensors.state, twin.state, {.on = twin.on()}), devices);
      twin.download();
      CHECK(same(third.now(), tensors.now()));
    }
  }
}

TEST_CASE("memory that the host shares with devices is loaded, resharded and saved in place; a deferred save has no event for it, as only the host copies it") {
  SimulatedDevices devices{1};
  dcp::SelfComm self;
  dcp::Memory store;
  auto const stream = devices.api->create_user_stream(0);
  std::vector<dcp::DeviceStream> const on{devices.on(0, stream)};
  constexpr std::size_t count = 5000, bytes = count * sizeof(float);
  auto const values = numbers(count, 3), before = numbers(count, -5000);
  auto const shared = [&](std::vector<float> const& later) {
    std::byte* const memory = devices.api->allocate_shared(0, bytes);
    auto const all = std::as_bytes(std::span{later});
    devices.api->write_later(stream, memory, dcp::Bytes(all.begin(), all.end()));
    return memory;
  };
  auto const state_of = [&](std::byte* memory) {
    dcp::StateDict state;
    state.add_tensor("w", dcp::DType::f32, dcp::plain_layout({static_cast<std::int64_t>(count)}), {memory, dcp::Extents{1}});
    return state;
  };
  std::byte *const source = shared(values), *const target = shared(before), *const third = shared(before);
  {
    dcp::Pending pending = dcp::async_save<Files, Deferred<true>>(self, {store, "ckpt"}, state_of(source), {.on = on, .staging_bytes = dcp::least_memory_bytes});
    auto const error = error_of([&] { static_cast<void>(pending.staged_event()); });   // a guarded copy does not end before wait_staged()
    REQUIRE(error.has_value());
    CHECK(error->code() == dcp::ErrorCode::unsupported);
    pending.wait_staged();
    CHECK(pending.staged_event().done());
    devices.api->fill(stream, source, bytes, std::byte{0xAA});
    devices.api->drain();
    pending.wait();
  }
  CHECK(same(stored_in<Files>(store), {{"w", values}}));
  dcp::load<Files>(self, {store, "ckpt"}, state_of(target), {.on = on});
  devices.api->drain();
  CHECK(std::memcmp(target, values.data(), bytes) == 0);
  dcp::reshard(self, state_of(target), state_of(third), {.on = on});
  devices.api->drain();
  CHECK(std::memcmp(third, values.data(), bytes) == 0);
  for (auto* const memory : {source, target, third}) devices.api->free(memory);
}

TEST_CASE("tensors that lie in columns, with gaps between rows and elements, or as flat shards come from and to devices as from and to the host") {
  constexpr std::int64_t rows = 70, columns = 45, depth = 6;
  auto const layouts = [](Tensors& tensors, float first, dcp::ThreadComm const& world) {
    tensors.add_as("columns", dcp::plain_layout({rows, columns}), first, dcp::Extents{1, rows});
    tensors.add_as("gaps", dcp::plain_layout({rows, columns}), first + 1, dcp::Extents{columns + 3, 1}, rows * (columns + 3));
    tensors.add_as("elements", dcp::plain_layout({rows}), first + 2, dcp::Extents{3}, rows * 3);
    tensors.add_as("both", dcp::plain_layout({rows, columns}), first + 3, dcp::Extents{2 * columns + 1, 2}, rows * (2 * columns + 1));
    tensors.add_as("permuted", dcp::plain_layout({rows, columns, depth}), first + 4, dcp::Extents{1, rows * depth, rows});
    dcp::Layout flat = dcp::layout_of<dcp::Placement<dcp::FlatShard>>(dcp::DeviceMesh<1>{world, {2}}, dcp::Extents{rows, columns});
    std::int64_t const elements = dcp::held_by(flat, world.rank()).value().elements();
    tensors.add_as("flat", flat, first + 5 + static_cast<float>(world.rank()) * 5000, dcp::Extents{2}, elements * 2);
  };
  auto const through = [&]<class S>(std::type_identity<S>, typename S::Options const& storage) {
    SimulatedDevices devices{2};
    dcp::Memory store;
    dcp::run_threads(2, [&](dcp::ThreadComm& world) {
      Tensors tensors, wanted, target, third;
      layouts(tensors, 1, world);
      for (auto* more : {&wanted, &target, &third}) layouts(*more, -1, world), more->set_all(-1);
      DeviceTwin twin{devices, world.rank(), {world.rank()}, tensors.state}, loaded{devices, world.rank(), {world.rank()}, target.state}, resharded{devices, world.rank(), {1 - world.rank(), world.rank()}, third.state};
      // What the host makes of it, gaps included.
      dcp::reshard(world, tensors.state, wanted.state);
      twin.upload();
      dcp::save<S>(world, {store, "ckpt"}, twin.state, {.on = twin.on(), .storage = storage});
      loaded.upload();
      dcp::load<S>(world, {store, "ckpt"}, loaded.state, {.on = loaded.on()});
      loaded.download();
      CHECK(same(target.now(), wanted.now()));
      resharded.upload();
      dcp::reshard(world, loaded.state, resharded.state, {.on = resharded.on()});
      resharded.download();
      CHECK(same(third.now(), wanted.now()));
      dcp::Pending pending = dcp::async_save<S, Deferred<true>>(world, {store, "second"}, resharded.state, {.on = resharded.on(), .storage = storage});
      for (auto const& on : resharded.on()) pending.staged_event().before(on);
      resharded.overwrite();
      devices.api->drain();
      pending.wait();
      target.set_all(-1);
      dcp::load<S>(world, {store, "second"}, target.state);
      CHECK(same(target.now(), wanted.now()));
    });
  };
  through(std::type_identity<Files>{}, {});
  through(std::type_identity<Files>{}, {.layout = dcp::FileLayout::sharded});
  through(std::type_identity<Torch>{}, {});
}

TEST_CASE("replicas on devices that read once send each other the rest, and hold all of it in whatever order their streams come") {
  auto const through = [&]<class S>(std::type_identity<S>, bool large) {
    SimulatedDevices devices{2};
    dcp::Memory store;
    constexpr int ranks = 3;
    auto const tensors_of = [&](float first) {
      Tensors tensors;
      tensors.add_as("large", dcp::replicated_layout({large ? 1'000'003 : 40'003, 3}, ranks), first);
      tensors.add_as("small", dcp::replicated_layout({5}, ranks), first + 1);
      tensors.add_as("scalar", dcp::replicated_layout({}, ranks), first + 2);
      return tensors;
    };
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      Tensors tensors = tensors_of(1), target = tensors_of(-5);
      DeviceTwin twin{devices, world.rank(), {world.rank() % 2}, tensors.state}, loaded{devices, world.rank(), {(world.rank() + 1) % 2}, target.state};
      twin.upload();
      dcp::save<S>(world, {store, "ckpt"}, twin.state, {.check = dcp::Check::contents, .on = twin.on()});
      loaded.upload();
      dcp::load<S>(world, {store, "ckpt"}, loaded.state, {.on = loaded.on(), .read_once = true});
      devices.api->drain();
      loaded.download();
      CHECK(same(target.now(), tensors.now()));
    });
  };
  through(std::type_identity<Files>{}, true);
  through(std::type_identity<Torch>{}, false);
}

// PyTorch's own reused directory: rows 4 to 7 stand in file 3 and again in file 2, a leftover.
TEST_CASE("pieces that are stored twice are compared with what came to the device, with verify = full") {
  std::string const golden = std::string{DCP_TESTS_DIR} + "/golden/hf/reused_dir_2x2/ckpt/";
  SimulatedDevices devices{1};
  dcp::SelfComm self;
  auto const load = [&](bool damaged, dcp::Verify verify, bool on_device, int threads) {
    dcp::Memory store;
    dcp::MediumModel<dcp::Memory> medium{store};
    medium.create_directory("ckpt");
    for (char const n : {'1', '2', '3'}) {
      std::string const name = std::string{"shard-0000"} + n + "-model-00001-of-00001.safetensors";
      std::ifstream in{golden + name, std::ios::binary};
      std::string text{std::istreambuf_iterator<char>{in}, {}};
      REQUIRE(!text.empty());
      if (damaged && n == '3') text.back() ^= 1;
      auto const file = medium.open_write("ckpt/" + name);
      file->resize(text.size());
      file->write_at(0, dcp::as_byte_span(text));
      file->close();
    }
    Tensors target;
    target.add("w", {8, 4}, -100);
    DeviceTwin twin{devices, 0, {on_device ? 0 : -1}, target.state};
    twin.upload();
    dcp::load<Files>(self, {store, "ckpt"}, twin.state, {.on = twin.on(), .verify = verify, .threads = threads});
    twin.download();
    return target.now();
  };
  auto const whole = load(false, dcp::Verify::standard, false, 2);
  for (int const threads : {1, 3}) {
    CHECK(same(load(false, dcp::Verify::full, true, threads), whole));
    CHECK(same(load(true, dcp::Verify::standard, true, threads), whole));
    CHECK_THROWS_WITH_AS(load(true, dcp::Verify::full, true, threads), doctest::Contains("two files hold the same elements of w with different values"), dcp::Error);
  }
}

TEST_CASE("checkpoints in PyTorch's format go from and to devices with their CRC-32s, and without a commit record, and what is damaged is found with verify = full") {
  SimulatedDevices devices{2};
  dcp::Memory store;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    Tensors tensors = some_tensors(5, true);
    tensors.add_as("rows", dcp::layout_of<dcp::Placement<dcp::Shard<0>>>(dcp::DeviceMesh<1>{world, {2}}, dcp::Extents{300, 101}), 9 + static_cast<float>(world.rank() * 150 * 101), dcp::Extents{101, 1}, 150 * 101);
    DeviceTwin twin{devices, world.rank(), {world.rank()}, tensors.state};
    twin.upload();
    if (world.rank() == 0) CHECK(names_in(store, "").empty());
    dcp::save<Torch>(world, {store, "ckpt"}, twin.state, {.on = twin.on()});
  });
  Tensors expected = some_tensors(5, true);
  expected.add("rows", {300, 101}, 9);
  CHECK(same(stored_in<Torch>(store), expected.now()));
  dcp::MediumModel<dcp::Memory> medium{store};
  dcp::SelfComm self;
  auto const load = [&](dcp::Verify verify) {
    Tensors target = some_tensors(-9, true);
    target.add("rows", {300, 101}, -9);
    DeviceTwin twin{devices, 0, {0, 1}, target.state};
    twin.upload();
    dcp::load<Torch>(self, {store, "ckpt"}, twin.state, {.on = twin.on(), .verify = verify});
    devices.api->drain();
    twin.download();
    return target.now();
  };
  for (bool const foreign : {false, true}) {
    CAPTURE(foreign);
    if (foreign)
      for (auto const name : {dcp::record_name, dcp::checksums_name}) medium.remove_file("ckpt/" + std::string{name});
    for (auto const verify : {dcp::Verify::standard, dcp::Verify::full, dcp::Verify::none}) CHECK(same(load(verify), expected.now()));
  }
  // One byte of "large", in whatever file that is.
  float const element = 5.25f + 1234;
  bool damaged = false;
  for (auto const& name : names_in(store, "ckpt")) {
    if (!name.ends_with(".distcp")) continue;
    auto const in = medium.open_read("ckpt/" + name);
    dcp::Bytes bytes(static_cast<std::size_t>(in->size()));
    in->read_at(0, bytes);
    auto const wanted = dcp::Bytes(reinterpret_cast<std::byte const*>(&element), reinterpret_cast<std::byte const*>(&element) + sizeof element);
    auto const at = std::search(bytes.begin(), bytes.end(), wanted.begin(), wanted.end());
    if (at == bytes.end()) continue;
    *at ^= std::byte{1};
    auto const out = medium.open_write("ckpt/" + name);
    out->resize(bytes.size());
    out->write_at(0, bytes);
    out->close();
    damaged = true;
  }
  REQUIRE(damaged);
  auto const error = error_of([&] { load(dcp::Verify::full); }).value();
  CHECK(error.code() == dcp::ErrorCode::corrupt);
}

TEST_CASE("names are mapped as tensors go from and to devices: transposed, joined, split, of parts on several devices and the host") {
  constexpr std::int64_t rows = 60, columns = 33;
  dcp::NameMap names;
  names.transpose("turned", "stored.turned").concat("qkv", {{"stored.q", 20}, {"stored.k", 10}, {"stored.v", 30}}).split({{"up"}, {"gate"}}, "stored.up_gate", 1);
  auto const tensors_of = [&](float first) {
    Tensors tensors;
    for (auto const* name : {"turned", "qkv", "up", "gate", "plain"}) tensors.add(name, {rows, columns}, first += 2000);
    return tensors;
  };
  dcp::SelfComm self;
  dcp::Memory on_host;
  Tensors reference = tensors_of(1);
  dcp::save<Files>(self, {on_host, "ckpt"}, reference.state, {.names = names});
  auto const expected = stored_in<Files>(on_host);
  REQUIRE(expected.contains("stored.up_gate"));
  auto const through = [&]<class S>(std::type_identity<S>, std::vector<int> const& saved_on, std::vector<int> const& loaded_on) {
    SimulatedDevices devices{2};
    dcp::Memory store;
    Tensors tensors = tensors_of(1), target = tensors_of(-100'000);
    DeviceTwin twin{devices, 0, saved_on, tensors.state}, loaded{devices, 0, loaded_on, target.state};
    twin.upload();
    dcp::save<S>(self, {store, "ckpt"}, twin.state, {.on = twin.on(), .names = names});
    CHECK(same(stored_in<S>(store), expected));
    loaded.upload();
    dcp::load<S>(self, {store, "ckpt"}, loaded.state, {.on = loaded.on(), .names = names});
    devices.api->drain();
    loaded.download();
    CHECK(same(target.now(), tensors.now()));
    dcp::Pending pending = dcp::async_save<S, Deferred<true>>(self, {store, "second"}, loaded.state, {.on = loaded.on(), .names = names});
    auto const event = pending.staged_event();
    for (auto const& on : loaded.on()) event.before(on);
    loaded.overwrite();
    devices.api->drain();
    pending.wait();
    CHECK(same(stored_in<S>(store, "second"), expected));
  };
  for (auto const& on : {std::vector<int>{0}, std::vector<int>{0, 1}, std::vector<int>{-1, 0, 1}, std::vector<int>{1, 0, -1, 0}}) {
    through(std::type_identity<Files>{}, on, {1, 0});
    through(std::type_identity<Torch>{}, on, {0, -1});
  }
}

TEST_CASE("a tensor that is quantized may be put together of tensors on several devices and the host") {
  using Fp8 = dcp::Quantized<dcp::Fp8Block<128, 128>, Files>;
  dcp::NameMap names;
  names.split({{"q.weight"}, {"k.weight"}}, "qk.weight");
  auto const tensors_of = [] {
    Tensors tensors;
    for (auto const* name : {"q.weight", "k.weight"}) {
      float x = name[0] == 'q' ? 0.0f : 1.0f;
      for (auto& value : tensors.add(name, {160, 256}, 0)) value = static_cast<float>(static_cast<int>(x += 7) % 64 - 32);
    }
    return tensors;
  };
  dcp::SelfComm self;
  dcp::Memory on_host;
  Tensors reference = tensors_of();
  dcp::save<Fp8>(self, {on_host, "ckpt"}, reference.state, {.names = names});
  auto const decoded = [&](dcp::Memory const& store) {
    Tensors target;
    target.add("qk.weight", {320, 256}, -1);
    dcp::load<Fp8>(self, {store, "ckpt"}, target.state);
    return target.now();
  };
  auto const expected = decoded(on_host);
  for (auto const& on : {std::vector<int>{0, 0}, std::vector<int>{0, 1}, std::vector<int>{1, 0}, std::vector<int>{0, -1}, std::vector<int>{-1, 0}}) {
    CAPTURE(on[0]);
    CAPTURE(on[1]);
    SimulatedDevices devices{2};
    dcp::Memory store;
    Tensors tensors = tensors_of();
    DeviceTwin twin{devices, 0, on, tensors.state};
    twin.upload();
    dcp::save<Fp8>(self, {store, "ckpt"}, twin.state, {.on = twin.on(), .names = names});
    CHECK(same(decoded(store), expected));
    dcp::Memory second;
    dcp::Pending pending = dcp::async_save<Fp8, Deferred<true>>(self, {second, "ckpt"}, twin.state, {.on = twin.on(), .names = names});
    pending.wait_staged();
    twin.overwrite();
    devices.api->drain();
    pending.wait();
    CHECK(same(decoded(second), expected));
  }
}

TEST_CASE("a manager saves step after step by one plan, each asked for while the one before may be under way, and each checkpoint has the bytes of its call") {
  std::uint64_t const base_seed = dcp::test::first_seed();
  auto const run = [&]<class S, class T>(std::type_identity<S>, std::type_identity<T>, std::uint64_t seed) {
    CAPTURE(seed);
    dcp::test::Random random{seed};
    SimulatedDevices devices{2, seed};
    dcp::Memory store;
    bool const eager = random.one_in(2);
    if (eager) devices.api->eager(4);
    constexpr std::int64_t steps = 12;
    dcp::run_threads(2, [&](dcp::ThreadComm& world) {
      Tensors tensors = some_tensors(0);
      DeviceTwin twin{devices, world.rank(), {world.rank(), 1 - world.rank()}, tensors.state};
      dcp::CheckpointManager<S, T> manager{world, {store, "run"}, {.save = {.on = twin.on()}}};
      std::vector<dcp::Pending> pending;
      for (std::int64_t step = 1; step <= steps; ++step) {
        tensors.set_all(static_cast<float>(step));
        for (auto const& on : twin.on()) devices.api->delay(twin.stream(on.ordinal), 3);
        twin.upload();
        pending.push_back(manager.async_save(step, twin.state));
        auto const event = pending.back().staged_event();
        for (auto const& on : twin.on()) event.before(on);
        twin.overwrite();
        if (step % 3 == 0) CHECK(pending.back().wait().plan_reused == (step > 1 && plans_stay_valid<S>));
        if (step % 4 == 0) devices.api->drain();
      }
      manager.wait();
      for (std::int64_t step = 1; step <= steps; ++step) {
        manager.load(step, twin.state, {.on = twin.on()});
        devices.api->drain();
        twin.download();
        Tensors expected = some_tensors(0);
        expected.set_all(static_cast<float>(step));
        CHECK(same(tensors.now(), expected.now()));
      }
    });
  };
  for (int round = 0; round < dcp::test::rounds(3, 50); ++round) {
    std::uint64_t const seed = base_seed + static_cast<std::uint64_t>(round);
    run(std::type_identity<Files>{}, std::type_identity<Deferred<false>>{}, seed);
    run(std::type_identity<Files>{}, std::type_identity<dcp::CopyStager>{}, seed);
    run(std::type_identity<Torch>{}, std::type_identity<Deferred<true>>{}, seed);
  }
}

TEST_CASE("deferred saves of one state overlap, and each has what the stream had written by its call") {
  SimulatedDevices devices{2};
  dcp::Memory store;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    Tensors tensors = some_tensors(0);
    DeviceTwin twin{devices, world.rank(), {world.rank()}, tensors.state};
    std::vector<dcp::Pending> pending;
    for (int i = 0; i < 4; ++i) {
      tensors.set_all(static_cast<float>(i));
      twin.upload();
      pending.push_back(dcp::async_save<Files, Deferred<false>>(world, {store, "ckpt" + std::to_string(i)}, twin.state, {.on = twin.on()}));
      pending.back().staged_event().before(twin.on()[0]);
      twin.overwrite();
    }
    devices.api->drain();
    for (auto& one : pending) one.wait();
    for (int i = 0; i < 4; ++i) {
      tensors.set_all(static_cast<float>(i));
      if (world.rank() == 0) CHECK(same(stored_in<Files>(store, "ckpt" + std::to_string(i)), tensors.now()));
    }
  });
}

TEST_CASE("twenty saves, deferred saves and loads take no more pinned memory, streams and events than the first, and no context but those of the tensors' devices") {
  SimulatedDevices devices{4};
  dcp::SelfComm self;
  dcp::Memory store;
  Tensors tensors = some_tensors(5, true);
  DeviceTwin twin{devices, 0, {1, 3}, tensors.state};
  dcp::CheckpointManager<Files, Deferred<true>> manager{self, {store, "run"}, {.keep_last = 1, .save = {.on = twin.on(), .threads = 1}}};
  std::int64_t step = 0;
  auto const once = [&] {
    twin.upload();
    dcp::save<Files>(self, {store, "ckpt"}, twin.state, {.if_exists = dcp::IfExists::replace, .on = twin.on(), .threads = 1});
    dcp::load<Files>(self, {store, "ckpt"}, twin.state, {.on = twin.on(), .threads = 1});
    manager.save(++step, twin.state);
    devices.api->drain();
  };
  once();
  auto const pinned = devices.api->pinned_bytes();
  int const streams = devices.api->streams(), events = devices.api->events(), pins = devices.api->calls("allocate_pinned");
  CHECK(pinned > 0);
  for (int i = 0; i < 20; ++i) once();
  CHECK(devices.api->pinned_bytes() == pinned);
  CHECK(devices.api->calls("allocate_pinned") == pins);
  CHECK(devices.api->streams() == streams);
  CHECK(devices.api->events() <= events + 2);   // those that the last save of the manager's remembers
  CHECK(devices.api->contexts() == std::set<int>{1, 3});
  CHECK(devices.api->pending() == 0);
}

TEST_CASE("two kinds of devices in one state: each copy comes after its own stream, and the streams of either wait for all copies") {
  SimulatedDevices first{1, 1}, second{1, 2};
  dcp::SelfComm self;
  dcp::Memory store;
  Tensors a, b;
  a.add("a", {5000}, 1);
  b.add("b", {7000}, 2);
  DeviceTwin on_first{first, 0, {0}, a.state}, on_second{second, 0, {0}, b.state};
  dcp::StateDict state;
  state.append("", on_first.state);
  state.append("", on_second.state);
  std::vector<dcp::DeviceStream> const on{on_first.on()[0], on_second.on()[0]};
  on_first.upload();
  on_second.upload();
  dcp::Pending pending = dcp::async_save<Files, Deferred<true>>(self, {store, "ckpt"}, state, {.on = on});
  for (auto const& stream : on) pending.staged_event().before(stream);
  on_first.overwrite();
  on_second.overwrite();
  first.api->drain();
  second.api->drain();
  pending.wait();
  CHECK(same(stored_in<Files>(store), {{"a", a.at("a")}, {"b", b.at("b")}}));
  auto const wanted_a = a.now(), wanted_b = b.now();
  dcp::load<Files>(self, {store, "ckpt"}, state, {.on = on, .threads = 1});
  on_first.download();
  on_second.download();
  CHECK(same(a.now(), wanted_a));
  CHECK(same(b.now(), wanted_b));
}

TEST_CASE("elements are cast on their way to a device wherever they begin in what is read") {
  SimulatedDevices devices{1};
  dcp::SelfComm self;
  dcp::Memory store;
  std::vector<std::uint16_t> halves(33);
  std::vector<float> floats(1001);
  std::vector<std::int32_t> integers(77);
  for (std::size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<std::uint16_t>(0x3F80 + i);
  for (std::size_t i = 0; i < floats.size(); ++i) floats[i] = static_cast<float>(i) + 0.5f;
  for (std::size_t i = 0; i < integers.size(); ++i) integers[i] = static_cast<std::int32_t>(i) - 30;
  auto const add = [](dcp::StateDict& state, std::string const& name, dcp::DType dtype, auto& values) {
    state.add_tensor(name, dtype, dcp::plain_layout({static_cast<std::int64_t>(values.size())}), {reinterpret_cast<std::byte*>(values.data()), dcp::Extents{1}});
  };
  dcp::StateDict narrow, wide;
  add(narrow, "a", dcp::DType::bf16, halves), add(narrow, "b", dcp::DType::f32, floats), add(narrow, "c", dcp::DType::i32, integers);
  dcp::save<Files>(self, {store, "ckpt"}, narrow);
  std::vector<float> a(halves.size());
  std::vector<double> b(floats.size());
  std::vector<std::int64_t> c(integers.size());
  add(wide, "a", dcp::DType::f32, a), add(wide, "b", dcp::DType::f64, b), add(wide, "c", dcp::DType::i64, c);
  DeviceTwin twin{devices, 0, {0}, wide};
  twin.upload();
  dcp::load<Files>(self, {store, "ckpt"}, twin.state, {.on_dtype = dcp::OnDType::cast, .on = twin.on(), .threads = 1});
  devices.api->drain();
  twin.download();
  CHECK(a[32] == 1.25f);
  CHECK(std::equal(b.begin(), b.end(), floats.begin()));
  CHECK(std::equal(c.begin(), c.end(), integers.begin()));
}

TEST_CASE("tensors of many buffers go from and to a device whole: no buffer is filled before what was in it has been copied") {
  SimulatedDevices devices{1};
  dcp::SelfComm self;
  dcp::Memory store;
  Tensors tensors, target, third;
  constexpr std::int64_t elements = 10'000'000;   // below 2^24: all are different
  tensors.add("w", {elements / 8, 8}, 1);
  target.add("w", {elements / 8, 8}, -elements);
  third.add("w", {elements / 8, 8}, -elements);
  DeviceTwin twin{devices, 0, {0}, tensors.state}, loaded{devices, 0, {0}, target.state}, resharded{devices, 0, {0}, third.state};
  twin.upload();
  dcp::save<Files>(self, {store, "ckpt"}, twin.state, {.on = twin.on(), .memory_bytes = dcp::least_memory_bytes, .threads = 1});
  CHECK(same(stored_in<Files>(store), tensors.now()));
  loaded.upload();
  dcp::load<Files>(self, {store, "ckpt"}, loaded.state, {.on = loaded.on(), .memory_bytes = dcp::least_memory_bytes, .threads = 1});
  devices.api->drain();
  loaded.download();
  CHECK(same(target.now(), tensors.now()));
  resharded.upload();
  dcp::reshard(self, loaded.state, resharded.state, {.on = resharded.on(), .memory_bytes = 64 << 20});
  devices.api->drain();
  resharded.download();
  CHECK(same(third.now(), tensors.now()));
}

TEST_CASE("what is decoded onto a device in many tiles is whole: no tile is decoded to memory that is still being copied") {
  using Fp8 = dcp::Quantized<dcp::Fp8Block<128, 128>, Files>;
  SimulatedDevices devices{1};
  dcp::SelfComm self;
  dcp::Memory store;
  Tensors tensors, target, on_host;
  std::uint32_t x = 0;
  for (auto& value : tensors.add("w.weight", {2048, 2048}, 0)) value = static_cast<float>((x = x * 1664525u + 1013904223u) >> 26) - 32;
  dcp::save<Fp8>(self, {store, "ckpt"}, tensors.state);
  target.add("w.weight", {2048, 2048}, -1);
  on_host.add("w.weight", {2048, 2048}, -2);
  dcp::load<Fp8>(self, {store, "ckpt"}, on_host.state);
  for (int const threads : {1, 2}) {
    DeviceTwin twin{devices, 0, {0}, target.state};
    twin.upload();
    dcp::load<Fp8>(self, {store, "ckpt"}, twin.state, {.on = twin.on(), .threads = threads});
    devices.api->drain();
    twin.download();
    CHECK(same(target.now(), on_host.now()));
  }
}
