// SPDX-License-Identifier: Apache-2.0
#pragma once
// The rows of PyTorch's test_state_dict_stager.py and test_async_process_executor.py that are about what a save in the background copies, and about the
// process that writes it. Include one of ranks_on_*.hpp before.

#include "support/upstream_training.hpp"

#include <dcp/checkpoint/async_save.hpp>
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/manager.hpp>
#include <dcp/storage/safetensors.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include <signal.h>
#include <unistd.h>

namespace dcp::test {

inline std::uint64_t bytes_of_data_files(std::filesystem::path const& checkpoint) {
  std::uint64_t bytes = 0;
  for (auto const& entry : std::filesystem::directory_iterator{checkpoint})
    if (entry.path().extension() == ".safetensors") bytes += entry.file_size();
  return bytes;
}
inline std::uint64_t resident_bytes() {
  std::uint64_t size = 0, resident = 0;
  std::ifstream{"/proc/self/statm"} >> size >> resident;
  return resident * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
}

// Upstream: a tensor, a view and a narrowing of it share one staged storage, of the exact number of bytes. Here one memory under two names is staged once, and
// of a larger memory only what is saved.
TEST_CASE("test_views: one memory under two names is staged once, a slice of a larger memory alone, exactly the bytes of the files") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    std::vector<float> memory(1000), large(1 << 20);
    std::iota(memory.begin(), memory.end(), 0.0f);
    std::iota(large.begin(), large.end(), 0.0f);
    TensorView<float> base{memory, {100, 10}}, view{memory, {100, 10}}, whole{large, {1024, 1024}};
    auto narrow = whole.slice(0, 16, 32);
    auto const report = async_save<SafeTensors>(world, directory + "/ckpt", {{"base", base}, {"view", view}, {"narrow", narrow}}).wait();
    CHECK(report.staged_bytes == bytes_of_data_files(directory + "/ckpt"));
    CHECK(report.staged_bytes < 4 * (1000 + 16 * 1024) + 8192);   // the header is whole blocks
    std::ranges::fill(memory, -1.0f);
    std::ranges::fill(large, -1.0f);
    load<SafeTensors>(world, directory + "/ckpt", {{"base", base}, {"view", view}, {"narrow", narrow}});
    CHECK(memory[999] == 999.0f);
    CHECK(large[16 * 1024 - 1] == -1.0f);
    CHECK(large[16 * 1024] == 16 * 1024.0f);
  });
}
// Upstream: a second and third stage use the same memory, with new values in it.
TEST_CASE("test_caching: a second and a third save use the same staging memory, with new values in it") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    CheckpointManager<SafeTensors> manager{world, directory};
    std::vector<float> memory(4096);
    TensorView<float> tensor{memory, {4096}};
    for (std::int64_t step = 1; step <= 3; ++step) {
      std::ranges::fill(memory, static_cast<float>(step));
      CHECK(manager.save(step, {{"t", tensor}}).pool_reused == (step > 1));
    }
    for (std::int64_t step = 1; step <= 3; ++step) {
      manager.load(step, {{"t", tensor}});
      CHECK(std::ranges::all_of(memory, [&](float x) { return x == static_cast<float>(step); }));
    }
  });
}
// Upstream: float32, float64, int32, int64 and bool are staged with their values.
TEST_CASE("test_different_dtypes: float32, float64, int32, int64 and bool are saved behind the program with their values") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    std::vector<float> f32{1.5f, -2.25f};
    std::vector<double> f64{1e300, -0.0};
    std::vector<std::int32_t> i32{-7, 2'000'000'000};
    std::vector<std::int64_t> i64{-7, std::int64_t{1} << 60};
    std::array<bool, 2> flags{true, false};
    TensorView<float> a{f32, {2}};
    TensorView<double> b{f64, {2}};
    TensorView<std::int32_t> c{i32, {2}};
    TensorView<std::int64_t> d{i64, {2}};
    TensorView<bool> e{flags, {2}};
    StateDict const state{{"f32", a}, {"f64", b}, {"i32", c}, {"i64", d}, {"bool", e}};
    async_save<SafeTensors>(world, directory + "/ckpt", state).wait();
    f32 = {}, f64 = {}, i32 = {}, i64 = {};
    f32.resize(2), f64.resize(2), i32.resize(2), i64.resize(2), flags = {};
    StateDict const again{{"f32", TensorView<float>{f32, {2}}}, {"f64", TensorView<double>{f64, {2}}}, {"i32", TensorView<std::int32_t>{i32, {2}}}, {"i64", TensorView<std::int64_t>{i64, {2}}}, {"bool", e}};
    load<SafeTensors>(world, directory + "/ckpt", again);
    CHECK(f32 == std::vector<float>{1.5f, -2.25f});
    CHECK(f64 == std::vector<double>{1e300, -0.0});
    CHECK(i32 == std::vector<std::int32_t>{-7, 2'000'000'000});
    CHECK(i64 == std::vector<std::int64_t>{-7, std::int64_t{1} << 60});
    CHECK(flags == std::array<bool, 2>{true, false});
  });
}
// Upstream: tensors without elements and of no dimension are staged.
TEST_CASE("test_empty_tensors: tensors without elements and without dimensions are saved behind the program") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    std::vector<float> none, one{42.0f};
    TensorView<float> empty{none, {0}}, flat{none, {3, 0, 2}}, scalar{one, Extents{}};
    StateDict const state{{"empty", empty}, {"flat", flat}, {"scalar", scalar}};
    async_save<SafeTensors>(world, directory + "/ckpt", state).wait();
    one[0] = 0;
    CHECK(load<SafeTensors>(world, directory + "/ckpt", state).tensors == 3);
    CHECK(one[0] == 42.0f);
  });
}
// Upstream: six views share one staged storage.
TEST_CASE("test_complex_storage_sharing: six names of one memory are staged once") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    std::vector<float> memory(100'000);
    std::iota(memory.begin(), memory.end(), 0.0f);
    std::vector<TensorView<float>> views(6, TensorView<float>{memory, {100'000}});
    auto const report = async_save<SafeTensors>(world, directory + "/ckpt", {{"a", views[0]}, {"b", views[1]}, {"c", views[2]}, {"d", views[3]}, {"e", views[4]}, {"f", views[5]}}).wait();
    CHECK(report.staged_bytes == bytes_of_data_files(directory + "/ckpt"));
    CHECK(report.staged_bytes < 4 * 100'000 + 8192);
  });
}
// Upstream: a staged CPU tensor is a copy.
TEST_CASE("test_cpu_storage_independence: what the program does to its tensors after the call is not in the checkpoint") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    std::vector<float> memory(10'000, 1.0f);
    TensorView<float> tensor{memory, {10'000}};
    Pending pending = async_save<SafeTensors>(world, directory + "/ckpt", {{"t", tensor}});
    std::ranges::fill(memory, 2.0f);
    pending.wait();
    load<SafeTensors>(world, directory + "/ckpt", {{"t", tensor}});
    CHECK(std::ranges::all_of(memory, [](float x) { return x == 1.0f; }));
  });
}
// Upstream: staged tensors are in shared memory, and in pinned memory, exactly when that was asked for. Here the executor asks; memory pinned for a device
// is of no use for tensors of the host.
TEST_CASE("test_tensor_pinned_and_shared: staging memory is shared with another process exactly when one writes") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    std::vector<float> memory(10'000, 1.0f);
    TensorView<float> tensor{memory, {10'000}};
    for (auto const executor : {Executor::thread, Executor::process}) {
      std::string const place = directory + (executor == Executor::thread ? "/thread" : "/process");
      auto const report = async_save<SafeTensors>(world, place, {{"t", tensor}}, {.executor = executor, .saver_program = DCP_SAVER_PROGRAM}).wait();
      CHECK(report.saver_processes.empty() == (executor == Executor::thread));
      if (executor == Executor::thread) continue;
      auto const mine = report.saver_processes.at(static_cast<std::size_t>(world.rank()));
      bool shared = false;
      std::ifstream maps{"/proc/" + std::to_string(mine) + "/maps"};
      for (std::string line; std::getline(maps, line);) shared = shared || line.find("memfd:dcp-staging") != std::string::npos;
      CHECK(shared);
    }
  });
}
// Upstream: a staged DTensor has the spec, the size and the values of its source.
TEST_CASE("test_dtensor: a sharded tensor that was saved behind the program comes back with its shape and values, here and on another layout") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    DeviceMesh<1> const mesh{world, {4}};
    std::vector<float> rows(10 * 6), columns(40);
    ShardedTensor<float, Placement<Shard<0>>> by_rows{mesh, {10, 6}, std::span{rows}.first(local_box<Placement<Shard<0>>>(mesh, {10, 6}).size())};
    auto const box = by_rows.local_box();
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(box.size()); ++i) rows[static_cast<std::size_t>(i)] = static_cast<float>(box.origin[0] * 6 + i);
    async_save<SafeTensors>(world, directory + "/ckpt", {{"t", by_rows}}).wait();
    ShardedTensor<float, Placement<Shard<1>>> by_columns{mesh, {10, 6}, std::span{columns}.first(local_box<Placement<Shard<1>>>(mesh, {10, 6}).size())};
    load<SafeTensors>(world, directory + "/ckpt", {{"t", by_columns}});
    auto const part = by_columns.local_box();
    for (std::int64_t i = 0; i < part.shape[0]; ++i)
      for (std::int64_t j = 0; j < part.shape[1]; ++j) CHECK(columns[static_cast<std::size_t>(i * part.shape[1] + j)] == static_cast<float>(i * 6 + part.origin[1] + j));
  });
}
// Upstream: five saves of 128 MB let the process grow by less than 1.2 times the state. Here staging memory stays from the first save on, and sanitizers keep a
// multiple of it: five more are counted.
TEST_CASE("test_async_save_no_memory_leak: five saves after the first let the process grow by less than 1.2 times the state") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    DeviceMesh<1> const mesh{world, {4}};
    std::vector<float> memory(2 << 20, 1.0f);   // 8 MiB of each rank, 32 MiB in all
    ShardedTensor<float, Placement<Shard<0>>> tensor{mesh, {8 << 20}, memory};
    std::uint64_t const state_bytes = std::uint64_t{32} << 20;
    std::uint64_t before = 0;
    for (int save = 0; save < 6; ++save) {
      if (save == 1) before = resident_bytes();
      async_save<SafeTensors>(world, directory + "/ckpt", {{"t", tensor}}, {.if_exists = IfExists::replace}).wait();
    }
    world.barrier();
    std::uint64_t const after = resident_bytes();
    CHECK(after < before + state_bytes * 12 / 10);
  });
}
// Upstream: a save that fails in the process is an exception here; the process lives, and its next save is well.
TEST_CASE("test_checkpoint_save_failure_continues_serving: after a save that failed in it, the same process does the next one") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    std::vector<float> memory(10'000, 1.0f);
    TensorView<float> tensor{memory, {10'000}};
    CheckpointManager<SafeTensors> manager{world, directory, {.save = {.executor = Executor::process, .saver_program = DCP_SAVER_PROGRAM}}};
    auto const processes = manager.save(1, {{"t", tensor}}).saver_processes;
    CHECK_THROWS_AS(manager.save(1, {{"t", tensor}}), Error);
    CHECK(::kill(static_cast<pid_t>(processes.at(static_cast<std::size_t>(world.rank()))), 0) == 0);
    CHECK(manager.save(2, {{"t", tensor}}).saver_processes == processes);
    CHECK(manager.steps() == std::vector<std::int64_t>{1, 2});
  });
}

}  // namespace dcp::test
