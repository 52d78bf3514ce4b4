// SPDX-License-Identifier: Apache-2.0
// What the options of the safetensors storage do to names, files and headers.
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#include "formats/golden.hpp"
#include "support/generate.hpp"
#include "support/temporary_directory.hpp"
#include "support/whole_tensor.hpp"

#include <doctest/doctest.h>

#include <map>
#include <mutex>
#include <set>

namespace fs = std::filesystem;
using dcp::DType;
using dcp::Prefix;
using dcp::test::HeldTensors;
using dcp::test::made_tensor;
using dcp::test::WholeTensor;
using dcp::test::TemporaryDirectory;
using golden::outcome;

namespace {

using InMemory = dcp::BasicSafeTensors<dcp::Memory>;
using Tensors = std::vector<WholeTensor>;
using Names = std::set<std::string>;

dcp::Layout plain(WholeTensor const& tensor) { return dcp::plain_layout(tensor.shape); }

std::string const record = "dcp.json", sums = "dcp.crc", index_name = "model.safetensors.index.json";

// Without both, a directory is one that somebody else wrote.
void forget_who_wrote(dcp::Memory const& store) {
  dcp::MediumModel<dcp::Memory> medium{store};
  for (auto const* name : {"ckpt/dcp.json", "ckpt/dcp.crc"}) medium.remove_file(name);
}
std::string model(int i, int n) { return dcp::hf::model_file_name(i, n); }

// Every file of a checkpoint by its path in it.
using Files = std::map<std::string, std::string>;
void collect(dcp::AnyMedium& medium, std::string const& directory, std::string const& prefix, Files& files) {
  for (auto const& entry : medium.list(directory)) {
    auto const path = directory + '/' + entry.name;
    if (entry.kind == dcp::EntryKind::directory) collect(medium, path, prefix + entry.name + '/', files);
    else files[prefix + entry.name] = dcp::as_text(dcp::read_file(medium, path, 1 << 30));
  }
}
Files files_of(dcp::Memory const& store) {
  Files files;
  dcp::MediumModel<dcp::Memory> medium{store};
  collect(medium, "ckpt", "", files);
  return files;
}
Names names_of(Files const& files) {
  Names names;
  for (auto const& [name, text] : files) names.insert(name);
  return names;
}

dcp::safetensors::Header header_of(std::string const& file) {
  auto const bytes = dcp::as_byte_span(file);
  auto const n = static_cast<std::size_t>(dcp::safetensors::header_bytes(bytes.first(8), bytes.size()));
  return dcp::safetensors::parse_header(bytes.subspan(8, n), bytes.size());
}
Names tensors_in(std::string const& file) {
  Names names;
  for (auto const& tensor : header_of(file).tensors) names.insert(tensor.name);
  return names;
}
dcp::hf::Index index_in(std::string const& text) { return dcp::hf::parse_index(dcp::as_byte_span(text)); }

// Saves plain tensors from one rank, loads them back, and gives the files.
Files saved(Tensors const& tensors, dcp::SafeTensorsOptions const& options) {
  dcp::Memory store;
  dcp::SelfComm self;
  HeldTensors held{tensors, plain, 0, true};
  dcp::save<InMemory>(self, {store, "ckpt"}, held.state, {.storage = options});
  HeldTensors back{tensors, plain, 0, false};
  auto const report = dcp::load<InMemory>(self, {store, "ckpt"}, back.state, {.verify = dcp::Verify::full});
  CHECK(back.complete());
  CHECK(report.unverified_bytes == 0);
  return files_of(store);
}
std::string refusal(Tensors const& tensors, dcp::SafeTensorsOptions const& options) {
  dcp::Memory store;
  dcp::SelfComm self;
  HeldTensors held{tensors, plain, 0, true};
  auto const code = outcome([&] { dcp::save<InMemory>(self, {store, "ckpt"}, held.state, {.storage = options}); });
  CHECK(dcp::MediumModel<dcp::Memory>{store}.list("").empty());   // nothing was begun, or everything was removed
  return code;
}

Tensors simple(std::vector<std::string> const& names) {
  Tensors tensors;
  for (auto const& name : names) tensors.push_back(made_tensor(name, DType::f32, {3, 5}));
  return tensors;
}

// Every dtype, in shapes that cut unevenly or not at all.
Tensors every_dtype() {
  Tensors tensors;
  for (int i = 0; i < dcp::safetensors_dtype_count; ++i) {
    auto const dtype = static_cast<DType>(i);
    std::string const name = "all." + std::string{to_string(dtype)};
    tensors.push_back(made_tensor(name + ".matrix", dtype, {7, 8}));
    tensors.push_back(made_tensor(name + ".empty", dtype, {0, 8}));
    if (dcp::bits_of(dtype) >= 8) {
      tensors.push_back(made_tensor(name + ".scalar", dtype, {}));
      tensors.push_back(made_tensor(name + ".cube", dtype, {3, 1, 5}));
    }
  }
  for (std::string const name : {"größe", "日本語.重み", "emoji.🚀", "with space", "quote\"back\\slash", "tab\tnewline\n", "a/b/../c", "\x7f", "", "."}) tensors.push_back(made_tensor(name, DType::bf16, {4, 3}));
  return tensors;
}

}  // namespace

