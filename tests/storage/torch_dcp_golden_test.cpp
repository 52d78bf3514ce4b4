// SPDX-License-Identifier: Apache-2.0
// Checkpoints that torch.distributed.checkpoint wrote, read through the storage TorchDcp: whole, in any cut, and in the boxes that torch's ranks had.
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/storage/torch_dcp.hpp>

#include "formats/golden.hpp"
#include "support/cuts.hpp"
#include "support/generate.hpp"
#include "support/outcome.hpp"
#include "support/sha256.hpp"
#include "support/torch_layouts.hpp"
#include "support/whole_tensor.hpp"

#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <mutex>
#include <set>

namespace fs = std::filesystem;
using dcp::test::HeldTensors;
using dcp::test::WholeTensor;
using Json = nlohmann::json;

namespace {

struct Case {
  std::string name;
  fs::path place;
  Json expected;
};

// All but the one whose tensor has a hole.
std::vector<Case> golden_cases() {
  std::vector<Case> cases;
  for (auto const& file : golden::files_below(golden::root() / "torch_dcp", ".json")) {
    auto const directory = file.parent_path();
    if (file.filename() != "expected.json" || directory.filename() == "huge_offsets") continue;
    cases.push_back({directory.filename().string(), directory / "ckpt", golden::json_of(file)});
  }
  return cases;
}

dcp::Extents extents_of(Json const& list) { return dcp::Extents{list.get<std::vector<std::int64_t>>()}; }
dcp::DType dtype_of(Json const& facts) {
  dcp::DType dtype{};
  REQUIRE(dcp::parse_dtype(facts["dtype"].get<std::string>(), dtype));
  return dtype;
}
// Of a tensor in expected.json, where pairs of F4 count as one.
dcp::Extents shape_of(Json const& facts, char const* key = "shape") { return dcp::torch::shape_from_torch(dtype_of(facts), extents_of(facts[key])); }

dcp::Bytes bytes_of_hex(std::string const& text) { return dcp::torch::detail::bytes_of_hex(text); }

// A tensor inside a value: with the hash of its bytes, as expected.json has it.
void hash_tensors(Json& value) {
  if (value.is_object() && value.value("__type__", "") == "tensor" && value.contains("hex")) {
    value["sha256"] = dcp::test::sha256(bytes_of_hex(value["hex"].get<std::string>()));
    value.erase("hex");
  }
  if (value.is_structured())
    for (auto& part : value) hash_tensors(part);
}

// What a value is as JSON in the way of expected.json.
Json shown(dcp::Value const& value) {
  using dcp::ValueKind;
  auto const real = [](double x) { return std::isnan(x) ? Json{{"__type__", "float"}, {"repr", "nan"}} : std::isinf(x) ? Json{{"__type__", "float"}, {"repr", x > 0 ? "inf" : "-inf"}} : Json(x); };
  auto const numbers = [&] {
    Json list = Json::array();
    std::size_t const size = static_cast<std::size_t>(dcp::bits_of(value.dtype)) / 8;
    for (std::size_t at = 0; at + size <= value.payload.size(); at += size) {
      auto const* bytes = value.payload.data() + at;
      if (value.dtype == dcp::DType::boolean) list.push_back(*bytes != std::byte{0});
      else if (value.dtype == dcp::DType::i64) list.push_back(dcp::load_little_endian<std::int64_t>(bytes));
      else if (value.dtype == dcp::DType::f64) list.push_back(real(dcp::load_little_endian<double>(bytes)));
      else FAIL("a number of another type");
    }
    return list;
  };
  switch (value.kind) {
    case ValueKind::number: return numbers().at(0);
    case ValueKind::array: return numbers();
    case ValueKind::text: return std::string{dcp::as_text(value.payload)};
    case ValueKind::bytes: return {{"__type__", "bytes"}, {"hex", dcp::hex_text(value.payload)}};
    case ValueKind::json: {
      Json tree = Json::parse(dcp::as_text(value.payload));
      hash_tensors(tree);
      return tree;
    }
    case ValueKind::per_rank: break;
  }
  return "per rank";
}
// What expected.json says, as a value can say it: a stream is its bytes.
Json wanted(Json value) {
  if (value.is_object() && value.value("__type__", "") == "io.BytesIO") return {{"__type__", "bytes"}, {"hex", value["hex"]}};
  return value;
}

std::vector<WholeTensor> whole_tensors(dcp::OwnedState const& state) {
  std::vector<WholeTensor> tensors;
  for (auto const& [name, tensor] : state.tensors()) tensors.push_back({name, tensor.dtype(), tensor.shape(), dcp::Bytes(tensor.bytes().begin(), tensor.bytes().end())});
  return tensors;
}

// The chunks of a tensor, as "offset length file: offsets sizes".
std::multiset<std::string> places_of(dcp::torch::MetadataEntry const& entry) {
  std::multiset<std::string> places;
  auto const add = [&](dcp::torch::ItemPlace const& place, std::string const& box) {
    std::string transforms;
    for (auto const& one : place.transforms) transforms += ' ' + one;
    places.insert(std::to_string(place.offset) + ' ' + std::to_string(place.length) + ' ' + place.path + transforms + box);
  };
  if (!entry.is_tensor) add(entry.place, "");
  for (auto const& chunk : entry.chunks) add(chunk.place, ": " + to_string(chunk.box.origin) + ' ' + to_string(chunk.box.shape));
  return places;
}
std::multiset<std::string> places_of(Json const& items, dcp::DType dtype) {
  std::multiset<std::string> places;
  for (auto const& item : items) {
    std::string text = std::to_string(item["offset"].get<std::uint64_t>()) + ' ' + std::to_string(item["length"].get<std::uint64_t>()) + ' ' + item["file"].get<std::string>();
    if (item.contains("transforms"))
      for (auto const& one : item["transforms"]) text += ' ' + one.get<std::string>();
    if (item.contains("offsets")) text += ": " + to_string(dcp::torch::shape_from_torch(dtype, extents_of(item["offsets"]))) + ' ' + to_string(dcp::torch::shape_from_torch(dtype, extents_of(item["sizes"])));
    places.insert(std::move(text));
  }
  return places;
}

}  // namespace

