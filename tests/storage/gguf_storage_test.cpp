// SPDX-License-Identifier: Apache-2.0
// GGUF files of gguf-py through the storage Gguf: values bit for bit in every cut, split models, and files that are refused. (G..: numbers in the catalogue
// of inputs that tests/formats follows too.)
#include <dcp/dcp.hpp>

#include "formats/golden.hpp"
#include "support/cuts.hpp"
#include "support/outcome.hpp"
#include "support/quantized_models.hpp"
#include "support/sha256.hpp"
#include "support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <mutex>
#include <set>

namespace fs = std::filesystem;
namespace plain = dcp::test::plain;
using dcp::DType;
using dcp::test::Cut;
using dcp::test::HeldTensors;
using dcp::test::TemporaryDirectory;
using dcp::test::WholeTensor;

namespace {

struct Tensor {
  std::string name, type, file, sha256;
  dcp::Extents shape, stored;   // stored: as bytes of blocks, where it is in blocks
  std::uint64_t bytes = 0;
  DType dtype{};                // of one that is stored as it is
  bool blocks = false, decodes = false;
  WholeTensor value;            // in float
};
struct Case {
  std::string name, directory;
  std::vector<std::string> files;
  std::size_t keys = 0;
  std::vector<Tensor> tensors;

  std::string place() const { return directory + "/" + files[0]; }
};

std::vector<Case> golden_cases() {
  std::set<std::string> const not_decoded{"IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ3_S", "IQ3_XXS"};
  std::map<std::string, DType> const plain_types{{"F32", DType::f32}, {"F16", DType::f16}, {"BF16", DType::bf16}, {"F64", DType::f64}, {"I8", DType::i8}, {"I16", DType::i16}, {"I32", DType::i32}, {"I64", DType::i64}};
  std::vector<Case> cases;
  for (auto const& entry : fs::directory_iterator{golden::root() / "gguf"}) {
    auto const expected = golden::json_of(entry.path() / "expected.json");
    Case one{entry.path().filename().string(), entry.path().string(), expected["files"].get<std::vector<std::string>>(), expected["kv"].size(), {}};
    std::map<std::string, plain::Tensor> values;
    if (fs::exists(entry.path() / "expected.safetensors")) values = plain::read((entry.path() / "expected.safetensors").string()).tensors;
    for (auto const& [name, facts] : expected["tensors"].items()) {
      Tensor& tensor = one.tensors.emplace_back();
      tensor.name = name;
      tensor.type = facts["ggml_type"].get<std::string>();
      tensor.file = facts["file"].get<std::string>();
      tensor.sha256 = facts["sha256"].get<std::string>();
      tensor.bytes = facts["nbytes"].get<std::uint64_t>();
      auto sizes = facts["shape"].get<std::vector<std::int64_t>>();
      tensor.shape = dcp::Extents{sizes};
      if (auto const at = plain_types.find(tensor.type); at != plain_types.end()) {
        tensor.dtype = at->second;
      } else {
        tensor.blocks = true;
        tensor.decodes = !not_decoded.contains(tensor.type);
        auto const* facts_of_type = dcp::gguf::type_facts(facts["ggml_type_id"].get<std::uint32_t>());
        REQUIRE(facts_of_type != nullptr);
        sizes.back() /= facts_of_type->elements;
        sizes.push_back(facts_of_type->bytes);
        tensor.stored = dcp::Extents{sizes};
      }
      tensor.value = {name, DType::f32, tensor.shape, {}};
      auto const& value = values.at(name);
      auto const bytes = dcp::as_byte_span(value.bytes);
      tensor.value.bytes.assign(bytes.begin(), bytes.end());
      CHECK(dcp::test::sha256(bytes) == expected["dequantized"][name]["sha256"].get<std::string>());
    }
    cases.push_back(std::move(one));
  }
  return cases;
}

// Tensors of blocks as floats of some type, or whatever is not decoded as it is stored.
std::vector<WholeTensor> wanted_as(Case const& one, DType dtype) {
  std::vector<WholeTensor> tensors;
  for (auto const& tensor : one.tensors) {
    bool const is_float = tensor.dtype == DType::f32 || tensor.dtype == DType::f16 || tensor.dtype == DType::bf16;
    if (tensor.decodes || (!tensor.blocks && is_float)) tensors.push_back(dcp::test::quantized::rounded_to(tensor.value, dtype));
  }
  return tensors;
}

dcp::LoadOptions<dcp::Gguf> const lenient{.on_unexpected = dcp::OnUnexpected::ignore, .on_dtype = dcp::OnDType::cast};
void check_cut(std::string const& place, std::vector<WholeTensor> const& tensors, Cut const& cut, dcp::LoadOptions<dcp::Gguf> const& options = lenient) {
  CAPTURE(cut.name);
  std::mutex mutex;
  dcp::run_threads(cut.ranks, [&](dcp::ThreadComm& world) {
    HeldTensors held{tensors, cut.layout_of, world.rank(), false};
    auto const report = dcp::load<dcp::Gguf>(world, place, held.state, options);
    std::lock_guard const lock{mutex};
    CAPTURE(world.rank());
    CHECK(held.complete());
    CHECK(report.tensors == tensors.size());
  });
}

std::string text_of(std::optional<dcp::Error> const& error) { return error ? std::string{to_string(error->code())} + ": " + error->what() : "ok"; }
std::string load(std::string const& place, dcp::GgufOptions const& options = {}) {
  dcp::SelfComm self;
  std::string const listed = text_of(dcp::test::error_of([&] { dcp::contents<dcp::Gguf>(self, place, {.storage = options}); }));
  std::string text = text_of(dcp::test::error_of([&] { dcp::load_from_keys<dcp::Gguf>(self, place, {}, {.storage = options}); }));
  if (listed != "ok") CHECK(text == listed);
  return text;
}
std::string code_of(std::string const& text) { return text.substr(0, text.find(':')); }

void write(std::string const& path, std::string const& bytes) {
  std::ofstream out{path, std::ios::binary};
  out << bytes;
  REQUIRE(out.flush().good());
}
std::string replaced(std::string bytes, std::string const& what, std::string const& with, std::size_t behind = 0) {
  auto const at = bytes.find(what);
  REQUIRE(at != std::string::npos);
  bytes.replace(at + behind, with.size(), with);
  return bytes;
}

}  // namespace

