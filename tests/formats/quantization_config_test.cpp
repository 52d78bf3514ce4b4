// SPDX-License-Identifier: Apache-2.0
#include <dcp/formats/quantization_config.hpp>

#include "golden.hpp"

#include <doctest/doctest.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

using namespace dcp;
using namespace dcp::quantization;
using golden::outcome;
using namespace std::string_literals;
using Names = std::vector<std::string>;
using Block = std::array<std::int64_t, 2>;

namespace {

Config parse(std::string const& object) {
  auto const config = parse_config(as_byte_span(R"({"architectures":["X"],"quantization_config":)" + object + "}"));
  REQUIRE(config);
  return *config;
}
std::string outcome_of(std::string const& object) {
  return outcome([&] { parse(object); });
}
std::string message_of(std::string const& object) {
  try {
    parse(object);
  } catch (Error const& error) {
    return error.message();
  }
  return {};
}
bool contains(std::string const& text, std::string_view part) { return text.find(part) != std::string::npos; }

/// A configuration of `method` with further members.
std::string of(std::string const& method, std::string const& more = {}) { return R"({"quant_method":")" + method + '"' + (more.empty() ? "" : ',' + more) + '}'; }
std::string gptq(std::string const& more) { return of("gptq", more); }
std::string fp8(std::string const& more) { return of("fp8", more); }
std::string with_groups(std::string const& groups) { return of("compressed-tensors", R"("format":"pack-quantized","config_groups":)" + groups); }
std::string with_weights(std::string const& members) { return with_groups(R"({"group_0":{"targets":["Linear"],"weights":{)" + members + "}}}"); }
Group group_of(std::string const& members) { return parse(with_weights(members)).groups.at(0); }

// The quantization_config of compressed-tensors as its 0.9 writes it, one member per line of its weights.
std::string compressed(std::string const& format, std::string const& bits, std::string const& type, std::string const& strategy, std::string const& group_size) {
  return R"({"config_groups": {"group_0": {"input_activations": null, "output_activations": null, "targets": ["Linear"], "weights": {"actorder": null, )"
         R"("block_structure": null, "dynamic": false, "group_size": )" + group_size + R"(, "num_bits": )" + bits + R"(, "observer": "minmax", "observer_kwargs": {}, "strategy": ")" +
         strategy + R"(", "symmetric": true, "type": ")" + type + R"("}}}, "format": ")" + format +
         R"(", "ignore": ["lm_head"], "quant_method": "compressed-tensors", "quantization_status": "compressed", "version": "0.9.0"})";
}

/// What is read again after it was written.
Config again(Config const& config) { return parse(write_config(config)); }

}  // namespace

TEST_CASE("parse_config: FP8 in blocks, as DeepSeek writes it") {
  Config const config = parse(R"({"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]})");
  CHECK(config == Config{.method = Method::fp8, .method_name = "fp8", .block = {128, 128}});
  CHECK(!config.power_of_two_scales);
  CHECK(parse(R"({"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]})").power_of_two_scales);
  CHECK(parse(fp8(R"("weight_block_size":"64x32")")).block == Block{64, 32});
  CHECK(parse(fp8(R"("fmt":"e5m2")")).e5m2);
  CHECK(parse(fp8(R"("fmt":"float8_e5m2")")).e5m2);
  CHECK(!parse(fp8(R"("fmt":"float8_e4m3fn")")).e5m2);
  CHECK(parse(fp8(R"("weight_block_size":null,"scale_fmt":null,"fmt":null)")) == Config{.method_name = "fp8"});
  CHECK(parse(fp8(R"("ignored_layers":["lm_head"],"modules_to_not_convert":["a","b"])")).ignore == Names{"a", "b", "lm_head"});
}

TEST_CASE("parse_config: expert_dtype stands beside the quantization_config") {
  auto const experts = [](std::string const& more) { return parse_config(as_byte_span("{" + more + R"("quantization_config":{"quant_method":"fp8"}})"))->fp4_experts; };
  CHECK(experts(R"("expert_dtype":"fp4",)"));
  CHECK(!experts(R"("expert_dtype":"fp8",)"));
  CHECK(!experts(R"("expert_dtype":null,)"));
  CHECK(!experts(""));
  CHECK(outcome([&] { experts(R"("expert_dtype":4,)"); }) == "bad_schema");
  CHECK(outcome([&] { experts(R"("expert_dtype":"fp4","expert_dtype":"fp8",)"); }) == "duplicate_key");
}

