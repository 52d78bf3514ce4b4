// SPDX-License-Identifier: Apache-2.0
#pragma once
// How ranks that wait in MPI learn that another still works, or that it has left: the clock of MpiComm. Component dcp::mpi.
//
// A rank that enters an operation or calls progress() sends a beat of a few bytes, at most every deadline / 16, to the ranks at
// distance 1, 2, 4, ... on either side. A rank that waits restarts its clock at each beat and passes it on, at most as many times
// as it takes to reach everyone. (A count of hops and not of seconds, since clocks differ and a message may lie long in the queue
// of a busy rank.) When nothing is heard for half the deadline, waiting ranks also tell each other which ranks they know to wait,
// so that the Error names those that do not. A rank that stops for good says so and why; that is the last thing it sends, and
// after it no receive is open, so that the communicator can be freed.

#include <dcp/base/threading.hpp>
#include <dcp/comm/communicator.hpp>

#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>

#include <algorithm>
#include <bit>
#include <optional>

namespace dcp::detail {

inline void check_mpi(int result, char const* call) {
  if (result == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING + 1] = {};
  int length = 0, error_class = MPI_ERR_OTHER;
  if (MPI_Error_string(result, text, &length) != MPI_SUCCESS) length = 0;
  MPI_Error_class(result, &error_class);
  auto const code = error_class == MPI_ERR_TRUNCATE ? ErrorCode::ranks_disagree : ErrorCode::rank_failed;
  throw Error{code, std::string{call} + " failed: " + std::string{text, static_cast<std::size_t>(length)}};
}

/// Keeps `object` reachable for ever, because MPI may still use it.
template <class T>
void leave_alone(std::unique_ptr<T> object) {
  static auto& kept = *new std::vector<T*>;
  if (object) kept.push_back(object.release());
}

/// Signs of life between neighbours, and word of failures; see above.
class MpiGossip {
 public:
  using Clock = SteadyClock;

  MpiGossip(MPI_Comm comm, std::chrono::milliseconds deadline)
      : comm_{comm}, deadline_{deadline}, interval_{std::max<Clock::duration>(deadline / 16, std::chrono::milliseconds{1})} {
    check_mpi(MPI_Comm_rank(comm, &rank_), "MPI_Comm_rank");
    check_mpi(MPI_Comm_size(comm, &size_), "MPI_Comm_size");
    hops_ = static_cast<int>(std::bit_width(static_cast<unsigned>(size_)));
    waiting_.resize((static_cast<std::size_t>(size_) + 7) / 8);
    for (std::int64_t distance = 1; distance < size_; distance *= 2)
      for (auto const other : {(rank_ + distance) % size_, (rank_ - distance + size_) % size_})
        if (other != rank_ && std::ranges::find(neighbours_, static_cast<int>(other)) == neighbours_.end()) neighbours_.push_back(static_cast<int>(other));
    std::size_t const capacity = sizeof(Header) + std::max<std::size_t>(waiting_.size(), 2048);
    sending_.resize(neighbours_.size(), MPI_REQUEST_NULL), receiving_.resize(neighbours_.size(), MPI_REQUEST_NULL);
    sent_.resize(neighbours_.size()), received_.resize(neighbours_.size(), Bytes(capacity));
    for (std::size_t i = 0; i < neighbours_.size(); ++i) receive(i);
    last_beat_ = last_news_ = last_look_ = Clock::now();
  }

  int rank() const { return rank_; }
  int size() const { return size_; }

  /// This rank enters its next operation. Throws when it is known to fail.
  void enter(char const* what) {
    ++operation_;
    what_ = what;
    std::ranges::fill(waiting_, std::byte{0});
    mark(rank_);
    alive();
    look();
    throw_if_failed();
  }

  void alive() {
    last_news_ = Clock::now();
    if (last_news_ - last_beat_ < interval_) return;
    look();
    beat(hops_);
  }

  /// One turn of waiting: hears, passes on, throws at the deadline.
  void wait_turn() {
    auto const now = Clock::now();
    if (now - last_look_ < std::min<Clock::duration>(interval_ / 4, std::chrono::milliseconds{1})) return;
    look();
    throw_if_failed();
    bool const may_speak = now - last_beat_ >= interval_;
    if (may_speak && pass_on_ > 0) beat(pass_on_);
    else if (may_speak && now - last_news_ >= deadline_ / 2) beat(0);
    if (now - last_news_ < deadline_) return;
    std::vector<int> missing;
    for (int rank = 0; rank < size_; ++rank)
      if ((waiting_[static_cast<std::size_t>(rank) / 8] & bit(rank)) == std::byte{0}) missing.push_back(rank);
    Error error{ErrorCode::timeout, "no rank made progress for " + std::to_string(deadline_.count()) + " ms; " + what_ +
                                        (missing.empty() ? " does not end, though all ranks wait in it" : " still waits for " + name_ranks(missing))};
    throw missing.empty() ? error : error.with_rank(missing.front(), size_);
  }

