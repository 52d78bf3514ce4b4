// SPDX-License-Identifier: Apache-2.0
// Quantized checkpoints that do not fit together: what is wrong is said, of which tensor, and nothing crashes. (Q..: numbers in the catalogue of inputs
// that tests/formats follows too.)
#include <dcp/dcp.hpp>

#include "formats/golden.hpp"
#include "support/any_quantized.hpp"
#include "support/outcome.hpp"
#include "support/quantized_models.hpp"
#include "support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <optional>

using dcp::test::any_scheme;
using dcp::test::Random;
using dcp::test::scheme_called;
using dcp::test::TemporaryDirectory;
using namespace dcp::test::quantized;

namespace {

std::string const mismatch = "quant_mismatch";

struct Refusal {
  std::string what;
  std::function<void(Model&)> build;
  std::vector<std::string> says;   // the names and words that the error has
  std::string code = mismatch;
  bool when_read = false;          // it is in the numbers, which headers do not show: contents() is content
  std::string scheme = "any";
};

std::string text_of(std::optional<dcp::Error> const& error) { return error ? std::string{to_string(error->code())} + ": " + error->what() : "ok"; }

void check(std::vector<Refusal> const& refusals) {
  dcp::SelfComm self;
  for (auto const& one : refusals) {
    CAPTURE(one.what);
    Model model;
    one.build(model);
    TemporaryDirectory directory;
    model.write(directory.path());
    auto const& scheme = scheme_called(one.scheme);
    auto const loaded = dcp::test::error_of([&] { scheme.owned(self, directory.path(), {}); }), listed = dcp::test::error_of([&] { scheme.contents(self, directory.path()); });
    std::string const text = text_of(loaded);
    CAPTURE(text);
    CHECK(text.starts_with(one.code));
    for (auto const& part : one.says) {
      auto const& shown_part = part;
      CAPTURE(shown_part);
      CHECK(text.find(part) != std::string::npos);
    }
    std::string const text_of_contents = text_of(listed);
    CAPTURE(text_of_contents);
    CHECK(text_of_contents.starts_with(one.when_read ? std::string{"ok"} : one.code));
  }
}

// Good parts, to break.
Random& numbers() {
  static Random random{7};
  return random;
}
auto fp8(Fp8 const& spec, std::string const& config, std::function<void(Model&)> const& change = {}) {
  return [=](Model& m) {
    m.config = config;
    add_fp8(m, numbers(), "a.weight", spec);
    if (change) change(m);
  };
}
auto fp4(Fp4 const& spec, std::string const& config, std::function<void(Model&)> const& change = {}) {
  return [=](Model& m) {
    m.config = config;
    add_fp4(m, numbers(), "a.weight", spec);
    if (change) change(m);
  };
}
auto int8(Int8 const& spec, std::string const& config, std::function<void(Model&)> const& change = {}) {
  return [=](Model& m) {
    m.config = config;
    add_int8(m, numbers(), "a.weight", spec);
    if (change) change(m);
  };
}
auto packed(Packed const& spec, std::string const& config, std::function<void(Model&)> const& change = {}) {
  return [=](Model& m) {
    m.config = config;
    add_packed(m, numbers(), "a.weight", spec);
    if (change) change(m);
  };
}
auto words(Transposed const& spec, std::string const& config, std::function<void(Model&)> const& change = {}) {
  return [=](Model& m) {
    m.config = config;
    add_transposed(m, numbers(), "a", spec);
    if (change) change(m);
  };
}
auto flat(Flat const& spec, std::function<void(Model&)> const& change = {}) {
  return [=](Model& m) {
    add_flat(m, numbers(), "a.weight", spec);
    if (change) change(m);
  };
}

// Ways to break them.
std::function<void(Model&)> without(std::string const& name) {
  return [=](Model& m) { CHECK(m.tensors.erase(name) == 1); };
}
std::function<void(Model&)> reshaped(std::string const& name, Shape const& shape) {
  return [=](Model& m) {
    auto& tensor = m.tensors.at(name);
    std::size_t const each = tensor.bytes.size() / count_of(tensor.shape);
    tensor.shape = shape;
    tensor.bytes.resize(each * count_of(shape), tensor.bytes.empty() ? '\1' : tensor.bytes[0]);
  };
}
std::function<void(Model&)> called(std::string const& name, std::string const& dtype) {
  return [=](Model& m) { m.tensors.at(name).dtype = dtype; };
}
template <class T>
std::function<void(Model&)> with(std::string const& name, std::size_t element, T value) {
  return [=](Model& m) { std::memcpy(m.tensors.at(name).bytes.data() + element * sizeof value, &value, sizeof value); };
}
std::function<void(Model&)> as_new(std::string const& name, std::string const& from) {
  return [=](Model& m) { m.tensors[name] = m.tensors.at(from); };
}
std::function<void(Model&)> state_says(std::string const& key, nlohmann::json const& value) {
  return [=](Model& m) {
    auto& tensor = m.tensors.at("a.weight.quant_state.bitsandbytes__nf4");
    auto state = nlohmann::json::parse(tensor.bytes);
    if (value.is_discarded()) state.erase(key);
    else state[key] = value;
    tensor.bytes = state.dump();
    tensor.shape = {static_cast<std::int64_t>(tensor.bytes.size())};
  };
}
std::function<void(Model&)> state_is(std::string const& text) {
  return [=](Model& m) {
    auto& tensor = m.tensors.at("a.weight.quant_state.bitsandbytes__nf4");
    tensor.bytes = text;
    tensor.shape = {static_cast<std::int64_t>(text.size())};
  };
}
std::function<void(Model&)> shape_says(Shape const& shape) {
  return [=](Model& m) { m.put("a.weight_shape", "I64", {static_cast<std::int64_t>(shape.size())}, shape); };
}

std::string const in_blocks = fp8_config(R"(,"weight_block_size":[4,6])"), fp8_rows = compressed("float-quantized", R"("num_bits":8,"type":"float","strategy":"channel")");
std::string const int8_groups = compressed("int-quantized", R"("num_bits":8,"type":"int","strategy":"group","group_size":6)");
std::string const int4_groups = compressed("pack-quantized", R"("num_bits":4,"type":"int","strategy":"group","group_size":16)");
std::string const int4_ordered = compressed("pack-quantized", R"("num_bits":4,"type":"int","strategy":"group","group_size":16,"actorder":"group")");
std::string const gptq_config = R"({"quantization_config":{"quant_method":"gptq","bits":4,"group_size":16}})", gptq_ordered = R"({"quantization_config":{"quant_method":"gptq","bits":4,"group_size":16,"desc_act":true}})";
std::string const awq_config = R"({"quantization_config":{"quant_method":"awq","bits":4,"group_size":8,"version":"gemm"}})";
Fp8 const blocks{.shape = {11, 20}, .rows = 4, .columns = 6, .scheme = "fp8_block 4x6"};
Fp8 const blocks_e8m0{.shape = {11, 20}, .rows = 4, .columns = 6, .scale_dtype = "F8_E8M0", .scheme = "fp8_block 4x6"};
Fp8 const tensor_scale{.shape = {5, 9}, .suffix = "_scale", .scheme = "fp8_tensor", .scale_shape = {1}};
Fp8 const row_scales{.shape = {7, 10}, .rows = 1, .suffix = "_scale", .scheme = "fp8_channel"};
Fp8 const mxfp8{.shape = {6, 96}, .rows = 1, .columns = 32, .suffix = "_scale", .scale_dtype = "U8", .scheme = "mxfp8"};
Fp4 const gpt_oss{.shape = {2, 5, 96}, .data_name = "a.weight_blocks", .scale_name = "a.weight_scales", .blocks = true};
Fp4 const mxfp4{.shape = {7, 64}, .data_name = "a.weight_packed", .scale_name = "a.weight_scale"};
Fp4 const nvfp4_divided{.shape = {6, 48}, .data_name = "a.weight_packed", .scale_name = "a.weight_scale", .second_name = "a.weight_global_scale", .divide = true, .second_shape = {1}};
Fp4 const nvfp4{.shape = {6, 48}, .data_name = "a.weight", .scale_name = "a.weight_scale", .second_name = "a.weight_scale_2", .second_shape = {}};
Packed const int4{.shape = {9, 64}, .group = 16}, int4_zeros{.shape = {9, 64}, .group = 16, .zeros = true}, int4_index{.shape = {9, 64}, .group = 16, .index = 1};
Transposed const gptq{.group = 16}, awq{.outputs = 24, .inputs = 40, .group = 8, .awq = true};
float const infinity = std::numeric_limits<float>::infinity(), not_a_number = std::numeric_limits<float>::quiet_NaN();

}  // namespace

