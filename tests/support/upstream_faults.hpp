// SPDX-License-Identifier: Apache-2.0
#pragma once
// The rows of PyTorch's test_checkpoint.py, for any communicator: writers and readers that fail on chosen ranks. Include one of
// ranks_on_*.hpp before. Upstream's stubs raise in named methods; here the calls fail that the same steps make of the file system. Rank 0
// is always the coordinator, so upstream's runs with another one are runs in which another rank fails.

#include "support/fault_medium.hpp"
#include "support/plain_safetensors.hpp"
#include "support/upstream_resharding.hpp"

#include <dcp/checkpoint/owned_state.hpp>

#include <cerrno>

namespace dcp::test {

using FaultyFiles = FaultMedium<LocalFs>;
using FaultyStorage = BasicSafeTensors<FaultyFiles>;

/// A step that fails on one rank.
struct Failure {
  std::string step;
  int rank;
  FaultRule rule;
};

/// The error that `verb` throws on this rank; equal on all of them, or the check fails. Collective.
template <class C, class Verb>
std::string error_of_all(C& world, Failure const& failure, Verb const& verb) {
  std::string text;
  try {
    verb();
  } catch (Error const& error) {
    text = error.what();
    CHECK(error.rank() == failure.rank);
    CHECK(error.system_error() == failure.rule.system_error);
    CHECK(error.phase() != "");
  }
  CHECK(text != "");
  for (auto const& other : all_gather_bytes(world, as_byte_span(text))) CHECK(as_text(other) == text);
  return text;
}

/// Upstream's state: a tensor sharded over the ranks, one on all, and bytes.
template <class C>
struct FaultState {
  Held<float, S1> sharded;
  std::vector<float> tensor;
  std::vector<std::int64_t> bytes;