TEST_CASE("every golden GGUF file loads into float, bfloat16, half and double in every cut") {
  auto const cases = golden_cases();
  CHECK(cases.size() == 5);
  std::size_t decoded = 0;
  for (auto const& one : cases) {
    CAPTURE(one.name);
    for (auto const& tensor : one.tensors) decoded += tensor.decodes ? 1 : 0;
    for (DType const dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
      CAPTURE(dtype);
      auto const tensors = wanted_as(one, dtype);
      for (auto const& tensor : tensors)
        for (std::size_t i = 0; dtype == DType::f32 && i + 4 <= tensor.bytes.size(); i += 4) {
          float x;
          std::memcpy(&x, tensor.bytes.data() + i, 4);
          REQUIRE(std::isfinite(x));
        }
      for (auto const& cut : dcp::test::all_cuts()) check_cut(one.place(), tensors, cut);
    }
    dcp::LoadOptions<dcp::Gguf> options = lenient;
    options.read_once = true;
    options.verify = dcp::Verify::full;
    options.memory_bytes = dcp::least_memory_bytes;
    for (auto const& cut : dcp::test::all_cuts())
      if (cut.ranks == 4) check_cut(one.place(), wanted_as(one, DType::f32), cut, options);
  }
  CHECK(decoded >= 15);
}

TEST_CASE("law: any cut of a GGUF file has its part of the values") {
  auto const cases = golden_cases();
  std::uint64_t const first = dcp::test::first_seed();
  for (std::uint64_t round = 0; round < 60; ++round) {
    std::uint64_t const seed = first + round;
    CAPTURE(seed);
    dcp::test::Random random{seed};
    auto const& one = cases[static_cast<std::size_t>(random.between(0, static_cast<std::int64_t>(cases.size()) - 1))];
    check_cut(one.place(), wanted_as(one, random.one_in(2) ? DType::f32 : DType::bf16), dcp::test::any_cut(random));
  }
}

