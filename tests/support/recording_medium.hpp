// SPDX-License-Identifier: Apache-2.0
#pragma once
// A medium that remembers what was asked of it, and tells what a disk may hold if everything stopped at any point of that.
// What may be lost is modelled in crash_disk.hpp.

#include "crash_disk.hpp"

#include <dcp/media/memory.hpp>
#include <dcp/media/medium.hpp>

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace dcp::test {

namespace recording {

/// What all handles of one recording share.
struct Tape {
  explicit Tape(Memory start) : initial{start.copy()}, live{start.copy()} {}
  std::mutex mutex;
  Memory initial, live;
  std::vector<Step> steps;
  std::uint64_t files = 0;
};

class RecordedFile final : public WritableFile {
 public:
  RecordedFile(std::shared_ptr<Tape> tape, std::unique_ptr<WritableFile> inner, std::string path, std::uint64_t number)
      : tape_{std::move(tape)}, inner_{std::move(inner)}, path_{std::move(path)}, number_{number} {}

  void write_at(std::uint64_t offset, ConstByteSpan bytes) override {
    std::lock_guard const lock{tape_->mutex};
    inner_->write_at(offset, bytes);
    if (!bytes.empty()) tape_->steps.push_back({Action::write, path_, {}, number_, offset, Bytes(bytes.begin(), bytes.end())});
  }
  void resize(std::uint64_t size) override {
    std::lock_guard const lock{tape_->mutex};
    inner_->resize(size);
    tape_->steps.push_back({Action::resize, path_, {}, number_, size, {}});
  }
  void sync() override {
    std::lock_guard const lock{tape_->mutex};
    inner_->sync();
    tape_->steps.push_back({Action::sync, path_, {}, number_, 0, {}});
  }
  void close() override { inner_->close(); }

 private:
  std::shared_ptr<Tape> tape_;
  std::unique_ptr<WritableFile> inner_;
  std::string path_;
  std::uint64_t number_;
};

class RecordedLease final : public Lease {
 public:
  RecordedLease(std::shared_ptr<Tape> tape, std::unique_ptr<Lease> inner, std::string path)
      : tape_{std::move(tape)}, inner_{std::move(inner)}, path_{std::move(path)} {}
  ~RecordedLease() override {
    std::lock_guard const lock{tape_->mutex};
    bool const there = tape_->live.kind(path_) == EntryKind::file;
    inner_.reset();
    if (there && tape_->live.kind(path_) == EntryKind::missing) tape_->steps.push_back({Action::remove, path_});
  }

 private:
  std::shared_ptr<Tape> tape_;
  std::unique_ptr<Lease> inner_;
  std::string path_;
};

}  // namespace recording

/// Models Medium, over a Memory. Copies record on one tape; calls of many threads are ordered.
///
/// Example   RecordingMedium medium{old}; save(medium);
///           for (n = 0; n <= medium.length(); ++n) for (auto policy : crash_policies(seed, 5)) must_load_old_or_new(medium.replay(n, policy));
class RecordingMedium {
 public:
  static constexpr bool renames_directories = true;
  static constexpr bool shared_by_ranks = false;

  /// Starts from a copy of `initial`, all of it durable.
  explicit RecordingMedium(Memory initial = {}) : tape_{std::make_shared<recording::Tape>(std::move(initial))} {}

  /// The steps recorded so far: every successful call that changes or syncs something; remove_tree and create_directories are many.
  std::size_t length() const {
    std::lock_guard const lock{tape_->mutex};
    return tape_->steps.size();
  }

  std::string describe(std::size_t step) const {
    constexpr std::array names{"open", "write", "resize", "sync", "rename", "remove", "create_directory", "remove_directory", "sync_directory", "publish",
                               "exchange"};
    std::lock_guard const lock{tape_->mutex};
    auto const& s = tape_->steps.at(step);
    std::string text = std::string{names[static_cast<std::size_t>(s.action)]} + " " + s.path;
    if (!s.other.empty()) text += " -> " + s.other;
    if (s.action == recording::Action::write) text += " [" + std::to_string(s.offset) + ", " + std::to_string(s.offset + s.bytes.size()) + ")";
    return text;
  }

  /// A disk on which the first `prefix_length` steps were done and then everything stopped.
  Memory replay(std::size_t prefix_length, DropPolicy policy) const {
    std::lock_guard const lock{tape_->mutex};
    recording::Disk disk{tape_->initial};
    for (std::size_t i = 0; i < prefix_length; ++i) disk.apply(tape_->steps.at(i));
    return disk.after_crash(policy);
  }

  /// Calls check(disk, prefix_length, policy) for each prefix and policy; cheaper than as many replays.
  template <class Check>
  void for_each_crash(std::vector<DropPolicy> const& policies, Check check) const {
    auto const [initial, steps] = [&] {
      std::lock_guard const lock{tape_->mutex};
      return std::pair{tape_->initial, tape_->steps};
    }();
    recording::Disk disk{initial};
    for (std::size_t prefix = 0;; ++prefix) {
      for (auto const& policy : policies) check(disk.after_crash(policy), prefix, policy);
      if (prefix == steps.size()) return;
      disk.apply(steps[prefix]);
    }
  }

  /// What the running program sees.
  Memory memory() const { return tape_->live; }

  std::unique_ptr<WritableFile> open_write(std::string const& path) {
    std::lock_guard const lock{tape_->mutex};
    auto file = tape_->live.open_write(path);
    auto const number = tape_->files++;
    record({recording::Action::open, path, {}, number});
    return std::make_unique<recording::RecordedFile>(tape_, std::move(file), path, number);
  }
  std::unique_ptr<ReadableFile> open_read(std::string const& path) { return tape_->live.open_read(path); }

  void rename_file(std::string const& from, std::string const& to) {
    std::lock_guard const lock{tape_->mutex};
    tape_->live.rename_file(from, to);
    if (dcp::detail::memory_path(from) != dcp::detail::memory_path(to)) record({recording::Action::rename, from, to});
  }
  void remove_file(std::string const& path) {
    std::lock_guard const lock{tape_->mutex};
    remove_recorded(path);
  }

  EntryKind kind(std::string const& path) { return tape_->live.kind(path); }
  std::vector<DirectoryEntry> list(std::string const& directory) { return tape_->live.list(directory); }

  bool create_directory(std::string const& path) {
    std::lock_guard const lock{tape_->mutex};
    return create_recorded(path);
  }
  void create_directories(std::string const& path) {
    std::lock_guard const lock{tape_->mutex};
    std::string so_far;
    for (auto const& name : dcp::detail::memory_path(path)) {
      auto const parent = so_far.empty() ? "/" : so_far;
      so_far += "/" + name;
      if (create_recorded(so_far)) record({recording::Action::sync_directory, parent});
    }
  }
  void sync_directory(std::string const& path) {
    std::lock_guard const lock{tape_->mutex};
    tape_->live.sync_directory(path);
    record({recording::Action::sync_directory, path});
  }

  bool publish_new(std::string const& from, std::string const& to) {
    std::lock_guard const lock{tape_->mutex};
    if (!tape_->live.publish_new(from, to)) return false;
    if (dcp::detail::memory_path(from) != dcp::detail::memory_path(to)) record({recording::Action::publish, from, to});
    return true;
  }
  bool exchange_directories(std::string const& a, std::string const& b) {
    std::lock_guard const lock{tape_->mutex};
    if (!tape_->live.exchange_directories(a, b)) return false;
    if (dcp::detail::memory_path(a) != dcp::detail::memory_path(b)) record({recording::Action::exchange, a, b});
    return true;
  }
  void remove_tree(std::string const& path) {
    std::lock_guard const lock{tape_->mutex};
    remove_tree_recorded(path);
  }

  std::unique_ptr<Lease> acquire_lease(std::string const& path) {
    std::lock_guard const lock{tape_->mutex};
    auto lease = tape_->live.acquire_lease(path);
    if (!lease) return nullptr;
    record({recording::Action::open, path, {}, tape_->files++});
    return std::make_unique<recording::RecordedLease>(tape_, std::move(lease), path);
  }

  std::string resolve_place(std::string const& path) { return tape_->live.resolve_place(path); }
  std::uint64_t block_bytes(std::string const& directory) { return tape_->live.block_bytes(directory); }

 private:
  std::shared_ptr<recording::Tape> tape_;

  // Called with the lock held.
  void record(recording::Step step) { tape_->steps.push_back(std::move(step)); }
  bool create_recorded(std::string const& path) {
    if (!tape_->live.create_directory(path)) return false;
    record({recording::Action::create_directory, path});
    return true;
  }
  void remove_recorded(std::string const& path) {
    bool const there = tape_->live.kind(path) == EntryKind::file;
    tape_->live.remove_file(path);
    if (there) record({recording::Action::remove, path});
  }
  void remove_tree_recorded(std::string const& path) {
    auto const kind = tape_->live.kind(path);
    if (kind == EntryKind::file) remove_recorded(path);
    if (kind != EntryKind::directory) return;
    for (auto const& entry : tape_->live.list(path)) remove_tree_recorded(path + "/" + entry.name);
    tape_->live.remove_tree(path);
    record({recording::Action::remove_directory, path});
  }
};

static_assert(Medium<RecordingMedium>);

}  // namespace dcp::test
