// SPDX-License-Identifier: Apache-2.0
#pragma once
// Ranks as the processes of an MPI job. Component dcp::mpi.
//
// Borrowing   The communicator passed in is duplicated once (collective) and never used again or freed; the duplicate returns errors
//             instead of aborting. MPI is called by the thread that calls MpiComm and by no other: MPI_THREAD_FUNNELED is enough.
// Waiting     MPI has no deadlines, so nothing here blocks in it: each operation starts nonblocking MPI operations and polls them,
//             with pauses that grow to 0.2 ms. What is polled lies in buffers that MpiComm owns, never in the caller's.
//             Sparse exchange is the nonblocking consensus algorithm (Hoefler, Siebert, Lumsdaine 2010): synchronous sends, and a
//             nonblocking barrier that a rank enters when its own have been received. Messages of piece_bytes or more travel in
//             pieces, as packets of a bus do: a piece of exactly piece_bytes is followed by another. No count passes 2^31.
//             MPI_Comm_split and MPI_Comm_free have no nonblocking form; they are called when the others are known to have come.
// Deadline    It measures time without progress of any rank, of which mpi_gossip.hpp brings word. Groups made by split gossip apart:
//             progress() is heard by those who wait in an operation of the same communicator.
// Failure     At the deadline, or when MPI reports an error, the wrapper is poisoned and its neighbours are told the Error; they
//             throw the same one in the operation where it happened, or when they come there, and tell theirs. Pending requests
//             and their buffers are left alone for ever: MPI cannot cancel a collective operation, and it may still write to
//             them. A rank that throws elsewhere and destroys its MpiComm on the way tells its neighbours so too. One that is
//             killed, stopped or caught in something else is noticed at the deadline.
// Destructor  Collective. Frees the duplicate after all neighbours have said that they are done as well (no beat may remain in
//             flight: it would reach whoever gets the communicator's number next), waiting 5 s at most. When poisoned, during
//             an exception, after that wait or after MPI_Finalize, the duplicate is left alone instead.

#include <dcp/base/threading.hpp>
#include <dcp/comm/communicator.hpp>
#include <dcp/comm/mpi_gossip.hpp>

#include <algorithm>
#include <exception>
#include <map>
#include <optional>

namespace dcp {

namespace detail {

/// The requests of one operation and what they read and write. Addresses of buffers stay.
struct MpiPending {
  std::vector<MPI_Request> requests, receives;
  std::vector<std::unique_ptr<Bytes>> buffers;

  Bytes& buffer(Bytes bytes) { return *buffers.emplace_back(std::make_unique<Bytes>(std::move(bytes))); }
  std::size_t bytes() const {
    std::size_t sum = 0;
    for (auto const& one : buffers) sum += one->size();
    return sum;
  }
  MPI_Request& request() { return requests.emplace_back(MPI_REQUEST_NULL); }
};

/// Everything of an MpiComm that must stay where it is, and stays for ever if it is poisoned.
struct MpiState {
  MPI_Comm comm = MPI_COMM_NULL;
  MPI_Request duplication = MPI_REQUEST_NULL;
  std::optional<MpiGossip> gossip;
  std::optional<Error> poison;
  std::uint64_t exchanges = 0;
  int exceptions = std::uncaught_exceptions();
};

/// Pauses that grow while nothing happens, and more slowly where much is on its way. Where MPI copies through shared memory, it goes on a little whenever it is called, and not otherwise:
/// of 20 MiB between two processes, 33 ms, and 66 ms with the pauses of small messages.
class Backoff {
 public:
  explicit Backoff(std::size_t bytes = 0) : much_{bytes >= (std::size_t{1} << 20)} {}

  void pause() {
    if (++turns_ < 50) return;
    int const yields = much_ ? 20'000 : 2'000;
    if (turns_ < yields) return this_thread::yield();
    this_thread::sleep_for(std::chrono::microseconds{std::min(turns_ - yields + 1, much_ ? 50 : 200)});
  }