TEST_CASE("every golden checkpoint of torch.distributed.checkpoint loads whole: names, dtypes, shapes, every byte, and every object") {
  auto const cases = golden_cases();
  CHECK(cases.size() == 29);
  std::size_t tensors = 0, values = 0;
  for (auto const& one : cases) {
    CAPTURE(one.name);
    dcp::SelfComm self;
    auto const state = dcp::load_from_keys<dcp::TorchDcp>(self, one.place);
    CHECK(state.report().foreign);
    CHECK(state.tensors().size() == one.expected["tensors"].size());
    for (auto const& [name, facts] : one.expected["tensors"].items()) {
      auto const& shown_name = name;   // older clang++ does not capture bindings
      CAPTURE(shown_name);
      REQUIRE(state.tensors().contains(name));
      auto const& tensor = state.tensors().at(name);
      CHECK(tensor.dtype() == dtype_of(facts));
      CHECK(tensor.shape() == shape_of(facts));
      CHECK(dcp::test::sha256(tensor.bytes()) == facts["sha256"].get<std::string>());
      ++tensors;
    }
    CHECK(state.values().size() == one.expected["values"].size());
    for (auto const& [name, facts] : one.expected["values"].items()) {
      auto const& shown_name = name;
      CAPTURE(shown_name);
      REQUIRE(state.values().contains(name));
      CHECK(shown(state.values().at(name)).dump() == wanted(facts).dump());
      ++values;
    }
    if (one.name != "overwritten_twice") CHECK(state.report().warnings.empty());
    else CHECK(state.report().warnings == std::vector<std::string>{"2 files with names of data files are not part of the checkpoint"});
  }
  CHECK(tensors > 200);
  CHECK(values > 1100);
}

