// SPDX-License-Identifier: Apache-2.0
// libFuzzer target: any bytes as an index. Whatever is accepted names safe files only and survives being written again.

#include <dcp/formats/hf_index.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size) {
  using namespace dcp::hf;
  for (IndexOptions const& options : {IndexOptions{}, IndexOptions{.allow_subdirectories = true, .ignore_bad_total_size = true, .max_entries = 3}}) {
    try {
      Index const index = parse_index(std::as_bytes(std::span{data, size}), options);
      for (auto const& [tensor, file] : index.weight_map) {
        bool const leaves = file.empty() || file[0] == '/' || file.find("..") == 0 || file.find("/..") != std::string::npos ||
                            file.find_first_of(std::string_view{"\0\\:", 3}) != std::string::npos;
        if (leaves || index.find_file(tensor) != file) std::abort();
      }
      if (parse_index(dcp::as_byte_span(write_index(index, options)), options) != index) std::abort();
    } catch (dcp::Error const&) {
    }
  }
  return 0;
}
