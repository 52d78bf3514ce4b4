// SPDX-License-Identifier: Apache-2.0
#pragma once
// Opening a checkpoint: which directory it is, what its record says, what its files hold. Rank 0 looks; all ranks read headers, each
// of its share of the files, and learn of all of them.

#include <dcp/base/config.hpp>
#include <dcp/base/algorithms.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/checkpoint/checksums.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/place.hpp>
#include <dcp/comm/agree.hpp>
#include <dcp/storage/storage.hpp>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace dcp::detail {

/// The chunk checksums of the files of a committed checkpoint, read when they are asked for.
template <class = Deferred>
class ChecksumTable {
 public:
  ChecksumTable() = default;
  ChecksumTable(AnyMedium& medium, std::string directory, CommitRecord const& record) : medium_{&medium}, path_{std::move(directory) + '/' + std::string{checksums_name}} {
    std::uint64_t at = 0;
    for (auto const& file : record.files) {
      entries_[file.path] = {at, file, {}};
      at += 8 * file.chunks();
    }
    size_ = at;
  }

  RecordFile const* find(std::string const& path) const {
    auto const at = entries_.find(path);
    return at == entries_.end() ? nullptr : &at->second.file;
  }
  bool has(std::string const& path) const {
    RecordFile const* file = find(path);
    return file != nullptr && file->summed;
  }
  /// Throws Error(corrupt) if the table does not have the checksum that the record lists.
  std::vector<std::uint64_t> const& of(std::string const& path) {
    std::lock_guard const lock{*mutex_};
    Entry& entry = entries_.at(path);
    if (!entry.chunks.empty() || entry.file.chunks() == 0) return entry.chunks;
    if (!open_) {
      open_ = medium_->open_read(path_);
      if (open_->size() != size_) throw Error{ErrorCode::corrupt, "the table of checksums has " + std::to_string(open_->size()) + " bytes; the files of the commit record need " + std::to_string(size_)}.with_path(path_);
    }
    std::vector<std::uint64_t> chunks(static_cast<std::size_t>(entry.file.chunks()));
    open_->read_at(entry.at, std::as_writable_bytes(std::span{chunks}));
    if (crc64(std::as_bytes(std::span{chunks})) != entry.file.table_crc)
      throw Error{ErrorCode::corrupt, "the checksums of " + path + " do not have the checksum of the commit record"}.with_path(path_).with_range(entry.at, entry.at + 8 * chunks.size());
    entry.chunks = std::move(chunks);
    return entry.chunks;
  }

 private:
  struct Entry {
    std::uint64_t at;
    RecordFile file;
    std::vector<std::uint64_t> chunks;
  };
  AnyMedium* medium_ = nullptr;
  std::string path_;
  std::uint64_t size_ = 0;
  std::map<std::string, Entry> entries_;
  std::unique_ptr<ReadableFile> open_;
  std::unique_ptr<Mutex> mutex_ = std::make_unique<Mutex>();
};

template <class = Deferred>
Error corrupt_chunk(std::string const& path, std::uint64_t file_size, std::uint64_t chunk, std::string const& tensors) {
  return Error{ErrorCode::corrupt, "a chunk of the checkpoint does not have the checksum that was written with it" + (tensors.empty() ? "" : "; it holds " + tensors)}
      .with_path(path)
      .with_range(chunk * chunk_bytes, chunk * chunk_bytes + chunk_size(file_size, chunk));
}

struct OpenedCheckpoint {
  std::string directory;                // of the files
  std::string record_directory;         // of the record, which may name one below it
  std::optional<CommitRecord> record;   // nothing for a foreign checkpoint
  Bytes record_bytes;                   // of its file
  Catalog catalog;
  ChecksumTable<> checksums;
  std::uint64_t verification_bytes = 0; // that this rank read to verify headers
};

template <class = Deferred>
Bytes encode(Scan const& scan) {
  ByteWriter out;
  out.text(scan.directory).number(scan.indexed).number(scan.total_size).number<std::uint64_t>(scan.files.size());
  for (auto const& file : scan.files) out.text(file);
  out.number<std::uint64_t>(scan.index.size());
  for (auto const& [tensor, file] : scan.index) out.text(tensor).text(file);
  out.number<std::uint64_t>(scan.warnings.size());
  for (auto const& warning : scan.warnings) out.text(warning);
  out.number<std::uint64_t>(scan.texts.size());
  for (auto const& [name, text] : scan.texts) out.text(name).text(text);
  out.number(scan.foreign);
  return out.take();
}
template <class = Deferred>
Scan decode_scan(ByteReader in) {
  Scan scan;
  scan.directory = in.text(), scan.indexed = in.number<bool>(), scan.total_size = in.number<std::int64_t>();
  for (auto count = in.number<std::uint64_t>(); count > 0 && in.ok(); --count) scan.files.push_back(in.text());
  for (auto count = in.number<std::uint64_t>(); count > 0 && in.ok(); --count) {
    std::string tensor = in.text();
    scan.index.emplace_back(std::move(tensor), in.text());
  }
  for (auto count = in.number<std::uint64_t>(); count > 0 && in.ok(); --count) scan.warnings.push_back(in.text());
  for (auto count = in.number<std::uint64_t>(); count > 0 && in.ok(); --count) {
    std::string name = in.text();
    scan.texts.emplace_back(std::move(name), in.text());
  }
  scan.foreign = in.number<bool>();
  return scan;
}

