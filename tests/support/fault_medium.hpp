// SPDX-License-Identifier: Apache-2.0
#pragma once
// A medium that fails on demand: any call, on any path, at any count.

#include <dcp/media/medium.hpp>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace dcp::test {

enum class Call : std::uint8_t {
  open_write, write, resize, sync, close, open_read, read, rename_file, remove_file, put_file, kind, list, create_directory, create_directories,
  sync_directory, publish_new, exchange_directories, remove_tree, acquire_lease, resolve_place, block_bytes
};

inline std::string to_string(Call call) {
  constexpr std::array names{"open_write", "write", "resize", "sync", "close", "open_read", "read", "rename_file", "remove_file", "put_file", "kind", "list",
                             "create_directory", "create_directories", "sync_directory", "publish_new", "exchange_directories", "remove_tree",
                             "acquire_lease", "resolve_place", "block_bytes"};
  static_assert(names.size() == static_cast<std::size_t>(Call::block_bytes) + 1);
  return names[static_cast<std::size_t>(call)];
}

/// What goes wrong, and when. Rules are tried in the order they were added; each counts the calls that match it, and the first one
/// whose count is in [nth, nth + times) acts.
///
/// Example   medium.add({.call = Call::sync, .path = "model-00002", .system_error = EIO});      // the first sync of that file fails
///           medium.add({.call = Call::write, .nth = 3, .times = forever, .system_error = ENOSPC, .bytes = 100});
///           medium.add({.call = Call::publish_new, .hook = [](Call, std::string const&) { ::raise(SIGKILL); }});
struct FaultRule {
  std::optional<Call> call = {};             // any call if not set
  std::string path = {};                     // part of the path; of a call with two paths, of either
  std::uint64_t nth = 1;                     // counted from 1
  std::uint64_t times = 1;
  int system_error = 0;                      // thrown as a medium throws it; 0: nothing is thrown
  bool after = false;                        // the call is done and then fails, as when the answer of a server is lost
  std::optional<std::size_t> bytes = {};     // of a read or write only this many are moved. Without an error, a write then keeps silent
                                             // and a read is truncated
  std::chrono::milliseconds delay{0};        // before the call
  std::string vanish = {};                   // a tree that disappears before the call
  std::function<void(Call, std::string const&)> hook = {};   // called before all of this
};

inline constexpr std::uint64_t forever = std::numeric_limits<std::uint64_t>::max();

namespace faults {

struct Verdict {
  int system_error = 0;
  bool after = false;
  std::optional<std::size_t> bytes;
};

class Rules {
 public:
  std::function<void(std::string const&)> remove_tree;   // on the medium behind

  Verdict before(Call call, std::string const& path, std::string const& other = {}) {
    std::optional<FaultRule> hit;
    {
      std::lock_guard const lock{mutex_};
      ++calls_;
      ++counts_[static_cast<std::size_t>(call)];
      for (auto& [rule, count] : rules_) {
        bool const matches = (!rule.call || *rule.call == call) && (path.find(rule.path) != std::string::npos || other.find(rule.path) != std::string::npos);
        if (!matches) continue;
        ++count;
        if (!hit && count >= rule.nth && count - rule.nth < rule.times) hit = rule;
      }
      if (hit) ++hits_;
    }
    // Not under the lock: a hook may wait for another thread, and a delay delays one caller.
    if (!hit) return {};
    if (hit->hook) hit->hook(call, path);
    std::this_thread::sleep_for(hit->delay);
    if (!hit->vanish.empty()) remove_tree(hit->vanish);
    return {hit->system_error, hit->after, hit->bytes};
  }

  template <class Action>
  auto run(Call call, std::string const& path, Action action, std::string const& other = {}) -> decltype(action()) {
    auto const verdict = before(call, path, other);
    if (verdict.after && verdict.system_error != 0) static_cast<void>(action());
    if (verdict.system_error != 0) throw failure(verdict.system_error, call, path);
    return action();
  }

  static Error failure(int system_error, Call call, std::string const& path) {
    Error error{system_error == ENOENT ? ErrorCode::missing_file : ErrorCode::io, "injected failure of " + to_string(call)};
    error.with_path(path).with_errno(system_error);
    return error;
  }

  void add(FaultRule rule) {
    std::lock_guard const lock{mutex_};
    rules_.emplace_back(std::move(rule), 0);
  }
  void clear() {
    std::lock_guard const lock{mutex_};
    rules_.clear();
    calls_ = hits_ = 0;
    counts_ = {};
  }
  std::uint64_t calls() const { return locked(calls_); }
  std::uint64_t hits() const { return locked(hits_); }
  std::uint64_t calls(Call call) const { return locked(counts_[static_cast<std::size_t>(call)]); }