TEST_CASE("what is stored loads as it is: plain types by their dtype, blocks as bytes") {
  for (auto const& one : golden_cases()) {
    CAPTURE(one.name);
    dcp::test::Random random{3};
    std::vector<WholeTensor> stored;
    for (auto const& tensor : one.tensors) {
      auto const file = golden::text_of(fs::path{one.directory} / tensor.file);
      auto const header = dcp::gguf::parse_header(dcp::as_byte_span(file));
      auto const at = std::find_if(header.tensors.begin(), header.tensors.end(), [&](auto const& info) { return info.name == tensor.name; });
      REQUIRE(at != header.tensors.end());
      auto const bytes = dcp::as_byte_span(file).subspan(static_cast<std::size_t>(at->offset), static_cast<std::size_t>(at->bytes));
      CHECK(dcp::test::sha256(bytes) == tensor.sha256);
      stored.push_back({tensor.name, tensor.blocks ? DType::u8 : tensor.dtype, tensor.blocks ? tensor.stored : tensor.shape, dcp::Bytes(bytes.begin(), bytes.end())});
    }
    dcp::LoadOptions<dcp::Gguf> strict;
    strict.on_unexpected = dcp::OnUnexpected::ignore;   // of metadata
    check_cut(one.place(), stored, dcp::test::all_cuts()[0], strict);
    for (int cut = 0; cut < 6; ++cut) check_cut(one.place(), stored, dcp::test::any_cut(random), strict);
  }
}

TEST_CASE("load_from_keys and contents list tensors by name, shape and type, whichever file they lie in, and the metadata as values") {
  dcp::SelfComm self;
  for (auto const& one : golden_cases()) {
    CAPTURE(one.name);
    for (std::string const& place : {one.directory, one.place(), one.directory + "/" + one.files.back()}) {
      auto const contents = dcp::contents<dcp::Gguf>(self, place);
      auto const owned = dcp::load_from_keys<dcp::Gguf>(self, place);
      CHECK(owned.report().foreign);
      REQUIRE(contents.tensors.size() == one.tensors.size());
      CHECK(owned.tensors().size() == one.tensors.size());
      std::size_t not_decoded = 0;
      for (std::size_t t = 0; t < one.tensors.size(); ++t) {
        auto const& tensor = *std::find_if(one.tensors.begin(), one.tensors.end(), [&](auto const& other) { return other.name == contents.tensors[t].name; });
        auto const& listed = contents.tensors[t];
        auto const& loaded = owned.tensors().at(tensor.name);
        CAPTURE(tensor.name);
        bool const as_bytes = tensor.blocks && !tensor.decodes;
        CHECK(listed.scheme == (tensor.decodes ? "gguf " + tensor.type : ""));
        CHECK(listed.parts == (tensor.decodes ? std::vector<std::string>{tensor.name} : std::vector<std::string>{}));
        CHECK(listed.files == std::vector<std::string>{tensor.file});
        CHECK(listed.stored_bytes == tensor.bytes);
        CHECK(listed.dtype == (as_bytes ? DType::u8 : tensor.decodes ? DType::f32 : tensor.dtype));
        CHECK(listed.shape == (as_bytes ? tensor.stored : tensor.shape));
        CHECK(loaded.dtype() == listed.dtype);
        CHECK(loaded.shape() == listed.shape);
        if (tensor.decodes) CHECK(dcp::Bytes(loaded.bytes().begin(), loaded.bytes().end()) == tensor.value.bytes);
        else CHECK(dcp::test::sha256(loaded.bytes()) == tensor.sha256);
        if (!as_bytes) continue;
        ++not_decoded;
        CHECK(std::any_of(contents.warnings.begin(), contents.warnings.end(), [&](auto const& warning) { return warning.starts_with(tensor.name + ": the type " + tensor.type + " cannot be decoded"); }));
      }
      CHECK(contents.warnings.size() == not_decoded);
      CHECK(owned.report().warnings == contents.warnings);
      if (one.name == "iq_tq_types") CHECK(not_decoded == 7);
      // The keys of the first file, and of the others those that it lacks.
      auto const header = dcp::gguf::parse_header(dcp::as_byte_span(golden::text_of(one.place())));
      CHECK(contents.values.size() == one.keys);
      CHECK(owned.values().size() == one.keys);
      for (auto const& [key, value] : header.metadata) {
        REQUIRE(owned.values().contains(key));
        CHECK(owned.values().at(key) == value);
      }
    }
  }
}