TEST_CASE("final layout: numbered files and an index, data from 4 KiB on, nothing else but the record") {
  auto const files = saved(simple({"a", "b"}), {});
  CHECK(names_of(files) == Names{model(1, 1), index_name, record, sums});
  auto const header = header_of(files.at(model(1, 1)));
  CHECK(header.data_begin % 4096 == 0);
  CHECK(header.metadata == dcp::safetensors::Metadata{{"format", "pt"}});
  auto const index = index_in(files.at(index_name));
  CHECK(index.total_size == 120);
  CHECK(index.weight_map == std::vector<std::pair<std::string, std::string>>{{"a", model(1, 1)}, {"b", model(1, 1)}});
  CHECK(index.metadata.empty());
}

TEST_CASE("max_file_bytes: files are filled greedily in name order; a larger tensor has one of its own") {
  Tensors tensors = simple({"c", "a", "b", "e", "f"});                     // 60 bytes each
  tensors.push_back(made_tensor("d", DType::u8, {1000}));
  auto const files = saved(tensors, {.max_file_bytes = 120});
  CHECK(names_of(files) == Names{model(1, 4), model(2, 4), model(3, 4), model(4, 4), index_name, record, sums});
  CHECK(tensors_in(files.at(model(1, 4))) == Names{"a", "b"});
  CHECK(tensors_in(files.at(model(2, 4))) == Names{"c"});
  CHECK(tensors_in(files.at(model(3, 4))) == Names{"d"});
  CHECK(tensors_in(files.at(model(4, 4))) == Names{"e", "f"});
  CHECK(index_in(files.at(index_name)).total_size == 1300);
  CHECK(saved(tensors, {.max_file_bytes = 1300}).contains(model(1, 1)));
  CHECK(saved(tensors, {.max_file_bytes = 1299}).contains(model(2, 2)));
  CHECK(saved(tensors, {.max_file_bytes = 0}).contains(model(6, 6)));
}

TEST_CASE("file_of: every tensor goes where it is listed; unlisted ones and files below 1 are refused") {
  auto const files = saved(simple({"a", "b", "c"}), {.max_file_bytes = 1, .file_of = {{"a", 2}, {"b", 1}, {"c", 2}, {"not here", 7}}});
  CHECK(names_of(files) == Names{model(1, 2), model(2, 2), index_name, record, sums});
  CHECK(tensors_in(files.at(model(1, 2))) == Names{"b"});
  CHECK(tensors_in(files.at(model(2, 2))) == Names{"a", "c"});
  CHECK(names_of(saved(simple({"a", "b"}), {.file_of = {{"a", 1}, {"b", 3}}})) == Names{model(1, 3), model(3, 3), index_name, record, sums});
  CHECK(refusal(simple({"a", "b"}), {.file_of = {{"a", 1}}}) == "invalid_argument");
  CHECK(refusal(simple({"a"}), {.file_of = {{"a", 0}}}) == "invalid_argument");
  CHECK(refusal(simple({"a"}), {.file_of = {{"a", -1}}}) == "invalid_argument");
}

