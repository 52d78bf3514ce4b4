// SPDX-License-Identifier: Apache-2.0
#pragma once
// A lease as a file: a lock that the kernel drops with its holder, and a sign of life where locks do not reach.
//
// The file says "<host> <process> <boot id>". On one machine the lock alone decides, so a killed holder is gone at once. A file
// system may keep locks to each client, so a lease of another machine also counts as held while its modification time is young.
// Clocks of machines may differ by minutes; the age limit is far larger.

#include <dcp/base/config.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/io/file.hpp>
#include <dcp/media/medium.hpp>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <ctime>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <system_error>
#include <utility>

#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

namespace dcp::detail {

inline constexpr std::chrono::minutes lease_life{15};
inline constexpr std::chrono::seconds lease_heartbeat{5};

struct LeaseHolder {
  std::string host, boot;
  long process = 0;

  template <class = Deferred>
  std::string text() const { return host + " " + std::to_string(process) + " " + boot + "\n"; }

  template <class = Deferred>
  static LeaseHolder self() {
    std::array<char, 256> name{};
    ::gethostname(name.data(), name.size() - 1);
    LeaseHolder me{name.data(), "-", static_cast<long>(::getpid())};
    if (me.host.empty()) me.host = "-";
    auto const boot = text_of_system_file("/proc/sys/kernel/random/boot_id");
    if (boot.size() > 1) me.boot = boot.substr(0, boot.size() - 1);   // without the newline
    return me;
  }

  template <class = Deferred>
  static bool parse(std::string const& text, LeaseHolder& holder) {
    auto const first = text.find(' '), second = text.find(' ', first + 1), end = text.find('\n', second + 1);
    if (first == std::string::npos || second == std::string::npos || end == std::string::npos) return false;
    holder.host = text.substr(0, first);
    holder.boot = text.substr(second + 1, end - second - 1);
    auto const number = std::from_chars(text.data() + first + 1, text.data() + second, holder.process);
    return first > 0 && !holder.boot.empty() && number.ec == std::errc{} && number.ptr == text.data() + second;
  }
};

/// Whether the holder that the file names counts as alive to someone who got the lock (or, without `locks`, to anyone).
template <class = Deferred>
bool lease_is_alive(FileHandle const& file, bool locks) {
  auto const status = file.status();
  std::string text(static_cast<std::size_t>(std::min<off_t>(status.st_size, 512)), '\0');
  file.read_at(0, std::as_writable_bytes(std::span{text}));

  auto const age = std::time(nullptr) - status.st_mtime;
  bool const young = (age < 0 ? -age : age) < std::chrono::seconds{lease_life}.count();   // a far future is a wrong clock, not a sign of life
  LeaseHolder holder;
  if (!LeaseHolder::parse(text, holder)) return !locks && young && status.st_size > 0;
  auto const me = LeaseHolder::self();
  if (holder.boot != me.boot && holder.host != me.host) return young;
  if (locks) return false;
  bool const gone = holder.boot != me.boot || (holder.host == me.host && ::kill(static_cast<pid_t>(holder.process), 0) != 0 && errno == ESRCH);
  return young && !gone;
}

/// Renews a file's modification time until it is destroyed, from a thread of its own: whoever holds a lease may wait for other ranks
/// longer than a lease lives.
template <class = Deferred>
class Heart {
 public:
  Heart(FileHandle const& file, std::chrono::milliseconds interval) try
      : thread_{[this, &file, interval] {
          std::unique_lock lock{mutex_};
          // A beat that fails is no reason to fail a save: the lock still stands.
          while (!stopped_.wait_for(lock, interval, [this] { return stop_; })) ::futimens(file.descriptor(), nullptr);
        }} {
  } catch (std::system_error const& error) {
    throw system_failure(error.code().value(), "cannot start the thread that keeps the lease alive", file.path());
  }
  Heart(Heart const&) = delete;
  Heart& operator=(Heart const&) = delete;
  ~Heart() {
    {
      std::lock_guard const lock{mutex_};
      stop_ = true;
    }
    stopped_.notify_one();
    thread_.join();
  }

 private:
  Mutex mutex_;
  Condition stopped_;
  bool stop_ = false;
  Thread thread_;
};

template <class = Deferred>
class LocalLease final : public Lease {
 public:
  explicit LocalLease(FileHandle file, std::chrono::milliseconds interval = lease_heartbeat)
      : file_{std::move(file)}, heart_{std::make_unique<Heart<>>(file_, interval)} {}

  ~LocalLease() override {
    // A child made by fork shares the lock, and has no thread; only who took the lease gives it back.
    if (::getpid() != owner_) {
      static_cast<void>(heart_.release());
      return;
    }
    heart_.reset();
    // Emptied first: the directory may have been renamed since, and another machine must not take the leftover for a sign of life.
    [[maybe_unused]] int const cut = ::ftruncate(file_.descriptor(), 0);
    struct stat mine {}, named {};
    if (::fstat(file_.descriptor(), &mine) == 0 && ::lstat(file_.path().c_str(), &named) == 0 && mine.st_ino == named.st_ino && mine.st_dev == named.st_dev)
      ::unlink(file_.path().c_str());
    ::flock(file_.descriptor(), LOCK_UN);
  }

 private:
  FileHandle file_;
  std::unique_ptr<Heart<>> heart_;
  pid_t owner_ = ::getpid();
};

/// The lease on an open lease file, or nullptr: then `replaced` says that the file has lost its name, and another try may succeed.
template <class D = Deferred>
std::unique_ptr<Lease> take_lease(FileHandle file, bool& replaced) {
  replaced = false;
  bool locks = true;
  while (::flock(file.descriptor(), LOCK_EX | LOCK_NB) != 0) {
    if (errno == EINTR) continue;
    if (errno == EWOULDBLOCK) return nullptr;
    if (errno != ENOSYS && errno != ENOTSUP && errno != EINVAL && errno != ENOLCK) throw file.failure(errno, "cannot lock the lease");
    locks = false;
    break;
  }
  // The holder before us removes the file before it lets go: then this is a lock on a file without a name, and worth nothing.
  struct stat named {};
  auto const mine = file.status();
  replaced = ::lstat(file.path().c_str(), &named) != 0 || named.st_ino != mine.st_ino || named.st_dev != mine.st_dev;
  if (replaced || lease_is_alive(file, locks)) return nullptr;

  auto const text = LeaseHolder::self().text();
  file.resize(0);
  file.write_at(0, as_byte_span(text));
  file.sync();
  return std::make_unique<LocalLease<D>>(std::move(file));
}

/// See AnyMedium::acquire_lease.
template <class = Deferred>
std::unique_ptr<Lease> acquire_local_lease(std::string const& path) {
  constexpr int rounds = 100;
  for (int round = 0;; ++round) {
    auto file = FileHandle::open(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK);
    file.require_regular();
    bool replaced = false;
    auto lease = take_lease(std::move(file), replaced);
    if (!replaced) return lease;
    if (round == rounds) throw system_failure(ESTALE, "the lease is replaced again and again", path);
  }
}

}  // namespace dcp::detail
