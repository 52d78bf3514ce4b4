// SPDX-License-Identifier: Apache-2.0
// Files of torch.save through the storage TorchFile: what PyTorch wrote has the values that PyTorch reported, and what is no such file is refused.
#include <dcp/dcp.hpp>

#include "formats/golden.hpp"
#include "support/outcome.hpp"
#include "support/sha256.hpp"
#include "support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <array>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace fs = std::filesystem;
using dcp::DType;
using golden::outcome;
using dcp::test::TemporaryDirectory;

namespace {

fs::path const& round_trip() {
  static fs::path const path = golden::root() / "torch_dcp" / "torch_save_roundtrip";
  return path;
}
fs::path pt_file(std::string const& name) {
  for (auto const& entry : fs::recursive_directory_iterator{round_trip()})
    if (entry.path().filename() == name) return entry.path();
  FAIL("no golden file " << name);
  return {};
}

/// An archive of torch.save with this pickle, and these storages.
dcp::Bytes archive_of(dcp::Bytes const& pickle, std::vector<dcp::Bytes> const& storages) {
  std::vector<dcp::zip::Storage> list;
  for (auto const& bytes : storages) list.push_back({bytes, bytes.size(), false});
  dcp::zip::TorchRecords<> const records{pickle, list};
  return dcp::zip::write(records.records());
}
void write_bytes(fs::path const& path, dcp::ConstByteSpan bytes) {
  std::ofstream out{path, std::ios::binary};
  out.write(reinterpret_cast<char const*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}
std::string loaded(fs::path const& path, dcp::LoadOptions<dcp::TorchFile> const& options = {}) {
  return outcome([&] {
    dcp::SelfComm self;
    dcp::load_from_keys<dcp::TorchFile>(self, path, {}, options);
  });
}

}  // namespace

TEST_CASE("TorchFile: files of torch.save hold the tensors and values that PyTorch reported, views and shared storages among them") {
  auto const expected = golden::json_of(round_trip() / "expected.json");
  dcp::SelfComm self;
  for (auto const& [file, kind] : expected["pt_files"].items()) {
    if (kind == "flat-legacy") continue;
    std::string const of_file = file;
    CAPTURE(of_file);
    auto const state = dcp::load_from_keys<dcp::TorchFile>(self, pt_file(file));
    CHECK(state.tensors().size() == expected["tensors"].size());
    for (auto const& [name, facts] : expected["tensors"].items()) {
      std::string const of_tensor = name;
      CAPTURE(of_tensor);
      auto const at = state.tensors().find(name);
      REQUIRE(at != state.tensors().end());
      CHECK(to_string(at->second.dtype()) == facts["dtype"].get<std::string>());
      CHECK(at->second.shape() == dcp::Extents{facts["shape"].get<std::vector<std::int64_t>>()});
      CHECK(dcp::test::sha256(at->second.bytes()) == facts["sha256"].get<std::string>());
    }
    if (kind == "flat") continue;
    CHECK(state.values().size() == expected["values"].size());
    for (auto const& [name, value] : expected["values"].items()) {
      std::string const of_value = name;
      CAPTURE(of_value);
      REQUIRE(state.values().contains(name));
      CHECK(nlohmann::json::parse(dcp::to_json(state.values().at(name))) == value);
    }
  }
}

TEST_CASE("TorchFile: rows and columns of a file load onto ranks, whatever the strides of its views") {
  auto const whole = [] {
    dcp::SelfComm self;
    return dcp::load_from_keys<dcp::TorchFile>(self, pt_file("plain.pt"));
  }();
  std::array<float, 20> expected{};
  std::memcpy(expected.data(), whole.tensors().at("model.t").bytes().data(), sizeof expected);   // [4, 5], transposed in its storage
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    dcp::DeviceMesh<1> mesh{world, {2}};
    using Columns = dcp::Placement<dcp::Shard<1>>;
    std::vector<float> memory(dcp::local_box<Columns>(mesh, {4, 5}).size());
    dcp::ShardedTensor<float, Columns> tensor{mesh, {4, 5}, memory};
    dcp::load<dcp::TorchFile>(world, pt_file("plain.pt"), {{"model", {{"t", tensor}}}}, {.on_unexpected = dcp::OnUnexpected::ignore});
    auto const box = tensor.local_box();
    for (std::int64_t i = 0; i < box.shape[0]; ++i)
      for (std::int64_t j = 0; j < box.shape[1]; ++j)
        if (memory[static_cast<std::size_t>(i * box.shape[1] + j)] != expected[static_cast<std::size_t>((box.origin[0] + i) * 5 + box.origin[1] + j)]) throw std::runtime_error("not what is stored");
  });
}

