// SPDX-License-Identifier: Apache-2.0
#pragma once
// Files of the operating system: an owned descriptor, whole transfers at 64-bit offsets, and errors that say which bytes of which file.
//
// Every transfer is all or nothing for the caller: interruptions and short counts are continued here and nowhere else. Paths are
// kept only for messages.

#include <dcp/base/config.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/threading.hpp>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

namespace dcp {

static_assert(sizeof(off_t) == 8, "dcp: file offsets are 64 bits wide; define _FILE_OFFSET_BITS=64 [sizeof(off_t) == 8]");

/// What the system said, as an Error: missing_file for ENOENT, io for the rest.
template <class = Deferred>
Error system_failure(int system_error, std::string message, std::string path) {
  Error error{system_error == ENOENT ? ErrorCode::missing_file : ErrorCode::io, std::move(message)};
  error.with_path(std::move(path)).with_errno(system_error);
  return error;
}

/// The part of a path before its last component, "." for a bare name and "/" for a root. Lexical: no link is followed.
template <class = Deferred>
std::string parent_path(std::string_view path) {
  while (path.size() > 1 && path.back() == '/') path.remove_suffix(1);
  auto const slash = path.rfind('/');
  if (slash == std::string_view::npos) return ".";
  path = path.substr(0, slash);
  while (!path.empty() && path.back() == '/') path.remove_suffix(1);
  return path.empty() ? "/" : std::string{path};
}

/// The last component of a path, empty for a root.
template <class = Deferred>
std::string path_name(std::string_view path) {
  while (!path.empty() && path.back() == '/') path.remove_suffix(1);
  auto const slash = path.rfind('/');
  return std::string{slash == std::string_view::npos ? path : path.substr(slash + 1)};
}

/// Calls `action` again while it throws because a name is not visible yet, until `deadline` has passed; then its error stands.
///
/// Because   on a network file system what another rank has just made may answer ENOENT, ESTALE or EEXIST here until caches expire
/// Example   auto file = retry_visible(std::chrono::seconds{30}, [&] { return medium.open_read(path); });
template <class Action>
auto retry_visible(std::chrono::milliseconds deadline, Action action) -> decltype(action()) {
  using Clock = detail::SteadyClock;
  auto const end = Clock::now() + deadline;
  for (auto pause = std::chrono::milliseconds{1};; pause = std::min(2 * pause, std::chrono::milliseconds{100})) {
    try {
      return action();
    } catch (Error const& error) {
      bool const may_pass = error.code() == ErrorCode::missing_file || error.system_error() == ESTALE || error.system_error() == EEXIST;
      if (!may_pass || Clock::now() >= end) throw;
    }
    detail::this_thread::sleep_until(std::min(end, Clock::now() + pause));
  }
}

namespace detail {
/// All of a file below /proc, whose size is not known before; empty where there is none.
template <class = Deferred>
std::string text_of_system_file(char const* path) {
  std::string text;
  int const file = ::open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return text;
  for (std::size_t length = 0;;) {
    text.resize(length + 4096);
    auto const more = ::read(file, text.data() + length, 4096);
    if (more < 0 && errno == EINTR) continue;
    length += static_cast<std::size_t>(std::max<::ssize_t>(more, 0));
    text.resize(length);
    if (more <= 0) break;
  }
  ::close(file);
  return text;
}

struct Moved {
  std::uint64_t done;
  int system_error;   // 0: done is what was wanted, or the step returned 0
};

/// Moves `size` bytes with `step(done, most)`, which returns as read(2) does: a count, 0 at the end, -1 with errno.
template <class Step>
Moved move_all(std::uint64_t size, Step step) {
  // 1 GiB: the kernel moves at most 0x7ffff000 bytes a call, and a multiple of any block size keeps direct I/O aligned.
  constexpr std::uint64_t most_at_once = std::uint64_t{1} << 30;
  std::uint64_t done = 0;
  while (done < size) {
    auto const count = step(done, static_cast<std::size_t>(std::min(size - done, most_at_once)));
    if (count > 0) done += static_cast<std::uint64_t>(count);
    if (count == 0) break;
    if (count < 0 && errno != EINTR) return {done, errno};
  }
  return {done, 0};
}

}  // namespace detail

/// An open file or directory, closed on destruction. Its const members are thread-safe.
class FileHandle {
 public:
  FileHandle() = default;
  /// Takes over an open descriptor.
  FileHandle(int descriptor, std::string path) : descriptor_{descriptor}, path_{std::move(path)} {}
  FileHandle(FileHandle&& other) noexcept : descriptor_{std::exchange(other.descriptor_, -1)}, path_{std::move(other.path_)} {}
  FileHandle& operator=(FileHandle&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    path_.swap(other.path_);
    return *this;
  }
  ~FileHandle() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }

  /// open(2) with O_CLOEXEC; new files get mode 0666 less the umask. Throws missing_file, io.
  template <class = Deferred>
  static FileHandle open(std::string path, int flags) { return open_at(AT_FDCWD, path, flags, path); }
  template <class = Deferred>
  static FileHandle open_at(FileHandle const& directory, std::string const& name, int flags) {
    return open_at(directory.descriptor_, name, flags, directory.path_ + "/" + name);
  }

  /// A regular file for reading. A FIFO, a device or a directory is refused, without waiting for a writer.
  template <class = Deferred>
  static FileHandle open_read(std::string path) {
    auto file = open(std::move(path), O_RDONLY | O_NONBLOCK);
    file.require_regular();
    return file;
  }

  /// A file for writing, created if it is not there and never cut. A FIFO that nobody reads is refused, not waited for.
  template <class = Deferred>
  static FileHandle open_write(std::string path) {
    auto file = open(std::move(path), O_WRONLY | O_CREAT | O_NONBLOCK);
    file.clear_nonblocking();
    return file;
  }

  template <class = Deferred>
  static FileHandle open_directory(std::string path) { return open(std::move(path), O_RDONLY | O_DIRECTORY); }

  bool is_open() const noexcept { return descriptor_ >= 0; }
  int descriptor() const noexcept { return descriptor_; }
  /// The descriptor, which is now the caller's to close.
  int release() noexcept { return std::exchange(descriptor_, -1); }
  std::string const& path() const noexcept { return path_; }

  /// Fills all of `out` from `offset`. Throws truncated where the file ends first, io.
  template <class = Deferred>
  void read_at(std::uint64_t offset, ByteSpan out) const {
    auto const step = [&](std::uint64_t done, std::size_t most) { return ::pread(descriptor_, out.data() + done, most, static_cast<off_t>(offset + done)); };
    auto const result = fits(offset, out.size()) ? detail::move_all(out.size(), step) : detail::Moved{0, 0};   // beyond the end of any file
    if (result.system_error != 0) throw failure(result.system_error, "cannot read the file").with_range(offset, offset + out.size());
    if (result.done < out.size())
      throw Error{ErrorCode::truncated, "the file ends " + std::to_string(out.size() - result.done) + " bytes before the range that is wanted"}
          .with_path(path_)
          .with_range(offset, offset + out.size());
  }

  /// Fills `pieces` one after the other with what lies from `offset` on, with as few system calls as possible. Throws as read_at.
  template <class = Deferred>
  void read_pieces(std::uint64_t offset, std::span<ByteSpan const> pieces) const {
    constexpr std::size_t most = 1024;   // IOV_MAX
    while (!pieces.empty()) {
      std::array<iovec, most> list;
      std::size_t const count = std::min(pieces.size(), most);
      std::uint64_t size = 0;
      for (std::size_t i = 0; i < count; ++i) {
        list[i] = {pieces[i].data(), pieces[i].size()};
        size += pieces[i].size();
      }
      ssize_t const moved = ::preadv(descriptor_, list.data(), static_cast<int>(count), static_cast<off_t>(offset));
      if (moved < 0 || static_cast<std::uint64_t>(moved) < size) {
        // At the end of the file, at a signal, at 2 GiB, or for an error: what is missing is read piece by piece.
        std::uint64_t done = moved > 0 ? static_cast<std::uint64_t>(moved) : 0, at = offset;
        for (ByteSpan const piece : pieces.first(count)) {
          std::uint64_t const there = std::min<std::uint64_t>(done, piece.size());
          if (there < piece.size()) read_at(at + there, piece.subspan(static_cast<std::size_t>(there)));
          done -= there;
          at += piece.size();
        }
      }
      offset += size;
      pieces = pieces.subspan(count);
    }
  }

