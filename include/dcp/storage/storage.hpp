// SPDX-License-Identifier: Apache-2.0
#pragma once
// A storage is a format spoken over a medium: it says which bytes a state becomes and what the bytes of a directory mean. It never
// talks to ranks and never moves tensor data; the checkpoint floor does, by the plan that a storage makes.

#include <dcp/formats/commit_record.hpp>
#include <dcp/media/medium.hpp>
#include <dcp/plan/catalog.hpp>
#include <dcp/plan/save_plan.hpp>
#include <dcp/storage/recoding.hpp>

#include <concepts>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp {

/// A place, whatever its storage: a medium and a path in it.
struct PlaceRef {
  std::shared_ptr<AnyMedium> medium;
  std::string path;
};

/// What a storage plans files for. Equal on all ranks but for `rank`.
struct SaveRequest {
  std::vector<TensorSpec> const& tensors;
  Shares const& shares;
  std::vector<Tie> const& ties;
  std::int64_t rank, ranks;
  std::vector<std::pair<std::string, Value>> const* values = nullptr;   // for storages whose files hold them
  std::vector<NameJoints> const* value_joints = nullptr;                // of the names of `values`
  std::vector<std::string> const* parts_of = nullptr;                   // where tensors are encoded: the name that each of `tensors` has without that
  std::vector<TensorSpec> const* state = nullptr;                       // where `arrangement` says how the state's tensors lie in `tensors`: the state's
  Arrangement const* arrangement = nullptr;
};

/// The data files of a checkpoint, and what an index says of them.
struct Scan {
  std::string directory;                                             // that the paths are relative to
  std::vector<std::string> files;                                    // in the order in which overlapping pieces count
  bool indexed = false;
  std::vector<std::pair<std::string, std::string>> index;            // tensor -> file, sorted
  std::int64_t total_size = -1;                                      // what the index says, -1 if it does not
  std::vector<std::string> warnings;
  std::vector<std::pair<std::string, std::string>> texts{};         // files beside them that say how they are to be understood: name, text
  bool foreign = false;                                              // there is no commit record
};

namespace detail {
/// The data files that a commit record lists.
template <class = Deferred>
std::vector<std::string> data_files(CommitRecord const& record) {
  std::vector<std::string> files;
  for (auto const& file : record.files)
    if (file.data) files.push_back(file.path);
  return files;
}
/// The name of the file `path`, and the directory that it is in.
template <class = Deferred>
std::string in_directory(std::string const& path, std::string& directory) {
  auto const slash = path.rfind('/');
  directory = slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
  return path.substr(slash + 1);
}
}  // namespace detail

/// What the checkpoint floor asks of a storage.
class AnyStorage {
 public:
  virtual ~AnyStorage() = default;

  virtual std::string_view name() const = 0;
  virtual std::string file_layout() const = 0;
  /// Options in words: ranks compare them, so that all plan the same files.
  virtual std::string options_text() const = 0;
  /// Problems of options with these tensors come as one Error. Pure, no I/O.
  virtual FilePlan plan_files(SaveRequest const& request) const = 0;
  /// How tensors are stored where they are not stored as they are; nullptr: all are. plan_files is then given what is to be stored. Pure.
  virtual std::shared_ptr<Recoding> recoding(std::vector<TensorSpec> const& tensors) const {
    static_cast<void>(tensors);
    return nullptr;
  }
  /// Whether data files hold the state's values, so that they must be known before files can be planned.
  virtual bool holds_values() const { return false; }
  /// Adds what is to be said of encoded tensors to the files that will be copied into the checkpoint. Called on one rank.
  virtual void describe(Recoding const& recoding, std::vector<std::pair<std::string, Bytes>>& files) const { static_cast<void>(recoding), static_cast<void>(files); }
  /// Where names lie, for the commit record.
  virtual std::vector<RecordGroup> groups() const = 0;
  /// Files to copy into the checkpoint: name there, and its bytes. Called on one rank.
  virtual std::vector<std::pair<std::string, Bytes>> extra_files() const = 0;

  /// Which data files there are. `record`: the commit record, nullptr for a foreign checkpoint. Called on one rank.
  virtual Scan scan(AnyMedium& medium, std::string const& path, CommitRecord const* record) const = 0;
  /// What the header of one of them says. Ranks call it for different files.
  virtual FoundFile read_header(AnyMedium& medium, Scan const& scan, std::string const& file) const = 0;
  /// Everything together, checked against index and record. Pure.
  virtual Catalog assemble(Scan const& scan, std::vector<FoundFile> found, CommitRecord const* record) const = 0;
  /// Whether data files begin with what says what is in them.
  virtual bool files_have_headers() const { return true; }
  /// Looks for those pieces of `tensors`, each of its catalog but for pieces that are not wanted, that lie in archives: their container_bytes become 0. Ranks call it for
  /// what they will read, after assemble() of the same object.
  virtual void locate(AnyMedium& medium, std::string const& directory, Catalog const& catalog, std::vector<CatalogTensor*> const& tensors) const {
    static_cast<void>(medium), static_cast<void>(directory), static_cast<void>(catalog), static_cast<void>(tensors);
  }
};

