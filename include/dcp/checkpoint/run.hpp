// SPDX-License-Identifier: Apache-2.0
#pragma once
// The checkpoints of one training run, each in a directory of its own below a root, by step.
//
//   root/step-00000100        a checkpoint; which step it is of, and which came later, stands in its commit record and not in its name
//   root/step-00000200.dcp-*  one that is being saved or removed, or the wreck of that
//   root/latest               the name of the newest, for people and scripts. The manager itself does not read it
//   root/dcp.pins             steps that retention leaves alone
//   root/dcp.manager          lease of the manager
//
// Order of a save: data durable, commit record, `latest`, retention. So whatever stops it, the newest checkpoint that was committed is there,
// `latest` never names one that is not, and nothing goes before what replaces it has come.

#include <dcp/base/config.hpp>
#include <dcp/base/text.hpp>
#include <dcp/checkpoint/place.hpp>
#include <dcp/formats/commit_record.hpp>
#include <dcp/formats/json_tree.hpp>
#include <dcp/media/medium.hpp>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp {

enum class Best : std::uint8_t { lowest, highest };

namespace detail {

inline constexpr std::string_view step_prefix = "step-", latest_name = "latest", pins_name = "dcp.pins", manager_lease_name = "dcp.manager";

struct Retention {
  std::int64_t keep_last = 0, keep_every = 0, keep_best = 0;
  Best best = Best::lowest;
};

/// The checkpoints below a root, as one rank sees them.
template <class = Deferred>
class Run {
 public:
  struct Kept {
    std::string place;      // the directory, or the one that it is on its way to
    RecordRun run;
    std::uint64_t sequence;
  };

  Run(std::shared_ptr<AnyMedium> medium, std::string root) : medium_{std::move(medium)}, root_{std::move(root)} {}

  std::string const& root() const { return root_; }
  AnyMedium& medium() const { return *medium_; }

  std::string place_of_step(std::int64_t step) const {
    std::string const digits = std::to_string(step);
    return root_ + '/' + std::string{step_prefix} + std::string(digits.size() < 8 ? 8 - digits.size() : 0, '0') + digits;
  }

  /// Committed checkpoints of this manager, oldest first. One of a crash between commit and rename is among them.
  std::vector<Kept> checkpoints() const {
    std::vector<Kept> found;
    for (auto const& entry : medium_->list(root_)) {
      if (entry.kind != EntryKind::directory || !entry.name.starts_with(step_prefix)) continue;
      std::optional<CommitRecord> record;
      try {
        record = read_record(*medium_, root_ + '/' + entry.name);
      } catch (Error const& error) {
        if (error.code() == ErrorCode::io) throw;
        continue;   // damaged, or of a newer format: no checkpoint that could be loaded, and not ours to remove
      }
      if (!record || !record->committed || record->run.step < 0) continue;
      std::string const place = root_ + '/' + entry.name.substr(0, entry.name.find(attempt_infix));
      auto const same = std::find_if(found.begin(), found.end(), [&](Kept const& kept) { return kept.place == place; });
      bool const aside = place.size() != root_.size() + 1 + entry.name.size();
      if (same == found.end()) found.push_back({place, record->run, record->sequence});
      else if (!aside || record->sequence > same->sequence) *same = {place, record->run, record->sequence};   // names sort the place itself first
    }
    std::stable_sort(found.begin(), found.end(), [](Kept const& a, Kept const& b) { return a.sequence < b.sequence; });
    return found;
  }

  std::vector<std::int64_t> pins() const {
    std::vector<std::int64_t> steps;
    try {
      auto const tree = JsonTree::parse(read_file(*medium_, root_ + '/' + std::string{pins_name}, 16 << 20), "the list of pinned steps");
      for (auto const& item : tree.root().items()) steps.push_back(item.template number<std::int64_t>());
    } catch (Error const& error) {
      if (error.code() != ErrorCode::missing_file && error.code() != ErrorCode::not_found) throw;
    }
    return steps;
  }
  void set_pins(std::vector<std::int64_t> const& steps) const {
    std::string text = "[";
    for (auto const step : steps) text += (text.size() > 1 ? ", " : "") + std::to_string(step);
    text += "]\n";
    write_file_durably(*medium_, root_, std::string{pins_name}, as_byte_span(text));
  }