TEST_CASE("parts that are missing are named (Q01)") {
  std::string const mxfp4_config = R"({"quantization_config":{"quant_method":"mxfp4"}})";
  check({
      {"codes without a scale", fp8(blocks, in_blocks, without("a.weight_scale_inv")), {"a.weight ", "a.weight_scale_inv"}},
      {"a scale without codes", fp8(blocks, in_blocks, without("a.weight")), {"a.weight_scale_inv"}},
      {"weight_scale without codes", fp8(row_scales, fp8_rows, without("a.weight")), {"a.weight_scale"}},
      {"blocks without scales", fp4(gpt_oss, mxfp4_config, without("a.weight_scales")), {"a.weight_blocks", "a.weight_scales"}},
      {"packed codes without a scale", fp4(mxfp4, "", without("a.weight_scale")), {"a.weight_packed", "a.weight_scale"}},
      {"packed integers without a scale", packed(int4, int4_groups, without("a.weight_scale")), {"a.weight_packed", "a.weight_scale"}},
      {"packed integers without their shape", packed(int4, int4_groups, without("a.weight_shape")), {"a.weight_packed", "a.weight_shape"}},
      {"zero points without codes", packed(int4_zeros, int4_groups, without("a.weight_packed")), {"a.weight_scale", "a.weight_zero_point"}},
      {"GPTQ without zero points", words(gptq, gptq_config, without("a.qzeros")), {"a.qweight", "a.qzeros"}},
      {"GPTQ without scales", words(gptq, gptq_config, without("a.scales")), {"a.qweight", "a.scales"}},
      {"GPTQ without codes", words(gptq, gptq_config, without("a.qweight")), {"a.qzeros"}},
      {"AWQ without zero points", words(awq, awq_config, without("a.qzeros")), {"a.qweight", "a.qzeros"}},
      {"nf4 without absmax", flat({.shape = {6, 128}}, without("a.weight.absmax")), {"a.weight ", "a.weight.absmax"}},
      {"nf4 without its table", flat({.shape = {6, 128}}, without("a.weight.quant_map")), {"a.weight ", "a.weight.quant_map"}},
      {"nested nf4 without the outer scales", flat({.shape = {6, 128}, .nested = true}, without("a.weight.nested_absmax")), {"a.weight ", "a.weight.nested_absmax"}},
      {"nested nf4 without the outer table", flat({.shape = {6, 128}, .nested = true}, without("a.weight.nested_quant_map")), {"a.weight ", "a.weight.nested_quant_map"}},
  });
}

