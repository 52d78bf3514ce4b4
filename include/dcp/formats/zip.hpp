// SPDX-License-Identifier: Apache-2.0
#pragma once
// Zip archives of records that are stored, not compressed, as torch.save makes them. Bytes to structs and back; files are somebody else's.
//
//   each record   30 bytes "PK\3\4"..., name, extra fields, data, then a descriptor "PK\7\8" with CRC-32 and sizes if flag 3 says so
//   directory     each record again: 46 bytes "PK\1\2"..., name, extra fields, comment
//   56 bytes "PK\6\6"..., 20 bytes "PK\6\7"...    of zip64, where counts, sizes and positions have 64 bits
//   22 bytes "PK\5\6"..., comment                 the end record, from which an archive is read backwards
//
// The reader refuses what two readers would take for different things: an end record that is not at the end, a directory that does not end
// where the end records begin, local headers that contradict the directory, records that overlap, names that occur twice. What lies before
// the first record, between records and in extra fields other than zip64's is not looked at.
// Source    APPNOTE.TXT 6.3; the bytes that PyTorchFileWriter of PyTorch 2.15 wrote, records and positions of 4 GiB and more among them

#include <dcp/base/config.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/crc32.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/algorithms.hpp>
#include <dcp/base/text.hpp>
#include <dcp/formats/strict_json.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp::zip {

/// One record of an archive. Positions are counted from the start of the archive.
template <class Name>
struct BasicEntry {
  Name name;
  std::uint64_t size = 0;
  std::uint64_t header = 0;   // where its local header begins
  std::uint64_t end = 0;      // where the next record or the directory begins, before which its data must end
  std::uint64_t data = 0;     // where its data begin; known after locate()
  std::uint32_t crc = 0;      // of its data
  std::uint16_t flags = 0;

  friend bool operator==(BasicEntry const&, BasicEntry const&) = default;
};

template <class Name>
struct BasicDirectory {
  std::vector<BasicEntry<Name>> entries;    // in the order of the directory
  std::vector<std::uint32_t> by_name;       // their numbers, sorted by name; empty if there are few
  std::uint64_t begin = 0;                  // where the directory begins

  /// The record with this name, or nullptr.
  template <class = Deferred>
  BasicEntry<Name> const* find(std::string_view name) const {
    if (by_name.empty()) {
      for (auto const& entry : entries)
        if (entry.name == name) return &entry;
      return nullptr;
    }
    auto const found = std::lower_bound(by_name.begin(), by_name.end(), name, [&](std::uint32_t i, std::string_view wanted) { return entries[i].name < wanted; });
    return found != by_name.end() && entries[*found].name == name ? &entries[*found] : nullptr;
  }
};

using Entry = BasicEntry<std::string>;
using Directory = BasicDirectory<std::string>;
/// Of an archive in memory: names are parts of it.
using EntryView = BasicEntry<std::string_view>;
using DirectoryView = BasicDirectory<std::string_view>;

struct Limits {
  std::uint64_t max_entries = 4'000'000;
  std::uint64_t max_directory_bytes = 1ull << 30;
  std::uint64_t max_name_bytes = 65535;
};

