// SPDX-License-Identifier: Apache-2.0
// Quantized checkpoints of real layouts through Quantized<...>: values bit for bit, whole and in every cut, in every type of memory.
#include <dcp/dcp.hpp>

#include "formats/golden.hpp"
#include "support/any_quantized.hpp"
#include "support/cuts.hpp"
#include "support/outcome.hpp"
#include "support/quantized_models.hpp"
#include "support/sha256.hpp"
#include "support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <filesystem>
#include <mutex>
#include <set>

namespace fs = std::filesystem;
namespace quantized = dcp::test::quantized;
namespace plain = dcp::test::plain;
using dcp::DType;
using dcp::test::Cut;
using dcp::test::HeldTensors;
using dcp::test::layout_on;
using dcp::test::Random;
using dcp::test::all_cuts;
using dcp::test::any_cut;
using dcp::test::any_scheme;
using dcp::test::Scheme;
using dcp::test::scheme_called;
using dcp::test::split;
using dcp::test::TemporaryDirectory;
using dcp::test::WholeTensor;

namespace {

using Settings = dcp::LoadOptions<dcp::detail::no_options>;
Settings const lenient{.on_unexpected = dcp::OnUnexpected::ignore, .on_dtype = dcp::OnDType::cast};

// Loads `tensors` in a cut with a scheme: every rank has, bit for bit, its part of what they should be.
void check_cut(Scheme const& scheme, std::string const& place, std::vector<WholeTensor> const& tensors, Cut const& cut, Settings const& settings = lenient) {
  CAPTURE(scheme.name);
  CAPTURE(cut.name);
  std::mutex mutex;
  dcp::run_threads(cut.ranks, [&](dcp::ThreadComm& world) {
    HeldTensors held{tensors, cut.layout_of, world.rank(), false};
    auto const report = scheme.load(world, place, held.state, settings);
    std::lock_guard const lock{mutex};
    CAPTURE(world.rank());
    CHECK(held.complete());
    CHECK(report.tensors == tensors.size());
  });
}
std::vector<WholeTensor> as(std::vector<WholeTensor> const& tensors, DType dtype) {
  std::vector<WholeTensor> result;
  for (auto const& tensor : tensors) result.push_back(quantized::rounded_to(tensor, dtype));
  return result;
}
WholeTensor whole_of(std::string const& name, plain::Tensor const& tensor) {
  WholeTensor whole{name, {}, dcp::Extents{tensor.shape}, dcp::Bytes(tensor.bytes.size())};
  REQUIRE(dcp::parse_dtype(tensor.dtype, whole.dtype));
  if (!tensor.bytes.empty()) std::memcpy(whole.bytes.data(), tensor.bytes.data(), tensor.bytes.size());
  return whole;
}
std::vector<WholeTensor> wholes_in(std::string const& file) {
  std::vector<WholeTensor> tensors;
  for (auto const& [name, tensor] : plain::read(file).tensors) tensors.push_back(whole_of(name, tensor));
  return tensors;
}

// ---- golden files

struct Case {
  std::string name, place;
  std::string scheme, text;            // what to ask for; how contents() calls it
  std::vector<std::string> suffixes;   // of the parts, behind the name without "weight"
  nlohmann::json expected;
  std::map<std::string, plain::Tensor> stored;
  std::map<std::string, std::string> file_of;
  std::vector<WholeTensor> values;     // in float
};
std::vector<Case> golden_cases() {
  std::vector<Case> cases{
      {"awq_int4", {}, "awq", "awq 4 bits group 32", {"qweight", "qzeros", "scales"}, {}, {}, {}, {}},
      {"fp8_block128", {}, "fp8_block", "fp8_block 128x128", {"weight", "weight_scale_inv"}, {}, {}, {}, {}},
      {"fp8_block_ue8m0", {}, "fp8_block", "fp8_block 128x128", {"weight", "weight_scale_inv"}, {}, {}, {}, {}},
      {"fp8_per_channel", {}, "fp8_channel", "fp8_channel", {"weight", "weight_scale"}, {}, {}, {}, {}},
      {"fp8_per_channel_f32", {}, "fp8_channel", "fp8_channel", {"weight", "weight_scale"}, {}, {}, {}, {}},
      {"fp8_per_tensor", {}, "fp8_tensor", "fp8_tensor", {"weight", "weight_scale"}, {}, {}, {}, {}},
      {"fp8_per_tensor_scalar_f32", {}, "fp8_tensor", "fp8_tensor", {"weight", "weight_scale"}, {}, {}, {}, {}},
      {"gptq_int4", {}, "gptq", "gptq 4 bits group 32", {"qweight", "qzeros", "scales", "g_idx"}, {}, {}, {}, {}},
      {"gptq_int4_actorder_v2", {}, "gptq", "gptq 4 bits group 32 act-order", {"qweight", "qzeros", "scales", "g_idx"}, {}, {}, {}, {}},
      {"int4_pack_quantized", {}, "int4_packed", "int4_packed group 32", {"weight_packed", "weight_scale", "weight_zero_point"}, {}, {}, {}, {}},
      {"int8_per_channel", {}, "int8_channel", "int8_channel", {"weight", "weight_scale", "weight_zero_point"}, {}, {}, {}, {}},
      {"mxfp4", {}, "mxfp4", "mxfp4", {"_blocks", "_scales"}, {}, {}, {}, {}},
      {"nvfp4_compressed_tensors", {}, "nvfp4", "nvfp4", {"weight_packed", "weight_scale", "weight_global_scale"}, {}, {}, {}, {}},
      {"nvfp4_modelopt", {}, "nvfp4", "nvfp4", {"weight", "weight_scale", "weight_scale_2"}, {}, {}, {}, {}},
  };
  for (auto& one : cases) {
    auto const directory = golden::root() / "quantized" / one.name;
    one.place = (directory / "ckpt").string();
    one.expected = golden::json_of(directory / "expected.json");
    one.values = wholes_in((directory / "expected.safetensors").string());
    for (auto const& file : golden::files_below(directory / "ckpt", ".safetensors"))
      for (auto const& [name, tensor] : plain::read(file.string()).tensors) {
        one.stored[name] = tensor;
        one.file_of[name] = file.filename().string();
      }
    REQUIRE(one.stored.size() == one.expected["tensors"].size());
  }
  return cases;
}
// The parts of a tensor that are stored; none where it is stored as it is.
std::vector<std::string> parts_of(Case const& one, std::string const& name) {
  std::string stem = name;
  if (stem.ends_with("weight")) stem.resize(stem.size() - 6);
  std::vector<std::string> parts;
  for (auto const& suffix : one.suffixes)
    if (one.stored.contains(stem + suffix)) parts.push_back(stem + suffix);
  if (parts.size() < 2) parts.clear();
  return parts;
}
// What memory of a type should hold: what the case says, where it does.
std::vector<WholeTensor> expected_as(Case const& one, DType dtype) {
  auto tensors = as(one.values, dtype);
  auto const file = fs::path{one.place}.parent_path() / "expected_bf16.safetensors";
  if (dtype == DType::bf16 && fs::exists(file))
    for (auto const& given : wholes_in(file.string()))
      for (auto& tensor : tensors)
        if (tensor.name == given.name) {
          CHECK(tensor.bytes == given.bytes);
          tensor.bytes = given.bytes;
        }
  if (dtype == DType::f16 && one.expected.contains("expected_f16"))
    for (auto const& tensor : tensors) CHECK(dcp::test::sha256(tensor.bytes) == one.expected["expected_f16"][tensor.name]["sha256"].get<std::string>());
  return tensors;
}

}  // namespace