TEST_CASE("grids of scales that do not fit, and numbers of the wrong type, are refused (Q02, Q05)") {
  check({
      {"a row short", fp8(blocks, in_blocks, reshaped("a.weight_scale_inv", {2, 4})), {"a.weight_scale_inv [2, 4]", "[3, 4]"}},
      {"a row long", fp8(blocks, in_blocks, reshaped("a.weight_scale_inv", {4, 4})), {"a.weight_scale_inv", "[3, 4]"}},
      {"a column short", fp8(blocks, in_blocks, reshaped("a.weight_scale_inv", {3, 3})), {"a.weight_scale_inv", "[3, 4]"}},
      {"a column long", fp8(blocks, in_blocks, reshaped("a.weight_scale_inv", {3, 5})), {"a.weight_scale_inv", "[3, 4]"}},
      {"columns first", fp8(blocks, in_blocks, reshaped("a.weight_scale_inv", {4, 3})), {"a.weight_scale_inv", "[3, 4]"}},
      {"three dimensions", fp8(blocks, in_blocks, reshaped("a.weight_scale_inv", {1, 3, 4})), {"a.weight_scale_inv"}},
      {"a size that is said nowhere", fp8(blocks, ""), {"a.weight_scale_inv", "said nowhere"}},
      {"rows short", fp8(row_scales, fp8_rows, reshaped("a.weight_scale", {6, 1})), {"a.weight_scale"}},
      {"rows long", fp8(row_scales, fp8_rows, reshaped("a.weight_scale", {8})), {"a.weight_scale"}},
      {"MXFP8, a column short", fp8(mxfp8, "", reshaped("a.weight_scale", {6, 2})), {"a.weight_scale"}},
      {"integers, rows short", int8({.shape = {7, 10}}, "", reshaped("a.weight_scale", {6, 1})), {"a.weight_scale", "[7, 1]"}},
      {"integers, a zero point short", int8({.shape = {7, 10}, .zeros = true}, "", reshaped("a.weight_zero_point", {6, 1})), {"a.weight_zero_point", "[7, 1]"}},
      {"integers, a group long", int8({.shape = {5, 20}, .group = 6}, int8_groups, reshaped("a.weight_scale", {5, 5})), {"a.weight_scale", "[5, 4]"}},
      {"SCB short", [](Model& m) { add_scb(m, numbers(), "a.", {6, 11}, true); m.tensors.at("a.SCB").shape = {5}; m.tensors.at("a.SCB").bytes.resize(20); }, {"a.SCB", "[6]"}},
      {"scales that are integers", fp8(blocks, in_blocks, called("a.weight_scale_inv", "I32")), {"a.weight_scale_inv", "I32"}},
      {"bytes that no configuration calls powers of two", fp8(blocks_e8m0, in_blocks, called("a.weight_scale_inv", "U8")), {"a.weight_scale_inv", "U8"}},
      {"one scale that is an integer", fp8(tensor_scale, "", called("a.weight_scale", "U32")), {"a.weight_scale", "U32"}},
      {"MXFP4 with scales that are codes", fp4(mxfp4, "", called("a.weight_scale", "F8_E4M3")), {"a.weight_scale", "F8_E4M3"}},
      {"integers with scales that are integers", int8({.shape = {7, 10}, .scale_dtype = "F32"}, "", called("a.weight_scale", "I32")), {"a.weight_scale", "I32"}},
      {"zero points that are unsigned", int8({.shape = {7, 10}, .zeros = true}, "", called("a.weight_zero_point", "U8")), {"a.weight_zero_point", "U8"}},
      {"GPTQ's scales as integers", words(gptq, gptq_config, called("a.scales", "I16")), {"a.scales", "I16"}},
      {"GPTQ's codes as floats", words(gptq, gptq_config, called("a.qweight", "F32")), {"a.qweight", "F32"}},
      {"AWQ's zero points as floats", words(awq, awq_config, called("a.qzeros", "F32")), {"a.qzeros", "F32"}},
      {"codes of a tensor without dimensions", [](Model& m) {
         m.put("a.weight", "I8", {}, std::vector<char>{1});
         m.put("a.weight_scale", "F32", {}, std::vector<float>{1});
       }, {"a.weight "}},
  });
}

TEST_CASE("scales that are NaN, infinite, negative or zero where the scheme has none are refused by name (Q03, Q06)") {
  std::vector<Refusal> list;
  auto const bad = [&](std::string const& what, std::string const& name, auto build, std::vector<float> const& values) {
    for (float const value : values) list.push_back({what + ": " + std::to_string(value), build(with(name, 0, value)), {name}, mismatch, true});
  };
  std::vector<float> const all{infinity, -infinity, not_a_number, -1.0f, 0.0f}, but_zero{infinity, not_a_number, -1.0f};
  bad("blocks", "a.weight_scale_inv", [](auto change) { return fp8(blocks, in_blocks, change); }, all);
  bad("tensor", "a.weight_scale", [](auto change) { return fp8(tensor_scale, "", change); }, all);
  bad("rows", "a.weight_scale", [](auto change) { return fp8(row_scales, fp8_rows, change); }, all);
  bad("integers", "a.weight_scale", [](auto change) { return int8({.shape = {7, 10}, .scale_dtype = "F32"}, "", change); }, all);
  bad("packed", "a.weight_scale", [](auto change) { return packed({.shape = {9, 64}, .group = 16, .scale_dtype = "F32"}, int4_groups, change); }, all);
  bad("SCB", "a.SCB", [](auto change) { return [change](Model& m) { add_scb(m, numbers(), "a.", {6, 11}, true); change(m); }; }, but_zero);
  bad("global scale", "a.weight_global_scale", [](auto change) { return fp4(nvfp4_divided, "", change); }, all);
  bad("second scale", "a.weight_scale_2", [](auto change) { return fp4(nvfp4, "", change); }, all);
  bad("GPTQ", "a.scales", [](auto change) { return words({.group = 16, .scale_dtype = "F32"}, gptq_config, change); }, but_zero);
  bad("AWQ", "a.scales", [](auto change) { return words({.outputs = 24, .inputs = 40, .group = 8, .awq = true, .scale_dtype = "F32"}, awq_config, change); }, but_zero);
  bad("absmax", "a.weight.absmax", [](auto change) { return flat({.shape = {6, 128}}, change); }, {infinity, not_a_number});
  bad("quant_map", "a.weight.quant_map", [](auto change) { return flat({.shape = {6, 128}}, change); }, {infinity, not_a_number});
  bad("nested_absmax", "a.weight.nested_absmax", [](auto change) { return flat({.shape = {6, 128}, .nested = true}, change); }, {infinity, not_a_number});
  bad("nested_quant_map", "a.weight.nested_quant_map", [](auto change) { return flat({.shape = {6, 128}, .nested = true}, change); }, {infinity, not_a_number});
  for (auto& one : list)
    if (one.what.starts_with("absmax") || one.what.starts_with("quant_map") || one.what.starts_with("nested")) one.says = {"a.weight"};
  std::uint8_t const none = 255, nan = 0x7f, negative = 0xb8;
  list.push_back({"E8M0 255 in blocks", fp8(blocks_e8m0, in_blocks, with("a.weight_scale_inv", 0, none)), {"a.weight_scale_inv", "NaN"}, mismatch, true});
  list.push_back({"E8M0 255 in MXFP8", fp8(mxfp8, "", with("a.weight_scale", 0, none)), {"a.weight_scale", "NaN"}, mismatch, true});
  list.push_back({"E8M0 255 in MXFP4", fp4(mxfp4, "", with("a.weight_scale", 3, none)), {"a.weight_scale", "NaN"}, mismatch, true});
  list.push_back({"E8M0 255 in blocks of gpt-oss", fp4(gpt_oss, "", with("a.weight_scales", 29, none)), {"a.weight_scales", "NaN"}, mismatch, true});
  list.push_back({"E4M3 NaN in NVFP4", fp4(nvfp4, "", with("a.weight_scale", 5, nan)), {"a.weight_scale", "NaN"}, mismatch, true});
  list.push_back({"a negative E4M3 in NVFP4", fp4(nvfp4_divided, "", with("a.weight_scale", 5, negative)), {"a.weight_scale", "-1"}, mismatch, true});
  check(list);
}