namespace detail {

using namespace dcp::detail;

inline constexpr std::uint32_t local_signature = 0x04034b50, descriptor_signature = 0x08074b50, directory_signature = 0x02014b50, end_signature = 0x06054b50,
                               zip64_end_signature = 0x06064b50, zip64_locator_signature = 0x07064b50;
inline constexpr std::uint64_t local_bytes = 30, directory_bytes = 46, end_bytes = 22, zip64_end_bytes = 56, zip64_locator_bytes = 20;
inline constexpr std::uint16_t zip64_extra = 1;
inline constexpr std::uint16_t descriptor_flag = 1 << 3, utf8_flag = 1 << 11;
/// A field that holds this is continued in a zip64 field.
inline constexpr std::uint32_t saturated_32 = 0xFFFFFFFF;
inline constexpr std::uint16_t saturated_16 = 0xFFFF;
/// Up to so many records, names are compared each with each.
inline constexpr std::size_t few_entries = 16;

inline std::uint16_t u16(std::byte const* at) { return load_little_endian<std::uint16_t>(at); }
inline std::uint32_t u32(std::byte const* at) { return load_little_endian<std::uint32_t>(at); }
inline std::uint64_t u64(std::byte const* at) { return load_little_endian<std::uint64_t>(at); }

template <class = Deferred>
[[noreturn]] void refuse(ErrorCode code, std::string message, std::uint64_t begin, std::uint64_t end) {
  throw Error{code, std::move(message) + ", at byte " + std::to_string(begin) + " of the archive"}.with_range(begin, end);
}
template <class = Deferred>
std::string record_called(std::string_view name) { return "record " + shown(name); }

template <class = Deferred>
std::string method_called(std::uint16_t method) {
  switch (method) {
    case 8: return "deflate (method 8)";
    case 9: return "deflate64 (method 9)";
    case 12: return "bzip2 (method 12)";
    case 14: return "lzma (method 14)";
    case 93: return "zstd (method 93)";
    case 95: return "xz (method 95)";
    default: return "method " + std::to_string(method);
  }
}

/// What is wrong with a name that no record may have; ErrorCode::unknown for good names.
template <class = Deferred>
ErrorCode name_fault(std::string_view name, bool utf8) {
  if (name.empty()) return ErrorCode::bad_schema;
  bool ascii = true;
  for (std::size_t i = 0, part = 0; i <= name.size(); ++i) {   // part: where the component begins that byte i is in or ends
    char const c = i < name.size() ? name[i] : '/';
    if (c == '/') {
      if (i - part == 2 && name[part] == '.' && name[part + 1] == '.') return ErrorCode::unsafe_path;
      part = i + 1;
    } else if (c == '\0' || c == '\\') {
      return ErrorCode::unsafe_path;
    } else if (static_cast<unsigned char>(c) >= 0x80) {
      ascii = false;
    }
  }
  if (name.front() == '/') return ErrorCode::unsafe_path;
  if (!ascii && (!utf8 || first_invalid_utf8(name) != std::string_view::npos)) return ErrorCode::bad_utf8;
  return ErrorCode::unknown;
}
template <class = Deferred>
std::string name_fault_text(ErrorCode fault, std::string_view name) {
  if (fault == ErrorCode::bad_schema) return "a record with an empty name";
  if (fault == ErrorCode::bad_utf8) return "a record whose name is neither ASCII nor marked as UTF-8 and well-formed";
  std::string readable;   // a NUL or a wrong byte beside it must not end up in a message
  for (char const c : name) readable += c >= ' ' && c < '\x7f' ? c : '?';
  return record_called(readable) + ": a name that is absolute, climbs with .., or has a NUL or backslash";
}

/// The zip64 field among `extra`, which begins at byte `position`; empty if there is none.
template <class = Deferred>
ConstByteSpan zip64_of(ConstByteSpan extra, std::uint64_t position) {
  ConstByteSpan found;
  bool seen = false;
  while (!extra.empty()) {
    if (extra.size() < 4 || u16(extra.data() + 2) > extra.size() - 4) refuse(ErrorCode::bad_schema, "an extra field that does not fit into its record", position, position + extra.size());
    std::size_t const size = u16(extra.data() + 2);
    if (u16(extra.data()) == zip64_extra) {
      if (seen) refuse(ErrorCode::bad_schema, "two zip64 fields in one record", position, position + 4 + size);
      seen = true;
      found = extra.subspan(4, size);
    }
    extra = extra.subspan(4 + size);
    position += 4 + size;
  }
  return found;
}
/// Replaces each saturated number by the next one of the zip64 field, in this order.
template <class = Deferred>
void take_from(ConstByteSpan zip64, std::span<std::uint64_t* const> numbers, std::uint64_t position) {
  for (auto* const number : numbers) {
    if (*number != saturated_32) continue;
    if (zip64.size() < 8) refuse(ErrorCode::bad_schema, "a size or position of 2^32 - 1 or more without the zip64 field that says it", position, position + 4);
    *number = u64(zip64.data());
    zip64 = zip64.subspan(8);
  }
}

/// What the end records say.
struct End {
  std::uint64_t entries = 0, begin = 0, size = 0;   // of the directory
};

/// Where the last end record in `last` begins; last.size() if there is none.
template <class = Deferred>
std::size_t last_signature(ConstByteSpan last) {
  for (std::size_t at = last.size() - end_bytes + 1; at-- > 0;)
    if (u32(last.data() + at) == end_signature) return at;
  return last.size();
}

/// The end records of an archive of `archive_size` bytes. tail(bytes) gives its last `bytes` bytes, zip64_end(position) the 56 at `position`.
template <class Tail, class At>
End find_end(std::uint64_t archive_size, Tail tail, At zip64_end) {
  if (archive_size < end_bytes) throw Error{ErrorCode::truncated, "an archive of " + std::to_string(archive_size) + " bytes is too short for zip"}.with_range(0, archive_size);
  // The signature that is nearest to the end counts, as in every reader; a comment after it must be the rest.
  constexpr std::uint64_t usual = 4096, most = end_bytes + 65535;
  ConstByteSpan last = tail(std::min(archive_size, usual));
  std::size_t at = last_signature(last);
  if (at == last.size() && last.size() < archive_size) last = tail(std::min(archive_size, most)), at = last_signature(last);
  if (at == last.size())
    throw Error{ErrorCode::truncated, "no end record: the archive is cut short or no zip"}.with_range(archive_size - last.size(), archive_size);
  std::uint64_t const position = archive_size - last.size() + at;
  if (at < zip64_locator_bytes && last.size() < archive_size) {   // after a long comment: the locator is in front of what was read
    last = tail(std::min(archive_size, archive_size - position + zip64_locator_bytes));
    at = static_cast<std::size_t>(position - (archive_size - last.size()));
  }
  std::byte const* const end = last.data() + at;
  if (std::size_t const comment = last.size() - at - end_bytes; u16(end + 20) != comment)
    refuse(u16(end + 20) > comment ? ErrorCode::truncated : ErrorCode::trailing_data,
           "the end record has a comment of " + std::to_string(u16(end + 20)) + " bytes and " + std::to_string(comment) + " follow it", position, archive_size);
  if (u16(end + 4) != 0 && u16(end + 4) != saturated_16) refuse(ErrorCode::unsupported, "an archive of several disks", position, position + end_bytes);
  if (u16(end + 6) != 0 && u16(end + 6) != saturated_16) refuse(ErrorCode::unsupported, "an archive of several disks", position, position + end_bytes);
  if (u16(end + 8) != u16(end + 10)) refuse(ErrorCode::unsupported, "an archive with records on other disks", position, position + end_bytes);
  End result{u16(end + 10), u32(end + 16), u32(end + 12)};
  std::uint64_t records_begin = position;   // where the end records, of which zip64's come first, begin
  if (at >= zip64_locator_bytes && u32(end - zip64_locator_bytes) == zip64_locator_signature) {
    std::byte const* const locator = end - zip64_locator_bytes;
    std::uint64_t const locator_position = position - zip64_locator_bytes, claimed = u64(locator + 8);
    if (u32(locator + 4) != 0 || u32(locator + 16) > 1) refuse(ErrorCode::unsupported, "an archive of several disks", locator_position, position);
    if (claimed > locator_position || locator_position - claimed < zip64_end_bytes)
      refuse(ErrorCode::bad_offsets, "the zip64 end record would be at byte " + std::to_string(claimed), locator_position, position);
    std::array<std::byte, zip64_end_bytes> const record = zip64_end(claimed);
    if (u32(record.data()) != zip64_end_signature) refuse(ErrorCode::bad_magic, "no zip64 end record where the locator says", claimed, claimed + 4);
    if (u64(record.data() + 4) != locator_position - claimed - 12)
      refuse(ErrorCode::bad_offsets, "a zip64 end record of " + std::to_string(u64(record.data() + 4)) + " bytes that does not end where the locator begins", claimed, locator_position);
    if (u32(record.data() + 16) != 0 || u32(record.data() + 20) != 0 || u64(record.data() + 24) != u64(record.data() + 32))
      refuse(ErrorCode::unsupported, "an archive of several disks", claimed, locator_position);
    End const wide{u64(record.data() + 32), u64(record.data() + 48), u64(record.data() + 40)};
    auto const agree = [](std::uint64_t narrow, std::uint64_t in_64, std::uint64_t saturated) { return narrow == saturated || narrow == in_64; };
    if (!agree(result.entries, wide.entries, saturated_16) || !agree(result.size, wide.size, saturated_32) || !agree(result.begin, wide.begin, saturated_32))
      refuse(ErrorCode::bad_schema, "the end record and that of zip64 contradict each other", claimed, archive_size);
    result = wide;
    records_begin = claimed;
  } else if (result.entries == saturated_16 || result.size == saturated_32 || result.begin == saturated_32 || u16(end + 4) != 0 || u16(end + 6) != 0) {
    refuse(ErrorCode::bad_schema, "the end record leaves its numbers to zip64 records, which are missing", position, archive_size);
  }
  std::uint64_t directory_end = 0;
  if (!checked_add(result.begin, result.size, directory_end)) refuse(ErrorCode::overflow, "a directory whose end does not fit into 64 bits", position, archive_size);
  if (directory_end != records_begin)
    refuse(ErrorCode::bad_offsets, "a directory of bytes [" + std::to_string(result.begin) + ", " + std::to_string(directory_end) + ") that does not end where the end records begin, at byte " +
                                       std::to_string(records_begin), position, archive_size);
  return result;
}

template <class = Deferred>
void check_claims(End const& end, Limits const& limits) {
  auto const claim = [&](std::uint64_t number, char const* what) { return "the archive claims " + std::to_string(number) + what; };
  auto const range = [&](Error error) { return error.with_range(end.begin, end.begin + end.size); };
  if (end.entries > limits.max_entries)
    throw range(Error{ErrorCode::limit, claim(end.entries, " records; the limit is ") + std::to_string(limits.max_entries)}.with_hint("Limits::max_entries raises it"));
  if (end.size > limits.max_directory_bytes)
    throw range(Error{ErrorCode::limit, claim(end.size, " bytes of directory; the limit is ") + std::to_string(limits.max_directory_bytes)}.with_hint("Limits::max_directory_bytes raises it"));
  if (end.entries > end.size / directory_bytes) throw range(Error{ErrorCode::truncated, claim(end.entries, " records, for which its directory is too short")});
}

/// One record of the directory, which has `rest` bytes more from `position`; gives the bytes that it takes.
template <class Name>
std::size_t parse_entry(ConstByteSpan rest, std::uint64_t position, Limits const& limits, BasicEntry<Name>& entry) {
  if (rest.size() < directory_bytes) refuse(ErrorCode::truncated, "the directory ends within a record", position, position + rest.size());
  std::byte const* const at = rest.data();
  if (u32(at) != directory_signature) refuse(ErrorCode::bad_magic, "no record of the directory where one should be", position, position + 4);
  std::size_t const name_bytes = u16(at + 28), extra_bytes = u16(at + 30), bytes = directory_bytes + name_bytes + extra_bytes + u16(at + 32);
  if (rest.size() < bytes) refuse(ErrorCode::truncated, "the directory ends within a record", position, position + rest.size());
  if (name_bytes > limits.max_name_bytes)
    refuse(ErrorCode::limit, "a record whose name has " + std::to_string(name_bytes) + " bytes; the limit is " + std::to_string(limits.max_name_bytes), position, position + bytes);
  std::string_view const name = as_text(rest.subspan(directory_bytes, name_bytes));
  entry.flags = u16(at + 8);
  if (auto const fault = name_fault(name, (entry.flags & utf8_flag) != 0); fault != ErrorCode::unknown) refuse(fault, name_fault_text(fault, name), position, position + bytes);
  auto const wrong = [&](ErrorCode code, std::string const& problem) { refuse(code, record_called(name) + problem, position, position + bytes); };
  if ((entry.flags & (1 | 1 << 6 | 1 << 13)) != 0) wrong(ErrorCode::unsupported, " is encrypted");
  if ((entry.flags & 1 << 5) != 0) wrong(ErrorCode::unsupported, " is a patch of other data");
  if ((entry.flags & ~(1 << 1 | 1 << 2 | descriptor_flag | utf8_flag)) != 0) wrong(ErrorCode::unsupported, " has flags that are not known: " + std::to_string(entry.flags));
  if (auto const method = u16(at + 10); method != 0) wrong(ErrorCode::unsupported, " is compressed with " + method_called(method) + "; only stored records can be read");
  std::uint64_t packed = u32(at + 20);
  entry.crc = u32(at + 16);
  entry.size = u32(at + 24);
  entry.header = u32(at + 42);
  if (extra_bytes > 0 || entry.size == saturated_32 || packed == saturated_32 || entry.header == saturated_32) {
    std::uint64_t const extra_position = position + directory_bytes + name_bytes;
    take_from(zip64_of(rest.subspan(directory_bytes + name_bytes, extra_bytes), extra_position), std::array{&entry.size, &packed, &entry.header}, extra_position);
  }
  if (packed != entry.size) wrong(ErrorCode::size_mismatch, " is stored and has " + std::to_string(packed) + " bytes stored of " + std::to_string(entry.size));
  if (auto const disk = u16(at + 34); disk != 0) wrong(ErrorCode::unsupported, " is on another disk");
  entry.name = Name{name};
  return bytes;
}

/// Says where each record must end, and refuses those that cannot: `order` gives the numbers of the records by position.
template <class Name, class Order>
void bound_entries(BasicDirectory<Name>& directory, Order order) {
  std::uint64_t next = directory.begin;
  for (std::size_t i = directory.entries.size(); i-- > 0;) {
    auto& entry = directory.entries[order(i)];
    std::uint64_t least = 0;   // where the record would end without extra fields and descriptor
    if (!checked_add(entry.header, local_bytes + entry.name.size(), least) || !checked_add(least, entry.size, least))
      refuse(ErrorCode::overflow, record_called(entry.name) + " has a size or position that does not fit into 64 bits", directory.begin, directory.begin + 1);
    if (least > next)
      throw Error{ErrorCode::bad_offsets, record_called(entry.name) + " of " + std::to_string(entry.size) + " bytes at byte " + std::to_string(entry.header) +
                                              " of the archive reaches beyond byte " + std::to_string(next) + ", where the next one or the directory begins"}.with_range(entry.header, least);
    entry.end = next;
    next = entry.header;
  }
}

template <class Name>
void check_order_and_names(BasicDirectory<Name>& directory) {
  auto& entries = directory.entries;
  auto const twice = [](std::string_view name) { throw Error{ErrorCode::duplicate_key, record_called(name) + " is in the archive twice"}; };
  auto const by_position = [](auto const& a, auto const& b) { return a.header < b.header; };
  std::vector<std::uint32_t> order;
  auto const numbered = [&] {
    order.resize(entries.size());
    for (std::uint32_t i = 0; i < order.size(); ++i) order[i] = i;
  };
  if (std::is_sorted(entries.begin(), entries.end(), by_position)) {
    bound_entries(directory, [](std::size_t i) { return i; });
  } else {
    numbered();
    std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) { return by_position(entries[a], entries[b]); });
    bound_entries(directory, [&](std::size_t i) { return order[i]; });
  }
  if (entries.size() <= few_entries) {
    for (std::size_t i = 1; i < entries.size(); ++i)
      for (std::size_t j = 0; j < i; ++j)
        if (entries[i].name == entries[j].name) twice(entries[i].name);
    return;
  }
  numbered();
  std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) { return entries[a].name < entries[b].name; });
  for (std::size_t i = 1; i < order.size(); ++i)
    if (entries[order[i - 1]].name == entries[order[i]].name) twice(entries[order[i]].name);
  directory.by_name = std::move(order);
}