TEST_CASE("every golden checkpoint is what its description says: the files, and the values that belong to them") {
  auto const cases = golden_cases();
  for (auto const& one : cases) {
    CAPTURE(one.name);
    for (auto const& [name, tensor] : one.stored) CHECK(dcp::test::sha256(dcp::as_byte_span(tensor.bytes)) == one.expected["tensors"][name]["sha256"].get<std::string>());
    std::size_t described = 0;
    for (auto const& tensor : one.values)
      if (one.expected["dequantized"].contains(tensor.name)) {
        ++described;
        CHECK(dcp::test::sha256(tensor.bytes) == one.expected["dequantized"][tensor.name]["sha256"].get<std::string>());
      }
    CHECK(described == one.expected["dequantized"].size());
  }
  std::set<std::string> directories;
  for (auto const& entry : fs::directory_iterator{golden::root() / "quantized"}) directories.insert(entry.path().filename().string());
  CHECK(directories.size() == cases.size());
}

TEST_CASE("every golden checkpoint loads into float, bfloat16, half and double in every cut, with its scheme by name and with AnyScheme") {
  auto const cuts = all_cuts();
  for (auto const& one : golden_cases()) {
    CAPTURE(one.name);
    for (DType const dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
      CAPTURE(dtype);
      auto const tensors = expected_as(one, dtype);
      for (std::size_t c = 0; c < cuts.size(); ++c) {
        // With the other of the two only some.
        if (dtype == DType::f32 || c % 4 == 0) check_cut(scheme_called(one.scheme), one.place, tensors, cuts[c]);
        if (dtype != DType::f32 || c % 4 == 0) check_cut(any_scheme(), one.place, tensors, cuts[c]);
      }
    }
  }
}

TEST_CASE("read_once, one thread, little memory and every way to verify give the same values") {
  auto const cuts = all_cuts();
  for (auto const& one : golden_cases()) {
    CAPTURE(one.name);
    for (auto const& cut : cuts) {
      if (cut.ranks != 4 && cut.name != "whole on two") continue;
      Settings settings = lenient;
      settings.read_once = true;
      check_cut(any_scheme(), one.place, one.values, cut, settings);
      settings.verify = dcp::Verify::full;
      check_cut(any_scheme(), one.place, expected_as(one, DType::bf16), cut, settings);
      settings = lenient;
      settings.verify = dcp::Verify::none;
      settings.threads = 1;
      settings.memory_bytes = dcp::least_memory_bytes;
      check_cut(any_scheme(), one.place, one.values, cut, settings);
    }
  }
}

TEST_CASE("load_from_keys and contents list quantized tensors by the names, shapes, schemes, parts and files that they have in a model") {
  dcp::SelfComm self;
  for (auto const& one : golden_cases()) {
    CAPTURE(one.name);
    for (auto const* scheme : {&scheme_called(one.scheme), &any_scheme()}) {
      auto const contents = scheme->contents(self, one.place);
      auto const owned = scheme->owned(self, one.place, {});
      CHECK(contents.warnings.empty());
      CHECK(owned.report().warnings.empty());
      CHECK(owned.tensors().size() == contents.tensors.size());
      std::set<std::string> seen;
      for (auto const& tensor : contents.tensors) {
        CAPTURE(tensor.name);
        seen.insert(tensor.name);
        auto const parts = parts_of(one, tensor.name);
        REQUIRE(owned.tensors().contains(tensor.name));
        auto const& loaded = owned.tensors().at(tensor.name);
        CHECK(loaded.shape() == tensor.shape);
        CHECK(loaded.dtype() == tensor.dtype);
        CHECK(tensor.parts == parts);
        if (parts.empty()) {
          CHECK(tensor.scheme == "");
          CHECK(to_string(tensor.dtype) == one.stored.at(tensor.name).dtype);
          CHECK(tensor.files == std::vector<std::string>{one.file_of.at(tensor.name)});
          CHECK(loaded.bytes().size() == one.stored.at(tensor.name).bytes.size());
          continue;
        }
        CHECK(tensor.scheme == one.text);
        CHECK(tensor.dtype == DType::f32);
        std::vector<std::string> files;
        std::uint64_t bytes = 0;
        for (auto const& part : parts) {
          bytes += one.stored.at(part).bytes.size();
          if (std::find(files.begin(), files.end(), one.file_of.at(part)) == files.end()) files.push_back(one.file_of.at(part));
        }
        CHECK(tensor.files == files);
        CHECK(tensor.stored_bytes == bytes);
        auto const value = std::find_if(one.values.begin(), one.values.end(), [&](auto const& v) { return v.name == tensor.name; });
        REQUIRE(value != one.values.end());
        CHECK(tensor.shape == value->shape);
        CHECK(dcp::Bytes(loaded.bytes().begin(), loaded.bytes().end()) == value->bytes);
      }
      for (auto const& value : one.values) CHECK(seen.contains(value.name));
      for (auto const& name : seen)
        for (auto const& part : parts_of(one, name)) CHECK((part == name || !seen.contains(part)));
    }
  }
}

