// SPDX-License-Identifier: Apache-2.0
#pragma once
// An object store inside one process: keys, whole objects, and nothing else. It remembers every change, in order, so that a test can stop everything
// between two of them, or let one come late.

#include <dcp/media/memory.hpp>
#include <dcp/media/medium.hpp>

#include <cerrno>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace dcp::test {

/// Models Medium. Copies are handles of the same store; thread-safe.
///
/// Example   ObjectMemory store; save(store);
///           for (n = 0; n <= store.changes().size(); ++n) must_load_old_or_new(store.replay(n));
class ObjectMemory {
 public:
  static constexpr bool renames_directories = false;
  static constexpr bool shared_by_ranks = false;

  struct Change {
    std::string key = {};
    std::optional<Bytes> bytes = {};    // nothing: the object goes
    Expected::What what = Expected::What::anything;
    Bytes expected = {};
  };

  ObjectMemory() = default;

  /// A store of its own with the same objects, and no memory of changes; what is leased is not so there.
  ObjectMemory copy() const {
    std::lock_guard const lock{store_->mutex};
    ObjectMemory result;
    result.store_->objects = result.store_->initial = store_->objects;
    return result;
  }
  /// Every change so far, done or refused.
  std::vector<Change> changes() const {
    std::lock_guard const lock{store_->mutex};
    return store_->changes;
  }
  /// The store after the first `count` changes.
  ObjectMemory replay(std::size_t count) const {
    ObjectMemory result;
    {
      std::lock_guard const lock{store_->mutex};
      result.store_->objects = store_->initial;
    }
    auto const all = changes();
    for (std::size_t i = 0; i < count; ++i) result.apply(all.at(i));
    result.store_->initial = result.store_->objects;
    result.store_->changes.clear();
    return result;
  }
  /// As a request that comes late. False if it was refused.
  bool apply(Change const& change) { return store_->apply(change); }
  /// As if nobody had given a sign of life for long.
  void expire_leases() {
    std::lock_guard const lock{store_->mutex};
    store_->holders.clear();
  }
  /// The same directories and files on a medium that renames, as a copy to a disk makes them.
  Memory on_disk() const {
    std::lock_guard const lock{store_->mutex};
    Memory disk;
    for (auto const& [key, object] : store_->objects) {
      disk.create_directories(key.substr(0, key.rfind('/')));
      disk.open_write(key)->write_at(0, object.bytes);
    }
    return disk;
  }

  std::unique_ptr<WritableFile> open_write(std::string const& path) { return std::make_unique<Writing>(store_, path); }
  std::unique_ptr<ReadableFile> open_read(std::string const& path) {
    std::lock_guard const lock{store_->mutex};
    auto const& object = store_->existing(path);
    return std::make_unique<Reading>(store_, path, object.bytes.size(), object.version);
  }
  bool put_file(std::string const& path, ConstByteSpan bytes, Expected expected) {
    return apply({key_of(path), Bytes(bytes.begin(), bytes.end()), expected.what, Bytes(expected.bytes.begin(), expected.bytes.end())});
  }
  void remove_file(std::string const& path) { apply({key_of(path), std::nullopt}); }

  EntryKind kind(std::string const& path) {
    std::lock_guard const lock{store_->mutex};
    auto const key = key_of(path);
    if (store_->objects.contains(key)) return EntryKind::file;
    auto const below = store_->objects.lower_bound(key + '/');
    return key.empty() || (below != store_->objects.end() && below->first.starts_with(key + '/')) ? EntryKind::directory : EntryKind::missing;
  }
  std::vector<DirectoryEntry> list(std::string const& directory) {
    std::lock_guard const lock{store_->mutex};
    std::string const prefix = key_of(directory) + '/';
    std::map<std::string, DirectoryEntry> entries;
    for (auto at = store_->objects.lower_bound(prefix); at != store_->objects.end() && at->first.starts_with(prefix); ++at) {
      std::string const rest = at->first.substr(prefix.size()), name = rest.substr(0, rest.find('/'));
      if (name == rest) entries[name] = {name, EntryKind::file, at->second.bytes.size()};
      else entries.try_emplace(name, DirectoryEntry{name, EntryKind::directory, 0});
    }
    std::vector<DirectoryEntry> result;
    for (auto& [name, entry] : entries) result.push_back(std::move(entry));
    return result;
  }
  bool create_directory(std::string const& path) { return kind(path) != EntryKind::directory; }
  void create_directories(std::string const&) {}
  void sync_directory(std::string const&) {}
  void remove_tree(std::string const& path) {
    for (auto const& entry : list(path)) remove_tree(path + '/' + entry.name);
    if (kind(path) == EntryKind::file) remove_file(path);
  }

  std::unique_ptr<Lease> acquire_lease(std::string const& path) {
    auto const key = key_of(path);
    auto token = std::make_shared<int>(0);
    {
      std::lock_guard const lock{store_->mutex};
      auto& holder = store_->holders[key];
      if (!holder.expired() && store_->objects.contains(key)) return nullptr;
      holder = token;
    }
    put_file(path, as_byte_span("held"), {});
    return std::make_unique<Holding>(store_, key, std::move(token));
  }
  std::string resolve_place(std::string const& path) { return Memory{}.resolve_place(path); }
  std::uint64_t block_bytes(std::string const&) { return 4096; }

