// SPDX-License-Identifier: Apache-2.0
#pragma once
// Ranks as forked processes: the communicator for tests in which a rank is killed or stopped.
//
// Every two ranks share a pair of connected sockets. An operation is one frame from each member of the group to each other, so
// whoever waits, waits for all of them and polls all sockets at once. A process that dies closes its sockets, which ends what the
// others read: Error(rank_failed) that names it. One that leaves its body sends a last frame that says how. One that stands still
// is Error(timeout) after the deadline; signs of life (at most one per deadline / 16) and any bytes that arrive restart the clock.
//
// Bodies run in children and end with _exit: checks of the test framework made there are lost, so a body throws instead (expect in
// comm_conformance.hpp) and the parent looks at what run_processes returns.

#include <dcp/comm/communicator.hpp>

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <deque>
#include <exception>
#include <iostream>
#include <optional>
#include <string>

namespace dcp::test {

namespace detail {

[[noreturn]] inline void throw_errno(char const* call) {
  throw Error{ErrorCode::io, std::string{call} + " failed"}.with_errno(errno);
}

/// The sockets of one process, to every other rank.
class ProcMesh {
 public:
  using Clock = std::chrono::steady_clock;
  enum class Kind : std::uint32_t { data, alive, left };
  struct Header {
    Kind kind;
    std::uint32_t group;
    std::uint64_t operation, size;
  };

  ProcMesh(int rank, std::vector<int> sockets, std::chrono::milliseconds deadline)
      : rank_{rank}, deadline_{dcp::detail::bounded_deadline(deadline)}, peers_(sockets.size()) {
    for (std::size_t i = 0; i < sockets.size(); ++i) {
      peers_[i].socket = sockets[i];
      if (sockets[i] >= 0 && ::fcntl(sockets[i], F_SETFL, O_NONBLOCK) != 0) throw_errno("fcntl");
    }
    last_news_ = last_alive_ = Clock::now();
  }
  ProcMesh(ProcMesh const&) = delete;
  ~ProcMesh() {
    for (Peer const& peer : peers_)
      if (peer.socket >= 0) ::close(peer.socket);
  }

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(peers_.size()); }
  std::optional<Error> const& poison() const { return poison_; }

  /// Sends frames[i] to members[i], and returns the frame that each of them sends for the same operation.
  std::vector<Bytes> swap(std::uint32_t group, std::uint64_t operation, std::vector<int> const& members, std::vector<Bytes> frames, char const* what) {
    if (poison_) throw *poison_;
    try {
      std::vector<Bytes> received(members.size());
      std::vector<int> missing;
      for (std::size_t i = 0; i < members.size(); ++i) {
        if (members[i] == rank_) received[i] = std::move(frames[i]);
        else queue(members[i], {Kind::data, group, operation, frames[i].size()}, frames[i]), missing.push_back(members[i]);
      }
      alive();
      last_news_ = Clock::now();
      for (;;) {
        std::erase_if(missing, [&](int member) { return take(member, group, operation, received, members); });
        bool const unsent = std::ranges::any_of(members, [&](int member) { return peer(member).unsent() > 0; });
        if (missing.empty() && !unsent) return received;
        for (int const member : missing)
          if (peer(member).failure) throw *peer(member).failure;
        auto const left = last_news_ + deadline_ - Clock::now();
        if (left <= Clock::duration::zero()) {
          if (missing.empty()) std::ranges::copy_if(members, std::back_inserter(missing), [&](int member) { return peer(member).unsent() > 0; });
          throw Error{ErrorCode::timeout, "no rank made progress for " + std::to_string(deadline_.count()) + " ms; " + what + " still waits for " +
                                              dcp::detail::name_ranks(missing)}
              .with_rank(missing.front(), size());
        }
        turn(std::chrono::ceil<std::chrono::milliseconds>(left));
      }
    } catch (...) {
      poison_ = current_error();
    }
    throw *poison_;
  }

  void alive() {
    if (poison_ || Clock::now() - last_alive_ < deadline_ / 16) return;
    last_alive_ = Clock::now();
    for (int other = 0; other < size(); ++other)
      if (other != rank_ && peer(other).unsent() == 0) queue(other, {Kind::alive, 0, 0, 0}, {});
    turn(std::chrono::milliseconds{0});
  }