TEST_CASE("parse_config: compressed-tensors, as its version 0.9 writes it") {
  struct Case {
    char const *format, *bits, *type, *strategy, *group_size;
    Group group;
  };
  Names const linear{"Linear"};
  for (Case const& one :
       {Case{"float-quantized", "8", "float", "channel", "null", {linear, "float-quantized", 8, true, true, Strategy::channel}},
        Case{"float-quantized", "8", "float", "tensor", "null", {linear, "float-quantized", 8, true, true, Strategy::tensor}},
        Case{"pack-quantized", "4", "int", "group", "32", {linear, "pack-quantized", 4, false, true, Strategy::group, 32}},
        Case{"pack-quantized", "4", "int", "group", "-1", {linear, "pack-quantized", 4, false, true, Strategy::group, -1}},
        Case{"int-quantized", "8", "int", "channel", "null", {linear, "int-quantized", 8, false, true, Strategy::channel}},
        Case{"mxfp4-pack-quantized", "4", "float", "group", "32", {linear, "mxfp4-pack-quantized", 4, true, true, Strategy::group, 32}},
        Case{"nvfp4-pack-quantized", "4", "float", "tensor_group", "16", {linear, "nvfp4-pack-quantized", 4, true, true, Strategy::tensor_group, 16}}}) {
    CAPTURE(one.format);
    CAPTURE(one.strategy);
    Config const config = parse(compressed(one.format, one.bits, one.type, one.strategy, one.group_size));
    CHECK(config == Config{.method = Method::compressed_tensors,
                           .method_name = "compressed-tensors",
                           .format = one.format,
                           .version = "0.9.0",
                           .groups = {one.group},
                           .ignore = {"lm_head"}});
    CHECK(again(config) == config);
  }
}

TEST_CASE("parse_config: every spelling of the weights of compressed-tensors") {
  CHECK(group_of("") == Group{{"Linear"}, "pack-quantized", 8, false, true, Strategy::tensor});
  CHECK(group_of(R"("block_structure":[128,64],"strategy":"block")").block == Block{128, 64});
  CHECK(group_of(R"("block_structure":"128x64","strategy":"block")").block == Block{128, 64});
  for (char const* order : {"\"group\"", "\"dynamic\"", "true", "\"GROUP\""}) CHECK(group_of("\"actorder\":"s + order).act_order);
  for (char const* order : {"\"weight\"", "\"static\"", "false", "null"}) CHECK(!group_of("\"actorder\":"s + order).act_order);
  CHECK(!group_of(R"("symmetric":false)").symmetric);
  // without a strategy, as compressed-tensors infers it
  CHECK(group_of(R"("group_size":128)").strategy == Strategy::group);
  CHECK(group_of(R"("group_size":-1)").strategy == Strategy::channel);
  CHECK(group_of(R"("block_structure":[1,2])").strategy == Strategy::block);
  CHECK(group_of(R"("strategy":"token")").strategy == Strategy::unknown);
  CHECK(group_of(R"("strategy":"attn_head")").strategy == Strategy::unknown);
  for (int bits = 1; bits <= 8; ++bits) CHECK(group_of("\"num_bits\":" + std::to_string(bits)).bits == bits);
}

TEST_CASE("parse_config: groups keep their order, have formats of their own, and may leave the weights alone") {
  Config const config = parse(with_groups(R"({"z":{"targets":["re:.*a"],"format":"int-quantized","weights":{}},
      "kv":{"targets":["Attention"],"weights":null,"input_activations":{"num_bits":8}},
      "a":{"targets":["Linear","lm_head"],"weights":{"num_bits":4,"group_size":64},"unknown":[1,{}]}})"));
  REQUIRE(config.groups.size() == 2);
  CHECK(config.groups[0].targets == Names{"re:.*a"});
  CHECK(config.groups[0].format == "int-quantized");
  CHECK(config.groups[1].targets == Names{"Linear", "lm_head"});
  CHECK(config.groups[1].format == "pack-quantized");
  CHECK(parse(with_groups("null")).groups.empty());
  CHECK(parse(of("compressed-tensors")).groups.empty());
}

TEST_CASE("parse_config: a group of compressed-tensors may be the name of a preset") {
  Config const config = parse(with_groups(R"({"W4A16":["Linear"],"FP8_BLOCK":["lm_head"],"NVFP4":["a"],"FP8":[],"FP8_DYNAMIC":[],"W8A8":[],"W4A16_ASYM":[],"MXFP4":[],"UNQUANTIZED":["b"]})"));
  REQUIRE(config.groups.size() == 8);
  CHECK(config.groups[0] == Group{{"Linear"}, "pack-quantized", 4, false, true, Strategy::group, 128});
  CHECK(config.groups[1] == Group{{"lm_head"}, "pack-quantized", 8, true, true, Strategy::block, 0, {128, 128}});
  CHECK(config.groups[2] == Group{{"a"}, "pack-quantized", 4, true, true, Strategy::tensor_group, 16});
  CHECK(config.groups[3].strategy == Strategy::tensor);
  CHECK(config.groups[4].strategy == Strategy::channel);
  CHECK(!config.groups[5].is_float);
  CHECK(!config.groups[6].symmetric);
  CHECK(config.groups[7].group_size == 32);
  CHECK(contains(message_of(with_groups(R"({"W3A5":["Linear"]})")), "W3A5"));
  CHECK(outcome_of(with_groups(R"({"W3A5":["Linear"]})")) == "unsupported");
}