TEST_CASE("golden values have the kinds that C++ types want: numbers, text, bytes, arrays of one type, and JSON for the rest") {
  using dcp::DType;
  using dcp::ValueKind;
  dcp::SelfComm self;
  auto const state = dcp::load_from_keys<dcp::TorchDcp>(self, golden::root() / "torch_dcp" / "single_nested" / "ckpt");
  std::map<std::string, std::pair<ValueKind, DType>> const kinds{
      {"int", {ValueKind::number, DType::i64}}, {"big", {ValueKind::number, DType::i64}}, {"float", {ValueKind::number, DType::f64}}, {"inf", {ValueKind::number, DType::f64}}, {"nan", {ValueKind::number, DType::f64}},
      {"true", {ValueKind::number, DType::boolean}}, {"str", {ValueKind::text, DType::u8}}, {"empty_str", {ValueKind::text, DType::u8}}, {"bytes", {ValueKind::bytes, DType::u8}}, {"empty_bytes", {ValueKind::bytes, DType::u8}},
      {"bytesio", {ValueKind::bytes, DType::u8}}, {"ordered.a", {ValueKind::array, DType::i64}}, {"none", {ValueKind::json, DType::u8}}, {"tuple", {ValueKind::json, DType::u8}}, {"set", {ValueKind::json, DType::u8}},
      {"size", {ValueKind::json, DType::u8}}, {"empty_list", {ValueKind::json, DType::u8}}, {"terminal_list", {ValueKind::json, DType::u8}}, {"huge", {ValueKind::json, DType::u8}}, {"complex", {ValueKind::json, DType::u8}},
      {"tuple_tensor", {ValueKind::json, DType::u8}}, {"dict_plain.betas", {ValueKind::json, DType::u8}}};
  for (auto const& [name, kind] : kinds) {
    auto const& shown_name = name;
    CAPTURE(shown_name);
    REQUIRE(state.values().contains(name));
    CHECK(state.values().at(name).kind == kind.first);
    CHECK(state.values().at(name).dtype == kind.second);
  }
  // Into C++ variables.
  std::int64_t number = 0;
  double real = 0, infinite = 0;
  bool flag = false;
  std::string text;
  dcp::Bytes bytes, stream;
  std::vector<std::int64_t> list;
  Json tuple, none = 1;
  dcp::load<dcp::TorchDcp>(self, golden::root() / "torch_dcp" / "single_nested" / "ckpt",
                           {{"big", number}, {"float", real}, {"inf", infinite}, {"true", flag}, {"str", text}, {"bytes", bytes}, {"bytesio", stream}, {"ordered", {{"a", list}}}, {"tuple", tuple}, {"none", none}},
                           {.on_unexpected = dcp::OnUnexpected::ignore});
  CHECK(number == 1099511627777);
  CHECK(real == 0.1);
  CHECK(infinite == -std::numeric_limits<double>::infinity());
  CHECK(flag);
  CHECK(text == "h\u00e9llo\n\"q\" \u65e5\u672c");
  CHECK(bytes.size() == 52);
  CHECK(stream.size() > 1000);
  CHECK(list == std::vector<std::int64_t>{2});
  CHECK(tuple["items"].size() == 4);
  CHECK(none.is_null());
}

TEST_CASE("law: every golden checkpoint loads in any cut on 1 to 4 ranks, flat ones among them, and all boxes are those of the whole") {
  std::uint64_t const base_seed = dcp::test::first_seed();
  std::uint64_t seed = base_seed;
  for (auto const& one : golden_cases()) {
    CAPTURE(one.name);
    dcp::SelfComm self;
    auto const tensors = whole_tensors(dcp::load_from_keys<dcp::TorchDcp>(self, one.place));
    if (tensors.empty()) continue;
    for (int round = 0; round < 6; ++round, ++seed) {
      CAPTURE(seed);
      dcp::test::Random random{seed};
      auto const cut = dcp::test::any_cut(random);
      CAPTURE(cut.name);
      // Elements smaller than a byte load only in parts of whole bytes.
      auto const layout_of = [&](WholeTensor const& tensor) {
        dcp::Layout const layout = cut.layout_of(tensor);
        return dcp::bits_of(tensor.dtype) < 8 && (dcp::flat_axis(layout) >= 0 || !dcp::test::cuts_whole_bytes(layout, tensor.dtype)) ? dcp::plain_layout(tensor.shape) : layout;
      };
      bool const read_once = random.one_in(3), full = random.one_in(2);
      std::mutex mutex;
      dcp::run_threads(cut.ranks, [&](dcp::ThreadComm& world) {
        HeldTensors held{tensors, layout_of, world.rank(), false};
        auto const report = dcp::load<dcp::TorchDcp>(world, one.place, held.state, {.on_unexpected = dcp::OnUnexpected::ignore, .verify = full ? dcp::Verify::full : dcp::Verify::standard, .read_once = read_once});
        std::lock_guard const lock{mutex};
        CAPTURE(world.rank());
        CHECK(held.complete());
        CHECK(report.tensors == tensors.size());
      });
    }
  }
}

