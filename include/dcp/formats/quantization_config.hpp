// SPDX-License-Identifier: Apache-2.0
#pragma once
// How the weights of a checkpoint are quantized, as its config.json says: quantization_config in all its spellings, read and written.
//
// Names and shapes of tensors do not tell: GPTQ and AWQ store qweight, qzeros and scales alike and mean different numbers. So this text
// decides, and it comes from strangers: what it says of sizes is checked here, and what nobody here can decode is refused by name.
// Source    transformers, compressed-tensors, AutoGPTQ and GPTQModel, AutoAWQ, TensorRT Model Optimizer, bitsandbytes (their keys)

#include <dcp/base/config.hpp>
#include <dcp/base/algorithms.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/text.hpp>
#include <dcp/formats/json_tree.hpp>
#include <dcp/formats/linear_regex.hpp>
#include <dcp/formats/strict_json.hpp>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace dcp::quantization {

inline constexpr std::uint64_t max_config_bytes = 16u << 20;
inline constexpr std::size_t max_config_groups = 4096;
inline constexpr std::size_t max_config_names = 1u << 18;   // of one list; the largest models have about 100,000 modules

enum class Method : std::uint8_t { fp8, compressed_tensors, mxfp4, modelopt, gptq, awq, bitsandbytes };
enum class Strategy : std::uint8_t { unknown, tensor, channel, group, block, tensor_group };

/// As quant_method spells it.
template <class = Deferred>
std::string_view to_string(Method method) {
  constexpr std::array<std::string_view, 7> names{"fp8", "compressed-tensors", "mxfp4", "modelopt", "gptq", "awq", "bitsandbytes"};
  return names[static_cast<std::size_t>(method)];
}
template <class = Deferred>
std::string_view to_string(Strategy strategy) {
  constexpr std::array<std::string_view, 6> names{"unknown", "tensor", "channel", "group", "block", "tensor_group"};
  return names[static_cast<std::size_t>(strategy)];
}

/// How the weights of some modules are stored (compressed-tensors' config_groups).
struct Group {
  std::vector<std::string> targets{};          // module names, class names, or "re:" and a regular expression
  std::string format{};                        // its own, else that of the config
  int bits = 8;
  bool is_float = false, symmetric = true;
  Strategy strategy = Strategy::unknown;
  std::int64_t group_size = 0;                 // 0: not said; -1: one group
  std::array<std::int64_t, 2> block{0, 0};     // block_structure, also of the old "128x128" spelling
  bool act_order = false;                      // actorder "group", "dynamic" or true; "weight", "static", false and null are none

  friend bool operator==(Group const&, Group const&) = default;
};

struct Config {
  Method method{};
  std::string method_name{};                   // as the text spells it
  std::string format{}, version{};             // compressed-tensors' format and version; awq's version ("gemm")
  std::vector<Group> groups{};                 // compressed-tensors; those that leave the weights alone are not among them
  std::vector<std::string> ignore{};           // modules that are not quantized: names, globs with *, or "re:" and a regular expression
  std::array<std::int64_t, 2> block{0, 0};     // fp8: weight_block_size; 0: none
  bool e5m2 = false, power_of_two_scales = false;   // fmt; scale_fmt ue8m0
  int bits = 0;                                // gptq, awq
  std::int64_t group_size = 0;                 // gptq, awq (-1: one group), modelopt; 0: not said
  bool act_order = false, symmetric = true;    // desc_act; sym, or no zero_point
  bool stored_zero_is_one_less = true;         // gptq: checkpoint_format "gptq", or none; false for "gptq_v2"
  std::string algorithm{};                     // modelopt's quant_algo ("FP8", "NVFP4"; empty: weights are not quantized); bitsandbytes: "nf4", "fp4", "int8"
  bool fp4_experts = false;                    // expert_dtype "fp4" beside quantization_config

  friend bool operator==(Config const&, Config const&) = default;
};

namespace detail {

using namespace dcp::detail;

template <class = Deferred>
std::string lower_case(std::string_view text) {
  std::string lower{text};
  for (char& c : lower)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c | 0x20);
  return lower;
}

/// The members of an object of a configuration, each at most once. null is the same as no member at all.
class Fields {
 public:
  template <class = Deferred>
  Fields(JsonValue const& object, std::string where) : where_{std::move(where)} {
    if (object.kind() != JsonNodeKind::object) throw Error{ErrorCode::bad_schema, where_ + " is not an object"};
    members_ = object.members();
    auto const less = [](auto const& a, auto const& b) { return a.first < b.first; };
    std::sort(members_.begin(), members_.end(), less);
    auto const twice = std::adjacent_find(members_.begin(), members_.end(), [](auto const& a, auto const& b) { return a.first == b.first; });
    if (twice != members_.end()) throw Error{ErrorCode::duplicate_key, where_ + " has the key " + shown(twice->first) + " twice"};
  }