/// The directory or file that is the checkpoint of a place, and its record.
struct Located {
  std::string directory;                // of the files
  std::string record_directory;
  Bytes record_bytes;                   // as they are in the file; none for a foreign checkpoint
  std::optional<CommitRecord> record;
  bool has_values = false;              // whether the values are in `record`, too
  std::vector<std::string> warnings;
};
template <class = Deferred>
Located locate_checkpoint(AnyMedium& medium, std::string place) {
  while (place.size() > 1 && place.ends_with('/')) place.pop_back();
  Located located;
  located.directory = located.record_directory = place;
  EntryKind const kind = medium.kind(place);
  if (kind == EntryKind::missing) {
    auto const siblings = siblings_of(medium, place);
    // One that cannot be read may be the newest: loading another in its stead would go back in time and not say so.
    for (auto const& sibling : siblings)
      if (sibling.failure) throw *sibling.failure;
    auto const* newest = newest_committed(siblings);
    if (newest == nullptr) {
      Error error{ErrorCode::not_found, "there is no checkpoint"};
      error.with_path(place);
      if (!siblings.empty()) error.with_hint("an unfinished save lies beside it: " + siblings[0].path);
      throw error;
    }
    located.directory = located.record_directory = newest->path;
    located.warnings.push_back("the place is missing; its last committed checkpoint, " + newest->path + ", is loaded (a save was interrupted between two renames)");
  }
  if (kind == EntryKind::file) return located;
  if (kind == EntryKind::other) throw Error{ErrorCode::not_found, "the place is neither a directory nor a file"}.with_path(place);
  std::string const path = located.directory + '/' + std::string{record_name};
  try {
    located.record_bytes = read_file(medium, path, most_record_bytes);
    // Of most records nothing more is needed to read the values as well.
    located.has_values = as_text(located.record_bytes).find(values_name) == std::string_view::npos;
    located.record = parse_record(located.record_bytes, {}, located.has_values);
  } catch (Error& error) {
    if (error.code() != ErrorCode::missing_file && error.code() != ErrorCode::not_found) throw error.with_path(path);
  }
  auto const& record = located.record;
  // The record of a sibling was there a moment ago, and whoever removes a checkpoint removes that first.
  if (!record && kind == EntryKind::missing) throw Error{ErrorCode::not_found, "there is no checkpoint: it was removed while it was looked at"}.with_path(place);
  if (!record && medium.kind(located.directory + '/' + std::string{checksums_name}) == EntryKind::file)
    throw Error{ErrorCode::corrupt, std::string{record_name} + " is missing; " + std::string{checksums_name} + ", which is written together with it, is there"}
        .with_path(path)
        .with_hint("without both, the directory is loaded as a checkpoint that somebody else wrote: unverified");
  if (record && !record->committed) throw Error{ErrorCode::not_found, "the directory holds a save that was never committed"}.with_path(located.directory);
  if (record) located.directory = data_directory(located.record_directory, *record);
  else if (holds_only_attempts(medium, located.directory) && !medium.list(located.directory).empty())
    throw Error{ErrorCode::not_found, "there is no checkpoint"}.with_path(place).with_hint("an unfinished save lies below it");
  return located;
}

/// Whether the record in `directory` is, byte by byte, the one that was read.
template <class = Deferred>
bool still_holds(AnyMedium& medium, std::string const& directory, Bytes const& record) {
  try {
    return read_file(medium, directory + '/' + std::string{record_name}, most_record_bytes) == record;
  } catch (Error const&) {
    return false;
  }
}

/// What rank 0 has seen of a place while it was being opened and read.
struct Sighting {
  // On rank 0. Both, because a directory is renamed when its save ends:
  std::string directory;
  std::string id;              // of the record; empty if there was none, or none that could be read
  bool complete = false;       // all was read: an error that comes now has another reason
};