TEST_CASE("whatever is stored loads as it is stored, by its stored dtype, name and shape, whole and in rows") {
  for (auto const& one : golden_cases()) {
    CAPTURE(one.name);
    std::vector<WholeTensor> stored;
    for (auto const& [name, tensor] : one.stored) stored.push_back(whole_of(name, tensor));
    Settings strict;
    strict.read_once = false;
    check_cut(scheme_called(one.scheme), one.place, stored, {"whole", 2, [](WholeTensor const& t) { return dcp::plain_layout(t.shape); }}, strict);
    check_cut(any_scheme(), one.place, stored, {"rows", 3, [](WholeTensor const& t) { return layout_on({3}, t.shape, {split(t.shape.rank() > 0 ? 0 : -1)}); }}, strict);
  }
}

TEST_CASE("memory with gaps, or with columns first, gets the values and is left alone between them") {
  for (auto const& one : golden_cases()) {
    CAPTURE(one.name);
    for (DType const dtype : {DType::f32, DType::bf16, DType::f64}) {
      CAPTURE(dtype);
      auto const width = static_cast<std::size_t>(dcp::bits_of(dtype) / 8);
      for (bool const columns_first : {false, true}) {
        std::mutex mutex;
        dcp::run_threads(2, [&](dcp::ThreadComm& world) {
          struct Held {
            dcp::Bytes memory, wanted;
          };
          std::vector<Held> held;
          dcp::StateDict state;
          held.reserve(one.values.size());
          for (auto const& tensor : expected_as(one, dtype)) {
            int const rank = tensor.shape.rank();
            auto const layout = layout_on({2}, tensor.shape, {split(columns_first ? rank - 1 : 0)});
            auto const box = dcp::box_of_rank(layout, world.rank()).value();
            dcp::Extents strides = box.shape;
            std::int64_t step = 1;
            for (int i = 0; i < rank; ++i) {
              int const d = columns_first ? i : rank - 1 - i;
              strides[d] = columns_first ? step : 2 * step;
              step *= box.shape[d] + 1;
            }
            auto& one_held = held.emplace_back(Held{dcp::Bytes(static_cast<std::size_t>(2 * step + 2) * width, std::byte{0xEE}), {}});
            one_held.wanted = one_held.memory;
            auto const part = dcp::test::cut_out(tensor.bytes, dtype, tensor.shape, box);
            std::size_t element = 0;
            dcp::test::for_each_element({dcp::Extents::filled(rank, 0), box.shape}, [&](dcp::Extents const& index) {
              std::memcpy(one_held.wanted.data() + static_cast<std::size_t>(dcp::test::linear(index, strides)) * width, part.data() + element++ * width, width);
            });
            state.add_tensor(tensor.name, dtype, layout, {one_held.memory.data(), strides});
          }
          any_scheme().load(world, one.place, state, lenient);
          std::lock_guard const lock{mutex};
          for (auto const& one_held : held) CHECK(one_held.memory == one_held.wanted);
        });
      }
    }
  }
}

TEST_CASE("the report of a load says what was decoded, from what and to what") {
  dcp::SelfComm self;
  std::vector<float> memory(200 * 150);
  dcp::TensorView<float> view{memory, {200, 150}};
  auto const report = dcp::load<dcp::Quantized<dcp::Fp8Block<128>, dcp::SafeTensors>>(self, (golden::root() / "quantized" / "fp8_block128" / "ckpt").string(), {{"model.layers.0.mlp.gate_proj.weight", view}}, {.on_unexpected = dcp::OnUnexpected::ignore});
  CHECK(report.decoded == std::vector<std::string>{"model.layers.0.mlp.gate_proj.weight: fp8_block 128x128 to F32"});
  CHECK(report.unexpected.size() == 3);
  CHECK(report.foreign);
}

TEST_CASE("parts that were saved with checksums, in one file or in shards, are verified while they are decoded, and damage is noticed") {
  for (auto const& one : golden_cases())
    for (auto const layout : {dcp::FileLayout::final, dcp::FileLayout::sharded}) {
      CAPTURE(one.name);
      std::vector<WholeTensor> stored;
      for (auto const& [name, tensor] : one.stored) stored.push_back(whole_of(name, tensor));
      TemporaryDirectory directory;
      std::string const place = directory / "ckpt";
      dcp::run_threads(3, [&](dcp::ThreadComm& world) {
        // What says how others are to be understood is whole.
        HeldTensors held{stored, [](WholeTensor const& t) { return layout_on({3}, t.shape, {split(t.shape.rank() > 0 && !t.name.ends_with("weight_shape") ? 0 : -1)}); }, world.rank(), true};
        dcp::save<dcp::SafeTensors>(world, place, held.state, {.storage = {.layout = layout}});
      });
      fs::copy_file(one.place + "/config.json", place + "/config.json");
      Settings settings = lenient;
      for (auto const& cut : all_cuts()) {
        if (cut.ranks == 3) continue;
        settings.verify = cut.ranks == 2 ? dcp::Verify::full : dcp::Verify::standard;
        check_cut(any_scheme(), place, one.values, cut, settings);
      }
      settings.verify = dcp::Verify::full;
      dcp::run_threads(2, [&](dcp::ThreadComm& world) {
        HeldTensors held{one.values, [](WholeTensor const& t) { return layout_on({2}, t.shape, {split(0)}); }, world.rank(), false};
        auto const report = any_scheme().load(world, place, held.state, settings);
        CHECK(!report.foreign);
        CHECK(report.verified_bytes > 0);
        CHECK(report.unverified_bytes == 0);
      });
      // A bit of the last byte of every file.
      for (auto const& file : golden::files_below(place, ".safetensors")) {
        std::string text = golden::text_of(file);
        text.back() = static_cast<char>(text.back() ^ 4);
        std::ofstream{file, std::ios::binary} << text;
      }
      std::string code;
      dcp::run_threads(2, [&](dcp::ThreadComm& world) {
        HeldTensors held{one.values, [](WholeTensor const& t) { return layout_on({2}, t.shape, {split(-1)}); }, world.rank(), false};
        std::string const mine = golden::outcome([&] { any_scheme().load(world, place, held.state, settings); });
        if (world.rank() == 0) code = mine;
      });
      CHECK((code == "corrupt" || code == "quant_mismatch"));
    }
}