  std::string const& where() const { return where_; }
  template <class = Deferred>
  std::string path(std::string_view key) const { return where_ + '.' + std::string{key}; }
  template <class = Deferred>
  [[noreturn]] void wrong(std::string_view key, std::string const& problem) const { throw Error{ErrorCode::bad_schema, path(key) + ' ' + problem}; }
  template <class = Deferred>
  [[noreturn]] void unsupported(std::string_view key, std::string_view value) const {
    throw Error{ErrorCode::unsupported, path(key) + " is " + shown(value) + ", which is not supported"};
  }

  template <class = Deferred>
  std::optional<JsonValue> find(std::string_view key) const {
    auto const found = std::lower_bound(members_.begin(), members_.end(), key, [](auto const& member, std::string_view wanted) { return member.first < wanted; });
    if (found == members_.end() || found->first != key || found->second.kind() == JsonNodeKind::null) return std::nullopt;
    return found->second;
  }
  template <class = Deferred>
  std::optional<Fields> object(std::string_view key) const {
    auto const value = find(key);
    if (!value) return std::nullopt;
    return Fields{*value, path(key)};
  }

  template <class = Deferred>
  std::string text(std::string_view key, std::string_view otherwise = {}) const {
    auto const value = find(key);
    if (value && !value->is_string()) wrong(key, "is not a text");
    return std::string{value ? value->text() : otherwise};
  }
  template <class = Deferred>
  bool boolean(std::string_view key, bool otherwise) const {
    auto const value = find(key);
    if (value && value->kind() != JsonNodeKind::boolean) wrong(key, "is neither true nor false");
    return value ? value->boolean() : otherwise;
  }

  template <class = Deferred>
  std::optional<std::int64_t> integer(std::string_view key, std::int64_t least, std::int64_t most) const {
    auto const value = find(key);
    if (!value) return std::nullopt;
    std::int64_t number = 0;
    if (!value->number(number) || number < least || number > most) wrong(key, "is no integer from " + std::to_string(least) + " to " + std::to_string(most));
    return number;
  }
  template <class = Deferred>
  std::optional<int> bits(std::string_view key) const {
    auto const value = integer(key, 1, 8);
    if (!value) return std::nullopt;
    return static_cast<int>(*value);
  }
  /// -1 or a positive number.
  template <class = Deferred>
  std::optional<std::int64_t> group_size(std::string_view key) const {
    auto const size = integer(key, -1, INT32_MAX);
    if (size == 0) wrong(key, "is 0");
    return size;
  }
  /// What is called `key`, or in other files `synonym`; both at once must agree.
  template <class T>
  std::optional<T> one_of(std::string_view key, std::string_view synonym, std::optional<T> (Fields::*read)(std::string_view) const) const {
    auto const value = (this->*read)(key), other = (this->*read)(synonym);
    if (value && other && *value != *other) wrong(key, "contradicts " + std::string{synonym});
    return value ? value : other;
  }

  /// [rows, columns], or the old spelling "128x128"; zeros if there is none.
  template <class = Deferred>
  std::array<std::int64_t, 2> block(std::string_view key) const {
    std::array<std::int64_t, 2> sizes{0, 0};
    auto const value = find(key);
    if (!value) return sizes;
    constexpr std::string_view problem = "is not two integers from 1 to 2147483647";
    auto const check = [&](bool good) {
      if (!good) wrong(key, std::string{problem});
    };
    if (value->is_string()) {
      std::string_view const text = value->text();
      char const* at = text.data();
      char const* const last = at + text.size();
      for (std::size_t i = 0; i < 2; ++i) {
        if (i == 1) check(at != last && *at++ == 'x');
        auto const [end, error] = std::from_chars(at, last, sizes[i]);
        check(error == std::errc{});
        at = end;
      }
      check(at == last);
    } else {
      check(value->kind() == JsonNodeKind::array);
      auto const items = value->items();
      check(items.size() == 2 && items[0].number(sizes[0]) && items[1].number(sizes[1]));
    }
    for (auto const size : sizes) check(size >= 1 && size <= INT32_MAX);
    return sizes;
  }

