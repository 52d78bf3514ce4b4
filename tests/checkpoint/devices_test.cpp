// SPDX-License-Identifier: Apache-2.0
// Tensors in the memory of devices, on simulated ones: whose memory the host cannot touch, and whose streams do nothing before somebody waits for it.
#include <dcp/checkpoint/async_save.hpp>
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/checkpoint/reshard.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/device/streams.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/quantized.hpp>
#include <dcp/storage/safetensors.hpp>
#include <dcp/storage/torch_dcp.hpp>

#include <doctest/doctest.h>

#include "support/campaign.hpp"
#include "support/generate.hpp"
#include "support/outcome.hpp"
#include "support/random_parts.hpp"
#include "support/simulated_device.hpp"

#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

namespace {

using dcp::test::Generator, dcp::test::RandomPart, dcp::test::SimulatedApi, dcp::test::Subject;
using Driver = dcp::detail::StreamDriver<SimulatedApi>;
using Files = dcp::BasicSafeTensors<dcp::Memory>;
using Torch = dcp::BasicTorchDcp<dcp::Memory>;

/// Simulated devices that the library knows of while this lives.
struct Devices {
  explicit Devices(int count, std::uint64_t seed = 1) : api{std::make_shared<SimulatedApi>(count, seed)}, driver{std::make_shared<Driver>(api)} { dcp::detail::DeviceDrivers<>::instance().add(driver); }
  Devices(Devices const&) = delete;
  Devices& operator=(Devices const&) = delete;
  ~Devices() { dcp::detail::DeviceDrivers<>::instance().remove(driver.get()); }

  std::shared_ptr<SimulatedApi> api;
  std::shared_ptr<Driver> driver;
};

/// The state of one rank, on its device: each tensor has the memory there that `parts` has on the host. What is on the host comes there late, in the order of a stream.
class OnDevice {
 public:
  OnDevice(Devices& devices, int ordinal, std::vector<RandomPart>& parts, int mixed = 0) : devices_{devices}, ordinal_{ordinal}, stream_{devices.api->create_user_stream(ordinal)}, parts_{parts} {
    for (auto& part : parts) {
      bool const here = mixed > 0 && addresses_.size() % static_cast<std::size_t>(mixed) == 0;   // some stay on the host
      addresses_.push_back(here ? part.memory.data() : devices.api->allocate(ordinal, part.memory.size()));
      on_host_.push_back(here);
      state.add_tensor(part.subject->name, part.subject->dtype, part.layout, {addresses_.back(), part.strides});
    }
  }
  OnDevice(OnDevice const&) = delete;
  OnDevice& operator=(OnDevice const&) = delete;
  ~OnDevice() {
    devices_.api->drain();
    for (std::size_t i = 0; i < addresses_.size(); ++i)
      if (!on_host_[i]) devices_.api->free(addresses_[i]);
  }
  /// A kernel that will have filled the tensors with what the host has.
  void upload() {
    for (std::size_t i = 0; i < addresses_.size(); ++i)
      if (!on_host_[i]) devices_.api->write_later(stream_, addresses_[i], parts_[i].memory);
  }
  /// What the device has, to the host.
  void download() {
    for (std::size_t i = 0; i < addresses_.size(); ++i)
      if (!on_host_[i]) parts_[i].memory = devices_.api->read(addresses_[i], parts_[i].memory.size());
  }
  /// What the optimizer does next: the tensors are something else.
  void overwrite() {
    for (std::size_t i = 0; i < addresses_.size(); ++i)
      if (!on_host_[i]) devices_.api->fill(stream_, addresses_[i], parts_[i].memory.size(), std::byte{0xAA});
  }
  std::vector<dcp::DeviceStream> on() const { return {{devices_.driver, ordinal_, devices_.api->handle(stream_)}}; }

  dcp::StateDict state;