// ---- every spelling

namespace {

struct Spelling {
  std::string name, scheme;   // scheme: what else than AnyScheme can be asked for; empty: the checkpoint has several
  std::function<void(quantized::Model&, Random&)> build;
};
std::vector<Spelling> spellings() {
  using namespace quantized;
  std::string const blocks = R"(,"weight_block_size":[4,6])", usual = R"(,"weight_block_size":[128,128])";
  auto const integers = [](int bits, std::int64_t group, std::string const& more = "") {
    return compressed("pack-quantized", "\"num_bits\":" + std::to_string(bits) + R"(,"type":"int","symmetric":true,"strategy":")" + (group > 0 ? "group\",\"group_size\":" + std::to_string(group) : std::string{"channel\",\"group_size\":null"}) + more);
  };
  auto const gptq = [](int bits, std::int64_t group, std::string const& more = "") {
    return R"({"quantization_config":{"quant_method":"gptq","bits":)" + std::to_string(bits) + ",\"group_size\":" + std::to_string(group) + more + "}}";
  };
  std::string const awq = R"({"quantization_config":{"quant_method":"awq","bits":4,"group_size":8,"zero_point":true,"version":"gemm"}})";
  std::string const int8_groups = compressed("int-quantized", R"("num_bits":8,"type":"int","strategy":"group","group_size":6)"), int8_rows = compressed("int-quantized", R"("num_bits":8,"type":"int","strategy":"channel")");
  std::string const bnb = R"({"quantization_config":{"quant_method":"bitsandbytes","load_in_4bit":true,"bnb_4bit_quant_type":"nf4"}})";
  std::vector<Spelling> list;
  auto const add = [&](std::string name, std::string scheme, std::string config, auto build) {
    list.push_back({std::move(name), std::move(scheme), [config = std::move(config), build](Model& model, Random& random) {
      model.config = config;
      build(model, random);
    }});
  };
  auto const fp8 = [&](std::string name, std::string scheme, std::string config, Fp8 spec, std::string tensor = "a.weight") {
    add(std::move(name), std::move(scheme), std::move(config), [spec, tensor](Model& m, Random& r) { add_fp8(m, r, tensor, spec); });
  };
  auto const fp4 = [&](std::string name, std::string scheme, std::string config, std::string tensor, Fp4 spec) {
    add(std::move(name), std::move(scheme), std::move(config), [spec, tensor](Model& m, Random& r) { add_fp4(m, r, tensor, spec); });
  };
  auto const int8 = [&](std::string name, std::string scheme, std::string config, Int8 spec) {
    add(std::move(name), std::move(scheme), std::move(config), [spec](Model& m, Random& r) { add_int8(m, r, "a.weight", spec); });
  };
  auto const packed = [&](std::string name, std::string config, Packed spec) {
    add(std::move(name), "int4_packed", std::move(config), [spec](Model& m, Random& r) { add_packed(m, r, "a.weight", spec); });
  };
  auto const words = [&](std::string name, std::string config, Transposed spec) {
    add(std::move(name), spec.awq ? "awq" : "gptq", std::move(config), [spec](Model& m, Random& r) { add_transposed(m, r, "a", spec); });
  };
  auto const flat = [&](std::string name, Flat spec) {
    add(std::move(name), "nf4", bnb, [spec](Model& m, Random& r) { add_flat(m, r, "a.weight", spec); });
  };

  // Eight-bit floats in blocks.
  std::string const b46 = "fp8_block 4x6", b128 = "fp8_block 128x128";
  fp8("blocks of 4 x 6, ragged", "fp8_block 4x6", fp8_config(blocks), {.shape = {11, 20}, .rows = 4, .columns = 6, .scheme = b46});
  fp8("blocks of 4 x 6 that fit", "fp8_block 4x6", fp8_config(blocks), {.shape = {8, 12}, .rows = 4, .columns = 6, .scheme = b46});
  fp8("blocks that nothing but the caller knows", "fp8_block 4x6", "", {.shape = {11, 20}, .rows = 4, .columns = 6, .scheme = b46});
  list.back().scheme = "only fp8_block 4x6";
  fp8("blocks of 128 x 128 that are said nowhere", "fp8_block", "", {.shape = {130, 140}, .rows = 128, .columns = 128, .scheme = b128});
  fp8("one block", "fp8_block", fp8_config(usual), {.shape = {5, 7}, .rows = 128, .columns = 128, .scheme = b128});
  fp8("E5M2 codes", "fp8_block 4x6", R"({"quantization_config":{"quant_method":"fp8","fmt":"e5m2","weight_block_size":[4,6]}})", {.shape = {9, 13}, .rows = 4, .columns = 6, .dtype = "F8_E5M2", .scheme = b46});
  for (std::string const dtype : {"F32", "BF16", "F16"}) fp8("codes in " + dtype, "fp8_block 4x6", fp8_config(blocks), {.shape = {9, 13}, .rows = 4, .columns = 6, .dtype = dtype, .scheme = b46});
  fp8("scales in BF16", "fp8_block 4x6", fp8_config(blocks), {.shape = {9, 13}, .rows = 4, .columns = 6, .scale_dtype = "BF16", .scheme = b46});
  fp8("scales in E8M0", "fp8_block 4x6", fp8_config(blocks + R"(,"scale_fmt":"ue8m0")"), {.shape = {9, 64}, .rows = 4, .columns = 6, .scale_dtype = "F8_E8M0", .scheme = b46});
  fp8("fused experts: gate_up_proj_scales_inv", "fp8_block 4x6", fp8_config(blocks), {.shape = {3, 10, 14}, .rows = 4, .columns = 6, .suffix = "_scales_inv", .scheme = b46}, "l.experts.gate_up_proj");
  fp8("weight_scale beside blocks (compressed-tensors)", "fp8_block 4x6", compressed("float-quantized", R"("num_bits":8,"type":"float","strategy":"block","block_structure":[4,6])"), {.shape = {11, 20}, .rows = 4, .columns = 6, .suffix = "_scale", .scale_dtype = "BF16", .scheme = b46});
  fp8("the old spelling of the block", "fp8_block 4x6", compressed("float-quantized", R"("num_bits":8,"type":"float","strategy":"block","block_structure":"4x6")"), {.shape = {11, 20}, .rows = 4, .columns = 6, .suffix = "_scale", .scheme = b46});
  fp8("groups of a row", "", compressed("float-quantized", R"("num_bits":8,"type":"float","strategy":"group","group_size":6)"), {.shape = {5, 20}, .rows = 1, .columns = 6, .suffix = "_scale", .scheme = "fp8_block 1x6"});
  fp8("dense DeepSeek-V4: .scale in E8M0", "fp8_block", fp8_config(usual + R"(,"scale_fmt":"ue8m0")"), {.shape = {130, 64}, .rows = 128, .columns = 128, .scale_dtype = "F8_E8M0", .scheme = b128, .scale_name = "layers.0.attn.wo_a.scale"}, "layers.0.attn.wo_a.weight");
  fp4("experts of DeepSeek-V4: I8 with .scale in E8M0", "mxfp4", R"({"expert_dtype":"fp4","quantization_config":{"quant_method":"fp8","scale_fmt":"ue8m0","weight_block_size":[128,128]}})", "layers.0.ffn.experts.1.w1.weight", {.shape = {6, 96}, .data_name = "layers.0.ffn.experts.1.w1.weight", .data_dtype = "I8", .scale_name = "layers.0.ffn.experts.1.w1.scale", .scale_dtype = "F8_E8M0"});
  add("both in one checkpoint", "", fp8_config(usual + R"(,"scale_fmt":"ue8m0")"), [b128](Model& m, Random& r) {
    add_fp8(m, r, "wo.weight", {.shape = {130, 64}, .rows = 128, .columns = 128, .scale_dtype = "F8_E8M0", .scheme = b128, .scale_name = "wo.scale"});
    add_fp4(m, r, "w1.weight", {.shape = {6, 96}, .data_name = "w1.weight", .data_dtype = "I8", .scale_name = "w1.scale", .scale_dtype = "F8_E8M0"});
  });

  // One scale for a tensor, and for each row.
  fp8("a scale for the tensor, no dimension", "fp8_tensor", R"({"quantization_config":{"quant_method":"modelopt","quant_algo":"FP8"}})", {.shape = {5, 9}, .suffix = "_scale", .scheme = "fp8_tensor"});
  fp8("a scale for the tensor, [1], BF16", "fp8_tensor", "", {.shape = {5, 9}, .suffix = "_scale", .scale_dtype = "BF16", .scheme = "fp8_tensor", .scale_shape = {1}});
  fp8("a scale for the tensor, F16, of E5M2", "fp8_tensor", "", {.shape = {5, 9}, .suffix = "_scale", .scale_dtype = "F16", .dtype = "F8_E5M2", .scheme = "fp8_tensor", .scale_shape = {1}});
  fp8("a scale for a vector", "fp8_tensor", "", {.shape = {37}, .suffix = "_scale", .scheme = "fp8_tensor"}, "a.k");
  fp8("a scale for each row, [R, 1]", "fp8_channel", compressed("float-quantized", R"("num_bits":8,"type":"float","strategy":"channel")"), {.shape = {7, 10}, .rows = 1, .suffix = "_scale", .scale_dtype = "BF16", .scheme = "fp8_channel"});
  fp8("a scale for each row, [R]", "fp8_channel", compressed("float-quantized", R"("num_bits":8,"type":"float","strategy":"channel")"), {.shape = {7, 10}, .rows = 1, .suffix = "_scale", .scheme = "fp8_channel", .scale_shape = {7}});
  fp8("a scale for each row of three matrices", "fp8_channel", "", {.shape = {3, 7, 10}, .rows = 1, .suffix = "_scale", .scale_dtype = "F16", .scheme = "fp8_channel"});
  fp8("a scale for each of as many rows as a block has", "fp8_channel", compressed("float-quantized", R"("num_bits":8,"type":"float","strategy":"channel")"), {.shape = {1, 10}, .rows = 1, .suffix = "_scale", .scheme = "fp8_channel"});

  fp8("no rows", "fp8_block 4x6", fp8_config(blocks), {.shape = {0, 20}, .rows = 4, .columns = 6, .scheme = b46});

  // Powers of two for 32 columns.
  std::string const mxfp8 = compressed("mxfp8-quantized", R"("num_bits":8,"type":"float","strategy":"group","group_size":32)"), mxfp4 = compressed("mxfp4-pack-quantized", R"("num_bits":4,"type":"float","strategy":"group","group_size":32)");
  fp8("MXFP8, scales called U8", "mxfp8", mxfp8, {.shape = {6, 96}, .rows = 1, .columns = 32, .suffix = "_scale", .scale_dtype = "U8", .scheme = "mxfp8"});
  fp8("MXFP8, scales in E8M0, no configuration", "mxfp8", "", {.shape = {6, 96}, .rows = 1, .columns = 32, .suffix = "_scale", .scale_dtype = "F8_E8M0", .scheme = "mxfp8"});
  fp8("MXFP8 of experts", "mxfp8", mxfp8, {.shape = {2, 3, 64}, .rows = 1, .columns = 32, .suffix = "_scale", .scale_dtype = "U8", .scheme = "mxfp8"});
  fp4("gpt-oss: _blocks and _scales", "mxfp4", R"({"quantization_config":{"quant_method":"mxfp4"}})", "l.experts.gate_up_proj", {.shape = {2, 5, 96}, .data_name = "l.experts.gate_up_proj_blocks", .scale_name = "l.experts.gate_up_proj_scales", .blocks = true});
  fp4("gpt-oss without a configuration", "mxfp4", "", "l.experts.down_proj", {.shape = {2, 5, 32}, .data_name = "l.experts.down_proj_blocks", .scale_name = "l.experts.down_proj_scales", .blocks = true});
  fp4("gpt-oss as first published: .blocks and .scales", "mxfp4", "", "block.0.mlp.mlp1_weight", {.shape = {3, 4, 64}, .data_name = "block.0.mlp.mlp1_weight.blocks", .scale_name = "block.0.mlp.mlp1_weight.scales", .blocks = true});
  fp4("weight_packed and weight_scale", "mxfp4", mxfp4, "a.weight", {.shape = {7, 64}, .data_name = "a.weight_packed", .scale_name = "a.weight_scale"});
  fp4("weight in F4 with scales in E8M0", "mxfp4", "", "a.weight", {.shape = {7, 64}, .data_name = "a.weight", .data_dtype = "F4", .scale_name = "a.weight_scale", .scale_dtype = "F8_E8M0"});
  fp4("weight in U8 with scales in U8", "mxfp4", "", "a.weight", {.shape = {7, 64}, .data_name = "a.weight", .scale_name = "a.weight_scale"});

  // NVFP4.
  std::string const nvfp4 = compressed("nvfp4-pack-quantized", R"("num_bits":4,"type":"float","strategy":"tensor_group","group_size":16,"scale_dtype":"torch.float8_e4m3fn")"), modelopt = R"({"quantization_config":{"quant_method":"modelopt","quant_algo":"NVFP4","group_size":16}})";
  fp4("NVFP4 of compressed-tensors", "nvfp4", nvfp4, "a.weight", {.shape = {6, 48}, .data_name = "a.weight_packed", .scale_name = "a.weight_scale", .second_name = "a.weight_global_scale", .divide = true, .second_shape = {1}});
  fp4("NVFP4 of ModelOpt", "nvfp4", modelopt, "a.weight", {.shape = {6, 48}, .data_name = "a.weight", .scale_name = "a.weight_scale", .second_name = "a.weight_scale_2", .second_shape = {}});
  fp4("NVFP4 of ModelOpt in F4, no configuration", "nvfp4", "", "a.weight", {.shape = {3, 2, 16}, .data_name = "a.weight", .data_dtype = "F4", .scale_name = "a.weight_scale", .second_name = "a.weight_scale_2", .second_shape = {1}});

  // Integers of eight bits.
  int8("integers, a scale for each row", "int8_channel", int8_rows, {.shape = {7, 10}});
  int8("integers with zero points", "int8_channel", int8_rows, {.shape = {7, 10}, .zeros = true, .scale_dtype = "F32"});
  int8("integers, scales [R] in half precision", "int8_channel", "", {.shape = {7, 10}, .scale_dtype = "F16", .flat_scale = true});
  int8("integers of three matrices", "int8_channel", "", {.shape = {2, 7, 10}, .zeros = true});
  int8("integers, a scale for the tensor", "int8_channel", "", {.shape = {7, 10}, .group = -1});
  int8("integers, a scale and a zero point for the tensor", "int8_channel", "", {.shape = {7, 10}, .group = -1, .zeros = true});
  int8("integers in groups", "int8_group", int8_groups, {.shape = {5, 20}, .group = 6, .scheme = "int8_group 6"});
  int8("integers in groups with zero points", "int8_group", int8_groups, {.shape = {5, 20}, .group = 6, .zeros = true, .scheme = "int8_group 6"});
  int8("integers in groups of a size that is said nowhere", "int8_group", "", {.shape = {5, 24}, .group = 8, .scheme = "int8_group 8"});
  for (bool const format : {false, true})
    add(format ? "bitsandbytes, eight bits, with weight_format" : "bitsandbytes, eight bits", "int8_channel", R"({"quantization_config":{"quant_method":"bitsandbytes","load_in_8bit":true}})", [format](Model& m, Random& r) { add_scb(m, r, "a.", {6, 11}, format); });

  // Integers of a few bits in words.
  for (int const bits : {1, 2, 4, 8}) {
    std::string const text = "int" + std::to_string(bits) + "_packed group 16";
    packed(std::to_string(bits) + " bits, symmetric", integers(bits, 16), {.shape = {9, 64}, .bits = bits, .group = 16, .scheme = text});
    packed(std::to_string(bits) + " bits with zero points, ragged", integers(bits, 16), {.shape = {13, 40}, .bits = bits, .group = 16, .zeros = true, .scale_dtype = "F32", .scheme = text});
  }
  for (int const bits : {3, 5, 6, 7}) {
    packed(std::to_string(bits) + " bits, dense", integers(bits, 16), {.shape = {5, 64}, .bits = bits, .group = 16, .scheme = "int" + std::to_string(bits) + "_packed group 16"});
    packed(std::to_string(bits) + " bits, whole codes in a word", integers(bits, 16), {.shape = {5, 64}, .bits = bits, .group = 16, .low = true, .scheme = "int" + std::to_string(bits) + "_packed group 16"});
  }
  packed("4 bits, a scale for each row", integers(4, 0), {.shape = {9, 37}, .scheme = "int4_packed channel"});
  packed("4 bits, a scale and a zero point for each row", integers(4, 0), {.shape = {9, 37}, .zeros = true, .scale_dtype = "F16", .scheme = "int4_packed channel"});
  packed("4 bits of three matrices", integers(4, 16), {.shape = {3, 9, 32}, .group = 16, .zeros = true, .scheme = "int4_packed group 16"});
  packed("4 bits without a configuration", "", {.shape = {9, 64}, .group = 16, .scheme = "int4_packed group 16"});
  packed("4 bits, columns in any group", integers(4, 16, R"(,"actorder":"group")"), {.shape = {9, 64}, .group = 16, .index = 1, .scheme = "int4_packed group 16"});
  packed("4 bits, columns in any group, with zero points", integers(4, 16, R"(,"actorder":"group")"), {.shape = {9, 64}, .group = 16, .zeros = true, .index = 1, .scheme = "int4_packed group 16"});
  packed("4 bits, an index that is not used", integers(4, 16), {.shape = {9, 64}, .group = 16, .index = 2, .scheme = "int4_packed group 16"});

  packed("4 bits, no rows", integers(4, 16), {.shape = {0, 64}, .group = 16, .scheme = "int4_packed group 16"});

  // GPTQ and AWQ.
  words("GPTQ, 4 bits", gptq(4, 32), {.scheme = "gptq 4 bits group 32"});
  words("GPTQ, 4 bits, version 2", gptq(4, 32, R"(,"checkpoint_format":"gptq_v2")"), {.stored_zero = 0, .scheme = "gptq 4 bits group 32"});
  words("GPTQ, 4 bits, act-order", gptq(4, 16, R"(,"desc_act":true)"), {.group = 16, .act_order = true, .scheme = "gptq 4 bits group 16 act-order"});
  words("GPTQ, 8 bits", gptq(8, 16), {.outputs = 20, .inputs = 40, .group = 16, .bits = 8, .scheme = "gptq 8 bits group 16"});
  words("GPTQ, 2 bits", gptq(2, 16), {.outputs = 32, .inputs = 48, .group = 16, .bits = 2, .scheme = "gptq 2 bits group 16"});
  words("GPTQ, 8 bits, act-order, scales in BF16", gptq(8, 16, R"(,"desc_act":true)"), {.outputs = 20, .inputs = 40, .group = 16, .bits = 8, .act_order = true, .scale_dtype = "BF16", .scheme = "gptq 8 bits group 16 act-order"});
  words("GPTQ, one group", gptq(4, -1), {.group = 64, .scheme = "gptq 4 bits group 64"});
  words("GPTQ without g_idx, scales in F32", gptq(4, 32), {.index = false, .scale_dtype = "F32", .scheme = "gptq 4 bits group 32"});
  words("GPTQ, a last group that is not full", gptq(4, 24), {.outputs = 8, .inputs = 64, .group = 24, .scheme = "gptq 4 bits group 24"});
  words("GPTQ that nothing but the caller knows", "", {.index = false, .scheme = "gptq 4 bits group 32"});
  list.back().scheme = "only gptq";
  words("AWQ", awq, {.outputs = 24, .inputs = 40, .group = 8, .awq = true, .scheme = "awq 4 bits group 8"});
  words("AWQ that nothing but the caller knows", "", {.outputs = 24, .inputs = 40, .group = 8, .awq = true, .scheme = "awq 4 bits group 8"});
  list.back().scheme = "only awq";

  // bitsandbytes' four bits.
  flat("nf4, rows of whole blocks", {.shape = {6, 128}});
  flat("nf4, rows of whole blocks, nested", {.shape = {6, 128}, .nested = true, .nested_block = 4});
  flat("nf4, rows that are no whole blocks", {.shape = {7, 50}});
  flat("nf4, rows that are no whole blocks, nested", {.shape = {13, 50}, .nested = true, .nested_block = 3});
  flat("nf4, an odd number of elements", {.shape = {3, 111}, .block = 32});
  flat("nf4, rows that begin inside a byte", {.shape = {20, 33}, .block = 32, .nested = true});
  flat("nf4, fewer elements than a block", {.shape = {3, 5}, .block = 4096});
  flat("nf4 of three matrices", {.shape = {2, 3, 64}, .block = 32});
  flat("nf4 of a vector", {.shape = {150}, .nested = true, .nested_block = 1});
  flat("fp4", {.shape = {6, 128}, .type = "fp4"});
  flat("fp4, rows that are no whole blocks", {.shape = {7, 50}, .nested = true, .type = "fp4"});
  flat("nf4 whose bytes are called BF16", {.shape = {6, 128}, .storage = "BF16"});
  flat("nf4 whose bytes are called BF16, rows that are no whole blocks", {.shape = {10, 50}, .nested = true, .storage = "BF16"});
  return list;
}

}  // namespace