  template <class = Deferred>
  void append_texts(std::string_view key, std::vector<std::string>& texts) const {
    auto const value = find(key);
    if (!value) return;
    if (value->kind() != JsonNodeKind::array) wrong(key, "is not a list of texts");
    for (auto const& item : value->items()) {
      if (!item.is_string()) wrong(key, "is not a list of texts");
      if (texts.size() == max_config_names) throw Error{ErrorCode::limit, path(key) + " has more than " + std::to_string(max_config_names) + " names"};
      texts.emplace_back(item.text());
    }
  }

  /// Sorted by name. parse_groups needs them in the order of the text and asks the object itself.
  std::vector<std::pair<std::string_view, JsonValue>> const& members() const { return members_; }

 private:
  std::string where_;
  std::vector<std::pair<std::string_view, JsonValue>> members_;
};

/// What compressed-tensors understands by the name of a preset, which may stand for a group.
template <class = Deferred>
std::optional<Group> preset(std::string_view name) {
  std::string const lower = lower_case(name);
  auto const integers = [](int bits, Strategy strategy, std::int64_t group_size, bool symmetric = true) {
    return Group{{}, {}, bits, false, symmetric, strategy, group_size, {0, 0}, false};
  };
  auto const floats = [](int bits, Strategy strategy, std::int64_t group_size = 0, std::int64_t block = 0) {
    return Group{{}, {}, bits, true, true, strategy, group_size, {block, block}, false};
  };
  if (lower == "w8a8" || lower == "int8" || lower == "int8_w8a8" || lower == "w8a16") return integers(8, Strategy::channel, 0);
  if (lower == "w4a16" || lower == "w4a8" || lower == "int8_w4a8") return integers(4, Strategy::group, 128);
  if (lower == "w4a16_asym") return integers(4, Strategy::group, 128, false);
  if (lower == "fp8") return floats(8, Strategy::tensor);
  if (lower == "fp8_dynamic") return floats(8, Strategy::channel);
  if (lower == "fp8_block") return floats(8, Strategy::block, 0, 128);
  if (lower == "nvfp4" || lower == "nvfp4a16") return floats(4, Strategy::tensor_group, 16);
  if (lower == "mxfp4" || lower == "mxfp4a16") return floats(4, Strategy::group, 32);
  return std::nullopt;
}

template <class = Deferred>
Group parse_weights(Fields const& weights) {
  Group group;
  group.bits = weights.bits("num_bits").value_or(8);
  std::string const type = weights.text("type", "int");
  if (type != "int" && type != "float") weights.unsupported("type", type);
  group.is_float = type == "float";
  if (group.is_float && group.bits != 4 && group.bits != 8) weights.unsupported("num_bits", "float of " + std::to_string(group.bits) + " bits");
  group.symmetric = weights.boolean("symmetric", true);
  group.group_size = weights.group_size("group_size").value_or(0);
  group.block = weights.block("block_structure");
  std::string const strategy = lower_case(weights.text("strategy"));
  if (strategy.empty()) {   // as compressed-tensors infers it
    group.strategy = group.block[0] != 0 ? Strategy::block : group.group_size > 0 ? Strategy::group : group.group_size < 0 ? Strategy::channel : Strategy::tensor;
  } else if (strategy != "token" && strategy != "attn_head") {   // these two are for activations; whoever decodes such weights has to refuse them
    for (auto const known : {Strategy::tensor, Strategy::channel, Strategy::group, Strategy::block, Strategy::tensor_group})
      if (strategy == to_string(known)) group.strategy = known;
    if (group.strategy == Strategy::unknown) weights.unsupported("strategy", strategy);
  }
  if (auto const order = weights.find("actorder")) {
    std::string const value = lower_case(order->kind() == JsonNodeKind::boolean ? order->spelling() : std::string_view{weights.text("actorder")});
    group.act_order = value == "group" || value == "dynamic" || value == "true";
    if (!group.act_order && value != "weight" && value != "static" && value != "false") weights.unsupported("actorder", value);
  }
  return group;
}