  /// The last word of this rank; best effort.
  void leave(Error const& error) noexcept try {
    Error const& cause = poison_ ? *poison_ : error;   // everybody hears of the first cause
    for (int other = 0; other < size(); ++other)
      if (other != rank_ && peer(other).socket >= 0 && !peer(other).failure) queue(other, {Kind::left, 0, 0, cause.encode().size()}, cause.encode());
    // What was under way goes first, for as long as someone reads it.
    auto const until = Clock::now() + std::chrono::seconds{2};
    while (Clock::now() < until && std::ranges::any_of(peers_, [](Peer const& it) { return it.unsent() > 0; })) turn(std::chrono::milliseconds{50});
  } catch (...) {
  }

 private:
  struct Frame {
    Header header;
    Bytes bytes;
  };
  struct Peer {
    int socket = -1;
    Bytes out;   // what the socket accepted, up to out_done, and what it did not yet
    std::size_t out_done = 0;
    Bytes in;   // the beginning of a frame
    std::deque<Frame> frames;
    std::optional<Error> failure;

    std::size_t unsent() const { return out.size() - out_done; }
  };

  Peer& peer(int rank) { return peers_[static_cast<std::size_t>(rank)]; }

  void queue(int to, Header header, ConstByteSpan body) {
    if (peer(to).socket < 0) return;
    Bytes& out = peer(to).out;
    auto const head = std::as_bytes(std::span{&header, 1});
    out.insert(out.end(), head.begin(), head.end());
    out.insert(out.end(), body.begin(), body.end());
  }

  bool take(int from, std::uint32_t group, std::uint64_t operation, std::vector<Bytes>& received, std::vector<int> const& members) {
    auto& frames = peer(from).frames;
    if (frames.empty()) return false;
    Frame& frame = frames.front();
    if (frame.header.group != group || frame.header.operation != operation)
      throw Error{ErrorCode::ranks_disagree, "rank " + std::to_string(from) + " is in another operation"}.with_rank(from, size());
    received[static_cast<std::size_t>(std::ranges::find(members, from) - members.begin())] = std::move(frame.bytes);
    frames.pop_front();
    return true;
  }

  void turn(std::chrono::milliseconds longest) {
    std::vector<pollfd> polled;
    std::vector<int> ranks;
    for (int other = 0; other < size(); ++other) {
      if (peer(other).socket < 0) continue;
      polled.push_back({peer(other).socket, static_cast<short>(POLLIN | (peer(other).unsent() == 0 ? 0 : POLLOUT)), 0});
      ranks.push_back(other);
    }
    auto const wait = static_cast<int>(std::min<std::int64_t>(longest.count(), 1 << 30));
    if (::poll(polled.data(), polled.size(), wait) < 0 && errno != EINTR) throw_errno("poll");
    for (std::size_t i = 0; i < polled.size(); ++i) {
      if ((polled[i].revents & POLLOUT) != 0) send(ranks[i]);
      if ((polled[i].revents & (POLLIN | POLLHUP | POLLERR)) != 0) read(ranks[i]);
    }
  }

  void send(int to) {
    Peer& it = peer(to);
    while (it.unsent() > 0) {
      auto const sent = ::send(it.socket, it.out.data() + it.out_done, it.unsent(), MSG_NOSIGNAL);
      if (sent < 0) return;   // full; or gone, which reading says as well
      it.out_done += static_cast<std::size_t>(sent);
    }
    it.out.clear(), it.out_done = 0;
  }

  void read(int from) {
    Peer& it = peer(from);
    bool ended = false;
    for (;;) {
      auto const got = ::recv(it.socket, arriving_.data(), arriving_.size(), 0);
      if (got > 0) it.in.insert(it.in.end(), arriving_.begin(), arriving_.begin() + got);
      if (got > 0) last_news_ = Clock::now();
      if (got < 0 && errno == EINTR) continue;
      ended = got == 0 || (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK);
      if (got <= 0) break;
    }
    std::size_t at = 0;
    while (it.in.size() - at >= sizeof(Header)) {
      auto const header = load_little_endian<Header>(it.in.data() + at);
      if (it.in.size() - at - sizeof header < header.size) break;
      auto const body = ConstByteSpan{it.in}.subspan(at + sizeof header, static_cast<std::size_t>(header.size));
      if (header.kind == Kind::data) it.frames.push_back({header, {body.begin(), body.end()}});
      if (header.kind == Kind::left && !it.failure) it.failure = Error::decode(body);
      at += sizeof header + body.size();
    }
    it.in.erase(it.in.begin(), it.in.begin() + static_cast<std::ptrdiff_t>(at));
    if (!ended) return;
    ::close(it.socket);
    it.socket = -1;
    it.out.clear(), it.out_done = 0;
    if (!it.failure) it.failure = Error{ErrorCode::rank_failed, "rank " + std::to_string(from) + " died: its connection is closed"}.with_rank(from, size());
  }

