// SPDX-License-Identifier: Apache-2.0
#pragma once
// The chunk checksums of files that several ranks write or read parts of: what each contributes, and how contributions add up.

#include <dcp/base/config.hpp>
#include <dcp/base/checksum.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/formats/commit_record.hpp>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace dcp::detail {

/// What one or more runs contribute to a chunk: their raw CRC at their place, and their bytes. Counts are what shows a run that
/// nobody wrote (its linear CRC, of zeros, is zero) and one that was counted twice (it cancels).
struct ChunkSum {
  std::uint64_t raw = 0, bytes = 0;
  void operator+=(ChunkSum const& other) { raw ^= other.raw, bytes += other.bytes; }
};

constexpr std::uint64_t chunk_size(std::uint64_t file_size, std::uint64_t chunk) { return std::min(chunk_bytes, file_size - chunk * chunk_bytes); }

/// Calls visit(chunk, offset in the chunk, size of the chunk, bytes) for the parts of `bytes`, which lie at `position` of a file.
template <class Visit>
void for_each_chunk(std::uint64_t file_size, std::uint64_t position, ConstByteSpan bytes, Visit visit) {
  while (!bytes.empty()) {
    std::uint64_t const chunk = position / chunk_bytes, offset = position % chunk_bytes, size = chunk_size(file_size, chunk);
    auto const part = bytes.first(static_cast<std::size_t>(std::min<std::uint64_t>(bytes.size(), chunk_bytes - offset)));
    visit(chunk, offset, size, part);
    position += part.size();
    bytes = bytes.subspan(part.size());
  }
}

/// The sums of one file, sparse.
struct FileSums {
  std::uint64_t size = 0;
  std::map<std::uint64_t, ChunkSum> chunks;
};

/// The sums of all files that this rank wrote something of. Thread-safe.
template <class = Deferred>
class WrittenSums {
 public:
  void add(std::string const& path, std::uint64_t file_size, std::uint64_t position, ConstByteSpan bytes) {
    std::vector<std::pair<std::uint64_t, ChunkSum>> parts;
    for_each_chunk(file_size, position, bytes, [&](std::uint64_t chunk, std::uint64_t offset, std::uint64_t size, ConstByteSpan part) {
      parts.emplace_back(chunk, ChunkSum{crc64_contribution(part, offset, size), part.size()});
    });
    add(path, file_size, parts);
  }
  void add(std::string const& path, std::uint64_t file_size, std::vector<std::pair<std::uint64_t, ChunkSum>> const& parts) {
    std::lock_guard const lock{mutex_};
    FileSums& file = files_[path];
    file.size = file_size;
    for (auto const& [chunk, sum] : parts) file.chunks[chunk] += sum;
  }
  /// Makes a file known that has no bytes.
  void add_empty(std::string const& path, std::uint64_t file_size) {
    std::lock_guard const lock{mutex_};
    files_[path].size = file_size;
  }
  std::map<std::string, FileSums> take() { return std::move(files_); }

 private:
  Mutex mutex_;
  std::map<std::string, FileSums> files_;
};

template <class = Deferred>
Bytes encode(std::map<std::string, FileSums> const& files) {
  ByteWriter out;
  out.number<std::uint64_t>(files.size());
  for (auto const& [path, file] : files) {
    out.text(path).number(file.size).number(std::uint64_t{file.chunks.size()});
    for (auto const& [chunk, sum] : file.chunks) out.number(chunk).number(sum.raw).number(sum.bytes);
  }
  return out.take();
}
template <class = Deferred>
std::map<std::string, FileSums> decode_sums(ConstByteSpan bytes) {
  ByteReader in{bytes};
  std::map<std::string, FileSums> files;
  for (auto count = in.number<std::uint64_t>(); count > 0 && in.ok(); --count) {
    FileSums& file = files[in.text()];
    file.size = in.number<std::uint64_t>();
    for (auto chunks = in.number<std::uint64_t>(); chunks > 0 && in.ok(); --chunks) {
      auto const chunk = in.number<std::uint64_t>(), raw = in.number<std::uint64_t>();
      file.chunks.emplace_hint(file.chunks.end(), chunk, ChunkSum{raw, in.number<std::uint64_t>()});
    }
  }
  if (!in.done()) throw Error{ErrorCode::unknown, "a message with checksums is damaged"};
  return files;
}
/// Adds the sums of other ranks. Throws Error(ranks_disagree) if they planned different sizes for a file.
template <class = Deferred>
void add_sums(std::map<std::string, FileSums>& files, std::map<std::string, FileSums> const& more) {
  for (auto const& [path, file] : more) {
    auto const [at, fresh] = files.try_emplace(path, FileSums{file.size, {}});
    if (at->second.size != file.size) throw Error{ErrorCode::ranks_disagree, "ranks planned " + std::to_string(at->second.size) + " and " + std::to_string(file.size) + " bytes"}.with_path(path);
    for (auto const& [chunk, sum] : file.chunks) at->second.chunks[chunk] += sum;
  }
}
/// The sums of two groups of ranks as one. Throws as add_sums.
template <class = Deferred>
Bytes merge_sums(Bytes a, Bytes b) {
  auto files = decode_sums(a);
  add_sums(files, decode_sums(b));
  return encode(files);
}

/// The checksums of a file's chunks, and of the file.
struct FileChecksums {
  std::vector<std::uint64_t> chunks;
  std::uint64_t file = 0;
};

/// `summed`: false where only bytes were counted
///
/// Throws    Error(incomplete), naming file and range, if a byte was not written exactly once
template <class = Deferred>
FileChecksums finish_sums(std::string const& path, FileSums const& sums, bool summed = true) {
  FileChecksums result;
  auto next = sums.chunks.begin();
  for (std::uint64_t chunk = 0; chunk * chunk_bytes < sums.size; ++chunk) {
    std::uint64_t const size = chunk_size(sums.size, chunk);
    ChunkSum const sum = next != sums.chunks.end() && next->first == chunk ? (next++)->second : ChunkSum{};
    if (sum.bytes != size)
      throw Error{ErrorCode::incomplete, std::to_string(sum.bytes) + " bytes were written to a chunk of " + std::to_string(size) + (sum.bytes < size ? "; a part was written by nobody" : "; a part was written twice")}
          .with_path(path)
          .with_range(chunk * chunk_bytes, chunk * chunk_bytes + size);
    if (!summed) continue;
    std::uint64_t const crc = crc64_from_raw(sum.raw, size);
    result.file = chunk == 0 ? crc : crc64_combine(result.file, crc, size);
    result.chunks.push_back(crc);
  }
  if (sums.size == 0) result.file = crc64({});
  if (next != sums.chunks.end()) throw Error{ErrorCode::incomplete, "bytes were written behind the end of the file"}.with_path(path);
  return result;
}

}  // namespace dcp::detail
