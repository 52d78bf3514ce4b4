// SPDX-License-Identifier: Apache-2.0
#include <dcp/formats/zip.hpp>

#include "golden.hpp"
#include "support/allocation_counts.hpp"
#include "support/generate.hpp"

#include <doctest/doctest.h>

#include <cstring>
#include <map>
#include <optional>
#include <utility>

using namespace dcp;
using namespace dcp::zip;

namespace {

std::string golden_zip(char const* name) { return golden::text_of(golden::root() / "zip" / name); }

/// Reads from memory, and counts.
struct Reader {
  std::string_view archive;
  int* reads = nullptr;
  void operator()(std::uint64_t position, ByteSpan to) const {
    REQUIRE(position <= archive.size());
    REQUIRE(to.size() <= archive.size() - position);
    if (!to.empty()) std::memcpy(to.data(), archive.data() + position, to.size());
    if (reads != nullptr) ++*reads;
  }
};

/// What both forms of the reader say, which must be the same.
Directory read_all(std::string_view archive, Limits const& limits = {}) {
  Directory directory;
  std::string const outcome = golden::outcome([&] {
    directory = read_directory(archive.size(), Reader{archive}, limits);
    for (auto& entry : directory.entries) locate(entry, Reader{archive});
  });
  std::string in_memory_outcome = "ok";
  DirectoryView in_memory;
  try {
    in_memory = read_directory(as_byte_span(archive), limits);
  } catch (Error const& error) {
    in_memory_outcome = to_string(error.code());
    CHECK(outcome == in_memory_outcome);
    throw;
  }
  REQUIRE(outcome == in_memory_outcome);
  REQUIRE(directory.begin == in_memory.begin);
  REQUIRE(directory.entries.size() == in_memory.entries.size());
  for (std::size_t i = 0; i < directory.entries.size(); ++i) {
    auto const& a = directory.entries[i];
    auto const& b = in_memory.entries[i];
    REQUIRE((a.name == b.name && a.size == b.size && a.header == b.header && a.end == b.end && a.data == b.data && a.crc == b.crc && a.flags == b.flags));
  }
  return directory;
}
std::string outcome_of(std::string_view archive, Limits const& limits = {}) {
  return golden::outcome([&] { read_all(archive, limits); });
}

/// The archives of a .distcp file, which lie back to back: each ends with an end record without a comment.
std::vector<std::string_view> blobs_of(std::string_view file) {
  std::vector<std::string_view> blobs;
  while (!file.empty()) {
    std::size_t const end = file.find("PK\5\6");
    REQUIRE(end != std::string_view::npos);
    blobs.push_back(file.substr(0, end + 22));
    file.remove_prefix(end + 22);
  }
  return blobs;
}

/// The same records, written again.
std::string written_again(std::string_view archive) {
  DirectoryView const directory = read_directory(as_byte_span(archive));
  std::vector<Record> records;
  for (auto const& entry : directory.entries) records.push_back({entry.name, data_of(as_byte_span(archive), entry)});
  Bytes const again = write(records);
  return std::string{as_text(again)};
}

std::vector<Record> records_named(std::vector<std::string> const& names) {
  std::vector<Record> records;
  for (auto const& name : names) records.push_back({.name = name});
  return records;
}

std::string raw(std::uint64_t number, std::size_t bytes) { return {reinterpret_cast<char const*>(&number), bytes}; }
std::string u16(std::uint64_t n) { return raw(n, 2); }
std::string u32(std::uint64_t n) { return raw(n, 4); }
std::string u64(std::uint64_t n) { return raw(n, 8); }
std::string zip64(std::vector<std::uint64_t> const& numbers) {
  std::string out = u16(1) + u16(8 * numbers.size());
  for (auto const number : numbers) out += u64(number);
  return out;
}

/// An archive made by hand, each field of which may lie.
struct File {
  struct One {
    std::string name = {}, data = {};
    std::uint64_t flags = 0, method = 0, disk = 0;
    std::string extra = {}, local_extra = {}, comment = {}, gap = {};   // gap: before the local header
    std::optional<std::string> local_name = {};
    std::optional<std::uint64_t> size = {}, packed = {}, header = {}, crc = {}, signature = {}, name_bytes = {}, extra_bytes = {};
    std::optional<std::uint64_t> local_flags = {}, local_method = {}, local_size = {}, local_packed = {}, local_crc = {}, local_signature = {}, local_extra_bytes = {};
  };
  std::vector<One> ones{{"a", "alpha"}, {"b", "beta"}};
  std::string prefix = {}, before_end = {}, after_directory = {}, suffix = {};
  bool has_zip64 = false;
  std::string comment = {};
  std::uint64_t disk = 0, directory_disk = 0, zip64_disk = 0, disks = 1;
  std::optional<std::uint64_t> count = {}, count_here = {}, size = {}, begin = {}, comment_bytes = {};
  std::optional<std::uint64_t> count64 = {}, size64 = {}, begin64 = {}, zip64_position = {}, zip64_size = {}, zip64_signature = {};