template <class = Deferred>
void parse_groups(Fields const& fields, Config& config) {
  config.format = fields.text("format");
  config.version = fields.text("version");
  if (auto const sparsity = fields.object("sparsity_config"))
    if (std::string const format = sparsity->text("format", "dense"); format != "dense") sparsity->unsupported("format", format);
  auto const object = fields.find("config_groups");
  if (!object) return;
  Fields const checked{*object, fields.path("config_groups")};
  if (checked.members().size() > max_config_groups)
    throw Error{ErrorCode::limit, checked.where() + " has more than " + std::to_string(max_config_groups) + " groups"};
  for (auto const& [name, value] : object->members()) {   // in the order of the text: the first that fits a module is its group
    std::optional<Group> group;
    if (value.kind() == JsonNodeKind::array) {   // the name of a preset, and its targets
      if (lower_case(name) == "unquantized") continue;
      group = preset(name);
      if (!group) checked.unsupported(name, name);
      checked.append_texts(name, group->targets);
    } else {
      Fields const entry{value, checked.path(name)};
      if (auto const weights = entry.object("weights")) group = parse_weights(*weights);
      if (!entry.find("targets")) entry.wrong("targets", "is missing");
      std::vector<std::string> targets;
      entry.append_texts("targets", targets);
      if (!group) continue;   // of activations only
      group->targets = std::move(targets);
      group->format = entry.text("format");
    }
    if (group->format.empty()) group->format = config.format;
    config.groups.push_back(std::move(*group));
  }
}

template <class = Deferred>
void parse_gptq(Fields const& fields, Config& config) {
  auto const bits = fields.one_of("bits", "w_bit", &Fields::bits<>);
  if (!bits) fields.wrong("bits", "is missing");
  config.bits = *bits;
  if (config.bits != 2 && config.bits != 3 && config.bits != 4 && config.bits != 8) fields.unsupported("bits", std::to_string(config.bits));
  config.group_size = fields.one_of("group_size", "q_group_size", &Fields::group_size<>).value_or(128);
  config.act_order = fields.boolean("desc_act", false);
  config.symmetric = fields.boolean("sym", true);
  std::string_view const key = fields.find("checkpoint_format") ? "checkpoint_format" : "format";
  std::string const format = lower_case(fields.text(key, "gptq"));
  if (format != "gptq" && format != "gptq_v2") fields.unsupported(key, format);
  config.stored_zero_is_one_less = format == "gptq";
  if (fields.boolean("is_marlin_format", false)) fields.unsupported("is_marlin_format", "true");
  if (std::string const type = fields.text("pack_dtype", "int32"); type != "int32") fields.unsupported("pack_dtype", type);
  if (auto const dynamic = fields.object("dynamic"))   // GPTQModel: rules for single modules
    for (auto const& [rule, value] : dynamic->members()) {
      if (!rule.starts_with("-:")) dynamic->unsupported(rule, rule);   // other bits and groups for some modules; "-:" leaves them alone
      config.ignore.push_back("re:" + std::string{rule.substr(2)});
    }
}

template <class = Deferred>
void parse_awq(Fields const& fields, Config& config) {
  config.bits = fields.one_of("bits", "w_bit", &Fields::bits<>).value_or(4);
  if (config.bits != 4) fields.unsupported("bits", std::to_string(config.bits));
  config.group_size = fields.one_of("group_size", "q_group_size", &Fields::group_size<>).value_or(128);
  config.version = lower_case(fields.text("version", "gemm"));
  if (config.version != "gemm") fields.unsupported("version", config.version);
  config.symmetric = !fields.boolean("zero_point", true);
}

template <class = Deferred>
void parse_fp8(Fields const& fields, Config& config) {
  config.block = fields.block("weight_block_size");
  std::string const format = lower_case(fields.text("fmt", "e4m3")), scales = lower_case(fields.text("scale_fmt"));
  config.e5m2 = format == "e5m2" || format == "float8_e5m2";
  if (!config.e5m2 && format != "e4m3" && format != "float8_e4m3fn") fields.unsupported("fmt", format);
  config.power_of_two_scales = scales == "ue8m0";
  if (!scales.empty() && !config.power_of_two_scales) fields.unsupported("scale_fmt", scales);
}

template <class = Deferred>
void parse_modelopt(Fields const& fields, Config& config) {
  std::string algorithm = fields.text("quant_algo", config.method_name == "modelopt_fp4" ? "NVFP4" : "");
  for (char& c : algorithm)
    if (c >= 'a' && c <= 'z') c = static_cast<char>(c & ~0x20);
  if (!algorithm.empty() && algorithm != "FP8" && algorithm != "NVFP4") fields.unsupported("quant_algo", algorithm);
  config.group_size = fields.group_size("group_size").value_or(algorithm == "NVFP4" ? 16 : 0);
  config.algorithm = std::move(algorithm);
}