TEST_CASE("metadata stands in every file beside the format, which can be another one") {
  auto const files = saved(simple({"a", "b"}), {.max_file_bytes = 60, .metadata = {{"größe", "7\n"}, {"author", ""}}});
  for (int i = 1; i <= 2; ++i) CHECK(header_of(files.at(model(i, 2))).metadata == dcp::safetensors::Metadata{{"author", ""}, {"format", "pt"}, {"größe", "7\n"}});
  CHECK(header_of(saved(simple({"a"}), {.metadata = {{"format", "mlx"}}}).at(model(1, 1))).metadata == dcp::safetensors::Metadata{{"format", "mlx"}});
  CHECK(refusal(simple({"a"}), {.metadata = {{"x", "1"}, {"x", "2"}}}) == "duplicate_key");
  CHECK(refusal(simple({"a"}), {.metadata = {{"x", "\xFF"}}}) == "bad_utf8");
  CHECK(refusal(simple({"a"}), {.metadata = {{"DCP_SHARDING_INFO", "{}"}}}) == "invalid_argument");   // readers would take whole tensors for pieces
}

TEST_CASE("groups: a directory and an index for each, with or without the prefix, and names come back whole") {
  Tensors const tensors = simple({"model.w", "model.b.c", "modelling.w", "optimizer.model.w", "optimizer.step", "loose"});
  auto const files = saved(tensors, {.groups = {{"model", "weights/final", Prefix::strip}, {"optimizer", "./optimizer/", Prefix::keep}}});
  CHECK(names_of(files) == Names{model(1, 1), index_name, "weights/final/" + model(1, 1), "weights/final/" + index_name, "optimizer/" + model(1, 1), "optimizer/" + index_name, record, sums});
  CHECK(tensors_in(files.at(model(1, 1))) == Names{"modelling.w", "loose"});
  CHECK(tensors_in(files.at("weights/final/" + model(1, 1))) == Names{"w", "b.c"});
  CHECK(tensors_in(files.at("optimizer/" + model(1, 1))) == Names{"optimizer.model.w", "optimizer.step"});
  CHECK(index_in(files.at("weights/final/" + index_name)).total_size == 120);

  // Bare names at the top, as loaders of models want them; the state loads under its own names.
  auto const bare = saved(simple({"model.w", "optimizer.step"}), {.groups = {{"model", ".", Prefix::strip}, {"optimizer", "optimizer"}}});
  CHECK(tensors_in(bare.at(model(1, 1))) == Names{"w"});
  // The first group that matches takes a name.
  auto const nested = saved(simple({"model.head.w", "model.w"}), {.groups = {{"model.head", "head"}, {"model", "rest"}}});
  CHECK(tensors_in(nested.at("head/" + model(1, 1))) == Names{"model.head.w"});
  CHECK(tensors_in(nested.at("rest/" + model(1, 1))) == Names{"model.w"});
  // Sharded files have groups too.
  auto const sharded = saved(tensors, {.layout = dcp::FileLayout::sharded, .groups = {{"model", "m", Prefix::strip}}});
  CHECK(tensors_in(sharded.at("m/" + dcp::hf::shard_file_name(1, 1, 1))) == Names{"w", "b.c"});
}

TEST_CASE("groups: a bare checkpoint is a plain one for every other reader") {
  dcp::Memory store;
  dcp::SelfComm self;
  Tensors const tensors = simple({"model.w", "model.v", "optimizer.step"});
  HeldTensors held{tensors, plain, 0, true};
  dcp::save<InMemory>(self, {store, "ckpt"}, held.state, {.storage = {.groups = {{"model", ".", Prefix::strip}, {"optimizer", "optimizer"}}}});
  forget_who_wrote(store);
  auto const foreign = dcp::load_from_keys<InMemory>(self, {store, "ckpt"});
  CHECK(foreign.report().foreign);
  CHECK(foreign.tensors().size() == 2);
  CHECK(dcp::Bytes(foreign.tensors().at("w").bytes().begin(), foreign.tensors().at("w").bytes().end()) == tensors[0].bytes);
}