  std::string bytes() const {
    std::string out = prefix, directory;
    for (auto const& one : ones) {
      out += one.gap;
      std::uint64_t const position = out.size(), crc = crc32(as_byte_span(one.data)), bytes = one.data.size();
      bool const later = (one.flags & 8) != 0;
      std::string const local_name = one.local_name.value_or(one.name);
      out += u32(one.local_signature.value_or(0x04034b50)) + u16(20) + u16(one.local_flags.value_or(one.flags)) + u16(one.local_method.value_or(one.method)) + u32(0) +
             u32(one.local_crc.value_or(later ? 0 : crc)) + u32(one.local_packed.value_or(later ? 0 : bytes)) + u32(one.local_size.value_or(later ? 0 : bytes)) +
             u16(local_name.size()) + u16(one.local_extra_bytes.value_or(one.local_extra.size())) + local_name + one.local_extra + one.data;
      if (later) out += u32(0x08074b50) + u32(crc) + u32(bytes) + u32(bytes);
      directory += u32(one.signature.value_or(0x02014b50)) + u16(20) + u16(20) + u16(one.flags) + u16(one.method) + u32(0) + u32(one.crc.value_or(crc)) + u32(one.packed.value_or(bytes)) +
                   u32(one.size.value_or(bytes)) + u16(one.name_bytes.value_or(one.name.size())) + u16(one.extra_bytes.value_or(one.extra.size())) + u16(one.comment.size()) + u16(one.disk) + u16(0) +
                   u32(0) + u32(one.header.value_or(position)) + one.name + one.extra + one.comment;
    }
    std::uint64_t const directory_begin = out.size();
    directory += after_directory;
    out += directory + before_end;
    std::uint64_t const zip64_begin = out.size();
    if (has_zip64)
      out += u32(zip64_signature.value_or(0x06064b50)) + u64(zip64_size.value_or(44)) + u16(45) + u16(45) + u32(zip64_disk) + u32(0) + u64(count64.value_or(ones.size())) +
             u64(count64.value_or(ones.size())) + u64(size64.value_or(directory.size())) + u64(begin64.value_or(directory_begin)) + u32(0x07064b50) + u32(0) +
             u64(zip64_position.value_or(zip64_begin)) + u32(disks);
    out += u32(0x06054b50) + u16(disk) + u16(directory_disk) + u16(count_here.value_or(count.value_or(ones.size()))) + u16(count.value_or(ones.size())) + u32(size.value_or(directory.size())) +
           u32(begin.value_or(directory_begin)) + u16(comment_bytes.value_or(comment.size())) + comment;
    return out + suffix;
  }
};

}  // namespace

TEST_CASE("read_directory: an archive of torch 1.13 has its records where its bytes show them, and write gives its bytes again") {
  std::string const file = golden_zip("torch_1_13.zip");
  REQUIRE(file.size() == 747);
  Directory const directory = read_all(file);
  CHECK(directory.begin == 0x1d2);
  REQUIRE(directory.entries.size() == 3);
  CHECK(directory.entries[0] == Entry{"archive/data.pkl", 154, 0, 0xea, 64, 0x4e225925, 0x808});
  CHECK(directory.entries[1] == Entry{"archive/data/0", 16, 0xea, 0x160, 320, 0x25601b8b, 0x808});
  CHECK(directory.entries[2] == Entry{"archive/version", 2, 0x160, 0x1d2, 448, 0x55679ed1, 0x808});
  CHECK(file.substr(448, 2) == "3\n");
  CHECK(directory.find("archive/data/0") == &directory.entries[1]);
  CHECK(directory.find("archive/data/1") == nullptr);
  CHECK(written_again(file) == file);
}

TEST_CASE("lay_out: a tensor of 2 x 2 float32 takes 1577 bytes and a short value 1261, records at the positions of torch") {
  Bytes const pickle(154), data(16), value(5);
  Storage const storage{.bytes = data};
  TorchRecords const tensor{pickle, std::span{&storage, 1}};
  zip::Layout const layout = lay_out(tensor.records(), LayoutParts::sizes_only);
  CHECK(layout.size == 1577);
  CHECK(layout.data == std::vector<std::uint64_t>{64, 320, 448, 576, 704, 832, 960});
  CHECK(layout.pieces.empty());
  CHECK(tensor.records()[tensor.record_of_storage(0)].name == "archive/data/0");
  CHECK(lay_out(TorchRecords{value}.records(), LayoutParts::sizes_only).size == 1261);
  CHECK(write(tensor.records()).size() == 1577);
}

TEST_CASE("read_directory: every archive of golden .distcp files is read, and write gives its bytes again") {
  int archives = 0, compared = 0;
  for (auto const* name : {"dtypes.distcp", "values.distcp"}) {
    std::string const file = golden_zip(name);
    for (auto const blob : blobs_of(file)) {
      ++archives;
      CAPTURE(archives);
      Directory const directory = read_all(blob);
      std::vector<Storage> storages;
      for (auto const& entry : directory.entries) {
        std::string_view const data = blob.substr(static_cast<std::size_t>(entry.data), static_cast<std::size_t>(entry.size));
        check_crc(entry, crc32(as_byte_span(data)));
        CHECK(entry.data % 64 == 0);
        if (entry.name.starts_with("archive/data/")) storages.push_back({.bytes = as_byte_span(data)});
      }
      CHECK(written_again(blob) == blob);

      // The records of torch in its order, but for the id, which is ours.
      Entry const& pickle = directory.entries.front();
      TorchRecords const records{as_byte_span(blob.substr(static_cast<std::size_t>(pickle.data), static_cast<std::size_t>(pickle.size))), storages};
      Bytes const ours = write(records.records());
      REQUIRE(ours.size() == blob.size());
      auto const ours_directory = read_directory(ConstByteSpan{ours});
      REQUIRE(ours_directory.entries.size() == directory.entries.size());
      for (std::size_t i = 0; i < directory.entries.size(); ++i, ++compared) {
        auto const& theirs = directory.entries[i];
        auto const& entry = ours_directory.entries[i];
        CHECK(entry.name == theirs.name);
        CHECK(entry.data == theirs.data);
        if (entry.name == "archive/.data/serialization_id") {
          auto const id = as_text(data_of(ConstByteSpan{ours}, entry));
          CHECK(id.size() == 40);
          CHECK(id.find_first_not_of("0123456789") == std::string_view::npos);
        } else {
          CHECK(as_text(data_of(ConstByteSpan{ours}, entry)) == blob.substr(static_cast<std::size_t>(theirs.data), static_cast<std::size_t>(theirs.size)));
        }
      }
    }
  }
  CHECK(archives == 25);
  CHECK(compared > 150);
}