TEST_CASE("TorchFile: names of nested dicts and lists are joined by dots, tuples with tensors are descended into, and names of one view are tied") {
  // {"a": {"w": t, "n": 3, "list": [1, 2]}, "pair": (t, 5), 7: "seven", "empty": {}}
  dcp::pickle::Writer out;
  auto const tensor = [&](std::string_view key) { dcp::torch::write_tensor(out, DType::f32, dcp::Extents{2, 3}, key); };
  out.empty_dict().mark();
  out.text("a").empty_dict().mark().text("w");
  tensor("0");
  out.text("n").integer(3).text("list").empty_list().mark().integer(1).integer(2).appends().setitems();
  out.text("pair").mark();
  tensor("0");
  out.integer(5).tuple();
  out.integer(7).text("seven").text("empty").empty_dict().text("other");
  tensor("1");
  out.setitems();
  TemporaryDirectory const directory;
  fs::path const path = fs::path{directory.path()} / "x.pt";
  write_bytes(path, archive_of(out.take(), {dcp::Bytes(24, std::byte{1}), dcp::Bytes(24, std::byte{2})}));
  dcp::SelfComm self;
  auto const contents = dcp::contents<dcp::TorchFile>(self, path);
  std::vector<std::string> tensors, values;
  for (auto const& one : contents.tensors) tensors.push_back(one.name);
  for (auto const& [name, value] : contents.values) values.push_back(name + '=' + dcp::to_json(value));
  CHECK(tensors == std::vector<std::string>{"a.w", "other"});
  CHECK(values == std::vector<std::string>{"7=\"seven\"", "a.list=[1,2]", "a.n=3", "pair.1=5"});
  REQUIRE(contents.ties.size() == 1);
  CHECK(contents.ties[0] == std::pair<std::string, std::string>{"pair.0", "a.w"});
  auto const state = dcp::load_from_keys<dcp::TorchFile>(self, path, {"pair"});
  CHECK(state.tensors().at("pair.0").bytes()[0] == std::byte{1});
}

TEST_CASE("TorchFile: a conjugated or negated view of a storage is not tied to the storage as it is") {
  dcp::pickle::Writer out;
  auto const tensor = [&](char const* property) {
    out.global("torch._utils", "_rebuild_tensor_v2").mark();
    out.mark().text("storage").global("torch", "ComplexFloatStorage").text("0").text("cpu").integer(2).tuple().persistent_id();
    out.integer(0).integer(2).tuple1().integer(1).tuple1().boolean(false).global("collections", "OrderedDict").empty_tuple().reduce();
    if (property != nullptr) out.empty_dict().mark().text(property).boolean(true).setitems();
    out.tuple().reduce();
  };
  out.empty_dict().mark().text("conjugated");
  tensor("conj");
  out.text("negated");
  tensor("neg");
  out.text("plain");
  tensor(nullptr);
  out.text("same");
  tensor(nullptr);
  out.text("twice");
  tensor("conj");
  out.setitems();
  std::array<float, 4> const storage{1, 2, 3, 4};
  TemporaryDirectory const directory;
  fs::path const path = fs::path{directory.path()} / "x.pt";
  auto const bytes = std::as_bytes(std::span{storage});
  write_bytes(path, archive_of(out.take(), {dcp::Bytes(bytes.begin(), bytes.end())}));
  dcp::SelfComm self;
  auto const state = dcp::load_from_keys<dcp::TorchFile>(self, path);
  auto const values = [&](std::string const& name) {
    std::array<float, 4> found{};
    std::memcpy(found.data(), state.tensors().at(name).bytes().data(), sizeof found);
    return found;
  };
  CHECK(values("plain") == storage);
  CHECK(values("same") == storage);
  CHECK(values("conjugated") == std::array<float, 4>{1, -2, 3, -4});
  CHECK(values("twice") == std::array<float, 4>{1, -2, 3, -4});
  CHECK(values("negated") == std::array<float, 4>{-1, -2, -3, -4});
  CHECK(dcp::contents<dcp::TorchFile>(self, path).ties == std::vector<std::pair<std::string, std::string>>{{"same", "plain"}, {"twice", "conjugated"}});
}