TEST_CASE("on torch's meshes and placements every rank holds torch's box of a golden checkpoint, and loads the bytes that torch had in it") {
  int boxes = 0, empty = 0, elsewhere = 0;
  for (auto const& one : golden_cases()) {
    if (!one.expected.contains("placements")) continue;
    CAPTURE(one.name);
    auto const ranks = one.expected["world_size"].get<int>();
    // Rank -> the boxes of tensors.
    std::map<std::string, dcp::Layout> layouts;
    for (auto const& [name, placements] : one.expected["placements"].items()) {
      dcp::Layout layout;
      layout.shape = layout.split_shape = shape_of(one.expected["tensors"][name]);
      layout.mesh = dcp::test::mesh_from_lists(one.expected["meshes"][name], ranks);
      layout.rules = dcp::test::rules_from_text(placements.get<std::vector<std::string>>(), layout.mesh);
      layouts[name] = layout;
    }
    std::mutex mutex;
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      struct Part {
        dcp::Box box;
        dcp::Bytes memory;
      };
      std::map<std::string, Part> parts;
      dcp::StateDict state;
      for (auto const& [name, layout] : layouts) {
        auto const box = dcp::box_of_rank(layout, world.rank());
        if (!box) continue;
        dcp::DType dtype{};
        dcp::parse_dtype(one.expected["tensors"][name]["dtype"].get<std::string>(), dtype);
        auto& part = parts[name] = {*box, dcp::Bytes(dcp::bytes_of(dtype, static_cast<std::int64_t>(box->size())), std::byte{0xEE})};
        state.add_tensor(name, dtype, layout, {part.memory.data(), dcp::row_major_strides(box->shape)});
      }
      dcp::load<dcp::TorchDcp>(world, one.place, state, {.on_unexpected = dcp::OnUnexpected::ignore});
      std::lock_guard const lock{mutex};
      for (auto const& [name, shards] : one.expected["shards"].items()) {
        if (!layouts.contains(name)) continue;
        bool listed = false;
        for (auto const& shard : shards) {
          if (shard["rank"].get<int>() != world.rank()) continue;
          listed = true;
          auto const& shown_name = name;
          CAPTURE(shown_name);
          CAPTURE(world.rank());
          REQUIRE(parts.contains(name));
          auto const& part = parts.at(name);
          CHECK(part.box.origin == extents_of(shard["offsets"]));
          CHECK(part.box.shape == extents_of(shard["sizes"]));
          CHECK(dcp::test::sha256(part.memory) == shard["sha256"].get<std::string>());
          ++boxes;
          empty += part.box.empty() ? 1 : 0;
        }
        if (!listed) CHECK(!parts.contains(name));
        elsewhere += listed ? 0 : 1;
      }
    });
  }
  CHECK(boxes > 250);
  CHECK(empty > 3);
  CHECK(elsewhere == 2);   // ranks outside of a sub-mesh
}

TEST_CASE("the boxes of PyTorch's ShardedTensors, two of one rank among them, hold the bytes that their ranks had") {
  for (char const* const name : {"sharded_tensor_2", "no_collectives_2"}) {
    CAPTURE(name);
    dcp::SelfComm self;
    auto const directory = golden::root() / "torch_dcp" / name;
    auto const expected = golden::json_of(directory / "expected.json");
    auto const state = dcp::load_from_keys<dcp::TorchDcp>(self, directory / "ckpt");
    std::size_t boxes = 0;
    for (auto const& [tensor_name, shards] : expected["shards"].items())
      for (auto const& shard : shards) {
        auto const& tensor = state.tensors().at(tensor_name);
        dcp::Box const box{extents_of(shard["offsets"]), extents_of(shard["sizes"])};
        CHECK(dcp::test::sha256(dcp::test::cut_out(tensor.bytes(), tensor.dtype(), tensor.shape(), box)) == shard["sha256"].get<std::string>());
        ++boxes;
      }
    CHECK(boxes >= 2);
  }
}

