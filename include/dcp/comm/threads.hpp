// SPDX-License-Identifier: Apache-2.0
#pragma once
// Ranks as threads of one process: multi-rank programs with no launcher, under any sanitizer and debugger.
//
// All ranks of a run share one mutex, one condition variable and a list of failures in the order they happened:
//   1. a rank enters an operation by putting what it brings into the round of its group; the last to arrive completes the round
//      and wakes the others, who take what is theirs without the lock;
//   2. whoever leaves its body (by return or by exception), or is missing when the deadline passes, is written into the list;
//   3. a rank that enters or waits looks for the first failure that names a member of its group, and throws it. A round that is
//      complete is returned first, so an operation never succeeds on one rank and fails on another.
// Groups made by split share all this with their parent, so a rank that leaves is noticed in each group that it belongs to, and
// a group without it goes on. Errors number ranks as the whole run does, in sub-groups too.
// What a rank brings is moved or copied to the heap: nobody reads the buffers of a rank that has already thrown.

#include <dcp/base/config.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/comm/communicator.hpp>

#include <algorithm>
#include <atomic>
#include <exception>
#include <map>
#include <mutex>
#include <optional>

namespace dcp {

class ThreadComm;

template <class F>
void run_threads(int n, F&& body, std::chrono::milliseconds deadline = default_deadline);

namespace detail {

/// What a rank calls; all ranks of a group must call the same.
struct ThreadCall {
  char const* name = "";
  int root = 0;
  std::size_t bytes = 0;

  friend bool operator==(ThreadCall const& a, ThreadCall const& b) {
    return std::string_view{a.name} == b.name && a.root == b.root && a.bytes == b.bytes;
  }
  template <class = Deferred>
  std::string text() const {
    std::string_view const kind = name;
    if (kind == "broadcast") return "broadcast of " + std::to_string(bytes) + " bytes from rank " + std::to_string(root);
    if (kind == "all_gather") return "all_gather of " + std::to_string(bytes) + " bytes";
    return name;
  }
};

struct ThreadGroup;

/// One operation of one group. Written under the lock until it is complete, then each rank reads or takes its own part.
struct ThreadRound {
  template <class = Deferred>
  explicit ThreadRound(std::size_t ranks) : here(ranks), brought(ranks), inbox(ranks), colors(ranks), split(ranks) {}

  ThreadCall call;
  std::size_t arrivals = 0;
  bool complete = false;
  std::vector<bool> here;
  std::vector<Bytes> brought;                // broadcast (the root's), all_gather
  std::vector<std::vector<Message>> inbox;   // exchange
  struct Color {
    int color, key;
  };
  struct Part {
    std::shared_ptr<ThreadGroup> group;
    int rank = 0;
  };
  std::vector<Color> colors;   // split: what was asked,
  std::vector<Part> split;     // and what was made of it
};

struct ThreadGroup {
  template <class = Deferred>
  ThreadGroup(std::vector<int> ranks, std::size_t world_size)
      : world_ranks{std::move(ranks)}, member(world_size), round{std::make_shared<ThreadRound>(world_ranks.size())} {
    for (int const rank : world_ranks) member[static_cast<std::size_t>(rank)] = true;
  }
  std::size_t size() const { return world_ranks.size(); }

  std::vector<int> world_ranks;
  std::vector<bool> member;
  std::shared_ptr<ThreadRound> round;   // the one that the next rank to arrive enters
};

/// What the ranks of one run_threads share.
class ThreadWorld {
 public:
  template <class = Deferred>
  ThreadWorld(int size, std::chrono::milliseconds deadline) : size_{size}, deadline_{bounded_deadline(deadline)}, told_(static_cast<std::size_t>(size)) {
    sign_of_life();
  }

  template <class = Deferred>
  void sign_of_life() { last_sign_.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed); }

  /// The round that `rank` of `group` brings something to, once it is complete. Throws the failure of the group.
  template <class Bring>
  std::shared_ptr<ThreadRound> meet(ThreadGroup& group, std::size_t rank, ThreadCall call, Bring bring) {
    auto const me = group.world_ranks[rank];
    std::unique_lock lock{mutex_};
    throw_if_failed(group, me);
    std::shared_ptr<ThreadRound> const round = group.round;
    if (round->arrivals == 0) round->call = call;
    if (round->call != call) {
      fail({me}, Error{ErrorCode::ranks_disagree, "rank " + std::to_string(me) + " calls " + call.text() + ", but others of its group call " +
                                                      round->call.text()});
      throw_if_failed(group, me);
    }
    bring(*round);
    round->here[rank] = true;
    sign_of_life();
    if (++round->arrivals == group.size()) {
      if (std::string_view{call.name} == "split") split(group, *round);
      group.round = std::make_shared<ThreadRound>(group.size());
      round->complete = true;
      arrived_.notify_all();
      return round;
    }
    while (!round->complete) {
      throw_if_failed(group, me);
      auto const until = Clock::time_point{Clock::duration{last_sign_.load(std::memory_order_relaxed)}} + deadline_;
      if (Clock::now() >= until) {
        std::vector<int> missing;
        for (std::size_t i = 0; i < group.size(); ++i)
          if (!round->here[i]) missing.push_back(group.world_ranks[i]);
        fail(missing, Error{ErrorCode::timeout, "no rank made progress for " + std::to_string(deadline_.count()) + " ms; " + call.text() +
                                                    " still waits for " + name_ranks(missing)});
      } else {
        arrived_.wait_until(lock, until);
      }
    }
    return round;
  }

