// SPDX-License-Identifier: Apache-2.0
#pragma once
// A medium is a store of bytes under names: what a format is spoken over. `Memory` is the one to read first.
//
// Names are paths with '/'. The save protocol builds on these facts, which a medium must guarantee:
//   1. after WritableFile::sync and close return, the bytes of the file survive a crash, but not yet its name;
//   2. after sync_directory returns, the names in that directory (created, renamed, removed) survive a crash;
//   3. rename_file replaces the target atomically: a reader sees the old file or the new one;
//   4. publish_new and exchange_directories are atomic in the same sense for whole directories.
// A medium whose renames_directories is false (an object store: names and whole objects, nothing else) guarantees these in their stead:
//   5. every directory is there, and is seen when something lies below it; a file has one writer, and appears whole, in place of one that
//      was there, when it is synced or closed; from then on it survives a crash;
//   6. put_file is atomic, and does nothing where something else is than was expected;
//   7. what has been put or removed is so for every later call of anybody, in lists too.

#include <dcp/base/config.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/error.hpp>

#include <cerrno>
#include <chrono>
#include <concepts>
#include <cstdint>
#include <exception>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace dcp {

/// Whether files are written past the page cache, straight from staging memory to the device.
enum class DirectIo : std::uint8_t {
  automatic,   // on local file systems of block devices: there it is faster
  never,
  always,      // wherever the file system takes it
};

enum class EntryKind : std::uint8_t { missing, file, directory, other };

struct DirectoryEntry {
  std::string name;   // one component
  EntryKind kind;
  std::uint64_t size; // of a file, in bytes
};

/// What must be at a name for put_file to put something there.
struct Expected {
  enum class What : std::uint8_t { anything, nothing, bytes } what = What::anything;
  ConstByteSpan bytes = {};

  static Expected nothing() { return {What::nothing, {}}; }
  static Expected these(ConstByteSpan bytes) { return {What::bytes, bytes}; }
};

/// A file being written. Several ranks may have the same file open and write disjoint ranges.
/// Thread-safe: write_at may be called concurrently for disjoint ranges.
class WritableFile {
 public:
  virtual ~WritableFile() = default;
  /// Writes all of `bytes` at `offset`, through interruptions and short writes. A gap before `offset` reads as zeros. Throws Error(io).
  virtual void write_at(std::uint64_t offset, ConstByteSpan bytes) = 0;
  /// Cuts or extends (with zeros) the file to `size` bytes.
  virtual void resize(std::uint64_t size) = 0;
  /// Makes the bytes durable. A failed sync is final: the kernel may have dropped the pages, so it must not be tried again.
  virtual void sync() = 0;
  /// Reports what a close can report. The destructor closes silently.
  virtual void close() = 0;
  /// The system's number of the file, for writes of whole blocks that somebody else does; -1 if it has none.
  virtual int descriptor() const { return -1; }
};

/// Several writes under way at once, for one thread at a time.
class WriteQueue {
 public:
  struct Ended {
    std::size_t id;
    std::exception_ptr failure;
  };
  /// Waits for all that is under way.
  virtual ~WriteQueue() = default;
  /// How many writes may be under way; their ids are below this number.
  virtual std::size_t depth() const = 0;
  /// Begins to write `bytes` at `offset`, all of them. They stay as they are until wait() returns `id`.
  virtual void begin(WritableFile& file, std::uint64_t offset, ConstByteSpan bytes, std::size_t id) = 0;
  /// Waits until one of the writes that were begun has ended.
  virtual Ended wait() = 0;
};

/// A file being read. Thread-safe.
class ReadableFile {
 public:
  virtual ~ReadableFile() = default;
  virtual std::uint64_t size() const = 0;
  /// A number that is another one when the contents have been changed or replaced, as far as the medium can tell; 0 if it cannot.
  virtual std::uint64_t version() const { return 0; }
  /// Fills all of `out` from `offset`. Throws Error(truncated) where the file ends, Error(io) where the system refuses, with ESTALE where an open file does not
  /// outlive its replacement, and it was replaced.
  virtual void read_at(std::uint64_t offset, ByteSpan out) = 0;
  /// Fills `pieces` one after the other with what lies from `offset` on; as read_at, in one operation where the medium can.
  virtual void read_pieces(std::uint64_t offset, std::span<ByteSpan const> pieces) {
    for (ByteSpan const piece : pieces) {
      read_at(offset, piece);
      offset += piece.size();
    }
  }
  /// A hint: most of [begin, end) will be read at once, in several operations.
  virtual void will_read(std::uint64_t begin, std::uint64_t end) { static_cast<void>(begin), static_cast<void>(end); }
};