TEST_CASE("groups that would mix up names, or leave the checkpoint, are refused") {
  CHECK(refusal(simple({"a.w", "b.w"}), {.groups = {{"a", "x", Prefix::strip}, {"b", "x", Prefix::strip}}}) == "duplicate_entry");
  CHECK(refusal(simple({"a.w", "b.v"}), {.groups = {{"a", "x", Prefix::strip}, {"b", "x", Prefix::strip}}}) == "invalid_argument");
  CHECK(refusal(simple({"a.w", "v"}), {.groups = {{"a", ".", Prefix::strip}}}) == "invalid_argument");
  CHECK(refusal(simple({"a.w", "w"}), {.groups = {{"a", ".", Prefix::strip}}}) == "duplicate_entry");
  CHECK(refusal(simple({"a"}), {.groups = {{"a", "x", Prefix::strip}}}) == "invalid_argument");
  CHECK(refusal(simple({"a.__metadata__"}), {.groups = {{"a", "x", Prefix::strip}}}) == "bad_schema");
  for (std::string const& directory : {std::string{".."}, std::string{"x/../.."}, std::string{"x/.."}, std::string{"x\\y"}, std::string{"x\0y", 3}}) {
    CAPTURE(directory);
    CHECK(refusal(simple({"a.w"}), {.groups = {{"a", directory}}}) == "unsafe_path");
  }
  // Absolute directories lie inside too.
  CHECK(names_of(saved(simple({"a.w"}), {.groups = {{"a", "/etc//./x"}}})).contains("etc/x/" + model(1, 1)));
}

TEST_CASE("extra_files are copied in, listed in the record, and carried or refused as a whole") {
  TemporaryDirectory directory;
  std::ofstream{directory / "config.json"} << "{\"hidden_size\": 8}";
  std::ofstream{directory / "empty.txt"};
  auto const files = saved(simple({"a"}), {.extra_files = {directory / "config.json", directory / "empty.txt"}});
  CHECK(files.at("config.json") == "{\"hidden_size\": 8}");
  CHECK(files.at("empty.txt").empty());
  std::ofstream{directory / record} << "{}";
  std::ofstream{directory / index_name} << "{}";
  std::ofstream{directory / "dcp.crc"} << "{}";
  CHECK(refusal(simple({"a"}), {.extra_files = {directory / "absent.json"}}) == "missing_file");
  CHECK(refusal(simple({"a"}), {.extra_files = {directory / record}}) == "invalid_argument");
  CHECK(refusal(simple({"a"}), {.extra_files = {directory / "dcp.crc"}}) == "invalid_argument");
  CHECK(refusal(simple({"a"}), {.extra_files = {directory / index_name}}) == "invalid_argument");
  CHECK(refusal(simple({"a"}), {.extra_files = {directory / "config.json", directory / "config.json"}}) == "invalid_argument");
  CHECK(refusal(simple({"a"}), {.extra_files = {directory.path() + "/"}}) == "invalid_argument");
}

