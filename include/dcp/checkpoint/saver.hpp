// SPDX-License-Identifier: Apache-2.0
#pragma once
// Another process that does what a save does behind the program: dcp-saver, and how this process and that one talk.
//
// The bytes to be written lie in memory that both share; what goes over the socket between them is small: the job, where the next piece lies, that
// its memory may be used again, how it ended. The saver is started by posix_spawn, in a session of its own and with no descriptor of this process
// but these two; it ends when the socket has closed and the save that it was given whole has ended.

#include <dcp/base/bytes.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/base/version.hpp>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

namespace dcp::detail {

enum class SaverWord : std::uint8_t {
  // To the saver.
  save,        // a SaveJob
  piece,       // file, position, offset in the shared memory, bytes, number
  staged,      // there are no more pieces; or an Error: because the copy failed
  interrupt,   // why
  forget,      // what is left of the failed attempt may go
  // From it.
  hello,       // which version it is of
  returned,    // number of a piece: its memory may be used again
  moved,       // how much has been done since the last one
  event,       // a SaveEvent
  ended,       // well or not, the Error, times, warnings
  forgotten,   // nothing is left of the failed attempt that could be removed
};

/// One end of the socket: messages of a word and a body. One thread may listen while another one says and sends; not thread-safe beyond that.
template <class = Deferred>
class SaverLink {
 public:
  explicit SaverLink(int socket) : socket_{socket} {}
  SaverLink(SaverLink const&) = delete;
  SaverLink& operator=(SaverLink const&) = delete;
  ~SaverLink() { ::close(socket_); }

  int descriptor() const { return socket_; }
  bool closed() const { return closed_; }
  bool has_unsent() const { return sent_ < unsent_.size(); }

  /// Queues a message; flush() sends it.
  void say(SaverWord word, ConstByteSpan body = {}) {
    std::uint64_t const size = body.size();
    append(unsent_, std::as_bytes(std::span{&size, 1}));
    append(unsent_, std::as_bytes(std::span{&word, 1}));
    append(unsent_, body);
  }
  /// Sends what the other end takes at once.
  void flush() {
    while (!closed_ && has_unsent()) {
      auto const count = ::send(socket_, unsent_.data() + sent_, unsent_.size() - sent_, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
      if (count < 0) {
        closed_ = true;
        break;
      }
      sent_ += static_cast<std::size_t>(count);
    }
    unsent_.clear(), sent_ = 0;
  }
  /// Calls hear(word, body) for what has come. False once the other end is gone and all that it said has been heard.
  template <class Hear>
  bool listen(Hear hear) {
    for (;;) {
      std::array<std::byte, 64 << 10> part;
      auto const count = ::recv(socket_, part.data(), part.size(), MSG_DONTWAIT);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
      if (count <= 0) {
        closed_ = true;
        break;
      }
      append(heard_, ConstByteSpan{part}.first(static_cast<std::size_t>(count)));
    }
    std::size_t at = 0;
    while (heard_.size() - at >= head_bytes) {
      std::uint64_t const size = load_little_endian<std::uint64_t>(heard_.data() + at);
      if (heard_.size() - at - head_bytes < size) break;
      auto const word = static_cast<SaverWord>(heard_[at + 8]);
      hear(word, ConstByteSpan{heard_}.subspan(at + head_bytes, static_cast<std::size_t>(size)));
      at += head_bytes + static_cast<std::size_t>(size);
    }
    heard_.erase(heard_.begin(), heard_.begin() + static_cast<std::ptrdiff_t>(at));
    return !closed_;
  }

 private:
  static constexpr std::size_t head_bytes = 9;
  int socket_;
  Atomic<bool> closed_{false};
  Bytes unsent_, heard_;
  std::size_t sent_ = 0;
};

template <class = Deferred>
std::string saver_version() {
  return "dcp " + std::to_string(version.major) + '.' + std::to_string(version.minor) + '.' + std::to_string(version.patch) + ", saver 1";
}

/// Where dcp-saver is: `named`, else what the environment names, else beside this program, else in PATH. Throws Error(unsupported) if nowhere.
template <class = Deferred>
std::string find_saver(std::string const& named) {
  auto const runs = [](std::string const& path) { return ::access(path.c_str(), X_OK) == 0; };
  char const* const variable = std::getenv("DCP_SAVER");
  std::string const chosen = !named.empty() ? named : variable != nullptr ? variable : "";
  if (!chosen.empty()) {
    if (runs(chosen)) return chosen;
    throw Error{ErrorCode::unsupported, "the executor is a process, and its program cannot be run"}.with_path(chosen).with_errno(errno);
  }
  std::vector<std::string> places;
  std::array<char, 4096> self{};
  if (auto const size = ::readlink("/proc/self/exe", self.data(), self.size()); size > 0) {
    std::string const path{self.data(), static_cast<std::size_t>(size)};
    places.push_back(path.substr(0, path.rfind('/')));
  }
  if (char const* const path = std::getenv("PATH"); path != nullptr)
    for (std::string_view rest{path}; !rest.empty();) {
      auto const end = std::min(rest.find(':'), rest.size());
      places.emplace_back(rest.substr(0, end));
      rest.remove_prefix(std::min(end + 1, rest.size()));
    }
  for (auto const& place : places)
    if (std::string const path = place + "/dcp-saver"; !place.empty() && runs(path)) return path;
  throw Error{ErrorCode::unsupported, "the executor is a process, and its program dcp-saver was not found"}.with_hint("build it (target dcp-saver) and name it: SaveOptions::saver_program, the variable DCP_SAVER, or a directory of PATH; or use Executor::thread");
}

/// A dcp-saver that this process has started, for one save at a time. Not thread-safe.
template <class = Deferred>
class SaverProcess {
 public:
  /// `memory`: descriptor of the shared memory, of `bytes` bytes. Throws Error(unsupported, io) if it cannot be started.
  SaverProcess(std::string const& program, int memory, std::uint64_t bytes) : program_{program}, link_{start(program, memory, bytes)} {
    std::string version;
    auto const until = SteadyClock::now() + std::chrono::seconds{30};
    while (version.empty() && SteadyClock::now() < until)
      if (!listen(-1, std::chrono::milliseconds{100}, [&](SaverWord, ConstByteSpan body) { version = as_text(body); })) break;
    if (version == saver_version()) return;
    std::string const why = version.empty() ? link_.closed() ? "it ended at once" : "it does not answer" : "it is of another version (" + version + ", not " + saver_version() + ")";
    reap(pid_);
    throw Error{ErrorCode::unsupported, "the executor is a process, and its program cannot be used: " + why}.with_path(program);
  }
  SaverProcess(SaverProcess const&) = delete;
  SaverProcess& operator=(SaverProcess const&) = delete;
  /// Lets it go: it finishes what it was given whole, and ends.
  ~SaverProcess() { reap(pid_); }