 private:
  mutable std::mutex mutex_;
  std::vector<std::pair<FaultRule, std::uint64_t>> rules_;
  std::uint64_t calls_ = 0, hits_ = 0;
  std::array<std::uint64_t, static_cast<std::size_t>(Call::block_bytes) + 1> counts_{};

  std::uint64_t locked(std::uint64_t const& number) const {
    std::lock_guard const lock{mutex_};
    return number;
  }
};

class FaultyWritableFile final : public WritableFile {
 public:
  FaultyWritableFile(std::shared_ptr<Rules> rules, std::unique_ptr<WritableFile> inner, std::string path)
      : rules_{std::move(rules)}, inner_{std::move(inner)}, path_{std::move(path)} {}

  void write_at(std::uint64_t offset, ConstByteSpan bytes) override {
    auto const verdict = rules_->before(Call::write, path_);
    auto const moved = verdict.bytes ? std::min(*verdict.bytes, bytes.size()) : verdict.system_error != 0 && !verdict.after ? 0 : bytes.size();
    if (moved > 0) inner_->write_at(offset, bytes.first(moved));
    if (verdict.system_error != 0) throw Rules::failure(verdict.system_error, Call::write, path_).with_range(offset, offset + bytes.size());
  }
  void resize(std::uint64_t size) override {
    rules_->run(Call::resize, path_, [&] { inner_->resize(size); });
  }
  void sync() override {
    rules_->run(Call::sync, path_, [&] { inner_->sync(); });
  }
  void close() override {
    rules_->run(Call::close, path_, [&] { inner_->close(); });
  }

  WritableFile& inner() { return *inner_; }
  std::string const& path() const { return path_; }

 private:
  std::shared_ptr<Rules> rules_;
  std::unique_ptr<WritableFile> inner_;
  std::string path_;
};

/// A write is one call of Call::write, counted where it begins; what goes wrong with it is told where it ends.
class FaultyQueue final : public WriteQueue {
 public:
  FaultyQueue(std::shared_ptr<Rules> rules, std::unique_ptr<WriteQueue> inner) : rules_{std::move(rules)}, inner_{std::move(inner)}, failures_(inner_->depth()) {}

  std::size_t depth() const override { return inner_->depth(); }
  void begin(WritableFile& file, std::uint64_t offset, ConstByteSpan bytes, std::size_t id) override {
    auto& faulty = dynamic_cast<FaultyWritableFile&>(file);
    auto const verdict = rules_->before(Call::write, faulty.path());
    auto const moved = verdict.bytes ? std::min(*verdict.bytes, bytes.size()) : verdict.system_error != 0 && !verdict.after ? 0 : bytes.size();
    failures_[id] = nullptr;
    if (verdict.system_error != 0) failures_[id] = std::make_exception_ptr(Rules::failure(verdict.system_error, Call::write, faulty.path()));
    inner_->begin(faulty.inner(), offset, bytes.first(moved), id);
  }
  Ended wait() override {
    auto ended = inner_->wait();
    if (!ended.failure) ended.failure = failures_[ended.id];
    return ended;
  }

 private:
  std::shared_ptr<Rules> rules_;
  std::unique_ptr<WriteQueue> inner_;
  std::vector<std::exception_ptr> failures_;   // injected, by id
};

class FaultyReadableFile final : public ReadableFile {
 public:
  FaultyReadableFile(std::shared_ptr<Rules> rules, std::unique_ptr<ReadableFile> inner, std::string path)
      : rules_{std::move(rules)}, inner_{std::move(inner)}, path_{std::move(path)} {}

  std::uint64_t size() const override { return inner_->size(); }
  std::uint64_t version() const override { return inner_->version(); }
  void read_at(std::uint64_t offset, ByteSpan out) override {
    auto const verdict = rules_->before(Call::read, path_);
    auto const moved = verdict.bytes ? std::min(*verdict.bytes, out.size()) : verdict.system_error != 0 && !verdict.after ? 0 : out.size();
    if (moved > 0 || out.empty()) inner_->read_at(offset, out.first(moved));
    if (verdict.system_error != 0) throw Rules::failure(verdict.system_error, Call::read, path_).with_range(offset, offset + out.size());
    if (moved < out.size()) throw Error{ErrorCode::truncated, "injected end of the file"}.with_path(path_).with_range(offset, offset + out.size());
  }