TEST_CASE("law: every spelling of every scheme loads as its formula says, bit for bit, in any cut, whatever files its parts lie in") {
  auto const list = spellings();
  CHECK(list.size() > 70);
  std::uint64_t const first = dcp::test::first_seed();
  dcp::SelfComm self;
  for (std::size_t s = 0; s < list.size(); ++s) {
    auto const& one = list[s];
    CAPTURE(one.name);
    std::uint64_t const seed = first + s;
    CAPTURE(seed);
    for (std::size_t const files : {std::size_t{1}, std::size_t{3}}) {
      CAPTURE(files);
      Random random{seed};
      quantized::Model model;
      one.build(model, random);
      model.put("a.bias", "F32", {3}, std::vector<float>{1, 2, 3});
      TemporaryDirectory directory;
      model.write(directory.path(), files);
      std::vector<WholeTensor> values;
      for (auto const& [name, value] : model.values) values.push_back(value);
      bool const only = one.scheme.starts_with("only ");
      Scheme const& named = scheme_called(only ? one.scheme.substr(5) : one.scheme);
      std::vector<Scheme const*> schemes{&named};
      if (!only && !one.scheme.empty()) schemes.push_back(&any_scheme());
      for (auto const* scheme : schemes) {
        std::map<std::string, std::string> found;
        for (auto const& tensor : scheme->contents(self, directory.path()).tensors) found[tensor.name] = tensor.scheme;
        auto expected = model.schemes;
        expected["a.bias"] = "";
        CHECK(found == expected);
        check_cut(*scheme, directory.path(), values, {"whole", 1, [](WholeTensor const& t) { return dcp::plain_layout(t.shape); }});
        check_cut(*scheme, directory.path(), as(values, DType::bf16), any_cut(random));
        check_cut(*scheme, directory.path(), as(values, DType::f16), any_cut(random));
        check_cut(*scheme, directory.path(), as(values, DType::f64), any_cut(random));
        for (int cut = 0; cut < 4; ++cut) check_cut(*scheme, directory.path(), values, any_cut(random));
      }
    }
  }
}