  /// `rank` is gone, with what was thrown there or nothing.
  template <class = Deferred>
  void leave(int rank, std::exception_ptr const& thrown) {
    auto error = Error{ErrorCode::rank_failed, "rank " + std::to_string(rank) + " returned, and other ranks wait for it in a collective operation"};
    if (thrown) {
      auto const cause = error_of(thrown);
      error = Error{ErrorCode::rank_failed, "rank " + std::to_string(rank) + " left with an exception: " + cause.message()};
      error.with_phase(cause.phase()).with_path(cause.path()).with_errno(cause.system_error()).with_hint(cause.hint());
    }
    std::lock_guard const lock{mutex_};
    if (thrown && !first_thrown_) first_thrown_ = thrown;
    // One that leaves because of another's failure passes that one on: everybody hears of the first cause.
    auto const& told = told_[static_cast<std::size_t>(rank)];
    fail({rank}, told ? *told : error);
  }

  template <class = Deferred>
  void rethrow_first() const {
    if (first_thrown_) std::rethrow_exception(first_thrown_);
  }

 private:
  using Clock = SteadyClock;
  struct Failure {
    std::vector<int> ranks;
    Error error;
  };

  template <class = Deferred>
  static Error error_of(std::exception_ptr const& thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (...) {
      return current_error();
    }
  }

  template <class = Deferred>
  void fail(std::vector<int> ranks, Error error) {
    error.with_rank(ranks.front(), size_);
    failures_.push_back({std::move(ranks), std::move(error)});
    arrived_.notify_all();
  }

  template <class = Deferred>
  void throw_if_failed(ThreadGroup const& group, int me) {
    for (Failure const& failure : failures_) {
      if (std::ranges::none_of(failure.ranks, [&](int rank) { return group.member[static_cast<std::size_t>(rank)]; })) continue;
      auto& told = told_[static_cast<std::size_t>(me)];
      if (!told) told = failure.error;
      throw failure.error;
    }
  }

  template <class = Deferred>
  void split(ThreadGroup const& group, ThreadRound& round) const {
    std::map<int, std::vector<std::size_t>> by_color;
    for (std::size_t i = 0; i < group.size(); ++i) by_color[round.colors[i].color].push_back(i);
    for (auto& [color, ranks] : by_color) {
      std::ranges::stable_sort(ranks, {}, [&](std::size_t i) { return round.colors[i].key; });
      std::vector<int> world_ranks;
      for (std::size_t const i : ranks) world_ranks.push_back(group.world_ranks[i]);
      auto const made = std::make_shared<ThreadGroup>(std::move(world_ranks), static_cast<std::size_t>(size_));
      for (std::size_t i = 0; i < ranks.size(); ++i) round.split[ranks[i]] = {made, static_cast<int>(i)};
    }
  }

  int const size_;
  std::chrono::milliseconds const deadline_;
  Atomic<Clock::rep> last_sign_{0};
  Mutex mutex_;
  Condition arrived_;
  std::vector<Failure> failures_;              // in the order they happened
  std::vector<std::optional<Error>> told_;     // the first failure that was thrown on each rank
  std::exception_ptr first_thrown_;
};

}  // namespace detail