template <class Name>
BasicDirectory<Name> parse_directory(ConstByteSpan bytes, End const& end, Limits const& limits) {
  BasicDirectory<Name> directory;
  directory.begin = end.begin;
  directory.entries.reserve(static_cast<std::size_t>(end.entries));   // check_claims: no more than the directory has bytes for
  std::size_t at = 0;
  for (std::uint64_t i = 0; i < end.entries; ++i) at += parse_entry(bytes.subspan(at), end.begin + at, limits, directory.entries.emplace_back());
  if (at != bytes.size()) refuse(ErrorCode::trailing_data, "the directory has " + std::to_string(bytes.size() - at) + " bytes behind its last record", end.begin + at, end.begin + end.size);
  check_order_and_names(directory);
  return directory;
}

/// Compares a local header with the directory and sets entry.data. `head` is the header and the name; extra() gives its extra fields.
template <class Name, class Extra>
void check_local(BasicEntry<Name>& entry, ConstByteSpan head, Extra extra) {
  std::byte const* const at = head.data();
  std::string_view const name = entry.name;
  auto const wrong = [&](ErrorCode code, char const* problem) { refuse(code, record_called(name) + problem, entry.header, entry.header + head.size()); };
  if (u32(at) != local_signature) wrong(ErrorCode::bad_magic, " has no local header where the directory says");
  if (u16(at + 26) != name.size() || as_text(head.subspan(local_bytes)) != name) wrong(ErrorCode::index_mismatch, " has another name in its local header");
  if (u16(at + 6) != entry.flags || u16(at + 8) != 0) wrong(ErrorCode::index_mismatch, " has other flags or another method in its local header");
  std::uint64_t const extra_bytes = u16(at + 28), data = entry.header + head.size() + extra_bytes;
  if (data > entry.end || entry.size > entry.end - data) wrong(ErrorCode::bad_offsets, " overlaps what comes after it");
  if ((entry.flags & descriptor_flag) == 0) {
    std::uint64_t size = u32(at + 22), packed = u32(at + 18);
    if (size == saturated_32 || packed == saturated_32) take_from(zip64_of(extra(static_cast<std::size_t>(extra_bytes)), data - extra_bytes), std::array{&size, &packed}, data - extra_bytes);
    if (size != entry.size || packed != entry.size || u32(at + 14) != entry.crc) wrong(ErrorCode::index_mismatch, " has another size or CRC-32 in its local header");
  }
  entry.data = data;
}

}  // namespace detail