 private:
  Devices& devices_;
  int ordinal_;
  SimulatedApi::Stream stream_;
  std::vector<RandomPart>& parts_;
  std::vector<std::byte*> addresses_;
  std::vector<bool> on_host_;
};

std::byte byte_at(Subject const& subject, std::uint64_t position) {
  std::uint64_t x = position * 0x9E3779B97F4A7C15u + std::hash<std::string>{}(subject.name);
  x ^= x >> 29;
  return static_cast<std::byte>((x * 0xBF58476D1CE4E5B9u) >> 56);
}
void fill(std::vector<RandomPart>& parts) {
  for (auto& part : parts) part.visit([&](std::byte& byte, std::uint64_t at) { byte = byte_at(*part.subject, at); });
}
std::string difference(std::vector<RandomPart>& parts) {
  std::string wrong;
  for (auto& part : parts)
    part.visit([&](std::byte& byte, std::uint64_t at) {
      if (byte != byte_at(*part.subject, at) && wrong.empty()) wrong = part.subject->name + " at byte " + std::to_string(at);
    });
  return wrong;
}

std::vector<Subject> subjects_of(Generator& random) {
  std::vector<dcp::DType> const dtypes{dcp::DType::f32, dcp::DType::bf16, dcp::DType::u8, dcp::DType::i64, dcp::DType::c64, dcp::DType::f4};
  std::vector<Subject> subjects;
  for (std::int64_t i = 0, count = 1 + random.up_to(5); i < count; ++i) {
    Subject subject{"layer." + std::to_string(i) + ".weight", random.pick(dtypes), random.shape(random.chance(16))};
    if (dcp::bits_of(subject.dtype) < 8) subject.shape = dcp::Extents{3, 16};
    subjects.push_back(subject);
  }
  return subjects;
}
std::vector<dcp::Layout> layouts_of(Generator& random, std::vector<Subject> const& subjects, int ranks) {
  std::vector<dcp::Layout> layouts;
  for (auto const& subject : subjects) layouts.push_back(random.layout(subject.shape, ranks, subject.dtype));
  return layouts;
}

template <class S>
void check_law(int rounds, typename S::Options const& options) {
  std::uint64_t const base_seed = dcp::test::first_seed();
  for (int round = 0; round < rounds; ++round) {
    std::uint64_t const seed = base_seed + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    Generator random{seed};
    Devices devices{2, seed};
    if (random.chance(30)) devices.api->eager(4);
    auto const subjects = subjects_of(random);
    dcp::Memory store;
    int const writers = static_cast<int>(1 + random.up_to(3)), readers = static_cast<int>(1 + random.up_to(3)), mixed = random.chance(30) ? 2 : 0;
    auto const write_layouts = layouts_of(random, subjects, writers), read_layouts = layouts_of(random, subjects, readers);
    auto const pitch = static_cast<std::uint64_t>(random.up_to(2));
    bool const background = random.chance(40), once = random.chance(40), full = random.chance(20);
    std::mutex mutex;
    std::string wrong;
    dcp::run_threads(writers, [&](dcp::ThreadComm& world) {
      dcp::StateDict unused;
      auto held = dcp::test::hold(subjects, write_layouts, world.rank(), pitch, unused);
      fill(held);
      OnDevice here{devices, world.rank() % 2, held, mixed};
      here.upload();
      dcp::SaveOptions<S> save;
      save.on = here.on();
      save.storage = options;
      if (!background) {
        dcp::save<S>(world, {store, "ckpt"}, here.state, save);
        return;
      }
      dcp::Pending pending = dcp::async_save<S>(world, {store, "ckpt"}, here.state, save);
      here.overwrite();   // in the order of the stream, and what is on the host is not touched
      devices.api->drain();
      pending.wait();
    });
    dcp::run_threads(readers, [&](dcp::ThreadComm& world) {
      dcp::StateDict unused;
      auto held = dcp::test::hold(subjects, read_layouts, world.rank(), pitch, unused);
      OnDevice here{devices, world.rank() % 2, held, mixed};
      here.upload();      // a kernel that writes to the tensors before they are loaded
      dcp::LoadOptions<S> load;
      load.on = here.on();
      load.storage = options;
      load.read_once = once;
      load.verify = full ? dcp::Verify::full : dcp::Verify::standard;
      dcp::load<S>(world, {store, "ckpt"}, here.state, load);
      here.download();    // what is there when load has returned, without anybody waiting
      devices.api->drain();
      here.download();
      std::lock_guard const lock{mutex};
      if (auto const text = difference(held); !text.empty()) wrong = text;
    });
    REQUIRE(wrong == "");
  }
}

std::vector<float> numbers(std::size_t count) {
  std::vector<float> values(count);
  std::iota(values.begin(), values.end(), 0.0f);
  return values;
}
/// One tensor of floats on a device.
struct Floats {
  Floats(Devices& devices, int ordinal, dcp::Extents const& shape_of_it, std::vector<float> const& values) : api{*devices.api}, shape{shape_of_it}, count{values.size()}, address{api.allocate(ordinal, count * sizeof(float))} { api.write(address, std::as_bytes(std::span{values})); }
  Floats(Floats const&) = delete;
  Floats& operator=(Floats const&) = delete;
  ~Floats() { api.free(address); }
  std::vector<float> now() const {
    auto const bytes = api.read(address, count * sizeof(float));
    std::vector<float> values(count);
    std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }
  void add_to(dcp::StateDict& state, std::string const& name) const { state.add_tensor(name, dcp::DType::f32, dcp::plain_layout(shape), {address, dcp::row_major_strides(shape)}); }

