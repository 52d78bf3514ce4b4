// SPDX-License-Identifier: Apache-2.0
#pragma once
// Places of checkpoints in the file system: what a user's path means, and whether a directory there can be replaced as a whole.

#include <dcp/base/config.hpp>
#include <dcp/base/error.hpp>
#include <dcp/io/file.hpp>
#include <dcp/media/local_links.hpp>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <string>
#include <string_view>

#include <sys/stat.h>
#include <unistd.h>

namespace dcp::detail {

template <class = Deferred>
Error bad_place(std::string const& path, std::string message) {
  Error error{ErrorCode::invalid_argument, std::move(message)};
  error.with_path(path).with_hint("name a directory of its own for the checkpoint");
  return error;
}

/// `path` absolute and without links; what does not exist yet is appended to the real path of what does.
template <class = Deferred>
std::string resolved_path(std::string const& path, int links_left = 40) {
  if (auto real = real_path(path); !real.empty()) return real;
  if (errno != ENOENT) throw system_failure(errno, "cannot resolve the path", path);

  std::array<char, PATH_MAX> target{};
  if (auto const length = ::readlink(path.c_str(), target.data(), target.size()); length > 0) {
    if (links_left == 0) throw system_failure(ELOOP, "cannot resolve the path", path);
    std::string const text{target.data(), static_cast<std::size_t>(length)};
    return resolved_path(text.front() == '/' ? text : parent_path(path) + "/" + text, links_left - 1);
  }
  auto const name = path_name(path), parent = parent_path(path);
  if (name == "..") throw bad_place(path, "\"..\" after a directory that does not exist");
  if (name.empty() || parent == path) throw system_failure(ENOENT, "cannot resolve the path", path);
  auto resolved = resolved_path(parent, links_left);
  if (name == ".") return resolved;
  return (resolved == "/" ? "" : resolved) + "/" + name;
}

/// Whether something is mounted at `path` (absolute, without links). Bind mounts have the device of their source, so st_dev is not enough.
template <class = Deferred>
bool is_mount_point(std::string const& path) {
  struct stat here {}, above {};
  if (::lstat(path.c_str(), &here) != 0) return false;
  if (::lstat(parent_path(path).c_str(), &above) == 0 && here.st_dev != above.st_dev) return true;

  auto const mounts = text_of_system_file("/proc/self/mountinfo");
  for (std::size_t line = 0, next = 0; line < mounts.size(); line = next) {
    next = std::min(mounts.find('\n', line), mounts.size() - 1) + 1;
    std::size_t begin = line;
    for (int i = 0; i < 4; ++i) begin = mounts.find(' ', begin) + 1;   // proc(5): id, parent, device, root, then the mount point
    std::string const point = mounts.substr(begin, mounts.find(' ', begin) - begin);
    std::string plain;   // space, tab, newline and backslash are written as \ooo
    for (std::size_t i = 0; i < point.size(); ++i) {
      if (point[i] == '\\' && i + 3 < point.size()) {
        plain += static_cast<char>((point[i + 1] - '0') * 64 + (point[i + 2] - '0') * 8 + (point[i + 3] - '0'));
        i += 3;
      } else {
        plain += point[i];
      }
    }
    if (plain == path) return true;
  }
  return false;
}

/// See AnyMedium::resolve_place.
template <class = Deferred>
std::string resolve_local_place(std::string const& path) {
  if (path.empty()) throw bad_place(path, "the place of a checkpoint is an empty path");
  if (path.find('\0') != std::string::npos) throw bad_place(path, "the place of a checkpoint contains a zero byte");
  auto const name = path_name(path);
  if (name.empty()) throw bad_place(path, "the root directory cannot be replaced by a checkpoint");
  if (name == "." || name == "..") throw bad_place(path, "the place of a checkpoint is \"" + name + "\", and a directory cannot be replaced under that name");

  auto place = resolved_path(path);
  if (place == "/") throw bad_place(path, "the root directory cannot be replaced by a checkpoint");
  if (auto const current = real_path("."); current == place || is_inside(current, place))
    throw bad_place(path, "the place of a checkpoint is the current directory or one above it");
  if (is_mount_point(place)) throw bad_place(path, "the place of a checkpoint is a mount point, which cannot be renamed");
  return place;
}

}  // namespace dcp::detail
