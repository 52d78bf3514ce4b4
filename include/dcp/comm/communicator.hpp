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

#include <dcp/base/config.hpp>
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

namespace detail {
// One sentence per missing piece of a communicator; split is asked for only where it is called. Each check has the piece that it asks
// for as a constant, so that a_communicator stops at the first one that is missing.
template <class C>
inline constexpr bool has_rank = requires(C const& comm) { { comm.rank() } -> std::convertible_to<int>; };
template <class C>
inline constexpr bool has_size = requires(C const& comm) { { comm.size() } -> std::convertible_to<int>; };
template <class C>
inline constexpr bool has_barrier = requires(C& comm) { comm.barrier(); };
template <class C>
inline constexpr bool has_broadcast = requires(C& comm, ByteSpan bytes) { comm.broadcast(bytes, 0); };
template <class C>
inline constexpr bool has_all_gather = requires(C& comm, ConstByteSpan mine, ByteSpan all) { comm.all_gather(mine, all); };
template <class C>
inline constexpr bool has_exchange = requires(C& comm, std::vector<Message> outgoing) { { comm.exchange(std::move(outgoing)) } -> std::same_as<std::vector<Message>>; };
template <class C>
inline constexpr bool has_split = requires(C& comm) { comm.split(0, 0); };
template <class C>
inline constexpr bool has_progress = requires(C& comm) { comm.progress(); };

template <class C>
struct communicator_has_rank {
  static_assert(has_rank<C>, "dcp: a communicator needs  int rank() const  - which of the ranks 0 .. size() - 1 this one is");
};
template <class C>
struct communicator_has_size {
  static_assert(has_size<C>, "dcp: a communicator needs  int size() const  - the number of ranks");
};
template <class C>
struct communicator_has_barrier {
  static_assert(has_barrier<C>, "dcp: a communicator needs  void barrier()  - returns when every rank has called it");
};
template <class C>
struct communicator_has_broadcast {
  static_assert(has_broadcast<C>, "dcp: a communicator needs  void broadcast(dcp::ByteSpan bytes, int root)  - the bytes of rank `root`, to everyone");
};
template <class C>
struct communicator_has_all_gather {
  static_assert(has_all_gather<C>, "dcp: a communicator needs  void all_gather(dcp::ConstByteSpan mine, dcp::ByteSpan all)  - everyone's bytes, in rank order");
};
template <class C>
struct communicator_has_exchange {
  static_assert(has_exchange<C>, "dcp: a communicator needs  std::vector<dcp::Message> exchange(std::vector<dcp::Message>)  - messages to any ranks, and those that came in");
};
template <class C>
struct communicator_has_split {
  static_assert(has_split<C>, "dcp: a communicator needs  split(int color, int key)  - a communicator of the ranks with the same color");
};
template <class C>
struct communicator_has_progress {
  static_assert(has_progress<C>, "dcp: a communicator needs  void progress()  - a sign of life, seen by ranks that wait; it may do nothing");
};
template <class C>
struct communicator_is_complete {};

template <class C>
constexpr auto first_check_of_communicator() {
  if constexpr (!has_rank<C>) return std::type_identity<communicator_has_rank<C>>{};
  else if constexpr (!has_size<C>) return std::type_identity<communicator_has_size<C>>{};
  else if constexpr (!has_barrier<C>) return std::type_identity<communicator_has_barrier<C>>{};
  else if constexpr (!has_broadcast<C>) return std::type_identity<communicator_has_broadcast<C>>{};
  else if constexpr (!has_all_gather<C>) return std::type_identity<communicator_has_all_gather<C>>{};
  else if constexpr (!has_exchange<C>) return std::type_identity<communicator_has_exchange<C>>{};
  else if constexpr (!has_split<C>) return std::type_identity<communicator_has_split<C>>{};
  else if constexpr (!has_progress<C>) return std::type_identity<communicator_has_progress<C>>{};
  else return std::type_identity<communicator_is_complete<C>>{};
}
/// As a base or a local variable: fails to compile, with the sentence of the first piece that `C` lacks.
template <class C>
using a_communicator = typename decltype(first_check_of_communicator<C>())::type;
}  // namespace detail

/// A borrowed communicator of any type: the algorithms above this floor are compiled once, not once per communicator.
class CommRef {
 public:
  template <class C>
    requires(!std::same_as<std::remove_cvref_t<C>, CommRef>)
  CommRef(C& comm) : object_{&comm}, table_{table_for<C>()} {
    [[maybe_unused]] detail::a_communicator<C> check;
  }

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
  template <class C>
  static constexpr Table const* table_for() {
    if constexpr (Communicator<C>) return &table_of<C>;
    else return nullptr;
  }
  void* object_;
  Table const* table_;
};

namespace detail {

template <class = Deferred>
void check_root(int root, int size) {
  if (root < 0 || root >= size)
    throw Error{ErrorCode::invalid_argument, "broadcast from rank " + std::to_string(root) + ", but the ranks are 0 to " + std::to_string(size - 1)};
}

template <class = Deferred>
void check_all_gather(ConstByteSpan mine, ConstByteSpan all, int size) {
  auto const ranks = static_cast<std::size_t>(size);
  if (all.size() % ranks == 0 && all.size() / ranks == mine.size()) return;
  throw Error{ErrorCode::invalid_argument, "all_gather of " + std::to_string(mine.size()) + " bytes from each of " + std::to_string(size) +
                                               " ranks into a span of " + std::to_string(all.size()) + " bytes"};
}

template <class = Deferred>
void check_destinations(std::vector<Message> const& outgoing, int size) {
  for (Message const& message : outgoing)
    if (message.rank < 0 || message.rank >= size)
      throw Error{ErrorCode::invalid_argument,
                  "exchange with rank " + std::to_string(message.rank) + ", but the ranks are 0 to " + std::to_string(size - 1)};
}

/// "rank 3", "ranks 2 and 3", "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more".
template <class = Deferred>
std::string name_ranks(std::span<int const> ranks) {
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