TEST_CASE("MXFP4 and NVFP4 whose blocks do not fit are refused (Q08, Q09, Q10)") {
  check({
      {"15 bytes in a block", fp4(gpt_oss, "", reshaped("a.weight_blocks", {2, 5, 3, 15})), {"a.weight_blocks", "16"}},
      {"no dimension but the block", fp4(gpt_oss, "", reshaped("a.weight_blocks", {16})), {"a.weight_blocks"}},
      {"scales short", fp4(gpt_oss, "", reshaped("a.weight_scales", {2, 5, 2})), {"a.weight_scales", "[2, 5, 3]"}},
      {"scales of two dimensions", fp4(gpt_oss, "", reshaped("a.weight_scales", {10, 3})), {"a.weight_scales", "[2, 5, 3]"}},
      {"48 columns", fp4(mxfp4, "", [](Model& m) { reshaped("a.weight_packed", {7, 24})(m); reshaped("a.weight_scale", {7, 1})(m); }), {"a.weight_packed", "48 columns"}},
      {"an odd number of F4", [](Model& m) {
         m.put("a.weight", "F4", {2, 31}, std::vector<char>(31));
         m.put("a.weight_scale", "F8_E8M0", {2, 1}, std::vector<char>(2));
       }, {"a.weight "}},
      {"NVFP4, scales short", fp4(nvfp4, "", reshaped("a.weight_scale", {6, 2})), {"a.weight_scale", "[6, 3]"}},
      {"NVFP4, scales long", fp4(nvfp4_divided, "", reshaped("a.weight_scale", {6, 4})), {"a.weight_scale", "[6, 3]"}},
      {"NVFP4, 40 columns", fp4(nvfp4, "", reshaped("a.weight", {6, 20})), {"a.weight ", "40 columns"}},
      {"NVFP4, no global scale", fp4(nvfp4_divided, "", without("a.weight_global_scale")), {"a.weight_scale"}},
      {"NVFP4, no second scale", fp4(nvfp4, "", without("a.weight_scale_2")), {"a.weight_scale"}},
      {"NVFP4, two global scales", fp4(nvfp4_divided, "", reshaped("a.weight_global_scale", {2})), {"a.weight_global_scale"}},
      {"NVFP4, a global scale that is an integer", fp4(nvfp4_divided, "", called("a.weight_global_scale", "I32")), {"a.weight_global_scale", "I32"}},
      {"NVFP4, both spellings of it", fp4(nvfp4_divided, "", as_new("a.weight_scale_2", "a.weight_global_scale")), {"a.weight_packed", "a.weight_global_scale", "a.weight_scale_2"}},
  });
}

