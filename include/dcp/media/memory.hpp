// SPDX-License-Identifier: Apache-2.0
#pragma once
// A medium inside one process: directories and files as maps and vectors. It says what every medium does, in the fewest lines.
//
// There is one root "/" that always exists; "a/b" and "/a/b" are the same name. Nothing survives the process, so sync only checks
// its arguments. Errors carry the errno that a file system would give.

#include <dcp/base/bytes.hpp>
#include <dcp/base/error.hpp>
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

/// Models Medium. A handle: copies see the same files, from any thread.
class Memory {
 public:
  static constexpr bool renames_directories = true;
  static constexpr bool shared_by_ranks = false;

  std::unique_ptr<WritableFile> open_write(std::string const& path) {
    std::lock_guard const lock{store_->mutex};
    auto& node = slot(path);
    if (!node) node = std::make_shared<Node>();
    if (node->is_directory) throw failure(EISDIR, path);
    return std::make_unique<Writable>(store_, node, path);
  }

  std::unique_ptr<ReadableFile> open_read(std::string const& path) {
    std::lock_guard const lock{store_->mutex};
    auto const node = existing(path);
    if (node->is_directory) throw failure(EISDIR, path);
    return std::make_unique<Readable>(store_, node, path);
  }

  void rename_file(std::string const& from, std::string const& to) {
    std::lock_guard const lock{store_->mutex};
    auto const node = existing(from);
    if (node->is_directory) throw failure(EISDIR, from);
    auto& target = slot(to);
    if (target && target->is_directory) throw failure(EISDIR, to);
    if (target == node) return;
    target = node;
    erase(from);
  }

  void remove_file(std::string const& path) {
    std::lock_guard const lock{store_->mutex};
    auto const node = find(path);
    if (node && node->is_directory) throw failure(EISDIR, path);
    if (node) erase(path);
  }

  EntryKind kind(std::string const& path) {
    std::lock_guard const lock{store_->mutex};
    auto const node = find(path);
    return node ? kind_of(*node) : EntryKind::missing;
  }

  std::vector<DirectoryEntry> list(std::string const& directory) {
    std::lock_guard const lock{store_->mutex};
    std::vector<DirectoryEntry> entries;
    for (auto const& [name, node] : existing_directory(directory)->entries)
      if (node) entries.push_back({name, kind_of(*node), node->bytes.size()});
    return entries;
  }

  bool create_directory(std::string const& path) {
    std::lock_guard const lock{store_->mutex};
    if (components(path).empty()) return false;
    auto& node = slot(path);
    if (node && !node->is_directory) throw failure(EEXIST, path);
    if (node) return false;
    node = std::make_shared<Node>();
    node->is_directory = true;
    return true;
  }

  void create_directories(std::string const& path) {
    std::string so_far;
    for (auto const& component : components(path)) create_directory(so_far += "/" + component);
  }

  void sync_directory(std::string const& path) {
    std::lock_guard const lock{store_->mutex};
    existing_directory(path);
  }

  bool publish_new(std::string const& from, std::string const& to) {
    std::lock_guard const lock{store_->mutex};
    auto const node = existing_directory(from);
    if (is_inside(to, from)) throw failure(EINVAL, to);
    auto& target = slot(to);
    if (target && (!target->is_directory || !is_empty(*target))) return false;
    target = node;
    erase(from);
    return true;
  }

  bool exchange_directories(std::string const& a, std::string const& b) {
    std::lock_guard const lock{store_->mutex};
    existing_directory(a);
    existing_directory(b);
    if (is_inside(a, b) || is_inside(b, a)) return false;
    std::swap(slot(a), slot(b));
    return true;
  }

  void remove_tree(std::string const& path) {
    std::lock_guard const lock{store_->mutex};
    if (find(path)) erase(path);
  }

  std::unique_ptr<Lease> acquire_lease(std::string const& path) {
    std::lock_guard const lock{store_->mutex};
    auto& node = slot(path);
    if (!node) node = std::make_shared<Node>();
    if (node->is_directory) throw failure(EISDIR, path);
    if (!node->holder.expired()) return nullptr;
    auto held = std::make_unique<Held>(*this, node, path);
    node->holder = held->token;
    return held;
  }

  std::string resolve_place(std::string const& path) {
    auto const last = path.substr(std::min(path.size(), path.find_last_of('/') + 1));
    if (components(path).empty() || last == "." || last == "..")
      throw Error{ErrorCode::invalid_argument, "the place of a checkpoint must be a directory with a name of its own"}.with_path(path);
    std::string place;
    for (auto const& component : components(path)) place += "/" + component;
    return place;
  }

  std::uint64_t block_bytes(std::string const& directory) {
    sync_directory(directory);
    return 4096;
  }

  /// A store of its own with the same directories and files; what is open or leased here is not so there.
  Memory copy() const {
    std::lock_guard const lock{store_->mutex};
    Memory result;
    result.store_->root = deep_copy(*store_->root);
    return result;
  }