 private:
  int turns_ = 0;
  bool much_ = false;
};

}  // namespace detail

/// The ranks of an MPI communicator, which is borrowed: MPI_Init before, MPI_Finalize after, both by the caller. Collective, with
/// the same arguments on all ranks, as are split and the destructor.
///
/// Example   MPI_Init(&argc, &argv);  { dcp::MpiComm world{MPI_COMM_WORLD}; dcp::save<dcp::SafeTensors>(world, place, state); }  MPI_Finalize();
class MpiComm {
 public:
  /// 64 MiB: large enough for the network, small enough to be staged.
  static constexpr std::size_t default_piece = std::size_t{64} << 20;

  explicit MpiComm(MPI_Comm comm, std::chrono::milliseconds deadline = default_deadline, std::size_t piece_bytes = default_piece)
      : deadline_{detail::bounded_deadline(deadline)}, piece_{std::clamp<std::size_t>(piece_bytes, 1, std::size_t{1} << 30)} {
    int initialized = 0;
    MPI_Initialized(&initialized);
    if (initialized == 0) throw Error{ErrorCode::invalid_argument, "an MpiComm before MPI_Init"};
    auto state = std::make_unique<detail::MpiState>();
    detail::check_mpi(MPI_Comm_idup(comm, &state->comm, &state->duplication), "MPI_Comm_idup");
    auto const until = detail::SteadyClock::now() + deadline_;
    detail::Backoff backoff;
    for (int done = 0; done == 0; backoff.pause()) {
      detail::check_mpi(MPI_Test(&state->duplication, &done, MPI_STATUS_IGNORE), "MPI_Comm_idup");
      if (done != 0 || detail::SteadyClock::now() < until) continue;
      detail::leave_alone(std::move(state));
      throw Error{ErrorCode::timeout, "not all ranks of the MPI communicator made an MpiComm of it within " + std::to_string(deadline_.count()) + " ms"};
    }
    adopt(std::move(state));
  }

  MpiComm(MpiComm&&) noexcept = default;
  MpiComm& operator=(MpiComm&& other) noexcept {
    if (this == &other) return *this;
    close();
    state_ = std::move(other.state_), deadline_ = other.deadline_, piece_ = other.piece_;
    return *this;
  }
  ~MpiComm() { close(); }

  int rank() const { return state_->gossip->rank(); }
  int size() const { return state_->gossip->size(); }

  void barrier() {
    operation("barrier", [&](detail::MpiPending& pending) {
      detail::check_mpi(MPI_Ibarrier(state_->comm, &pending.request()), "MPI_Ibarrier");
      wait(pending);
    });
  }

  void broadcast(ByteSpan bytes, int root) {
    detail::check_root(root, size());
    operation("broadcast", [&](detail::MpiPending& pending) {
      Bytes& piece = pending.buffer(Bytes(std::min(piece_, bytes.size())));
      std::size_t at = 0;
      do {
        auto const part = bytes.subspan(at, std::min(piece.size(), bytes.size() - at));
        if (rank() == root) std::ranges::copy(part, piece.begin());
        detail::check_mpi(MPI_Ibcast(piece.data(), static_cast<int>(part.size()), MPI_BYTE, root, state_->comm, &pending.request()), "MPI_Ibcast");
        wait(pending);
        if (rank() != root) std::copy_n(piece.begin(), part.size(), part.begin());
        at += part.size();
      } while (at < bytes.size());
    });
  }

