// SPDX-License-Identifier: Apache-2.0
#pragma once
// The file system, local or shared by the machines of a job, as a medium.
//
// What makes a name or a byte survive a crash is spelled out in media/medium.hpp; here it is fsync of a file for its bytes and
// fsync of a directory for its names. Not for mounts of object stores: there a directory is not renamed atomically.

#include <dcp/base/config.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/algorithms.hpp>
#include <dcp/io/direct.hpp>
#include <dcp/io/file.hpp>
#include <dcp/media/local_lease.hpp>
#include <dcp/media/local_links.hpp>
#include <dcp/media/local_place.hpp>
#include <dcp/media/medium.hpp>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace dcp {

namespace detail {

/// `File`: FileHandle or DirectFile.
template <class File>
class LocalWritableFile final : public WritableFile {
 public:
  explicit LocalWritableFile(File file) : file_{std::move(file)} {}
  void write_at(std::uint64_t offset, ConstByteSpan bytes) override { file_.write_at(offset, bytes); }
  void resize(std::uint64_t size) override { file_.resize(size); }
  void sync() override { file_.sync(); }
  void close() override { file_.close(); }
  int descriptor() const override { return file_.descriptor(); }

 private:
  File file_;
};

template <class = Deferred>
class LocalReadableFile final : public ReadableFile {
 public:
  explicit LocalReadableFile(FileHandle file) : file_{std::move(file)} {}
  std::uint64_t size() const override { return file_.size(); }
  // The time of the last change: unlike a device or inode number, all machines of a job see the same one.
  std::uint64_t version() const override {
    auto const status = file_.status();
    return static_cast<std::uint64_t>(status.st_mtim.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(status.st_mtim.tv_nsec);
  }
  void read_at(std::uint64_t offset, ByteSpan out) override { file_.read_at(offset, out); }
  void read_pieces(std::uint64_t offset, std::span<ByteSpan const> pieces) override { file_.read_pieces(offset, pieces); }
  void will_read(std::uint64_t begin, std::uint64_t end) override { file_.fetch(begin, end); }

 private:
  FileHandle file_;
};

/// The names in a directory, sorted; none if it is gone.
template <class = Deferred>
std::vector<std::string> directory_names(FileHandle const& directory) {
  // A descriptor of its own, because closedir closes it and readdir moves its position.
  auto own = FileHandle::open_at(directory, ".", O_RDONLY | O_DIRECTORY);
  std::unique_ptr<DIR, int (*)(DIR*)> const stream{::fdopendir(own.descriptor()), [](DIR* open) { return ::closedir(open); }};
  if (!stream) throw directory.failure(errno, "cannot list the directory");
  own.release();
  [[maybe_unused]] int const adopted = own.release();
  std::vector<std::string> names;
  for (;;) {
    errno = 0;
    auto const* entry = ::readdir(stream.get());
    if (entry == nullptr) break;
    std::string name{static_cast<char const*>(entry->d_name)};
    if (name != "." && name != "..") names.push_back(std::move(name));
  }
  if (errno != 0 && errno != ENOENT) throw directory.failure(errno, "cannot list the directory");
  detail::sort(names);
  return names;
}

/// What is at `name` in `directory`, with links followed; `path` is for messages.
template <class = Deferred>
DirectoryEntry local_entry(int directory, std::string name, std::string const& path) {
  struct stat status {};
  DirectoryEntry entry{std::move(name), EntryKind::missing, 0};
  if (::fstatat(directory, entry.name.c_str(), &status, 0) == 0) {
    entry.kind = S_ISREG(status.st_mode) ? EntryKind::file : S_ISDIR(status.st_mode) ? EntryKind::directory : EntryKind::other;
    if (entry.kind == EntryKind::file) entry.size = static_cast<std::uint64_t>(status.st_size);
    return entry;
  }
  int const why = errno;
  if (why != ENOENT && why != ENOTDIR && why != ELOOP) throw system_failure(why, "cannot look at the path", path);
  // A link to nothing, or to itself, is something all the same.
  if (::fstatat(directory, entry.name.c_str(), &status, AT_SYMLINK_NOFOLLOW) == 0) entry.kind = EntryKind::other;
  return entry;
}

}  // namespace detail

/// Models Medium.
class LocalFs {
 public:
  static constexpr bool renames_directories = true;
  static constexpr bool shared_by_ranks = true;
  static constexpr bool local_files = true;