TEST_CASE("metadata fill values of a state, and only what is asked for is read") {
  dcp::SelfComm self;
  std::string architecture;
  std::uint8_t number = 0;
  std::string const place = (golden::root() / "gguf" / "all_types").string();
  auto const report = dcp::load<dcp::Gguf>(self, place, {{"general.architecture", architecture}, {"test.uint8", number}}, lenient);
  CHECK(architecture == "llama");
  CHECK(number == 200);
  CHECK(report.values == 2);
  CHECK(dcp::load_from_keys<dcp::Gguf>(self, place, {"blk.0.f32"}).tensors().size() == 1);
}

TEST_CASE("metadata of a file need not be wanted by who loads its tensors") {
  dcp::SelfComm self;
  std::vector<float> t0(15), t1(64), t3(96);
  std::vector<dcp::f16> t2(7);
  dcp::StateDict const state{{"t0", dcp::TensorView<float>{t0, {3, 5}}}, {"t1", dcp::TensorView<float>{t1, {2, 32}}}, {"t2", dcp::TensorView<dcp::f16>{t2, {7}}}, {"t3", dcp::TensorView<float>{t3, {3, 32}}}};
  auto const report = dcp::load<dcp::Gguf>(self, (golden::root() / "gguf" / "alignment_64").string(), state);
  CHECK(report.tensors == 4);
  CHECK(report.unexpected.empty());
}

TEST_CASE("memory with gaps gets the values and is left alone between them") {
  for (auto const& one : golden_cases())
    for (auto const& tensor : one.tensors) {
      if (!tensor.decodes || tensor.shape.rank() != 2) continue;
      CAPTURE(tensor.name);
      std::int64_t const rows = tensor.shape[0], columns = tensor.shape[1], row = 3 * columns + 5;
      for (DType const dtype : {DType::f32, DType::f16}) {
        auto const value = dcp::test::quantized::rounded_to(tensor.value, dtype);
        auto const width = static_cast<std::size_t>(dcp::bits_of(dtype) / 8);
        dcp::Bytes memory(static_cast<std::size_t>(rows * row) * width, std::byte{0xEE}), wanted = memory;
        for (std::int64_t r = 0; r < rows; ++r)
          for (std::int64_t c = 0; c < columns; ++c) std::memcpy(wanted.data() + static_cast<std::size_t>(r * row + 3 * c) * width, value.bytes.data() + static_cast<std::size_t>(r * columns + c) * width, width);
        dcp::SelfComm self;
        dcp::StateDict state;
        state.add_tensor(tensor.name, dtype, dcp::plain_layout(tensor.shape), {memory.data(), dcp::Extents{row, std::int64_t{3}}});
        dcp::load<dcp::Gguf>(self, one.place(), state, lenient);
        CHECK(memory == wanted);
      }
    }
}