TEST_CASE("parse_config: MXFP4, ModelOpt, GPTQ, AWQ and bitsandbytes") {
  CHECK(parse(R"({"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"], "quant_method": "mxfp4"})") ==
        Config{.method = Method::mxfp4, .method_name = "mxfp4", .ignore = {"model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"}});

  CHECK(parse(R"({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"], "producer": {"name": "modelopt", "version": "0.33.0"}})") ==
        Config{.method = Method::modelopt, .method_name = "modelopt", .ignore = {"lm_head"}, .group_size = 16, .algorithm = "NVFP4"});
  CHECK(parse(of("modelopt", R"("quant_algo":"fp8")")).algorithm == "FP8");
  CHECK(parse(of("modelopt", R"("quant_algo":null)")).algorithm.empty());
  CHECK(parse(of("modelopt_fp4")).algorithm == "NVFP4");
  Config const nested = parse(of("modelopt", R"("producer":{},"quantization":{"quant_algo":"NVFP4","exclude_modules":["lm_head"]})"));
  CHECK(nested.algorithm == "NVFP4");
  CHECK(nested.group_size == 16);
  CHECK(nested.ignore == Names{"lm_head"});

  Config const v1 = parse(R"({"bits": 4, "checkpoint_format": "gptq", "damp_percent": 0.01, "desc_act": false, "group_size": 32, "quant_method": "gptq", "sym": false, "true_sequential": true})");
  CHECK(v1 == Config{.method = Method::gptq, .method_name = "gptq", .bits = 4, .group_size = 32, .symmetric = false});
  CHECK(v1.stored_zero_is_one_less);
  Config const v2 = parse(R"({"bits": 4, "checkpoint_format": "gptq_v2", "damp_percent": 0.01, "desc_act": true, "group_size": 32, "quant_method": "gptq", "sym": false, "true_sequential": true})");
  CHECK(!v2.stored_zero_is_one_less);
  CHECK(v2.act_order);
  CHECK(parse(gptq(R"("bits":3)")) == Config{.method = Method::gptq, .method_name = "gptq", .bits = 3, .group_size = 128});
  CHECK(parse(gptq(R"("w_bit":8,"q_group_size":-1)")) == Config{.method = Method::gptq, .method_name = "gptq", .bits = 8, .group_size = -1});
  CHECK(parse(gptq(R"("bits":2,"w_bit":2,"group_size":64,"q_group_size":64)")).group_size == 64);
  CHECK(!parse(gptq(R"("bits":4,"format":"gptq_v2")")).stored_zero_is_one_less);
  CHECK(parse(gptq(R"("bits":4,"checkpoint_format":null)")).stored_zero_is_one_less);
  CHECK(parse(gptq(R"("bits":4,"dynamic":{"-:.*lm_head":{}})")).ignore == Names{"re:.*lm_head"});
  CHECK(parse(gptq(R"("bits":4,"dynamic":{})")).ignore.empty());

  CHECK(parse(R"({"bits": 4, "group_size": 32, "modules_to_not_convert": null, "quant_method": "awq", "version": "gemm", "zero_point": true})") ==
        Config{.method = Method::awq, .method_name = "awq", .version = "gemm", .bits = 4, .group_size = 32, .symmetric = false});
  CHECK(parse(of("awq", R"("w_bit":4,"q_group_size":64,"version":"GEMM","zero_point":false,"modules_to_not_convert":["visual"])")) ==
        Config{.method = Method::awq, .method_name = "awq", .version = "gemm", .ignore = {"visual"}, .bits = 4, .group_size = 64});

  CHECK(parse(of("bitsandbytes", R"("load_in_4bit":true,"load_in_8bit":false,"bnb_4bit_quant_type":"nf4","llm_int8_skip_modules":["lm_head"],"bnb_4bit_compute_dtype":"bfloat16")")) ==
        Config{.method = Method::bitsandbytes, .method_name = "bitsandbytes", .ignore = {"lm_head"}, .algorithm = "nf4"});
  CHECK(parse(of("bitsandbytes", R"("_load_in_4bit":true)")).algorithm == "fp4");
  CHECK(parse(of("bitsandbytes", R"("load_in_8bit":true,"llm_int8_skip_modules":null)")).algorithm == "int8");
  CHECK(parse(R"({"load_in_8bit":true})").method == Method::bitsandbytes);   // before there were methods
}

TEST_CASE("parse_config: where the configuration stands") {
  auto const method = [](std::string const& text) {
    auto const config = parse_config(as_byte_span(text));
    return config ? config->method_name : "none"s;
  };
  CHECK(method("{}") == "none");
  CHECK(method(R"({"quantization_config":null,"x":{"quantization_config":{"quant_method":"fp8"}}})") == "none");
  CHECK(method(R"({"compression_config":{"config_groups":{}}})") == "compressed-tensors");
  CHECK(method(R"({"compression_config":{"quant_method":"compressed-tensors"},"quantization_config":{"quant_method":"fp8"}})") == "fp8");
  CHECK(method(R"({"text_config":{"quantization_config":{"quant_method":"mxfp4"}}})") == "mxfp4");
  CHECK(method(R"({"text_config":{"quantization_config":{"quant_method":"mxfp4"}},"quantization_config":{"quant_method":"fp8"}})") == "fp8");
  CHECK(method(R"({"text_config":7})") == "none");
}