template <class = Deferred>
void parse_bitsandbytes(Fields const& fields, Config& config) {
  bool const four = fields.boolean("load_in_4bit", fields.boolean("_load_in_4bit", false)), eight = fields.boolean("load_in_8bit", fields.boolean("_load_in_8bit", false));
  if (four == eight) fields.wrong("load_in_4bit", four ? "and load_in_8bit are both true" : "and load_in_8bit are both false");
  std::string const type = lower_case(fields.text("bnb_4bit_quant_type", "fp4"));
  if (four && type != "nf4" && type != "fp4") fields.unsupported("bnb_4bit_quant_type", type);
  config.algorithm = four ? type : "int8";
}

/// The object itself. `otherwise`: the method of one that names none.
template <class = Deferred>
Config parse_fields(Fields const& fields, std::string_view otherwise) {
  Config config;
  if (otherwise.empty() && (fields.find("load_in_4bit") || fields.find("load_in_8bit"))) otherwise = "bitsandbytes";
  config.method_name = fields.text("quant_method", otherwise);
  std::string const name = lower_case(config.method_name);
  if (name.empty()) fields.wrong("quant_method", "is missing");
  std::optional<Method> method;
  for (auto const known : {Method::fp8, Method::compressed_tensors, Method::mxfp4, Method::modelopt, Method::gptq, Method::awq, Method::bitsandbytes})
    if (name == to_string(known)) method = known;
  if (name == "modelopt_fp4") method = Method::modelopt;
  if (!method) fields.unsupported("quant_method", config.method_name);
  config.method = *method;
  switch (config.method) {
    case Method::fp8: parse_fp8(fields, config); break;
    case Method::compressed_tensors: parse_groups(fields, config); break;
    case Method::mxfp4: break;
    case Method::modelopt: parse_modelopt(fields, config); break;
    case Method::gptq: parse_gptq(fields, config); break;
    case Method::awq: parse_awq(fields, config); break;
    case Method::bitsandbytes: parse_bitsandbytes(fields, config); break;
  }
  for (auto const* key : {"ignore", "modules_to_not_convert", "exclude_modules", "ignored_layers", "llm_int8_skip_modules"}) fields.append_texts(key, config.ignore);
  return config;
}

template <class = Deferred>
JsonTree parse_text(ConstByteSpan text, std::string_view what) {
  if (text.size() > max_config_bytes)
    throw Error{ErrorCode::limit, std::string{what} + " has " + std::to_string(text.size()) + " bytes; at most " + std::to_string(max_config_bytes) + " are allowed"};
  return JsonTree::parse(text, what);
}

/// A member of an object of which most is nobody's business here; nothing for null.
template <class = Deferred>
std::optional<JsonValue> only(JsonValue const& object, std::string_view key) {
  std::optional<JsonValue> found;
  for (auto const& [name, value] : object.members()) {
    if (name != key) continue;
    if (found) throw Error{ErrorCode::duplicate_key, "the configuration has the key " + shown(key) + " twice"};
    found = value;
  }
  if (found && found->kind() == JsonNodeKind::null) found.reset();
  return found;
}

template <class = Deferred>
std::optional<Config> parse_model_config(JsonValue const& model) {
  auto const quantization = only(model, "quantization_config"), compression = only(model, "compression_config"), experts = only(model, "expert_dtype");
  if (!quantization && !compression) return std::nullopt;
  Fields const fields{quantization ? *quantization : *compression, quantization ? "quantization_config" : "compression_config"};
  bool const nested = lower_case(fields.text("quant_method")).starts_with("modelopt") && fields.find("quantization");
  Config config = nested ? parse_fields(*fields.object("quantization"), "modelopt") : parse_fields(fields, quantization ? "" : "compressed-tensors");
  if (experts && !experts->is_string()) throw Error{ErrorCode::bad_schema, "expert_dtype is not a text"};
  config.fp4_experts = experts && experts->text() == "fp4";
  return config;
}

}  // namespace detail

/// From the text of a model's config.json: nothing if it has no quantization_config (nor compression_config, its old name), neither itself
/// nor in the text_config of a model of several modalities.
///
/// Throws    Error: limit, bad_utf8 or bad_json for the text; bad_schema or duplicate_key, with the key; unsupported, with what is
template <class = Deferred>
std::optional<Config> parse_config(ConstByteSpan text) {
  auto const tree = detail::parse_text(text, "config.json");
  auto const root = tree.root();
  if (auto config = detail::parse_model_config(root)) return config;
  auto const inner = detail::only(root, "text_config");
  return inner && inner->kind() == detail::JsonNodeKind::object ? detail::parse_model_config(*inner) : std::nullopt;
}