  SimulatedApi& api;
  dcp::Extents shape;
  std::size_t count;
  std::byte* address;
};

/// Saves tensors in a scheme and loads them, cut as it comes, to the host, and to devices that decode and devices that do not.
template <class Scheme>
void check_decoding(std::string const& suffix, bool has_kernels, std::int64_t column_grain = 1) {
  using S = dcp::Quantized<Scheme, Files>;
  std::uint64_t const base_seed = dcp::test::first_seed();
  constexpr std::int64_t groups_of_their_own = std::is_same_v<Scheme, dcp::Int8Group> ? 1 : 0;   // it refuses rows of one group, which another scheme is for
  int decoded = 0, copied = 0;
  for (int round = 0; round < dcp::test::rounds(12, 600); ++round) {
    std::uint64_t const seed = base_seed + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    Generator random{seed};
    std::vector<Subject> subjects;
    for (std::int64_t i = 0, count = 1 + random.up_to(2); i < count; ++i) {
      auto const some = [&](std::int64_t most) { return 1 + random.up_to(most - 1); };
      std::int64_t const rows = random.chance(20) ? 300 + some(200) : some(150), columns = 2 * column_grain * (groups_of_their_own + some((random.chance(20) ? 2000 : 300) / column_grain));
      subjects.push_back({"layer." + std::to_string(i) + suffix, dcp::DType::f32, random.chance(40) ? dcp::Extents{some(4), rows / 4 + 1, columns} : dcp::Extents{rows, columns}});
    }
    dcp::Memory store;
    {
      dcp::StateDict state;
      std::vector<dcp::Layout> layouts;
      for (auto const& subject : subjects) layouts.push_back(dcp::plain_layout(subject.shape));
      auto held = dcp::test::hold(subjects, layouts, 0, 0, state);
      for (auto& part : held)
        for (std::size_t at = 0; at + 4 <= part.memory.size(); at += 4) {
          float const value = std::ldexp(static_cast<float>(random.up_to(2000) - 1000), static_cast<int>(random.up_to(12)) - 20);
          std::memcpy(part.memory.data() + at, &value, 4);
        }
      dcp::SelfComm self;
      dcp::SaveOptions<S> save;
      save.storage.group = 2 * column_grain;
      save.storage.quantize = [](std::string_view, dcp::DType, dcp::Extents const&) { return true; };
      dcp::save<S>(self, {store, "ckpt"}, state, save);
    }
    for (auto& subject : subjects) subject.dtype = random.pick(std::vector<dcp::DType>{dcp::DType::f32, dcp::DType::bf16, dcp::DType::f16});
    int const readers = static_cast<int>(1 + random.up_to(2)), mixed = random.chance(30) ? 2 : 0;
    auto const layouts = layouts_of(random, subjects, readers);
    auto const pitch = static_cast<std::uint64_t>(random.up_to(2));
    bool const once = random.chance(40), full = random.chance(30), eager = random.chance(30);
    std::mutex mutex;
    std::map<int, std::vector<dcp::Bytes>> on_host;
    std::map<int, std::uint64_t> verified;
    for (int const kernels : {-1, 0, 1}) {   // -1: on the host
      Devices devices{2, seed};
      devices.api->decodes(kernels == 1);
      if (eager) devices.api->eager(4);
      std::string wrong;
      bool any_there = false;
      dcp::run_threads(readers, [&](dcp::ThreadComm& world) {
        dcp::StateDict state;
        auto held = dcp::test::hold(subjects, layouts, world.rank(), pitch, state);
        dcp::LoadOptions<S> load;
        load.read_once = once;
        load.verify = full ? dcp::Verify::full : dcp::Verify::standard;
        load.threads = 1 + world.rank();
        dcp::Report report;
        if (kernels < 0) {
          report = dcp::load<S>(world, {store, "ckpt"}, state, load);
        } else {
          OnDevice here{devices, world.rank() % 2, held, mixed};
          here.upload();
          load.on = here.on();
          report = dcp::load<S>(world, {store, "ckpt"}, here.state, load);
          here.download();
          devices.api->drain();
          here.download();
        }
        std::lock_guard const lock{mutex};
        std::vector<dcp::Bytes> bytes;
        for (std::size_t i = 0; i < held.size(); ++i) {
          bytes.push_back(held[i].memory);
          any_there = any_there || ((mixed == 0 || i % 2 != 0) && held[i].part.elements() > 0);
        }
        if (kernels < 0) on_host[world.rank()] = std::move(bytes), verified[world.rank()] = report.verified_bytes;
        else if (bytes != on_host[world.rank()]) wrong = "rank " + std::to_string(world.rank()) + " has something else";
        else if (report.verified_bytes != verified[world.rank()]) wrong = "not the same bytes are verified";
      });
      REQUIRE(wrong == "");
      int const works = devices.api->calls("decode"), copies = devices.api->calls("copy") + devices.api->calls("copy_rows");
      if (kernels == 1 && has_kernels && !once) CHECK(copies == 0);   // nothing came there decoded
      if (kernels == 1 && has_kernels && any_there && !once) CHECK(works > 0);
      if (!has_kernels) CHECK(works == 0);
      if (kernels == 1) decoded += works;
      if (kernels == 0) copied += copies;
    }
  }
  CHECK((decoded > 0) == has_kernels);
  CHECK(copied > 0);
}

}  // namespace

