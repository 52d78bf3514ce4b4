// SPDX-License-Identifier: Apache-2.0
#pragma once
// A place as one rank sees it: the checkpoint there, attempts beside it, and how an attempt becomes the checkpoint.
//
// Beside a place "ckpt" lie directories "ckpt.dcp-<id>". While a save runs, one of them is its attempt, with a record that says
// "open". When the record says "committed", the attempt is renamed to the place, or exchanged with the old checkpoint there. So:
//   1. what the place names is always a complete checkpoint (or nothing, or not ours);
//   2. if the place is missing, the newest committed sibling is the checkpoint: a crash came between "old aside" and "new in";
//   3. an open sibling whose lease nobody holds is the wreck of a killed save, and the next save removes it.
//
// Where directories are not renamed (object stores), attempts lie below the place, as "ckpt/dcp-<id>", and data stays where it was written. The record
// "ckpt/dcp.json" names the attempt that is the checkpoint, and putting it there is the commit, of a replacement too. So:
//   1. it is put only if what is at its name is what the save has found there: of two saves, or of a save and a writer that wakes up after
//      hours, one is refused, and neither can touch what the other has committed;
//   2. whoever removes an attempt that looks abandoned takes its own record "ckpt/dcp-<id>/dcp.json" away first and looks at the place after that. Whoever
//      commits looks for that record after the commit. One of the two sees the other, whatever clocks and leases say: either the
//      attempt stays, or its commit is taken back and the save fails;
//   3. an old checkpoint is removed when that has gone well, and all ranks know; and what lies there without a record of its own, which may be one that a
//      commit is just being taken back to, when a later commit has made that impossible.

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

inline constexpr std::string_view attempt_infix = ".dcp-", attempt_prefix = "dcp-";   // beside a place, below it
// By which ranks of a save in the background meet: rendezvous.hpp.
inline constexpr std::string_view done_prefix = "done-", alive_prefix = "alive-", failed_name = "failed";

template <class = Deferred>
std::pair<std::string, std::string> split_path(std::string const& path) {
  auto const slash = path.rfind('/');
  if (slash == std::string::npos) return {".", path};
  return {slash == 0 ? "/" : path.substr(0, slash), path.substr(slash + 1)};
}

/// Where an attempt to save to `place` lies.
template <class = Deferred>
std::string attempt_path(AnyMedium const& medium, std::string const& place, std::string const& id) {
  if (medium.renames_directories()) return place + std::string{attempt_infix} + id;
  return place + '/' + std::string{attempt_prefix} + id;
}
/// Whether a directory of this name, below a place, is an attempt, or the data of a checkpoint whose record names it.
template <class = Deferred>
bool is_attempt_below(DirectoryEntry const& entry) {
  std::uint64_t id = 0;
  return entry.kind == EntryKind::directory && entry.name.starts_with(attempt_prefix) && parse_hex16(std::string_view{entry.name}.substr(attempt_prefix.size()), id);
}
/// Whether a place holds nothing but attempts below it.
template <class = Deferred>
bool holds_only_attempts(AnyMedium& medium, std::string const& place) {
  auto const entries = medium.list(place);
  return std::all_of(entries.begin(), entries.end(), [](DirectoryEntry const& entry) { return is_attempt_below(entry) || entry.name == record_name; });
}
/// Where the files lie that the record in `directory` lists.
template <class = Deferred>
std::string data_directory(std::string const& directory, CommitRecord const& record) { return record.directory.empty() ? directory : directory + '/' + record.directory; }

/// How many ranks may write one file.
template <class = Deferred>
std::int64_t writers_per_file(AnyMedium const& medium, std::int64_t wanted) { return medium.renames_directories() ? wanted : 1; }

template <class = Deferred>
std::string random_id() {
  std::uint64_t id = 0;
  if (::getentropy(&id, sizeof id) != 0) throw Error{ErrorCode::io, "the system gives no random number for the name of an attempt"}.with_errno(errno);
  return hex16(id);
}

/// The record of the checkpoint or attempt in `directory`; nothing if it has none. Throws what is wrong with one that is there.
///
/// `bytes`   becomes what is in its file
template <class = Deferred>
std::optional<CommitRecord> read_record(AnyMedium& medium, std::string const& directory, Bytes* bytes = nullptr) {
  std::string const path = directory + '/' + std::string{record_name};
  try {
    Bytes const read = read_file(medium, path, most_record_bytes);
    if (bytes != nullptr) *bytes = read;
    return parse_record(read, {}, false);
  } catch (Error& error) {
    if (error.code() == ErrorCode::missing_file || error.code() == ErrorCode::not_found) return std::nullopt;
    throw error.with_path(path);
  }
}