/// The directory of an archive of `size` bytes. `read(position, bytes)` fills the ByteSpan `bytes` from the archive or throws. Usually
/// one read, of the last 4 KiB; one more for a long comment, for a zip64 end record beyond it, and for a directory that does not fit.
///
/// Throws    Error: truncated, trailing_data, bad_offsets, bad_magic, bad_schema, overflow for the end records and the directory; limit;
///           bad_schema, unsafe_path, bad_utf8, duplicate_key for names; unsupported for what is compressed, encrypted or on several disks;
///           size_mismatch and bad_offsets for records that cannot lie where they should
/// Memory    proportional to the directory, whatever it claims
template <class Read>
Directory read_directory(std::uint64_t size, Read read, Limits const& limits = {}) {
  Bytes tail;   // the last bytes of the archive
  auto const in_tail = [&](std::uint64_t begin) { return begin >= size - tail.size(); };
  auto const from_tail = [&](std::uint64_t begin, std::uint64_t bytes) {
    return ConstByteSpan{tail}.subspan(static_cast<std::size_t>(begin - (size - tail.size())), static_cast<std::size_t>(bytes));
  };
  detail::End const end = detail::find_end(
      size,
      [&](std::uint64_t bytes) {
        if (tail.size() < bytes) {
          tail.resize(static_cast<std::size_t>(bytes));
          read(size - bytes, ByteSpan{tail});
        }
        return ConstByteSpan{tail}.last(static_cast<std::size_t>(bytes));
      },
      [&](std::uint64_t begin) {
        std::array<std::byte, detail::zip64_end_bytes> record;
        if (in_tail(begin)) std::memcpy(record.data(), from_tail(begin, record.size()).data(), record.size());
        else read(begin, ByteSpan{record});
        return record;
      });
  detail::check_claims(end, limits);
  if (in_tail(end.begin)) return detail::parse_directory<std::string>(from_tail(end.begin, end.size), end, limits);
  Bytes bytes(static_cast<std::size_t>(end.size));
  read(end.begin, ByteSpan{bytes});
  return detail::parse_directory<std::string>(bytes, end, limits);
}