TEST_CASE("parse_quantize_config: the object itself, of GPTQ or of AWQ") {
  auto const parse_own = [](std::string const& text) { return parse_quantize_config(as_byte_span(text)); };
  CHECK(parse_own(R"({"bits":4,"group_size":128,"damp_percent":0.01,"desc_act":true,"static_groups":false,"sym":true,"true_sequential":true,"model_name_or_path":null})") ==
        Config{.method = Method::gptq, .method_name = "gptq", .bits = 4, .group_size = 128, .act_order = true});
  CHECK(parse_own(R"({"zero_point":true,"q_group_size":128,"w_bit":4,"version":"GEMM"})").method == Method::awq);
  CHECK(parse_own(R"({"quant_method":"awq","bits":4})").method == Method::awq);
  CHECK(outcome([&] { parse_own(R"({"bits":4,"is_marlin_format":true})"); }) == "unsupported");
  CHECK(outcome([&] { parse_own("{}"); }) == "bad_schema");
  CHECK(outcome([&] { parse_own("[]"); }) == "bad_schema");
}

TEST_CASE("parse_hf_quant_config: what ModelOpt writes beside config.json") {
  auto const parse_own = [](std::string const& text) { return parse_hf_quant_config(as_byte_span(text)); };
  Config const config = parse_own(
      R"({"producer":{"name":"modelopt","version":"0.29"},"quantization":{"quant_algo":"FP8","kv_cache_quant_algo":"FP8","exclude_modules":["lm_head","model.layers.0.*"]}})");
  CHECK(config == Config{.method = Method::modelopt, .method_name = "modelopt", .ignore = {"lm_head", "model.layers.0.*"}, .algorithm = "FP8"});
  CHECK(parse_own(R"({"quantization":{"quant_algo":"NVFP4","group_size":16}})").group_size == 16);
  CHECK(outcome([&] { parse_own(R"({"producer":{}})"); }) == "bad_schema");
  CHECK(outcome([&] { parse_own(R"({"quantization":[]})"); }) == "bad_schema");
  CHECK(outcome([&] { parse_own(R"({"quantization":{"quant_algo":"W4A8_AWQ"}})"); }) == "unsupported");
}

TEST_CASE("parse_config: a block is two sizes (Q04)") {
  for (char const* block : {"[0,128]", "[128,0]", "[-1,128]", "[128,-128]", "[2147483648,128]", "[128,2147483648]", "[128]", "[128,128,128]", "[]", "128", "{}", "true", "[\"128\",\"128\"]",
                            "[128.0,128]", "[1e2,128]", "[null,128]", "[[128],128]", "\"\"", "\"128\"", "\"128x\"", "\"x128\"", "\"128x128x128\"", "\"128X128\"", "\"0x128\"", "\"-1x128\"",
                            "\" 128x128\"", "\"128x128 \"", "\"+128x128\"", "\"2147483648x1\"", "\"99999999999999999999x1\""}) {
    CAPTURE(block);
    CHECK(outcome_of(fp8("\"weight_block_size\":"s + block)) == "bad_schema");
    CHECK(outcome_of(with_weights("\"block_structure\":"s + block)) == "bad_schema");
  }
  CHECK(parse(fp8(R"("weight_block_size":[2147483647,1])")).block == Block{2147483647, 1});
  CHECK(contains(message_of(fp8(R"("weight_block_size":[0,1])")), "quantization_config.weight_block_size"));
  CHECK(contains(message_of(with_weights(R"("block_structure":[0,1])")), "quantization_config.config_groups.group_0.weights.block_structure"));
}

TEST_CASE("parse_config: bits and sizes of groups have ranges (Q13, Q15)") {
  for (char const* bits : {"0", "9", "-4", "\"4\"", "4.0", "4.5", "true", "[4]", "{}", "4294967300"}) {
    CAPTURE(bits);
    CHECK(outcome_of(gptq("\"bits\":"s + bits)) == "bad_schema");
    CHECK(outcome_of(gptq("\"w_bit\":"s + bits)) == "bad_schema");
    CHECK(outcome_of(of("awq", "\"bits\":"s + bits)) == "bad_schema");
    CHECK(outcome_of(with_weights("\"num_bits\":"s + bits)) == "bad_schema");
  }
  for (char const* size : {"0", "-2", "2147483648", "\"128\"", "1.5", "false", "[]"}) {
    CAPTURE(size);
    CHECK(outcome_of(gptq("\"bits\":4,\"group_size\":"s + size)) == "bad_schema");
    CHECK(outcome_of(gptq("\"bits\":4,\"q_group_size\":"s + size)) == "bad_schema");
    CHECK(outcome_of(of("awq", "\"group_size\":"s + size)) == "bad_schema");
    CHECK(outcome_of(of("modelopt", "\"quant_algo\":\"NVFP4\",\"group_size\":"s + size)) == "bad_schema");
    CHECK(outcome_of(with_weights("\"group_size\":"s + size)) == "bad_schema");
  }
  CHECK(contains(message_of(gptq("\"bits\":9")), "quantization_config.bits"));
  CHECK(outcome_of(gptq("\"sym\":true")) == "bad_schema");
  CHECK(outcome_of(gptq("\"bits\":4,\"w_bit\":3")) == "bad_schema");
  CHECK(outcome_of(gptq("\"bits\":4,\"group_size\":64,\"q_group_size\":128")) == "bad_schema");
  for (char const* bits : {"1", "5", "6", "7"}) CHECK(outcome_of(gptq("\"bits\":"s + bits)) == "unsupported");
  for (char const* bits : {"1", "3", "6"}) CHECK(outcome_of(with_weights("\"type\":\"float\",\"num_bits\":"s + bits)) == "unsupported");
}