TEST_CASE("a split model whose parts do not belong together is refused (G47)") {
  std::vector<std::string> parts;
  auto const name_of = [](int number, std::string const& prefix = "model", int count = 3) { return dcp::gguf::split_file_name(prefix, number, count); };
  for (int number = 1; number <= 3; ++number) parts.push_back(golden::text_of(golden::root() / "gguf" / "split" / name_of(number)));
  struct Broken {
    std::string what;
    std::function<void(std::vector<std::string>&, TemporaryDirectory const&)> change;   // an empty part is not written
    std::string code, says;
  };
  auto const number = [](std::string const& key, std::string const& value) { return std::pair{key, value}; };
  auto const say = [&](std::size_t part, std::pair<std::string, std::string> const& change) {
    return [=](std::vector<std::string>& p, TemporaryDirectory const&) { p[part] = replaced(p[part], change.first, change.second, change.first.size() + 4); };   // behind the type
  };
  auto const u16 = [](unsigned n) { return std::string{static_cast<char>(n & 255), static_cast<char>(n >> 8)}; };
  for (auto const& one : std::vector<Broken>{
           {"all of it", [](auto&, auto const&) {}, "ok", ""},
           {"the second is missing", [](auto& p, auto const&) { p[1].clear(); }, "missing_file", name_of(2)},
           {"the last is missing", [](auto& p, auto const&) { p[2].clear(); }, "missing_file", name_of(3)},
           {"the first is missing", [](auto& p, auto const&) { p[0].clear(); }, "missing_file", name_of(1)},
           {"two are in each other's place", [](auto& p, auto const&) { std::swap(p[1], p[2]); }, "index_mismatch", "split.no"},
           {"one is there twice", [](auto& p, auto const&) { p[2] = p[1]; }, "index_mismatch", ""},
           {"number 7 of 3", say(1, number("split.no", u16(7))), "index_mismatch", name_of(2)},
           {"number 0 twice", say(1, number("split.no", u16(0))), "index_mismatch", name_of(2)},
           {"4 parts by what one says", say(1, number("split.count", u16(4))), "index_mismatch", "split.count"},
           {"another number of tensors in one", say(1, number("split.tensors.count", u16(6))), "index_mismatch", "split.tensors.count"},
           {"another number of tensors in all", [&](auto& p, auto const& d) { for (std::size_t i = 0; i < 3; ++i) say(i, number("split.tensors.count", u16(6)))(p, d); }, "index_mismatch", "5 tensors"},
           {"a tensor in two files", [&](auto& p, auto const&) { p[1] = replaced(p[1], "w2", "w0"); }, "", "w0"},
           {"a key that is gone", [&](auto& p, auto const&) { p[1] = replaced(p[1], "split.no", "split.xx"); }, "bad_schema", "split.no"},
           {"keys that are all gone", [&](auto& p, auto const&) { p[1] = replaced(replaced(p[1], "split.no", "split.xx"), "split.count", "split.countx", 0).substr(0, p[1].size()); }, "", ""},
           {"a number of another type", [&](auto& p, auto const&) { p[1] = replaced(p[1], "split.no", std::string{"\3"} + std::string(3, '\0'), 8); }, "bad_schema", "split.no"},
           {"one file of another model", [&](auto&, auto const& d) { write(d / "other.gguf", parts[0]); }, "index_mismatch", "other.gguf"},
           {"a part of another model", [&](auto&, auto const& d) { write(d / name_of(1, "other"), parts[0]); }, "", "other"},
       }) {
    CAPTURE(one.what);
    auto changed = parts;
    TemporaryDirectory directory;
    one.change(changed, directory);
    for (std::size_t i = 0; i < 3; ++i)
      if (!changed[i].empty()) write(directory / name_of(static_cast<int>(i) + 1), changed[i]);
    std::string const text = load(directory.path());
    CAPTURE(text);
    if (one.code.empty()) CHECK(code_of(text) != "ok");
    else CHECK(code_of(text) == one.code);
    CHECK(code_of(text) != "unknown");
    CHECK(text.find(one.says) != std::string::npos);
    // Any of them names the others.
    if (one.code == "ok")
      for (int part = 1; part <= 3; ++part) CHECK(load(directory / name_of(part)) == "ok");
  }
  TemporaryDirectory directory;
  write(directory / "model.gguf", parts[0]);
  CHECK(code_of(load(directory.path())) == "index_mismatch");   // a part under a name that says it is all
  write(directory / "second.gguf", parts[1]);
  std::string const two = load(directory.path());
  CHECK(code_of(two) == "index_mismatch");
  CHECK(two.find("several .gguf files") != std::string::npos);
  TemporaryDirectory empty;
  CHECK(code_of(load(empty.path())) == "not_found");
  CHECK(code_of(load(empty / "nothing.gguf")) != "ok");
}

TEST_CASE("malformed files are refused with their code and their name, and random damage does no harm") {
  std::map<std::string, std::string> const codes{
      {"gguf_bad_magic", "bad_magic"}, {"gguf_version_99", "bad_version"}, {"gguf_tensor_count_huge", "limit"}, {"gguf_value_type_13", "bad_schema"}, {"gguf_duplicate_tensor", "duplicate_key"},
      {"gguf_overlapping_tensors", "bad_offsets"}, {"gguf_data_truncated", "truncated"}, {"gguf_dims_overflow_q8", "overflow"}, {"gguf_type_unknown", "unsupported_dtype"}, {"gguf_q4_0_not_block", "misaligned"},
      {"gguf_string_not_utf8", "bad_utf8"}};
  std::size_t refused = 0;
  auto const cases = golden::json_of(golden::root() / "bad_gguf" / "bad.json");
  for (auto const& entry : cases["cases"]) {
    auto const path = golden::root() / "bad_gguf" / entry["file"].get<std::string>();
    CAPTURE(path.string());
    std::string const text = load(path.string());
    CAPTURE(text);
    CHECK(code_of(text) != "unknown");
    if (entry["expect"] == "any") continue;
    CHECK((text == "ok") == (entry["expect"] == "ok"));
    if (text == "ok") continue;
    ++refused;
    CHECK(text.find(path.filename().string()) != std::string::npos);
    if (auto const at = codes.find(path.stem().string()); at != codes.end()) CHECK(code_of(text) == at->second);
  }
  CHECK(refused > 25);
}

