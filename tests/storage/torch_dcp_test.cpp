// SPDX-License-Identifier: Apache-2.0
// ctest: alone
// What TorchDcp saves: the bytes on the medium, and that they load again, on any other ranks, with the commit record and, as PyTorch's own would, without it.
#include <dcp/checkpoint/async_save.hpp>
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/torch_dcp.hpp>

#include "support/campaign.hpp"
#include "support/generate.hpp"
#include "support/outcome.hpp"
#include "support/temporary_directory.hpp"
#include "support/whole_tensor.hpp"

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

using dcp::DType;
using dcp::test::HeldTensors;
using dcp::test::Random;
using dcp::test::WholeTensor;
using Storage = dcp::BasicTorchDcp<dcp::Memory>;
constexpr auto place = "run/ckpt";

using Files = std::map<std::string, dcp::Bytes>;
Files files_of(dcp::Memory const& store, std::string const& path = place) {
  Files files;
  dcp::MediumModel<dcp::Memory> medium{store};
  for (auto const& entry : medium.list(path)) files[entry.name] = dcp::read_file(medium, path + '/' + entry.name, 1u << 30);
  return files;
}
// But for the record, which has an id and a time.
Files without_record(Files files) {
  files.erase(std::string{dcp::record_name});
  return files;
}
dcp::Memory store_of(Files const& files) {
  dcp::Memory store;
  store.create_directories(place);
  for (auto const& [name, bytes] : files) store.open_write(std::string{place} + '/' + name)->write_at(0, bytes);
  return store;
}
// As if PyTorch had written it: without the record and the checksums.
Files foreign(Files files) {
  files.erase(std::string{dcp::record_name});
  files.erase(std::string{dcp::checksums_name});
  return files;
}

std::vector<DType> torch_dtypes() {
  std::vector<DType> dtypes;
  for (int i = 0; i < dcp::dtype_count; ++i)
    if (!dcp::torch::dtype_name(static_cast<DType>(i)).empty()) dtypes.push_back(static_cast<DType>(i));
  return dtypes;
}

std::vector<WholeTensor> any_tensors(Random& random) {
  static std::vector<DType> const dtypes = torch_dtypes();
  std::vector<WholeTensor> tensors;
  for (auto count = random.between(0, 6); count >= 0; --count) {
    DType const dtype = random.any_of(dtypes);
    dcp::Extents shape = dcp::test::any_shape(random, 4, 400);
    if (dtype == DType::f4) {   // rows of pairs
      if (shape.rank() == 0) shape = dcp::Extents{2};
      shape[shape.rank() - 1] *= 2;
    }
    tensors.push_back(dcp::test::made_tensor("layer." + std::to_string(count) + ".weight", dtype, shape));
  }
  return tensors;
}

dcp::Layout any_layout_on(Random& random, WholeTensor const& tensor, int ranks) {
  for (;;) {
    dcp::Layout layout;
    layout.shape = layout.split_shape = tensor.shape;
    layout.mesh = ranks == 4 && random.one_in(2) ? dcp::test::mesh_of({2, 2}) : dcp::test::mesh_of({ranks});
    if (random.one_in(4)) layout.mesh = dcp::test::any_sub_mesh(random, layout.mesh);
    layout.rules = dcp::test::any_rules(random, layout.mesh.axes, tensor.shape.rank());
    if (tensor.shape.rank() > 0 && random.one_in(6)) layout.split_shape[0] += random.between(0, 9);
    if (layout.mesh.axes > 0 && tensor.dtype != DType::f4 && random.one_in(4))
      dcp::test::make_flat(layout, static_cast<std::size_t>(random.between(0, layout.mesh.axes - 1)), [&](std::int64_t low, std::int64_t high) { return random.between(low, high); });
    if (tensor.dtype != DType::f4 || dcp::test::cuts_whole_bytes(layout, tensor.dtype)) return layout;
  }
}
std::map<std::string, dcp::Layout> any_layouts(Random& random, std::vector<WholeTensor> const& tensors, int ranks) {
  std::map<std::string, dcp::Layout> layouts;
  for (auto const& tensor : tensors) layouts[tensor.name] = any_layout_on(random, tensor, ranks);
  return layouts;
}
HeldTensors::LayoutOf of(std::map<std::string, dcp::Layout> const& layouts) {
  return [&layouts](WholeTensor const& tensor) { return layouts.at(tensor.name); };
}