  void all_gather(ConstByteSpan mine, ByteSpan all) {
    detail::check_all_gather(mine, all, size());
    auto const ranks = static_cast<std::size_t>(size());
    operation("all_gather", [&](detail::MpiPending& pending) {
      std::size_t const slab = std::min(mine.size(), std::max<std::size_t>(piece_ / ranks, 1));
      Bytes& from = pending.buffer(Bytes(slab));
      Bytes& into = pending.buffer(Bytes(slab * ranks));
      std::size_t at = 0;
      do {
        auto const width = std::min(slab, mine.size() - at);
        std::ranges::copy(mine.subspan(at, width), from.begin());
        auto const count = static_cast<int>(width);
        detail::check_mpi(MPI_Iallgather(from.data(), count, MPI_BYTE, into.data(), count, MPI_BYTE, state_->comm, &pending.request()), "MPI_Iallgather");
        wait(pending);
        for (std::size_t i = 0; i < ranks; ++i)
          std::ranges::copy(ByteSpan{into}.subspan(i * width, width), all.subspan(i * mine.size() + at, width).begin());
        at += width;
      } while (at < mine.size());
    });
  }

  std::vector<Message> exchange(std::vector<Message> outgoing) {
    detail::check_destinations(outgoing, size());
    return operation("exchange", [&](detail::MpiPending& pending) { return exchange(pending, std::move(outgoing)); });
  }

  MpiComm split(int color, int key) {
    struct Wish {
      int color, key;
    };
    Wish const mine{color, key};
    std::vector<Wish> all(static_cast<std::size_t>(size()));
    all_gather(std::as_bytes(std::span{&mine, 1}), std::as_writable_bytes(std::span{all}));
    // MPI wants colors that are not negative. MPI_Comm_split blocks, but all ranks are known to have come here.
    std::map<int, int> colors;
    for (Wish const& wish : all) colors.emplace(wish.color, static_cast<int>(colors.size()));
    auto state = std::make_unique<detail::MpiState>();
    detail::check_mpi(MPI_Comm_split(state_->comm, colors.at(color), key, &state->comm), "MPI_Comm_split");
    MpiComm part{deadline_, piece_};
    part.adopt(std::move(state));
    return part;
  }

  /// Over MPI this speaks to the ranks of this communicator only, and must be called by the thread that calls everything else.
  void progress() {
    try {
      if (!state_->poison) state_->gossip->alive();
    } catch (...) {
      state_->poison = current_error();   // for the next operation to throw
    }
  }

 private:
  MpiComm(std::chrono::milliseconds deadline, std::size_t piece) : deadline_{deadline}, piece_{piece} {}