/// Held while a save is under way; its release (or the death of its holder) tells others that the attempt is abandoned. Release
/// removes the file where it was made; a directory that is published under another name must not contain it any more. A medium on
/// which a sign of life stands for a lease renews it by itself.
class Lease {
 public:
  virtual ~Lease() = default;
};

/// What the checkpoint floor asks of a medium; `MediumModel` below gives it to any type that models the Medium concept.
/// It is called by several threads at once: those of a save in the background, and the program beside it.
class AnyMedium {
 public:
  virtual ~AnyMedium() = default;

  // What this medium can do.
  virtual bool renames_directories() const = 0;    // and files; without that, put_file of the commit record is the commit
  virtual bool shared_by_ranks() const = 0;        // false only for media inside one process
  /// Whether its paths are those of files that another process of this machine can write as LocalFs does. A medium of which that is so has a constant
  /// local_files; others need no such member.
  virtual bool local_files() const = 0;

  // Every call throws Error(missing_file) where a name that it needs is not there, Error(io) with the errno for other refusals.

  // Files. open_write creates the file if it is not there and never truncates it; open files outlive their names.
  virtual std::unique_ptr<WritableFile> open_write(std::string const& path) = 0;
  virtual std::unique_ptr<ReadableFile> open_read(std::string const& path) = 0;   // Error(missing_file) if it is not there
  /// As open_write, for writes of whole blocks of `block` bytes, each of one writer, from memory at multiples of 4 KiB; only one that
  /// ends the file may end inside a block. A medium without a faster way for these needs no such member.
  virtual std::unique_ptr<WritableFile> open_blocks(std::string const& path, std::uint64_t block, DirectIo mode) = 0;
  /// For writes to files of open_blocks; nothing where a thread can have only one under way. Such a medium needs no such member.
  virtual std::unique_ptr<WriteQueue> open_queue(std::size_t depth) = 0;
  virtual void rename_file(std::string const& from, std::string const& to) = 0;   // replaces `to`. Of media that rename directories
  virtual void remove_file(std::string const& path) = 0;                          // no error if it is not there
  /// Puts a whole file there, or, if what is there is not as `expected`, does nothing and returns false. After an Error it may be there, or may yet
  /// come. Of media that do not rename directories.
  virtual bool put_file(std::string const& path, ConstByteSpan bytes, Expected expected) = 0;

  // Directories.
  virtual EntryKind kind(std::string const& path) = 0;
  virtual std::vector<DirectoryEntry> list(std::string const& directory) = 0;     // sorted by name
  virtual bool create_directory(std::string const& path) = 0;                     // false if it was there; parents must be there
  virtual void create_directories(std::string const& path) = 0;                   // with parents, each parent synced
  virtual void sync_directory(std::string const& path) = 0;
  /// Renames directory `from` to `to`; false, and nothing done, if `to` is there and not an empty directory. Of media that can, as the next one.
  virtual bool publish_new(std::string const& from, std::string const& to) = 0;
  /// Exchanges two directories atomically; false, and nothing done, where the medium cannot.
  virtual bool exchange_directories(std::string const& a, std::string const& b) = 0;
  virtual void remove_tree(std::string const& path) = 0;                          // no error if it is not there; links are not followed

  /// A lease on `path` (a file that this call creates), or nullptr if another holder has it and is alive.
  virtual std::unique_ptr<Lease> acquire_lease(std::string const& path) = 0;
  /// How long the lease of a holder that was killed may yet look held. A medium that knows at once needs no such member.
  virtual std::chrono::milliseconds lease_life() const = 0;