void save(dcp::Memory const& store, std::vector<WholeTensor> const& tensors, std::map<std::string, dcp::Layout> const& layouts, int ranks, dcp::IfExists if_exists = dcp::IfExists::fail) {
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    HeldTensors held{tensors, of(layouts), world.rank(), true};
    std::int64_t step = 17;
    held.state.add("step", step);
    dcp::save<Storage>(world, {store, place}, held.state, {.if_exists = if_exists, .threads = 1 + world.rank() % 2});
  });
}
// What is wrong with what `ranks` load; nothing if all is well.
std::string load_problem(dcp::Memory const& store, std::vector<WholeTensor> const& tensors, std::map<std::string, dcp::Layout> const& layouts, int ranks, dcp::LoadOptions<Storage> const& options = {}) {
  std::mutex mutex;
  std::string problem;
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    HeldTensors held{tensors, of(layouts), world.rank(), false};
    std::int64_t step = 0;
    held.state.add("step", step);
    dcp::load<Storage>(world, {store, place}, held.state, options);
    std::lock_guard const lock{mutex};
    if (!held.complete()) problem = "other bytes";
    if (step != 17) problem = "another value";
  });
  return problem;
}

// Everything that must be true of the files themselves: what is wrong, or nothing.
std::string format_problem(Files const& files, std::vector<WholeTensor> const& tensors) {
  auto const metadata = dcp::torch::parse_metadata(files.at(".metadata"));
  if (metadata.version != "1.0.0") return "version " + metadata.version;
  std::map<std::string, std::uint64_t> used;   // bytes of each file
  std::size_t found = 0;
  for (auto const& entry : metadata.entries) {
    if (!entry.is_tensor) {
      used[entry.place.path] += entry.place.length;
      continue;
    }
    auto const tensor = std::find_if(tensors.begin(), tensors.end(), [&](auto const& one) { return one.name == entry.name; });
    if (tensor == tensors.end() || tensor->dtype != entry.dtype || !(tensor->shape == entry.shape)) return entry.name + ": not what was saved";
    ++found;
    std::vector<bool> covered(static_cast<std::size_t>(entry.shape.elements()));
    auto const strides = dcp::row_major_strides(entry.shape);
    if (entry.chunks.empty()) return entry.name + ": no chunk";
    for (auto const& chunk : entry.chunks) {
      used[chunk.place.path] += chunk.place.length;
      bool twice = false;
      dcp::test::for_each_element(chunk.box, [&](dcp::Extents const& index) {
        auto element = covered[static_cast<std::size_t>(dcp::test::linear(index, strides))];
        twice = twice || element;
        element = true;
      });
      if (twice) return entry.name + ": elements that are stored twice";
      auto const archive = dcp::ConstByteSpan{files.at(chunk.place.path)}.subspan(static_cast<std::size_t>(chunk.place.offset), static_cast<std::size_t>(chunk.place.length));
      auto const directory = dcp::zip::read_directory(archive);
      for (auto const& record : directory.entries) {
        if (dcp::crc32(dcp::zip::data_of(archive, record)) != record.crc) return entry.name + ": a CRC-32 of " + std::string{record.name};
        if (record.data % 64 != 0) return entry.name + ": " + std::string{record.name} + " is not aligned";
      }
      auto const* data = directory.find("archive/data/0");
      if (data == nullptr) return entry.name + ": no storage";
      auto const bytes = dcp::zip::data_of(archive, *data);
      if (dcp::Bytes(bytes.begin(), bytes.end()) != dcp::test::cut_out(tensor->bytes, tensor->dtype, tensor->shape, chunk.box)) return entry.name + ": other bytes";
    }
    if (std::find(covered.begin(), covered.end(), false) != covered.end()) return entry.name + ": elements that are not stored";
  }
  if (found != tensors.size()) return "tensors are missing";
  std::size_t data_files = 0;
  for (auto const& [name, bytes] : files)
    if (name.ends_with(".distcp")) {
      ++data_files;
      if (used[name] != bytes.size()) return name + ": archives do not lie back to back";
    }
  return data_files == used.size() ? "" : "a file that is not there";
}