/// The result of `once(sighting)`, which opens the place and reads from it. A checkpoint that is replaced meanwhile shows as any
/// error at all (files gone, of another size, with other checksums): then all ranks start again. Collective.
template <class F>
auto again_if_replaced(CommRef comm, AnyMedium& medium, std::string const& place, F once) {
  constexpr int most_replacements = 64;   // before this is somebody's mistake
  for (int attempt = 0;; ++attempt) {
    Sighting seen;
    try {
      return once(seen);
    } catch (Error const& error) {
      if (seen.complete || attempt == most_replacements) throw;
      std::uint8_t replaced = 0;
      if (comm.rank() == 0) {
        Sighting now;
        try {
          Located const located = locate_checkpoint(medium, place);
          now.directory = located.directory;
          if (located.record) now.id = located.record->id;
        } catch (Error const&) {
          // Nothing that can be read.
        }
        replaced = now.id == seen.id && now.directory == seen.directory ? 0 : 1;
      }
      try {
        replaced = broadcast_value(comm, replaced, 0);
      } catch (Error const&) {
        throw error;   // a rank is gone, which is what `error` says too
      }
      if (replaced == 0) throw;
    }
  }
}

/// A chunk of a file, read and compared. Throws Error(corrupt).
template <class = Deferred>
void verify_chunk(ReadableFile& file, std::string const& path, std::uint64_t file_size, std::uint64_t chunk, std::uint64_t expected, std::string const& tensors, Bytes& buffer) {
  buffer.resize(static_cast<std::size_t>(chunk_size(file_size, chunk)));
  file.read_at(chunk * chunk_bytes, buffer);
  if (crc64(buffer) != expected) throw corrupt_chunk(path, file_size, chunk, tensors);
}

template <class = Deferred>
void require_size(ReadableFile const& file, std::string const& path, std::uint64_t listed) {
  if (file.size() != listed) throw Error{ErrorCode::corrupt, "the file has " + std::to_string(file.size()) + " bytes; the commit record says " + std::to_string(listed)}.with_path(path);
}

