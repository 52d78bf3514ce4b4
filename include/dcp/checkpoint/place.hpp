// SPDX-License-Identifier: Apache-2.0
#pragma once
// A place as one rank sees it: the checkpoint there, attempts beside it, and how an attempt becomes the checkpoint.
//
// Beside a place "ckpt" lie directories "ckpt.dcp-<id>". While a save runs, one of them is its attempt, with a record that says
// "open". When the record says "committed", the attempt is renamed to the place, or exchanged with the old checkpoint there. So:
//   1. what the place names is always a complete checkpoint (or nothing, or not ours);
//   2. if the place is missing, the newest committed sibling is the checkpoint: a crash came between "old aside" and "new in";
//   3. an open sibling whose lease nobody holds is the wreck of a killed save, and the next save removes it.

#include <dcp/base/config.hpp>
#include <dcp/base/text.hpp>
#include <dcp/formats/commit_record.hpp>
#include <dcp/media/medium.hpp>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <unistd.h>

namespace dcp::detail {

inline constexpr std::string_view attempt_infix = ".dcp-";

template <class = Deferred>
std::pair<std::string, std::string> split_path(std::string const& path) {
  auto const slash = path.rfind('/');
  if (slash == std::string::npos) return {".", path};
  return {slash == 0 ? "/" : path.substr(0, slash), path.substr(slash + 1)};
}

template <class = Deferred>
std::string random_id() {
  std::uint64_t id = 0;
  if (::getentropy(&id, sizeof id) != 0) throw Error{ErrorCode::io, "the system gives no random number for the name of an attempt"}.with_errno(errno);
  return hex16(id);
}

/// The record of the checkpoint or attempt in `directory`; nothing if it has none. Throws what is wrong with one that is there.
template <class = Deferred>
std::optional<CommitRecord> read_record(AnyMedium& medium, std::string const& directory, bool with_values = false) {
  std::string const path = directory + '/' + std::string{record_name};
  try {
    Bytes const bytes = read_file(medium, path, most_record_bytes);
    Bytes large;
    if (with_values) {
      CommitRecord const files = parse_record(bytes, {}, false);
      for (auto const& file : files.files)
        if (file.path == values_name) {
          large = read_file(medium, directory + '/' + file.path, most_record_bytes);
          if (large.size() != file.size || crc64(large) != file.crc) throw Error{ErrorCode::corrupt, "the file of large values does not have the size and checksum of the commit record"}.with_path(directory + '/' + file.path);
        }
    }
    return parse_record(bytes, large, with_values);
  } catch (Error& error) {
    if (error.code() == ErrorCode::missing_file || error.code() == ErrorCode::not_found) return std::nullopt;
    throw error.with_path(path);
  }
}

/// Deletes a checkpoint or attempt with all that is in it. Its record goes first: what a crash leaves of the rest is no checkpoint.
template <class = Deferred>
void remove_with_record_first(AnyMedium& medium, std::string const& directory) {
  medium.remove_file(directory + '/' + std::string{record_name});
  medium.sync_directory(directory);
  medium.remove_tree(directory);
  medium.sync_directory(split_path(directory).first);
}

struct Sibling {
  std::string path;
  std::string id;
  std::optional<CommitRecord> record;   // nothing if there is none, or none that can be read
  std::optional<Error> failure;         // why one that is there cannot be read
};

/// Attempts beside a place, newest sequence first.
template <class = Deferred>
std::vector<Sibling> siblings_of(AnyMedium& medium, std::string const& place) {
  auto const [parent, name] = split_path(place);
  std::vector<Sibling> siblings;
  if (medium.kind(parent) != EntryKind::directory) return siblings;
  std::string const prefix = name + std::string{attempt_infix};
  for (auto const& entry : medium.list(parent)) {
    std::uint64_t id = 0;
    if (entry.kind != EntryKind::directory || !entry.name.starts_with(prefix) || !parse_hex16(std::string_view{entry.name}.substr(prefix.size()), id)) continue;
    Sibling sibling{(parent == "/" ? "" : parent) + '/' + entry.name, entry.name.substr(prefix.size()), std::nullopt, std::nullopt};
    try {
      sibling.record = read_record(medium, sibling.path);
    } catch (Error const& error) {
      sibling.failure = error;
    }
    siblings.push_back(std::move(sibling));
  }
  std::stable_sort(siblings.begin(), siblings.end(), [](Sibling const& a, Sibling const& b) { return (a.record ? a.record->sequence : 0) > (b.record ? b.record->sequence : 0); });
  return siblings;
}
template <class = Deferred>
Sibling const* newest_committed(std::vector<Sibling> const& siblings) {
  for (auto const& sibling : siblings)
    if (sibling.record && sibling.record->committed) return &sibling;
  return nullptr;
}

/// What is at a place.
struct Occupant {
  enum class Kind { nothing, checkpoint, foreign } kind = Kind::nothing;
  std::optional<CommitRecord> record;   // of a checkpoint
};
template <class = Deferred>
Occupant look_at(AnyMedium& medium, std::string const& place) {
  switch (medium.kind(place)) {
    case EntryKind::missing: return {};
    case EntryKind::directory: break;
    default: return {Occupant::Kind::foreign, std::nullopt};
  }
  std::optional<CommitRecord> record;
  try {
    record = read_record(medium, place);
  } catch (Error const& error) {
    if (error.code() == ErrorCode::io) throw;
    return {Occupant::Kind::foreign, std::nullopt};   // damaged, or of a newer format: not ours to judge
  }
  if (record && record->committed) return {Occupant::Kind::checkpoint, std::move(record)};
  if (!record && medium.list(place).empty()) return {};   // an empty directory is a place for a checkpoint
  return {Occupant::Kind::foreign, std::nullopt};
}

/// Files below a directory, as paths relative to it.
template <class = Deferred>
void list_files(AnyMedium& medium, std::string const& directory, std::string const& below, std::vector<std::string>& out) {
  for (auto const& entry : medium.list(below.empty() ? directory : directory + '/' + below)) {
    std::string const path = below.empty() ? entry.name : below + '/' + entry.name;
    if (entry.kind == EntryKind::directory) list_files(medium, directory, path, out);
    else out.push_back(path);
  }
}

template <class = Deferred>
Error already_there(std::string const& place) {
  Error error{ErrorCode::already_exists, "Checkpoint already exists: " + place};
  return error.with_path(place).with_hint("SaveOptions::if_exists = IfExists::replace replaces it when the new one is complete");
}

/// An attempt from its creation to its publication, on the rank that does these things. What it leaves behind when it dies is what
/// the comment above says.
template <class = Deferred>
class Attempt {
 public:
  /// Looks, cleans, refuses, creates. Throws Error(already_exists) as `replace` says, Error(io), Error(unsupported).
  ///
  /// `carried`: names of files that the new checkpoint will hold although no storage plans them
  /// `id`: where others know it already
  Attempt(AnyMedium& medium, std::string const& place, bool replace, std::vector<std::string> const& carried, CommitRecord record, std::string id = random_id()) : medium_{medium}, record_{std::move(record)} {
    place_ = medium.resolve_place(place);
    auto const [parent, name] = split_path(place_);
    parent_ = parent;
    medium.create_directories(parent_);
    auto siblings = siblings_of(medium, place_);
    Occupant occupant = look_at(medium, place_);
    if (occupant.kind == Occupant::Kind::nothing) {
      // The rename that a crash cut off.
      if (auto const* newest = newest_committed(siblings); newest != nullptr && !is_held(*newest)) {
        if (!medium.publish_new(newest->path, place_)) throw Error{ErrorCode::io, "cannot finish the rename of an interrupted save"}.with_path(newest->path);
        medium.sync_directory(parent_);
        occupant = look_at(medium, place_);
        siblings = siblings_of(medium, place_);
      }
    }
    std::uint64_t sequence = occupant.record ? occupant.record->sequence : 0;
    for (auto const& sibling : siblings)
      if (sibling.record) sequence = std::max(sequence, sibling.record->sequence);
    clean(siblings, occupant);
    if (occupant.kind != Occupant::Kind::nothing) {
      if (!replace) throw already_there(place_);
      refuse_unlisted(occupant, carried);
      old_ = std::move(occupant.record);
    }
    record_.id = std::move(id);
    record_.sequence = std::max(record_.sequence, sequence + 1);
    record_.committed = false;
    path_ = place_ + std::string{attempt_infix} + record_.id;
    try {
      if (!medium.create_directory(path_)) throw Error{ErrorCode::io, "an attempt of this name is there already"}.with_path(path_);
      created_ = true;
      lease_ = medium.acquire_lease(path_ + '/' + std::string{lease_name});
      if (!lease_) throw Error{ErrorCode::io, "somebody else holds the lease of a directory that has just been made"}.with_path(path_);
      // What is being saved is nobody's business until it is complete.
      CommitRecord open;
      open.id = record_.id, open.sequence = record_.sequence, open.run = record_.run, open.storage = record_.storage, open.file_layout = record_.file_layout;
      Bytes none;
      write_file_durably(medium, path_, std::string{record_name}, write_record(open, none));
      medium.sync_directory(parent_);
    } catch (...) {
      abandon();
      throw;
    }
  }

