// SPDX-License-Identifier: Apache-2.0
// libFuzzer target: any bytes as a GGUF file. Whatever is accepted lies within the file and survives being written again.
// fuzz: -max_len=4096

#include <dcp/formats/gguf.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

namespace {

void expect(bool condition) {
  if (!condition) std::abort();
}

void read(dcp::ConstByteSpan file, dcp::gguf::ParseOptions const& options) try {
  using namespace dcp::gguf;
  Header const header = parse_header(file, options);
  std::uint64_t cursor = header.data_begin;
  for (auto const& tensor : header.tensors) {
    expect(tensor.offset == cursor && tensor.bytes == tensor_bytes(tensor.type, tensor.shape) && tensor.offset + tensor.bytes <= file.size());
    cursor = dcp::round_up(tensor.offset + tensor.bytes, header.alignment);
  }
  expect(header.tensors.empty() || cursor <= file.size() || options.allow_missing_final_padding);
  expect(header.tensors.empty() || cursor >= file.size() || options.allow_trailing_bytes);
  try {
    split_of(header);
  } catch (dcp::Error const&) {
  }
  dcp::Bytes again;
  std::uint64_t size = 0;
  try {
    Layout layout = lay_out(header.tensors, header.metadata, header.alignment);
    expect(layout.data_begin == dcp::round_up(header.data_begin, header.alignment));
    again = std::move(layout.header), size = layout.file_size;
  } catch (dcp::Error const& error) {
    expect(error.code() == dcp::ErrorCode::unsupported);   // arrays of arrays are read and not written
    return;
  }
  Header const reread = parse_header([&](std::uint64_t position, dcp::ByteSpan to) {
    for (std::size_t i = 0; i < to.size(); ++i) to[i] = position + i < again.size() ? again[static_cast<std::size_t>(position) + i] : std::byte{};
  }, size, options);
  expect(reread.tensors == header.tensors && reread.metadata == header.metadata && reread.alignment == header.alignment);
} catch (dcp::Error const&) {
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size) {
  dcp::ConstByteSpan const file = std::as_bytes(std::span{data, size});
  read(file, {});
  read(file, {.allow_trailing_bytes = true, .allow_missing_final_padding = true, .max_text_bytes = 100});
  return 0;
}