  /// The path with links resolved and made absolute; the last component need not exist. Throws Error(invalid_argument) for
  /// places that cannot be replaced as a whole: a root, a mount point, the current directory or a parent of it.
  virtual std::string resolve_place(std::string const& path) = 0;
  /// Blocks of this size are written by one rank only: the unit that the medium reads, changes and writes as a whole. A power of
  /// two; may differ between machines, so that one rank asks and tells the others. Throws Error(missing_file).
  virtual std::uint64_t block_bytes(std::string const& directory) = 0;
};

namespace detail {
/// Whether M says, as a constant, that it is an object store.
template <class M>
constexpr bool medium_puts_files() {
  if constexpr (requires { typename std::bool_constant<M::renames_directories>; }) return !M::renames_directories;
  else return false;
}
template <class M>
concept MediumThatRenames = requires(M& medium, std::string const& path) {
  medium.rename_file(path, path);
  { medium.publish_new(path, path) } -> std::same_as<bool>;
  { medium.exchange_directories(path, path) } -> std::same_as<bool>;
};
template <class M>
concept MediumThatPuts = requires(M& medium, std::string const& path) {
  { medium.put_file(path, ConstByteSpan{}, Expected{}) } -> std::same_as<bool>;
};
}  // namespace detail

/// A type is a Medium when it has the members of AnyMedium (by these names; constants for the capabilities).
template <class M>
concept Medium = (detail::medium_puts_files<M>() ? detail::MediumThatPuts<M> : detail::MediumThatRenames<M>) && requires(M& medium, std::string const& path) {
  { M::renames_directories } -> std::convertible_to<bool>;
  { M::shared_by_ranks } -> std::convertible_to<bool>;
  { medium.open_write(path) } -> std::same_as<std::unique_ptr<WritableFile>>;
  { medium.open_read(path) } -> std::same_as<std::unique_ptr<ReadableFile>>;
  medium.remove_file(path);
  { medium.kind(path) } -> std::same_as<EntryKind>;
  { medium.list(path) } -> std::same_as<std::vector<DirectoryEntry>>;
  { medium.create_directory(path) } -> std::same_as<bool>;
  medium.create_directories(path);
  medium.sync_directory(path);
  medium.remove_tree(path);
  { medium.acquire_lease(path) } -> std::same_as<std::unique_ptr<Lease>>;
  { medium.resolve_place(path) } -> std::same_as<std::string>;
  { medium.block_bytes(path) } -> std::same_as<std::uint64_t>;
};

