// SPDX-License-Identifier: Apache-2.0
#pragma once
// Which format a checkpoint has, by looking at it.

#include <dcp/dcp.hpp>
#include <nlohmann/json.hpp>

#include <array>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

namespace tool {

namespace fs = std::filesystem;

enum class Format : std::uint8_t { safetensors, quantized, gguf, torch, torch_file };

inline std::string_view to_string(Format format) {
  constexpr std::array<std::string_view, 5> names{"safetensors", "quantized safetensors", "GGUF", "PyTorch distributed checkpoint", "torch.save"};
  return names[static_cast<std::size_t>(format)];
}

inline std::string text_of(fs::path const& file, std::size_t most) {
  std::ifstream in{file, std::ios::binary};
  std::string text(most, '\0');
  in.read(text.data(), static_cast<std::streamsize>(most));
  text.resize(static_cast<std::size_t>(in.gcount()));
  return text;
}

/// Throws dcp::Error(not_found) for a place that holds no checkpoint of a known format.
inline Format format_of(fs::path const& place) {
  auto const unknown = [&](std::string const& why) { return dcp::Error{dcp::ErrorCode::not_found, why}.with_path(place.string()); };
  if (!fs::exists(place)) throw unknown("there is nothing");
  if (!fs::is_directory(place)) {
    std::string const first = text_of(place, 16);
    if (first.starts_with("GGUF")) return Format::gguf;
    if (first.starts_with("PK") || first.starts_with("\x80\x02")) return Format::torch_file;
    if (first.size() > 8 && first[8] == '{') return Format::safetensors;
    throw unknown("the file has no format that is known here");
  }
  // What this library has saved says so.
  if (fs::exists(place / "dcp.json")) {
    auto const record = nlohmann::json::parse(text_of(place / "dcp.json", std::size_t{1} << 30), nullptr, false);
    std::string const storage = record.is_object() ? record.value("storage", "") : "";
    if (storage == "torch_dcp") return Format::torch;
    if (storage == "gguf") return Format::gguf;
    if (!storage.empty()) return storage == "safetensors" ? Format::safetensors : Format::quantized;
  }
  bool safetensors = false, gguf = false;
  for (auto const& entry : fs::directory_iterator{place}) {
    auto const name = entry.path().filename().string();
    if (name == ".metadata" || name == "__0.metadata") return Format::torch;
    safetensors = safetensors || name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
    gguf = gguf || name.ends_with(".gguf");
  }
  if (safetensors) {
    auto const config = nlohmann::json::parse(text_of(place / "config.json", 1 << 24), nullptr, false);
    return config.is_object() && config.contains("quantization_config") ? Format::quantized : Format::safetensors;
  }
  if (gguf) return Format::gguf;
  throw unknown("the directory holds no checkpoint of a format that is known here");
}

/// Calls f.template operator()<Storage>().
template <class F>
auto with_storage(Format format, F f) {
  switch (format) {
    case Format::quantized: return f.template operator()<dcp::Quantized<dcp::AnyScheme, dcp::SafeTensors>>();
    case Format::gguf: return f.template operator()<dcp::Gguf>();
    case Format::torch: return f.template operator()<dcp::TorchDcp>();
    case Format::torch_file: return f.template operator()<dcp::TorchFile>();
    case Format::safetensors: break;
  }
  return f.template operator()<dcp::SafeTensors>();
}

}  // namespace tool