TEST_CASE("tensors of many tiles load as their formulas say, in rows, in columns and flat, with little memory") {
  using namespace quantized;
  std::uint64_t const seed = dcp::test::first_seed();
  CAPTURE(seed);
  Random random{seed};
  Model model;
  add_fp8(model, random, "a.weight", {.shape = {700, 1500}, .rows = 128, .columns = 128, .scheme = ""});
  add_fp4(model, random, "b.weight", {.shape = {3, 200, 1600}, .data_name = "b.weight_packed", .scale_name = "b.weight_scale"});
  add_packed(model, random, "c.weight", {.shape = {1001, 1000}, .group = 125, .zeros = true, .scheme = ""});
  add_flat(model, random, "d.weight", {.shape = {1003, 1001}, .nested = true});
  add_flat(model, random, "e.weight", {.shape = {800, 1024}, .nested = true});
  add_int8(model, random, "f.weight", {.shape = {3, 300000}, .zeros = true});
  Model words;
  words.config = R"({"quantization_config":{"quant_method":"gptq","bits":4,"group_size":128,"desc_act":true}})";
  add_transposed(words, random, "a", {.outputs = 808, .inputs = 1280, .group = 128, .act_order = true});
  Model awq;
  awq.config = R"({"quantization_config":{"quant_method":"awq","bits":4,"group_size":128,"version":"gemm"}})";
  add_transposed(awq, random, "a", {.outputs = 808, .inputs = 1280, .group = 128, .awq = true});
  Settings settings = lenient;
  settings.memory_bytes = dcp::least_memory_bytes;
  for (auto const* one : {&model, &words, &awq}) {
    TemporaryDirectory directory;
    one->write(directory.path());
    std::vector<WholeTensor> values;
    for (auto const& [name, value] : one->values) values.push_back(value);
    for (auto const& cut : all_cuts())
      if (cut.ranks == 3 || cut.name == "whole") check_cut(any_scheme(), directory.path(), values, cut, settings);
    check_cut(any_scheme(), directory.path(), as(values, DType::bf16), any_cut(random), settings);
  }
}