 private:
  struct Node {
    bool is_directory = false;
    Bytes bytes;
    std::map<std::string, std::shared_ptr<Node>> entries;   // a null entry is a name that nothing has
    std::weak_ptr<void> holder;                             // of the lease that this file is
  };
  struct Store {
    std::mutex mutex;
    std::shared_ptr<Node> root = std::make_shared<Node>(Node{true, {}, {}, {}});
  };
  std::shared_ptr<Store> store_ = std::make_shared<Store>();

  static Error failure(int system_error, std::string const& path) {
    Error error{system_error == ENOENT ? ErrorCode::missing_file : ErrorCode::io, "the operation is not possible on this path"};
    error.with_path(path).with_errno(system_error);
    return error;
  }

  // Files outlive their names, as on a file system: an open file keeps its node.
  class Writable final : public WritableFile {
   public:
    Writable(std::shared_ptr<Store> store, std::shared_ptr<Node> node, std::string path) : store_{std::move(store)}, node_{std::move(node)}, path_{std::move(path)} {}

    void write_at(std::uint64_t offset, ConstByteSpan bytes) override {
      std::lock_guard const lock{store_->mutex};
      auto& content = open_bytes();
      std::uint64_t end = 0;
      if (!checked_add(offset, bytes.size(), end) || end > content.max_size()) throw failure(EFBIG, path_);
      if (bytes.empty()) return;
      if (content.size() < end) content.resize(static_cast<std::size_t>(end));
      std::copy(bytes.begin(), bytes.end(), content.begin() + static_cast<std::ptrdiff_t>(offset));
    }
    void resize(std::uint64_t size) override {
      std::lock_guard const lock{store_->mutex};
      auto& content = open_bytes();
      if (size > content.max_size()) throw failure(EFBIG, path_);
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
    std::shared_ptr<Store> store_;
    std::shared_ptr<Node> node_;
    std::string path_;

    Bytes& open_bytes() {
      if (!node_) throw failure(EBADF, path_);
      return node_->bytes;
    }
  };

  class Readable final : public ReadableFile {
   public:
    Readable(std::shared_ptr<Store> store, std::shared_ptr<Node> node, std::string path) : store_{std::move(store)}, node_{std::move(node)}, path_{std::move(path)} {}

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
    std::shared_ptr<Store> store_;
    std::shared_ptr<Node> node_;
    std::string path_;
  };

  struct Held final : Lease {
    Held(Memory medium_held, std::shared_ptr<Node> node_held, std::string path_held)
        : medium{std::move(medium_held)}, node{std::move(node_held)}, path{std::move(path_held)} {}
    ~Held() override {
      std::lock_guard const lock{medium.store_->mutex};
      if (medium.find(path) == node) medium.erase(path);
      token.reset();
    }
    void heartbeat() override {}

    Memory medium;
    std::shared_ptr<Node> node;
    std::string path;
    std::shared_ptr<void> token = std::make_shared<int>(0);
  };

  // What follows is called with the lock held.

  static std::vector<std::string> components(std::string const& path) {
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

  static bool is_inside(std::string const& path, std::string const& directory) {
    auto const inner = components(path), outer = components(directory);
    return inner.size() > outer.size() && std::equal(outer.begin(), outer.end(), inner.begin());
  }

  static EntryKind kind_of(Node const& node) { return node.is_directory ? EntryKind::directory : EntryKind::file; }

  static bool is_empty(Node const& node) {
    return std::all_of(node.entries.begin(), node.entries.end(), [](auto const& entry) { return !entry.second; });
  }

  std::shared_ptr<Node> find(std::string const& path) const {
    auto node = store_->root;
    for (auto const& component : components(path)) {
      auto const entry = node->entries.find(component);
      if (entry == node->entries.end() || !entry->second) return nullptr;
      node = entry->second;
    }
    return node;
  }

  /// Where the node of `path` is kept, null if there is none yet; the parent must be a directory.
  std::shared_ptr<Node>& slot(std::string const& path) {
    auto const names = components(path);
    if (names.empty()) throw failure(EBUSY, path);
    auto node = store_->root;
    for (std::size_t i = 0;; ++i) {
      if (!node) throw failure(ENOENT, path);
      if (!node->is_directory) throw failure(ENOTDIR, path);
      auto& next = node->entries[names[i]];
      if (i + 1 == names.size()) return next;
      node = next;
    }
  }

  std::shared_ptr<Node> existing(std::string const& path) {
    auto node = components(path).empty() ? store_->root : slot(path);
    if (!node) throw failure(ENOENT, path);
    return node;
  }

  std::shared_ptr<Node> existing_directory(std::string const& path) {
    auto node = existing(path);
    if (!node->is_directory) throw failure(ENOTDIR, path);
    return node;
  }

  void erase(std::string const& path) { slot(path).reset(); }

  static std::shared_ptr<Node> deep_copy(Node const& node) {
    auto result = std::make_shared<Node>(Node{node.is_directory, node.bytes, {}, {}});
    for (auto const& [name, child] : node.entries)
      if (child) result->entries[name] = deep_copy(*child);
    return result;
  }
};

static_assert(Medium<Memory>);

}  // namespace dcp