// What body() throws, or "ok".
template <class Body>
std::string code_of_load(Body body) {
  auto const error = dcp::test::error_of(body);
  return error ? std::string{to_string(error->code())} : "ok";
}

}  // namespace

TEST_CASE("law: what any ranks save, any others load bit for bit, with the record and as a foreign checkpoint; chunks cover each tensor once, in archives with right checksums") {
  std::uint64_t const base_seed = dcp::test::first_seed();
  std::size_t chunks = 0;
  std::set<DType> dtypes;
  for (int round = 0; round < dcp::test::rounds(1000, 20000); ++round) {
    std::uint64_t const seed = base_seed + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    Random random{seed};
    auto const tensors = any_tensors(random);
    int const writers = static_cast<int>(random.between(1, 4)), readers = static_cast<int>(random.between(1, 4));
    CAPTURE(writers);
    CAPTURE(readers);
    auto const write_layouts = any_layouts(random, tensors, writers), read_layouts = any_layouts(random, tensors, readers);
    dcp::Memory store;
    save(store, tensors, write_layouts, writers);
    auto const files = files_of(store);
    std::string problem = format_problem(files, tensors);
    REQUIRE(problem == "");
    dcp::LoadOptions<Storage> options;
    options.read_once = random.one_in(3);
    options.verify = random.one_in(3) ? dcp::Verify::full : random.one_in(2) ? dcp::Verify::standard : dcp::Verify::none;
    options.threads = static_cast<int>(random.between(1, 2));
    problem = load_problem(store, tensors, read_layouts, readers, options);
    REQUIRE(problem == "");
    auto const as_foreign = store_of(foreign(files));
    problem = load_problem(as_foreign, tensors, read_layouts, readers, options);
    REQUIRE(problem == "");
    if (round % 4 == 0) {   // the same again: the same bytes
      dcp::Memory again;
      save(again, tensors, write_layouts, writers);
      REQUIRE((without_record(files_of(again)) == without_record(files)));
      dcp::SelfComm self;
      auto const whole = dcp::load_from_keys<Storage>(self, {as_foreign, place});
      CHECK(whole.report().foreign);
      for (auto const& tensor : tensors) {
        auto const bytes = whole.tensors().at(tensor.name).bytes();
        REQUIRE(std::equal(bytes.begin(), bytes.end(), tensor.bytes.begin(), tensor.bytes.end()));
      }
    }
    for (auto const& tensor : tensors) dtypes.insert(tensor.dtype);
    for (auto const& [name, bytes] : files) chunks += name.ends_with(".distcp") ? 1 : 0;
  }
  CHECK(dtypes.size() == 22);
  CHECK(chunks > static_cast<std::size_t>(dcp::test::rounds(1000, 20000)));
}

