// SPDX-License-Identifier: Apache-2.0
// What save, load and reshard allocate beside the state, counted by operator new: the budget of each rank, and what metadata there is.
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/manager.hpp>
#include <dcp/checkpoint/reshard.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/storage/quantized.hpp>
#include <dcp/storage/safetensors.hpp>

#include "support/allocations.hpp"
#include "support/campaign.hpp"
#include "support/plain_safetensors.hpp"
#include "support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

namespace {

using dcp::Placement;
using dcp::Replicate;
using dcp::Shard;

constexpr std::int64_t tensors = 6, rows = 2048, columns = 2000;   // 16 MB each, 98 MB in all
constexpr std::uint64_t state_bytes = 4 * tensors * rows * columns;

// The tensors of a rank, each in memory of its own.
template <class T, class P>
struct Held {
  std::vector<std::vector<T>> memory;
  dcp::StateDict state;

  explicit Held(dcp::ThreadComm const& world) {
    dcp::DeviceMesh<1> const mesh{world, {world.size()}};
    for (std::int64_t t = 0; t < tensors; ++t) {
      memory.emplace_back(dcp::local_box<P>(mesh, {rows, columns}).size());
      state.add("t" + std::to_string(t) + ".weight", dcp::ShardedTensor<T, P>{mesh, {rows, columns}, memory.back()});
    }
  }
};

// The most that `body` allocates on all ranks together, beside the states that `make` makes.
template <class Make, class Body>
std::size_t peak_of(int ranks, Make make, Body body) {
  std::size_t most = 0;
  std::optional<dcp::test::AllocationPeak> peak;
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    auto states = make(world);
    world.barrier();
    if (world.rank() == 0) peak.emplace();
    world.barrier();
    body(world, states);
    world.barrier();
    if (world.rank() == 0) most = peak->bytes();
    world.barrier();
  });
  return most;
}

}  // namespace

TEST_CASE("save, load, reshard: a rank allocates its budget and a little metadata, however large the tensors and whichever way they are cut") {
  if (!dcp::test::counts_allocations) return;   // said when the program starts
  for (int const ranks : {1, 2, 4})
    for (std::uint64_t const budget : {std::uint64_t{16} << 20, std::uint64_t{24} << 20}) {
      CAPTURE(ranks);
      CAPTURE(budget);
      dcp::test::TemporaryDirectory directory;
      std::string const place = directory.path() + "/ckpt";
      std::size_t const allowed = static_cast<std::size_t>(ranks) * (budget + (1 << 20));
      REQUIRE(allowed * 10 < state_bytes * 12);   // a copy of the state would show

      auto const save_as = [&]<class P>(P, char const* how, dcp::FileLayout layout, std::int64_t writers) {
        CAPTURE(how);
        auto const peak = peak_of(ranks, [](dcp::ThreadComm& world) { return Held<float, P>{world}; }, [&](dcp::ThreadComm& world, Held<float, P>& held) {
          dcp::SaveOptions<dcp::SafeTensors> options;
          options.if_exists = dcp::IfExists::replace;
          options.memory_bytes = budget;
          options.writers_per_file = writers;
          options.storage.layout = layout;
          dcp::save<dcp::SafeTensors>(world, place, held.state, options);
        });
        CHECK(peak <= allowed);
        CHECK(peak >= 1 << 20);
      };
      save_as(Placement<Replicate>{}, "replicated", dcp::FileLayout::final, 16);
      save_as(Placement<Shard<1>>{}, "columns, one file per rank", dcp::FileLayout::sharded, 16);
      save_as(Placement<Shard<1>>{}, "columns", dcp::FileLayout::final, 16);
      save_as(Placement<Shard<1>>{}, "columns, forwarded", dcp::FileLayout::final, 1);
      save_as(Placement<Shard<0>>{}, "rows", dcp::FileLayout::final, 16);

      auto const load_as = [&]<class T, class P>(T, P, char const* how, dcp::Verify verify) {
        CAPTURE(how);
        auto const peak = peak_of(ranks, [](dcp::ThreadComm& world) { return Held<T, P>{world}; }, [&](dcp::ThreadComm& world, Held<T, P>& held) {
          dcp::LoadOptions<dcp::SafeTensors> options;
          options.memory_bytes = budget;
          options.verify = verify;
          options.on_dtype = dcp::OnDType::cast;
          dcp::load<dcp::SafeTensors>(world, place, held.state, options);
        });
        CHECK(peak <= allowed);
      };
      load_as(0.0f, Placement<Shard<0>>{}, "rows", dcp::Verify::standard);
      load_as(0.0f, Placement<Shard<1>>{}, "columns", dcp::Verify::standard);
      load_as(0.0f, Placement<Shard<1>>{}, "columns, all verified", dcp::Verify::full);
      load_as(0.0f, Placement<Replicate>{}, "replicated, unverified", dcp::Verify::none);
      load_as(0.0, Placement<Shard<1>>{}, "columns, cast", dcp::Verify::standard);

      struct Both {
        Held<float, Placement<Shard<0>>> from;
        Held<float, Placement<Shard<1>>> to;
      };
      auto const peak = peak_of(ranks, [](dcp::ThreadComm& world) { return Both{Held<float, Placement<Shard<0>>>{world}, Held<float, Placement<Shard<1>>>{world}}; }, [&](dcp::ThreadComm& world, Both& both) {
        dcp::ReshardOptions options;
        options.memory_bytes = budget;
        dcp::reshard(world, both.from.state, both.to.state, options);
      });
      CHECK(peak <= allowed);
    }
}