TEST_CASE("read_directory: one read finds the directory of a small archive, and three that of a large one with a comment") {
  std::string const small = golden_zip("torch_1_13.zip");
  int reads = 0;
  Directory directory = read_directory(small.size(), Reader{small, &reads});
  CHECK(reads == 1);
  locate(directory.entries[1], Reader{small, &reads});
  CHECK(reads == 2);
  CHECK(directory.entries[1].data == 320);
  CHECK(directory.entries[0].data == 0);

  File file{.has_zip64 = true};
  file.ones.clear();
  for (int i = 0; i < 3000; ++i) file.ones.push_back({"record/" + std::to_string(i), "x"});
  file.comment = std::string(60000, 'c');
  std::string const large = file.bytes();
  reads = 0;
  directory = read_directory(large.size(), Reader{large, &reads});
  CHECK(reads <= 4);
  REQUIRE(directory.entries.size() == 3000);
  for (int i = 0; i < 3000; i += 97) {
    auto const* const found = directory.find("record/" + std::to_string(i));
    REQUIRE(found != nullptr);
    CHECK(found == &directory.entries[static_cast<std::size_t>(i)]);
  }
  CHECK(directory.find("record/3000") == nullptr);
  CHECK(directory.find("") == nullptr);
  read_all(large);
}

TEST_CASE("read_directory: what is harmless is accepted") {
  auto const accepted = [](std::string const& what, File const& file) {
    CAPTURE(what);
    std::string const bytes = file.bytes();
    Directory directory;
    REQUIRE_NOTHROW(directory = read_all(bytes));
    REQUIRE(directory.entries.size() == file.ones.size());
    for (std::size_t i = 0; i < file.ones.size(); ++i) {
      auto const& entry = directory.entries[i];
      CHECK(bytes.substr(static_cast<std::size_t>(entry.data), static_cast<std::size_t>(entry.size)) == file.ones[i].data);
      CHECK_NOTHROW(check_crc(entry, crc32(as_byte_span(file.ones[i].data))));
    }
  };
  accepted("classic records", {});
  accepted("zip64 records", {.has_zip64 = true});
  accepted("no entries", {.ones = {}});
  accepted("no entries, zip64", {.ones = {}, .has_zip64 = true});
  accepted("bytes in front", {.prefix = "#!/bin/sh\n"});
  accepted("a gap", {.ones = {{.name = "a", .data = "1", .gap = "gap"}, {.name = "b", .data = "2", .gap = "another"}}});
  accepted("a comment", {.comment = "PK is a comment"});
  accepted("the longest comment", {.comment = std::string(65535, 'x')});
  accepted("the longest comment, zip64", {.has_zip64 = true, .comment = std::string(65535, 'x')});
  for (std::size_t comment = 3900; comment < 4100; ++comment) accepted("a comment at the edge of what is read first", {.has_zip64 = comment % 2 == 0, .comment = std::string(comment, 'x')});
  accepted("comments of records", {.ones = {{.name = "a", .data = "1", .comment = "about a"}, {.name = "b", .data = "2"}}});
  accepted("descriptors", {.ones = {{.name = "a", .data = "1", .flags = 8}, {.name = "b", .data = "", .flags = 8}}});
  accepted("UTF-8", {.ones = {{.name = "gr\xc3\xb6\xc3\x9f" "e", .data = "1", .flags = 0x800}}});
  accepted("dots in names", {.ones = {{"a..b/..c/.d", "1"}, {"...", "2"}}});
  accepted("a directory entry", {.ones = {{"a/", ""}, {"a/b", "2"}}});
  accepted("extra fields", {.ones = {{.name = "a", .data = "1", .extra = u16(0x5455) + u16(3) + "abc", .local_extra = u16(0x4246) + u16(2) + "ZZ"}}});
  accepted("zip64 fields that were not needed", {.ones = {{.name = "a", .data = "1", .extra = zip64({1, 1}), .local_extra = zip64({1, 1})}}});
  accepted("zip64 sizes", {.ones = {{.name = "a", .data = "12", .extra = u16(9) + u16(0) + zip64({2, 2}), .local_extra = zip64({2, 2}), .size = 0xFFFFFFFF, .packed = 0xFFFFFFFF,
                                     .local_size = 0xFFFFFFFF, .local_packed = 0xFFFFFFFF}}});
  accepted("zip64 position", {.ones = {{"a", "12"}, {.name = "b", .data = "3", .extra = zip64({33}), .header = 0xFFFFFFFF}}});
  accepted("saturated end record", {.has_zip64 = true, .disk = 0xFFFF, .directory_disk = 0xFFFF, .count = 0xFFFF, .size = 0xFFFFFFFF, .begin = 0xFFFFFFFF});

  File unordered;
  std::string const first = unordered.bytes();
  unordered.ones[0].header = 36;   // "b" is there, but the directory says "a"
  CHECK(outcome_of(unordered.bytes()) == "bad_offsets");
  // The directory may list records in another order than that of their bytes.
  std::string swapped = first;
  std::size_t const directory = 36 + 35;
  std::swap_ranges(swapped.begin() + static_cast<std::ptrdiff_t>(directory), swapped.begin() + static_cast<std::ptrdiff_t>(directory + 47), swapped.begin() + static_cast<std::ptrdiff_t>(directory + 47));
  Directory const read = read_all(swapped);
  CHECK(read.entries[0].name == "b");
  CHECK(read.entries[0].header == 36);
  CHECK(read.entries[1].end == 36);
}