namespace detail {
/// The number of the first piece of a Medium that `M` lacks, in the order of the sentences below; -1 if it has all.
template <class M>
constexpr int piece_that_medium_lacks() {
  using Path = std::string const&;
  constexpr bool puts = medium_puts_files<M>();
  bool const has[]{
      requires { { M::renames_directories } -> std::convertible_to<bool>; },
      requires { { M::shared_by_ranks } -> std::convertible_to<bool>; },
      requires(M& medium, Path path) { { medium.open_write(path) } -> std::same_as<std::unique_ptr<WritableFile>>; },
      requires(M& medium, Path path) { { medium.open_read(path) } -> std::same_as<std::unique_ptr<ReadableFile>>; },
      puts || requires(M& medium, Path path) { medium.rename_file(path, path); },
      requires(M& medium, Path path) { medium.remove_file(path); },
      requires(M& medium, Path path) { { medium.kind(path) } -> std::same_as<EntryKind>; },
      requires(M& medium, Path path) { { medium.list(path) } -> std::same_as<std::vector<DirectoryEntry>>; },
      requires(M& medium, Path path) { { medium.create_directory(path) } -> std::same_as<bool>; },
      requires(M& medium, Path path) { medium.create_directories(path); },
      requires(M& medium, Path path) { medium.sync_directory(path); },
      puts || requires(M& medium, Path path) { { medium.publish_new(path, path) } -> std::same_as<bool>; },
      puts || requires(M& medium, Path path) { { medium.exchange_directories(path, path) } -> std::same_as<bool>; },
      requires(M& medium, Path path) { medium.remove_tree(path); },
      requires(M& medium, Path path) { { medium.acquire_lease(path) } -> std::same_as<std::unique_ptr<Lease>>; },
      requires(M& medium, Path path) { { medium.resolve_place(path) } -> std::same_as<std::string>; },
      requires(M& medium, Path path) { { medium.block_bytes(path) } -> std::same_as<std::uint64_t>; },
      !puts || MediumThatPuts<M>,
  };
  int piece = 0;
  for (bool const there : has) {
    if (!there) return piece;
    ++piece;
  }
  return -1;
}
template <class M, int Lacks>
struct medium_lacks {
  static_assert(Lacks != 0, "dcp: a Medium needs  static constexpr bool renames_directories  - whether publish_new and exchange_directories can work");
  static_assert(Lacks != 1, "dcp: a Medium needs  static constexpr bool shared_by_ranks  - false for a medium inside one process");
  static_assert(Lacks != 2, "dcp: a Medium needs  std::unique_ptr<dcp::WritableFile> open_write(std::string const& path)  - creates the file, never truncates it");
  static_assert(Lacks != 3, "dcp: a Medium needs  std::unique_ptr<dcp::ReadableFile> open_read(std::string const& path)  - Error(missing_file) if it is not there");
  static_assert(Lacks != 4, "dcp: a Medium needs  void rename_file(std::string const& from, std::string const& to)  - atomically, over a file that is there");
  static_assert(Lacks != 5, "dcp: a Medium needs  void remove_file(std::string const& path)  - no error if it is not there");
  static_assert(Lacks != 6, "dcp: a Medium needs  dcp::EntryKind kind(std::string const& path)  - missing, a file or a directory");
  static_assert(Lacks != 7, "dcp: a Medium needs  std::vector<dcp::DirectoryEntry> list(std::string const& directory)  - sorted by name");
  static_assert(Lacks != 8, "dcp: a Medium needs  bool create_directory(std::string const& path)  - false if it was there");
  static_assert(Lacks != 9, "dcp: a Medium needs  void create_directories(std::string const& path)  - with parents, each parent synced");
  static_assert(Lacks != 10, "dcp: a Medium needs  void sync_directory(std::string const& path)  - the names in it survive a crash");
  static_assert(Lacks != 11, "dcp: a Medium needs  bool publish_new(std::string const& from, std::string const& to)  - renames a directory, false if `to` is there");
  static_assert(Lacks != 12, "dcp: a Medium needs  bool exchange_directories(std::string const& a, std::string const& b)  - atomically, false if it cannot");
  static_assert(Lacks != 13, "dcp: a Medium needs  void remove_tree(std::string const& path)  - no error if it is not there");
  static_assert(Lacks != 14, "dcp: a Medium needs  std::unique_ptr<dcp::Lease> acquire_lease(std::string const& path)  - nullptr if another holder is alive");
  static_assert(Lacks != 15, "dcp: a Medium needs  std::string resolve_place(std::string const& path)  - absolute, links resolved");
  static_assert(Lacks != 16, "dcp: a Medium needs  std::uint64_t block_bytes(std::string const& directory)  - the unit that only one rank may write");
  static_assert(Lacks != 17, "dcp: a Medium that does not rename directories needs  bool put_file(std::string const& path, dcp::ConstByteSpan bytes, dcp::Expected expected)  - atomically, false if something else is there");
};
/// As a base or a local variable: fails to compile, with the sentence of the first piece that `M` lacks.
template <class M>
using a_medium = medium_lacks<M, piece_that_medium_lacks<M>()>;
}  // namespace detail

