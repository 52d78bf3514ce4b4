// SPDX-License-Identifier: Apache-2.0
#pragma once
// A medium inside one process: directories and files as maps and vectors. It says what every medium does, in the fewest lines.
//
// There is one root "/" that always exists; "a/b" and "/a/b" are the same name. Nothing survives the process, so sync only checks
// its arguments. Errors carry the errno that a file system would give.

#include <dcp/base/config.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/media/medium.hpp>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace dcp {

namespace detail {

template <class = Deferred>
Error memory_failure(int system_error, std::string const& path) {
  Error error{system_error == ENOENT ? ErrorCode::missing_file : ErrorCode::io, "the operation is not possible on this path"};
  error.with_path(path).with_errno(system_error);
  return error;
}

/// The components of a path from the root.
template <class = Deferred>
std::vector<std::string> memory_path(std::string const& path) {
  std::vector<std::string> result;
  for (std::size_t begin = 0; begin < path.size();) {
    auto const end = std::min(path.find('/', begin), path.size());
    auto component = path.substr(begin, end - begin);
    if (component == ".." && !result.empty()) result.pop_back();
    if (!component.empty() && component != "." && component != "..") result.push_back(std::move(component));
    begin = end + 1;
  }
  return result;
}

template <class = Deferred>
bool memory_is_inside(std::string const& path, std::string const& directory) {
  auto const inner = memory_path(path), outer = memory_path(directory);
  return inner.size() > outer.size() && std::equal(outer.begin(), outer.end(), inner.begin());
}

struct MemoryNode {
  bool is_directory = false;
  Bytes bytes;
  std::map<std::string, std::shared_ptr<MemoryNode>> entries;
  std::weak_ptr<void> holder;   // of the lease that this file is

  EntryKind kind() const { return is_directory ? EntryKind::directory : EntryKind::file; }
};
using MemoryNodePtr = std::shared_ptr<MemoryNode>;

/// The tree; every function is called with `mutex` held.
struct MemoryStore {
  Mutex mutex;
  MemoryNodePtr root;

  template <class = Deferred>
  MemoryStore() : root{std::make_shared<MemoryNode>(MemoryNode{true, {}, {}, {}})} {}

  /// The node at `path`, null if there is none.
  template <class = Deferred>
  MemoryNodePtr find(std::string const& path) const {
    auto node = root;
    for (auto const& name : memory_path(path)) {
      auto const entry = node->entries.find(name);
      if (entry == node->entries.end()) return nullptr;
      node = entry->second;
    }
    return node;
  }

  /// The directory that `path` is in, which must be there.
  template <class = Deferred>
  MemoryNodePtr parent(std::string const& path) const {
    auto const names = memory_path(path);
    if (names.empty()) throw memory_failure(EBUSY, path);   // the root is in no directory
    auto node = root;
    for (std::size_t i = 0; i + 1 < names.size(); ++i) {
      auto const entry = node->entries.find(names[i]);
      if (entry == node->entries.end()) throw memory_failure(ENOENT, path);
      node = entry->second;
      if (!node->is_directory) throw memory_failure(ENOTDIR, path);
    }
    return node;
  }

  /// Where the node of `path` is kept: null if there is none yet, and then the caller puts one there.
  template <class = Deferred>
  MemoryNodePtr& slot(std::string const& path) const { return parent(path)->entries[memory_path(path).back()]; }

  template <class = Deferred>
  MemoryNodePtr existing(std::string const& path) const {
    auto node = find(path);
    if (node) return node;
    parent(path);   // says why, if a directory on the way is the reason
    throw memory_failure(ENOENT, path);
  }

  template <class = Deferred>
  MemoryNodePtr existing_directory(std::string const& path) const {
    auto node = existing(path);
    if (!node->is_directory) throw memory_failure(ENOTDIR, path);
    return node;
  }

  template <class = Deferred>
  void erase(std::string const& path) const { parent(path)->entries.erase(memory_path(path).back()); }
};

template <class = Deferred>
MemoryNodePtr copy_of(MemoryNode const& node) {
  auto result = std::make_shared<MemoryNode>(MemoryNode{node.is_directory, node.bytes, {}, {}});
  for (auto const& [name, child] : node.entries) result->entries[name] = copy_of(*child);
  return result;
}

// Files outlive their names, as on a file system: an open file keeps its node.
template <class = Deferred>
class MemoryWritableFile final : public WritableFile {
 public:
  MemoryWritableFile(std::shared_ptr<MemoryStore> store, MemoryNodePtr node, std::string path)
      : store_{std::move(store)}, node_{std::move(node)}, path_{std::move(path)} {}

