// SPDX-License-Identifier: Apache-2.0
// LoadOptions::read_once. That it loads any layout is part of the law in round_trip_test.cpp.
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#include "support/fault_medium.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace {

using dcp::Placement;
using dcp::Replicate;
using dcp::Shard;
using Medium = dcp::test::FaultMedium<dcp::Memory>;
using Storage = dcp::BasicSafeTensors<Medium>;

float value_at(std::size_t i) { return static_cast<float>(i * 31 % 16'777'213); }

template <class P>
struct Held {
  dcp::DeviceMesh<2> mesh;
  dcp::Box box;
  std::vector<float> memory;
  dcp::ShardedTensor<float, P> tensor;
  static constexpr std::int64_t rows = 1501, columns = 1999;   // 12 MB

  explicit Held(dcp::ThreadComm const& world)
      : mesh{world, {world.size() / 2, 2}}, box{dcp::local_box<P>(mesh, {rows, columns})}, memory(box.size(), -1.0f), tensor{mesh, {rows, columns}, memory} {}
  Held(Held const&) = delete;
  dcp::StateDict state() { return {{"w", tensor}}; }
  template <class Visit>
  void for_each(Visit visit) {
    std::size_t i = 0;
    for (std::int64_t r = 0; r < box.shape[0]; ++r)
      for (std::int64_t c = 0; c < box.shape[1]; ++c) visit(memory[i++], value_at(static_cast<std::size_t>((box.origin[0] + r) * columns + box.origin[1] + c)));
  }
};

void save_on(int ranks, Medium const& store) {
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    Held<Placement<Shard<0>, Shard<1>>> held{world};
    held.for_each([](float& x, float wanted) { x = wanted; });
    dcp::save<Storage>(world, {store, "ckpt"}, held.state());
  });
}

// Loads, checks all values, and returns how many bytes ranks read and sent.
template <class P>
std::pair<std::uint64_t, std::uint64_t> load_on(int ranks, Medium const& store, bool read_once) {
  std::atomic<std::uint64_t> wrong{0}, read{0}, sent{0};
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    Held<P> held{world};
    dcp::LoadOptions<Storage> options;
    options.read_once = read_once;
    options.memory_bytes = dcp::least_memory_bytes;
    auto const report = dcp::load<Storage>(world, {store, "ckpt"}, held.state(), options);
    held.for_each([&](float x, float wanted) { wrong += x == wanted ? 0 : 1; });
    if (world.rank() != 0) return;
    CHECK(report.unverified_bytes == 0);
    for (auto const& phase : report.phases) {
      if (phase.name == "read") read = phase.bytes();
      if (phase.name == "share") sent = phase.bytes();
    }
  });
  CHECK(wrong == 0);
  return {read, sent};
}

constexpr std::uint64_t bytes = 4 * 1501 * 1999;

}  // namespace

TEST_CASE("read_once: replicas read every byte once and send it on, in as many rounds as the budget asks for; without it each reads all") {
  Medium const store{dcp::Memory{}};
  save_on(4, store);
  for (int const ranks : {2, 4, 6}) {
    CAPTURE(ranks);
    auto const copies = static_cast<std::uint64_t>(ranks);
    CHECK(load_on<Placement<Replicate, Replicate>>(ranks, store, false) == std::pair{copies * bytes, std::uint64_t{0}});
    CHECK(load_on<Placement<Replicate, Replicate>>(ranks, store, true) == std::pair{bytes, (copies - 1) * bytes});
    CHECK(load_on<Placement<Replicate, Shard<1>>>(ranks, store, true) == std::pair{bytes, (copies / 2 - 1) * bytes});
    CHECK(load_on<Placement<Shard<0>, Replicate>>(ranks, store, true) == std::pair{bytes, bytes});
    CHECK(load_on<Placement<Shard<0>, Shard<1>>>(ranks, store, true) == std::pair{bytes, std::uint64_t{0}});
  }
}

TEST_CASE("read_once: a byte that is wrong on the storage, and a read that fails, are one error on all ranks") {
  Medium store{dcp::Memory{}};
  save_on(4, store);
  auto const damaged = [&](auto prepare, std::string const& expected) {
    prepare();
    std::atomic<int> said{0};
    dcp::run_threads(4, [&](dcp::ThreadComm& world) {
      Held<Placement<Replicate, Replicate>> held{world};
      dcp::LoadOptions<Storage> options;
      options.read_once = true;
      try {
        dcp::load<Storage>(world, {store, "ckpt"}, held.state(), options);
      } catch (dcp::Error const& error) {
        if (std::string{error.what()}.find(expected) != std::string::npos) ++said;
      }
    });
    CHECK(said == 4);
  };
  damaged([&] { store.add({.call = dcp::test::Call::read, .path = "model-00001", .nth = 9, .system_error = EIO}); }, "errno 5");
  damaged(
      [&] {
        auto const file = store.open_write("ckpt/model-00001-of-00001.safetensors");
        file->write_at(9'000'001, dcp::as_byte_span("x"));
      },
      "checksum");
}

TEST_CASE("read_once: elements of four bits whose rows end inside a byte are loaded too, though a share of them cannot be cut into boxes") {
  Medium const store{dcp::Memory{}};
  for (std::int64_t const columns : {1001, 1000}) {   // 500 KB: more than a share is cut by
    CAPTURE(columns);
    std::size_t const size = static_cast<std::size_t>(1000 * columns / 2);
    auto const byte_at = [](std::size_t i) { return static_cast<std::byte>(i * 131 + i / 977); };
    std::atomic<int> wrong{0};
    std::atomic<std::uint64_t> read{0};
    dcp::run_threads(3, [&](dcp::ThreadComm& world) {
      dcp::DeviceMesh<1> const mesh{world, {3}};
      std::vector<std::byte> memory(size);
      dcp::ShardedTensor<dcp::f4, Placement<Replicate>> tensor{mesh, {1000, columns}, memory};
      for (std::size_t i = 0; i < size; ++i) memory[i] = byte_at(i);
      dcp::save<Storage>(world, {store, "small"}, {{"w", tensor}}, {.if_exists = dcp::IfExists::replace});
      std::fill(memory.begin(), memory.end(), std::byte{0x5A});
      auto const report = dcp::load<Storage>(world, {store, "small"}, {{"w", tensor}}, {.read_once = true});
      for (std::size_t i = 0; i < size; ++i) wrong += memory[i] == byte_at(i) ? 0 : 1;
      if (world.rank() == 0) CHECK(report.unverified_bytes == 0);
      for (auto const& phase : report.phases)
        if (phase.name == "read") read = phase.bytes();
    });
    CHECK(wrong == 0);
    CHECK(read == (columns % 2 == 0 ? size : 3 * size));
  }
}