  std::string const& path() const { return path_; }
  std::string const& place() const { return place_; }
  std::string const& id() const { return record_.id; }
  CommitRecord& record() { return record_; }

  /// Writes a small file of the checkpoint durably, except for its name.
  void write_file(std::string const& name, ConstByteSpan bytes) {
    std::string const path = path_ + '/' + name;
    try {
      auto const file = medium_.open_write(path);
      file->resize(bytes.size());
      if (!bytes.empty()) file->write_at(0, bytes);
      file->sync();
      file->close();
    } catch (Error& error) {
      throw error.with_path(path);
    }
  }

  /// The commit: names made durable, then the record, which says that all is complete.
  void commit() {
    for (auto const& directory : directories()) medium_.sync_directory(directory);
    record_.committed = true;
    Bytes large;
    write_file_durably(medium_, path_, std::string{record_name}, write_record(record_, large));
    committed_ = true;
  }

  /// Puts the committed attempt into its place. What was there is then at old_path().
  void publish() {
    if (!old_) {
      if (!medium_.publish_new(path_, place_)) throw Error{ErrorCode::already_exists, "Checkpoint already exists: something came to " + place_ + " while it was being saved"}.with_path(place_);
    } else if (medium_.exchange_directories(path_, place_)) {
      old_path_ = path_;
    } else {
      old_path_ = place_ + std::string{attempt_infix} + (old_->id.size() == 16 ? old_->id : random_id());
      if (!medium_.publish_new(place_, old_path_)) throw Error{ErrorCode::io, "cannot move the old checkpoint aside"}.with_path(old_path_);
      medium_.sync_directory(parent_);
      try {
        if (!medium_.publish_new(path_, place_)) throw Error{ErrorCode::io, "cannot move the new checkpoint in"}.with_path(place_);
      } catch (...) {
        // The old one back, if that works. If not, nothing is lost: the new one, beside the place, is committed.
        try {
          if (medium_.publish_new(old_path_, place_)) medium_.sync_directory(parent_);
        } catch (Error const&) {
        }
        throw;
      }
    }
    medium_.sync_directory(parent_);
    lease_.reset();
    medium_.remove_file(place_ + '/' + std::string{lease_name});
  }