TEST_CASE("read_directory: malformed archives are refused, each with its code, without large allocations") {
  struct Case {
    std::string what, code;
    File file;
    Limits limits = {};
  };
  using One = File::One;
  auto const of = [](One const& one) { return File{.ones = {one}}; };
  std::string const nul("a\0b", 3);
  std::vector<Case> const cases{
      {"end record: comment shorter than what follows", "trailing_data", {.suffix = "x"}},
      {"end record: comment longer than what follows", "truncated", {.comment_bytes = 1}},
      {"end record: comment that claims 65535", "truncated", {.comment = "abc", .comment_bytes = 65535}},
      {"end record: too far from the end", "truncated", {.suffix = "yy", .comment = std::string(65535, 'x')}},
      {"end record: a second one inside the comment", "truncated", {.comment = "PK\5\6" + std::string(16, '\0') + u16(9)}},
      {"end record: disk 1", "unsupported", {.disk = 1}},
      {"end record: directory on disk 1", "unsupported", {.directory_disk = 1}},
      {"end record: fewer records on this disk", "unsupported", {.count = 2, .count_here = 1}},
      {"end record: disk 65535 without zip64", "bad_schema", {.disk = 0xFFFF}},
      {"end record: one record too many", "truncated", {.count = 3}},
      {"end record: one record too few", "trailing_data", {.count = 1}},
      {"end record: no records", "trailing_data", {.count = 0}},
      {"end record: 65534 records", "truncated", {.count = 65534}},
      {"end record: 65535 records without zip64", "bad_schema", {.count = 65535}},
      {"end record: directory larger", "bad_offsets", {.size = 95}},
      {"end record: directory smaller", "bad_offsets", {.size = 93}},
      {"end record: directory larger than the archive", "bad_offsets", {.size = 0x7FFFFFFF}},
      {"end record: directory of 2^32 - 1 bytes without zip64", "bad_schema", {.size = 0xFFFFFFFF}},
      {"end record: directory earlier", "bad_offsets", {.begin = 70}},
      {"end record: directory later", "bad_offsets", {.begin = 72}},
      {"end record: directory beyond the archive", "bad_offsets", {.begin = 0xFFFFFFFE}},
      {"end record: directory at 2^32 - 1 without zip64", "bad_schema", {.begin = 0xFFFFFFFF}},
      {"end record: directory at the front, within a record", "bad_magic", {.size = 94 + 71, .begin = 0}},
      {"bytes between directory and end", "bad_offsets", {.before_end = "x"}},
      {"bytes at the end of the directory", "trailing_data", {.after_directory = "x"}},
      {"zip64: signature", "bad_magic", {.has_zip64 = true, .zip64_signature = 0x06064b51}},
      {"zip64: position beyond the archive", "bad_offsets", {.has_zip64 = true, .zip64_position = 1 << 20}},
      {"zip64: position 2^64 - 1", "bad_offsets", {.has_zip64 = true, .zip64_position = UINT64_MAX}},
      {"zip64: position one too early", "bad_magic", {.has_zip64 = true, .zip64_position = 71 + 93}},
      {"zip64: position one too late", "bad_offsets", {.has_zip64 = true, .zip64_position = 71 + 95}},
      {"zip64: size of the record", "bad_offsets", {.has_zip64 = true, .zip64_size = 45}},
      {"zip64: size of the record that wraps around", "bad_offsets", {.has_zip64 = true, .zip64_size = UINT64_MAX - 11}},
      {"zip64: disk", "unsupported", {.has_zip64 = true, .zip64_disk = 1}},
      {"zip64: two disks", "unsupported", {.has_zip64 = true, .disks = 2}},
      {"zip64: another count than the end record", "bad_schema", {.has_zip64 = true, .count = 3}},
      {"zip64: another size than the end record", "bad_schema", {.has_zip64 = true, .size = 95}},
      {"zip64: another position than the end record", "bad_schema", {.has_zip64 = true, .begin = 70}},
      {"zip64: count of 2^60", "limit", {.has_zip64 = true, .count = 0xFFFF, .count64 = 1ull << 60}},
      {"zip64: count of 3 million", "truncated", {.has_zip64 = true, .count = 0xFFFF, .count64 = 3'000'000}},
      {"zip64: directory of 2^60 bytes", "bad_offsets", {.has_zip64 = true, .size = 0xFFFFFFFF, .size64 = 1ull << 60}},
      {"zip64: directory whose end wraps around", "overflow", {.has_zip64 = true, .size = 0xFFFFFFFF, .begin = 0xFFFFFFFF, .size64 = 1ull << 63, .begin64 = (1ull << 63) + 165}},
      {"zip64: directory beyond the archive", "bad_offsets", {.has_zip64 = true, .begin = 0xFFFFFFFF, .begin64 = 1ull << 50}},
      {"zip64: only a locator", "bad_offsets", {.before_end = u32(0x07064b50) + u32(0) + u64(165) + u32(1)}},
      {"record: signature", "bad_magic", of({.name = "a", .data = "1", .signature = 0x02014b51})},
      {"record: name longer than the directory", "truncated", of({.name = "a", .data = "1", .name_bytes = 60000})},
      {"record: extra fields longer than the directory", "truncated", of({.name = "a", .data = "1", .extra_bytes = 60000})},
      {"record: deflate", "unsupported", of({.name = "a", .data = "1", .method = 8})},
      {"record: zstd", "unsupported", of({.name = "a", .data = "1", .method = 93})},
      {"record: encrypted", "unsupported", of({.name = "a", .data = "1", .flags = 1})},
      {"record: strongly encrypted", "unsupported", of({.name = "a", .data = "1", .flags = 1 << 6})},
      {"record: masked header", "unsupported", of({.name = "a", .data = "1", .flags = 1 << 13})},
      {"record: a patch", "unsupported", of({.name = "a", .data = "1", .flags = 1 << 5})},
      {"record: unknown flags", "unsupported", of({.name = "a", .data = "1", .flags = 1 << 15})},
      {"record: on another disk", "unsupported", of({.name = "a", .data = "1", .disk = 1})},
      {"record: stored, but smaller", "size_mismatch", of({.name = "a", .data = "12", .packed = 1})},
      {"record: one byte larger, both sizes", "bad_offsets", of({.name = "a", .data = "12", .size = 3, .packed = 3})},
      {"record: larger than the archive", "bad_offsets", of({.name = "a", .data = "12", .size = 0xFFFFFFFE, .packed = 0xFFFFFFFE})},
      {"record: 2^32 - 1 bytes without zip64", "bad_schema", of({.name = "a", .data = "12", .size = 0xFFFFFFFF, .packed = 0xFFFFFFFF})},
      {"record: position 2^32 - 1 without zip64", "bad_schema", of({.name = "a", .data = "12", .header = 0xFFFFFFFF})},
      {"record: zip64 field with one number of two", "bad_schema", of({.name = "a", .data = "12", .extra = zip64({2}), .size = 0xFFFFFFFF, .packed = 0xFFFFFFFF})},
      {"record: zip64 field with half a number", "bad_schema", of({.name = "a", .data = "12", .extra = u16(1) + u16(4) + "abcd", .header = 0xFFFFFFFF})},
      {"record: two zip64 fields", "bad_schema", of({.name = "a", .data = "12", .extra = zip64({0}) + zip64({0}), .header = 0xFFFFFFFF})},
      {"record: extra field that does not fit", "bad_schema", of({.name = "a", .data = "12", .extra = u16(7) + u16(9) + "x"})},
      {"record: extra field of three bytes", "bad_schema", of({.name = "a", .data = "12", .extra = "xyz"})},
      {"record: zip64 size that lies", "size_mismatch", of({.name = "a", .data = "12", .extra = zip64({3, 2}), .size = 0xFFFFFFFF, .packed = 0xFFFFFFFF})},
      {"record: zip64 size of 2^64 - 1", "overflow", of({.name = "a", .data = "12", .extra = zip64({UINT64_MAX, UINT64_MAX}), .size = 0xFFFFFFFF, .packed = 0xFFFFFFFF})},
      {"record: zip64 position of 2^64 - 1", "overflow", of({.name = "a", .data = "12", .extra = zip64({UINT64_MAX}), .header = 0xFFFFFFFF})},
      {"record: zip64 position that wraps around to 0", "overflow", of({.name = "a", .data = "12", .extra = zip64({UINT64_MAX - 32}), .header = 0xFFFFFFFF})},
      {"record: in the directory", "bad_offsets", of({.name = "a", .data = "12", .header = 33})},
      {"record: behind the archive", "bad_offsets", of({.name = "a", .data = "12", .header = 100000})},
      {"record: in the middle of itself", "bad_offsets", of({.name = "a", .data = "12", .header = 1})},
      {"record: no local header where it should be", "bad_magic", File{.ones = {{.name = "a", .data = "12", .header = 0}}, .prefix = "xx"}},
      {"records: one in the other", "bad_offsets", {.ones = {{"a", std::string(100, 'x')}, {.name = "b", .data = "2", .header = 40}}}},
      {"records: both at one place", "bad_offsets", {.ones = {{"a", "1"}, {.name = "b", .data = "1", .header = 0}}}},
      {"records: the first reaches into the second", "bad_offsets", {.ones = {{.name = "a", .data = "1", .size = 2, .packed = 2, .local_size = 2, .local_packed = 2}, {"b", "2"}}}},
      {"records: extra fields of the first reach into the second", "bad_offsets", {.ones = {{.name = "a", .data = "1", .local_extra_bytes = 1}, {"b", "2"}}}},
      {"records: extra fields reach beyond the archive", "bad_offsets", of({.name = "a", .data = "1", .local_extra_bytes = 65535})},
      {"name: empty", "bad_schema", of({.name = "", .data = "1"})},
      {"name: NUL", "unsafe_path", of({.name = nul, .data = "1"})},
      {"name: backslash", "unsafe_path", of({.name = "a\\b", .data = "1"})},
      {"name: absolute", "unsafe_path", of({.name = "/a", .data = "1"})},
      {"name: climbing", "unsafe_path", of({.name = "../a", .data = "1"})},
      {"name: climbing in the middle", "unsafe_path", of({.name = "a/../../b", .data = "1"})},
      {"name: climbing at the end", "unsafe_path", of({.name = "a/..", .data = "1"})},
      {"name: only dots", "unsafe_path", of({.name = "..", .data = "1"})},
      {"name: no UTF-8", "bad_utf8", of({.name = "a\xff", .data = "1", .flags = 0x800})},
      {"name: overlong UTF-8", "bad_utf8", of({.name = "\xc0\xaf", .data = "1", .flags = 0x800})},
      {"name: UTF-8 that is not marked", "bad_utf8", of({.name = "\xc3\xb6", .data = "1"})},
      {"names: the same twice", "duplicate_key", {.ones = {{"a", "1"}, {"b", "2"}, {"a", "3"}}}},
      {"limit: records", "limit", {}, {.max_entries = 1}},
      {"limit: directory", "limit", {}, {.max_directory_bytes = 93}},
      {"limit: names", "limit", of({.name = "abcd", .data = "1"}), {.max_name_bytes = 3}},
      {"local header: signature", "bad_magic", of({.name = "a", .data = "1", .local_signature = 0x04034b51})},
      {"local header: another name", "index_mismatch", of({.name = "a", .data = "1", .local_name = "b"})},
      {"local header: a longer name", "index_mismatch", of({.name = "a", .data = "1", .local_name = "aa"})},
      {"local header: deflate", "index_mismatch", of({.name = "a", .data = "1", .local_method = 8})},
      {"local header: encrypted", "index_mismatch", of({.name = "a", .data = "1", .local_flags = 1})},
      {"local header: with a descriptor, the directory without", "index_mismatch", of({.name = "a", .data = "1", .local_flags = 8})},
      {"local header: another CRC-32", "index_mismatch", of({.name = "a", .data = "1", .local_crc = 0})},
      {"local header: another size", "index_mismatch", of({.name = "a", .data = "1", .local_size = 2})},
      {"local header: another stored size", "index_mismatch", of({.name = "a", .data = "1", .local_packed = 2})},
      {"local header: zip64 size that lies", "index_mismatch", of({.name = "a", .data = "1", .local_extra = zip64({2, 1}), .local_size = 0xFFFFFFFF, .local_packed = 0xFFFFFFFF})},
      {"local header: zip64 size that is missing", "bad_schema", of({.name = "a", .data = "1", .local_size = 0xFFFFFFFF})},
  };
  CHECK(cases.size() > 100);
  std::size_t largest = 0;
  for (auto const& one : cases) {
    CAPTURE(one.what);
    std::string const bytes = one.file.bytes();
    test::AllocationPeak const peak;
    CHECK(outcome_of(bytes, one.limits) == one.code);
    largest = std::max(largest, peak.bytes());
  }
  CHECK(largest < (1 << 18));
}