/// AnyMedium over a Medium, held by value (a medium is a small handle).
template <Medium M>
class MediumModel final : public AnyMedium {
 public:
  explicit MediumModel(M medium) : medium_{std::move(medium)} {}
  bool renames_directories() const override { return M::renames_directories; }
  bool shared_by_ranks() const override { return M::shared_by_ranks; }
  bool local_files() const override {
    if constexpr (requires { M::local_files; }) return M::local_files;
    else return false;
  }
  std::unique_ptr<WritableFile> open_write(std::string const& path) override { return medium_.open_write(path); }
  std::unique_ptr<ReadableFile> open_read(std::string const& path) override { return medium_.open_read(path); }
  std::unique_ptr<WritableFile> open_blocks(std::string const& path, std::uint64_t block, DirectIo mode) override {
    if constexpr (requires { medium_.open_blocks(path, block, mode); }) return medium_.open_blocks(path, block, mode);
    else return medium_.open_write(path);
  }
  std::unique_ptr<WriteQueue> open_queue(std::size_t depth) override {
    if constexpr (requires { medium_.open_queue(depth); }) return medium_.open_queue(depth);
    else return static_cast<void>(depth), nullptr;
  }
  void rename_file(std::string const& from, std::string const& to) override {
    if constexpr (M::renames_directories) medium_.rename_file(from, to);
    else static_cast<void>(to), cannot("rename", from);
  }
  void remove_file(std::string const& path) override { medium_.remove_file(path); }
  bool put_file(std::string const& path, ConstByteSpan bytes, Expected expected) override {
    if constexpr (!M::renames_directories) return medium_.put_file(path, bytes, expected);
    else return static_cast<void>(bytes), static_cast<void>(expected), cannot("put a whole file at", path);
  }
  EntryKind kind(std::string const& path) override { return medium_.kind(path); }
  std::vector<DirectoryEntry> list(std::string const& directory) override { return medium_.list(directory); }
  bool create_directory(std::string const& path) override { return medium_.create_directory(path); }
  void create_directories(std::string const& path) override { medium_.create_directories(path); }
  void sync_directory(std::string const& path) override { medium_.sync_directory(path); }
  bool publish_new(std::string const& from, std::string const& to) override {
    if constexpr (M::renames_directories) return medium_.publish_new(from, to);
    else return static_cast<void>(to), cannot("rename", from);
  }
  bool exchange_directories(std::string const& a, std::string const& b) override {
    if constexpr (M::renames_directories) return medium_.exchange_directories(a, b);
    else return static_cast<void>(b), cannot("rename", a);
  }
  void remove_tree(std::string const& path) override { medium_.remove_tree(path); }
  std::unique_ptr<Lease> acquire_lease(std::string const& path) override { return medium_.acquire_lease(path); }
  std::chrono::milliseconds lease_life() const override {
    if constexpr (requires { medium_.lease_life(); }) return medium_.lease_life();
    else return std::chrono::milliseconds{0};
  }
  std::string resolve_place(std::string const& path) override { return medium_.resolve_place(path); }
  std::uint64_t block_bytes(std::string const& directory) override { return medium_.block_bytes(directory); }

 private:
  template <class = Deferred>
  [[noreturn]] static bool cannot(char const* what, std::string const& path) { throw Error{ErrorCode::unsupported, "this medium cannot " + std::string{what} + " this path"}.with_path(path); }

  M medium_;
};

// Helpers over any medium.

/// The whole of a small file. Throws Error(limit) if it is larger than `most`, before reading it.
template <class = Deferred>
Bytes read_file(AnyMedium& medium, std::string const& path, std::uint64_t most) {
  for (int most_replacements = 1000;; --most_replacements) {   // far more often than anybody commits while it is read
    auto const file = medium.open_read(path);
    auto const size = file->size();
    if (size > most) throw Error{ErrorCode::limit, "a file of " + std::to_string(size) + " bytes, over the limit of " + std::to_string(most)}.with_path(path);
    Bytes bytes(static_cast<std::size_t>(size));
    try {
      file->read_at(0, bytes);
      return bytes;
    } catch (Error const& error) {
      // Another one has come to its name since it was opened.
      if (error.system_error() != ESTALE || most_replacements == 0) throw;
    }
  }
}

/// Writes a small file durably under its final name: temporary name, sync, rename, sync of the directory; or puts it there.
template <class = Deferred>
void write_file_durably(AnyMedium& medium, std::string const& directory, std::string const& name, ConstByteSpan bytes) {
  auto const path = directory + "/" + name, temporary = path + ".tmp";
  if (!medium.renames_directories()) return static_cast<void>(medium.put_file(path, bytes, {}));
  medium.remove_file(temporary);
  auto const file = medium.open_write(temporary);
  file->write_at(0, bytes);
  file->sync();
  file->close();
  medium.rename_file(temporary, path);
  medium.sync_directory(directory);
}

}  // namespace dcp