  /// After all ranks know the outcome.
  void remove_old() {
    if (!old_path_.empty()) remove_with_record_first(medium_, old_path_);
  }

  /// Of a failed save, as far as that is possible; a committed attempt is never removed.
  void abandon() noexcept {
    try {
      // Its record may say "committed" already, and the sync after that have failed.
      if (created_ && !committed_) remove_with_record_first(medium_, path_);
      lease_.reset();
    } catch (...) {
      // It stays, and the next save removes it.
    }
  }

  /// Instead of abandon(), where others wait for the outcome: its data goes, and a file called `name` with `message` stays, until abandon()
  /// or the next save.
  void leave_word(std::string const& name, ConstByteSpan message) noexcept {
    if (!created_ || committed_) return;
    try {
      // The record first: it may say "committed" already, and the sync after that have failed.
      medium_.remove_file(path_ + '/' + std::string{record_name});
      medium_.sync_directory(path_);
      for (auto const& entry : medium_.list(path_)) {
        std::string const path = path_ + '/' + entry.name;
        if (entry.kind == EntryKind::directory) medium_.remove_tree(path);
        else if (entry.name != lease_name) medium_.remove_file(path);
      }
      write_file_durably(medium_, path_, name, message);
    } catch (...) {
    }
    lease_.reset();
  }