TEST_CASE("a large tensor goes into archives whose data many threads write, and its checksum is right") {
  Random random{3};
  std::vector<WholeTensor> const tensors{dcp::test::made_tensor("large", DType::f32, {1200, 1300}), dcp::test::made_tensor("small", DType::bf16, {3})};
  std::map<std::string, dcp::Layout> rows, columns;
  for (auto const& tensor : tensors) {
    dcp::Layout layout;
    layout.shape = layout.split_shape = tensor.shape;
    layout.mesh = dcp::test::mesh_of({3});
    layout.rules[0] = {dcp::RuleKind::shard, 0, -1};
    rows[tensor.name] = layout;
    layout.rules[0].dim = tensor.shape.rank() - 1;
    columns[tensor.name] = layout;
  }
  dcp::Memory store;
  save(store, tensors, rows, 3);
  CHECK(format_problem(files_of(store), tensors) == "");
  CHECK(load_problem(store, tensors, columns, 3) == "");
  CHECK(load_problem(store_of(foreign(files_of(store))), tensors, columns, 3) == "");
  dcp::Memory by_columns;
  save(by_columns, tensors, columns, 3);
  CHECK(format_problem(files_of(by_columns), tensors) == "");
  CHECK(load_problem(store_of(foreign(files_of(by_columns))), tensors, rows, 3, {.verify = dcp::Verify::full}) == "");
}

TEST_CASE("values of every kind come back from the record as they were, and from the archives with integers as 64 bits and floats as doubles") {
  dcp::Memory store;
  bool flag = true;
  std::int8_t small = -128;
  std::int32_t number = 42;
  std::uint64_t big = 1u << 31;
  std::int64_t negative = -5;
  float rate = 0.1f;
  double loss = 1e-300, infinite = -std::numeric_limits<double>::infinity();
  std::string text = "\u00fcn\u00efcode \"quoted\"\n", empty_text;
  std::vector<float> schedule{1.5f, -0.0f, 3.4028235e38f};
  std::vector<std::int32_t> list{1, -2, 3};
  std::vector<bool> mask{true, false};
  std::vector<std::int64_t> nothing;
  dcp::Bytes blob{std::byte{0}, std::byte{255}, std::byte{128}, std::byte{7}};
  nlohmann::json config = nlohmann::json::parse(R"({"layers": [1, 2.5, null, {"name": "gr\u00f6\u00dfe"}], "tie": true, "pair": {"__type__": "tuple", "items": [1, "x"]}, "huge": {"__type__": "int", "decimal": "1208925819614629174706179"}})");
  std::string rng;
  auto const state = [&] {
    return dcp::StateDict{{"flag", flag}, {"small", small}, {"number", number}, {"big", big}, {"negative", negative}, {"rate", rate}, {"loss", loss}, {"infinite", infinite}, {"text", text}, {"empty_text", empty_text},
                          {"schedule", schedule}, {"list", list}, {"mask", mask}, {"nothing", nothing}, {"blob", blob}, {"config", config}};
  };
  dcp::SelfComm self;
  dcp::save<Storage>(self, {store, place}, state());
  auto const saved = dcp::load_from_keys<Storage>(self, {store, place});
  using Kinds = std::map<std::string, std::string>;
  auto const shown = [](dcp::OwnedState const& owned) {
    Kinds kinds;
    for (auto const& [name, value] : owned.values()) kinds[name] = std::string{to_string(value.kind)} + ' ' + std::string{to_string(value.dtype)} + ' ' + to_json(value);
    return kinds;
  };
  CHECK(shown(saved) == Kinds{{"flag", "number BOOL true"}, {"small", "number I8 -128"}, {"number", "number I32 42"}, {"big", "number U64 2147483648"}, {"negative", "number I64 -5"}, {"rate", "number F32 0.1"}, {"loss", "number F64 1e-300"},
                              {"infinite", "number F64 \"0xfff0000000000000\""}, {"text", "text U8 " + dcp::json_quoted(text)}, {"empty_text", "text U8 \"\""}, {"schedule", "array F32 [1.5,-0.0,3.4028235e+38]"}, {"list", "array I32 [1,-2,3]"},
                              {"mask", "array BOOL [true,false]"}, {"nothing", "array I64 []"}, {"blob", "bytes U8 \"00ff8007\""}, {"config", "json U8 " + to_json(saved.values().at("config"))}});
  auto const archived = dcp::load_from_keys<Storage>(self, {store_of(foreign(files_of(store))), place});
  CHECK(archived.report().foreign);
  Kinds const kinds = shown(archived);
  CHECK(kinds == Kinds{{"flag", "number BOOL true"}, {"small", "number I64 -128"}, {"number", "number I64 42"}, {"big", "number I64 2147483648"}, {"negative", "number I64 -5"}, {"rate", "number F64 0.10000000149011612"}, {"loss", "number F64 1e-300"},
                       {"infinite", "number F64 \"0xfff0000000000000\""}, {"text", "text U8 " + dcp::json_quoted(text)}, {"empty_text", "text U8 \"\""}, {"schedule", "array F64 [1.5,-0.0,3.4028234663852886e+38]"}, {"list", "array I64 [1,-2,3]"},
                       {"mask", "array BOOL [true,false]"}, {"nothing", "json U8 []"}, {"blob", "bytes U8 \"00ff8007\""}, {"config", "json U8 " + to_json(archived.values().at("config"))}});
  CHECK(nlohmann::json::parse(to_json(archived.values().at("config"))) == config);
  // An integer of 64 bits without a sign that does not fit into one with a sign is an int beyond 2^53 as JSON.
  dcp::Memory other;
  big = std::numeric_limits<std::uint64_t>::max();
  dcp::save<Storage>(self, {other, place}, {{"big", big}});
  CHECK(dcp::load_from_keys<Storage>(self, {other, place}).values().at("big").dtype == DType::u64);
  CHECK(to_json(dcp::load_from_keys<Storage>(self, {store_of(foreign(files_of(other))), place}).values().at("big")) == R"({"__type__":"int","decimal":"18446744073709551615"})");
}