  void adopt(std::unique_ptr<detail::MpiState> state) {
    detail::check_mpi(MPI_Comm_set_errhandler(state->comm, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    state->gossip.emplace(state->comm, deadline_);
    state_ = std::move(state);
  }

  template <class Body>
  auto operation(char const* name, Body body) -> std::invoke_result_t<Body, detail::MpiPending&> {
    if (state_->poison) throw *state_->poison;
    auto pending = std::make_unique<detail::MpiPending>();
    try {
      state_->gossip->enter(name);
      return body(*pending);
    } catch (...) {
      state_->poison = current_error();
      detail::leave_alone(std::move(pending));
      state_->gossip->leave(*state_->poison, true);
    }
    throw *state_->poison;
  }

  void wait(detail::MpiPending& pending) {
    detail::Backoff backoff{pending.bytes()};
    while (!complete(pending.requests)) state_->gossip->wait_turn(), backoff.pause();
    pending.requests.clear();
    state_->gossip->alive();
  }

  static bool complete(std::vector<MPI_Request>& requests) {
    int done = 0;
    detail::check_mpi(MPI_Testall(static_cast<int>(requests.size()), requests.data(), &done, MPI_STATUSES_IGNORE), "MPI_Testall");
    return done != 0;
  }

  std::vector<Message> exchange(detail::MpiPending& pending, std::vector<Message> outgoing) {
    struct Piece {
      int rank;
      Bytes* bytes;
    };
    std::vector<Piece> pieces;   // in the order they came; those of one sender in the order sent
    std::vector<Message> incoming;
    // A rank may still be in the barrier of this exchange while another has left it and sends the messages of the next.
    int const tag = 2 + static_cast<int>(state_->exchanges++ % 2);
    for (Message& message : outgoing) {
      if (message.rank == rank()) {
        incoming.push_back(std::move(message));
        continue;
      }
      ByteSpan const bytes = pending.buffer(std::move(message.bytes));
      for (std::size_t at = 0;; at += piece_) {
        auto const part = bytes.subspan(at, std::min(piece_, bytes.size() - at));
        detail::check_mpi(MPI_Issend(part.data(), static_cast<int>(part.size()), MPI_BYTE, message.rank, tag, state_->comm, &pending.request()), "MPI_Issend");
        if (part.size() < piece_) break;
      }
    }
    bool in_barrier = false;
    std::size_t under_way = pending.bytes();
    detail::Backoff backoff{under_way};
    for (;;) {
      bool const ended = complete(pending.requests);
      if (ended && in_barrier) break;
      if (ended) {
        pending.requests.clear();
        detail::check_mpi(MPI_Ibarrier(state_->comm, &pending.request()), "MPI_Ibarrier");
        in_barrier = true;
      }
      int found = 0, size = 0;
      MPI_Message matched = MPI_MESSAGE_NULL;
      MPI_Status status;
      detail::check_mpi(MPI_Improbe(MPI_ANY_SOURCE, tag, state_->comm, &found, &matched, &status), "MPI_Improbe");
      if (found == 0) {
        state_->gossip->wait_turn();
        backoff.pause();
        continue;
      }
      detail::check_mpi(MPI_Get_count(&status, MPI_BYTE, &size), "MPI_Get_count");
      Bytes& into = pending.buffer(Bytes(static_cast<std::size_t>(size)));
      pieces.push_back({status.MPI_SOURCE, &into});
      detail::check_mpi(MPI_Imrecv(into.data(), size, MPI_BYTE, &matched, &pending.receives.emplace_back(MPI_REQUEST_NULL)), "MPI_Imrecv");
      state_->gossip->alive();
      backoff = detail::Backoff{under_way += into.size()};
    }
    // All that was sent here has been matched, or its sender would not be in the barrier.
    pending.requests = std::exchange(pending.receives, {});
    wait(pending);
    std::ranges::stable_sort(pieces, {}, &Piece::rank);
    bool continues = false;
    for (Piece const& piece : pieces) {
      bool const full = piece.bytes->size() == piece_;
      if (!continues) incoming.push_back({piece.rank, std::move(*piece.bytes)});
      else incoming.back().bytes.insert(incoming.back().bytes.end(), piece.bytes->begin(), piece.bytes->end());
      continues = full;
    }
    std::ranges::stable_sort(incoming, {}, &Message::rank);
    return incoming;
  }

  void close() noexcept try {
    int finalized = 0;
    MPI_Finalized(&finalized);
    if (!state_) return;
    bool const unwinding = std::uncaught_exceptions() > state_->exceptions;
    if (finalized == 0 && !state_->poison) {
      auto& gossip = *state_->gossip;
      std::string const me = "rank " + std::to_string(rank());
      gossip.leave(Error{ErrorCode::rank_failed, me + (unwinding ? " destroyed its communicator while it left with an exception"
                                                                 : " destroyed its communicator, and other ranks wait for it in a collective operation")}
                       .with_rank(rank(), size()),
                   false);
      auto const until = detail::SteadyClock::now() + std::min<std::chrono::milliseconds>(deadline_, std::chrono::seconds{5});
      detail::Backoff backoff;
      bool drained = false;
      while (!unwinding && !(drained = gossip.drained()) && detail::SteadyClock::now() < until) backoff.pause();
      if (drained) {
        detail::check_mpi(MPI_Comm_free(&state_->comm), "MPI_Comm_free");
        return state_.reset();
      }
    }
    detail::leave_alone(std::move(state_));
  } catch (...) {
    detail::leave_alone(std::move(state_));
  }

  std::unique_ptr<detail::MpiState> state_;
  std::chrono::milliseconds deadline_;
  std::size_t piece_;
};
static_assert(Communicator<MpiComm>);

}  // namespace dcp