 private:
  static std::string key_of(std::string const& path) {
    std::string key;
    for (auto const& component : dcp::detail::memory_path(path)) key += '/' + component;
    return key;
  }
  struct Object {
    Bytes bytes;
    std::uint64_t version = 0;
  };
  struct Store {
    std::mutex mutex;
    std::map<std::string, Object> objects, initial;
    std::map<std::string, std::weak_ptr<int>> holders;
    std::vector<Change> changes;
    std::uint64_t versions = 0;

    bool apply(Change const& change) {
      std::lock_guard const lock{mutex};
      changes.push_back(change);
      auto const at = objects.find(change.key);
      bool const there = at != objects.end();
      if (change.what == Expected::What::nothing && there) return false;
      if (change.what == Expected::What::bytes && (!there || at->second.bytes != change.expected)) return false;
      if (!change.bytes) {
        if (there) objects.erase(at);
        return true;
      }
      auto& object = objects[change.key];
      object.bytes = *change.bytes;
      object.version = ++versions;
      return true;
    }
    Object const& existing(std::string const& path) const {
      auto const at = objects.find(key_of(path));
      if (at == objects.end()) throw dcp::detail::memory_failure(ENOENT, path);
      return at->second;
    }
  };
  std::shared_ptr<Store> store_ = std::make_shared<Store>();

  class Writing final : public WritableFile {
   public:
    Writing(std::shared_ptr<Store> store, std::string path) : store_{std::move(store)}, path_{std::move(path)} {}
    void write_at(std::uint64_t offset, ConstByteSpan bytes) override {
      std::lock_guard const lock{mutex_};
      require_open();
      std::uint64_t end = 0;
      if (!checked_add(offset, bytes.size(), end) || end > bytes_.max_size()) throw dcp::detail::memory_failure(EFBIG, path_);
      if (!bytes.empty() && bytes_.size() < end) bytes_.resize(static_cast<std::size_t>(end));
      std::copy(bytes.begin(), bytes.end(), bytes_.begin() + static_cast<std::ptrdiff_t>(std::min<std::uint64_t>(offset, bytes_.size())));
      put_ = false;
    }
    void resize(std::uint64_t size) override {
      std::lock_guard const lock{mutex_};
      require_open();
      if (size > bytes_.max_size()) throw dcp::detail::memory_failure(EFBIG, path_);
      bytes_.resize(static_cast<std::size_t>(size));
      put_ = false;
    }
    void sync() override {
      std::lock_guard const lock{mutex_};
      require_open();
      put();
    }
    void close() override {
      std::lock_guard const lock{mutex_};
      if (open_) put();
      open_ = false;
    }

   private:
    void require_open() const {
      if (!open_) throw dcp::detail::memory_failure(EBADF, path_);
    }
    void put() {
      if (!std::exchange(put_, true)) store_->apply({key_of(path_), bytes_});
    }
    std::shared_ptr<Store> store_;
    std::string path_;
    std::mutex mutex_;
    Bytes bytes_;
    bool open_ = true, put_ = false;
  };

  // Of the object that was there when it was opened: one that was replaced is not read for it.
  class Reading final : public ReadableFile {
   public:
    Reading(std::shared_ptr<Store> store, std::string path, std::uint64_t size, std::uint64_t version) : store_{std::move(store)}, path_{std::move(path)}, size_{size}, version_{version} {}
    std::uint64_t size() const override { return size_; }
    std::uint64_t version() const override { return version_; }
    void read_at(std::uint64_t offset, ByteSpan out) override {
      if (out.empty()) return;
      std::lock_guard const lock{store_->mutex};
      auto const& object = store_->existing(path_);
      if (object.version != version_) throw dcp::detail::memory_failure(ESTALE, path_);
      if (offset > size_ || out.size() > size_ - offset)
        throw Error{ErrorCode::truncated, "the object ends inside the range that is wanted"}.with_path(path_).with_range(offset, offset + out.size());
      std::copy_n(object.bytes.begin() + static_cast<std::ptrdiff_t>(offset), out.size(), out.begin());
    }

   private:
    std::shared_ptr<Store> store_;
    std::string path_;
    std::uint64_t size_, version_;
  };

  class Holding final : public Lease {
   public:
    Holding(std::shared_ptr<Store> store, std::string key, std::shared_ptr<int> token) : store_{std::move(store)}, key_{std::move(key)}, token_{std::move(token)} {}
    ~Holding() override {
      {
        std::lock_guard const lock{store_->mutex};
        auto const holder = store_->holders.find(key_);
        if (holder == store_->holders.end() || holder->second.lock() != token_) return;
        store_->holders.erase(holder);
      }
      store_->apply({key_, std::nullopt});
    }

   private:
    std::shared_ptr<Store> store_;
    std::string key_;
    std::shared_ptr<int> token_;
  };
};

static_assert(Medium<ObjectMemory>);

}  // namespace dcp::test