  FaultState(C const& world, float factor) : sharded{mesh_1d(world), {16}}, tensor(10, factor), bytes{static_cast<std::int64_t>(factor)} {
    sharded.each([&](float& x, std::size_t at) { x = factor * static_cast<float>(at); });
  }
  StateDict state() { return {{"sharded", sharded.tensor}, {"tensor", TensorView<float>{tensor, {10}}}, {"bytes", bytes}}; }
  bool operator==(FaultState const& other) const { return sharded.memory == other.sharded.memory && tensor == other.tensor && bytes == other.bytes; }
};

template <class C>
void fail_saves(C& world, std::string const& directory, std::vector<Failure> const& failures) {
  FaultyFiles files{LocalFs{}};
  FaultState<C> first{world, 1}, second{world, 2}, loaded{world, 3};
  SaveOptions<FaultyStorage> const options{.if_exists = IfExists::replace, .visible_within = std::chrono::seconds{5}, .storage = {.layout = FileLayout::sharded}};
  for (auto const& failure : failures) {
    CAPTURE(failure.step);
    std::string const where = directory + "/" + failure.step, place = where + "/ckpt";
    if (world.rank() == 0) std::filesystem::create_directory(where);
    world.barrier();
    auto const fails = [&](FaultState<C>& state) {
      if (world.rank() == failure.rank) files.add(failure.rule);
      error_of_all(world, failure, [&] { dcp::save<FaultyStorage>(world, {files, place}, state, options); });
      CHECK(files.hits() == (world.rank() == failure.rank ? 1u : 0u));
      files.clear();
      world.barrier();
    };
    fails(first);   // where nothing was
    CHECK(std::filesystem::is_empty(where));
    world.barrier();
    dcp::save<FaultyStorage>(world, {files, place}, first, options);
    fails(second);   // where a checkpoint was, which stays
    dcp::load<SafeTensors>(world, place, loaded);
    CHECK(loaded == first);
    dcp::save<FaultyStorage>(world, {files, place}, second, options);
    dcp::load<SafeTensors>(world, place, loaded);
    CHECK(loaded == second);
  }
}

template <class C>
void fail_loads(C& world, std::string const& directory, std::vector<Failure> const& failures) {
  FaultyFiles files{LocalFs{}};
  std::string const place = directory + "/ckpt";
  FaultState<C> saved{world, 1};
  dcp::save<SafeTensors>(world, place, saved, {.storage = {.layout = FileLayout::sharded}});
  for (auto const& failure : failures) {
    CAPTURE(failure.step);
    FaultState<C> loaded{world, 2};
    if (world.rank() == failure.rank) files.add(failure.rule);
    error_of_all(world, failure, [&] { dcp::load<FaultyStorage>(world, {files, place}, loaded); });
    CHECK((files.hits() > 0) == (world.rank() == failure.rank));
    files.clear();
    dcp::load<FaultyStorage>(world, {files, place}, loaded);
    CHECK(loaded == saved);
  }
}

// Upstream: a ShardedTensor whose only shard is on rank 1 has 1 chunk in the metadata.
TEST_CASE("test_tensor_metadata_with_missing_rank_spec: a tensor that only rank 1 holds is one piece, and all ranks can load it") {
  on_ranks(2, [](auto& world, std::string const& directory) {
    DeviceMesh<1> const mesh = mesh_1d(world);
    Held<float, Placement<>> held{mesh.sub<>({1}), {10, 20}, 2.5f};
    CHECK(held.memory.size() == (world.rank() == 1 ? 200u : 0u));
    dcp::save<SafeTensors>(world, directory + "/ckpt", {{"st", held.tensor}}, {.storage = {.layout = FileLayout::sharded}});
    CHECK(data_files(directory + "/ckpt") == std::vector<std::string>{"shard-00002-model-00001-of-00001.safetensors"});
    std::vector<float> whole(200);
    dcp::load<SafeTensors>(world, directory + "/ckpt", {{"st", TensorView<float>{whole, {10, 20}}}});
    CHECK(whole == std::vector<float>(200, 2.5f));
  });
}
// Upstream: of {bytes, tensor, sharded} the metadata has the kinds, the sizes and types, and 1 and 2 chunks.
TEST_CASE("test_default_metadata: a checkpoint says of each entry whether it is a tensor, its shape and its type") {
  on_ranks(2, [](auto& world, std::string const& directory) {
    std::vector<std::int64_t> bytes{1, 2, 3, 4};
    std::vector<float> tensor(10);
    Held<double, S1> sharded{mesh_1d(world), {10, 20}};
    std::string const place = directory + "/ckpt";
    dcp::save<SafeTensors>(world, place, {{"bytes", bytes}, {"plain", TensorView<float>{tensor, {10}}}, {"sharded", sharded.tensor}}, {.storage = {.layout = FileLayout::sharded}});
    auto const state = dcp::load_from_keys<SafeTensors>(world, place);
    CHECK(state.values().size() == 1);
    CHECK(state.values().at("bytes").kind == ValueKind::array);
    CHECK(state.values().at("bytes").dtype == DType::i64);
    CHECK(state.tensors().size() == 2);
    CHECK(state.tensors().at("plain").shape() == Extents{10});
    CHECK(state.tensors().at("plain").dtype() == DType::f32);
    CHECK(state.tensors().at("sharded").shape() == Extents{10, 20});
    CHECK(state.tensors().at("sharded").dtype() == DType::f64);
    std::size_t plain_pieces = 0, sharded_pieces = 0;
    for (auto const& name : data_files(place)) {
      auto const file = plain::read(place + "/" + name);
      plain_pieces += file.tensors.count("plain"), sharded_pieces += file.tensors.count("sharded");
    }
    CHECK(plain_pieces == 1);
    CHECK(sharded_pieces == 2);
  });
}
// Upstream: the stubs succeed when they are not told to fail.
TEST_CASE("test_dummy_writer_works, test_dummy_reader_works: the medium that can fail does not unless it is told to") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    fail_saves(world, directory, {});
    fail_loads(world, directory, {});
    FaultyFiles files{LocalFs{}};
    FaultState saved{world, 5}, loaded{world, 6};
    dcp::save<FaultyStorage>(world, {files, directory + "/dummy"}, saved);
    dcp::load<FaultyStorage>(world, {files, directory + "/dummy"}, loaded);
    CHECK(loaded == saved);
    CHECK(files.hits() == 0);
    if (world.rank() == 0) CHECK(files.calls(Call::publish_new) == 1);
  });
}