TEST_CASE("law: what devices decode, of any scheme and any cut, is bit for bit what the host decodes") {
  check_decoding<dcp::Fp8Block<128, 128>>(".weight", true);
  check_decoding<dcp::Fp8Block<16, 24>>(".weight", true);
  check_decoding<dcp::Fp8Channel>(".weight", true);
  check_decoding<dcp::Fp8Tensor>(".weight", true);
  check_decoding<dcp::Mxfp8>(".weight", true, 16);
  check_decoding<dcp::Mxfp4>(".weight", true, 16);
  check_decoding<dcp::Mxfp4>(".experts", true, 16);   // in blocks, as gpt-oss has them
  check_decoding<dcp::Int8Channel>(".weight", true);
  check_decoding<dcp::Int8Group>(".weight", true, 3);
  check_decoding<dcp::Nvfp4>(".weight", false, 16);
}

TEST_CASE("a kernel that cannot be started or fails, and memory that cannot be pinned") {
  using S = dcp::Quantized<dcp::Fp8Channel, Files>;
  dcp::SelfComm self;
  dcp::Memory store;
  auto const values = numbers(512 * 1024);
  for (std::string const what : {"fine", "decode", "run", "pageable"}) {
    CAPTURE(what);
    Devices devices{1};
    devices.api->decodes(true);
    if (what == "pageable") devices.api->limit_pinned(0);
    Floats const weight{devices, 0, {512, 1024}, values}, loaded{devices, 0, {512, 1024}, std::vector<float>(values.size(), -1)};
    auto const stream = devices.api->create_user_stream(0);
    std::vector<dcp::DeviceStream> const on{{devices.driver, 0, devices.api->handle(stream)}};
    dcp::StateDict from, to;
    weight.add_to(from, "w.weight");
    loaded.add_to(to, "w.weight");
    dcp::save<S>(self, {store, what}, from, {.on = on});
    dcp::StateDict host;
    std::vector<float> expected(values.size());
    host.add_tensor("w.weight", dcp::DType::f32, dcp::plain_layout({512, 1024}), {reinterpret_cast<std::byte*>(expected.data()), dcp::row_major_strides({512, 1024})});
    dcp::load<S>(self, {store, what}, host);
    if (what == "decode" || what == "run") devices.api->fail(what, 1, 700);
    auto const error = dcp::test::error_of([&] { dcp::load<S>(self, {store, what}, to, {.on = on}); });
    REQUIRE(error.has_value() == (what == "decode" || what == "run"));
    if (error) {
      CHECK(error->code() == dcp::ErrorCode::device);
      devices.api->fail_nothing();
      auto const fresh = devices.api->create_user_stream(0);
      dcp::load<S>(self, {store, what}, to, {.on = {{devices.driver, 0, devices.api->handle(fresh)}}});
    }
    CHECK(loaded.now() == expected);
    CHECK((devices.api->calls("decode") > 0) == (what != "pageable"));
  }
}