  /// Once a checkpoint is in its place: points to it, then removes what retention does not keep. Steps removed.
  std::vector<Kept> settle(Retention const& retention) const {
    auto const all = checkpoints();
    if (all.empty()) return {};
    std::string const name = split_path(all.back().place).second + '\n';
    write_file_durably(*medium_, root_, std::string{latest_name}, as_byte_span(name));
    std::vector<Kept> removed;
    if (retention.keep_last <= 0) return removed;
    auto const pinned = pins();
    std::vector<Kept const*> measured;
    for (auto const& one : all)
      if (one.run.measured) measured.push_back(&one);
    std::stable_sort(measured.begin(), measured.end(), [&](Kept const* a, Kept const* b) { return retention.best == Best::lowest ? a->run.metric < b->run.metric : a->run.metric > b->run.metric; });
    measured.resize(std::min(measured.size(), static_cast<std::size_t>(std::max<std::int64_t>(0, retention.keep_best))));
    for (std::size_t i = 0; i < all.size(); ++i) {
      auto const& one = all[i];
      bool const keep = static_cast<std::int64_t>(all.size() - i) <= retention.keep_last || (retention.keep_every > 0 && one.run.step % retention.keep_every == 0) ||
                        std::find(measured.begin(), measured.end(), &one) != measured.end() || std::find(pinned.begin(), pinned.end(), one.run.step) != pinned.end();
      if (keep) continue;
      retire(one.place);
      removed.push_back(one);
    }
    return removed;
  }

  /// Puts right what crashes have left, where nobody holds the lease of it: a committed checkpoint that was not renamed to its place is, and everything else of our
  /// pattern beside a place goes. Whether there was something whose lease somebody holds: a dcp-saver that survived its program.
  bool clean() const {
    bool held = false;
    for (auto const& entry : medium_->list(root_)) {
      auto const infix = entry.name.find(attempt_infix);
      std::uint64_t id = 0;
      if (entry.kind != EntryKind::directory || !entry.name.starts_with(step_prefix) || infix == std::string::npos || !parse_hex16(std::string_view{entry.name}.substr(infix + attempt_infix.size()), id)) continue;
      std::string const path = root_ + '/' + entry.name, place = root_ + '/' + entry.name.substr(0, infix);
      try {
        auto const record = read_record(*medium_, path);
        auto lease = medium_->acquire_lease(path + '/' + std::string{lease_name});
        if (!lease) {
          held = true;
          continue;
        }
        if (!record || !record->committed || look_at(*medium_, place).kind == Occupant::Kind::checkpoint) {
          remove_with_record_first(*medium_, path);
        } else if (medium_->publish_new(path, place)) {
          medium_->sync_directory(root_);
          lease.reset();
          medium_->remove_file(place + '/' + std::string{lease_name});
        }
      } catch (Error const&) {
        // Damaged, or somebody else's turn: no reason to fail.
      }
    }
    return held;
  }

 private:
  // Aside first, so that what a crash leaves of it is known for what it is. A reader keeps the files that it has open, and is told that the rest is gone.
  void retire(std::string const& place) const {
    if (auto const record = read_record(*medium_, place)) {
      std::string const aside = place + std::string{attempt_infix} + record->id;
      if (medium_->publish_new(place, aside)) medium_->sync_directory(root_);
      else remove_with_record_first(*medium_, place);
    }
    for (auto const& sibling : siblings_of(*medium_, place)) remove_with_record_first(*medium_, sibling.path);
  }

  std::shared_ptr<AnyMedium> medium_;
  std::string root_;
};

}  // namespace detail

}  // namespace dcp