  /// Directories of the attempt, inner ones first.
  std::vector<std::string> directories() const {
    std::vector<std::string> result;
    for (auto const& file : record_.files) {
      std::string directory = split_path('/' + file.path).first;   // "/" or "/optimizer"
      for (; directory != "/" && !directory.empty(); directory = split_path(directory).first) result.push_back(path_ + directory);
    }
    std::sort(result.begin(), result.end(), [](auto const& a, auto const& b) { return a.size() != b.size() ? a.size() > b.size() : a < b; });
    result.erase(std::unique(result.begin(), result.end()), result.end());
    result.push_back(path_);
    return result;
  }

 private:
  bool is_held(Sibling const& sibling) {
    try {
      return medium_.acquire_lease(sibling.path + '/' + std::string{lease_name}) == nullptr;
    } catch (Error const&) {
      return false;
    }
  }
  void clean(std::vector<Sibling> const& siblings, Occupant const& occupant) {
    for (auto const& sibling : siblings) {
      bool const committed = sibling.record && sibling.record->committed;
      // It is the checkpoint, or may be: one that cannot be read today is not thrown away for that.
      if ((committed || sibling.failure) && occupant.kind != Occupant::Kind::checkpoint) continue;
      try {
        auto const lease = medium_.acquire_lease(sibling.path + '/' + std::string{lease_name});
        if (lease) remove_with_record_first(medium_, sibling.path);
      } catch (Error const&) {
        // Somebody else cleans, or may not: no reason to fail a save.
      }
    }
  }
  void refuse_unlisted(Occupant const& occupant, std::vector<std::string> const& carried) {
    std::vector<std::string> files, unlisted;
    if (medium_.kind(place_) != EntryKind::directory) throw Error{ErrorCode::already_exists, "the place is a file, which a checkpoint does not replace: " + place_}.with_path(place_);
    list_files(medium_, place_, "", files);
    for (auto const& file : files) {
      if (file == record_name || file == checksums_name || file == lease_name || std::find(carried.begin(), carried.end(), file) != carried.end()) continue;
      if (occupant.record && std::any_of(occupant.record->files.begin(), occupant.record->files.end(), [&](RecordFile const& f) { return f.path == file; })) continue;
      unlisted.push_back(file);
    }
    if (unlisted.empty()) return;
    std::string names;
    for (std::size_t i = 0; i < std::min<std::size_t>(unlisted.size(), 8); ++i) names += (i > 0 ? ", " : "") + unlisted[i];
    throw Error{ErrorCode::already_exists, "replacing " + place_ + " would delete files that no commit record lists: " + names + (unlisted.size() > 8 ? ", ..." : "")}
        .with_path(place_)
        .with_hint("move them away, or carry them over (for SafeTensors: extra_files)");
  }

  AnyMedium& medium_;
  CommitRecord record_;
  std::string place_, parent_, path_, old_path_;
  std::optional<CommitRecord> old_;
  std::unique_ptr<Lease> lease_;
  bool created_ = false, committed_ = false;
};

}  // namespace dcp::detail
