// SPDX-License-Identifier: Apache-2.0
// seconds: 60
// libFuzzer target: any bytes as a zip archive. Both readers say the same, whatever is accepted lies within the archive without overlaps,
// and survives being written again.
// fuzz: -max_len=4096

#include <dcp/formats/zip.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <span>
#include <vector>

namespace {

void expect(bool condition) {
  if (!condition) std::abort();
}

void read(dcp::ConstByteSpan archive, dcp::zip::Limits const& limits) {
  using namespace dcp::zip;
  auto const read_at = [&](std::uint64_t position, dcp::ByteSpan to) {
    expect(position <= archive.size() && to.size() <= archive.size() - position);
    if (!to.empty()) std::memcpy(to.data(), archive.data() + position, to.size());
  };
  std::optional<dcp::ErrorCode> refused;
  Directory directory;
  try {
    directory = read_directory(archive.size(), read_at, limits);
    for (auto& entry : directory.entries) locate(entry, read_at);
  } catch (dcp::Error const& error) {
    refused = error.code();
  }
  DirectoryView view;
  try {
    view = read_directory(archive, limits);
  } catch (dcp::Error const& error) {
    expect(refused == error.code());
    return;
  }
  expect(!refused && directory.entries.size() == view.entries.size() && directory.begin == view.begin && directory.entries.size() <= limits.max_entries);
  std::uint64_t data_bytes = 0;
  std::vector<Record> records;
  for (std::size_t i = 0; i < view.entries.size(); ++i) {
    auto const& entry = view.entries[i];
    auto const& other = directory.entries[i];
    expect(entry.name == other.name && entry.data == other.data && entry.size == other.size && entry.crc == other.crc && entry.end == other.end);
    expect(entry.header < entry.data && entry.data + entry.size <= entry.end && entry.end <= view.begin && view.begin <= archive.size());
    expect(directory.find(entry.name) == &other && view.find(entry.name) == &entry);
    data_bytes += entry.size;
    records.push_back({entry.name, data_of(archive, entry)});
  }
  expect(data_bytes <= archive.size());

  dcp::Bytes const again = write(records);
  DirectoryView const reread = read_directory(dcp::ConstByteSpan{again});
  expect(reread.entries.size() == records.size());
  for (std::size_t i = 0; i < records.size(); ++i) {
    auto const data = data_of(dcp::ConstByteSpan{again}, reread.entries[i]);
    expect(reread.entries[i].name == records[i].name && data.size() == records[i].bytes.size() && reread.entries[i].crc == dcp::crc32(records[i].bytes));
    expect(data.empty() || std::memcmp(data.data(), records[i].bytes.data(), data.size()) == 0);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size) {
  dcp::ConstByteSpan const archive = std::as_bytes(std::span{data, size});
  read(archive, {});
  read(archive, {.max_entries = 3, .max_directory_bytes = 300, .max_name_bytes = 20});
  return 0;
}