TEST_CASE("ties: stored once, noted as Hugging Face notes them, and loaded under both names") {
  for (std::uint64_t const file_bytes : {std::uint64_t{5} << 30, std::uint64_t{60}}) {
    CAPTURE(file_bytes);
    dcp::Memory store;
    dcp::SelfComm self;
    std::vector<float> embed(15, 1.5f), other(15, 2.5f), norm(15, 3.5f);
    dcp::TensorView<float> const view{embed, {3, 5}};
    dcp::StateDict state{{"model.embed.weight", view}, {"lm_head.weight", view}, {"other", dcp::TensorView<float>{other, {3, 5}}}, {"norm", dcp::TensorView<float>{norm, {15}}}};
    state.tie("alias", "norm");
    dcp::save<InMemory>(self, {store, "ckpt"}, state, {.storage = {.max_file_bytes = file_bytes}});
    auto const files = files_of(store);
    auto const index = index_in(files.at(index_name));
    CHECK(index.total_size == 180);
    std::map<std::string, std::string> notes;
    int count = 0;
    for (auto const& [name, text] : files) {
      if (!name.ends_with(".safetensors")) continue;
      ++count;
      auto const header = header_of(text);
      for (auto const& [key, value] : header.metadata)
        if (key != "format") {
          notes[key] = value;
          CHECK(tensors_in(text).contains(value));   // where the kept one is
        }
    }
    CHECK(notes == std::map<std::string, std::string>{{"alias", "norm"}, {"model.embed.weight", "lm_head.weight"}});
    CHECK(count == (file_bytes == 60 ? 3 : 1));
    // In the index where there are several files, as huggingface_hub does.
    using Notes = std::vector<std::pair<std::string, std::string>>;
    CHECK(index.metadata == (count > 1 ? Notes{{"alias", "norm"}, {"model.embed.weight", "lm_head.weight"}} : Notes{}));

    for (bool const foreign : {false, true}) {
      CAPTURE(foreign);
      if (foreign) forget_who_wrote(store);
      auto const all = dcp::load_from_keys<InMemory>(self, {store, "ckpt"});
      CHECK(all.tensors().size() == 5);
      CHECK(all.tensors().at("model.embed.weight").as<float>()[7] == 1.5f);
      CHECK(all.tensors().at("alias").as<float>()[14] == 3.5f);
      // Into a state that ties nothing, and into one that has only the dropped name.
      std::vector<float> a(15), b(15), c(15), d(15), e(15);
      dcp::StateDict apart{{"model.embed.weight", dcp::TensorView<float>{a, {3, 5}}}, {"lm_head.weight", dcp::TensorView<float>{b, {3, 5}}}, {"other", dcp::TensorView<float>{c, {3, 5}}},
                           {"norm", dcp::TensorView<float>{d, {15}}}, {"alias", dcp::TensorView<float>{e, {15}}}};
      dcp::load<InMemory>(self, {store, "ckpt"}, apart);
      CHECK(a == embed);
      CHECK(b == embed);
      CHECK(c == other);
      CHECK(d == norm);
      CHECK(e == norm);
      std::vector<float> only(15);
      dcp::load<InMemory>(self, {store, "ckpt"}, {{"model.embed.weight", dcp::TensorView<float>{only, {3, 5}}}}, {.on_unexpected = dcp::OnUnexpected::ignore});
      CHECK(only == embed);
    }
  }
}