/// From quantize_config.json (GPTQ, AWQ): the object that config.json has as quantization_config. One that names no method is of
/// AWQ if it has zero_point, else of GPTQ.
///
/// Throws    as parse_config
template <class = Deferred>
Config parse_quantize_config(ConstByteSpan text) {
  auto const tree = detail::parse_text(text, "quantize_config.json");
  detail::Fields const fields{tree.root(), "quantize_config.json"};
  return detail::parse_fields(fields, fields.find("zero_point") ? "awq" : "gptq");
}

/// From hf_quant_config.json (ModelOpt): {"producer": .., "quantization": {..}}.
///
/// Throws    as parse_config
template <class = Deferred>
Config parse_hf_quant_config(ConstByteSpan text) {
  auto const tree = detail::parse_text(text, "hf_quant_config.json");
  detail::Fields const fields{tree.root(), "hf_quant_config.json"};
  auto const inner = fields.object("quantization");
  if (!inner) fields.wrong("quantization", "is missing");
  return detail::parse_fields(*inner, "modelopt");
}

namespace detail {

/// Whether `glob`, in which each * stands for any characters, is all of `text`. Time: the product of both lengths.
template <class = Deferred>
bool matches_glob(std::string_view glob, std::string_view text) {
  std::size_t g = 0, t = 0, star = std::string_view::npos, retry = 0;
  while (t < text.size()) {
    if (g < glob.size() && glob[g] == '*') star = g++, retry = t;
    else if (g < glob.size() && glob[g] == text[t]) ++g, ++t;
    else if (star != std::string_view::npos) g = star + 1, t = ++retry;   // the last star takes one character more; those before it need not
    else return false;
  }
  while (g < glob.size() && glob[g] == '*') ++g;
  return g == glob.size();
}

/// "Linear": a class, in a list that otherwise has names of modules.
template <class = Deferred>
bool is_class_name(std::string_view target) {
  return !target.empty() && target[0] >= 'A' && target[0] <= 'Z' && target.find('.') == std::string_view::npos && target.find('*') == std::string_view::npos;
}

}  // namespace detail

/// Whether `pattern`, an entry of targets or ignore, means `module` ("model.layers.0.mlp.gate_proj").
///
/// Rule      a name means itself, all below it ("model.layers.0") and all that end with it ("mlp.gate_proj"), in whole parts between dots; so
///           does one with *, each of which stands for any characters, dots too; "re:" and a regular expression is matched from the start,
///           as Python's re.match does
/// Throws    Error(unsupported) or Error(limit) for a regular expression that LinearRegex refuses
template <class = Deferred>
bool matches(std::string_view pattern, std::string_view module) {
  if (pattern.starts_with("re:")) return detail::LinearRegex{pattern.substr(3)}.match(module);
  if (pattern.find('*') == std::string_view::npos) {
    if (pattern.size() >= module.size() || pattern.empty()) return pattern == module;
    return (module.starts_with(pattern) && module[pattern.size()] == '.') || (module.ends_with(pattern) && module[module.size() - pattern.size() - 1] == '.');
  }
  std::string const glob{pattern};
  return detail::matches_glob(glob, module) || detail::matches_glob(glob + ".*", module) || detail::matches_glob("*." + glob, module);
}

/// The group that is for `module`: the first whose targets name it; else the first with the name of a class among them, because the
/// classes of modules are not in a checkpoint; nullptr if there is none. What config.ignore says is not asked.
///
/// Throws    as matches
template <class = Deferred>
Group const* group_for(Config const& config, std::string_view module) {
  Group const* of_class = nullptr;
  for (auto const& group : config.groups)
    for (auto const& target : group.targets) {
      if (!detail::is_class_name(target)) {
        if (matches(target, module)) return &group;
      } else if (of_class == nullptr) {
        of_class = &group;
      }
    }
  return of_class;
}