  int rank_;
  std::chrono::milliseconds deadline_;
  std::vector<Peer> peers_;
  Bytes arriving_ = Bytes(std::size_t{1} << 18);
  Clock::time_point last_news_, last_alive_;
  std::optional<Error> poison_;
};

}  // namespace detail

/// A rank of run_processes, or of a group split from it. Errors number ranks as the whole run does.
class ProcComm {
 public:
  ProcComm(std::shared_ptr<detail::ProcMesh> mesh, std::vector<int> members, std::uint32_t group)
      : mesh_{std::move(mesh)}, members_{std::move(members)}, group_{group} {
    rank_ = static_cast<int>(std::ranges::find(members_, mesh_->rank()) - members_.begin());
  }
  ProcComm(ProcComm&&) = default;
  ProcComm& operator=(ProcComm&&) = default;

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(members_.size()); }
  void barrier() { (void)swap("barrier", std::vector<Bytes>(members_.size())); }

  void broadcast(ByteSpan bytes, int root) {
    dcp::detail::check_root(root, size());
    std::vector<Bytes> frames(members_.size());
    if (rank_ == root) std::ranges::fill(frames, Bytes(bytes.begin(), bytes.end()));
    auto const received = swap("broadcast", std::move(frames));
    std::ranges::copy(of_size(received[static_cast<std::size_t>(root)], bytes.size()), bytes.begin());
  }

  void all_gather(ConstByteSpan mine, ByteSpan all) {
    dcp::detail::check_all_gather(mine, all, size());
    auto out = all.begin();
    for (Bytes const& part : swap("all_gather", std::vector<Bytes>(members_.size(), Bytes(mine.begin(), mine.end()))))
      out = std::ranges::copy(of_size(part, mine.size()), out).out;
  }

  std::vector<Message> exchange(std::vector<Message> outgoing) {
    dcp::detail::check_destinations(outgoing, size());
    std::vector<ByteWriter> writers(members_.size());
    for (Message const& message : outgoing) writers[static_cast<std::size_t>(message.rank)].block(message.bytes);
    std::vector<Bytes> frames;
    for (ByteWriter& writer : writers) frames.push_back(writer.take());
    std::vector<Message> incoming;
    auto const received = swap("exchange", std::move(frames));
    for (int from = 0; from < size(); ++from)
      for (ByteReader reader{received[static_cast<std::size_t>(from)]}; !reader.rest().empty();) {
        auto const bytes = reader.block();
        incoming.push_back({from, {bytes.begin(), bytes.end()}});
      }
    return incoming;
  }

  ProcComm split(int color, int key) {
    struct Wish {
      int color, key;
    };
    Wish const mine{color, key};
    std::vector<Wish> wishes(members_.size());
    all_gather(std::as_bytes(std::span{&mine, 1}), std::as_writable_bytes(std::span{wishes}));
    std::vector<std::size_t> chosen;
    for (std::size_t i = 0; i < wishes.size(); ++i)
      if (wishes[i].color == color) chosen.push_back(i);
    std::ranges::stable_sort(chosen, {}, [&](std::size_t i) { return wishes[i].key; });
    std::vector<int> members;
    for (std::size_t const i : chosen) members.push_back(members_[i]);
    return {mesh_, std::move(members), (group_ * 31 + static_cast<std::uint32_t>(operation_)) * 31 + static_cast<std::uint32_t>(color)};
  }

  void progress() { mesh_->alive(); }

 private:
  std::vector<Bytes> swap(char const* what, std::vector<Bytes> frames) { return mesh_->swap(group_, ++operation_, members_, std::move(frames), what); }

  static Bytes const& of_size(Bytes const& bytes, std::size_t size) {
    if (bytes.size() != size)
      throw Error{ErrorCode::ranks_disagree, "a rank sent " + std::to_string(bytes.size()) + " bytes instead of " + std::to_string(size)};
    return bytes;
  }

  std::shared_ptr<detail::ProcMesh> mesh_;
  std::vector<int> members_;   // ranks of the whole run
  std::uint32_t group_;        // the same number on all members, another for (nearly) every group
  std::uint64_t operation_ = 0;
  int rank_ = 0;
};
static_assert(Communicator<ProcComm>);

struct ProcessOptions {
  std::chrono::milliseconds deadline = std::chrono::seconds{20};
  std::chrono::milliseconds watchdog = std::chrono::seconds{60};   // then every process that is left is killed
};

/// How a rank ended.
struct ProcessEnd {
  int exit_code = -1;           // 0 when the body returned, 1 when it threw; -1 when a signal ended it
  int signal = 0;
  bool was_stopped = false;     // stood still when all others had ended, and was killed for that
  std::optional<Error> error;   // what the body threw
  std::string text() const { return error ? error->what() : signal != 0 ? "killed by signal " + std::to_string(signal) : ""; }
};