TEST_CASE("law: a state on devices, written late by their streams, is saved as it will be, and loaded onto other devices, meshes and placements, bit for bit") {
  int const rounds = dcp::test::rounds(40, 2000);
  check_law<Files>(rounds, {});
  check_law<Files>(rounds / 2, {.layout = dcp::FileLayout::sharded});
  check_law<Torch>(rounds / 2, {});
}

TEST_CASE("tensors on a device without a stream of it are refused before anything is touched, on all ranks, by their names") {
  Devices devices{2};
  dcp::Memory store;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    Floats const tensor{devices, 1, {8}, numbers(8)};
    dcp::StateDict state;
    tensor.add_to(state, "weight");
    auto const stream = devices.api->create_user_stream(0);
    std::vector<dcp::DeviceStream> const other{{devices.driver, 0, devices.api->handle(stream)}};   // of another device
    for (auto const& on : {std::vector<dcp::DeviceStream>{}, other}) {
      auto const error = dcp::test::error_of([&] { dcp::save<Files>(world, {store, "ckpt"}, state, {.on = on}); }).value();
      CHECK(error.code() == dcp::ErrorCode::invalid_argument);
      CHECK(std::string{error.what()}.find("weight: its memory is on simulated device device 1, and no stream of that device was given") != std::string::npos);
    }
    CHECK(devices.api->contexts().count(1) == 0);
  });
}