TEST_CASE("sharded layout: one file per rank, PyTorch's sharding info, every element in exactly one of them") {
  Tensors const tensors{made_tensor("rows", DType::f32, {5, 3}), made_tensor("columns", DType::f32, {3, 5}), made_tensor("both", DType::bf16, {5, 7}), made_tensor("replicated", DType::f64, {6, 2}),
                        made_tensor("scalar", DType::i64, {}), made_tensor("empty", DType::f32, {0, 4}), made_tensor("few", DType::u8, {1, 4})};
  dcp::Memory store;
  dcp::run_threads(4, [&](dcp::ThreadComm& world) {
    dcp::DeviceMesh<2> const mesh{world, {2, 2}};
    using dcp::Placement, dcp::Replicate, dcp::Shard;
    HeldTensors held{tensors, [&](WholeTensor const& t) {
      if (t.name == "rows" || t.name == "few") return dcp::layout_of<Placement<Shard<0>, Replicate>>(mesh, t.shape);
      if (t.name == "columns") return dcp::layout_of<Placement<Replicate, Shard<1>>>(mesh, t.shape);
      if (t.name == "both" || t.name == "empty") return dcp::layout_of<Placement<Shard<0>, Shard<1>>>(mesh, t.shape);
      return dcp::layout_of<Placement<Replicate, Replicate>>(mesh, t.shape);
    }, world.rank(), true};
    dcp::save<InMemory>(world, {store, "ckpt"}, held.state, {.storage = {.layout = dcp::FileLayout::sharded, .metadata = {{"who", "us"}}}});
  });
  auto const files = files_of(store);
  CHECK(names_of(files) == Names{dcp::hf::shard_file_name(1, 1, 1), dcp::hf::shard_file_name(2, 1, 1), dcp::hf::shard_file_name(3, 1, 1), dcp::hf::shard_file_name(4, 1, 1), record, sums});
  std::map<std::string, std::vector<int>> times;   // each element was found
  for (auto const& t : tensors) times[t.name].resize(static_cast<std::size_t>(t.shape.elements()));
  int empty_tensors = 0;
  for (auto const& [name, text] : files) {
    if (!name.ends_with(".safetensors")) continue;
    auto const& shown_name = name;   // older clang++ does not capture bindings
    CAPTURE(shown_name);
    auto const header = header_of(text);
    CHECK(header.data_begin % 4096 == 0);
    CHECK(header.find_metadata("format") == "pt");
    CHECK(header.find_metadata("DCP_VERSION") == "1.0");
    CHECK(header.find_metadata("who") == "us");
    auto const info = dcp::safetensors::parse_sharding_info(header.find_metadata("DCP_SHARDING_INFO").value());
    CHECK(info.size() == header.tensors.size());
    for (auto const& tensor : header.tensors) {
      CAPTURE(tensor.name);
      auto const whole = std::find_if(tensors.begin(), tensors.end(), [&](auto const& t) { return t.name == tensor.name; });
      REQUIRE(whole != tensors.end());
      CHECK(tensor.dtype == whole->dtype);
      dcp::Box const box{dcp::Extents{dcp::safetensors::saved_offsets(info, tensor)}, tensor.shape};
      auto const bytes = dcp::as_byte_span(text).subspan(static_cast<std::size_t>(header.data_begin + tensor.begin), static_cast<std::size_t>(tensor.end - tensor.begin));
      CHECK(dcp::Bytes(bytes.begin(), bytes.end()) == dcp::test::cut_out(whole->bytes, whole->dtype, whole->shape, box));
      auto const strides = dcp::row_major_strides(whole->shape);
      dcp::test::for_each_element(box, [&](dcp::Extents const& at) { ++times[tensor.name][static_cast<std::size_t>(dcp::test::linear(at, strides))]; });
      empty_tensors += tensor.shape.empty() ? 1 : 0;
    }
  }
  CHECK(empty_tensors == 1);
  for (auto const& [name, counts] : times) {
    auto const& shown_name = name;   // older clang++ does not capture bindings
    CAPTURE(shown_name);
    CHECK(std::all_of(counts.begin(), counts.end(), [](int n) { return n == 1; }));
  }
  // PyTorch's reader takes the directory as it is; so does ours without the record.
  forget_who_wrote(store);
  dcp::SelfComm self;
  HeldTensors back{tensors, plain, 0, false};
  CHECK(dcp::load<InMemory>(self, {store, "ckpt"}, back.state).foreign);
  CHECK(back.complete());
}

TEST_CASE("sharded layout: max_file_bytes makes several files per rank") {
  auto const files = saved(simple({"a", "b", "c"}), {.layout = dcp::FileLayout::sharded, .max_file_bytes = 120});
  CHECK(names_of(files) == Names{dcp::hf::shard_file_name(1, 1, 2), dcp::hf::shard_file_name(1, 2, 2), record, sums});
}

TEST_CASE("every dtype, scalars, tensors without elements and any UTF-8 name come back, in both layouts, in memory and in files") {
  Tensors const tensors = every_dtype();
  CHECK(saved(tensors, {}).contains(model(1, 1)));
  CHECK(saved(tensors, {.max_file_bytes = 100}).size() > 30);
  CHECK(saved(tensors, {.layout = dcp::FileLayout::sharded}).size() == 3);
  for (auto const layout : {dcp::FileLayout::final, dcp::FileLayout::sharded}) {
    TemporaryDirectory directory;
    dcp::SelfComm self;
    HeldTensors held{tensors, plain, 0, true};
    dcp::save<dcp::SafeTensors>(self, directory / "ckpt", held.state, {.storage = {.layout = layout}});
    for (bool const foreign : {false, true}) {
      if (foreign) fs::remove(directory / "ckpt/dcp.json"), fs::remove(directory / "ckpt/dcp.crc");
      HeldTensors back{tensors, plain, 0, false};
      dcp::load<dcp::SafeTensors>(self, directory / "ckpt", back.state);
      CHECK(back.complete());
    }
  }
}