TEST_CASE("packed integers whose shape, words, groups or index do not fit are refused (Q11, Q12, Q13, Q14)") {
  std::string const three_bits = compressed("pack-quantized", R"("num_bits":3,"type":"int","strategy":"channel")"), whole_group = compressed("pack-quantized", R"("num_bits":4,"type":"int","strategy":"group","group_size":32)");
  std::int64_t const most = std::numeric_limits<std::int64_t>::max();
  check({
      {"a shape of floats", packed(int4, int4_groups, called("a.weight_shape", "F64")), {"a.weight_shape", "F64"}},
      {"a shape of three", packed(int4, int4_groups, shape_says({9, 64, 1})), {"a.weight_shape"}},
      {"a shape of one", packed(int4, int4_groups, shape_says({576})), {"a.weight_shape"}},
      {"a shape of nothing", packed(int4, int4_groups, shape_says({})), {"a.weight_shape"}},
      {"a shape of ten thousand", packed(int4, int4_groups, shape_says(Shape(10'000, 1))), {"a.weight_shape"}},
      {"a negative shape", packed(int4, int4_groups, shape_says({9, -64})), {"a.weight_shape", "negative"}},
      {"a shape beyond 63 bits", packed(int4, int4_groups, shape_says({most, most})), {"a.weight_shape"}},
      {"as many columns as there can be", packed(int4, int4_groups, shape_says({1, most})), {"a.weight"}},
      {"as many columns as there can be, of rows that are there", packed({.shape = {1, 64}, .group = 16}, int4_groups, shape_says({1, most})), {"a.weight"}},
      {"other rows", packed(int4, int4_groups, shape_says({10, 64})), {"a.weight_shape", "[10, 64]"}},
      {"more columns than words", packed(int4, int4_groups, shape_says({9, 65})), {"a.weight_packed", "65 codes"}},
      {"more words than columns", packed(int4, int4_groups, shape_says({9, 56})), {"a.weight_packed", "56 codes"}},
      {"three bits in either of two ways", packed({.shape = {5, 12}, .bits = 3}, three_bits), {"a.weight_packed", "two ways"}},
      {"zero points of three bits", packed({.shape = {5, 64}, .bits = 3}, three_bits, [](Model& m) { m.put("a.weight_zero_point", "I32", {1, 1}, std::vector<int>{0}); }), {"a.weight_zero_point"}},
      {"groups of another size", packed(int4, whole_group), {"a.weight_scale", "32 columns"}},
      {"a group short", packed(int4, int4_groups, reshaped("a.weight_scale", {9, 3})), {"a.weight_scale", "[9, 4]"}},
      {"a row short", packed(int4, int4_groups, reshaped("a.weight_scale", {8, 4})), {"a.weight_scale", "[9, 4]"}},
      {"no group", packed(int4, int4_groups, reshaped("a.weight_scale", {9, 0})), {"a.weight_scale"}},
      {"scales of one dimension", packed(int4, int4_groups, reshaped("a.weight_scale", {36})), {"a.weight_scale"}},
      {"zero points short", packed(int4_zeros, int4_groups, reshaped("a.weight_zero_point", {1, 4})), {"a.weight_zero_point", "[2, 4]"}},
      {"zero points that are bytes", packed(int4_zeros, int4_groups, [](Model& m) { m.put("a.weight_zero_point", "I8", {9, 4}, std::vector<char>(36)); }), {"a.weight_zero_point", "I8"}},
      {"an index that is short", packed(int4_index, int4_ordered, reshaped("a.weight_g_idx", {63})), {"a.weight_g_idx", "[64]"}},
      {"an index of other integers", packed(int4_index, int4_ordered, called("a.weight_g_idx", "U32")), {"a.weight_g_idx", "U32"}},
      {"an index beyond the groups", packed(int4_index, int4_ordered, with("a.weight_g_idx", 5, 4)), {"a.weight_g_idx", "group 4"}, mismatch, true},
      {"a negative index", packed(int4_index, int4_ordered, with("a.weight_g_idx", 63, -1)), {"a.weight_g_idx", "group -1"}, mismatch, true},
  });
}

TEST_CASE("GPTQ and AWQ that do not fit, or are layouts that nobody here reads, are refused (Q14, Q16, Q17, Q20)") {
  auto const config = [](std::string const& method, std::string const& more) { return R"({"quantization_config":{"quant_method":")" + method + "\"," + more + "}}"; };
  check({
      {"an index that is short", words(gptq, gptq_config, reshaped("a.g_idx", {63})), {"a.g_idx", "[64]"}},
      {"an index of other integers", words(gptq, gptq_config, called("a.g_idx", "U32")), {"a.g_idx", "U32"}},
      {"an index beyond the groups", words(gptq, gptq_ordered, with("a.g_idx", 5, 4)), {"a.g_idx", "group 4"}, mismatch, true},
      {"a negative index", words(gptq, gptq_ordered, with("a.g_idx", 5, -1)), {"a.g_idx", "group -1"}, mismatch, true},
      {"an index as large as there can be", words(gptq, gptq_ordered, with("a.g_idx", 0, std::numeric_limits<std::int32_t>::max())), {"a.g_idx"}, mismatch, true},
      {"zero points too narrow", words(gptq, gptq_config, reshaped("a.qzeros", {4, 1})), {"a.qzeros", "[4, 2]"}},
      {"zero points too wide", words(gptq, gptq_config, reshaped("a.qzeros", {4, 3})), {"a.qzeros", "[4, 2]"}},
      {"scales too narrow", words(gptq, gptq_config, reshaped("a.scales", {4, 15})), {"a.scales", "[4, 16]"}},
      {"a group short", words(gptq, gptq_config, reshaped("a.scales", {3, 16})), {"a.scales", "[4, 16]"}},
      {"codes of three dimensions", words(gptq, gptq_config, reshaped("a.qweight", {8, 4, 4})), {"a.qweight"}},
      {"scales of one dimension", words(gptq, gptq_config, reshaped("a.scales", {64})), {"a.scales"}},
      {"fifteen outputs", words(gptq, gptq_config, [](Model& m) { reshaped("a.qweight", {8, 15})(m); reshaped("a.scales", {4, 15})(m); }), {"a.qweight", "15 outputs"}},
      {"three bits", words(gptq, config("gptq", R"("bits":3,"group_size":16)")), {"a.qweight", "3 bits"}, "unsupported"},
      {"a format that is not known", words(gptq, config("gptq", R"("bits":4,"group_size":16,"checkpoint_format":"marlin")")), {"marlin"}, "unsupported"},
      {"AWQ in the layout of gemv", words(awq, config("awq", R"("bits":4,"group_size":8,"version":"gemv")")), {"gemv"}, "unsupported"},
      {"AWQ of eight bits", words(awq, config("awq", R"("bits":8,"group_size":8)")), {"8"}, "unsupported"},
      {"AWQ, inputs that are no whole groups", words({.outputs = 24, .inputs = 44, .group = 8, .awq = true}, awq_config), {"a.qweight", "44 inputs"}},
      {"AWQ, a group short", words(awq, awq_config, reshaped("a.scales", {4, 24})), {"a.scales", "[5, 24]"}},
      {"AWQ, an output short", words(awq, awq_config, reshaped("a.scales", {5, 23})), {"a.scales", "[5, 24]"}},
      {"AWQ, zero points short", words(awq, awq_config, reshaped("a.qzeros", {5, 2})), {"a.qzeros", "[5, 3]"}},
      {"AWQ that the configuration calls GPTQ", words(awq, gptq_config), {"a.scales"}},
      {"GPTQ that the configuration calls AWQ", words(gptq, awq_config), {"a.scales"}},
      {"neither is said", words(gptq, ""), {"a.qweight", "config.json"}},
      {"a method that nobody knows", words(gptq, config("turbo", R"("bits":4)")), {"turbo", "config.json"}, "unsupported"},
      {"a configuration that is no JSON", words(gptq, "{"), {"config.json"}, "bad_json"},
      {"no bits", words(gptq, config("gptq", R"("bits":0)")), {"bits", "config.json"}, "bad_schema"},
      {"blocks of no row", fp8(blocks, fp8_config(R"(,"weight_block_size":[0,6])")), {"weight_block_size"}, "bad_schema"},
      {"blocks of one number", fp8(blocks, fp8_config(R"(,"weight_block_size":[4])")), {"weight_block_size"}, "bad_schema"},
      {"groups of no column", packed(int4, compressed("pack-quantized", R"("num_bits":4,"type":"int","strategy":"group","group_size":0)")), {"group_size"}, "bad_schema"},
  });
}

TEST_CASE("bitsandbytes' tensors whose state is wrong are refused (Q18, Q19)") {
  Flat const plain{.shape = {6, 128}}, nested{.shape = {6, 128}, .nested = true, .nested_block = 4};
  std::string const state = "a.weight.quant_state.bitsandbytes__nf4";
  nlohmann::json const gone(nlohmann::json::value_t::discarded);
  std::vector<Refusal> list{
      {"no JSON", flat(plain, state_is("nf4")), {state}, "bad_json"},
      {"no object", flat(plain, state_is("[]")), {state}, "bad_schema"},
      {"nothing", flat(plain, state_is("")), {state}, "bad_json"},
      {"100,000 bytes", flat(plain, state_is(std::string(100'000, ' '))), {"a.weight"}},
      {"no shape", flat(plain, state_says("shape", gone)), {state, "shape"}, "bad_schema"},
      {"a shape that is a number", flat(plain, state_says("shape", 7)), {"shape"}, "bad_schema"},
      {"a shape of floats", flat(plain, state_says("shape", {6.5, 128})), {state}, "bad_schema"},
      {"another shape", flat(plain, state_says("shape", {6, 127})), {"a.weight ", "[6, 127]"}},
      {"a negative shape", flat(plain, state_says("shape", {-6, -128})), {"a.weight ", "negative"}},
      {"a shape beyond 63 bits", flat(plain, state_says("shape", {std::int64_t{1} << 40, std::int64_t{1} << 40})), {"a.weight "}},
      {"blocks of nothing", flat(plain, state_says("blocksize", 0)), {"a.weight ", "blocks of 0"}},
      {"blocks of 63", flat(plain, state_says("blocksize", 63)), {"a.weight ", "blocks of 63"}},
      {"blocks of 16", flat(plain, state_says("blocksize", 16)), {"a.weight ", "blocks of 16"}},
      {"blocks of 8192", flat(plain, state_says("blocksize", 8192)), {"a.weight ", "blocks of 8192"}},
      {"negative blocks", flat(plain, state_says("blocksize", -64)), {"a.weight ", "blocks of -64"}},
      {"blocks of another size", flat(plain, state_says("blocksize", 128)), {"a.weight.absmax", "6 numbers"}},
      {"a type that nobody knows", flat(plain, state_says("quant_type", "nf5")), {state, "nf5"}, "unsupported"},
      {"a table of 15", flat(plain, reshaped("a.weight.quant_map", {15})), {"a.weight.quant_map", "[16]"}},
      {"a table of integers", flat(plain, called("a.weight.quant_map", "I32")), {"a.weight.quant_map", "I32"}},
      {"scales of integers", flat(plain, called("a.weight.absmax", "I32")), {"a.weight.absmax", "I32"}},
      {"a scale short", flat(plain, reshaped("a.weight.absmax", {11})), {"a.weight.absmax", "12 numbers"}},
      {"codes short", flat(plain, reshaped("a.weight", {383, 1})), {"a.weight ", "384 bytes"}},
      {"codes that are halves of bytes", flat(plain, [](Model& m) { m.tensors.at("a.weight").dtype = "F4"; m.tensors.at("a.weight").shape = {6, 128}; }), {"a.weight "}},
      {"nested, outer scales short", flat(nested, reshaped("a.weight.nested_absmax", {2})), {"a.weight.nested_absmax", "[3]"}},
      {"nested, a table of 255", flat(nested, reshaped("a.weight.nested_quant_map", {255})), {"a.weight.nested_quant_map", "[256]"}},
      {"nested, outer blocks of nothing", flat(nested, state_says("nested_blocksize", 0)), {"a.weight "}},
      {"nested, no outer blocks", flat(nested, state_says("nested_blocksize", gone)), {state, "nested_blocksize"}, "bad_schema"},
      {"nested, no offset", flat(nested, state_says("nested_offset", gone)), {state, "nested_offset"}, "bad_schema"},
      {"nested, an offset beyond float", flat(nested, state_says("nested_offset", 1e200)), {"a.weight "}},
  };
  for (int const format : {1, 2, 3, 255})
    list.push_back({"weight_format " + std::to_string(format), [format](Model& m) {
                      add_scb(m, numbers(), "a.", {6, 11}, true);
                      m.tensors.at("a.weight_format").bytes[0] = static_cast<char>(format);
                    }, {"a.weight_format", std::to_string(format)}, "unsupported"});
  check(list);
}

TEST_CASE("another scheme than the one that was asked for is refused, and said") {
  std::vector<std::pair<std::string, std::string>> const golden{{"awq_int4", "awq"}, {"fp8_block128", "fp8_block"}, {"fp8_per_channel", "fp8_channel"}, {"fp8_per_tensor", "fp8_tensor"}, {"gptq_int4", "gptq"}, {"int4_pack_quantized", "int4_packed"},
                                                            {"int8_per_channel", "int8_channel"}, {"mxfp4", "mxfp4"}, {"nvfp4_modelopt", "nvfp4"}};
  std::vector<std::string> const schemes{"fp8_block", "fp8_tensor", "fp8_channel", "mxfp8", "mxfp4", "nvfp4", "int8_channel", "int8_group", "int4_packed", "gptq", "awq", "nf4"};
  dcp::SelfComm self;
  for (auto const& one : golden)
    for (auto const& other : schemes) {
      if (other == one.second) continue;
      std::string const shown = one.first + " as " + other;
      CAPTURE(shown);
      auto const error = dcp::test::error_of([&] { scheme_called(other).owned(self, (golden::root() / "quantized" / one.first / "ckpt").string(), {}); });
      std::string const text = text_of(error);
      CAPTURE(text);
      CHECK(text.starts_with(mismatch));
      CHECK(text.find(other + " was asked for") != std::string::npos);
      CHECK(text.find("model.layers.0.") != std::string::npos);
      CHECK(text.find("AnyScheme") != std::string::npos);
    }
  check({
      {"other blocks", fp8(blocks, in_blocks), {"a.weight: ", "4 x 6", "128 x 128 was asked for"}, mismatch, false, "fp8_block"},
      {"two schemes", [](Model& m) {
         m.config = in_blocks;
         add_fp8(m, numbers(), "a.weight", blocks);
         add_fp4(m, numbers(), "b.weight", {.shape = {7, 64}, .data_name = "b.weight_packed", .scale_name = "b.weight_scale"});
       }, {"b.weight: ", "mxfp4", "fp8_block was asked for"}, mismatch, false, "fp8_block 4x6"},
  });
}

TEST_CASE("one error lists everything that does not fit together, and all ranks have it") {
  Model model;
  model.config = in_blocks;
  add_fp8(model, numbers(), "a.weight", blocks);
  add_fp8(model, numbers(), "b.weight", blocks);
  add_fp8(model, numbers(), "c.weight", blocks);
  add_fp8(model, numbers(), "good.weight", blocks);
  add_fp4(model, numbers(), "d.weight", {.shape = {7, 64}, .data_name = "d.weight_packed", .scale_name = "d.weight_scale"});
  without("a.weight_scale_inv")(model);
  reshaped("b.weight_scale_inv", {3, 3})(model);
  without("c.weight")(model);
  reshaped("d.weight_scale", {7, 3})(model);
  TemporaryDirectory directory;
  model.write(directory.path(), 2);
  dcp::run_threads(3, [&](dcp::ThreadComm& world) {
    auto const error = dcp::test::error_of([&] { any_scheme().load(world, directory.path(), {}, {.on_unexpected = dcp::OnUnexpected::ignore}); });
    std::string const text = text_of(error);
    CAPTURE(text);
    CHECK(text.starts_with(mismatch));
    for (char const* name : {"a.weight ", "b.weight_scale_inv", "c.weight_scale_inv", "d.weight_scale"}) CHECK(text.find(name) != std::string::npos);
    CHECK(text.find("good") == std::string::npos);
  });
}

TEST_CASE("a bad scale is an error on all ranks, whoever reads it, and not at all where nobody does") {
  Model model;
  model.config = in_blocks;
  add_fp8(model, numbers(), "a.weight", blocks);
  add_fp8(model, numbers(), "b.weight", blocks);
  with("b.weight_scale_inv", 11, not_a_number)(model);   // of the last rows and columns
  TemporaryDirectory directory;
  model.write(directory.path());
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    std::vector<float> a(220), rows(world.rank() == 0 ? 120 : 100);
    dcp::DeviceMesh<1> const mesh{world, {2}};
    dcp::ShardedTensor<float, dcp::Placement<dcp::Shard<0>>> b{mesh, {11, 20}, std::span<float>{rows}};
    auto const error = dcp::test::error_of([&] { any_scheme().load(world, directory.path(), {{"b.weight", b}}, {.on_unexpected = dcp::OnUnexpected::ignore}); });
    CHECK(text_of(error).find("b.weight_scale_inv") != std::string::npos);
    dcp::TensorView<float> view{a, {11, 20}};
    CHECK(!dcp::test::error_of([&] { any_scheme().load(world, directory.path(), {{"a.weight", view}}, {.on_unexpected = dcp::OnUnexpected::ignore}); }));
  });
}

TEST_CASE("an index that says any order, where the configuration says none, is followed where all groups are read, and refused where a cut shows it") {
  Model model;
  model.config = gptq_config;
  add_transposed(model, numbers(), "a", {.outputs = 16, .inputs = 32, .group = 16, .act_order = true});
  with("a.g_idx", 0, 1)(model);
  TemporaryDirectory directory;
  model.write(directory.path());
  dcp::SelfComm self;
  CHECK(!dcp::test::error_of([&] { scheme_called("gptq").owned(self, directory.path(), {}); }));
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    std::vector<float> columns(16 * 16);
    dcp::ShardedTensor<float, dcp::Placement<dcp::Shard<1>>> tensor{dcp::DeviceMesh<1>{world, {2}}, {16, 32}, std::span<float>{columns}};
    std::string const text = text_of(dcp::test::error_of([&] { scheme_called("gptq").load(world, directory.path(), {{"a.weight", tensor}}, {}); }));
    CHECK(text.starts_with(mismatch));
    CHECK(text.find("a.g_idx") != std::string::npos);
  });
}

TEST_CASE("a quantized tensor does not become integers, nor another shape, and must be asked for") {
  Model model;
  model.config = in_blocks;
  add_fp8(model, numbers(), "a.weight", blocks);
  TemporaryDirectory directory;
  model.write(directory.path());
  std::vector<std::byte> memory(220 * 8);
  auto const outcome = [&](std::string const& name, dcp::DType dtype, dcp::Extents const& shape, dcp::OnDType on_dtype = dcp::OnDType::error) {
    std::string code;
    dcp::run_threads(1, [&](dcp::ThreadComm& world) {
      dcp::StateDict state;
      state.add_tensor(name, dtype, dcp::plain_layout(shape), {memory.data(), dcp::row_major_strides(shape)});
      code = golden::outcome([&] { any_scheme().load(world, directory.path(), state, {.on_dtype = on_dtype}); });
    });
    return code;
  };
  using dcp::DType;
  CHECK(outcome("a.weight", DType::f64, {11, 20}) == "ok");
  CHECK(outcome("a.weight", DType::f8_e4m3, {11, 20}) == "ok");
  for (auto const dtype : {DType::i32, DType::u8, DType::boolean}) CHECK(outcome("a.weight", dtype, {11, 20}, dcp::OnDType::cast) == "dtype_mismatch");
  CHECK(outcome("a.weight", DType::f32, {20, 11}) == "shape_mismatch");
  CHECK(outcome("a.weight", DType::f8_e4m3, {20, 11}) == "shape_mismatch");
  CHECK(outcome("b.weight", DType::f32, {11, 20}) == "missing_entry");
  CHECK(outcome("a.weight_scale_inv", DType::f32, {3, 4}) == "ok");   // a part stands for its tensor
}

TEST_CASE("what only looks like a part of something quantized loads as it is") {
  Model model;
  model.put("a.weight", "BF16", {2, 2}, std::vector<std::uint16_t>{1, 2, 3, 4});
  model.put("a.weight_scale", "F32", {1}, std::vector<float>{2});   // kept beside a weight in full precision
  model.put("b_blocks", "U8", {2, 16}, std::vector<char>(32));
  model.put("c.scales", "F16", {2}, std::vector<std::uint16_t>{1, 2});
  model.put("d.weight", "U8", {2, 2}, std::vector<char>(4));
  model.put("e.weight", "I8", {2, 2}, std::vector<char>(4));
  model.put("f.input_scale", "F32", {}, std::vector<float>{2});
  model.put("g.k_scale", "F32", {1}, std::vector<float>{2});
  TemporaryDirectory directory;
  model.write(directory.path());
  dcp::SelfComm self;
  auto const contents = any_scheme().contents(self, directory.path());
  CHECK(contents.tensors.size() == model.tensors.size());
  for (auto const& tensor : contents.tensors) CHECK(tensor.scheme == "");
  CHECK(contents.warnings.empty());
  auto const named = scheme_called("mxfp4").contents(self, directory.path());
  REQUIRE(named.warnings.size() == 1);
  CHECK(named.warnings[0].find("no quantized tensor") != std::string::npos);
}

TEST_CASE("a tensor that is there twice, quantized and not, is refused") {
  check({
      {"packed and plain", packed(int4, int4_groups, [](Model& m) { m.put("a.weight", "F32", {1}, std::vector<float>{1}); }), {"a.weight: ", "twice"}},
      {"GPTQ and plain", words(gptq, gptq_config, [](Model& m) { m.put("a.weight", "F32", {1}, std::vector<float>{1}); }), {"a.weight: ", "twice"}},
      {"GPTQ and packed", words(gptq, gptq_config, [](Model& m) { add_packed(m, numbers(), "a.weight", int4); }), {"a.weight: ", "twice"}},
  });
}

TEST_CASE("law: whatever is changed in a quantized checkpoint, it loads or is refused by an Error, and contents and load agree on what it holds") {
  std::vector<std::function<void(Model&)>> const good{
      fp8(blocks, in_blocks), fp8(blocks_e8m0, in_blocks), fp8(tensor_scale, ""), fp8(row_scales, fp8_rows), fp8(mxfp8, ""), fp4(gpt_oss, ""), fp4(mxfp4, ""), fp4(nvfp4_divided, ""), fp4(nvfp4, ""),
      int8({.shape = {7, 10}, .zeros = true}, ""), int8({.shape = {5, 20}, .group = 6, .zeros = true}, int8_groups), packed(int4_zeros, int4_groups), packed(int4_index, int4_ordered),
      packed({.shape = {5, 64}, .bits = 3, .group = 16}, compressed("pack-quantized", R"("num_bits":3,"type":"int","strategy":"group","group_size":16)")), words(gptq, gptq_config), words(gptq, gptq_ordered), words(awq, awq_config),
      flat({.shape = {6, 128}}), flat({.shape = {7, 50}, .nested = true, .nested_block = 4}), [](Model& m) { add_scb(m, numbers(), "a.", {6, 11}, true); }};
  std::vector<std::string> const dtypes{"U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BOOL", "I16", "F16", "BF16", "I32", "U32", "F32", "I64", "F64", "F4"};
  std::map<std::string, std::int64_t> const bits{{"F4", 4}, {"U8", 8}, {"I8", 8}, {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"BOOL", 8}, {"I16", 16}, {"F16", 16}, {"BF16", 16}, {"I32", 32}, {"U32", 32}, {"F32", 32}, {"I64", 64}, {"F64", 64}};
  std::uint64_t const first = dcp::test::first_seed();
  dcp::SelfComm self;
  int loaded = 0, refused = 0;
  for (std::uint64_t round = 0; round < 400; ++round) {
    std::uint64_t const seed = first + round;
    CAPTURE(seed);
    Random random{seed};
    Model model;
    good[static_cast<std::size_t>(round) % good.size()](model);
    for (auto changes = random.between(1, 2); changes > 0; --changes) {
      std::vector<std::string> names;
      for (auto const& [name, tensor] : model.tensors) names.push_back(name);
      if (names.empty()) break;
      auto const name = random.any_of(names);
      auto& tensor = model.tensors.at(name);
      switch (random.between(0, 6)) {
        case 0: model.tensors.erase(name); break;
        case 1: case 2: {   // the same bytes as something else
          std::string const dtype = random.any_of(dtypes);
          auto const elements = static_cast<std::int64_t>(tensor.bytes.size()) * 8 / bits.at(dtype);
          if (elements * bits.at(dtype) != static_cast<std::int64_t>(tensor.bytes.size()) * 8) break;
          if (!tensor.shape.empty() && elements % std::max<std::int64_t>(1, tensor.shape[0]) == 0 && tensor.shape[0] > 0) tensor.shape = {tensor.shape[0], elements / tensor.shape[0]};
          else tensor.shape = {elements};
          tensor.dtype = dtype;
          break;
        }
        case 3: {   // other sizes
          if (tensor.shape.empty()) break;
          auto& size = tensor.shape[static_cast<std::size_t>(random.between(0, static_cast<std::int64_t>(tensor.shape.size()) - 1))];
          size = std::max<std::int64_t>(0, size + random.between(-2, 2));
          tensor.bytes.resize(count_of(tensor.shape) * static_cast<std::size_t>(bits.at(tensor.dtype)) / 8);
          break;
        }
        case 4: std::reverse(tensor.shape.begin(), tensor.shape.end()); break;
        case 5: {   // other bytes
          for (int i = 0; i < 4 && !tensor.bytes.empty(); ++i) tensor.bytes[static_cast<std::size_t>(random.between(0, static_cast<std::int64_t>(tensor.bytes.size()) - 1))] = static_cast<char>(random.between(0, 255));
          break;
        }
        default: {   // another number in the configuration
          std::vector<std::size_t> digits;
          for (std::size_t i = 0; i < model.config.size(); ++i)
            if (model.config[i] >= '0' && model.config[i] <= '9') digits.push_back(i);
          if (!digits.empty()) model.config[random.any_of(digits)] = static_cast<char>('0' + random.between(0, 9));
          break;
        }
      }
    }
    TemporaryDirectory directory;
    model.write(directory.path());
    auto const listed = dcp::test::error_of([&] { any_scheme().contents(self, directory.path()); });
    auto const error = dcp::test::error_of([&] { any_scheme().owned(self, directory.path(), {}); });
      if (listed) CHECK(text_of(error) == text_of(listed));   // before anything is read
    if (error) CHECK(to_string(error->code()) != "unknown");
    ++(error ? refused : loaded);
  }
  CHECK(loaded > 20);
  CHECK(refused > 50);
}