  /// Tells the neighbours that this rank takes part in no operation from `first` on, because of `error`. The last thing it sends.
  void leave(Error const& error, bool during_operation) noexcept try {
    if (neighbours_.empty()) return;
    Bytes encoded = error.encode();
    if (encoded.size() > received_.front().size() - sizeof(Header))   // what is essential still fits
      encoded = Error{error.code(), error.message().substr(0, 1024)}.with_rank(error.rank(), size_).encode();
    for (std::size_t i = 0; i < neighbours_.size(); ++i) {
      // A beat that is still under way keeps its buffer: replaced, and left alone.
      if (sending_[i] != MPI_REQUEST_NULL && !sent(i)) leave_alone(std::make_unique<Bytes>(std::move(sent_[i])));
      send(i, {during_operation ? operation_ : operation_ + 1, -1, 0}, encoded);
    }
  } catch (...) {   // nobody hears of it then, and the deadline says the rest
  }

  /// True when every neighbour has left and all that was sent to them is out.
  bool drained() {
    look();
    for (std::size_t i = 0; i < neighbours_.size(); ++i)
      if (receiving_[i] != MPI_REQUEST_NULL || !sent(i)) return false;
    return true;
  }

 private:
  struct Header {
    std::uint64_t operation;   // the sender's; where it fails, if hops < 0
    int hops;                  // > 0: progress, for so many ranks in a row; 0: no progress, only who waits; -1: left, an Error follows
    int unused;
  };
  struct Failure {
    std::uint64_t operation;   // the first that fails
    Error error;
  };
  static constexpr int tag = 1;

  static std::byte bit(int rank) { return std::byte{1} << (rank % 8); }
  void mark(int rank) { waiting_[static_cast<std::size_t>(rank) / 8] |= bit(rank); }

  void throw_if_failed() const {
    if (failure_ && failure_->operation <= operation_) throw failure_->error;
  }

  void receive(std::size_t i) {
    check_mpi(MPI_Irecv(received_[i].data(), static_cast<int>(received_[i].size()), MPI_BYTE, neighbours_[i], tag, comm_, &receiving_[i]), "MPI_Irecv");
  }
  bool sent(std::size_t i) {
    int done = 0;
    check_mpi(MPI_Test(&sending_[i], &done, MPI_STATUS_IGNORE), "MPI_Test");
    return done != 0;
  }
  void send(std::size_t i, Header header, ConstByteSpan body) {
    Bytes& out = sent_[i];
    out.assign(sizeof header + body.size(), std::byte{0});
    std::memcpy(out.data(), &header, sizeof header);
    std::ranges::copy(body, out.begin() + sizeof header);
    check_mpi(MPI_Isend(out.data(), static_cast<int>(out.size()), MPI_BYTE, neighbours_[i], tag, comm_, &sending_[i]), "MPI_Isend");
  }

  void beat(int hops) {
    for (std::size_t i = 0; i < neighbours_.size(); ++i)
      if (receiving_[i] != MPI_REQUEST_NULL && sent(i)) send(i, {operation_, hops, 0}, waiting_);
    last_beat_ = Clock::now();
    pass_on_ = 0;
  }

  void look() {
    last_look_ = Clock::now();
    for (;;) {
      int index = MPI_UNDEFINED, any = 0, size = 0;
      MPI_Status status;
      check_mpi(MPI_Testany(static_cast<int>(receiving_.size()), receiving_.data(), &index, &any, &status), "MPI_Testany");
      if (any == 0 || index == MPI_UNDEFINED) return;
      check_mpi(MPI_Get_count(&status, MPI_BYTE, &size), "MPI_Get_count");
      auto const i = static_cast<std::size_t>(index);
      hear(neighbours_[i], ConstByteSpan{received_[i]}.first(static_cast<std::size_t>(size)), i);
    }
  }

  void hear(int from, ConstByteSpan message, std::size_t i) {
    auto const header = load_little_endian<Header>(message.data());
    auto const body = message.subspan(sizeof header);
    if (header.hops < 0) {
      if (!failure_ || header.operation < failure_->operation) failure_ = Failure{header.operation, Error::decode(body)};
      return;
    }
    if (header.operation >= operation_) mark(from);
    if (header.operation == operation_)
      for (std::size_t k = 0; k < waiting_.size(); ++k) waiting_[k] |= body[k];
    if (header.hops > 0) last_news_ = Clock::now(), pass_on_ = std::max(pass_on_, header.hops - 1);
    receive(i);
  }

  MPI_Comm comm_;
  int rank_ = 0, size_ = 1, hops_ = 1, pass_on_ = 0;
  std::chrono::milliseconds deadline_;
  Clock::duration interval_;
  Clock::time_point last_news_, last_beat_, last_look_;
  std::uint64_t operation_ = 0;
  char const* what_ = "";
  Bytes waiting_;   // one bit per rank: known to be in this operation, or past it
  std::optional<Failure> failure_;
  std::vector<int> neighbours_;
  std::vector<MPI_Request> sending_, receiving_;   // per neighbour; no receive is open from one that has left
  std::vector<Bytes> sent_, received_;
};

}  // namespace dcp::detail