namespace detail {

/// JSON indented by 2, as json.dumps does it; members become sorted.
template <class = Deferred>
std::string indented(std::string_view json) {
  std::string out;
  for (char const c : json) (out += c) += c == '\n' ? "  " : "";   // texts within JSON have no line breaks of their own
  return out;
}
template <class = Deferred>
std::string json_lines(char open, std::vector<std::string> const& lines, char close) {
  std::string out{open};
  char const* separator = "\n  ";
  for (auto const& line : lines) (out += std::exchange(separator, ",\n  ")) += indented(line);
  if (!lines.empty()) out += '\n';
  return out += close;
}
template <class = Deferred>
std::string json_list(std::vector<std::string> const& texts) {
  std::vector<std::string> lines;
  for (auto const& text : texts) lines.push_back(python_quoted(text));
  return json_lines('[', lines, ']');
}

class ObjectText {
 public:
  template <class = Deferred>
  ObjectText& json(std::string_view key, std::string value) {
    members_.emplace_back(key, std::move(value));
    return *this;
  }
  template <class = Deferred>
  ObjectText& text(std::string_view key, std::string_view value) { return json(key, python_quoted(value)); }
  template <class = Deferred>
  ObjectText& boolean(std::string_view key, bool value) { return json(key, value ? "true" : "false"); }
  /// 0 becomes null.
  template <class = Deferred>
  ObjectText& number(std::string_view key, std::int64_t value) { return json(key, value == 0 ? "null" : std::to_string(value)); }
  template <class = Deferred>
  ObjectText& block(std::string_view key, std::array<std::int64_t, 2> const& sizes) {
    return json(key, sizes == std::array<std::int64_t, 2>{0, 0} ? "null" : json_lines('[', {std::to_string(sizes[0]), std::to_string(sizes[1])}, ']'));
  }
  template <class = Deferred>
  std::string take() {
    dcp::detail::sort(members_);
    std::vector<std::string> lines;
    for (auto const& [key, value] : members_) lines.push_back(python_quoted(key) + ": " + value);
    return json_lines('{', lines, '}');
  }

 private:
  std::vector<std::pair<std::string, std::string>> members_;
};

template <class = Deferred>
std::string group_text(Group const& group, std::string_view format) {
  bool const nvfp4 = group.strategy == Strategy::tensor_group;
  ObjectText weights, out;
  weights.json("actorder", group.act_order ? "\"group\"" : "null").block("block_structure", group.block).boolean("dynamic", false);
  weights.number("group_size", group.group_size).json("num_bits", std::to_string(group.bits)).text("observer", "minmax").json("observer_kwargs", "{}");
  weights.json("scale_dtype", nvfp4 ? "\"torch.float8_e4m3fn\"" : "null").boolean("symmetric", group.symmetric);
  weights.text("strategy", group.strategy == Strategy::unknown ? "token" : to_string(group.strategy)).text("type", group.is_float ? "float" : "int");
  weights.json("zp_dtype", group.symmetric ? "null" : "\"torch.int8\"");
  if (!group.format.empty() || !format.empty()) out.text("format", group.format.empty() ? format : std::string_view{group.format});
  out.json("input_activations", "null").json("output_activations", "null").json("targets", json_list(group.targets)).json("weights", weights.take());
  return out.take();
}

}  // namespace detail

/// The JSON of a quantization_config, as transformers writes it: indented by 2, keys sorted, ASCII. What parse_config then reads is
/// `config`, with the usual spelling of the method, but for fp4_experts, which has its place beside it.
///
/// Throws    what parse_config would throw
template <class = Deferred>
std::string write_config(Config const& config) {
  detail::ObjectText out;
  out.text("quant_method", to_string(config.method));
  auto const names = [&](std::string_view key) {
    if (!config.ignore.empty()) out.json(key, detail::json_list(config.ignore));
  };
  switch (config.method) {
    case Method::fp8:
      out.text("activation_scheme", "dynamic").text("fmt", config.e5m2 ? "e5m2" : "e4m3");
      if (config.block != std::array<std::int64_t, 2>{0, 0}) out.block("weight_block_size", config.block);
      if (config.power_of_two_scales) out.text("scale_fmt", "ue8m0");
      names("modules_to_not_convert");
      break;
    case Method::compressed_tensors: {
      std::vector<std::string> groups;   // not sorted: the first that fits a module is its group
      bool odd = false;   // bits that versions before 0.17 packed in another way
      for (std::size_t i = 0; i < config.groups.size(); ++i) {
        Group const& group = config.groups[i];
        odd = odd || (!group.is_float && group.bits > 0 && 8 % group.bits != 0);
        groups.push_back("\"group_" + std::to_string(i) + "\": " + detail::group_text(group, config.format));
      }
      out.json("config_groups", detail::json_lines('{', groups, '}')).json("global_compression_ratio", "null").json("ignore", detail::json_list(config.ignore));
      out.json("kv_cache_scheme", "null").text("quantization_status", "compressed").text("version", !config.version.empty() ? config.version : odd ? "0.17.0" : "0.9.0");
      if (!config.format.empty()) out.text("format", config.format);
      break;
    }
    case Method::mxfp4: names("modules_to_not_convert"); break;
    case Method::modelopt:
      out.json("quant_algo", config.algorithm.empty() ? "null" : detail::python_quoted(config.algorithm)).json("ignore", detail::json_list(config.ignore));
      if (config.group_size != 0) out.number("group_size", config.group_size);
      break;
    case Method::gptq:
      out.json("bits", std::to_string(config.bits)).json("group_size", std::to_string(config.group_size)).boolean("desc_act", config.act_order);
      out.boolean("sym", config.symmetric).text("checkpoint_format", config.stored_zero_is_one_less ? "gptq" : "gptq_v2");
      names("modules_to_not_convert");
      break;
    case Method::awq:
      out.json("bits", std::to_string(config.bits)).json("group_size", std::to_string(config.group_size)).text("version", "gemm");
      out.boolean("zero_point", !config.symmetric).json("modules_to_not_convert", config.ignore.empty() ? "null" : detail::json_list(config.ignore));
      break;
    case Method::bitsandbytes:
      out.boolean("load_in_4bit", config.algorithm != "int8").boolean("load_in_8bit", config.algorithm == "int8");
      if (config.algorithm != "int8") out.text("bnb_4bit_quant_type", config.algorithm);
      names("llm_int8_skip_modules");
      break;
  }
  std::string text = out.take();
  parse_quantize_config(as_byte_span(text));   // nothing leaves this function that its own reader refuses
  return text;
}