  struct Options {
    LinkPolicy links = LinkPolicy::cache;            // of files that are read: which links their directory may hold
    std::chrono::milliseconds visible_within{0};     // how long an open waits for a name that another machine has just made
  };

  LocalFs() = default;
  explicit LocalFs(Options options) : options_{options} {}

  template <class D = Deferred>
  std::unique_ptr<WritableFile> open_write(std::string const& path) {
    using File = typename detail::DeferredType<FileHandle, D>::type;
    return retry_visible(options_.visible_within, [&] { return std::make_unique<detail::LocalWritableFile<File>>(FileHandle::open_write(path)); });
  }

  template <class D = Deferred>
  std::unique_ptr<WritableFile> open_blocks(std::string const& path, std::uint64_t block, DirectIo mode) {
    return retry_visible(options_.visible_within, [&]() -> std::unique_ptr<WritableFile> {
      if (mode != DirectIo::never)
        if (auto file = DirectFile<D>::open(path, block, mode == DirectIo::automatic)) return std::make_unique<detail::LocalWritableFile<DirectFile<D>>>(std::move(*file));
      return open_write<D>(path);
    });
  }

  template <class D = Deferred>
  std::unique_ptr<ReadableFile> open_read(std::string const& path) {
    auto const directory = parent_path(path), name = path_name(path);
    bool first = true;
    return retry_visible(options_.visible_within, [&] {
      // Opening the directory makes a network file system ask its server again for names it believes missing.
      if (!std::exchange(first, false)) FileHandle::open_directory(directory);
      bool const plain = !name.empty() && name != "." && name != "..";
      return std::make_unique<detail::LocalReadableFile<D>>(plain ? open_inside(directory, name, options_.links) : FileHandle::open_read(path));
    });
  }

  template <class = Deferred>
  void rename_file(std::string const& from, std::string const& to) {
    if (std::rename(from.c_str(), to.c_str()) != 0) throw system_failure(errno, "cannot rename to " + to, from);
  }

  template <class = Deferred>
  void remove_file(std::string const& path) {
    if (::unlink(path.c_str()) != 0 && errno != ENOENT && errno != ENOTDIR) throw system_failure(errno, "cannot remove the file", path);
  }

  template <class = Deferred>
  EntryKind kind(std::string const& path) { return detail::local_entry(AT_FDCWD, path, path).kind; }

  template <class = Deferred>
  std::vector<DirectoryEntry> list(std::string const& directory) {
    auto const handle = FileHandle::open_directory(directory);
    std::vector<DirectoryEntry> entries;
    for (auto const& name : detail::directory_names(handle)) {
      auto entry = detail::local_entry(handle.descriptor(), name, directory + "/" + name);
      if (entry.kind != EntryKind::missing) entries.push_back(std::move(entry));
    }
    return entries;
  }

  template <class = Deferred>
  bool create_directory(std::string const& path) {
    if (::mkdir(path.c_str(), 0777) == 0) return true;
    int const why = errno;
    if (why == EEXIST && kind(path) == EntryKind::directory) return false;
    throw system_failure(why, "cannot create the directory", path);
  }

  template <class = Deferred>
  void create_directories(std::string const& path) {
    if (kind(path) == EntryKind::directory) return;
    auto const parent = parent_path(path);
    if (parent == path) throw system_failure(ENOENT, "the current directory is gone", path);
    create_directories(parent);
    create_directory(path);
    sync_directory(parent);
  }

  template <class = Deferred>
  void sync_directory(std::string const& path) { FileHandle::open_directory(path).sync_directory(); }