TEST_CASE("golden .metadata: every item lies where torch says it does, and parse_metadata reads nothing else") {
  std::size_t items = 0;
  for (auto const& file : golden::files_below(golden::root() / "torch_dcp", ".json")) {
    if (file.filename() != "expected.json") continue;
    auto const directory = file.parent_path();
    auto const expected = golden::json_of(file);
    if (!expected.contains("stored") || expected["stored"].empty()) continue;
    auto const name = directory.filename().string();
    CAPTURE(name);
    auto const text = golden::text_of(directory / "ckpt" / ".metadata");
    auto const metadata = dcp::torch::parse_metadata(dcp::as_byte_span(text));
    bool const old = name == "metadata_old_classes_protocol3" || name == "metadata_5tuple_protocol2";
    CHECK(metadata.version == (old ? "" : "1.0.0"));
    CHECK(metadata.entries.size() == expected["stored"].size());
    for (auto const& entry : metadata.entries) {
      CAPTURE(entry.name);
      REQUIRE(expected["stored"].contains(entry.name));
      auto const& tensors = expected.contains("global") ? expected["global"] : expected["tensors"];
      CHECK(entry.is_tensor == tensors.contains(entry.name));
      if (entry.is_tensor) {
        CHECK(entry.dtype == dtype_of(tensors[entry.name]));
        CHECK(entry.shape == shape_of(tensors[entry.name]));
      }
      CHECK(places_of(entry) == places_of(expected["stored"][entry.name], entry.is_tensor ? entry.dtype : dcp::DType::u8));
      items += expected["stored"][entry.name].size();
    }
  }
  CHECK(items > 300);
}

TEST_CASE("golden .metadata: names that PyTorch rebuilds nested states by are text, and positions in lists") {
  auto const directory = golden::root() / "torch_dcp" / "single_nested";
  auto const text = golden::text_of(directory / "ckpt" / ".metadata");
  auto const tree = dcp::pickle::Tree::parse(dcp::as_byte_span(text), dcp::torch::detail::is_metadata_global<>);
  Json names = Json::object();
  tree.root().state()->at("planner_data").for_each_pair([&](dcp::pickle::Value const& name, dcp::pickle::Value const& path) {
    Json parts = Json::array();
    path.for_each([&](dcp::pickle::Value const& part) { parts.push_back(part.is_text() ? Json(std::string{part.text()}) : Json(part.integer())); });
    names[std::string{name.text()}] = parts;
  });
  CHECK(names == golden::json_of(directory / "expected.json")["planner_data"]);
}

TEST_CASE("a tensor of 16 GiB of which a checkpoint holds four elements is refused as incomplete, and nothing of its size is allocated") {
  auto const directory = golden::root() / "torch_dcp" / "huge_offsets";
  auto const expected = golden::json_of(directory / "expected.json");
  auto const text = golden::text_of(directory / "ckpt" / ".metadata");
  auto const metadata = dcp::torch::parse_metadata(dcp::as_byte_span(text));
  REQUIRE(metadata.entries.size() == 1);
  auto const& far = metadata.entries[0];
  CHECK(far.shape == shape_of(expected["global"]["far"]));
  REQUIRE(far.chunks.size() == 1);
  CHECK(far.chunks[0].box.origin == extents_of(expected["shards"]["far"][0]["offsets"]));
  CHECK(far.chunks[0].box.shape == extents_of(expected["shards"]["far"][0]["sizes"]));
  CHECK(far.chunks[0].box.origin[0] > (std::int64_t{1} << 32));
  for (int const ranks : {1, 2})
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      auto const error = dcp::test::error_of([&] { dcp::load_from_keys<dcp::TorchDcp>(world, directory / "ckpt"); });
      REQUIRE(error.has_value());
      CHECK(error->code() == dcp::ErrorCode::incomplete);
      CHECK(std::string{error->what()}.find("far") != std::string::npos);
    });
}
