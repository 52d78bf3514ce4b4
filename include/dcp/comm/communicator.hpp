// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a checkpoint needs from the ranks of a job: six operations on bytes and a sign of life.
//
// Every operation but rank, size and progress is collective: all ranks call the same operations in the same order. Each has a
// deadline that measures time without progress of *any* rank, not total time. When a rank leaves, dies or stays silent past the
// deadline, the operation throws Error(rank_failed or timeout) on all others, and the communicator is poisoned: every later
// operation throws the same Error at once, because messages of the broken operation may still be under way.
//
// An operation that every rank has entered succeeds on every rank, also if one leaves right after it. Arguments that are wrong on
// their own (a root or a destination outside the group, an all_gather span of the wrong size) are Error(invalid_argument) on the
// rank that passed them, before anything is sent.

#include <dcp/base/bytes.hpp>
#include <dcp/base/error.hpp>

#include <chrono>
#include <concepts>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace dcp {

/// Bytes for a rank, or from it.
struct Message {
  int rank;
  Bytes bytes;
};

/// Time without progress of any rank after which waiting ends in an Error.
inline constexpr std::chrono::milliseconds default_deadline = std::chrono::minutes{10};

/// Ranks 0 .. size()-1 of a group, as `comm.rank()` sees it.
///
///   barrier()                 returns when every rank has called it
///   broadcast(bytes, root)    bytes of `root` to everyone; the size is equal on all ranks
///   all_gather(mine, all)     everyone's `mine`, in rank order; sizes equal, all.size() == size() * mine.size()
///   exchange(outgoing)        each message to its rank (also to oneself); what came in, ordered by sending rank, and for one
///                             sender in the order sent. Sizes may differ, most pairs usually exchange nothing
///   split(color, key)         a communicator of the ranks with the same color, ordered by key, then rank; any ints
///   progress()                not collective, cheap, any time: "this rank is alive", seen by ranks that wait
template <class C>
concept Communicator = requires(C& comm, C const& view, ByteSpan bytes, ConstByteSpan mine, std::vector<Message> outgoing) {
  { view.rank() } -> std::convertible_to<int>;
  { view.size() } -> std::convertible_to<int>;
  comm.barrier();
  comm.broadcast(bytes, 0);
  comm.all_gather(mine, bytes);
  { comm.exchange(std::move(outgoing)) } -> std::same_as<std::vector<Message>>;
  comm.split(0, 0);
  comm.progress();
};

/// A borrowed communicator of any type: the algorithms above this floor are compiled once, not once per communicator.
class CommRef {
 public:
  template <class C>
    requires(!std::same_as<std::remove_cvref_t<C>, CommRef>)
  CommRef(C& comm) : object_{&comm}, table_{&table_of<C>} {}

  int rank() const { return table_->rank(object_); }
  int size() const { return table_->size(object_); }
  void barrier() const { table_->barrier(object_); }
  void broadcast(ByteSpan bytes, int root) const { table_->broadcast(object_, bytes, root); }
  void all_gather(ConstByteSpan mine, ByteSpan all) const { table_->all_gather(object_, mine, all); }
  std::vector<Message> exchange(std::vector<Message> outgoing) const { return table_->exchange(object_, std::move(outgoing)); }
  void progress() const { table_->progress(object_); }

 private:
  struct Table {
    int (*rank)(void*);
    int (*size)(void*);
    void (*barrier)(void*);
    void (*broadcast)(void*, ByteSpan, int);
    void (*all_gather)(void*, ConstByteSpan, ByteSpan);
    std::vector<Message> (*exchange)(void*, std::vector<Message>);
    void (*progress)(void*);
  };
  template <class C>
  static constexpr Table table_of{
      [](void* c) { return static_cast<int>(static_cast<C*>(c)->rank()); },
      [](void* c) { return static_cast<int>(static_cast<C*>(c)->size()); },
      [](void* c) { static_cast<C*>(c)->barrier(); },
      [](void* c, ByteSpan bytes, int root) { static_cast<C*>(c)->broadcast(bytes, root); },
      [](void* c, ConstByteSpan mine, ByteSpan all) { static_cast<C*>(c)->all_gather(mine, all); },
      [](void* c, std::vector<Message> out) { return static_cast<C*>(c)->exchange(std::move(out)); },
      [](void* c) { static_cast<C*>(c)->progress(); },
  };
  void* object_;
  Table const* table_;
};

namespace detail {

inline void check_root(int root, int size) {
  if (root < 0 || root >= size)
    throw Error{ErrorCode::invalid_argument, "broadcast from rank " + std::to_string(root) + ", but the ranks are 0 to " + std::to_string(size - 1)};
}

inline void check_all_gather(ConstByteSpan mine, ConstByteSpan all, int size) {
  auto const ranks = static_cast<std::size_t>(size);
  if (all.size() % ranks == 0 && all.size() / ranks == mine.size()) return;
  throw Error{ErrorCode::invalid_argument, "all_gather of " + std::to_string(mine.size()) + " bytes from each of " + std::to_string(size) +
                                               " ranks into a span of " + std::to_string(all.size()) + " bytes"};
}

inline void check_destinations(std::vector<Message> const& outgoing, int size) {
  for (Message const& message : outgoing)
    if (message.rank < 0 || message.rank >= size)
      throw Error{ErrorCode::invalid_argument,
                  "exchange with rank " + std::to_string(message.rank) + ", but the ranks are 0 to " + std::to_string(size - 1)};
}

/// "rank 3", "ranks 2 and 3", "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more".
inline std::string name_ranks(std::span<int const> ranks) {
  constexpr std::size_t most = 8;
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    if (i == most && ranks.size() > most + 1) return text + " and " + std::to_string(ranks.size() - most) + " more";
    if (i > 0) text += i + 1 == ranks.size() ? " and " : ", ";
    text += std::to_string(ranks[i]);
  }
  return text;
}

/// A deadline that can be added to any time of day: a caller may pass milliseconds::max() to wait for ever.
inline std::chrono::milliseconds bounded_deadline(std::chrono::milliseconds deadline) {
  constexpr std::chrono::milliseconds longest = std::chrono::hours{24 * 365 * 10};
  return deadline < longest ? deadline : longest;
}

}  // namespace detail
}  // namespace dcp