TEST_CASE("read_directory: an archive that is cut anywhere is refused") {
  for (auto const* name : {"torch_1_13.zip", "values.distcp"}) {
    std::string const file = golden_zip(name);
    std::string_view const archive = blobs_of(file).front();
    for (std::size_t size = 0; size < archive.size(); ++size) {
      CAPTURE(size);
      REQUIRE(outcome_of(archive.substr(0, size)) == "truncated");
    }
    for (std::size_t cut = 1; cut < archive.size(); ++cut) {
      CAPTURE(cut);
      REQUIRE(outcome_of(archive.substr(cut)) != "ok");
    }
  }
}

TEST_CASE("law: damage of any one byte of an archive is refused, changes no size, or is found by the CRC-32") {
  std::string const file = golden_zip("torch_1_13.zip");
  Directory const before = read_all(file);
  for (std::size_t at = 0; at < file.size(); ++at)
    for (int const flip : {1, 0x80, 0xFF}) {
      CAPTURE(at);
      CAPTURE(flip);
      std::string damaged = file;
      damaged[at] = static_cast<char>(damaged[at] ^ flip);
      try {
        Directory const after = read_all(damaged);
        bool same = true;
        for (std::size_t i = 0; i < after.entries.size(); ++i) {
          auto const& entry = after.entries[i];
          check_crc(entry, crc32(as_byte_span(damaged).subspan(static_cast<std::size_t>(entry.data), static_cast<std::size_t>(entry.size))));
          same = same && damaged.substr(static_cast<std::size_t>(entry.data), static_cast<std::size_t>(entry.size)) ==
                             file.substr(static_cast<std::size_t>(before.entries[i].data), static_cast<std::size_t>(before.entries[i].size));
        }
        REQUIRE(same);
      } catch (Error const& error) {
        REQUIRE(error.code() != ErrorCode::unknown);
      }
    }
}