/// Reads the local header of a record and sets entry.data: the data are bytes [entry.data, entry.data + entry.size) of the archive.
///
/// Throws    Error: bad_magic, index_mismatch where it contradicts the directory, bad_offsets, bad_schema
template <class Read>
void locate(Entry& entry, Read read) {
  Bytes head(detail::local_bytes + entry.name.size()), extra;
  read(entry.header, ByteSpan{head});
  detail::check_local(entry, head, [&](std::size_t extra_bytes) {
    extra.resize(extra_bytes);
    read(entry.header + head.size(), ByteSpan{extra});
    return ConstByteSpan{extra};
  });
}

/// The directory of an archive in memory, with every record located. The names are parts of `archive`.
///
/// Throws    what read_directory and locate of an archive elsewhere throw
/// Cost      one allocation; 0.25 us for the seven records of a tensor (g++ 12 -O2, one thread of a 2-core x86-64 VM)
template <class = Deferred>
DirectoryView read_directory(ConstByteSpan archive, Limits const& limits = {}) {
  auto const part = [&](std::uint64_t begin, std::uint64_t bytes) { return archive.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(bytes)); };
  detail::End const end = detail::find_end(
      archive.size(), [&](std::uint64_t bytes) { return archive.last(static_cast<std::size_t>(bytes)); },
      [&](std::uint64_t begin) {
        std::array<std::byte, detail::zip64_end_bytes> record;
        std::memcpy(record.data(), part(begin, record.size()).data(), record.size());
        return record;
      });
  detail::check_claims(end, limits);
  DirectoryView directory = detail::parse_directory<std::string_view>(part(end.begin, end.size), end, limits);
  for (auto& entry : directory.entries) {
    std::uint64_t const head = detail::local_bytes + entry.name.size();
    detail::check_local(entry, part(entry.header, head), [&](std::size_t extra_bytes) { return part(entry.header + head, extra_bytes); });
  }
  return directory;
}

