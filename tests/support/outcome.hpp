// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a save has left: an error, files.

#include <dcp/base/error.hpp>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <string>

namespace dcp::test {

/// What body() throws; nothing if it returns.
template <class Body>
std::optional<Error> error_of(Body body) {
  try {
    body();
  } catch (Error const& error) {
    return error;
  }
  return std::nullopt;
}

/// Every file below `directory`, by its path there, and its bytes.
inline std::map<std::string, std::string> files_in(std::filesystem::path const& directory) {
  std::map<std::string, std::string> files;
  for (auto const& entry : std::filesystem::recursive_directory_iterator{directory}) {
    if (!entry.is_regular_file()) continue;
    std::ifstream in{entry.path(), std::ios::binary};
    files[std::filesystem::relative(entry.path(), directory).string()] = {std::istreambuf_iterator<char>{in}, {}};
  }
  return files;
}

}  // namespace dcp::test
