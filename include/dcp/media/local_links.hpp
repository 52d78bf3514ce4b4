// SPDX-License-Identifier: Apache-2.0
#pragma once
// Symbolic links inside a checkpoint directory: whether the file behind a name may be read.
//
// A checkpoint from elsewhere may hold a link to any file of the machine, and a load would then deliver its bytes. The Hugging
// Face cache, however, consists of links: snapshots/<revision>/<name> -> ../../blobs/<hash>.

#include <dcp/base/config.hpp>
#include <dcp/io/file.hpp>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace dcp {

enum class LinkPolicy : std::uint8_t {
  cache,    // links that stay inside the directory, and those of the Hugging Face cache
  follow,   // every link, wherever it leads
  refuse,   // none
};

namespace detail {

/// The path without links, or "" with errno set.
template <class = Deferred>
std::string real_path(std::string const& path) {
  std::unique_ptr<char, decltype(&std::free)> const real{::realpath(path.c_str(), nullptr), &std::free};
  return real ? std::string{real.get()} : std::string{};
}

template <class = Deferred>
bool is_inside(std::string_view path, std::string_view directory) {
  return directory == "/" || (path.size() > directory.size() && path.starts_with(directory) && path[directory.size()] == '/');
}

/// Whether `target` is a blob of the cached repository that `directory` is a snapshot of (or a folder in a snapshot).
/// Source  huggingface_hub, "Understand caching": <repository>/snapshots/<revision>/..., <repository>/blobs/<hash>
template <class = Deferred>
bool is_cache_blob(std::string_view directory, std::string_view target) {
  constexpr std::string_view snapshots = "/snapshots/";
  auto const at = directory.rfind(snapshots);
  if (at == std::string_view::npos) return false;
  auto const blobs = std::string{directory.substr(0, at)} + "/blobs";
  return is_inside(target, blobs) && target.find('/', blobs.size() + 1) == std::string_view::npos;
}

template <class = Deferred>
std::vector<std::string> checked_components(std::string const& directory, std::string const& name) {
  std::vector<std::string> components;
  for (std::size_t begin = 0; begin <= name.size();) {
    auto const end = std::min(name.find('/', begin), name.size());
    components.push_back(name.substr(begin, end - begin));
    auto const& component = components.back();
    if (component.empty() || component == "." || component == ".." || component.find('\0') != std::string::npos)
      throw Error{ErrorCode::unsafe_path, "the name \"" + name + "\" does not stay inside its directory"}.with_path(directory);
    begin = end + 1;
  }
  return components;
}

}  // namespace detail

/// Opens the regular file `name` (which may have folders) of `directory` for reading. Links on the way to `directory` are followed.
///
/// Throws    unsafe_path for a name or a link that leaves the directory against `policy`; missing_file, also for a link to nothing;
///           io for loops and for what is no regular file
template <class = Deferred>
FileHandle open_inside(std::string const& directory, std::string const& name, LinkPolicy policy = LinkPolicy::cache) {
  auto const components = detail::checked_components(directory, name);
  auto const path = directory + "/" + name;
  if (policy == LinkPolicy::follow) return FileHandle::open_read(path);

  // The usual case has no links, and one walk that follows none shows it.
  bool link = false;
  auto folder = FileHandle::open(directory, O_PATH | O_DIRECTORY);
  for (std::size_t i = 0; i < components.size(); ++i) {
    bool const last = i + 1 == components.size();
    struct stat status {};
    try {
      auto next = FileHandle::open_at(folder, components[i], O_NOFOLLOW | (last ? O_RDONLY | O_NONBLOCK : O_PATH | O_DIRECTORY));
      if (last) {
        next.require_regular();
        return next;
      }
      folder = std::move(next);
    } catch (Error const& error) {
      if (error.system_error() != ELOOP && error.system_error() != ENOTDIR) throw;
      link = ::fstatat(folder.descriptor(), components[i].c_str(), &status, AT_SYMLINK_NOFOLLOW) == 0 && S_ISLNK(status.st_mode);
      if (!link) throw;
      break;
    }
  }
  if (policy == LinkPolicy::refuse)
    throw Error{ErrorCode::unsafe_path, "a symbolic link in a checkpoint directory"}.with_path(path).with_hint("LinkPolicy::follow reads it");

  FileHandle file;
  try {
    file = FileHandle::open_read(path);
  } catch (Error& error) {
    if (error.code() == ErrorCode::missing_file) error.with_hint("a symbolic link on the way leads to nothing");
    throw;
  }
  // The answer is about the file that is open, not about whatever the path means by now: the same inode or nothing.
  auto const target = detail::real_path(path), base = detail::real_path(directory);
  struct stat named {};
  auto const opened = file.status();
  if (target.empty() || base.empty() || ::lstat(target.c_str(), &named) != 0 || named.st_ino != opened.st_ino || named.st_dev != opened.st_dev)
    throw system_failure(ESTALE, "the file changed while it was being opened", path);
  if (detail::is_inside(target, base) || detail::is_cache_blob(base, target)) return file;
  throw Error{ErrorCode::unsafe_path, "a symbolic link leads out of the checkpoint directory, to " + target}.with_path(path).with_hint(
      "LinkPolicy::follow reads it");
}

}  // namespace dcp
