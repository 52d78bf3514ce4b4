// SPDX-License-Identifier: Apache-2.0
#pragma once
// Golden files and error codes, for the tests of this folder.

#include <dcp/base/bytes.hpp>
#include <dcp/base/error.hpp>

#include <nlohmann/json.hpp>

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace golden {

inline std::filesystem::path root() { return std::filesystem::path{DCP_TESTS_DIR} / "golden"; }

inline std::string text_of(std::filesystem::path const& file) {
  std::ifstream in{file, std::ios::binary};
  if (!in) throw std::runtime_error{"cannot open " + file.string()};
  return {std::istreambuf_iterator<char>{in}, std::istreambuf_iterator<char>{}};
}

inline nlohmann::json json_of(std::filesystem::path const& file) { return nlohmann::json::parse(text_of(file)); }

/// The entries of `directory` and below, sorted, that end in `extension`.
inline std::vector<std::filesystem::path> files_below(std::filesystem::path const& directory, std::string const& extension) {
  std::vector<std::filesystem::path> found;
  for (auto const& entry : std::filesystem::recursive_directory_iterator{directory})
    if (entry.is_regular_file() && entry.path().extension() == extension) found.push_back(entry.path());
  std::sort(found.begin(), found.end());
  return found;
}

/// The name of the code that `call` throws, or "ok". Any other exception than Error passes through.
template <class F>
std::string outcome(F const& call) {
  try {
    call();
  } catch (dcp::Error const& error) {
    return std::string{to_string(error.code())};
  }
  return "ok";
}

/// A file: length, `json`, and `data_bytes` zeros.
inline std::string file_with(std::string const& json, std::size_t data_bytes = 0) {
  std::string file(8, '\0');
  std::uint64_t const n = json.size();
  std::memcpy(file.data(), &n, sizeof n);
  return file + json + std::string(data_bytes, '\0');
}

}  // namespace golden