TEST_CASE("values of every rank are a list of all ranks' in the archives") {
  dcp::Memory store;
  dcp::run_threads(3, [&](dcp::ThreadComm& world) {
    std::int64_t position = 1000 + world.rank();
    dcp::save<Storage>(world, {store, place}, {{"position", dcp::per_rank(position)}});
  });
  dcp::run_threads(3, [&](dcp::ThreadComm& world) {
    std::int64_t position = 0;
    dcp::load<Storage>(world, {store, place}, {{"position", dcp::per_rank(position)}});
    CHECK(position == 1000 + world.rank());
  });
  dcp::SelfComm self;
  auto const archived = dcp::load_from_keys<Storage>(self, {store_of(foreign(files_of(store))), place});
  CHECK(to_json(archived.values().at("position")) == "[1000,1001,1002]");
}

TEST_CASE("names of nested states are the paths by which PyTorch rebuilds nested dicts, and a dot inside a name is none") {
  dcp::Memory store;
  std::vector<float> weight(6), bias(3), other(2);
  std::int64_t step = 3;
  dcp::SelfComm self;
  dcp::save<Storage>(self, {store, place},
                     {{"model", {{"layer.weight", dcp::TensorView<float>{weight, {2, 3}}}, {"head", {{"bias", dcp::TensorView<float>{bias, {3}}}}}}}, {"a.b.c", dcp::TensorView<float>{other, {2}}}, {"train", {{"step", step}}}});
  auto const text = files_of(store).at(".metadata");
  auto const tree = dcp::pickle::Tree::parse(text, dcp::torch::detail::is_metadata_global<>);
  std::map<std::string, std::vector<std::string>> paths;
  tree.root().state()->at("planner_data").for_each_pair([&](dcp::pickle::Value const& name, dcp::pickle::Value const& path) {
    path.for_each([&](dcp::pickle::Value const& part) { paths[std::string{name.text()}].emplace_back(part.text()); });
  });
  CHECK(paths == std::map<std::string, std::vector<std::string>>{{"model.layer.weight", {"model", "layer.weight"}}, {"model.head.bias", {"model", "head", "bias"}}, {"a.b.c", {"a.b.c"}}, {"train.step", {"train", "step"}}});
}