  void write_at(std::uint64_t offset, ConstByteSpan bytes) override {
    std::lock_guard const lock{store_->mutex};
    auto& content = open_bytes();
    std::uint64_t end = 0;
    if (!checked_add(offset, bytes.size(), end) || end > content.max_size()) throw memory_failure(EFBIG, path_);
    if (bytes.empty()) return;
    if (content.size() < end) content.resize(static_cast<std::size_t>(end));
    std::copy(bytes.begin(), bytes.end(), content.begin() + static_cast<std::ptrdiff_t>(offset));
  }
  void resize(std::uint64_t size) override {
    std::lock_guard const lock{store_->mutex};
    auto& content = open_bytes();
    if (size > content.max_size()) throw memory_failure(EFBIG, path_);
    content.resize(static_cast<std::size_t>(size));
  }
  void sync() override {
    std::lock_guard const lock{store_->mutex};
    open_bytes();
  }
  void close() override {
    std::lock_guard const lock{store_->mutex};
    node_.reset();
  }

 private:
  std::shared_ptr<MemoryStore> store_;
  MemoryNodePtr node_;
  std::string path_;

  Bytes& open_bytes() {
    if (!node_) throw memory_failure(EBADF, path_);
    return node_->bytes;
  }
};

template <class = Deferred>
class MemoryReadableFile final : public ReadableFile {
 public:
  MemoryReadableFile(std::shared_ptr<MemoryStore> store, MemoryNodePtr node, std::string path)
      : store_{std::move(store)}, node_{std::move(node)}, path_{std::move(path)} {}

  std::uint64_t size() const override {
    std::lock_guard const lock{store_->mutex};
    return node_->bytes.size();
  }
  void read_at(std::uint64_t offset, ByteSpan out) override {
    std::lock_guard const lock{store_->mutex};
    auto const& content = node_->bytes;
    if (out.empty()) return;
    if (offset > content.size() || out.size() > content.size() - offset)
      throw Error{ErrorCode::truncated, "the file ends inside the range that is wanted"}.with_path(path_).with_range(offset, offset + out.size());
    std::copy_n(content.begin() + static_cast<std::ptrdiff_t>(offset), out.size(), out.begin());
  }

 private:
  std::shared_ptr<MemoryStore> store_;
  MemoryNodePtr node_;
  std::string path_;
};

template <class = Deferred>
class MemoryLease final : public Lease {
 public:
  /// Called with the lock of the store held.
  MemoryLease(std::shared_ptr<MemoryStore> store, MemoryNodePtr node, std::string path)
      : store_{std::move(store)}, node_{std::move(node)}, path_{std::move(path)} {
    node_->holder = token_;
  }
  ~MemoryLease() override {
    std::lock_guard const lock{store_->mutex};
    if (store_->find(path_) == node_) store_->erase(path_);
    token_.reset();
  }

 private:
  std::shared_ptr<MemoryStore> store_;
  MemoryNodePtr node_;
  std::string path_;
  std::shared_ptr<void> token_ = std::make_shared<int>(0);
};

}  // namespace detail

/// Models Medium. A handle: copies see the same files, from any thread.
class Memory {
 public:
  static constexpr bool renames_directories = true;
  static constexpr bool shared_by_ranks = false;

  template <class = Deferred>
  Memory() : store_{std::make_shared<detail::MemoryStore>()} {}

  template <class D = Deferred>
  std::unique_ptr<WritableFile> open_write(std::string const& path) {
    std::lock_guard const lock{store_->mutex};
    auto& node = store_->slot(path);
    if (!node) node = std::make_shared<detail::MemoryNode>();
    if (node->is_directory) throw detail::memory_failure(EISDIR, path);
    return std::make_unique<detail::MemoryWritableFile<D>>(store_, node, path);
  }

  template <class D = Deferred>
  std::unique_ptr<ReadableFile> open_read(std::string const& path) {
    std::lock_guard const lock{store_->mutex};
    auto const node = store_->existing(path);
    if (node->is_directory) throw detail::memory_failure(EISDIR, path);
    return std::make_unique<detail::MemoryReadableFile<D>>(store_, node, path);
  }

