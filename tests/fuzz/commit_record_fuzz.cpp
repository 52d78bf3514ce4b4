// SPDX-License-Identifier: Apache-2.0
// libFuzzer target: any bytes as a commit record, with the checksum they should have, so that what is behind it is reached. Whatever is
// accepted survives being written again.

#include <dcp/formats/commit_record.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>

namespace {

void read(dcp::ConstByteSpan bytes, dcp::ConstByteSpan large) try {
  auto const record = dcp::parse_record(bytes, large);
  dcp::Bytes payloads, again_payloads;
  auto const written = dcp::write_record(record, payloads);
  auto const again = dcp::parse_record(written, payloads);
  if (dcp::write_record(again, again_payloads) != written || again_payloads != payloads || again.values != record.values) std::abort();
} catch (dcp::Error const&) {
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size) {
  auto const bytes = std::as_bytes(std::span{data, size});
  read(bytes, bytes);
  auto const line = dcp::as_text(bytes).find('\n');
  auto const rest = line == std::string_view::npos ? bytes : bytes.subspan(line + 1);
  std::string text = "{\"dcp_crc64\": \"" + dcp::hex16(dcp::crc64(rest)) + "\",\n";
  text += dcp::as_text(rest);
  read(dcp::as_byte_span(text), bytes);
  return 0;
}