TEST_CASE("errors say which record, what is wrong, and where") {
  auto const message = [](File const& file) -> std::string {
    try {
      read_all(file.bytes());
    } catch (Error const& error) {
      return error.message();
    }
    return "";
  };
  CHECK(message({.ones = {{.name = "a", .data = "1", .method = 8}}}) ==
        "record \"a\" is compressed with deflate (method 8); only stored records can be read, at byte 32 of the archive");
  CHECK(message({.ones = {{"a", "1"}, {.name = "b", .data = "1", .header = 0}}}) == "record \"a\" of 1 bytes at byte 0 of the archive reaches beyond byte 0, where the next one or the directory begins");
  Entry const entry{"archive/data/0", 4, 0, 0, 64, 5, 0};
  CHECK_THROWS_WITH_AS(check_crc(entry, 6), doctest::Contains("record \"archive/data/0\" has the CRC-32 00000006 and should have 00000005, at byte 64 of the archive"), Error);
}

TEST_CASE("law: archives of random records are read back, and pieces with the data between them are the archive") {
  std::uint64_t const first = test::first_seed();
  for (std::uint64_t seed = first; seed < first + 200; ++seed) {
    CAPTURE(seed);
    test::Random random{seed};
    std::map<std::string, Bytes> contents;
    auto const records_wanted = random.one_in(5) ? random.between(17, 60) : random.between(0, 9);
    for (std::int64_t i = 0; i < records_wanted; ++i) {
      std::string name(static_cast<std::size_t>(random.between(1, 80)), 'a');
      for (auto& c : name) c = static_cast<char>(random.between('a', 'z'));
      if (random.one_in(3)) name += "/\xc3\xb6";
      contents[name] = random.bytes(static_cast<std::size_t>(random.one_in(4) ? 0 : random.between(1, 300)));
    }
    std::vector<std::pair<std::string, Bytes>> list{contents.begin(), contents.end()};
    random.shuffle(list);
    std::vector<Record> known, mixed;
    for (auto const& [name, data] : list) {
      known.push_back({name, data});
      mixed.push_back(random.one_in(2) ? Record{.name = name, .size = data.size(), .elsewhere = true} : Record{name, data});
    }
    Bytes const archive = write(known);

    zip::Layout layout = lay_out(mixed);
    zip::Layout const sizes = lay_out(mixed, LayoutParts::sizes_only);
    REQUIRE(layout.size == archive.size());
    REQUIRE(sizes.size == archive.size());
    REQUIRE(sizes.data == layout.data);
    for (std::size_t i = 0; i < mixed.size(); ++i) set_crc(layout, i, crc32(list[i].second));
    Bytes pieced(archive.size(), std::byte{0xAA});
    std::uint64_t covered = 0;
    for (auto const& piece : layout.pieces) std::memcpy(pieced.data() + piece.offset, piece.bytes.data(), piece.bytes.size()), covered += piece.bytes.size();
    for (std::size_t i = 0; i < mixed.size(); ++i)
      if (mixed[i].elsewhere && mixed[i].size > 0) std::memcpy(pieced.data() + layout.data[i], list[i].second.data(), list[i].second.size()), covered += mixed[i].size;
    REQUIRE(covered == archive.size());
    REQUIRE(pieced == archive);

    Directory const directory = read_all(as_text(archive));
    REQUIRE(directory.entries.size() == list.size());
    for (std::size_t i = 0; i < list.size(); ++i) {
      auto const& entry = directory.entries[i];
      REQUIRE(entry.name == list[i].first);
      REQUIRE(entry.data == layout.data[i]);
      REQUIRE(entry.data % data_alignment == 0);
      auto const data = data_of(archive, entry);
      REQUIRE(Bytes(data.begin(), data.end()) == list[i].second);
      REQUIRE(entry.crc == crc32(data));
      REQUIRE(directory.find(entry.name) == &entry);
    }
    REQUIRE(written_again(as_text(archive)) == as_text(archive));
  }
}

