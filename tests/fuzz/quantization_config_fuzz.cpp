// SPDX-License-Identifier: Apache-2.0
// libFuzzer target: any bytes as a config.json and its siblings. Whatever is accepted is written and read as the same; the patterns that it
// has are asked, and one more configuration in the text changes nothing else.

#include <dcp/formats/quantization_config.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <span>
#include <string>
#include <string_view>

// fuzz: -max_len=4096

namespace {

using namespace dcp::quantization;

template <class F>
void unless_refused(F const& call) {
  try {
    call();
  } catch (dcp::Error const&) {
  }
}

/// What `parse` accepts; outside, so that no refusal of what follows passes for one of the text.
template <class F>
std::optional<Config> accepted(F const& parse) {
  std::optional<Config> config;
  unless_refused([&] { config = parse(); });
  return config;
}

void check(Config config) {
  std::string const text = write_config(config);
  Config const again = parse_quantize_config(dcp::as_byte_span(text));
  config.method_name = again.method_name;                           // has synonyms
  if (config.version.empty()) config.version = again.version;       // is written even if the text had none
  config.fp4_experts = again.fp4_experts;                           // stands outside
  if (config != again || write_config(again) != text) std::abort();
  for (std::string_view const module : {"lm_head", "model.layers.10.mlp.gate_proj", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!"}) {
    unless_refused([&] { group_for(again, module); });
    for (auto const& pattern : again.ignore) unless_refused([&] { matches(pattern, module); });
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size) {
  auto const bytes = std::as_bytes(std::span{data, size});
  if (auto const config = accepted([&] { return parse_config(bytes); })) check(*config);
  if (auto const config = accepted([&] { return std::optional{parse_quantize_config(bytes)}; })) check(*config);
  if (auto const config = accepted([&] { return std::optional{parse_hf_quant_config(bytes)}; })) check(*config);
  unless_refused([&] {
    constexpr std::string_view object = R"({"quant_method": "mxfp4"})";
    std::string const with = with_quantization_config(bytes, object);
    auto const config = parse_config(dcp::as_byte_span(with));
    if (!config || config->method != Method::mxfp4 || with_quantization_config(dcp::as_byte_span(with), object) != with) std::abort();
  });
  unless_refused([&] { matches("re:" + std::string{dcp::as_text(bytes)}, "model.layers.10.mlp.gate_proj"); });
  return 0;
}
