// SPDX-License-Identifier: Apache-2.0
// libFuzzer target: any bytes as a safetensors file. Whatever is accepted must agree with itself and survive being written again.

#include <dcp/formats/safetensors_header.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace {

void expect(bool condition) {
  if (!condition) std::abort();
}

void read(dcp::ConstByteSpan file, dcp::safetensors::ParseOptions options) try {
  using namespace dcp::safetensors;
  auto const n = header_bytes(file.first(file.size() < 8 ? file.size() : 8), file.size());
  Header const header = parse_header(file.subspan(8, static_cast<std::size_t>(n)), file.size(), options);
  std::uint64_t cursor = 0;
  for (auto const& tensor : header.tensors) {
    expect(tensor.begin == cursor && tensor.end - tensor.begin == tensor_bytes(tensor.dtype, tensor.shape));
    cursor = tensor.end;
  }
  expect(header.data_begin + cursor <= file.size() && (options.allow_trailing_bytes || header.data_begin + cursor == file.size()));
  dcp::Bytes const again = write_header(header.tensors, header.metadata);
  Header const reread = parse_header(dcp::ConstByteSpan{again}.subspan(8), again.size() + cursor);
  expect(reread.tensors == header.tensors && reread.metadata == header.metadata);
  if (auto const text = header.find_metadata(sharding_info_key)) {
    ShardingInfo const info = parse_sharding_info(*text);
    expect(parse_sharding_info(write_sharding_info(info)) == info);
    for (auto const& tensor : header.tensors) saved_offsets(info, tensor);
  }
} catch (dcp::Error const&) {
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size) {
  dcp::ConstByteSpan const file = std::as_bytes(std::span{data, size});
  read(file, {});
  read(file, {.allow_duplicate_names = true, .allow_trailing_bytes = true, .refuse_unknown_fields = true});
  // The same bytes as header text alone, so that the fuzzer need not find the length.
  std::uint64_t const n = size;
  dcp::ByteWriter whole;
  whole.number(n).raw(file);
  read(whole.bytes(), {.allow_duplicate_names = true});
  try {
    dcp::safetensors::parse_sharding_info(dcp::as_text(file));
  } catch (dcp::Error const&) {
  }
  return 0;
}