/// The data of a located record of an archive in memory.
template <class Name>
ConstByteSpan data_of(ConstByteSpan archive, BasicEntry<Name> const& entry) {
  return archive.subspan(static_cast<std::size_t>(entry.data), static_cast<std::size_t>(entry.size));
}

/// Throws Error(corrupt) if `crc`, the crc32 of the data of a record, is not what the archive says.
template <class Name>
void check_crc(BasicEntry<Name> const& entry, std::uint32_t crc) {
  if (crc != entry.crc)
    detail::refuse(ErrorCode::corrupt, detail::record_called(entry.name) + " has the CRC-32 " + hex16(crc).substr(8) + " and should have " + hex16(entry.crc).substr(8), entry.data, entry.data + entry.size);
}

// --- writing

/// torch.save lets data begin at multiples of this.
inline constexpr std::uint64_t data_alignment = 64;

/// One record that is to be written.
struct Record {
  std::string_view name;      // whole: "archive/data.pkl"
  ConstByteSpan bytes = {};   // its data, if they are known
  std::uint64_t size = 0;     // of data that lie elsewhere
  bool elsewhere = false;

  std::uint64_t data_bytes() const { return elsewhere ? size : bytes.size(); }
};

/// A run of bytes of an archive. All pieces, and the data that lie elsewhere, make the archive.
struct Piece {
  std::uint64_t offset = 0;
  Bytes bytes;
};
/// Four bytes of a piece, little-endian, where the CRC-32 of the data of a record belongs.
struct CrcPlace {
  std::size_t record = 0, piece = 0, at = 0;
};

/// An archive that is to be written.
struct Layout {
  std::uint64_t size = 0;
  std::vector<std::uint64_t> data;   // where the data of each record begin
  std::vector<Piece> pieces;         // by offset; none if only sizes were asked for
  std::vector<CrcPlace> crcs;        // by record: two for each whose data lie elsewhere, unless they are empty; zeros until set_crc
};

enum class LayoutParts : std::uint8_t { all, sizes_only };

namespace detail {

/// Where a record goes whose local header is at `header`.
struct Placed {
  std::uint64_t header = 0, size = 0, zip64 = 0, padding = 0, data = 0, end = 0;   // zip64: bytes of that field in the local header and in the directory
  bool large = false, far = false;                                                // whether its size, its position, are for zip64

  /// miniz as PyTorch has it: a zip64 field where a size or a position reaches 2^32 - 1, then FB with padding. A descriptor of 64-bit sizes goes
  /// with every zip64 field; empty records have none.
  template <class = Deferred>
  static Placed at(std::uint64_t header, std::size_t name_bytes, std::uint64_t size) {
    Placed result{header, size};
    result.large = size >= saturated_32;
    result.far = header >= saturated_32;
    if (result.large || result.far) result.zip64 = 4u + (result.large ? 16u : 0u) + (result.far ? 8u : 0u);
    std::uint64_t const unpadded = header + local_bytes + name_bytes + result.zip64 + 4;
    result.data = round_up(unpadded, data_alignment);
    result.padding = result.data - unpadded;
    result.end = result.data + size + (size == 0 ? 0 : result.zip64 > 0 ? 24 : 16);
    return result;
  }
  std::uint16_t flags() const { return static_cast<std::uint16_t>(utf8_flag | (size == 0 ? 0 : descriptor_flag)); }
};

/// Numbers to memory that is zero.
class Cursor {
 public:
  explicit Cursor(std::byte* at) : at_{at} {}
  template <class T>
  Cursor& number(std::uint64_t value) {
    T const narrow = static_cast<T>(value);
    std::memcpy(at_, &narrow, sizeof narrow);
    at_ += sizeof narrow;
    return *this;
  }
  Cursor& u16(std::uint64_t value) { return number<std::uint16_t>(value); }
  Cursor& u32(std::uint64_t value) { return number<std::uint32_t>(value); }
  Cursor& u64(std::uint64_t value) { return number<std::uint64_t>(value); }
  Cursor& zeros(std::size_t bytes) { return at_ += bytes, *this; }
  Cursor& fill(char with, std::uint64_t bytes) {
    std::memset(at_, with, static_cast<std::size_t>(bytes));
    return zeros(static_cast<std::size_t>(bytes));
  }
  Cursor& raw(ConstByteSpan bytes) {
    if (!bytes.empty()) std::memcpy(at_, bytes.data(), bytes.size());
    return zeros(bytes.size());
  }
  std::byte* at() const { return at_; }