TEST_CASE("what PyTorch cannot have is refused before a byte is written, all of it at once, on all ranks") {
  dcp::Memory store;
  std::mutex mutex;
  std::vector<std::string> errors;
  dcp::run_threads(3, [&](dcp::ThreadComm& world) {
    dcp::Bytes six(3), odd(6), good(4);
    nlohmann::json unknown = nlohmann::json::parse(R"({"__type__": "opaque", "class": "x.Y"})"), no_dtype = nlohmann::json::parse(R"([{"__type__": "torch.dtype", "name": "float7"}])"), fine = 3;
    dcp::StateDict state;
    state.add_tensor("narrow", DType::f6_e2m3, dcp::plain_layout({4}), {six.data(), {1}});
    state.add_tensor("odd", DType::f4, dcp::plain_layout({4, 3}), {odd.data(), {3, 1}});
    state.add_tensor("good", DType::u8, dcp::plain_layout({4}), {good.data(), {1}});
    state.add("opaque", unknown);
    state.add("no_dtype", no_dtype);
    state.add("fine", fine);
    auto const error = dcp::test::error_of([&] { dcp::save<Storage>(world, {store, place}, state); });
    std::lock_guard const lock{mutex};
    REQUIRE(error.has_value());
    errors.emplace_back(error->what());
  });
  for (auto const& error : errors) {
    CAPTURE(error);
    for (char const* const said : {"narrow", "F6_E2M3", "odd", "in pairs", "opaque", "no_dtype", "float7"}) CHECK(error.find(said) != std::string::npos);
    for (char const* const not_said : {"good", "fine"}) CHECK(error.find(not_said) == std::string::npos);
  }
  CHECK(errors.size() == 3);
  CHECK(dcp::MediumModel<dcp::Memory>{store}.kind(place) == dcp::EntryKind::missing);
}

TEST_CASE("if_exists: fail leaves the first checkpoint as it is, replace puts the second in its place and nothing of the first stays") {
  Random random{5};
  std::vector<WholeTensor> const first{dcp::test::made_tensor("a", DType::f32, {40, 3}), dcp::test::made_tensor("b", DType::i64, {5})}, second{dcp::test::made_tensor("c", DType::bf16, {7})};
  dcp::Memory store;
  save(store, first, any_layouts(random, first, 4), 4);
  auto const before = files_of(store);
  auto const refused = dcp::test::error_of([&] { save(store, second, any_layouts(random, second, 1), 1); });
  REQUIRE(refused.has_value());
  CHECK(refused->code() == dcp::ErrorCode::already_exists);
  CHECK((files_of(store) == before));
  save(store, second, any_layouts(random, second, 1), 1, dcp::IfExists::replace);
  auto const after = files_of(store);
  CHECK(format_problem(after, second) == "");
  CHECK(after.size() == 4);   // __0_0.distcp, .metadata, dcp.json, dcp.crc
  CHECK(dcp::MediumModel<dcp::Memory>{store}.list("run").size() == 1);
  // A checkpoint of PyTorch's is one, too.
  auto foreign_store = store_of(foreign(before));
  CHECK(code_of_load([&] { save(foreign_store, second, any_layouts(random, second, 1), 1); }) == "already_exists");
}

TEST_CASE("async_save: a save in the background makes the same files as one in the foreground, whatever becomes of a value once it is staged") {
  for (int const ranks : {1, 3}) {
    CAPTURE(ranks);
    Random random{7};
    auto const tensors = std::vector<WholeTensor>{dcp::test::made_tensor("a", DType::f32, {40, 30}), dcp::test::made_tensor("b", DType::c128, {5}), dcp::test::made_tensor("e", DType::u8, {0, 4}), dcp::test::made_tensor("s", DType::f16, {})};
    auto const layouts = any_layouts(random, tensors, ranks);
    dcp::Memory foreground, background;
    save(foreground, tensors, layouts, ranks);
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      HeldTensors held{tensors, of(layouts), world.rank(), true};
      std::int64_t step = 17;
      held.state.add("step", step);
      auto pending = dcp::async_save<Storage>(world, {background, place}, held.state);
      pending.wait_staged();
      step = 18;
      pending.wait();
    });
    CHECK((without_record(files_of(background)) == without_record(files_of(foreground))));
    CHECK(format_problem(files_of(background), tensors) == "");
  }
}