TEST_CASE("parse_config: what nobody here decodes is refused by its name (Q16, Q17, Q20)") {
  struct Case {
    std::string object;
    char const* named;
  };
  for (Case const& one : {Case{of("quip#"), "quip#"},
                          Case{of("exl3"), "exl3"},
                          Case{of("fbgemm_fp8"), "fbgemm_fp8"},
                          Case{gptq(R"("bits":4,"checkpoint_format":"marlin")"), "marlin"},
                          Case{gptq(R"("bits":4,"checkpoint_format":"gptq_p")"), "gptq_p"},
                          Case{gptq(R"("bits":4,"format":"bitblas")"), "bitblas"},
                          Case{gptq(R"("bits":4,"pack_dtype":"int16")"), "int16"},
                          Case{gptq(R"("bits":4,"dynamic":{"+:.*down":{"bits":8}})"), "+:.*down"},
                          Case{of("awq", R"("version":"gemv")"), "gemv"},
                          Case{of("awq", R"("version":"gemv_fast")"), "gemv_fast"},
                          Case{of("awq", R"("version":"marlin")"), "marlin"},
                          Case{of("awq", R"("version":"llm-awq")"), "llm-awq"},
                          Case{of("awq", R"("bits":8)"), "8"},
                          Case{fp8(R"("fmt":"e3m4")"), "e3m4"},
                          Case{fp8(R"("scale_fmt":"e5m3")"), "e5m3"},
                          Case{of("modelopt", R"("quant_algo":"MIXED_PRECISION")"), "MIXED_PRECISION"},
                          Case{of("bitsandbytes", R"("load_in_4bit":true,"bnb_4bit_quant_type":"af4")"), "af4"},
                          Case{of("compressed-tensors", R"("sparsity_config":{"format":"sparse-24-bitmask"})"), "sparse-24-bitmask"},
                          Case{with_weights(R"("type":"complex")"), "complex"},
                          Case{with_weights(R"("strategy":"row")"), "row"},
                          Case{with_weights(R"("actorder":"random")"), "random"}}) {
    CAPTURE(one.object);
    CHECK(outcome_of(one.object) == "unsupported");
    CHECK(contains(message_of(one.object), one.named));
  }
  CHECK(outcome_of(of("compressed-tensors", R"("sparsity_config":{"format":"dense"})")) == "ok");
  CHECK(outcome_of(of("compressed-tensors", R"("sparsity_config":{})")) == "ok");
}

TEST_CASE("parse_config: wrong types") {
  auto const outcome_of_text = [](std::string const& text) {
    return outcome([&] { parse_config(as_byte_span(text)); });
  };
  for (char const* root : {"[]", "\"x\"", "null", "1"}) CHECK(outcome_of_text(root) == "bad_schema");
  for (char const* text : {"", "{", "{\"quantization_config\":}", "{\"a\":NaN}", "{}x", "\xEF\xBB\xBF{}"}) CHECK(outcome_of_text(text) == "bad_json");
  CHECK(outcome_of_text("{\"a\":\"\xff\"}") == "bad_utf8");
  for (char const* object : {"[]", "\"fp8\"", "1", "true"}) CHECK(outcome_of(object) == "bad_schema");
  for (char const* object : {"{}", R"({"quant_method":null})", R"({"quant_method":""})", R"({"quant_method":8})", R"({"quant_method":["fp8"]})", R"({"bits":4})"}) {
    CAPTURE(object);
    CHECK(outcome_of(object) == "bad_schema");
    CHECK(contains(message_of(object), "quantization_config.quant_method"));
  }
  for (auto const& object :
       {gptq(R"("bits":4,"desc_act":0)"), gptq(R"("bits":4,"sym":"true")"), gptq(R"("bits":4,"checkpoint_format":1)"), gptq(R"("bits":4,"dynamic":[])"), fp8(R"("fmt":8)"), fp8(R"("scale_fmt":{})"),
        of("awq", R"("zero_point":1)"), of("awq", R"("version":1)"), of("modelopt", R"("quant_algo":8)"), of("modelopt", R"("quantization":[])"), of("bitsandbytes"),
        of("bitsandbytes", R"("load_in_4bit":true,"load_in_8bit":true)"), of("bitsandbytes", R"("load_in_4bit":1)"), of("mxfp4", R"("modules_to_not_convert":"lm_head")"),
        of("mxfp4", R"("modules_to_not_convert":[1])"), of("mxfp4", R"("modules_to_not_convert":[null])"), of("mxfp4", R"("modules_to_not_convert":{})"),
        of("compressed-tensors", R"("ignore":[[]])"), of("compressed-tensors", R"("version":0.9)"), of("compressed-tensors", R"("format":[])"), of("compressed-tensors", R"("sparsity_config":"dense")"),
        with_groups("[]"), with_groups("1"), with_groups(R"({"group_0":1})"), with_groups(R"({"group_0":null})"), with_groups(R"({"group_0":{}})"), with_groups(R"({"group_0":{"weights":{}}})"),
        with_groups(R"({"group_0":{"targets":"Linear","weights":{}}})"), with_groups(R"({"group_0":{"targets":[1],"weights":{}}})"), with_groups(R"({"group_0":{"targets":[],"weights":[]}})"),
        with_groups(R"({"group_0":{"targets":[],"weights":{},"format":4}})"), with_groups(R"({"FP8":[4]})"), with_weights(R"("symmetric":1)"), with_weights(R"("strategy":1)"),
        with_weights(R"("type":1)"), with_weights(R"("actorder":1)")}) {
    CAPTURE(object);
    CHECK(outcome_of(object) == "bad_schema");
    CHECK(contains(message_of(object), "quantization_config."));
  }
}

