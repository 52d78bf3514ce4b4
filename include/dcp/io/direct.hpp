// SPDX-License-Identifier: Apache-2.0
#pragma once
// Writing past the page cache: whole blocks go from the caller's memory to the device.
//
// A buffered write of a checkpoint is copied once more, and the sync at the end waits while the kernel finds and writes gigabytes of
// dirty pages. Direct writes leave nothing to find. They need blocks: offset, size and memory at multiples of the device's unit.

#include <dcp/base/config.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/io/aligned_buffer.hpp>
#include <dcp/io/file.hpp>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>

namespace dcp {

namespace detail {
/// Whether the file system of an open file is one on a local block device: others answer O_DIRECT with a round trip per write, or not.
template <class = Deferred>
bool on_a_block_device(FileHandle const& file) {
  struct statfs system {};
  if (::fstatfs(file.descriptor(), &system) != 0) return false;
  constexpr long xfs = 0x58465342, f2fs = static_cast<long>(0xF2F52010), ext = EXT4_SUPER_MAGIC;   // ext2, ext3 and ext4 share theirs
  return system.f_type == ext || system.f_type == xfs || system.f_type == f2fs;
}
}  // namespace detail

/// A file that is written directly, in blocks that one writer owns. Thread-safe for disjoint blocks.
///
/// Blocks    writes begin at a multiple of `block`. One that does not end at one ends the file: its last block is padded with zeros, and
///           the file is cut to its size by sync()
/// Memory    any; what is not aligned is copied through a block-aligned buffer
template <class = Deferred>
class DirectFile {
 public:
  /// Opens `path` for direct writes; nothing where the file system does not take them, or is not known to be faster with them.
  static std::optional<DirectFile> open(std::string const& path, std::uint64_t block, bool only_where_faster) {
    if (block % AlignedBuffer::alignment != 0) return std::nullopt;
    // O_NONBLOCK: a FIFO of this name is refused, not waited for.
    int const descriptor = ::open(path.c_str(), O_WRONLY | O_CREAT | O_NONBLOCK | O_CLOEXEC | O_DIRECT, 0666);
    if (descriptor < 0) return std::nullopt;   // for whatever reason: the plain open that follows will tell it
    FileHandle file{descriptor, path};
    if (!S_ISREG(file.status().st_mode) || (only_where_faster && !detail::on_a_block_device(file))) return std::nullopt;
    return DirectFile{std::move(file), block};
  }

  void write_at(std::uint64_t offset, ConstByteSpan bytes) {
    if (offset % block_ != 0) throw file_.failure(EINVAL, "a direct write begins inside a block");
    std::uint64_t const whole = round_down(bytes.size(), block_);
    bool const aligned = reinterpret_cast<std::uintptr_t>(bytes.data()) % AlignedBuffer::alignment == 0;
    if (aligned && whole > 0) write_blocks(offset, bytes.first(static_cast<std::size_t>(whole)));
    std::uint64_t done = aligned ? whole : 0;
    if (done == bytes.size()) return;
    std::uint64_t const most = std::min(round_up(bytes.size() - done, block_), std::max<std::uint64_t>(block_, 1 << 20));
    AlignedBuffer buffer{static_cast<std::size_t>(round_up(most, block_))};
    while (done < bytes.size()) {
      std::uint64_t const part = std::min<std::uint64_t>(buffer.size(), bytes.size() - done), padded = round_up(part, block_);
      std::memcpy(buffer.data(), bytes.data() + done, static_cast<std::size_t>(part));
      std::memset(buffer.data() + part, 0, static_cast<std::size_t>(padded - part));
      write_blocks(offset + done, buffer.first(padded));
      done += part;
    }
    if (bytes.size() != whole) cut_ = true;
  }

  /// Sets the size, and has the file system find the space now: a full disk shows before the data travels, and blocks that exist can be
  /// written at once by several threads.
  void resize(std::uint64_t size) {
    file_.resize(size);
    size_ = size;
    if (size == 0) return;
    while (::fallocate(file_.descriptor(), 0, 0, static_cast<off_t>(size)) != 0) {
      if (errno == EINTR) continue;
      if (errno == EOPNOTSUPP || errno == ENOSYS) return;
      throw file_.failure(errno, "cannot find the space for the file");
    }
  }
  void sync() {
    if (cut_) file_.resize(size_);
    file_.sync();
  }
  void close() { file_.close(); }
  int descriptor() const { return file_.descriptor(); }
  DirectFile(DirectFile&& other) noexcept : file_{std::move(other.file_)}, block_{other.block_}, size_{other.size_}, cut_{other.cut_.load()} {}

 private:
  DirectFile(FileHandle file, std::uint64_t block) : file_{std::move(file)}, block_{block} {}

  void write_blocks(std::uint64_t offset, ConstByteSpan bytes) {
    try {
      file_.write_at(offset, bytes);
    } catch (Error const& error) {
      if (error.system_error() != EINVAL) throw;
      // The file system took the flag and not the write: its unit is another one. Nobody else writes these blocks, so the page cache may.
      int const flags = ::fcntl(file_.descriptor(), F_GETFL);
      if (flags < 0 || ::fcntl(file_.descriptor(), F_SETFL, flags & ~O_DIRECT) != 0) throw;
      file_.write_at(offset, bytes);
    }
  }

  FileHandle file_;
  std::uint64_t block_, size_ = 0;
  detail::Atomic<bool> cut_{false};   // a write went beyond the size
};

}  // namespace dcp
