// SPDX-License-Identifier: Apache-2.0
#pragma once
// A disk with its cache, as far as a crash can tell: what a program sees, and what may be left when everything stops.
//
// The model of durability is the weakest that the save protocol may count on (media/medium.hpp, facts 1 to 4):
//   - a file's bytes are safe up to its last sync; later ones may be there, be gone, be zeros, or be mixed by sectors;
//   - the names of a directory are safe up to its last sync; of the later changes to them any number may be there, counted from the
//     oldest. Each directory decides for itself, so a rename from one directory to another may be half there;
//   - one change (a rename, a publish, an exchange) inside one directory is there or not, never in part.

#include <dcp/media/memory.hpp>
#include <dcp/media/medium.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace dcp::test {

/// What happens to bytes and names that were not synced.
struct DropPolicy {
  enum class Files : std::uint8_t { keep, as_synced, zero_filled, mixed };
  enum class Names : std::uint8_t { keep, drop, some };
  Files files = Files::keep;
  Names names = Names::keep;
  std::uint64_t seed = 0;   // of mixed and some

  /// The process is killed: the system still has everything.
  static DropPolicy process_kill() { return {}; }

  std::string text() const {
    constexpr std::array file_names{"keep", "as_synced", "zero_filled", "mixed"};
    constexpr std::array name_names{"keep", "drop", "some"};
    return std::string{"files "} + file_names[static_cast<std::size_t>(files)] + ", names " + name_names[static_cast<std::size_t>(names)] + ", seed " +
           std::to_string(seed);
  }
};

/// The kill of the process, every plain combination of a power loss, and `randoms` random ones.
inline std::vector<DropPolicy> crash_policies(std::uint64_t seed, int randoms) {
  using Files = DropPolicy::Files;
  using Names = DropPolicy::Names;
  std::vector<DropPolicy> policies;
  for (auto const names : {Names::keep, Names::drop})
    for (auto const files : {Files::keep, Files::as_synced, Files::zero_filled}) policies.push_back({files, names, 0});
  for (int i = 0; i < randoms; ++i) policies.push_back({Files::mixed, Names::some, seed + static_cast<std::uint64_t>(i)});
  return policies;
}

namespace recording {

enum class Action : std::uint8_t { open, write, resize, sync, rename, remove, create_directory, remove_directory, sync_directory, publish, exchange };

struct Step {
  Action action;
  std::string path, other = {};
  std::uint64_t file = 0, offset = 0;   // the number of the open file; where, or how large
  Bytes bytes = {};
};

/// A disk with its cache: what is seen, and what would be left.
class Disk {
 public:
  explicit Disk(Memory initial) : nodes_(1) {
    nodes_[0].is_directory = true;
    import(initial, "", 0);
  }

  void apply(Step const& step) {
    switch (step.action) {
      case Action::open: open_[step.file] = open(step.path); break;
      case Action::write: {
        auto& bytes = node_of(step).bytes;
        if (bytes.size() < step.offset + step.bytes.size()) bytes.resize(static_cast<std::size_t>(step.offset) + step.bytes.size());
        std::copy(step.bytes.begin(), step.bytes.end(), bytes.begin() + static_cast<std::ptrdiff_t>(step.offset));
        break;
      }
      case Action::resize: node_of(step).bytes.resize(static_cast<std::size_t>(step.offset)); break;
      case Action::sync: node_of(step).synced = node_of(step).bytes; break;
      case Action::rename:
      case Action::publish: move(step.path, step.other); break;
      case Action::remove:
      case Action::remove_directory: change(parent(step.path), {{last(step.path), std::nullopt}}); break;
      case Action::create_directory: create(step.path, true); break;
      case Action::sync_directory: {
        auto& directory = nodes_[find(step.path)];
        directory.synced_names = directory.names;
        directory.changes.clear();
        break;
      }
      case Action::exchange: {
        auto const a = find(step.path), b = find(step.other), in_a = parent(step.path), in_b = parent(step.other);
        Change first{{last(step.path), b}}, second{{last(step.other), a}};
        if (in_a == in_b) first.insert(first.end(), second.begin(), second.end());
        change(in_a, std::move(first));
        if (in_a != in_b) change(in_b, std::move(second));
        break;
      }
    }
  }

  Memory after_crash(DropPolicy policy) const {
    std::mt19937_64 random{policy.seed};
    Memory result;
    write_out(result, "", 0, policy, random);
    return result;
  }