TEST_CASE("parse_config: no key that matters is there twice") {
  CHECK(outcome([] { parse_config(as_byte_span(R"({"quantization_config":null,"quantization_config":{"quant_method":"fp8"}})")); }) == "duplicate_key");
  CHECK(outcome([] { parse_config(as_byte_span(R"({"compression_config":{},"compression_config":{}})")); }) == "duplicate_key");
  CHECK(outcome([] { parse_config(as_byte_span(R"({"a":1,"a":2})")); }) == "ok");
  for (auto const& object : {of("gptq", R"("bits":4,"bits":4)"), of("fp8", R"("quant_method":"fp8")"), of("fp8", R"("\u0066mt":"e4m3","fmt":"e5m2")"),
                             with_groups(R"({"group_0":{"targets":[],"weights":{}},"group_0":{"targets":[],"weights":{}}})"), with_groups(R"({"group_0":{"targets":[],"targets":["a"],"weights":{}}})"),
                             with_weights(R"("num_bits":4,"num_bits":8)")}) {
    CAPTURE(object);
    CHECK(outcome_of(object) == "duplicate_key");
  }
  CHECK(outcome([] { parse_hf_quant_config(as_byte_span(R"({"quantization":{"quant_algo":"FP8","quant_algo":"NVFP4"}})")); }) == "duplicate_key");
}