TEST_CASE("lay_out: sizes and positions of 4 GiB and more are written as PyTorch 2.15 writes them") {
  // Each list of sizes gave these positions and sizes through PyTorchFileWriter.
  auto const layout_of = [](std::vector<std::uint64_t> const& sizes) {
    static constexpr std::array<std::string_view, 6> names{"archive/data/0", "archive/data/1", "archive/data/2", "archive/version", "archive/byteorder", "archive/.data/serialization_id"};
    std::vector<Record> records;
    std::size_t const tensors = sizes.size();
    for (std::size_t i = 0; i < tensors; ++i) records.push_back({.name = names[i], .size = sizes[i], .elsewhere = true});
    records.push_back({names[3], as_byte_span("3\n")});
    records.push_back({names[4], as_byte_span("little")});
    records.push_back({names[5], as_byte_span("0000000000000000000000000000000000000000")});
    return lay_out(records);
  };
  zip::Layout a = layout_of({0x100000000, 5, 0});
  CHECK(a.size == 4294968622);
  CHECK(a.data == std::vector<std::uint64_t>{128, 4294967552, 4294967680, 4294967744, 4294967872, 4294968000});
  CHECK(layout_of({0xFFFFFFFF, 5}).size == 4294968486);
  CHECK(layout_of({0xFFFFFFFE, 5}).size == 4294968402);
  CHECK(layout_of({0xFFFFFFFF - 80, 5}).size == 4294968274);
  CHECK(layout_of({0xFFFFFFFE - 80, 5, 0}).size == 4294968398);
  CHECK(layout_of({0x100000000, 0x100000001, 1}).size == 8589935998);

  // The bytes of the first: a local header with both sizes, of which the second is 0; the descriptor; local header and directory of a small one far out.
  set_crc(a, 0, 0xd202ef8d);
  set_crc(a, 1, 0x42d1e778);
  REQUIRE(a.pieces.size() == 3);
  CHECK(hex_text(a.pieces[0].bytes) == "504b0304000008080000000000000000000000000000000000000e005400617263686976652f646174612f300100100000000000010000000000000000000000"
                                       "46423c00" + [] { std::string z; for (int i = 0; i < 60; ++i) z += "5a"; return z; }());
  CHECK(a.pieces[1].offset == 4294967424);
  CHECK(hex_text(a.pieces[1].bytes).starts_with("504b07088def02d200000000010000000000000001000000504b0304000008080000000000000000000000000000000000000e003c00617263686976652f646174612f31"
                                                "01000800980000000100000046422c00"));
  std::string const last = hex_text(a.pieces[2].bytes);
  CHECK(last.starts_with("504b070878e7d14205000000000000000500000000000000504b0304000000080000000000000000000000000000000000000e003700617263686976652f646174612f32010008001d0100000100000046422700"));
  std::string const directory = "504b01020000000008080000000000008def02d2ffffffffffffffff0e0014000000000000000000000000000000617263686976652f646174612f300100100000000000010000000000000001000000"
                                "504b010200000000080800000000000078e7d14205000000050000000e000c0000000000000000000000ffffffff617263686976652f646174612f31010008009800000001000000";
  CHECK(last.find(directory) == 2 * (4294968064 - 4294967557));
  CHECK(last.ends_with("504b06062c000000000000001e032d00000000000000000006000000000000000600000000000000cc010000000000000003000001000000504b060700000000cc0400000100000001000000"
                       "504b05060000000006000600cc010000ffffffff0000"));

  // And they are read: only pieces are ever asked for.
  auto const read = [&](std::uint64_t position, ByteSpan to) {
    for (std::size_t i = 0; i < to.size(); ++i)
      for (auto const& piece : a.pieces)
        if (position + i >= piece.offset && position + i - piece.offset < piece.bytes.size()) to[i] = piece.bytes[static_cast<std::size_t>(position + i - piece.offset)];
  };
  Directory found = read_directory(a.size, read);
  REQUIRE(found.entries.size() == 6);
  for (std::size_t i = 0; i < 6; ++i) {
    locate(found.entries[i], read);
    CHECK(found.entries[i].data == a.data[i]);
  }
  CHECK(found.entries[0].size == 0x100000000);
  CHECK(found.entries[0].crc == 0xd202ef8d);
  CHECK(found.entries[1].size == 5);
}

