// SPDX-License-Identifier: Apache-2.0
#pragma once
// The safetensors format as its specification says it, in a page that shares no code with the library: what "a generic loader" and "a
// file by somebody else" mean in tests.

#include <nlohmann/json.hpp>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace dcp::test::plain {

struct Tensor {
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::string bytes;

  template <class T>
  std::vector<T> as() const {
    std::vector<T> values(bytes.size() / sizeof(T));
    if (!values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }
};
struct File {
  std::map<std::string, Tensor> tensors;
  std::map<std::string, std::string> metadata;
};

template <class T>
Tensor tensor_of(std::string dtype, std::vector<std::int64_t> shape, std::vector<T> const& values) {
  return {std::move(dtype), std::move(shape), std::string{reinterpret_cast<char const*>(values.data()), values.size() * sizeof(T)}};
}

inline std::string text_of(std::string const& path) {
  std::ifstream in{path, std::ios::binary};
  if (!in) throw std::runtime_error{"cannot open " + path};
  return {std::istreambuf_iterator<char>{in}, std::istreambuf_iterator<char>{}};
}

inline File read(std::string const& path) {
  std::string const text = text_of(path);
  std::uint64_t length = 0;
  std::memcpy(&length, text.data(), 8);
  auto const header = nlohmann::json::parse(text.substr(8, static_cast<std::size_t>(length)));
  File file;
  for (auto const& [name, entry] : header.items()) {
    if (name == "__metadata__") {
      file.metadata = entry.get<std::map<std::string, std::string>>();
      continue;
    }
    auto const begin = entry["data_offsets"][0].get<std::size_t>(), end = entry["data_offsets"][1].get<std::size_t>();
    file.tensors[name] = {entry["dtype"].get<std::string>(), entry["shape"].get<std::vector<std::int64_t>>(), text.substr(8 + static_cast<std::size_t>(length) + begin, end - begin)};
  }
  return file;
}

/// The bytes of a file.
inline std::string bytes_of(File const& file) {
  nlohmann::json header = nlohmann::json::object();
  std::string data;
  for (auto const& [name, tensor] : file.tensors) {
    header[name] = {{"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {data.size(), data.size() + tensor.bytes.size()}}};
    data += tensor.bytes;
  }
  if (!file.metadata.empty()) header["__metadata__"] = file.metadata;
  std::string const text = header.dump();
  std::uint64_t const length = text.size();
  return std::string{reinterpret_cast<char const*>(&length), 8} + text + data;
}

inline void write(std::string const& path, File const& file) {
  std::ofstream out{path, std::ios::binary};
  out << bytes_of(file);
  if (!out.flush()) throw std::runtime_error{"cannot write " + path};
}

}  // namespace dcp::test::plain