TEST_CASE("bytes behind the data and padding that is missing are refused unless they are allowed (G40, G41)") {
  std::string const file = golden::text_of(golden::root() / "gguf" / "alignment_64" / "model.gguf");
  TemporaryDirectory directory;
  write(directory / "longer.gguf", file + "x");
  CHECK(code_of(load(directory / "longer.gguf")) == "trailing_data");
  CHECK(load(directory / "longer.gguf", {.allow_trailing_bytes = true}) == "ok");
  auto const header = dcp::gguf::parse_header(dcp::as_byte_span(file));
  auto const end = static_cast<std::size_t>(header.tensors.back().offset + header.tensors.back().bytes);
  REQUIRE(end < file.size());
  write(directory / "shorter.gguf", file.substr(0, end));
  CHECK(code_of(load(directory / "shorter.gguf")) == "truncated");
  CHECK(load(directory / "shorter.gguf", {.allow_missing_final_padding = true}) == "ok");
  for (std::size_t size = 0; size < end; size += 7) {
    write(directory / "cut.gguf", file.substr(0, size));
    CHECK(code_of(load(directory / "cut.gguf", {.allow_missing_final_padding = true})) == "truncated");
  }
}

TEST_CASE("law: a GGUF file in which bytes are changed loads or is refused by an Error") {
  std::uint64_t const first = dcp::test::first_seed();
  int refused = 0;
  for (std::uint64_t round = 0; round < 200; ++round) {
    std::uint64_t const seed = first + round;
    CAPTURE(seed);
    dcp::test::Random random{seed};
    std::string file = golden::text_of(golden::root() / "gguf" / (random.one_in(2) ? "all_types" : "alignment_64") / "model.gguf");
    bool const in_header = random.one_in(2);
    for (auto changes = random.between(1, 5); changes > 0; --changes)
      file[static_cast<std::size_t>(random.between(0, in_header ? std::min<std::int64_t>(600, static_cast<std::int64_t>(file.size()) - 1) : static_cast<std::int64_t>(file.size()) - 1))] = static_cast<char>(random.between(0, 255));
    TemporaryDirectory directory;
    write(directory / "model.gguf", file);
    std::string const text = load(directory.path());
    CAPTURE(text);
    CHECK(code_of(text) != "unknown");
    refused += text == "ok" ? 0 : 1;
  }
  CHECK(refused > 20);
}

TEST_CASE("an MXFP4 scale that is no number is refused when its tensor is read, by name (G45)") {
  std::string file = golden::text_of(golden::root() / "gguf" / "all_types" / "model.gguf");
  auto const header = dcp::gguf::parse_header(dcp::as_byte_span(file));
  std::uint32_t mxfp4 = 0;
  REQUIRE(dcp::gguf::parse_type("MXFP4", mxfp4));
  auto const tensor = std::find_if(header.tensors.begin(), header.tensors.end(), [&](auto const& info) { return info.type == mxfp4; });
  REQUIRE(tensor != header.tensors.end());
  file[static_cast<std::size_t>(tensor->offset)] = static_cast<char>(255);
  TemporaryDirectory directory;
  write(directory / "model.gguf", file);
  dcp::SelfComm self;
  CHECK(dcp::contents<dcp::Gguf>(self, directory.path()).tensors.size() == header.tensors.size());
  std::string const text = load(directory.path());
  CHECK(code_of(text) == "quant_mismatch");
  CHECK(text.find(tensor->name) != std::string::npos);
  CHECK(!dcp::test::error_of([&] { dcp::load_from_keys<dcp::Gguf>(self, directory.path(), {"blk.0.f32"}); }));
}