TEST_CASE("lay_out: what no archive can hold is refused") {
  auto const outcome = [](std::vector<Record> const& records) {
    return golden::outcome([&] { lay_out(records, LayoutParts::sizes_only); });
  };
  CHECK(outcome({{"a"}, {"b"}}) == "ok");
  CHECK(outcome({{"a"}, {"b"}, {"a"}}) == "duplicate_key");
  CHECK(outcome({{""}}) == "bad_schema");
  CHECK(outcome({{"../a"}}) == "unsafe_path");
  CHECK(outcome({{"a\xff"}}) == "bad_utf8");
  std::string const longest(65535, 'x'), longer(65536, 'x');
  CHECK(outcome({{longest}}) == "ok");
  CHECK(outcome({{longer}}) == "limit");
  CHECK(outcome({{.name = "a", .size = UINT64_MAX, .elsewhere = true}}) == "overflow");
  CHECK(outcome({{.name = "a", .size = 1ull << 62, .elsewhere = true}, {.name = "b", .size = 1ull << 62, .elsewhere = true}}) == "overflow");
  std::vector<std::string> names;
  for (int i = 0; i < 100; ++i) names.push_back(std::to_string(i % 99));
  CHECK(outcome(records_named(names)) == "duplicate_key");
  Record const elsewhere{.name = "a", .size = 4, .elsewhere = true};
  CHECK(golden::outcome([&] { write(std::span{&elsewhere, 1}); }) == "invalid_argument");
}

TEST_CASE("lay_out: 70,000 records make an archive whose end record leaves the count to zip64") {
  std::vector<std::string> names;
  for (int i = 0; i < 70000; ++i) names.push_back("archive/data/" + std::to_string(i));
  std::vector<Record> const records = records_named(names);
  Bytes const archive = write(records);
  DirectoryView const directory = read_directory(ConstByteSpan{archive});
  REQUIRE(directory.entries.size() == 70000);
  CHECK(directory.find("archive/data/69999") == &directory.entries.back());
}

TEST_CASE("TorchRecords: equal names and sizes give the same id, others another, and records stay good when it is moved") {
  Bytes const pickle(154), data(16);
  std::vector<Storage> storages(12, Storage{.bytes = data});
  auto const id_of = [](TorchRecords<> const& records) { return std::string{as_text(records.records().back().bytes)}; };
  TorchRecords first{pickle, storages};
  std::string const id = id_of(first);
  storages[3] = {.size = 16, .elsewhere = true};
  CHECK(id_of(TorchRecords{pickle, storages}) == id);
  storages[3].size = 17;
  CHECK(id_of(TorchRecords{pickle, storages}) != id);
  storages.pop_back();
  CHECK(id_of(TorchRecords{pickle, storages}) != id);
  auto const moved = std::move(first);
  CHECK(id_of(moved) == id);
  CHECK(moved.records()[moved.record_of_storage(11)].name == "archive/data/11");
  CHECK(moved.records().size() == 18);
}