 private:
  std::shared_ptr<Rules> rules_;
  std::unique_ptr<ReadableFile> inner_;
  std::string path_;
};

}  // namespace faults

/// Models Medium over any Medium. Copies share their rules and counts; thread-safe.
template <Medium M>
class FaultMedium {
 public:
  static constexpr bool renames_directories = M::renames_directories;
  static constexpr bool shared_by_ranks = M::shared_by_ranks;

  explicit FaultMedium(M inner) : inner_{std::move(inner)} {
    rules_->remove_tree = [behind = inner_](std::string const& path) mutable { behind.remove_tree(path); };
  }

  void add(FaultRule rule) { rules_->add(std::move(rule)); }
  /// Drops the rules and starts all counts anew.
  void clear() { rules_->clear(); }
  std::uint64_t calls() const { return rules_->calls(); }                 // all of them: fail the k-th for every k up to here
  std::uint64_t calls(Call call) const { return rules_->calls(call); }
  std::uint64_t hits() const { return rules_->hits(); }                   // calls on which a rule acted
  M& inner() { return inner_; }

  std::unique_ptr<WritableFile> open_write(std::string const& path) {
    return rules_->run(Call::open_write, path, [&] { return std::make_unique<faults::FaultyWritableFile>(rules_, inner_.open_write(path), path); });
  }
  std::unique_ptr<WritableFile> open_blocks(std::string const& path, std::uint64_t block, DirectIo mode) {
    return rules_->run(Call::open_write, path, [&] {
      MediumModel<M> inner{inner_};
      return std::make_unique<faults::FaultyWritableFile>(rules_, inner.open_blocks(path, block, mode), path);
    });
  }
  std::unique_ptr<WriteQueue> open_queue(std::size_t depth) {
    auto queue = MediumModel<M>{inner_}.open_queue(depth);
    return queue ? std::make_unique<faults::FaultyQueue>(rules_, std::move(queue)) : nullptr;
  }
  std::unique_ptr<ReadableFile> open_read(std::string const& path) {
    return rules_->run(Call::open_read, path, [&] { return std::make_unique<faults::FaultyReadableFile>(rules_, inner_.open_read(path), path); });
  }
  void rename_file(std::string const& from, std::string const& to) {
    rules_->run(Call::rename_file, from, [&] { inner_.rename_file(from, to); }, to);
  }
  void remove_file(std::string const& path) {
    rules_->run(Call::remove_file, path, [&] { inner_.remove_file(path); });
  }
  bool put_file(std::string const& path, ConstByteSpan bytes, Expected expected) {
    return rules_->run(Call::put_file, path, [&] { return inner_.put_file(path, bytes, expected); });
  }
  EntryKind kind(std::string const& path) {
    return rules_->run(Call::kind, path, [&] { return inner_.kind(path); });
  }
  std::vector<DirectoryEntry> list(std::string const& directory) {
    return rules_->run(Call::list, directory, [&] { return inner_.list(directory); });
  }
  bool create_directory(std::string const& path) {
    return rules_->run(Call::create_directory, path, [&] { return inner_.create_directory(path); });
  }
  void create_directories(std::string const& path) {
    rules_->run(Call::create_directories, path, [&] { inner_.create_directories(path); });
  }
  void sync_directory(std::string const& path) {
    rules_->run(Call::sync_directory, path, [&] { inner_.sync_directory(path); });
  }
  bool publish_new(std::string const& from, std::string const& to) {
    return rules_->run(Call::publish_new, from, [&] { return inner_.publish_new(from, to); }, to);
  }
  bool exchange_directories(std::string const& a, std::string const& b) {
    return rules_->run(Call::exchange_directories, a, [&] { return inner_.exchange_directories(a, b); }, b);
  }
  void remove_tree(std::string const& path) {
    rules_->run(Call::remove_tree, path, [&] { inner_.remove_tree(path); });
  }
  std::unique_ptr<Lease> acquire_lease(std::string const& path) {
    return rules_->run(Call::acquire_lease, path, [&] { return inner_.acquire_lease(path); });
  }
  std::chrono::milliseconds lease_life() const { return MediumModel<M>{inner_}.lease_life(); }
  std::string resolve_place(std::string const& path) {
    return rules_->run(Call::resolve_place, path, [&] { return inner_.resolve_place(path); });
  }
  std::uint64_t block_bytes(std::string const& directory) {
    return rules_->run(Call::block_bytes, directory, [&] { return inner_.block_bytes(directory); });
  }

 private:
  M inner_;
  std::shared_ptr<faults::Rules> rules_ = std::make_shared<faults::Rules>();
};

}  // namespace dcp::test