  /// Has the system read [begin, end) into its cache in the background, unless it is there, as a few looks tell.
  template <class = Deferred>
  void fetch(std::uint64_t begin, std::uint64_t end) const {
    std::byte byte{};
    iovec const one{&byte, 1};
    for (std::uint64_t const at : {begin, begin + (end - begin) / 2, end - 1})
      if (::preadv2(descriptor_, &one, 1, static_cast<off_t>(at), RWF_NOWAIT) != 1) {
        ::posix_fadvise(descriptor_, static_cast<off_t>(begin), static_cast<off_t>(end - begin), POSIX_FADV_WILLNEED);
        return;
      }
  }

  /// Writes all of `bytes` at `offset`. Throws io.
  template <class = Deferred>
  void write_at(std::uint64_t offset, ConstByteSpan bytes) const {
    auto const step = [&](std::uint64_t done, std::size_t most) { return ::pwrite(descriptor_, bytes.data() + done, most, static_cast<off_t>(offset + done)); };
    auto const result = fits(offset, bytes.size()) ? detail::move_all(bytes.size(), step) : detail::Moved{0, EFBIG};
    int const system_error = result.system_error == 0 && result.done < bytes.size() ? EIO : result.system_error;
    if (system_error != 0) throw failure(system_error, "cannot write the file").with_range(offset, offset + bytes.size());
  }

  template <class = Deferred>
  void resize(std::uint64_t size) const {
    if (!fits(size, 0)) throw failure(EFBIG, "cannot set the size of the file");
    require([&] { return ::ftruncate(descriptor_, static_cast<off_t>(size)); }, "cannot set the size of the file");
  }

  template <class = Deferred>
  struct stat status() const {
    struct stat status {};
    require([&] { return ::fstat(descriptor_, &status); }, "cannot look at the file");
    return status;
  }
  template <class = Deferred>
  std::uint64_t size() const { return static_cast<std::uint64_t>(status().st_size); }

  /// Bytes and attributes to stable storage. Not to be repeated after a failure: the kernel may have marked the lost pages clean.
  template <class = Deferred>
  void sync() const { require([&] { return ::fsync(descriptor_); }, "cannot make the file durable"); }

  /// The names in this directory to stable storage.
  template <class = Deferred>
  void sync_directory() const {
    if (::fsync(descriptor_) == 0) return;
    // Some network and FUSE file systems have no such call: there a name is as durable as the server made it when it was set.
    if (errno != EINVAL && errno != ENOTSUP && errno != ENOSYS) throw failure(errno, "cannot make the directory durable");
  }

  /// Closes and reports what only close knows (quota, space and I/O errors of network file systems).
  template <class = Deferred>
  void close() {
    if (descriptor_ < 0) return;
    // The descriptor is gone even after EINTR (Linux); what mattered was reported by sync.
    if (::close(std::exchange(descriptor_, -1)) != 0 && errno != EINTR) throw failure(errno, "cannot close the file");
  }

  template <class = Deferred>
  Error failure(int system_error, std::string message) const { return system_failure(system_error, std::move(message), path_); }

  /// Refuses everything but a regular file, and makes reads of it wait as usual. Throws io.
  template <class = Deferred>
  void require_regular() const {
    auto const mode = status().st_mode;
    if (!S_ISREG(mode)) throw failure(S_ISDIR(mode) ? EISDIR : EINVAL, "not a regular file, so it is not read");
    clear_nonblocking();
  }

 private:
  int descriptor_ = -1;
  std::string path_;

  template <class = Deferred>
  static FileHandle open_at(int directory, std::string const& name, int flags, std::string path) {
    for (;;) {
      int const descriptor = ::openat(directory, name.c_str(), flags | O_CLOEXEC, 0666);
      if (descriptor >= 0) return FileHandle{descriptor, std::move(path)};
      if (errno != EINTR) throw system_failure(errno, (flags & O_ACCMODE) == O_RDONLY ? "cannot open for reading" : "cannot open for writing", std::move(path));
    }
  }

  static bool fits(std::uint64_t offset, std::uint64_t size) {
    constexpr auto most = static_cast<std::uint64_t>(std::numeric_limits<off_t>::max());
    return offset <= most && size <= most - offset;
  }

  template <class Call>
  void require(Call call, char const* message) const {
    while (call() != 0)
      if (errno != EINTR) throw failure(errno, message);
  }

  template <class = Deferred>
  void clear_nonblocking() const {
    int const flags = ::fcntl(descriptor_, F_GETFL);
    if (flags >= 0) ::fcntl(descriptor_, F_SETFL, flags & ~O_NONBLOCK);
  }
};

}  // namespace dcp
