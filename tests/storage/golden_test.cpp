// SPDX-License-Identifier: Apache-2.0
// Checkpoints that safetensors, huggingface_hub and torch.distributed.checkpoint wrote, read whole and in shards.
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/storage/safetensors.hpp>

#include "formats/golden.hpp"
#include "support/dtypes.hpp"
#include "support/generate.hpp"
#include "support/sha256.hpp"
#include "support/whole_tensor.hpp"

#include <doctest/doctest.h>

#include <cstdio>
#include <functional>
#include <mutex>
#include <set>

namespace fs = std::filesystem;
using dcp::test::sha256;

namespace {

struct Case {
  std::string name;
  fs::path checkpoint;
  nlohmann::json expected;
};

// Every checkpoint below golden/safetensors and golden/hf; where torch consolidated shards, the shards are one of their own.
std::vector<Case> golden_cases() {
  std::vector<Case> cases;
  for (auto const& file : golden::files_below(golden::root(), ".json")) {
    auto const directory = file.parent_path(), kind = directory.parent_path().filename();
    if (file.filename() != "expected.json" || (kind != "safetensors" && kind != "hf")) continue;
    auto const name = directory.filename().string();
    auto const expected = golden::json_of(file);
    if (kind == "safetensors") {
      cases.push_back({name + " as a file", directory / "model.safetensors", expected});
      cases.push_back({name + " as a directory", directory, expected});
      continue;
    }
    cases.push_back({name, directory / "ckpt", expected});
    if (fs::exists(directory / "ckpt" / "sharded")) cases.push_back({name + ", its shards", directory / "ckpt" / "sharded", expected});
  }
  return cases;
}

dcp::Extents extents_of(nlohmann::json const& list) { return dcp::Extents{list.get<std::vector<std::int64_t>>()}; }

// Placements and mesh as torch prints them.
dcp::Layout layout_from_torch(dcp::Extents const& shape, nlohmann::json const& placements, nlohmann::json mesh, std::int64_t world) {
  dcp::Layout layout;
  layout.shape = layout.split_shape = shape;
  layout.mesh.world = world;
  for (; mesh.is_array(); mesh = nlohmann::json(mesh[0])) layout.mesh.extents[static_cast<std::size_t>(layout.mesh.axes++)] = static_cast<std::int64_t>(mesh.size());
  std::int64_t stride = 1;
  for (auto a = static_cast<std::size_t>(layout.mesh.axes); a-- > 0;) {
    layout.mesh.strides[a] = stride;
    stride *= layout.mesh.extents[a];
  }
  for (std::size_t a = 0; a < placements.size(); ++a) {
    auto const text = placements[a].get<std::string>();
    int dim = 0;
    if (std::sscanf(text.c_str(), "S(%d)", &dim) == 1) layout.rules[a] = {dcp::RuleKind::shard, dim, -1};
    else REQUIRE(text == "R");
  }
  return layout;
}

struct Part {
  dcp::Box box;
  dcp::Bytes memory;
};

template <class Placement>
void check_placement(Case const& one, dcp::OwnedState const& whole, int ranks) {
  // Elements smaller than a byte load only in shards of whole bytes: a tensor that would be cut inside a byte must be refused.
  std::set<std::string> names, cut_inside_a_byte;
  for (auto const& [name, tensor] : whole.tensors()) {
    if (tensor.shape().rank() < Placement::needed_rank) continue;
    names.insert(name);
    if (!dcp::test::cuts_whole_bytes(dcp::layout_of<Placement>(dcp::DeviceMesh<1>{dcp::test::Ranks{0, ranks}, {ranks}}, tensor.shape()), tensor.dtype())) cut_inside_a_byte.insert(name);
  }
  auto const load = [&](std::set<std::string> const& wanted) {
    std::mutex mutex;
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      dcp::DeviceMesh<1> const mesh{world, {ranks}};
      std::map<std::string, Part> parts;
      dcp::StateDict state;
      for (auto const& name : wanted) {
        auto const& tensor = whole.tensors().at(name);
        auto const box = dcp::local_box<Placement>(mesh, tensor.shape());
        auto& part = parts[name] = {box, dcp::Bytes(dcp::test::packed_bytes(tensor.dtype(), box.size()), std::byte{0xEE})};
        dcp::test::with_type(tensor.dtype(), [&]<class T>() {
          using Element = dcp::storage_of<T>;
          std::span<Element> const memory{reinterpret_cast<Element*>(part.memory.data()), part.memory.size() / sizeof(Element)};
          state.add(name, dcp::ShardedTensor<T, Placement>{mesh, tensor.shape(), memory});
        });
      }
      auto const report = dcp::load<dcp::SafeTensors>(world, one.checkpoint, state, {.on_unexpected = dcp::OnUnexpected::ignore});
      std::lock_guard const lock{mutex};
      CHECK(report.foreign);
      CHECK(report.tensors == wanted.size());
      for (auto const& [name, part] : parts) {
        auto const& shown_name = name;   // older clang++ does not capture bindings
        CAPTURE(shown_name);
        auto const& tensor = whole.tensors().at(name);
        CHECK(part.memory == dcp::test::cut_out(tensor.bytes(), tensor.dtype(), tensor.shape(), part.box));
      }
    });
  };
  for (auto const& name : cut_inside_a_byte) {
    auto const& shown_name = name;   // older clang++ does not capture bindings
    CAPTURE(shown_name);
    CHECK(golden::outcome([&] { load({name}); }) == "misaligned");
    names.erase(name);
  }
  load(names);
}

}  // namespace