/// Runs `body(comm)` in `n` forked processes and returns how each of them ended, in rank order. Call it where no threads run.
template <class F>
std::vector<ProcessEnd> run_processes(int n, F&& body, ProcessOptions options = {}) {
  auto const count = static_cast<std::size_t>(n);
  std::vector<std::vector<int>> sockets(count, std::vector<int>(count, -1));   // sockets[i][j]: the end of rank i to rank j
  std::vector<std::array<int, 2>> pipes(count);
  for (std::size_t i = 0; i < count; ++i) {
    if (::pipe(pipes[i].data()) != 0) detail::throw_errno("pipe");
    for (std::size_t j = i + 1; j < count; ++j) {
      int pair[2];
      if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) detail::throw_errno("socketpair");
      sockets[i][j] = pair[0], sockets[j][i] = pair[1];
    }
  }
  auto const run = [&](int rank) -> int {
    auto const me = static_cast<std::size_t>(rank);
    for (std::size_t i = 0; i < count; ++i) {
      ::close(pipes[i][0]);
      if (i == me) continue;
      ::close(pipes[i][1]);
      for (int const socket : sockets[i])
        if (socket >= 0) ::close(socket);   // else the death of rank i would not close it
    }
    auto const mesh = std::make_shared<detail::ProcMesh>(rank, sockets[me], options.deadline);
    std::vector<int> members;
    for (int i = 0; i < n; ++i) members.push_back(i);
    std::string const name = "rank " + std::to_string(rank);
    try {
      ProcComm comm{mesh, members, 1};
      body(comm);
    } catch (...) {
      Error const error = current_error();
      mesh->leave(Error{ErrorCode::rank_failed, name + " left with an exception: " + error.message()}.with_rank(rank, n));
      Bytes const encoded = error.encode();
      return ::write(pipes[me][1], encoded.data(), encoded.size()) < 0 ? 2 : 1;
    }
    mesh->leave(Error{ErrorCode::rank_failed, name + " returned, and other ranks wait for it in a collective operation"}.with_rank(rank, n));
    return 0;
  };

  std::cout.flush();   // what is buffered here must not come out of every child once more
  std::fflush(nullptr);
  std::vector<pid_t> children;
  for (int rank = 0; rank < n; ++rank) {
    pid_t const child = ::fork();
    if (child == 0) ::_exit(run(rank));
    children.push_back(child);
  }
  for (std::size_t i = 0; i < count; ++i) {
    ::close(pipes[i][1]);
    for (int const socket : sockets[i])
      if (socket >= 0) ::close(socket);
  }

  std::vector<ProcessEnd> ends(count);
  std::vector<bool> stopped(count), ended(count);
  auto const until = std::chrono::steady_clock::now() + options.watchdog;
  for (std::size_t left = count; left > 0;) {
    bool const late = std::chrono::steady_clock::now() >= until;
    std::size_t standing = 0;
    for (std::size_t i = 0; i < count; ++i) {
      if (ended[i]) continue;
      if (children[i] < 0) {   // fork failed
        ended[i] = true, --left;
        continue;
      }
      int status = 0;
      if (::waitpid(children[i], &status, WNOHANG | WUNTRACED | WCONTINUED) == children[i]) {
        if (WIFSTOPPED(status)) stopped[i] = true;
        else if (WIFCONTINUED(status)) stopped[i] = false;
        else {
          ended[i] = true, --left;
          if (WIFEXITED(status)) ends[i].exit_code = WEXITSTATUS(status);
          if (WIFSIGNALED(status)) ends[i].signal = WTERMSIG(status);
          continue;
        }
      }
      if (stopped[i]) ++standing;
      if (late) ::kill(children[i], SIGKILL);
    }
    if (left == 0) break;
    if (standing == left)
      for (std::size_t i = 0; i < count; ++i)
        if (!ended[i]) ends[i].was_stopped = true, ::kill(children[i], SIGKILL);
    ::poll(nullptr, 0, 2);
  }
  for (std::size_t i = 0; i < count; ++i) {
    Bytes text(std::size_t{1} << 16);   // the capacity of a pipe: no child blocked in it
    auto const got = ::read(pipes[i][0], text.data(), text.size());
    if (got > 0) ends[i].error = Error::decode(ConstByteSpan{text}.first(static_cast<std::size_t>(got)));
    ::close(pipes[i][0]);
  }
  return ends;
}

}  // namespace dcp::test
