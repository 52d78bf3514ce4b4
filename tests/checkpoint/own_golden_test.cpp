// SPDX-License-Identifier: Apache-2.0
// Checkpoints of the library's own format that earlier versions of it wrote. They stay in the repository, and load for ever.
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>

#include "formats/golden.hpp"
#include "support/golden_state.hpp"
#include "support/sha256.hpp"

#include <doctest/doctest.h>

#include <mutex>

namespace fs = std::filesystem;
namespace v1 = dcp::test::golden_v1;
using dcp::test::HeldTensors;

namespace {

std::vector<fs::path> golden_checkpoints() {
  std::vector<fs::path> found;
  for (auto const& file : golden::files_below(golden::root() / "own", ".json"))
    if (file.filename() == "expected.json") found.push_back(file.parent_path());
  return found;
}

}  // namespace

TEST_CASE("every golden checkpoint of our own loads whole, verified to the last byte, with the tensors, ties and values of its expected.json") {
  auto const all = golden_checkpoints();
  CHECK(all.size() >= 2);
  for (auto const& directory : all) {
    CAPTURE(directory.string());
    auto const expected = golden::json_of(directory / "expected.json");
    dcp::SelfComm self;
    auto const state = dcp::load_from_keys<dcp::SafeTensors>(self, directory / "ckpt", {}, {.verify = dcp::Verify::full});
    CHECK_FALSE(state.report().foreign);
    CHECK(state.report().warnings.empty());
    CHECK(state.report().unverified_bytes == 0);
    CHECK(state.report().verified_bytes > 0);
    std::map<std::string, std::string> names;
    for (auto const& [name, facts] : expected["tensors"].items()) names[name] = name;
    for (auto const& [dropped, kept] : expected["tied"].items()) names[dropped] = kept.get<std::string>();
    CHECK(state.tensors().size() == names.size());
    for (auto const& stored : names) {
      auto const& name = stored.first;
      auto const& kept = stored.second;
      CAPTURE(name);
      REQUIRE(state.tensors().contains(name));
      auto const& tensor = state.tensors().at(name);
      auto const& facts = expected["tensors"][kept];
      CHECK(std::string{to_string(tensor.dtype())} == facts["dtype"].get<std::string>());
      CHECK(tensor.shape() == dcp::Extents{facts["shape"].get<std::vector<std::int64_t>>()});
      CHECK(dcp::test::sha256(tensor.bytes()) == facts["sha256"].get<std::string>());
    }
    CHECK(state.values().size() == expected["values"].size());
    for (auto const& value : expected["values"].items()) {
      auto const& name = value.key();
      auto const& facts = value.value();
      CAPTURE(name);
      REQUIRE(state.values().contains(name));
      CHECK(std::string{to_string(state.values().at(name).kind)} == facts["kind"].get<std::string>());
      auto const text = dcp::to_json(state.values().at(name));
      if (facts.contains("json")) CHECK(text == facts["json"].get<std::string>());
      CHECK(dcp::test::sha256(dcp::as_byte_span(text)) == facts["sha256"].get<std::string>());
    }
  }
}

TEST_CASE("a golden checkpoint of version 1 fills the state that was saved, on the ranks that saved it and tensors on any other number") {
  for (std::string const kind : {"final", "sharded"}) {
    CAPTURE(kind);
    auto const place = golden::root() / "own" / "v1" / kind / "ckpt";
    auto const tensors = v1::tensors();
    for (int const ranks : {1, 2, v1::ranks, 5}) {
      CAPTURE(ranks);
      std::mutex mutex;
      dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
        HeldTensors held{tensors, [&](dcp::test::WholeTensor const& t) { return ranks == v1::ranks ? v1::layout_of(t) : dcp::plain_layout(t.shape); }, world.rank(), false};
        v1::Values values;
        values.schedule = {0, 0};
        if (ranks == v1::ranks) held.state.add("values", values);
        dcp::Bytes head(dcp::test::packed_bytes(dcp::DType::bf16, 13 * 6));
        held.state.add_tensor(v1::tie.first, dcp::DType::bf16, dcp::plain_layout({13, 6}), {head.data(), dcp::row_major_strides({13, 6})});
        auto const report = dcp::load<dcp::SafeTensors>(world, place, held.state, {.on_unexpected = ranks == v1::ranks ? dcp::OnUnexpected::error : dcp::OnUnexpected::ignore});
        std::lock_guard const lock{mutex};
        CHECK(held.complete());
        CHECK(std::any_of(tensors.begin(), tensors.end(), [&](auto const& t) { return t.name == v1::tie.second && t.bytes == head; }));
        if (ranks == v1::ranks) CHECK(values.equals(v1::Values::filled(world.rank())));
      });
    }
  }
}