TEST_CASE("sha256: the examples of the standard, and the lengths around a block") {
  auto const of = [](std::string const& text) { return sha256(dcp::as_byte_span(text)); };
  CHECK(of("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(of("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(of("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") == "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  CHECK(of(std::string(55, 'a')) == "9f4390f8d30c2dd92ec9f095b65e2b9ae9b0a925a5258e241c9f1e910f734318");
  CHECK(of(std::string(56, 'a')) == "b35439a4ac6f0948b6d6f9e3c6af0f5f590ce20f1bde7090ef7970686ec6738a");
  CHECK(of(std::string(64, 'a')) == "ffe054fe7ae0cb6dc65c3af9b61d5209f439851db43d0ba5997337df154668eb");
  CHECK(of(std::string(1'000'000, 'a')) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST_CASE("every golden checkpoint loads whole: names, dtypes, shapes and every byte") {
  auto const cases = golden_cases();
  CHECK(cases.size() >= 37);
  for (auto const& one : cases) {
    CAPTURE(one.name);
    dcp::SelfComm self;
    auto const state = dcp::load_from_keys<dcp::SafeTensors>(self, one.checkpoint);
    std::map<std::string, std::string> names;
    for (auto const& [name, facts] : one.expected["tensors"].items()) names[name] = name;
    if (one.expected.contains("tied"))
      for (auto const& [dropped, kept] : one.expected["tied"].items()) names[dropped] = kept.get<std::string>();
    CHECK(state.tensors().size() == names.size());
    CHECK(state.values().empty());
    CHECK(state.report().foreign);
    for (auto const& [name, kept] : names) {
      auto const& shown_name = name;   // older clang++ does not capture bindings
      CAPTURE(shown_name);
      REQUIRE(state.tensors().contains(name));
      auto const& tensor = state.tensors().at(name);
      auto const& facts = one.expected["tensors"][kept];
      CHECK(std::string{to_string(tensor.dtype())} == facts["dtype"].get<std::string>());
      CHECK(tensor.shape() == extents_of(facts["shape"]));
      CHECK(sha256(tensor.bytes()) == facts["sha256"].get<std::string>());
    }
    if (one.expected.contains("stored_boxes_with_duplicates")) CHECK(state.report().duplicates.size() == 1);
    else CHECK(state.report().duplicates.empty());
    CHECK(state.report().warnings.empty());
  }
}

TEST_CASE("every golden checkpoint loads into shards on 1, 2, 3 and 4 ranks, split by rows, split by columns, and replicated") {
  for (auto const& one : golden_cases()) {
    CAPTURE(one.name);
    dcp::SelfComm self;
    auto const whole = dcp::load_from_keys<dcp::SafeTensors>(self, one.checkpoint);
    for (int const ranks : {1, 2, 3, 4}) {
      CAPTURE(ranks);
      check_placement<dcp::Placement<dcp::Shard<0>>>(one, whole, ranks);
      check_placement<dcp::Placement<dcp::Shard<1>>>(one, whole, ranks);
      check_placement<dcp::Placement<dcp::Replicate>>(one, whole, ranks);
    }
  }
}

TEST_CASE("on torch's meshes and placements every rank holds torch's box, and loads the bytes that torch had in it") {
  int boxes = 0, empty = 0;
  for (auto const& one : golden_cases()) {
    if (!one.expected.contains("shards")) continue;
    CAPTURE(one.name);
    auto const world_size = one.expected["world_size"].get<int>();
    std::mutex mutex;
    dcp::run_threads(world_size, [&](dcp::ThreadComm& world) {
      std::map<std::string, Part> parts;
      dcp::StateDict state;
      for (auto const& [name, facts] : one.expected["tensors"].items()) {
        dcp::DType dtype{};
        REQUIRE(dcp::parse_dtype(facts["dtype"].get<std::string>(), dtype));
        auto const shape = extents_of(facts["shape"]);
        bool const placed = one.expected["placements"].contains(name);
        auto const layout = placed ? layout_from_torch(shape, one.expected["placements"][name], one.expected["meshes"][name], world_size) : dcp::plain_layout(shape);
        auto const box = placed ? dcp::box_of_rank(layout, world.rank()).value() : dcp::Box::whole(shape);
        auto& part = parts[name] = {box, dcp::Bytes(dcp::bytes_of(dtype, static_cast<std::int64_t>(box.size())), std::byte{0xEE})};
        state.add_tensor(name, dtype, layout, {part.memory.data(), dcp::row_major_strides(box.shape)});
      }
      dcp::load<dcp::SafeTensors>(world, one.checkpoint, state);
      std::lock_guard const lock{mutex};
      for (auto const& [name, shards] : one.expected["shards"].items())
        for (auto const& shard : shards) {
          if (shard["rank"].get<int>() != world.rank()) continue;
          auto const& shown_name = name;   // older clang++ does not capture bindings
          CAPTURE(shown_name);
          CAPTURE(world.rank());
          auto const& part = parts.at(name);
          CHECK(part.box.origin == extents_of(shard["offsets"]));
          CHECK(part.box.shape == extents_of(shard["sizes"]));
          CHECK(sha256(part.memory) == shard["sha256"].get<std::string>());
          ++boxes;
          empty += part.box.empty() ? 1 : 0;
        }
    });
  }
  CHECK(boxes > 200);
  CHECK(empty > 5);
}