TEST_CASE("load: a rank allocates its budget and a little metadata for what it decodes, however large the tensors and whichever way they are cut") {
  if (!dcp::test::counts_allocations) return;   // said when the program starts
  constexpr std::uint64_t budget = std::uint64_t{16} << 20;
  constexpr std::int64_t outputs = 4096, inputs = 10240;   // 40 MiB in a byte each, 20 MiB in four bits
  namespace plain = dcp::test::plain;
  dcp::test::TemporaryDirectory directory;
  auto const zeros = [](std::int64_t bytes) { return std::string(static_cast<std::size_t>(bytes), '\0'); };
  auto const put = [&](std::string const& place, plain::File const& file, std::string const& config) {
    std::filesystem::create_directories(directory / place);
    plain::write(directory / (place + "/model.safetensors"), file);
    if (!config.empty()) std::ofstream{directory / (place + "/config.json")} << R"({"quantization_config":)" << config << '}';
  };
  auto const ones = [](std::int64_t count) { return std::vector<float>(static_cast<std::size_t>(count), 1.0f); };
  put("fp8", {{{"w.weight", {"F8_E4M3", {outputs, inputs}, zeros(outputs * inputs)}}, {"w.weight_scale_inv", plain::tensor_of("F32", {outputs / 128, inputs / 128}, ones(outputs / 128 * inputs / 128))}}, {}}, "");
  put("mxfp4", {{{"w.weight_packed", {"U8", {outputs, inputs / 2}, zeros(outputs * inputs / 2)}}, {"w.weight_scale", {"U8", {outputs, inputs / 32}, zeros(outputs * inputs / 32)}}}, {}}, "");
  put("gptq", {{{"w.qweight", {"I32", {inputs / 8, outputs}, zeros(inputs * outputs / 2)}}, {"w.qzeros", {"I32", {inputs / 128, outputs / 8}, zeros(inputs / 128 * outputs / 2)}}, {"w.scales", plain::tensor_of("F32", {inputs / 128, outputs}, ones(inputs / 128 * outputs))}}, {}},
      R"({"quant_method":"gptq","bits":4,"group_size":128})");
  struct OneTensor {
    std::vector<dcp::bf16> memory;
    dcp::StateDict state;
  };
  auto const load_as = [&]<class P>(P, int ranks, std::string const& place, int threads) {
    CAPTURE(ranks);
    CAPTURE(place);
    CAPTURE(threads);
    auto const peak = peak_of(ranks, [](dcp::ThreadComm& world) {
      dcp::DeviceMesh<1> const mesh{world, {world.size()}};
      OneTensor one;
      one.memory.resize(dcp::local_box<P>(mesh, {outputs, inputs}).size());
      one.state.add("w.weight", dcp::ShardedTensor<dcp::bf16, P>{mesh, {outputs, inputs}, one.memory});
      return one;
    }, [&](dcp::ThreadComm& world, OneTensor& one) {
      dcp::LoadOptions<dcp::Quantized<dcp::AnyScheme, dcp::SafeTensors>> options;
      options.memory_bytes = budget;
      options.threads = threads;
      CHECK(dcp::load<dcp::Quantized<dcp::AnyScheme, dcp::SafeTensors>>(world, directory / place, one.state, options).decoded.size() == 1);
    });
    CHECK(peak <= static_cast<std::size_t>(ranks) * (budget + (1 << 20)));
  };
  for (std::string const place : {"fp8", "mxfp4", "gptq"})
    for (int const ranks : {1, 2}) {
      load_as(Placement<Shard<0>>{}, ranks, place, 2);
      load_as(Placement<Shard<1>>{}, ranks, place, 2);
      load_as(Placement<Replicate>{}, ranks, place, 16);
    }
}