TEST_CASE("on a disk: the files have PyTorch's names, ranks that store nothing have none, and what TorchDcp saved it loads") {
  dcp::test::TemporaryDirectory directory;
  dcp::run_threads(4, [&](dcp::ThreadComm& world) {
    dcp::DeviceMesh<1> const mesh{world, {4}};
    std::vector<float> rows(dcp::local_box<dcp::Placement<dcp::Shard<0>>>(mesh, {3, 2}).size(), static_cast<float>(world.rank()));
    dcp::ShardedTensor<float, dcp::Placement<dcp::Shard<0>>> tensor{mesh, {3, 2}, rows};
    dcp::save<dcp::TorchDcp>(world, directory / "ckpt", {{"w", tensor}});
    std::fill(rows.begin(), rows.end(), -1.0f);
    dcp::load<dcp::TorchDcp>(world, directory / "ckpt", {{"w", tensor}});
    CHECK(std::all_of(rows.begin(), rows.end(), [&](float x) { return x == static_cast<float>(world.rank()); }));
  });
  std::set<std::string> names;
  for (auto const& [name, bytes] : dcp::test::files_in(directory / "ckpt")) names.insert(name);
  CHECK(names == std::set<std::string>{".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp", "dcp.crc", "dcp.json"});
}

TEST_CASE("a byte that is changed anywhere in a data file or in .metadata of a checkpoint of ours is noticed") {
  auto const seed = dcp::test::first_seed();
  CAPTURE(seed);
  Random random{seed};
  std::vector<WholeTensor> const tensors{dcp::test::made_tensor("a", DType::f32, {30, 3}), dcp::test::made_tensor("b", DType::i8, {50})};
  dcp::Memory saved;
  auto const layouts = any_layouts(random, tensors, 2);
  save(saved, tensors, layouts, 2);
  auto const files = files_of(saved);
  auto const read = any_layouts(random, tensors, 1);
  int changes = 0;
  for (auto const& [name, bytes] : files) {
    if (name == dcp::record_name || name == dcp::checksums_name) continue;
    auto const& shown_name = name;   // older clang++ does not capture bindings
    CAPTURE(shown_name);
    for (int i = 0; i < 120; ++i) {
      auto const at = static_cast<std::size_t>(random.between(0, static_cast<std::int64_t>(bytes.size()) - 1));
      CAPTURE(at);
      Files changed = files;
      changed[name][at] ^= static_cast<std::byte>(1 << random.between(0, 7));
      CHECK(code_of_load([&] { load_problem(store_of(changed), tensors, read, 1); }) == "corrupt");
      ++changes;
    }
  }
  CHECK(changes >= 240);
}