  template <class = Deferred>
  bool publish_new(std::string const& from, std::string const& to) {
    require_directory(from);
    // For a directory, rename(2) is what is wanted here without RENAME_NOREPLACE, and on more file systems: it replaces nothing
    // but an empty directory, atomically.
    if (std::rename(from.c_str(), to.c_str()) == 0) return true;
    int const why = errno;
    if (why == EEXIST || why == ENOTEMPTY || (why == ENOTDIR && kind(to) != EntryKind::missing)) return false;
    throw system_failure(why, "cannot rename to " + to, from);
  }

  template <class = Deferred>
  bool exchange_directories(std::string const& a, std::string const& b) {
    require_directory(a);
    require_directory(b);
    constexpr unsigned exchange = 2;   // RENAME_EXCHANGE of linux/fs.h, which older C libraries lack
    if (::syscall(SYS_renameat2, AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), exchange) == 0) return true;
    if (errno == EINVAL || errno == ENOSYS || errno == ENOTSUP) return false;
    throw system_failure(errno, "cannot exchange with " + b, a);
  }

  /// Also takes a file or a link, as such: links are removed, never followed.
  template <class = Deferred>
  void remove_tree(std::string const& path) { remove_entry(FileHandle{AT_FDCWD, {}}, path, path); }

  template <class = Deferred>
  std::unique_ptr<Lease> acquire_lease(std::string const& path) { return detail::acquire_local_lease(path); }
  template <class = Deferred>
  std::string resolve_place(std::string const& path) { return detail::resolve_local_place(path); }

  /// The file system's preferred unit (a page locally, the transfer size of NFS, the stripe of Lustre), between 4 KiB and 1 MiB.
  /// Machines may mount one directory differently: one rank asks and tells the others.
  template <class = Deferred>
  std::uint64_t block_bytes(std::string const& directory) {
    // STATX_DIOALIGN would be exact, but is answered for regular files only, and no alignment it gives exceeds this unit.
    auto const unit = static_cast<std::uint64_t>(FileHandle::open_directory(directory).status().st_blksize);
    return std::clamp(std::bit_ceil(unit), std::uint64_t{4096}, std::uint64_t{1} << 20);
  }

 private:
  Options options_;

  template <class = Deferred>
  static void require_directory(std::string const& path) {
    struct stat status {};
    if (::lstat(path.c_str(), &status) != 0) throw system_failure(errno, "cannot rename the directory", path);
    if (!S_ISDIR(status.st_mode)) throw system_failure(ENOTDIR, "not a directory, so it is not renamed", path);
  }

  // Others may remove the same tree, or still add to it: what is gone is fine, what is new gets another round.
  template <class = Deferred>
  static void remove_entry(FileHandle const& above, std::string const& name, std::string const& path) {
    constexpr int rounds = 100;
    for (int round = 0;; ++round) {
      if (::unlinkat(above.descriptor(), name.c_str(), 0) == 0 || errno == ENOENT) return;
      if (errno != EISDIR && errno != EPERM && errno != ENOTDIR) throw system_failure(errno, "cannot remove", path);
      if (errno == ENOTDIR) return;   // a parent is no directory, so there is nothing here
      int const why = errno;
      FileHandle directory;
      try {
        directory = FileHandle{::openat(above.descriptor(), name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC), path};
        if (!directory.is_open() && errno == ENOTDIR && why == EISDIR && round < rounds) continue;   // another thing by now
        if (!directory.is_open()) throw system_failure(errno == ENOTDIR ? why : errno, "cannot remove", path);
        for (auto const& entry : detail::directory_names(directory)) remove_entry(directory, entry, path + "/" + entry);
      } catch (Error const& error) {
        if (error.code() != ErrorCode::missing_file) throw;
      }
      if (::unlinkat(above.descriptor(), name.c_str(), AT_REMOVEDIR) == 0 || errno == ENOENT) return;
      if ((errno != ENOTEMPTY && errno != EEXIST) || round == rounds) throw system_failure(errno, "cannot remove the directory", path);
    }
  }
};

static_assert(Medium<LocalFs>);

}  // namespace dcp