TEST_CASE("a state without tensors, and a state without anything, are checkpoints") {
  for (auto const layout : {dcp::FileLayout::final, dcp::FileLayout::sharded}) {
    dcp::Memory store;
    dcp::SelfComm self;
    dcp::save<InMemory>(self, {store, "nothing"}, dcp::StateDict{}, {.storage = {.layout = layout}});
    CHECK(dcp::load<InMemory>(self, {store, "nothing"}, dcp::StateDict{}).tensors == 0);
    CHECK(dcp::load_from_keys<InMemory>(self, {store, "nothing"}).tensors().empty());
    std::int64_t step = 7;
    dcp::save<InMemory>(self, {store, "step"}, {{"step", step}}, {.storage = {.layout = layout}});
    step = 0;
    dcp::load<InMemory>(self, {store, "step"}, {{"step", step}});
    CHECK(step == 7);
  }
}

TEST_CASE("an element that the format cannot hold on its own is refused in planning, with its name") {
  CHECK(refusal({made_tensor("half a byte", DType::f4, {3})}, {}) == "misaligned");
  CHECK(refusal({made_tensor("three quarters", DType::f6_e2m3, {1, 1})}, {}) == "misaligned");
}

TEST_CASE("the same state gives the same files, byte for byte, whatever ranks, meshes, placements, threads and writers wrote it") {
  auto const seed = dcp::test::first_seed();
  CAPTURE(seed);
  dcp::test::Random random{seed};
  Tensors tensors = every_dtype();
  tensors.push_back(made_tensor("large", DType::f32, {300, 1031}));   // over a chunk of the checksums
  tensors.push_back(made_tensor("large.2", DType::bf16, {1031, 300}));
  for (std::uint64_t const file_bytes : {std::uint64_t{5} << 30, std::uint64_t{400'000}}) {
    Files first;
    for (int const ranks : {1, 2, 3, 4, 6, 1, 2, 3, 4, 6}) {
      CAPTURE(ranks);
      std::map<std::string, dcp::Layout> layouts;
      for (auto const& tensor : tensors) {
        dcp::Layout layout;
        do {
          layout = {};
          layout.shape = layout.split_shape = tensor.shape;
          std::vector<std::int64_t> extents{ranks};
          if (ranks == 4 && random.one_in(2)) extents = {2, 2};
          if (ranks == 6) extents = random.one_in(2) ? std::vector<std::int64_t>{2, 3} : std::vector<std::int64_t>{3, 2};
          layout.mesh = dcp::test::mesh_of(extents);
          if (random.one_in(4)) layout.mesh = dcp::test::any_sub_mesh(random, layout.mesh);
          layout.rules = dcp::test::any_rules(random, layout.mesh.axes, layout.shape.rank());
          if (random.one_in(4)) layout = dcp::plain_layout(tensor.shape);
        } while (!layout.everywhere && !dcp::test::cuts_whole_bytes(layout, tensor.dtype));
        layouts[tensor.name] = layout;
      }
      int const threads = static_cast<int>(random.between(1, 3));
      auto const writers = random.between(1, 4);
      double const rate = 0.1;
      dcp::Memory store;
      dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
        HeldTensors held{tensors, [&](WholeTensor const& tensor) { return layouts.at(tensor.name); }, world.rank(), true};
        double mine = rate;
        std::string note = "ünïcode";
        held.state.add("rate", mine).add("note", note);
        dcp::save<InMemory>(world, {store, "ckpt"}, held.state, {.threads = threads, .writers_per_file = writers, .storage = {.max_file_bytes = file_bytes}});
      });
      auto files = files_of(store);
      // The record says which save this is; everything else in it is the same too.
      auto& text = files.at(record);
      auto json = nlohmann::ordered_json::parse(text);
      for (auto const* key : {"id", "sequence", "dcp_crc64"}) CHECK(json.erase(key) == 1);
      text = json.dump(1);
      if (first.empty()) first = files;
      CHECK(names_of(files) == names_of(first));
      for (auto const& [name, bytes] : files) {
        auto const& shown_name = name;   // older clang++ does not capture bindings
        CAPTURE(shown_name);
        CHECK((bytes == first.at(name)));
      }
    }
  }
}