namespace detail {
// One sentence per missing piece of a storage type; a_storage stops at the first one that is missing. A storage over any medium names
// it as its Medium, which then is looked at as well.
template <class S>
constexpr bool is_over_a_medium() {
  if constexpr (requires { typename S::Medium; }) return Medium<typename S::Medium>;
  else return true;
}
template <class S>
inline constexpr bool has_medium = is_over_a_medium<S>();
template <class S>
inline constexpr bool has_place = requires { typename S::Place; };
template <class S>
inline constexpr bool has_options = requires { typename S::Options; };
template <class S>
inline constexpr bool has_open = requires {
  typename S::Options;   // asked first: clang++ 14 does not take a missing type of a parameter for an answer
  requires requires(typename S::Options const& options) { { S::open(options) } -> std::convertible_to<std::unique_ptr<AnyStorage>>; };
};
template <class S>
inline constexpr bool has_locate = requires {
  typename S::Place;
  requires requires(typename S::Place const& place) { { S::locate(place) } -> std::convertible_to<PlaceRef>; };
};

template <class S>
struct storage_has_a_place {
  static_assert(has_place<S>, "dcp: a Storage needs a member type  Place  - the second argument of save and load");
};
template <class S>
struct storage_has_options {
  static_assert(has_options<S>, "dcp: a Storage needs a member type  Options  - an aggregate; empty if there is nothing to choose");
};
template <class S>
struct storage_opens {
  static_assert(has_open<S>, "dcp: a Storage needs  static std::unique_ptr<AnyStorage> open(Options const&)  - the driver that plans and reads its files");
};
template <class S>
struct storage_locates {
  static_assert(has_locate<S>, "dcp: a Storage needs  static PlaceRef locate(Place const&)  - the medium of a place, and the path in it");
};
template <class S>
struct storage_is_complete {};

// A storage that only reads says so with a member `writable`.
template <class S>
constexpr bool can_be_written() {
  if constexpr (requires { { S::writable } -> std::convertible_to<bool>; }) return S::writable;
  else return true;
}
template <bool Writable>
struct a_writable_storage {
  static_assert(Writable, "dcp: this storage only reads - a Quantized<Scheme, ...> that is saved needs a scheme that can be written, which AnyScheme, Awq and Nf4 are not");
};

template <class S>
constexpr auto first_check_of_storage() {
  if constexpr (!has_place<S>) return std::type_identity<storage_has_a_place<S>>{};
  else if constexpr (!has_options<S>) return std::type_identity<storage_has_options<S>>{};
  else if constexpr (!has_medium<S>) return std::type_identity<a_medium<typename S::Medium>>{};
  else if constexpr (!has_open<S>) return std::type_identity<storage_opens<S>>{};
  else if constexpr (!has_locate<S>) return std::type_identity<storage_locates<S>>{};
  else return std::type_identity<storage_is_complete<S>>{};
}
/// As a base or a local variable: fails to compile, with the sentence of the first piece that `S` lacks.
template <class S>
using a_storage = typename decltype(first_check_of_storage<S>())::type;

template <class S>
inline constexpr bool is_storage = has_place<S> && has_options<S> && has_medium<S> && has_open<S> && has_locate<S>;
struct no_place {
  template <class T>
  no_place(T const&) {}
};
struct no_options {};
template <class S>
struct place_of {
  using type = no_place;
};
template <class S>
  requires requires { typename S::Place; }
struct place_of<S> {
  using type = typename S::Place;
};
template <class S>
struct options_of {
  using type = no_options;
};
template <class S>
  requires requires { typename S::Options; }
struct options_of<S> {
  using type = typename S::Options;
};
}  // namespace detail

/// A type is a Storage when it says what a place is and how its driver is opened. See SafeTensors.
template <class S>
concept Storage = detail::is_storage<S>;

template <class S>
using place_of = typename detail::place_of<S>::type;

/// Where a medium's checkpoints are: a path for the file system, else the medium and a key prefix.
template <class Medium>
struct MediumPlace {
  struct type {
    Medium medium;
    std::string prefix;
  };
  static PlaceRef locate(type const& place) {
    [[maybe_unused]] detail::a_medium<Medium> check;
    if constexpr (dcp::Medium<Medium>) return {std::make_shared<MediumModel<Medium>>(place.medium), place.prefix};
    else return {};
  }
};

}  // namespace dcp