  pid_t pid() const { return pid_ < 0 ? -pid_ : pid_; }
  std::string const& program() const { return program_; }
  bool has_unsent() const { return link_.has_unsent(); }
  void say(SaverWord word, ConstByteSpan body = {}) { link_.say(word, body); }

  /// Sends, and calls hear(word, body) for what comes, until something has come, `wake` (a descriptor, or -1) can be read, or `time` is over. False once it is gone.
  template <class Hear>
  bool listen(int wake, std::chrono::milliseconds time, Hear hear) {
    link_.flush();
    std::array<pollfd, 2> wait{{{link_.descriptor(), static_cast<short>(POLLIN | (link_.has_unsent() ? POLLOUT : 0)), 0}, {wake, POLLIN, 0}}};
    ::poll(wait.data(), wake < 0 ? 1 : 2, static_cast<int>(time.count()));
    link_.flush();
    return link_.listen(hear);
  }
  /// How it ended, in words.
  std::string end() {
    int status = 0;
    for (int i = 0; i < 1000; ++i) {
      pid_t const ended = ::waitpid(pid_, &status, WNOHANG);
      if (ended < 0) break;
      if (ended == 0) {
        ::poll(nullptr, 0, 1);
        continue;
      }
      pid_ = -pid_;   // the number may be another's from now on
      if (WIFSIGNALED(status)) return "was ended by signal " + std::to_string(WTERMSIG(status));
      return "ended with status " + std::to_string(WEXITSTATUS(status));
    }
    return "is gone";
  }

 private:
  // Children that were let go, until they have ended: each time one is started or let go.
  static void reap(pid_t let_go) {
    static Mutex mutex;
    static auto* const left = new std::vector<pid_t>;
    std::lock_guard const lock{mutex};
    if (let_go > 0) left->push_back(let_go);
    std::erase_if(*left, [](pid_t pid) { return ::waitpid(pid, nullptr, WNOHANG) != 0; });
  }

  int start(std::string const& program, int memory, std::uint64_t bytes) {
    reap(0);
    auto const failure = [&](int why) {
      Error error{ErrorCode::io, "cannot start the program of the executor"};
      return error.with_path(program).with_errno(why);
    };
    std::array<int, 2> ends{};
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) != 0) throw failure(errno);
    // Out of the way of the numbers that they get in the child.
    int const socket = ::fcntl(ends[1], F_DUPFD_CLOEXEC, 16), shared = ::fcntl(memory, F_DUPFD_CLOEXEC, 16);
    ::close(ends[1]);
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attributes;
    ::posix_spawn_file_actions_init(&files);
    ::posix_spawnattr_init(&attributes);
    for (int const standard : {0, 1, 2}) ::posix_spawn_file_actions_addopen(&files, standard, "/dev/null", O_RDWR, 0);
    ::posix_spawn_file_actions_adddup2(&files, socket, 3);
    ::posix_spawn_file_actions_adddup2(&files, shared, 4);
    sigset_t none, all;
    ::sigemptyset(&none);
    ::sigfillset(&all);
    ::posix_spawnattr_setsigmask(&attributes, &none);
    ::posix_spawnattr_setsigdefault(&attributes, &all);
    short flags = POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF;
#ifdef POSIX_SPAWN_SETSID
    flags |= POSIX_SPAWN_SETSID;
#endif
    ::posix_spawnattr_setflags(&attributes, flags);
    std::string name = "dcp-saver", size = std::to_string(bytes);
    std::array<char*, 3> arguments{name.data(), size.data(), nullptr};
    int const why = socket < 0 || shared < 0 ? EMFILE : ::posix_spawn(&pid_, program.c_str(), &files, &attributes, arguments.data(), environ);
    ::posix_spawn_file_actions_destroy(&files);
    ::posix_spawnattr_destroy(&attributes);
    if (socket >= 0) ::close(socket);
    if (shared >= 0) ::close(shared);
    if (why == 0) return ends[0];
    ::close(ends[0]);
    throw failure(why);
  }

  std::string program_;
  pid_t pid_ = 0;   // negative once its end has been seen
  SaverLink<> link_;
};

}  // namespace dcp::detail