TEST_CASE("codes that are NaN stay NaN, and what overflows float is infinite") {
  using namespace quantized;
  Random random{1};
  Model model;
  add_fp8(model, random, "a.weight", {.shape = {2, 4}, .suffix = "_scale", .scheme = "", .scale_shape = {1}});
  model.tensors.at("a.weight").bytes[3] = 0x7f;
  model.tensors.at("a.weight").bytes[4] = static_cast<char>(0xff);
  model.put("b.weight_packed", "U8", {1, 16}, std::vector<std::uint8_t>(16, 0x47));   // 6 and 2
  model.put("b.weight_scale", "U8", {1, 1}, std::vector<std::uint8_t>{254});
  TemporaryDirectory directory;
  model.write(directory.path());
  dcp::SelfComm self;
  auto const owned = any_scheme().owned(self, directory.path(), {});
  auto const a = owned.tensors().at("a.weight").as<float>(), b = owned.tensors().at("b.weight").as<float>();
  for (std::size_t i = 0; i < a.size(); ++i) CHECK(std::isnan(a[i]) == (i == 3 || i == 4));
  for (std::size_t i = 0; i < b.size(); ++i) CHECK(b[i] == INFINITY);
  std::vector<dcp::bf16> narrow(8);
  dcp::TensorView<dcp::bf16> view{narrow, {2, 4}};
  dcp::load<dcp::Quantized<dcp::AnyScheme, dcp::SafeTensors>>(self, directory.path(), {{"a.weight", view}}, {.on_unexpected = dcp::OnUnexpected::ignore});
  for (std::size_t i = 0; i < narrow.size(); ++i) CHECK(std::isnan(static_cast<float>(narrow[i])) == (i == 3 || i == 4));
}