TEST_CASE("parse_config: texts, lists and depth have limits") {
  CHECK(outcome([] { parse_config(as_byte_span(std::string((16u << 20) + 1, ' '))); }) == "limit");
  CHECK(outcome([] { parse_quantize_config(as_byte_span(std::string((16u << 20) + 1, ' '))); }) == "limit");
  CHECK(outcome([] { parse_config(as_byte_span(std::string(16u << 20, ' '))); }) == "bad_json");
  CHECK(outcome([] { parse_config(as_byte_span(R"({"a":)" + std::string(10'000, '['))); }) == "limit");
  auto const names = [](std::size_t count) {
    std::string list = "[\"a\"";
    for (std::size_t i = 1; i < count; ++i) list += ",\"a\"";
    return of("mxfp4", "\"ignore\":" + list + "]");
  };
  CHECK(parse(names(max_config_names)).ignore.size() == max_config_names);
  CHECK(outcome_of(names(max_config_names + 1)) == "limit");
  auto const groups = [](std::size_t count) {
    std::string object = "{";
    for (std::size_t i = 0; i < count; ++i) object += (i > 0 ? ",\"" : "\"") + std::to_string(i) + R"(":{"targets":[],"weights":{}})";
    return with_groups(object + "}");
  };
  CHECK(parse(groups(max_config_groups)).groups.size() == max_config_groups);
  CHECK(outcome_of(groups(max_config_groups + 1)) == "limit");
}

TEST_CASE("matches: names mean themselves, what lies below them, and what ends with them") {
  std::string_view const module = "model.layers.0.mlp.gate_proj";
  for (char const* pattern : {"model.layers.0.mlp.gate_proj", "model", "model.layers.0", "model.layers.0.mlp", "gate_proj", "mlp.gate_proj", "layers.0.mlp.gate_proj"}) {
    CAPTURE(pattern);
    CHECK(matches(pattern, module));
  }
  for (char const* pattern : {"", "mod", "model.", "model.layers.0.m", "model.layers.00", "proj", "_proj", ".gate_proj", "mlp", "layers.0", "model.layers.0.mlp.gate_proj.x", "Linear", "Model", "x"}) {
    CAPTURE(pattern);
    CHECK(!matches(pattern, module));
  }
  CHECK(matches("", ""));
  CHECK(!matches("a", ""));
  CHECK(matches("lm_head", "model.lm_head"));
  CHECK(!matches("lm_head", "model.xlm_head"));
}

TEST_CASE("matches: a star stands for any characters") {
  for (char const* pattern : {"*", "model*", "*gate_proj", "*gate*", "model.layers.*.mlp", "model.layers.*", "model.*.gate_proj", "mlp.*", "layers.*.gate_proj", "*.mlp.*", "m*l*l*m*g*j", "**", "*a*"}) {
    CAPTURE(pattern);
    CHECK(matches(pattern, "model.layers.0.mlp.gate_proj"));
  }
  for (char const* pattern : {"x*", "*x*", "model.layers.1*", "*gate", "model.layers.*.self_attn", "*.lm_head", "ml*.gate_projx", "odel*"}) {
    CAPTURE(pattern);
    CHECK(!matches(pattern, "model.layers.0.mlp.gate_proj"));
  }
  std::string stars;   // no time but that of the product of the lengths
  for (int i = 0; i < 1000; ++i) stars += "*a";
  CHECK(!matches(stars + "b", std::string(10'000, 'a')));
}

TEST_CASE("matches: a regular expression is matched from the start, in linear time (Q24)") {
  CHECK(matches("re:.*gate_proj", "model.layers.0.mlp.gate_proj"));
  CHECK(matches("re:model", "model.layers.0"));
  CHECK(!matches("re:layers", "model.layers.0"));
  CHECK(matches("re:.*layers\\.\\d+\\.mlp\\.(gate|up)_proj$", "model.layers.17.mlp.up_proj"));
  CHECK(!matches("re:(a+)+$", std::string(10'000, 'a') + "!"));
  CHECK(matches("re:(a+)+$", std::string(10'000, 'a')));
  CHECK(outcome([] { matches("re:(?!a)b", "b"); }) == "unsupported");
  CHECK(outcome([] { matches("re:" + std::string(5000, 'a'), "b"); }) == "limit");
}

TEST_CASE("group_for: a name goes before a class, and an earlier group before a later one") {
  Config const config{.groups = {{.targets = {"Linear"}, .bits = 8}, {.targets = {"re:.*down_proj", "lm_head"}, .bits = 4}, {.targets = {"Conv2d", "*.down_proj"}, .bits = 2}}};
  CHECK(group_for(config, "model.layers.0.mlp.gate_proj") == &config.groups[0]);
  CHECK(group_for(config, "model.layers.0.mlp.down_proj") == &config.groups[1]);
  CHECK(group_for(config, "lm_head") == &config.groups[1]);
  CHECK(group_for(config, "Linear") == &config.groups[0]);
  Config const names{.groups = {{.targets = {"a", "Model.b"}}}};
  CHECK(group_for(names, "x.a") == &names.groups[0]);
  CHECK(group_for(names, "Model.b") == &names.groups[0]);
  CHECK(group_for(names, "b") == nullptr);
  CHECK(group_for(Config{}, "a") == nullptr);
}

TEST_CASE("write_config: the JSON of transformers, indented by two and sorted") {
  CHECK(write_config({.method = Method::fp8, .block = {128, 128}, .power_of_two_scales = true}) == R"({
  "activation_scheme": "dynamic",
  "fmt": "e4m3",
  "quant_method": "fp8",
  "scale_fmt": "ue8m0",
  "weight_block_size": [
    128,
    128
  ]
})");
  CHECK(write_config({.method = Method::gptq, .ignore = {"\xc3\xa9"}, .bits = 4, .group_size = 128}) == R"({
  "bits": 4,
  "checkpoint_format": "gptq",
  "desc_act": false,
  "group_size": 128,
  "modules_to_not_convert": [
    "\u00e9"
  ],
  "quant_method": "gptq",
  "sym": true
})");
  CHECK(write_config({.method = Method::compressed_tensors,
                      .format = "nvfp4-pack-quantized",
                      .groups = {{{"Linear"}, "", 4, true, true, Strategy::tensor_group, 16}},
                      .ignore = {"lm_head"}}) == R"({
  "config_groups": {
    "group_0": {
      "format": "nvfp4-pack-quantized",
      "input_activations": null,
      "output_activations": null,
      "targets": [
        "Linear"
      ],
      "weights": {
        "actorder": null,
        "block_structure": null,
        "dynamic": false,
        "group_size": 16,
        "num_bits": 4,
        "observer": "minmax",
        "observer_kwargs": {},
        "scale_dtype": "torch.float8_e4m3fn",
        "strategy": "tensor_group",
        "symmetric": true,
        "type": "float",
        "zp_dtype": null
      }
    }
  },
  "format": "nvfp4-pack-quantized",
  "global_compression_ratio": null,
  "ignore": [
    "lm_head"
  ],
  "kv_cache_scheme": null,
  "quant_method": "compressed-tensors",
  "quantization_status": "compressed",
  "version": "0.9.0"
})");
}

TEST_CASE("write_config: what is written is read as it was") {
  std::vector<Config> configs{
      {.method = Method::fp8, .method_name = "fp8"},
      {.method = Method::fp8, .method_name = "fp8", .ignore = {"a\"\n", "b"}, .block = {64, 128}, .e5m2 = true, .power_of_two_scales = true},
      {.method = Method::mxfp4, .method_name = "mxfp4"},
      {.method = Method::mxfp4, .method_name = "mxfp4", .ignore = {"model.layers.*.self_attn"}},
      {.method = Method::modelopt, .method_name = "modelopt", .ignore = {"lm_head"}, .group_size = 16, .algorithm = "NVFP4"},
      {.method = Method::modelopt, .method_name = "modelopt", .algorithm = "FP8"},
      {.method = Method::modelopt, .method_name = "modelopt"},
      {.method = Method::awq, .method_name = "awq", .version = "gemm", .ignore = {"visual"}, .bits = 4, .group_size = -1, .symmetric = false},
      {.method = Method::awq, .method_name = "awq", .version = "gemm", .bits = 4, .group_size = 128},
      {.method = Method::bitsandbytes, .method_name = "bitsandbytes", .ignore = {"lm_head"}, .algorithm = "nf4"},
      {.method = Method::bitsandbytes, .method_name = "bitsandbytes", .algorithm = "fp4"},
      {.method = Method::bitsandbytes, .method_name = "bitsandbytes", .algorithm = "int8"}};
  for (int const bits : {2, 3, 4, 8})
    for (bool const yes : {false, true})
      configs.push_back({.method = Method::gptq, .method_name = "gptq", .bits = bits, .group_size = yes ? -1 : 64, .act_order = yes, .symmetric = !yes, .stored_zero_is_one_less = yes});
  Config many{.method = Method::compressed_tensors, .method_name = "compressed-tensors", .format = "mixed-precision", .version = "0.17.1"};
  for (int i = 0; i < 24; ++i)
    many.groups.push_back({{"re:" + std::to_string(i), "Linear"}, i % 2 == 0 ? "pack-quantized" : "float-quantized", i % 2 == 0 ? 1 + i % 8 : 8, i % 2 != 0, i % 3 != 0,
                           static_cast<Strategy>(i % 6), i % 5 == 0 ? 0 : i % 5 == 1 ? -1 : 32 * i, i % 6 == 4 ? Block{128, 64} : Block{0, 0}, i % 7 == 0});
  configs.push_back(many);
  for (auto const& config : configs) {
    CAPTURE(write_config(config));
    CHECK(again(config) == config);
    CHECK(write_config(again(config)) == write_config(config));
  }
  CHECK(again({.method = Method::compressed_tensors, .format = "pack-quantized", .groups = {{.targets = {"Linear"}, .bits = 3}}}).version == "0.17.0");
}

TEST_CASE("write_config refuses what parse_config would refuse") {
  auto const write = [](Config const& config) { return outcome([&] { write_config(config); }); };
  CHECK(write({.method = Method::fp8, .block = {0, 128}}) == "bad_schema");
  CHECK(write({.method = Method::fp8, .block = {-1, -1}}) == "bad_schema");
  CHECK(write({.method = Method::gptq, .bits = 0, .group_size = 128}) == "bad_schema");
  CHECK(write({.method = Method::gptq, .bits = 5, .group_size = 128}) == "unsupported");
  CHECK(write({.method = Method::gptq, .bits = 4}) == "bad_schema");
  CHECK(write({.method = Method::awq, .bits = 8, .group_size = 128}) == "unsupported");
  CHECK(write({.method = Method::modelopt, .algorithm = "W4"}) == "unsupported");
  CHECK(write({.method = Method::bitsandbytes}) == "unsupported");
  CHECK(write({.method = Method::mxfp4, .ignore = {"\xff"}}) == "bad_utf8");
  CHECK(write({.method = Method::compressed_tensors, .groups = {{.bits = 0}}}) == "bad_schema");
  CHECK(write({.method = Method::compressed_tensors, .groups = {{.group_size = -2}}}) == "bad_schema");
}

TEST_CASE("with_quantization_config: everything but the configuration stays, byte for byte") {
  auto const with = [](std::string const& text, std::string const& object = "{\"a\": 1}") { return with_quantization_config(as_byte_span(text), object); };
  CHECK(with("") == "{\n  \"quantization_config\": {\"a\": 1}\n}\n");
  CHECK(with("{}") == "{\n  \"quantization_config\": {\"a\": 1}\n}");
  CHECK(with("{\"b\":2}") == "{\"b\":2,\n  \"quantization_config\": {\"a\": 1}}");
  CHECK(with("{\n  \"b\": 2.50,\n  \"c\": \"}\\\"\"\n}\n") == "{\n  \"b\": 2.50,\n  \"c\": \"}\\\"\",\n  \"quantization_config\": {\"a\": 1}\n}\n");
  CHECK(with(" { \"quantization_config\" : null , \"b\":[ {\"quantization_config\":3}, \"]\" ] } ") == " { \"quantization_config\" : {\"a\": 1} , \"b\":[ {\"quantization_config\":3}, \"]\" ] } ");
  CHECK(with("{\"x\":{\"quantization_config\":{}},\"quantization_config\":{\"y\":[1,{\"z\":\"}\"}]}}") == "{\"x\":{\"quantization_config\":{}},\"quantization_config\":{\"a\": 1}}");
  CHECK(with("{\"quantization\\u005fconfig\":1e5}") == "{\"quantization\\u005fconfig\":{\"a\": 1}}");
  CHECK(with("{\"quantization_config\":true}") == "{\"quantization_config\":{\"a\": 1}}");
  CHECK(with("{\"b\":1}", "{\n  \"a\": 1\n}\n") == "{\"b\":1,\n  \"quantization_config\": {\n    \"a\": 1\n  }}");
  std::string const once = with("{\"b\":[]}");
  CHECK(with(once) == once);

  CHECK(outcome([&] { with("[]"); }) == "bad_schema");
  CHECK(outcome([&] { with(" "); }) == "bad_json");
  CHECK(outcome([&] { with("{"); }) == "bad_json");
  CHECK(outcome([&] { with("{}", "[]"); }) == "bad_schema");
  CHECK(outcome([&] { with("{}", "{"); }) == "bad_json");
  CHECK(outcome([&] { with("{}", ""); }) == "bad_json");
  CHECK(outcome([&] { with("{\"quantization_config\":1,\"quantization_config\":2}"); }) == "duplicate_key");

  Config const config{.method = Method::fp8, .method_name = "fp8", .block = {128, 128}};
  CHECK(parse_config(as_byte_span(with("{\"model_type\":\"llama\"}", write_config(config)))) == config);
}