inline std::vector<Failure> save_failures_of(int rank) {
  return {{"prepare_global_plan", rank, {.call = Call::create_directory, .system_error = EACCES}},
          {"set_up", rank, {.call = Call::open_write, .path = "dcp.json", .system_error = EIO}},
          {"finish_checksums", rank, {.call = Call::write, .path = "dcp.crc", .system_error = ENOSPC}},
          {"finish_publish", rank, {.call = Call::publish_new, .system_error = EROFS}}};
}
// Upstream fails set_up, finish and prepare_global_plan on rank 0, prepare_local_plan on 0, write_data on 2 and an asynchronous write on 3
// (with coordinator 1: set_up and finish on 1). Each is a CheckpointException on all ranks, whose failed ranks are those that failed.
TEST_CASE("test_save_error_handling: whatever fails on a rank is one error on all ranks that names it, and the old checkpoint or nothing is there") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    // What only rank 0 does, when the place was empty.
    FaultyFiles files{LocalFs{}};
    FaultState saved{world, 1}, loaded{world, 2};
    SaveOptions<FaultyStorage> const options{.if_exists = IfExists::replace, .storage = {.layout = FileLayout::sharded}};
    for (auto const& failure : save_failures_of(0)) {
      CAPTURE(failure.step);
      std::string const where = directory + "/" + failure.step;
      if (world.rank() == 0) std::filesystem::create_directory(where), files.add(failure.rule);
      world.barrier();
      error_of_all(world, failure, [&] { dcp::save<FaultyStorage>(world, {files, where + "/ckpt"}, saved, options); });
      CHECK(files.hits() == (world.rank() == 0 ? 1u : 0u));
      files.clear();
      if (failure.rule.call == Call::publish_new) {
        dcp::load<SafeTensors>(world, where + "/ckpt", loaded);   // complete and committed, so it may be loaded
        CHECK(loaded == saved);
      } else {
        CHECK(std::filesystem::is_empty(where));
      }
      world.barrier();
      dcp::save<FaultyStorage>(world, {files, where + "/ckpt"}, saved, options);
      dcp::load<SafeTensors>(world, where + "/ckpt", loaded);
      CHECK(loaded == saved);
    }
    // What any rank does.
    fail_saves(world, directory, {{"write_data", 2, {.call = Call::write, .path = "shard-00003", .system_error = ENOSPC}},
                                  {"write_data_async", 3, {.call = Call::sync, .path = "shard-00004", .system_error = EIO}},
                                  {"open_data", 1, {.call = Call::open_write, .path = "shard-00002", .system_error = EMFILE}}});
    // A plan that a rank cannot make: it lists a name twice.
    std::vector<float> one(1), other(1);
    StateDict state{{"x", TensorView<float>{one, {1}}}};
    if (world.rank() == 1) state.add("x", TensorView<float>{other, {1}});
    error_of_all(world, {"prepare_local_plan", 1, {}}, [&] { dcp::save<SafeTensors>(world, directory + "/never", state); });
    CHECK(!std::filesystem::exists(directory + "/never"));
  });
}
// Upstream: the same in one process.
TEST_CASE("test_save_error_handling_no_dist: whatever fails in one process is an error, and the old checkpoint or nothing is there") {
  on_ranks(1, [](auto& world, std::string const& directory) {
    fail_saves(world, directory, {{"set_up", 0, {.call = Call::open_write, .path = "dcp.json", .system_error = EIO}},
                                  {"write_data", 0, {.call = Call::write, .path = "shard-00001", .system_error = ENOSPC}},
                                  {"write_data_async", 0, {.call = Call::sync, .path = "shard-00001", .system_error = EIO}},
                                  {"finish", 0, {.call = Call::write, .path = "dcp.crc", .system_error = ENOSPC}}});
  });
}
// Upstream fails set_up, prepare_global_plan and read_metadata on rank 0, prepare_local_plan on 1, read_data on 3 and an asynchronous read on
// 1 (with other coordinators: set_up 0, read_metadata 3, read_data 0, asynchronous read 2, global plan 1); asserts as for saves.
TEST_CASE("test_load_error_handling: whatever fails on a rank is one error on all ranks that names it, and the next load is whole") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    std::vector<Failure> failures{{"set_up", 0, {.call = Call::kind, .times = forever, .system_error = EACCES}},
                                  {"read_metadata", 0, {.call = Call::open_read, .path = "dcp.json", .times = forever, .system_error = EIO}},
                                  {"read_metadata_3", 3, {.call = Call::read, .path = "dcp.json", .times = forever, .system_error = EIO}}};
    for (int rank : {3, 1, 0, 2}) {
      std::string const own = "shard-0000" + std::to_string(rank + 1);
      failures.push_back({"open_data", rank, {.call = Call::open_read, .path = own, .times = forever, .system_error = EMFILE}});
      failures.push_back({"read_data", rank, {.call = Call::read, .path = own, .times = forever, .system_error = EIO}});
    }
    fail_loads(world, directory, failures);
    // A plan that a rank cannot make: its entry has another shape than everyone's.
    std::vector<float> tensor(world.rank() == 1 ? 11 : 10, -1.0f);
    std::string text;
    try {
      dcp::load<SafeTensors>(world, directory + "/ckpt", {{"tensor", TensorView<float>{tensor, {static_cast<std::int64_t>(tensor.size())}}}}, {.on_unexpected = OnUnexpected::ignore});
    } catch (Error const& error) {
      CHECK(error.code() == ErrorCode::ranks_disagree);
      text = error.what();
    }
    CHECK(text.find("rank 1") != std::string::npos);
    CHECK(tensor == std::vector<float>(tensor.size(), -1.0f));
  });
}
// Upstream: the same in one process.
TEST_CASE("test_load_error_handling_no_dist: whatever fails in one process is an error, and the next load is whole") {
  on_ranks(1, [](auto& world, std::string const& directory) {
    fail_loads(world, directory, {{"set_up", 0, {.call = Call::kind, .times = forever, .system_error = EACCES}},
                                  {"read_metadata", 0, {.call = Call::open_read, .path = "dcp.json", .times = forever, .system_error = EIO}},
                                  {"read_data", 0, {.call = Call::read, .path = "shard-00001", .times = forever, .system_error = EIO}}});
  });
}

}  // namespace dcp::test