 private:
  std::byte* at_;
};

template <class = Deferred>
void check_records(std::span<Record const> records) {
  auto const twice = [](std::string_view name) { throw Error{ErrorCode::duplicate_key, record_called(name) + " would be in one archive twice"}; };
  for (auto const& record : records) {
    if (auto const fault = name_fault(record.name, true); fault != ErrorCode::unknown) throw Error{fault, name_fault_text(fault, record.name)};
    if (record.name.size() > 65535) throw Error{ErrorCode::limit, "a record whose name has " + std::to_string(record.name.size()) + " bytes; at most 65535 are allowed"};
  }
  if (records.size() <= few_entries) {
    for (std::size_t i = 1; i < records.size(); ++i)
      for (std::size_t j = 0; j < i; ++j)
        if (records[i].name == records[j].name) twice(records[i].name);
    return;
  }
  std::vector<std::string_view> names;
  names.reserve(records.size());
  for (auto const& record : records) names.push_back(record.name);
  dcp::detail::sort(names);
  if (auto const found = std::adjacent_find(names.begin(), names.end()); found != names.end()) twice(*found);
}

/// The pieces of a layout whose sizes are known; the directory has `directory_size` bytes from `directory`.
template <class = Deferred>
void fill_pieces(Layout& layout, std::span<Record const> records, std::uint64_t directory, std::uint64_t directory_size) {
  std::uint64_t begin = 0;
  for (std::size_t i = 0; i < records.size(); ++i)
    if (auto const& record = records[i]; record.elsewhere && record.size > 0) {
      layout.pieces.push_back({begin, Bytes(static_cast<std::size_t>(layout.data[i] - begin))});
      begin = layout.data[i] + record.size;
    }
  layout.pieces.push_back({begin, Bytes(static_cast<std::size_t>(layout.size - begin))});

  std::size_t const last = layout.pieces.size() - 1;
  std::size_t piece = 0;
  Cursor out{layout.pieces[0].bytes.data()}, index{layout.pieces[last].bytes.data() + (directory - layout.pieces[last].offset)};
  std::uint64_t position = 0;
  for (std::size_t i = 0; i < records.size(); ++i) {
    auto const& record = records[i];
    Placed const placed = Placed::at(position, record.name.size(), record.data_bytes());
    position = placed.end;
    out.u32(local_signature).u16(0).u16(placed.flags()).zeros(18).u16(record.name.size()).u16(placed.zip64 + 4 + placed.padding).raw(as_byte_span(record.name));
    if (placed.zip64 > 0) {
      out.u16(zip64_extra).u16(placed.zip64 - 4);
      if (placed.large) out.u64(placed.size).u64(0);   // the compressed size is not known yet when this is written
      if (placed.far) out.u64(placed.header);
    }
    out.u16(0x4246).u16(placed.padding).fill('Z', placed.padding);   // "FB"
    bool const waits = record.elsewhere && placed.size > 0;
    std::uint32_t const crc = record.elsewhere ? 0 : crc32(record.bytes);
    if (waits) {
      ++piece;
      out = Cursor{layout.pieces[piece].bytes.data()};
    } else {
      out.raw(record.elsewhere ? ConstByteSpan{} : record.bytes);
    }
    if (placed.size > 0) {
      out.u32(descriptor_signature);
      if (waits) layout.crcs.push_back({i, piece, static_cast<std::size_t>(out.at() - layout.pieces[piece].bytes.data())});
      out.u32(crc);
      if (placed.zip64 > 0) out.u64(placed.size).u64(placed.size);
      else out.u32(placed.size).u32(placed.size);
    }
    std::uint64_t const narrow_size = placed.large ? saturated_32 : placed.size;
    index.u32(directory_signature).u32(0).u16(placed.flags()).zeros(6);
    if (waits) layout.crcs.push_back({i, last, static_cast<std::size_t>(index.at() - layout.pieces[last].bytes.data())});
    index.u32(crc).u32(narrow_size).u32(narrow_size).u16(record.name.size()).u16(placed.zip64).zeros(10).u32(placed.far ? saturated_32 : placed.header).raw(as_byte_span(record.name));
    if (placed.zip64 > 0) {
      index.u16(zip64_extra).u16(placed.zip64 - 4);
      if (placed.large) index.u64(placed.size).u64(placed.size);
      if (placed.far) index.u64(placed.header);
    }
  }
  std::uint64_t const count = records.size(), zip64_end = directory + directory_size;
  index.u32(zip64_end_signature).u64(44).u16(0x031E).u16(45).u32(0).u32(0).u64(count).u64(count).u64(directory_size).u64(directory);
  index.u32(zip64_locator_signature).u32(0).u64(zip64_end).u32(1);
  std::uint64_t const narrow_count = std::min<std::uint64_t>(count, saturated_16);
  index.u32(end_signature).u32(0).u16(narrow_count).u16(narrow_count).u32(std::min<std::uint64_t>(directory_size, saturated_32)).u32(std::min<std::uint64_t>(directory, saturated_32)).u16(0);
}

}  // namespace detail