/// One rank of a run_threads, or of a group that was split from it. Used by the thread that runs the rank only.
///
/// Throws    as communicator.hpp says; also Error(ranks_disagree) on all ranks of the group when they call different operations,
///           or broadcast with different roots or sizes
class ThreadComm {
 public:
  ThreadComm(ThreadComm&&) noexcept = default;
  ThreadComm& operator=(ThreadComm&&) noexcept = default;

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(group_->size()); }

  template <class = Deferred>
  void barrier() {
    meet({"barrier"}, [](auto&) {});
  }

  template <class = Deferred>
  void broadcast(ByteSpan bytes, int root) {
    detail::check_root(root, size());
    auto const round = meet({"broadcast", root, bytes.size()}, [&, copy = rank_ == root ? Bytes(bytes.begin(), bytes.end()) : Bytes{}](auto& r) mutable {
      if (rank_ == root) r.brought[me()] = std::move(copy);
    });
    if (rank_ != root) std::ranges::copy(round->brought[static_cast<std::size_t>(root)], bytes.begin());
  }

  template <class = Deferred>
  void all_gather(ConstByteSpan mine, ByteSpan all) {
    detail::check_all_gather(mine, all, size());
    auto const round =
        meet({"all_gather", 0, mine.size()}, [&, copy = Bytes(mine.begin(), mine.end())](auto& r) mutable { r.brought[me()] = std::move(copy); });
    auto out = all.begin();
    for (Bytes const& part : round->brought) out = std::ranges::copy(part, out).out;
  }

  template <class = Deferred>
  std::vector<Message> exchange(std::vector<Message> outgoing) {
    detail::check_destinations(outgoing, size());
    auto const round = meet({"exchange"}, [&](auto& r) {
      for (Message& message : outgoing) r.inbox[static_cast<std::size_t>(message.rank)].push_back({rank_, std::move(message.bytes)});
    });
    auto& mine = round->inbox[me()];
    std::ranges::stable_sort(mine, {}, &Message::rank);   // ranks arrived in any order, each with all its messages
    return std::move(mine);
  }

  template <class = Deferred>
  ThreadComm split(int color, int key) {
    auto const round = meet({"split"}, [&](auto& r) { r.colors[me()] = {color, key}; });
    auto const& part = round->split[me()];
    return ThreadComm{world_, part.group, part.rank};
  }

  template <class = Deferred>
  void progress() { world_->sign_of_life(); }

 private:
  template <class F>
  friend void run_threads(int n, F&& body, std::chrono::milliseconds deadline);

  ThreadComm(std::shared_ptr<detail::ThreadWorld> world, std::shared_ptr<detail::ThreadGroup> group, int rank)
      : world_{std::move(world)}, group_{std::move(group)}, rank_{rank} {}

  std::size_t me() const { return static_cast<std::size_t>(rank_); }
  template <class Bring>
  std::shared_ptr<detail::ThreadRound> meet(detail::ThreadCall call, Bring&& bring) {
    return world_->meet(*group_, me(), call, bring);
  }

  std::shared_ptr<detail::ThreadWorld> world_;
  std::shared_ptr<detail::ThreadGroup> group_;
  int rank_;
};
static_assert(Communicator<ThreadComm>);

/// Runs `body(comm)` on `n` ranks at once, rank 0 on the calling thread, and returns when all have ended.
///
/// A rank that throws or returns makes the others throw Error(rank_failed) from the operation in which they wait for it; one that
/// does not come makes them throw Error(timeout). No rank is killed: one that never ends keeps run_threads from returning.
///
/// Throws    the exception that left a body first, itself: the cause, where other ranks stopped because of it
/// Example   dcp::run_threads(4, [&](dcp::ThreadComm& world) { dcp::save<dcp::SafeTensors>(world, place, state_of(world.rank())); });
template <class F>
void run_threads(int n, F&& body, std::chrono::milliseconds deadline) {
  static_assert(std::is_invocable_v<F&, ThreadComm&>, "dcp: run_threads calls body(comm) on every rank; give it a function that takes dcp::ThreadComm&");
  if (n < 1) throw Error{ErrorCode::invalid_argument, "run_threads with " + std::to_string(n) + " ranks; one is the least"};

  auto const world = std::make_shared<detail::ThreadWorld>(n, deadline);
  std::vector<int> ranks(static_cast<std::size_t>(n));
  for (int i = 0; i < n; ++i) ranks[static_cast<std::size_t>(i)] = i;
  auto const group = std::make_shared<detail::ThreadGroup>(std::move(ranks), static_cast<std::size_t>(n));
  auto const run = [&](int rank) {
    std::exception_ptr thrown;
    try {
      ThreadComm comm{world, group, rank};
      body(comm);
    } catch (...) {
      thrown = std::current_exception();
    }
    world->leave(rank, thrown);
  };

  std::vector<detail::Thread> threads;
  threads.reserve(static_cast<std::size_t>(n));
  bool started = true;
  try {
    for (int rank = 1; rank < n; ++rank) threads.emplace_back(run, rank);
  } catch (...) {   // too many threads: those that run must not wait for those that never will
    started = false;
    world->leave(0, std::current_exception());
    for (int rank = static_cast<int>(threads.size()) + 1; rank < n; ++rank) world->leave(rank, nullptr);
  }
  if (started) run(0);
  for (detail::Thread& thread : threads) thread.join();
  world->rethrow_first();
}

}  // namespace dcp