 private:
  using Index = std::size_t;
  using Names = std::map<std::string, Index>;
  using Change = std::vector<std::pair<std::string, std::optional<Index>>>;   // names that get a node or lose it, at once
  struct Node {
    bool is_directory = false;
    Bytes bytes, synced;
    Names names, synced_names;
    std::vector<Change> changes;   // since the last sync
  };
  std::vector<Node> nodes_;
  std::map<std::uint64_t, Index> open_;

  static std::string last(std::string const& path) { return dcp::detail::memory_path(path).back(); }
  Node& node_of(Step const& step) { return nodes_[open_.at(step.file)]; }

  Index find(std::string const& path) const {
    Index node = 0;
    for (auto const& name : dcp::detail::memory_path(path)) node = nodes_[node].names.at(name);
    return node;
  }
  Index parent(std::string const& path) const {
    auto const names = dcp::detail::memory_path(path);
    Index node = 0;
    for (std::size_t i = 0; i + 1 < names.size(); ++i) node = nodes_[node].names.at(names[i]);
    return node;
  }

  static void apply_change(Names& names, Change const& change) {
    for (auto const& [name, node] : change) {
      if (node) names[name] = *node;
      else names.erase(name);
    }
  }
  void change(Index directory, Change change) {
    apply_change(nodes_[directory].names, change);
    nodes_[directory].changes.push_back(std::move(change));
  }

  Index create(std::string const& path, bool is_directory) {
    nodes_.emplace_back().is_directory = is_directory;
    change(parent(path), {{last(path), nodes_.size() - 1}});
    return nodes_.size() - 1;
  }
  Index open(std::string const& path) {
    auto const& names = nodes_[parent(path)].names;
    auto const entry = names.find(last(path));
    return entry != names.end() ? entry->second : create(path, false);
  }
  void move(std::string const& from, std::string const& to) {
    auto const node = find(from), source = parent(from), target = parent(to);
    if (source == target) {
      change(source, {{last(from), std::nullopt}, {last(to), node}});
    } else {
      change(target, {{last(to), node}});
      change(source, {{last(from), std::nullopt}});
    }
  }

  void import(Memory& memory, std::string const& path, Index into) {
    for (auto const& entry : memory.list(path + "/")) {
      auto const below = path + "/" + entry.name;
      auto const index = nodes_.size();
      nodes_.emplace_back().is_directory = entry.kind == EntryKind::directory;
      nodes_[into].names[entry.name] = nodes_[into].synced_names[entry.name] = index;
      if (entry.kind == EntryKind::directory) {
        import(memory, below, index);
      } else {
        Bytes bytes(static_cast<std::size_t>(entry.size));
        memory.open_read(below)->read_at(0, bytes);
        nodes_[index].bytes = nodes_[index].synced = std::move(bytes);
      }
    }
  }

  static Bytes bytes_left(Node const& file, DropPolicy policy, std::mt19937_64& random) {
    using Files = DropPolicy::Files;
    auto mode = policy.files;
    if (mode == Files::mixed) mode = static_cast<Files>(random() % 4);
    if (mode == Files::keep) return file.bytes;
    auto left = file.synced;
    if (mode == Files::as_synced) return left;
    if (mode == Files::zero_filled || random() % 2 == 0) left.resize(file.bytes.size());
    if (mode == Files::zero_filled) return left;
    constexpr std::size_t sector = 512;   // the unit that disks write whole
    for (std::size_t begin = 0; begin < left.size(); begin += sector)
      if (random() % 2 == 0)
        for (auto i = begin; i < std::min({begin + sector, left.size(), file.bytes.size()}); ++i) left[i] = file.bytes[i];
    return left;
  }

  static Names names_left(Node const& directory, DropPolicy policy, std::mt19937_64& random) {
    if (policy.names == DropPolicy::Names::keep) return directory.names;
    auto left = directory.synced_names;
    auto const kept = policy.names == DropPolicy::Names::drop ? 0 : random() % (directory.changes.size() + 1);
    for (std::size_t i = 0; i < kept; ++i) apply_change(left, directory.changes[i]);
    return left;
  }

  void write_out(Memory& memory, std::string const& path, Index index, DropPolicy policy, std::mt19937_64& random) const {
    for (auto const& [name, below] : names_left(nodes_[index], policy, random)) {
      auto const inner = path + "/" + name;
      if (nodes_[below].is_directory) {
        memory.create_directory(inner);
        write_out(memory, inner, below, policy, random);
      } else {
        memory.open_write(inner)->write_at(0, bytes_left(nodes_[below], policy, random));
      }
    }
  }
};

}  // namespace recording

}  // namespace dcp::test