/// Collective. Touches no tensor memory.
///
/// Throws    on all ranks the same Error: not_found; what storage and record say of malformed files; corrupt for sizes and headers that
///           differ from the commit record
template <class = Deferred>
OpenedCheckpoint open_checkpoint(CommRef comm, AnyStorage const& storage, AnyMedium& medium, std::string const& place, Verify verify, Sighting& seen) {
  OpenedCheckpoint opened;
  std::optional<CommitRecord> parsed;   // on rank 0, mostly
  Bytes message = agree(comm, "load: open", [&] {
    ByteWriter out;
    if (comm.rank() != 0) return out.take();
    Located located = locate_checkpoint(medium, place);
    seen.directory = located.directory;
    Bytes large;
    if (located.record) {
      CommitRecord const& files = *located.record;
      seen.id = files.id;
      if (std::any_of(files.files.begin(), files.files.end(), [](RecordFile const& f) { return f.path == values_name; })) {
        large = read_file(medium, located.directory + '/' + std::string{values_name}, most_record_bytes);
        for (auto const& file : files.files)
          if (file.path == values_name && (large.size() != file.size || crc64(large) != file.crc))
            throw Error{ErrorCode::corrupt, "the file of large values does not have the size and checksum of the commit record"}.with_path(located.directory + '/' + file.path);
      }
      if (files.storage != storage.name())
        throw Error{ErrorCode::unsupported, "the checkpoint was saved as " + files.storage + ", and is loaded as " + std::string{storage.name()}}.with_path(located.directory);
    }
    Scan scan = storage.scan(medium, located.directory, located.record ? &*located.record : nullptr);
    append(located.warnings, scan.warnings);
    scan.warnings = std::move(located.warnings);
    scan.foreign = !located.record;
    if (located.has_values) parsed = std::move(located.record);
    out.number(located.record_bytes.size() > 0).block(located.record_bytes).block(large).block(encode(scan)).text(located.record_directory);
    return out.take();
  });
  broadcast_bytes(comm, message, 0);
  Scan scan;
  struct Headers {
    std::vector<FoundFile> files;   // alone
    Bytes bytes;                    // for other ranks
    std::uint64_t verification_bytes = 0;
  };
  Headers mine = agree(comm, "load: headers", [&] {
    ByteReader in{message};
    bool const has_record = in.number<bool>();
    auto const record_bytes = in.block(), large = in.block();
    scan = decode_scan(ByteReader{in.block()});
    opened.directory = scan.directory;
    opened.record_directory = in.text();
    opened.record_bytes.assign(record_bytes.begin(), record_bytes.end());
    try {
      if (parsed) opened.record = std::move(parsed);
      else if (has_record) opened.record = parse_record(record_bytes, large);
    } catch (Error& error) {
      throw error.with_path(opened.record_directory + '/' + std::string{record_name});
    }
    if (opened.record) opened.checksums = ChecksumTable<>{medium, opened.directory, *opened.record};
    Headers headers;
    ByteWriter out;
    Bytes buffer;
    for (std::size_t f = static_cast<std::size_t>(comm.rank()); f < scan.files.size(); f += static_cast<std::size_t>(comm.size())) {
      std::string const path = opened.directory + '/' + scan.files[f];
      RecordFile const* listed = opened.record ? opened.checksums.find(scan.files[f]) : nullptr;
      std::unique_ptr<ReadableFile> file;
      auto const check = [&](std::uint64_t chunk) {
        verify_chunk(*file, path, listed->size, chunk, opened.checksums.of(scan.files[f])[static_cast<std::size_t>(chunk)], "the header", buffer);
        headers.verification_bytes += buffer.size();
      };
      if (listed != nullptr) {
        file = medium.open_read(path);
        require_size(*file, path, listed->size);
        if (verify != Verify::none && listed->chunks() > 0 && storage.files_have_headers()) check(0);   // before a byte of it is believed
      }
      FoundFile found = storage.read_header(medium, scan, scan.files[f]);
      if (listed != nullptr && listed->summed && verify != Verify::none && storage.files_have_headers()) {
        std::uint64_t header_end = found.size;
        for (auto const& tensor : found.tensors) header_end = std::min(header_end, tensor.offset);
        for (std::uint64_t chunk = 1; chunk * chunk_bytes < header_end; ++chunk) check(chunk);
      }
      if (comm.size() > 1) out.block(encode(found));
      else headers.files.push_back(std::move(found));
      comm.progress();
    }
    // Indexes and the like, which nothing is loaded from.
    if (opened.record)
      for (std::size_t f = static_cast<std::size_t>(comm.rank()); f < opened.record->files.size(); f += static_cast<std::size_t>(comm.size())) {
        RecordFile const& listed = opened.record->files[f];
        if (listed.path == values_name && verify != Verify::none) static_cast<void>(opened.checksums.of(listed.path));   // rank 0 has read the file, not the table
        if (listed.data || listed.path == values_name) continue;
        std::string const path = opened.directory + '/' + listed.path;
        auto const file = medium.open_read(path);
        require_size(*file, path, listed.size);
        for (std::uint64_t chunk = 0; verify != Verify::none && chunk < listed.chunks(); ++chunk) {
          verify_chunk(*file, path, listed.size, chunk, opened.checksums.of(listed.path)[static_cast<std::size_t>(chunk)], "", buffer);
          headers.verification_bytes += buffer.size();
        }
        comm.progress();
      }
    headers.bytes = out.take();
    return headers;
  });
  opened.verification_bytes = mine.verification_bytes;
  std::vector<FoundFile> found = std::move(mine.files);
  for (auto const& part : all_gather_bytes(comm, mine.bytes))
    for (ByteReader in{part}; !in.done() && in.ok();) found.push_back(decode_found_file(in.block()));
  opened.catalog = agree(comm, "load: headers", [&] {
    Catalog catalog;
    try {
      catalog = storage.assemble(scan, std::move(found), opened.record ? &*opened.record : nullptr);
    } catch (Error& error) {
      throw error.with_path(opened.directory);
    }
    if (opened.record) {
      Problems problems;
      for (auto const& tensor : opened.record->tensors) {
        CatalogTensor const* stored = catalog.find_stored(tensor.name);
        if (stored == nullptr) problems.add(ErrorCode::corrupt, tensor.name + ": in the commit record, but in no file");
        else if (stored->dtype != tensor.dtype || !(stored->shape == tensor.shape))
          problems.add(ErrorCode::corrupt, tensor.name + ": the commit record says " + to_string(tensor.shape) + ' ' + std::string{to_string(tensor.dtype)} + ", the files say " + to_string(stored->shape) + ' ' + std::string{to_string(stored->dtype)});
      }
      std::size_t stored_tensors = catalog.raw.size();
      for (auto const& tensor : catalog.tensors) stored_tensors += tensor.encoding == nullptr ? 1 : 0;
      if (problems.empty() && stored_tensors != opened.record->tensors.size()) problems.add(ErrorCode::corrupt, "the files hold other tensors than the commit record lists");
      try {
        problems.raise();
      } catch (Error& error) {
        throw error.with_path(opened.record_directory + '/' + std::string{record_name});
      }
      catalog.values = std::move(opened.record->values);
      std::sort(catalog.values.begin(), catalog.values.end(), [](auto const& a, auto const& b) { return a.first < b.first; });
      catalog.ties.clear();
      for (auto const& [dropped, kept] : opened.record->ties) catalog.ties.push_back({dropped, kept});
      detail::sort(catalog.ties);
    }
    return catalog;
  });
  return opened;
}

}  // namespace dcp::detail