TEST_CASE("the configuration is found in quantize_config.json and hf_quant_config.json too, and config.json goes first") {
  using namespace quantized;
  Random random{5};
  dcp::SelfComm self;
  auto const scheme_in = [&](Model const& model, std::string const& more = {}) {
    TemporaryDirectory directory;
    model.write(directory.path());
    if (!more.empty()) std::ofstream{directory / "config.json"} << more;
    auto const owned = any_scheme().owned(self, directory.path(), {});
    for (auto const& [name, value] : model.values) {
      auto const bytes = owned.tensors().at(name).bytes();
      CHECK(dcp::Bytes(bytes.begin(), bytes.end()) == value.bytes);
    }
    return any_scheme().contents(self, directory.path()).tensors.at(0).scheme;
  };
  Model gptq;
  gptq.config_name = "quantize_config.json";
  gptq.config = R"({"bits":4,"group_size":16,"desc_act":false,"checkpoint_format":"gptq_v2"})";
  add_transposed(gptq, random, "a", {.group = 16, .stored_zero = 0});
  CHECK(scheme_in(gptq) == "gptq 4 bits group 16");
  CHECK(scheme_in(gptq, R"({"model_type":"llama"})") == "gptq 4 bits group 16");
  Model words;
  words.config_name = "quantize_config.json";
  words.config = R"({"bits":4,"group_size":16,"checkpoint_format":"gptq_v2"})";
  add_transposed(words, random, "a", {.group = 16});
  CHECK(scheme_in(words, R"({"quantization_config":{"quant_method":"gptq","bits":4,"group_size":16}})") == "gptq 4 bits group 16");
  Model modelopt;
  modelopt.config_name = "hf_quant_config.json";
  modelopt.config = R"({"producer":{"name":"modelopt"},"quantization":{"quant_algo":"NVFP4","group_size":16,"exclude_modules":["lm_head"]}})";
  add_fp4(modelopt, random, "a.weight", {.shape = {6, 48}, .data_name = "a.weight", .scale_name = "a.weight_scale", .second_name = "a.weight_scale_2", .second_shape = {}});
  CHECK(scheme_in(modelopt) == "nvfp4");
}