TEST_CASE("TorchFile: what is no file of torch.save, is damaged, or holds an object of an unknown class is refused, and says why") {
  TemporaryDirectory const directory;
  fs::path const path = fs::path{directory.path()} / "x.pt";
  CHECK(loaded(pt_file("legacy.pt")) == "bad_magic");
  CHECK(loaded(directory.path()) == "not_found");
  CHECK(loaded(fs::path{directory.path()} / "nowhere.pt") == "not_found");
  write_bytes(path, dcp::as_byte_span("GGUF and more"));
  CHECK(loaded(path) == "bad_magic");
  write_bytes(path, {});
  CHECK(loaded(path) == "bad_magic");
  auto const with = [&](auto write) {
    dcp::pickle::Writer out;
    write(out);
    write_bytes(path, archive_of(out.take(), {dcp::Bytes(24)}));
    return loaded(path);
  };
  using Writer = dcp::pickle::Writer;
  CHECK(with([](Writer& out) { dcp::torch::write_tensor(out, DType::f32, {2, 3}); }) == "ok");
  CHECK(with([](Writer& out) { dcp::torch::write_tensor(out, DType::f32, {2, 4}); }) == "size_mismatch");
  CHECK(with([](Writer& out) { dcp::torch::write_tensor(out, DType::f32, {2, 3}, "5"); }) == "missing_tensor");
  CHECK(with([](Writer& out) { out.global("os", "system").text("true").tuple1().reduce(); }) == "unsupported");
  CHECK(with([](Writer& out) { out.empty_dict().mark().text("a.b").integer(1).text("a").empty_dict().mark().text("b").integer(2).setitems().setitems(); }) == "duplicate_entry");
  CHECK(with([](Writer& out) { out.empty_dict().mark().none(); dcp::torch::write_tensor(out, DType::f32, {2, 3}); out.setitems(); }) == "unsupported");
  // One wrong bit of a tensor's bytes.
  Writer out;
  dcp::torch::write_tensor(out, DType::f32, {2, 3});
  dcp::Bytes bytes = archive_of(out.take(), {dcp::Bytes(24)});
  auto const directory_of = dcp::zip::read_directory(bytes);
  bytes[static_cast<std::size_t>(directory_of.find("archive/data/0")->data) + 5] ^= std::byte{4};
  write_bytes(path, bytes);
  CHECK(loaded(path) == "corrupt");
  CHECK(loaded(path, {.verify = dcp::Verify::none}) == "ok");
  for (std::size_t size = 0; size < bytes.size(); size += 7) {
    write_bytes(path, dcp::ConstByteSpan{bytes}.first(size));
    CHECK(loaded(path) != "ok");
  }
}

TEST_CASE("TorchFile: objects of unknown classes are listed without what is in them, if that is asked for") {
  dcp::pickle::Writer out;
  out.empty_dict().mark().text("w");
  dcp::torch::write_tensor(out, DType::f32, {2, 3});
  out.text("args").global("argparse", "Namespace").empty_tuple().reduce().text("n").integer(1).setitems();
  TemporaryDirectory const directory;
  fs::path const path = fs::path{directory.path()} / "x.pt";
  write_bytes(path, archive_of(out.take(), {dcp::Bytes(24)}));
  CHECK(loaded(path) == "unsupported");
  dcp::SelfComm self;
  auto const state = dcp::load_from_keys<dcp::TorchFile>(self, path, {}, {.storage = {.opaque_objects = true}});
  CHECK(dcp::to_json(state.values().at("args")) == R"({"__type__":"opaque","class":"argparse.Namespace"})");
  CHECK(dcp::to_json(state.values().at("n")) == "1");
  CHECK(state.tensors().contains("w"));
}