TEST_CASE("quantized tensors come to devices decoded, casts as they are asked for, and zeros where the checkpoint has nothing") {
  using Fp8 = dcp::Quantized<dcp::Fp8Block<128, 128>, Files>;
  Devices devices{1};
  dcp::SelfComm self;
  dcp::Memory store;
  auto values = numbers(256 * 160);
  for (auto& value : values) value = static_cast<float>(static_cast<int>(value) % 64 - 32);
  Floats const weight{devices, 0, {256, 160}, values};
  auto const stream = devices.api->create_user_stream(0);
  std::vector<dcp::DeviceStream> const on{{devices.driver, 0, devices.api->handle(stream)}};
  dcp::StateDict state;
  weight.add_to(state, "w.weight");
  dcp::save<Fp8>(self, {store, "fp8"}, state, {.on = on});

  std::vector<float> host(values.size());
  dcp::StateDict on_host;
  on_host.add_tensor("w.weight", dcp::DType::f32, dcp::plain_layout({256, 160}), {reinterpret_cast<std::byte*>(host.data()), dcp::row_major_strides({256, 160})});
  dcp::load<Fp8>(self, {store, "fp8"}, on_host);
  Floats const decoded{devices, 0, {256, 160}, std::vector<float>(values.size(), -1)};
  dcp::StateDict target;
  decoded.add_to(target, "w.weight");
  dcp::load<Fp8>(self, {store, "fp8"}, target, {.on = on});
  CHECK(decoded.now() == host);

  // Saved as bfloat16, wanted as float; and one that is not there.
  std::vector<std::uint16_t> halves(64);
  for (std::size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<std::uint16_t>(0x3F80 + i);
  dcp::StateDict narrow;
  narrow.add_tensor("a", dcp::DType::bf16, dcp::plain_layout({64}), {reinterpret_cast<std::byte*>(halves.data()), dcp::Extents{1}});
  dcp::save<Files>(self, {store, "narrow"}, narrow);
  Floats const a{devices, 0, {64}, std::vector<float>(64, -1)}, b{devices, 0, {3, 5}, std::vector<float>(15, -1)};
  dcp::StateDict wide;
  a.add_to(wide, "a");
  b.add_to(wide, "b");
  dcp::load<Files>(self, {store, "narrow"}, wide, {.on_missing = dcp::OnMissing::zero, .on_dtype = dcp::OnDType::cast, .on = on});
  CHECK(a.now()[0] == 1.0f);
  CHECK(a.now()[1] == 1.0078125f);
  CHECK(b.now() == std::vector<float>(15, 0.0f));
}

TEST_CASE("law: reshard moves tensors between devices and the host") {
  std::uint64_t const base_seed = dcp::test::first_seed();
  for (int round = 0; round < dcp::test::rounds(20, 500); ++round) {
    std::uint64_t const seed = base_seed + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    Generator random{seed};
    Devices devices{2, seed};
    auto const subjects = subjects_of(random);
    int const ranks = static_cast<int>(1 + random.up_to(3));
    auto const from = layouts_of(random, subjects, ranks), to = layouts_of(random, subjects, ranks);
    std::mutex mutex;
    std::string wrong;
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      dcp::StateDict unused, unused_too;
      auto source = dcp::test::hold(subjects, from, world.rank(), 1, unused);
      auto target = dcp::test::hold(subjects, to, world.rank(), 0, unused_too);
      fill(source);
      OnDevice here{devices, world.rank() % 2, source}, there{devices, world.rank() % 2, target, 2};
      here.upload();
      dcp::reshard(world, here.state, there.state, {.on = here.on()});
      there.download();
      std::lock_guard const lock{mutex};
      if (auto const text = difference(target); !text.empty()) wrong = text;
    });
    REQUIRE(wrong == "");
  }
}