TEST_CASE("a byte of tensor data that is changed in a foreign checkpoint is noticed: by who loads a chunk whole, and with Verify::full also resharded, cast and by several ranks") {
  auto const seed = dcp::test::first_seed();
  CAPTURE(seed);
  Random random{seed};
  std::vector<WholeTensor> const tensors{dcp::test::made_tensor("a", DType::f32, {30, 4})};
  auto const whole = [&](int ranks) {
    std::map<std::string, dcp::Layout> layouts;
    layouts["a"] = dcp::plain_layout(tensors[0].shape);
    layouts["a"].mesh.world = ranks;
    return layouts;
  };
  auto const split_by = [&](int ranks, int dim) {
    std::map<std::string, dcp::Layout> layouts;
    auto& layout = layouts["a"];
    layout.shape = layout.split_shape = tensors[0].shape;
    layout.mesh = dcp::test::mesh_of({ranks});
    layout.rules[0] = {dcp::RuleKind::shard, dim, -1};
    return layouts;
  };
  dcp::Memory saved;
  save(saved, tensors, split_by(2, 0), 2);
  auto const files = foreign(files_of(saved));
  auto const metadata = dcp::torch::parse_metadata(files.at(".metadata"));
  int changes = 0;
  for (auto const& entry : metadata.entries)
    for (auto const& chunk : entry.chunks) {
      auto const archive = dcp::ConstByteSpan{files.at(chunk.place.path)}.subspan(static_cast<std::size_t>(chunk.place.offset), static_cast<std::size_t>(chunk.place.length));
      auto const directory = dcp::zip::read_directory(archive);
      auto const* data = directory.find("archive/data/0");
      REQUIRE(data != nullptr);
      for (int i = 0; i < 25; ++i) {
        auto const at = static_cast<std::size_t>(chunk.place.offset + data->data) + static_cast<std::size_t>(random.between(0, static_cast<std::int64_t>(data->size) - 1));
        CAPTURE(at);
        Files changed = files;
        changed[chunk.place.path][at] ^= static_cast<std::byte>(1 << random.between(0, 7));
        auto const store = store_of(changed);
        CHECK(code_of_load([&] { load_problem(store, tensors, whole(1), 1); }) == "corrupt");
        CHECK(code_of_load([&] { load_problem(store, tensors, split_by(2, 0), 2); }) == "corrupt");   // the chunks that were saved
        CHECK(code_of_load([&] { load_problem(store, tensors, split_by(3, 1), 3, {.verify = dcp::Verify::full}); }) == "corrupt");
        CHECK(code_of_load([&] { load_problem(store, tensors, split_by(4, 0), 4, {.verify = dcp::Verify::full}); }) == "corrupt");
        CHECK(code_of_load([&] {
                dcp::SelfComm self;
                std::vector<double> wide(120);
                dcp::load<Storage>(self, {store, place}, {{"a", dcp::TensorView<double>{wide, {30, 4}}}}, {.on_unexpected = dcp::OnUnexpected::ignore, .on_dtype = dcp::OnDType::cast, .verify = dcp::Verify::full});
              }) == "corrupt");
        ++changes;
      }
    }
  CHECK(changes == 50);
}

TEST_CASE("a byte that is changed elsewhere in a foreign checkpoint is an error or does no harm to what is loaded") {
  auto const seed = dcp::test::first_seed();
  CAPTURE(seed);
  Random random{seed};
  std::vector<WholeTensor> const tensors{dcp::test::made_tensor("a", DType::f32, {30, 4}), dcp::test::made_tensor("b", DType::u16, {9})};
  dcp::Memory saved;
  auto const layouts = any_layouts(random, tensors, 2);
  save(saved, tensors, layouts, 2);
  auto const files = foreign(files_of(saved));
  int refused = 0;
  for (auto const& [name, bytes] : files) {
    if (!name.ends_with(".distcp")) continue;
    auto const& shown_name = name;
    CAPTURE(shown_name);
    for (int i = 0; i < 200; ++i) {
      auto const at = static_cast<std::size_t>(random.between(0, static_cast<std::int64_t>(bytes.size()) - 1));
      CAPTURE(at);
      Files changed = files;
      changed[name][at] ^= static_cast<std::byte>(1 << random.between(0, 7));
      std::string problem;
      auto const code = code_of_load([&] { problem = load_problem(store_of(changed), tensors, layouts, 2, {.verify = dcp::Verify::full}); });
      CHECK(problem == "");
      CHECK(code != "unknown");
      refused += code == "ok" ? 0 : 1;
    }
  }
  CHECK(refused > 50);
}