namespace detail {

/// Where the members of the object stand that is all of `text`, which is known to be JSON.
struct MemberPlace {
  std::size_t value = 0, value_end = 0;    // of the member looked for; 0: it is not there
  std::size_t last_end = 0;                // of the last member, or of the opening brace
  bool empty = true;
};

template <class = Deferred>
MemberPlace find_member(std::string_view text, std::string_view wanted) {
  MemberPlace place;
  std::size_t at = 0;
  auto const blanks = [&] { at = std::min(text.find_first_not_of(" \n\t\r", at), text.size()); };
  auto const string = [&] {
    for (++at; text[at] != '"'; ++at) at += text[at] == '\\' ? 1 : 0;
    ++at;
  };
  blanks();
  place.last_end = ++at;   // behind the brace
  for (blanks(); text[at] != '}'; blanks()) {
    if (text[at] == ',') ++at, blanks();
    std::size_t const key = at;
    string();
    auto const spelled = text.substr(key, at - key);
    bool const escaped = spelled.find('\\') != std::string_view::npos;
    bool const found = escaped ? JsonTree::parse(as_byte_span(spelled), "a name").root().text() == wanted : spelled.substr(1, spelled.size() - 2) == wanted;
    blanks(), ++at, blanks();   // the colon
    std::size_t const value = at;
    for (int depth = 0;;) {
      char const c = text[at];
      if (c == '"') string();
      else if (c == '{' || c == '[') ++depth, ++at;
      else if (c == '}' || c == ']') --depth, ++at;
      else if (depth > 0) ++at;
      else at = text.find_first_of(",}] \n\t\r", at);   // a number, or a word
      if (depth == 0) break;
    }
    if (found && place.value != 0) throw Error{ErrorCode::duplicate_key, "the configuration has the key " + shown(wanted) + " twice"};
    if (found) place.value = value, place.value_end = at;
    place.last_end = at;
    place.empty = false;
  }
  return place;
}

}  // namespace detail

/// The text of a config.json with `object` (JSON, as write_config gives it) as its quantization_config. Everything else stays as it is, byte
/// for byte. An empty text: a new file.
///
/// Throws    Error: limit, bad_utf8 or bad_json for either text; bad_schema for one that is no object; duplicate_key if
///           there are two
template <class = Deferred>
std::string with_quantization_config(ConstByteSpan config_json, std::string_view object) {
  constexpr std::string_view key = "quantization_config";
  auto const checked = [](ConstByteSpan text, std::string_view what) { detail::parse_text(text, what).root().members(); };
  checked(as_byte_span(object), key);
  std::string text{config_json.empty() ? std::string_view{"{}\n"} : as_text(config_json)};
  checked(as_byte_span(text), "config.json");
  std::string const value = detail::indented(object.substr(0, object.find_last_not_of(" \n\t\r") + 1));
  detail::MemberPlace const place = detail::find_member(text, key);
  if (place.value != 0) return text.replace(place.value, place.value_end - place.value, value);
  std::string member = place.empty ? "\n  \"" : ",\n  \"";
  ((member += key) += "\": ") += value;
  if (place.empty) member += '\n';
  return text.insert(place.last_end, member);
}

}  // namespace dcp::quantization