/// As put_file; but of an error that comes after it was done, nothing is heard.
template <class = Deferred>
bool put_surely(AnyMedium& medium, std::string const& path, ConstByteSpan bytes, Expected expected) {
  try {
    return medium.put_file(path, bytes, expected);
  } catch (Error const&) {
    bool there = false;
    try {
      there = std::ranges::equal(read_file(medium, path, most_record_bytes), bytes);
    } catch (Error const&) {
    }
    if (!there) throw;
    return true;
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

/// Attempts beside or below a place, newest sequence first; but not the directory below it that its record names.
template <class = Deferred>
std::vector<Sibling> siblings_of(AnyMedium& medium, std::string const& place, std::optional<CommitRecord> const& at_place = std::nullopt) {
  bool const beside = medium.renames_directories();
  auto const [parent, name] = split_path(place);
  std::string const& directory = beside ? parent : place;
  std::vector<Sibling> siblings;
  if (medium.kind(directory) != EntryKind::directory) return siblings;
  std::string const prefix = beside ? name + std::string{attempt_infix} : std::string{attempt_prefix};
  for (auto const& entry : medium.list(directory)) {
    std::uint64_t id = 0;
    if (entry.kind != EntryKind::directory || !entry.name.starts_with(prefix) || !parse_hex16(std::string_view{entry.name}.substr(prefix.size()), id)) continue;
    if (!beside && at_place && entry.name == at_place->directory) continue;
    Sibling sibling{(directory == "/" ? "" : directory) + '/' + entry.name, entry.name.substr(prefix.size()), std::nullopt, std::nullopt};
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
  std::optional<CommitRecord> record = {};   // of a checkpoint
  Bytes record_bytes = {};                   // what is at the record's name
};
template <class = Deferred>
Occupant look_at(AnyMedium& medium, std::string const& place) {
  switch (medium.kind(place)) {
    case EntryKind::missing: return {};
    case EntryKind::directory: break;
    default: return {Occupant::Kind::foreign};
  }
  std::optional<CommitRecord> record;
  Bytes bytes;
  try {
    record = read_record(medium, place, &bytes);
  } catch (Error const& error) {
    if (error.code() == ErrorCode::io) throw;
    return {Occupant::Kind::foreign};   // damaged, or of a newer format: not ours to judge
  }
  if (record && record->committed) return {Occupant::Kind::checkpoint, std::move(record), std::move(bytes)};
  // An empty directory is a place for a checkpoint; so is one of attempts, and of a commit that was taken back.
  if (medium.renames_directories() ? !record && medium.list(place).empty() : holds_only_attempts(medium, place)) return {Occupant::Kind::nothing, std::nullopt, std::move(bytes)};
  return {Occupant::Kind::foreign};
}

/// Removes attempts that nobody works on; not one that is the checkpoint, or may be. Never fails: somebody else cleans, or may not. Returns what is left for after the
/// next commit.
template <class = Deferred>
std::vector<std::string> clean_attempts(AnyMedium& medium, std::string const& place, std::vector<Sibling> const& siblings, Occupant const& occupant) {
  bool const beside = medium.renames_directories();
  std::vector<std::string> later;
  for (auto const& sibling : siblings) {
    if (!beside && occupant.kind == Occupant::Kind::checkpoint && !sibling.record && !sibling.failure) {
      later.push_back(sibling.path);
      continue;
    }
    // Beside a place, a committed one is the checkpoint unless the place is, and one that cannot be read today is not thrown away for that. Below it, one that
    // the record names is; and who cannot read the record knows nothing.
    bool const committed = sibling.record && sibling.record->committed;
    if (beside ? (committed || sibling.failure) && occupant.kind != Occupant::Kind::checkpoint : occupant.kind == Occupant::Kind::foreign) continue;
    try {
      auto const lease = medium.acquire_lease(sibling.path + '/' + std::string{lease_name});
      if (!lease) continue;
      if (!beside) {
        medium.remove_file(sibling.path + '/' + std::string{record_name});
        if (auto const now = read_record(medium, place); now && now->committed && data_directory(place, *now) == sibling.path) continue;
      }
      remove_with_record_first(medium, sibling.path);
    } catch (Error const&) {
    }
  }
  return later;
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
    Occupant occupant = look_at(medium, place_);
    auto siblings = siblings_of(medium, place_, occupant.record);
    if (medium.renames_directories() && occupant.kind == Occupant::Kind::nothing) {
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
    later_ = clean_attempts(medium, place_, siblings, occupant);
    if (occupant.kind != Occupant::Kind::nothing) {
      if (!replace) throw already_there(place_);
      refuse_unlisted(occupant, carried);
      old_ = std::move(occupant.record);
    }
    found_ = std::move(occupant.record_bytes);
    record_.id = std::move(id);
    record_.sequence = std::max(record_.sequence, sequence + 1);
    record_.committed = false;
    path_ = attempt_path(medium, place_, record_.id);
    try {
      // Where every directory is there, another rank may have put a word into this one already.
      if (medium.renames_directories() && !medium.create_directory(path_)) throw Error{ErrorCode::io, "an attempt of this name is there already"}.with_path(path_);
      created_ = true;
      lease_ = medium.acquire_lease(path_ + '/' + std::string{lease_name});
      if (!lease_) throw Error{ErrorCode::io, "somebody else holds the lease of a directory that has just been made"}.with_path(path_);
      write_file_durably(medium, path_, std::string{record_name}, open_record());
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

  /// The commit: names made durable, then the record, which says that all is complete. Where the record is put at the place itself, publish() does that.
  void commit() {
    for (auto const& directory : directories()) medium_.sync_directory(directory);
    record_.committed = true;
    if (!medium_.renames_directories()) return;
    Bytes large;
    write_file_durably(medium_, path_, std::string{record_name}, write_record(record_, large));
    committed_ = true;
  }

  /// Puts the committed attempt into its place. What was there is then at old_path_.
  void publish() {
    if (!medium_.renames_directories()) return put_record();
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
    for (auto const& path : later_)
      if (auto const lease = medium_.acquire_lease(path + '/' + std::string{lease_name})) remove_with_record_first(medium_, path);
    if (!old_path_.empty()) return remove_with_record_first(medium_, old_path_);
    if (!old_ || medium_.renames_directories()) return;
    // A copy of one that was saved where directories are renamed lies beside its record.
    for (auto const& file : old_->files) medium_.remove_file(place_ + '/' + file.path);
    medium_.remove_file(place_ + '/' + std::string{checksums_name});
  }

  /// Of a failed save, as far as that is possible; a committed attempt is never removed.
  void abandon() noexcept {
    try {
      // Its record may say "committed" already, and the sync after that have failed. One that was put may yet come.
      if (created_ && !committed_ && !sent_) remove_with_record_first(medium_, path_);
      lease_.reset();
    } catch (...) {
      // It stays, and the next save removes it.
    }
  }

  /// Instead of abandon(), where others wait for the outcome: its data goes, and a file called `name` with `message` stays, until abandon()
  /// or the next save.
  void leave_word(std::string const& name, ConstByteSpan message) noexcept {
    if (!created_ || committed_ || sent_) return lease_.reset();
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
  // What is being saved is nobody's business until it is complete.
  Bytes open_record() const {
    CommitRecord open;
    open.id = record_.id, open.sequence = record_.sequence, open.run = record_.run, open.storage = record_.storage, open.file_layout = record_.file_layout;
    Bytes none;
    return write_record(open, none);
  }
  void put_record() {
    std::string const at = place_ + '/' + std::string{record_name};
    Bytes large;
    record_.directory = split_path(path_).second;
    Bytes const record = write_record(record_, large);
    sent_ = true;
    if (!put_surely(medium_, at, record, found_.empty() ? Expected::nothing() : Expected::these(found_))) {
      sent_ = false;
      throw Error{ErrorCode::already_exists, "Checkpoint already exists: something came to " + place_ + " while it was being saved"}.with_path(place_);
    }
    committed_ = true;
    if (!read_record(medium_, path_)) {
      committed_ = false;
      static_cast<void>(medium_.put_file(at, found_.empty() ? open_record() : found_, Expected::these(record)));
      throw Error{ErrorCode::io, "the save gave no sign of life for so long that another one has removed its data"}.with_path(path_);
    }
    if (old_ && !old_->directory.empty()) old_path_ = data_directory(place_, *old_);
    medium_.remove_file(path_ + '/' + std::string{record_name});
    lease_.reset();
  }
  // Of the files that go with what is replaced, those that nobody has listed.
  void refuse_unlisted(Occupant const& occupant, std::vector<std::string> const& carried) {
    std::vector<std::string> files, unlisted;
    if (medium_.kind(place_) != EntryKind::directory) throw Error{ErrorCode::already_exists, "the place is a file, which a checkpoint does not replace: " + place_}.with_path(place_);
    bool const beside = medium_.renames_directories();
    std::string const data = occupant.record && !occupant.record->directory.empty() ? occupant.record->directory + '/' : "";
    if (beside || !occupant.record) list_files(medium_, place_, "", files);
    else if (!data.empty()) list_files(medium_, place_, occupant.record->directory, files);
    for (auto const& file : files) {
      if (file == record_name || std::find(carried.begin(), carried.end(), file) != carried.end()) continue;
      std::string_view name{file};
      if (name.starts_with(data)) name.remove_prefix(data.size());
      if (name == checksums_name || name == lease_name) continue;
      // What a rank that woke up late has put there.
      if (!beside && (name == record_name || name == failed_name || name.starts_with(done_prefix) || name.starts_with(alive_prefix))) continue;
      if (occupant.record && std::any_of(occupant.record->files.begin(), occupant.record->files.end(), [&](RecordFile const& f) { return data + f.path == file; })) continue;
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
  std::vector<std::string> later_;           // to be removed after the commit
  std::optional<CommitRecord> old_;
  Bytes found_;                              // at the name of the place's record, when the save began
  std::unique_ptr<Lease> lease_;
  bool created_ = false, committed_ = false;
  bool sent_ = false;                        // its record was put at the place, and may be there
};

}  // namespace dcp::detail