TEST_CASE("whatever call to a device fails, all ranks have one error, nothing is committed, and the next save is whole") {
  for (std::string const call : {"record", "create_event", "wait", "copy", "transfer", "query", "create_stream", "enter"}) {
    CAPTURE(call);
    for (int nth : {1, 2, 5}) {
      CAPTURE(nth);
      Devices devices{1};
      dcp::Memory store;
      std::mutex mutex;
      int failed = 0, whole = 0;
      dcp::run_threads(2, [&](dcp::ThreadComm& world) {
        Floats const tensor{devices, 0, {64, 64}, numbers(4096)};
        auto const stream = devices.api->create_user_stream(0);
        std::vector<dcp::DeviceStream> const on{{devices.driver, 0, devices.api->handle(stream)}};
        dcp::DeviceMesh<1> const mesh{world, {2}};
        dcp::StateDict state;
        dcp::Layout const layout = dcp::replicated_layout({64, 64}, 2);
        state.add_tensor("w", dcp::DType::f32, layout, {tensor.address, dcp::row_major_strides({64, 64})});
        world.barrier();
        if (world.rank() == 0) devices.api->fail(call, nth, 700);
        world.barrier();
        auto const error = dcp::test::error_of([&] { dcp::save<Files>(world, {store, "ckpt"}, state, {.on = on}); });
        world.barrier();
        if (world.rank() == 0) devices.api->fail_nothing();
        world.barrier();
        if (error) {
          CHECK(error->code() == dcp::ErrorCode::device);
          if (world.rank() == 0) CHECK(dcp::MediumModel<dcp::Memory>{store}.list("").empty());
          world.barrier();
          // A stream whose work has failed stays so: the program makes another one.
          auto const fresh = devices.api->create_user_stream(0);
          std::vector<dcp::DeviceStream> const again{{devices.driver, 0, devices.api->handle(fresh)}};
          dcp::save<Files>(world, {store, "ckpt"}, state, {.on = again});
        }
        auto const stored = dcp::load_from_keys<Files>(world, {store, "ckpt"});
        std::lock_guard const lock{mutex};
        failed += error ? 1 : 0;
        whole += std::memcmp(stored.tensors().at("w").bytes().data(), numbers(4096).data(), 4096 * sizeof(float)) == 0 ? 1 : 0;
      });
      CHECK(whole == 2);
      CHECK((failed == 0 || failed == 2));
      if (nth == 1) CHECK(failed == 2);
    }
  }
}

TEST_CASE("staging memory is pinned once: later saves and loads pin and unpin nothing, and where it cannot be pinned the report says so") {
  Devices devices{1};
  dcp::SelfComm self;
  dcp::Memory store;
  Floats const tensor{devices, 0, {512, 1024}, numbers(512 * 1024)};
  auto const stream = devices.api->create_user_stream(0);
  std::vector<dcp::DeviceStream> const on{{devices.driver, 0, devices.api->handle(stream)}};
  dcp::StateDict state;
  tensor.add_to(state, "w");
  auto const once = [&] {
    auto const report = dcp::save<Files>(self, {store, "ckpt"}, state, {.if_exists = dcp::IfExists::replace, .on = on, .threads = 1});
    auto const loaded = dcp::load<Files>(self, {store, "ckpt"}, state, {.on = on, .threads = 1});
    CHECK(report.warnings.empty());
    CHECK(loaded.warnings.empty());
  };
  once();
  auto const pinned = devices.api->pinned_bytes();
  int const pins = devices.api->calls("allocate_pinned"), unpins = devices.api->calls("free_pinned");
  CHECK(pinned > 0);
  for (int i = 0; i < 20; ++i) once();
  CHECK(devices.api->pinned_bytes() == pinned);
  CHECK(devices.api->calls("allocate_pinned") == pins);
  CHECK(devices.api->calls("free_pinned") == unpins);
  CHECK(devices.api->contexts() == std::set<int>{0});

  Devices without{1};
  without.api->limit_pinned(0);
  Floats const other{without, 0, {64}, numbers(64)};
  auto const its = without.api->create_user_stream(0);
  dcp::StateDict pageable;
  other.add_to(pageable, "w");
  auto const report = dcp::save<Files>(self, {store, "other"}, pageable, {.on = {{without.driver, 0, without.api->handle(its)}}});
  REQUIRE(report.warnings.size() == 1);
  CHECK(report.warnings[0].find("could not be pinned") != std::string::npos);
  auto const stored = dcp::load_from_keys<Files>(self, {store, "other"});
  CHECK(std::memcmp(stored.tensors().at("w").bytes().data(), numbers(64).data(), 64 * sizeof(float)) == 0);
}