TEST_CASE("save: what quantizes on the way allocates no more than the budget, however groups are cut") {
  if (!dcp::test::counts_allocations) return;
  for (int const ranks : {1, 2, 4}) {
    CAPTURE(ranks);
    dcp::test::TemporaryDirectory directory;
    std::uint64_t const budget = dcp::least_memory_bytes;
    auto const save_as = [&]<class S, class P>(std::type_identity<S>, P, char const* how, std::int64_t group) {
      CAPTURE(how);
      auto const peak = peak_of(ranks, [](dcp::ThreadComm& world) { return Held<float, P>{world}; }, [&](dcp::ThreadComm& world, Held<float, P>& held) {
        dcp::SaveOptions<S> options;
        options.if_exists = dcp::IfExists::replace;
        options.memory_bytes = budget;
        options.storage.group = group;
        dcp::save<S>(world, directory / "ckpt", held.state, options);
      });
      CHECK(peak <= static_cast<std::size_t>(ranks) * budget);
      CHECK(peak >= 1 << 20);
    };
    using dcp::Quantized, dcp::SafeTensors;
    save_as(std::type_identity<Quantized<dcp::Fp8Block<>, SafeTensors>>{}, Placement<Shard<0>>{}, "blocks, cut along rows", 128);
    save_as(std::type_identity<Quantized<dcp::Fp8Block<>, SafeTensors>>{}, Placement<Shard<1>>{}, "blocks, cut along columns", 128);
    save_as(std::type_identity<Quantized<dcp::Fp8Channel, SafeTensors>>{}, Placement<Replicate>{}, "rows, replicated", 128);
    save_as(std::type_identity<Quantized<dcp::Fp8Channel, SafeTensors>>{}, Placement<Shard<1>>{}, "rows, cut along columns", 128);
    save_as(std::type_identity<Quantized<dcp::Nvfp4, SafeTensors>>{}, Placement<Shard<1>>{}, "short groups, cut along columns", 128);
    save_as(std::type_identity<Quantized<dcp::Gptq, SafeTensors>>{}, Placement<Shard<0>>{}, "transposed words, cut along rows", 80);
  }
}

TEST_CASE("save, load, reshard: a budget that is too small is refused on all ranks before anything is touched") {
  dcp::test::TemporaryDirectory directory;
  std::string const place = directory.path() + "/ckpt";
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    Held<float, Placement<Shard<0>>> held{world};
    dcp::SaveOptions<dcp::SafeTensors> saving;
    saving.memory_bytes = dcp::least_memory_bytes - static_cast<std::uint64_t>(world.rank());   // one rank's is enough
    CHECK_THROWS_WITH_AS(dcp::save<dcp::SafeTensors>(world, place, held.state, saving), doctest::Contains("memory budget of 16777215 bytes"), dcp::Error);
    if (world.rank() == 0) CHECK(!std::filesystem::exists(place));
    saving.memory_bytes = dcp::least_memory_bytes;
    dcp::save<dcp::SafeTensors>(world, place, held.state, saving);
    held.memory[0][0] = 5;
    dcp::LoadOptions<dcp::SafeTensors> loading;
    loading.memory_bytes = dcp::least_memory_bytes - 1;
    CHECK_THROWS_AS(dcp::load<dcp::SafeTensors>(world, place, held.state, loading), dcp::Error);
    CHECK(held.memory[0][0] == 5);
    dcp::ReshardOptions resharding;
    resharding.memory_bytes = dcp::least_memory_bytes - 1;
    Held<float, Placement<Shard<1>>> other{world};
    CHECK_THROWS_AS(dcp::reshard(world, held.state, other.state, resharding), dcp::Error);
  });
}

TEST_CASE_TEMPLATE("CheckpointManager: a hundred saves in the background take the memory of three, and no large allocation after the first" * doctest::skip(dcp::test::under_a_sanitizer), P, Placement<Shard<0>>, Placement<Shard<1>>) {
  auto const resident = [] {
    std::ifstream statm{"/proc/self/statm"};
    double pages = 0;
    statm >> pages >> pages;
    return pages;
  };
  dcp::test::TemporaryDirectory directory;
  double after_three = 0, after_all = 0;
  std::size_t largest = 0;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    Held<float, P> held{world};
    dcp::CheckpointManager<dcp::SafeTensors> checkpoints{world, directory / "run", {.keep_last = 1, .staging_bytes = 64 << 20}};
    for (int save = 1; save <= 100; ++save) {
      checkpoints.async_save(save, held.state).wait();
      world.barrier();
      if (world.rank() == 0 && save == 1) dcp::test::largest_bytes = 0;
      if (world.rank() == 0 && save == 3) after_three = resident();
      world.barrier();
    }
    if (world.rank() == 0) after_all = resident(), largest = dcp::test::largest_bytes;
    world.barrier();
  });
  CHECK(after_all < after_three * 1.01);
  if (dcp::test::counts_allocations) CHECK(largest <= 1 << 20);
}