/// The archive of these records, in this order, byte for byte as PyTorch writes it.
///
/// Law       read_directory of the archive gives the records again, with data[i] where this says
/// Throws    Error: bad_schema, unsafe_path, bad_utf8, limit, duplicate_key for names; overflow if it would have more than 2^62 bytes
/// Cost      sizes_only reads no data and makes no pieces: 0.16 us for the seven records of a tensor, 0.4 us with pieces (measured as above)
template <class = Deferred>
Layout lay_out(std::span<Record const> records, LayoutParts parts = LayoutParts::all) {
  detail::check_records(records);
  Layout layout;
  layout.data.reserve(records.size());
  std::uint64_t position = 0, directory_size = 0;
  for (auto const& record : records) {
    // Names and fields are far from 2^62 together, so that only data can carry a position there.
    if (record.data_bytes() > (1ull << 62) || position > (1ull << 62)) throw Error{ErrorCode::overflow, "an archive of more than 2^62 bytes"};
    auto const placed = detail::Placed::at(position, record.name.size(), record.data_bytes());
    layout.data.push_back(placed.data);
    directory_size += detail::directory_bytes + record.name.size() + placed.zip64;
    position = placed.end;
  }
  layout.size = position + directory_size + detail::zip64_end_bytes + detail::zip64_locator_bytes + detail::end_bytes;
  if (parts == LayoutParts::all) detail::fill_pieces(layout, records, position, directory_size);
  return layout;
}

/// Says what the CRC-32 of data that lie elsewhere is. Nothing is to be said of empty and of known data.
template <class = Deferred>
void set_crc(Layout& layout, std::size_t record, std::uint32_t crc) {
  auto place = std::lower_bound(layout.crcs.begin(), layout.crcs.end(), record, [](CrcPlace const& one, std::size_t wanted) { return one.record < wanted; });
  for (; place != layout.crcs.end() && place->record == record; ++place) std::memcpy(layout.pieces[place->piece].bytes.data() + place->at, &crc, sizeof crc);
}

/// The archive of records whose data are all known.
///
/// Throws    Error(invalid_argument) if some lie elsewhere; what lay_out throws
template <class = Deferred>
Bytes write(std::span<Record const> records) {
  if (std::any_of(records.begin(), records.end(), [](Record const& record) { return record.elsewhere; }))
    throw Error{ErrorCode::invalid_argument, "an archive whose data lie elsewhere cannot be written as a whole"};
  Layout layout = lay_out(records);
  return std::move(layout.pieces.front().bytes);
}

/// One tensor's memory in an archive of torch.save.
struct Storage {
  ConstByteSpan bytes = {};   // if they are known
  std::uint64_t size = 0;     // of bytes that lie elsewhere
  bool elsewhere = false;
};

/// The records of torch.save, in its order: data.pkl, .format_version, .storage_alignment, byteorder, data/0 and on, version,
/// .data/serialization_id. The id, of which readers want only that it is there, is made from names and sizes, so that equal content gives equal bytes.
///
/// Lifetime  of the pickle and of storages: the caller's
template <class = Deferred>
class TorchRecords {
 public:
  explicit TorchRecords(ConstByteSpan pickle, std::span<Storage const> storages = {}) {
    records_.reserve(storages.size() + 6);
    std::string names;
    for (std::size_t i = 0; i < storages.size(); ++i) {
      names += "archive/data/";
      append_number(names, i);
    }
    // Moving a vector leaves its memory where it is, so that the records of a moved TorchRecords stay good.
    text_.assign(names.begin(), names.end());
    text_.resize(names.size() + id_digits);
    add("archive/data.pkl", {.bytes = pickle});
    add("archive/.format_version", {.bytes = as_byte_span("1")});
    add("archive/.storage_alignment", {.bytes = as_byte_span("64")});
    add("archive/byteorder", {.bytes = as_byte_span("little")});
    std::size_t at = 0;
    for (std::size_t i = 0; i < storages.size(); ++i) {
      std::size_t digits = 1;
      for (std::size_t rest = i; rest >= 10; rest /= 10) ++digits;
      std::size_t const bytes = data_prefix_bytes + digits;
      add({text_.data() + at, bytes}, storages[i]);
      at += bytes;
    }
    add("archive/version", {.bytes = as_byte_span("3\n")});
    char* const id = text_.data() + at;
    write_digits(id, name_hash_);
    write_digits(id + id_digits / 2, size_hash_);
    add("archive/.data/serialization_id", {.bytes = as_byte_span({id, id_digits})});
  }
  TorchRecords(TorchRecords&&) noexcept = default;
  TorchRecords& operator=(TorchRecords&&) noexcept = default;
  TorchRecords(TorchRecords const&) = delete;
  TorchRecords& operator=(TorchRecords const&) = delete;

  std::span<Record const> records() const { return records_; }
  /// The number of the record of a storage.
  static constexpr std::size_t record_of_storage(std::size_t storage) { return 4 + storage; }

 private:
  static constexpr std::size_t data_prefix_bytes = 13, id_digits = 40;

  void add(std::string_view name, Storage const& storage) {
    records_.push_back({name, storage.bytes, storage.size, storage.elsewhere});
    for (char const c : name) mix(name_hash_, static_cast<unsigned char>(c));
    mix(size_hash_, records_.back().data_bytes());
  }
  // FNV-1a, in steps of words for sizes.
  static void mix(std::uint64_t& hash, std::uint64_t value) { hash = (hash ^ value) * 0x100000001b3; }
  static void write_digits(char* to, std::uint64_t number) {
    for (std::size_t i = id_digits / 2; i-- > 0; number /= 10) to[i] = static_cast<char>('0' + number % 10);
  }

  std::vector<Record> records_;
  std::vector<char> text_;   // names, then the id
  std::uint64_t name_hash_ = 0xcbf29ce484222325, size_hash_ = 0xcbf29ce484222325;
};

}  // namespace dcp::zip