  template <class = Deferred>
  void rename_file(std::string const& from, std::string const& to) {
    std::lock_guard const lock{store_->mutex};
    auto const node = store_->existing(from);
    if (node->is_directory) throw detail::memory_failure(EISDIR, from);
    auto& target = store_->slot(to);
    if (target && target->is_directory) throw detail::memory_failure(EISDIR, to);
    if (target == node) return;
    target = node;
    store_->erase(from);
  }

  template <class = Deferred>
  void remove_file(std::string const& path) {
    std::lock_guard const lock{store_->mutex};
    auto const node = store_->find(path);
    if (node && node->is_directory) throw detail::memory_failure(EISDIR, path);
    if (node) store_->erase(path);
  }

  template <class = Deferred>
  EntryKind kind(std::string const& path) {
    std::lock_guard const lock{store_->mutex};
    auto const node = store_->find(path);
    return node ? node->kind() : EntryKind::missing;
  }

  template <class = Deferred>
  std::vector<DirectoryEntry> list(std::string const& directory) {
    std::lock_guard const lock{store_->mutex};
    std::vector<DirectoryEntry> entries;
    for (auto const& [name, node] : store_->existing_directory(directory)->entries)
      entries.push_back({name, node->kind(), node->bytes.size()});
    return entries;
  }

  template <class = Deferred>
  bool create_directory(std::string const& path) {
    std::lock_guard const lock{store_->mutex};
    if (detail::memory_path(path).empty()) return false;
    auto& node = store_->slot(path);
    if (node && !node->is_directory) throw detail::memory_failure(EEXIST, path);
    if (node) return false;
    node = std::make_shared<detail::MemoryNode>();
    node->is_directory = true;
    return true;
  }

  template <class = Deferred>
  void create_directories(std::string const& path) {
    std::string so_far;
    for (auto const& component : detail::memory_path(path)) create_directory(so_far += "/" + component);
  }

  template <class = Deferred>
  void sync_directory(std::string const& path) {
    std::lock_guard const lock{store_->mutex};
    store_->existing_directory(path);
  }

  template <class = Deferred>
  bool publish_new(std::string const& from, std::string const& to) {
    std::lock_guard const lock{store_->mutex};
    auto const node = store_->existing_directory(from);
    if (detail::memory_is_inside(to, from)) throw detail::memory_failure(EINVAL, to);
    auto& target = store_->slot(to);
    if (target == node) return true;
    if (target && (!target->is_directory || !target->entries.empty())) return false;
    target = node;
    store_->erase(from);
    return true;
  }

  template <class = Deferred>
  bool exchange_directories(std::string const& a, std::string const& b) {
    std::lock_guard const lock{store_->mutex};
    store_->existing_directory(a);
    store_->existing_directory(b);
    if (detail::memory_is_inside(a, b) || detail::memory_is_inside(b, a)) return false;
    std::swap(store_->slot(a), store_->slot(b));
    return true;
  }

  template <class = Deferred>
  void remove_tree(std::string const& path) {
    std::lock_guard const lock{store_->mutex};
    if (store_->find(path)) store_->erase(path);
  }

  template <class D = Deferred>
  std::unique_ptr<Lease> acquire_lease(std::string const& path) {
    std::lock_guard const lock{store_->mutex};
    auto& node = store_->slot(path);
    if (!node) node = std::make_shared<detail::MemoryNode>();
    if (node->is_directory) throw detail::memory_failure(EISDIR, path);
    if (!node->holder.expired()) return nullptr;
    return std::make_unique<detail::MemoryLease<D>>(store_, node, path);
  }

  template <class = Deferred>
  std::string resolve_place(std::string const& path) {
    auto const last = path.substr(std::min(path.size(), path.find_last_of('/') + 1));
    if (detail::memory_path(path).empty() || last == "." || last == "..")
      throw Error{ErrorCode::invalid_argument, "the place of a checkpoint must be a directory with a name of its own"}.with_path(path);
    std::string place;
    for (auto const& component : detail::memory_path(path)) place += "/" + component;
    return place;
  }

  template <class = Deferred>
  std::uint64_t block_bytes(std::string const& directory) {
    sync_directory(directory);
    return 4096;
  }

  /// A store of its own with the same directories and files; what is open or leased here is not so there.
  template <class = Deferred>
  Memory copy() const {
    std::lock_guard const lock{store_->mutex};
    Memory result;
    result.store_->root = detail::copy_of(*store_->root);
    return result;
  }

 private:
  std::shared_ptr<detail::MemoryStore> store_;
};

static_assert(Medium<Memory>);

}  // namespace dcp