TEST_CASE("a deferred save of tensors on devices returns before any copy is made, and the next step is ordered behind them by an event alone") {
  std::uint64_t const base_seed = dcp::test::first_seed();
  for (int round = 0; round < dcp::test::rounds(20, 500); ++round) {
    std::uint64_t const seed = base_seed + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    Generator random{seed};
    Devices devices{2, seed};
    auto const subjects = subjects_of(random);
    dcp::Memory store;
    int const ranks = static_cast<int>(1 + random.up_to(3));
    auto const layouts = layouts_of(random, subjects, ranks), read_layouts = layouts_of(random, subjects, 1);
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      dcp::StateDict unused;
      auto held = dcp::test::hold(subjects, layouts, world.rank(), 1, unused);
      fill(held);
      OnDevice here{devices, world.rank() % 2, held};
      here.upload();
      dcp::Pending pending = dcp::async_save<Files, dcp::BasicDeferredStager<true>>(world, {store, "ckpt"}, here.state, {.on = here.on()});
      auto const event = pending.staged_event();
      event.before(here.on()[0]);
      here.overwrite();           // the optimizer's step
      devices.api->drain();       // and all of it is done before anybody has asked for a byte
      while (!event.done()) {}    // a device may say so a little later
      pending.wait_staged();
      pending.wait();
    });
    dcp::SelfComm self;
    dcp::StateDict state;
    auto held = dcp::test::hold(subjects, read_layouts, 0, 0, state);
    dcp::load<Files>(self, {store, "ckpt"}, state);
    REQUIRE(difference(held) == "");
  }

  // More than there is staging memory for: the copies are the host's, and there is no event.
  Devices devices{1};
  dcp::SelfComm self;
  dcp::Memory store;
  std::size_t const elements = (dcp::least_memory_bytes + (1 << 20)) / sizeof(float);
  Floats const large{devices, 0, {static_cast<std::int64_t>(elements)}, numbers(elements)};
  dcp::StateDict state;
  large.add_to(state, "w");
  auto const stream = devices.api->create_user_stream(0);
  dcp::Pending pending = dcp::async_save<Files, dcp::BasicDeferredStager<false>>(self, {store, "ckpt"}, state, {.on = {{devices.driver, 0, devices.api->handle(stream)}}, .staging_bytes = dcp::least_memory_bytes});
  auto const error = dcp::test::error_of([&] { static_cast<void>(pending.staged_event()); });
  if (error) CHECK(error->code() == dcp::ErrorCode::unsupported);
  pending.wait();
  static_cast<void>(pending.staged_event());
}

TEST_CASE("memory that the host and devices share is read and written in place, after what is in the program's stream") {
  Devices devices{1};
  dcp::SelfComm self;
  dcp::Memory store;
  std::byte* const memory = devices.api->allocate_shared(0, 64 * sizeof(float));
  auto const stream = devices.api->create_user_stream(0);
  std::vector<dcp::DeviceStream> const on{{devices.driver, 0, devices.api->handle(stream)}};
  auto const values = numbers(64);
  auto const bytes = std::as_bytes(std::span{values});
  devices.api->write_later(stream, memory, dcp::Bytes{bytes.begin(), bytes.end()});
  dcp::StateDict state;
  state.add_tensor("w", dcp::DType::f32, dcp::plain_layout({64}), {memory, dcp::Extents{1}});
  dcp::save<Files>(self, {store, "ckpt"}, state, {.on = on});
  auto const stored = dcp::load_from_keys<Files>(self, {store, "ckpt"});
  CHECK(std::memcmp(stored.tensors().at("w").bytes().data(), values.data(), bytes.size()) == 0);
  devices.api->free(memory);
}
