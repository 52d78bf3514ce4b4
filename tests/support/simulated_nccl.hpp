// SPDX-License-Identifier: Apache-2.0
#pragma once
// The calls of nccl_protocol.hpp without a GPU: ranks are threads, streams are queues that go on only when their rank asks (so that everything ends late), device memory
// has addresses that the host cannot touch. What NCCL does not promise does not happen here:
//
//   a collective ends after all ranks have the same one at the head of their streams, and some polls later; ones that do not fit never end
//   a nonblocking communicator puts an operation into the stream some polls after the call
//   a call that would hang or break something in earnest (freeing memory while the device works, a copy to a stream that an operation has not reached yet) is a violation
//
// Any call can be made to fail, a communicator to report an error, a rank to die.

#include <dcp/comm/nccl_protocol.hpp>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

namespace dcp::test {

class SimulatedNccl {
 public:
  static constexpr int in_progress = 7, remote_error = 6, internal_error = 3, not_ready = 600, device_error = 700;

  struct Comm;
  struct Event {
    bool done = true;
  };
  struct Part {
    bool send;
    int peer;
    std::byte* memory;
    std::size_t bytes;
    bool matched = false;
  };
  struct Op {
    enum Kind { copy, event, work, collective, group } kind = copy;
    std::byte* to = nullptr;
    std::byte const* from = nullptr;
    std::size_t bytes = 0;
    int root = -1;   // of a broadcast; all_gather has none
    Event* recorded = nullptr;
    bool released = false;
    Comm* comm = nullptr;
    std::vector<Part> parts;
    std::size_t slot = 0;
    bool arrived = false, matched = false;
    int polls = 0;
  };
  struct Stream {
    int rank = 0;
    std::deque<std::shared_ptr<Op>> ops;
    Comm* late = nullptr;   // that has an operation which is not in this stream yet
  };
  // What all ranks of a communicator share.
  struct Group {
    std::vector<int> world_ranks;
    std::vector<bool> left;
    std::vector<std::map<int, std::shared_ptr<Op>>> slots;                                                  // collectives, in order
    std::map<std::pair<int, int>, std::pair<std::deque<std::pair<std::shared_ptr<Op>, std::size_t>>, std::deque<std::pair<std::shared_ptr<Op>, std::size_t>>>> mail;   // sends, receives
    struct Wish {
      int color, key;
    };
    std::vector<std::map<int, Wish>> splits;
    std::vector<std::map<int, std::pair<std::shared_ptr<Group>, int>>> made;
    std::size_t finalized = 0;
  };
  struct Comm {
    std::shared_ptr<Group> group;
    int rank = 0;
    bool alive = true, finalized = false;
    int error = 0;
    std::size_t collectives = 0, splits = 0;
    int polls = 0;   // until what a nonblocking communicator does has been done
    std::shared_ptr<Op> late;
    Stream* late_in = nullptr;
    Comm** made = nullptr;
    bool finalizing = false;
  };
  struct Rank {
    int current = 0, depth = 0;
    std::size_t calls = 0, fail_in = 0;   // fail_in: calls of fail_name until the one that fails; 0 when none is to, or it has
    std::string fail_name;
    int group_error = 0;
    std::vector<Part> parts;
    Comm* group_comm = nullptr;
    Stream* group_stream = nullptr;
    Comm* world = nullptr;
    Stream* stream = nullptr;
    bool gone = false;
    std::map<std::string, int> live, made;   // "device", "pinned", "event", "communicator"
  };

  // What the protocol gets.
  struct Api {
    using Comm = SimulatedNccl::Comm*;
    using Stream = SimulatedNccl::Stream*;
    using Event = SimulatedNccl::Event*;
    SimulatedNccl* nccl = nullptr;
    int me = 0;

    int current(int& ordinal) {
      return nccl->call(me, "current", device_error, [&](Rank& rank) { return ordinal = rank.current, 0; });
    }
    int use(int ordinal) {
      return nccl->call(me, "use", device_error, [&](Rank& rank) { return rank.current = ordinal, 0; });
    }
    int allocate(void*& memory, std::size_t bytes) {
      return nccl->call(me, "allocate", device_error, [&](Rank&) { return memory = nccl->new_memory(me, bytes, true), 0; });
    }
    int free(void* memory) {
      return nccl->call(me, "free", device_error, [&](Rank&) { return nccl->free_memory(me, memory, "device"), 0; });
    }
    int allocate_pinned(void*& memory, std::size_t bytes) {
      return nccl->call(me, "allocate_pinned", device_error, [&](Rank&) { return memory = nccl->new_memory(me, bytes, false), 0; });
    }
    int free_pinned(void* memory) {
      return nccl->call(me, "free_pinned", device_error, [&](Rank&) { return nccl->free_memory(me, memory, "pinned"), 0; });
    }
    int create_event(Event& event) {
      return nccl->call(me, "create_event", device_error, [&](Rank& rank) {
        event = &nccl->events_.emplace_back();
        ++rank.live["event"];
        return 0;
      });
    }
    int destroy_event(Event) {
      return nccl->call(me, "destroy_event", device_error, [&](Rank& rank) { return --rank.live["event"], 0; });
    }
    int record(Event event, Stream stream) {
      return nccl->call(me, "record", device_error, [&](Rank&) {
        event->done = false;
        Op op;
        op.kind = Op::event;
        op.recorded = event;
        return nccl->push(me, stream, std::move(op));
      });
    }
    int query(Event event) {
      return nccl->call(me, "query", device_error, [&](Rank&) {
        for (auto& stream : nccl->streams_)
          if (stream.rank == me) nccl->advance(stream);
        return event->done ? 0 : not_ready;
      });
    }
    bool is_not_ready(int status) { return status == not_ready; }
    int copy_in(void* to, void const* from, std::size_t bytes, Stream stream) {
      return nccl->call(me, "copy_in", device_error, [&](Rank&) { return nccl->copy(me, nccl->real(to, bytes, true), nccl->real(from, bytes, false), bytes, stream); });
    }
    int copy_out(void* to, void const* from, std::size_t bytes, Stream stream) {
      return nccl->call(me, "copy_out", device_error, [&](Rank&) { return nccl->copy(me, nccl->real(to, bytes, false), nccl->real(from, bytes, true), bytes, stream); });
    }
    void forget_error() {}
    std::string device_words(int status) { return "simulated device error " + std::to_string(status); }

    int rank(Comm comm, int& number) {
      return nccl->call(me, "rank", internal_error, [&](Rank&) { return number = nccl->alive(comm)->rank, 0; });
    }
    int size(Comm comm, int& number) {
      return nccl->call(me, "size", internal_error, [&](Rank&) { return number = static_cast<int>(nccl->alive(comm)->group->world_ranks.size()), 0; });
    }
    int device(Comm comm, int& number) {
      return nccl->call(me, "device", internal_error, [&](Rank&) { return nccl->alive(comm), number = me + 1, 0; });
    }
    int async_error(Comm comm, int& status) {
      return nccl->call(me, "async_error", internal_error, [&](Rank&) { return status = nccl->state(me, *nccl->alive(comm)), 0; });
    }
    bool is_in_progress(int status) { return status == in_progress; }
    int all_gather(void const* from, void* to, std::size_t bytes, Comm comm, Stream stream) {
      return nccl->call(me, "all_gather", internal_error, [&](Rank& rank) {
        auto const ranks = nccl->alive(comm)->group->world_ranks.size();
        Op op;
        op.to = nccl->real(to, bytes * ranks, true);
        op.from = nccl->real(from, bytes, true);
        op.bytes = bytes;
        nccl->hold(op.from == op.to + static_cast<std::size_t>(comm->rank) * bytes && rank.depth == 0, "all_gather is in place and in no group");
        return nccl->operation(me, std::move(op), Op::collective, *comm, stream);
      });
    }
    int broadcast(void* memory, std::size_t bytes, int root, Comm comm, Stream stream) {
      return nccl->call(me, "broadcast", internal_error, [&](Rank& rank) {
        Op op;
        op.to = nccl->real(memory, bytes, true);
        op.bytes = bytes;
        op.root = root;
        nccl->hold(rank.depth == 0, "broadcast is in no group");
        return nccl->operation(me, std::move(op), Op::collective, *nccl->alive(comm), stream);
      });
    }
    int group_start() {
      return nccl->call(me, "group_start", internal_error, [&](Rank& rank) { return ++rank.depth, 0; });
    }
    int group_end() {
      int const status = nccl->call(me, "group_end", internal_error, [&](Rank& rank) {
        if (rank.group_error != 0 || rank.parts.empty()) return rank.group_error;
        Op op;
        op.parts = rank.parts;
        return nccl->operation(me, std::move(op), Op::group, *rank.group_comm, rank.group_stream);
      });
      std::lock_guard const lock{nccl->mutex_};
      Rank& rank = nccl->ranks_[static_cast<std::size_t>(me)];
      nccl->hold(rank.depth == 1, "a group that ends has begun");
      rank.depth = 0;
      rank.group_error = 0;
      rank.parts.clear();
      return status;
    }
    int send(void const* from, std::size_t bytes, int peer, Comm comm, Stream stream) { return part("send", true, peer, const_cast<void*>(from), bytes, comm, stream); }
    int receive(void* to, std::size_t bytes, int peer, Comm comm, Stream stream) { return part("receive", false, peer, to, bytes, comm, stream); }
    int split(Comm comm, int color, int key, Comm* made) {
      return nccl->call(me, "split", internal_error, [&](Rank&) { return nccl->split(me, *nccl->alive(comm), color, key, made); });
    }
    int finalize(Comm comm) {
      return nccl->call(me, "finalize", internal_error, [&](Rank&) { return nccl->finalize(me, *nccl->alive(comm)); });
    }
    int destroy(Comm comm) {
      return nccl->call(me, "destroy", internal_error, [&](Rank& rank) {
        nccl->hold(nccl->alive(comm)->finalized, "a communicator is finalized before it is destroyed");
        comm->alive = false;
        --rank.live["communicator"];
        return 0;
      });
    }
    int abort(Comm comm) {
      return nccl->call(me, "abort", internal_error, [&](Rank& rank) { return nccl->abort(rank, *nccl->alive(comm)), 0; });
    }
    std::string comm_words(int status, Comm) { return "simulated NCCL error " + std::to_string(status); }

   private:
    int part(char const* name, bool send, int peer, void* memory, std::size_t bytes, Comm comm, Stream stream) {
      return nccl->call(me, name, internal_error, [&](Rank& rank) {
        nccl->hold(rank.depth == 1 && bytes > 0 && peer != nccl->alive(comm)->rank, "sends and receives are in a group, of some bytes, and to others");
        rank.parts.push_back({send, peer, nccl->real(memory, bytes, true), bytes});
        rank.group_comm = comm;
        rank.group_stream = stream;
        return nccl->nonblocking_ ? in_progress : 0;
      });
    }
  };

  explicit SimulatedNccl(int ranks, bool nonblocking = false, int delay = 3) : nonblocking_{nonblocking}, delay_{delay}, ranks_(static_cast<std::size_t>(ranks)) {
    for (int rank = 0; rank < ranks; ++rank) {
      auto& mine = ranks_[static_cast<std::size_t>(rank)];
      mine.stream = new_stream(rank);
    }
    new_world();
  }
  SimulatedNccl(SimulatedNccl const&) = delete;
  SimulatedNccl& operator=(SimulatedNccl const&) = delete;

  /// A communicator of all ranks, for comm() to return.
  void new_world() {
    std::lock_guard const lock{mutex_};
    auto const group = std::make_shared<Group>();
    for (std::size_t rank = 0; rank < ranks_.size(); ++rank) group->world_ranks.push_back(static_cast<int>(rank));
    group->left.resize(ranks_.size());
    for (std::size_t rank = 0; rank < ranks_.size(); ++rank) ranks_[rank].world = new_comm(group, static_cast<int>(rank));
  }
  Stream* new_stream(int rank) {
    std::lock_guard const lock{mutex_};
    streams_.emplace_back().rank = rank;
    return &streams_.back();
  }
  Api api(int rank) { return {this, rank}; }
  Comm* comm(int rank) { return at(rank).world; }
  Stream* stream(int rank) { return at(rank).stream; }

  // Faults.
  void fail_call(int rank, std::string name, std::size_t number) {
    std::lock_guard const lock{mutex_};
    at(rank).fail_name = std::move(name);
    at(rank).fail_in = number;
  }
  void report_error(int rank, int error) {
    std::lock_guard const lock{mutex_};
    at(rank).world->error = error;
  }
  /// Others that wait for it in NCCL get a remote error.
  void die(int rank) {
    std::lock_guard const lock{mutex_};
    at(rank).gone = true;
    changed_.notify_all();
  }
  /// What the owner of the communicator does after an Error.
  void abort_world(int rank) {
    std::lock_guard const lock{mutex_};
    abort(at(rank), *at(rank).world);
  }
  /// Work of the program, in its stream until it is released.
  std::shared_ptr<Op> add_work(int rank) {
    std::lock_guard const lock{mutex_};
    auto op = std::make_shared<Op>();
    op->kind = Op::work;
    at(rank).stream->ops.push_back(op);
    return op;
  }
  void release(Op& work) {
    std::lock_guard const lock{mutex_};
    work.released = true;
  }

  // What happened.
  std::size_t calls(int rank) {
    std::lock_guard const lock{mutex_};
    return at(rank).calls;
  }
  bool has_failed(int rank) {
    std::lock_guard const lock{mutex_};
    return at(rank).fail_in == 0;
  }
  int live(int rank, std::string const& kind) {
    std::lock_guard const lock{mutex_};
    return at(rank).live[kind];
  }
  int made(int rank, std::string const& kind) {
    std::lock_guard const lock{mutex_};
    return at(rank).made[kind];
  }
  int current_device(int rank) { return at(rank).current; }
  bool in_group(int rank) { return at(rank).depth > 0; }
  std::string violations() {
    std::lock_guard const lock{mutex_};
    return violations_;
  }

 private:
  // Addresses of device memory: real ones, where no processor has memory.
  static constexpr std::uintptr_t far = std::uintptr_t{1} << 62;
  struct Memory {
    std::unique_ptr<std::byte[]> bytes;
    std::size_t size;
    bool device;
    bool live = true;
  };

  Rank& at(int rank) { return ranks_[static_cast<std::size_t>(rank)]; }
  void hold(bool holds, char const* sentence) {
    if (!holds) violations_ += std::string{"not so: "} + sentence + "\n";
  }

  template <class Body>
  int call(int me, char const* name, int failure, Body body) {
    std::unique_lock lock{mutex_};
    lock_ = &lock;
    Rank& rank = at(me);
    ++rank.calls;
    if (rank.fail_in > 0 && rank.fail_name == name && --rank.fail_in == 0) {
      if (rank.depth > 0) rank.group_error = failure;
      return failure;
    }
    return body(rank);
  }

  void* new_memory(int me, std::size_t bytes, bool device) {
    memories_.push_back({std::make_unique<std::byte[]>(bytes), bytes, device});
    char const* const kind = device ? "device" : "pinned";
    ++at(me).live[kind];
    ++at(me).made[kind];
    if (device) hold(at(me).current == me + 1, "device memory is on the device of the communicator");
    auto const address = reinterpret_cast<std::uintptr_t>(memories_.back().bytes.get());
    return reinterpret_cast<void*>(device ? address + far : address);
  }
  void free_memory(int me, void* memory, char const* kind) {
    for (Stream const& stream : streams_)
      if (stream.rank == me) hold(stream.ops.empty(), "memory is given back when the device has nothing to do, else that would hang");
    auto address = reinterpret_cast<std::uintptr_t>(memory);
    if (std::string{kind} == "device") address -= far;
    for (Memory& one : memories_)
      if (reinterpret_cast<std::uintptr_t>(one.bytes.get()) == address && one.live) {
        one.live = false;
        --at(me).live[kind];
        return;
      }
    hold(false, "memory that is given back was allocated");
  }
  std::byte* real(void const* memory, std::size_t bytes, bool device) {
    auto const address = reinterpret_cast<std::uintptr_t>(memory) - (device ? far : 0);
    for (Memory& one : memories_) {
      auto const begin = reinterpret_cast<std::uintptr_t>(one.bytes.get());
      if (one.live && one.device == device && begin <= address && address + bytes <= begin + one.size) return one.bytes.get() + (address - begin);
    }
    hold(false, "operations are of memory that is there");
    std::abort();
  }

  Comm* new_comm(std::shared_ptr<Group> group, int rank) {
    auto const world_rank = group->world_ranks[static_cast<std::size_t>(rank)];
    Comm& comm = comms_.emplace_back();
    comm.group = std::move(group);
    comm.rank = rank;
    comm.polls = nonblocking_ ? delay_ : 0;
    ++at(world_rank).live["communicator"];
    return &comm;
  }
  Comm* alive(Comm* comm) {
    hold(comm != nullptr && comm->alive, "a communicator that is used has not been ended");
    return comm;
  }

  int push(int me, Stream* stream, Op op) {
    hold(stream != nullptr && stream->rank == me, "only the stream that was given is used");
    hold(at(me).current == me + 1, "the device of the communicator is current");
    hold(stream->late == nullptr, "nothing goes into a stream that an operation before it has not reached yet");
    stream->ops.push_back(std::make_shared<Op>(std::move(op)));
    return 0;
  }
  int copy(int me, std::byte* to, std::byte const* from, std::size_t bytes, Stream* stream) {
    Op op;
    op.to = to;
    op.from = from;
    op.bytes = bytes;
    return push(me, stream, std::move(op));
  }
  int operation(int me, Op op, Op::Kind kind, Comm& comm, Stream* stream) {
    op.kind = kind;
    op.comm = &comm;
    hold(comm.polls == 0, "an operation begins when the one before is in the stream");
    if (!nonblocking_) return push(me, stream, std::move(op));
    hold(stream->late == nullptr, "operations go into a stream one after the other");
    comm.late = std::make_shared<Op>(std::move(op));
    comm.late_in = stream;
    comm.polls = delay_;
    stream->late = &comm;
    return in_progress;
  }

  void advance(Stream& stream) {
    while (!stream.ops.empty()) {
      auto const op = stream.ops.front();
      if (op->kind == Op::copy) std::memcpy(op->to, op->from, op->bytes);
      if (op->kind == Op::event) op->recorded->done = true;
      if (op->kind == Op::work && !op->released) return;
      if (op->kind == Op::collective || op->kind == Op::group) {
        if (!op->arrived) arrive(op);
        if (!op->matched || --op->polls >= 0) return;
      }
      stream.ops.pop_front();
    }
  }
  void arrive(std::shared_ptr<Op> const& op) {
    op->arrived = true;
    op->polls = delay_;
    Comm& comm = *op->comm;
    Group& group = *comm.group;
    if (op->kind == Op::group) return post(op, comm, group);
    op->slot = comm.collectives++;
    if (group.slots.size() <= op->slot) group.slots.resize(op->slot + 1);
    auto& slot = group.slots[op->slot];
    slot[comm.rank] = op;
    if (slot.size() < group.world_ranks.size()) return;
    for (auto const& [rank, other] : slot)
      if (other->bytes != op->bytes || other->root != op->root) return;   // never ends
    for (auto& [rank, other] : slot) {
      if (op->root < 0)
        for (auto const& [from, sender] : slot) std::memmove(other->to + static_cast<std::size_t>(from) * op->bytes, sender->to + static_cast<std::size_t>(from) * op->bytes, op->bytes);
      else std::memmove(other->to, slot.at(op->root)->to, op->bytes);
      other->matched = true;
    }
  }
  void post(std::shared_ptr<Op> const& op, Comm& comm, Group& group) {
    for (std::size_t i = 0; i < op->parts.size(); ++i) {
      Part const& part = op->parts[i];
      auto& [sends, receives] = group.mail[part.send ? std::pair{comm.rank, part.peer} : std::pair{part.peer, comm.rank}];
      (part.send ? sends : receives).push_back({op, i});
      while (!sends.empty() && !receives.empty()) {
        Part& from = sends.front().first->parts[sends.front().second];
        Part& to = receives.front().first->parts[receives.front().second];
        if (from.bytes != to.bytes) break;   // never ends
        std::memcpy(to.memory, from.memory, from.bytes);
        from.matched = to.matched = true;
        for (auto const& one : {sends.front().first, receives.front().first})
          one->matched = std::all_of(one->parts.begin(), one->parts.end(), [](Part const& p) { return p.matched; });
        sends.pop_front();
        receives.pop_front();
      }
    }
  }

  bool gone(Group const& group, std::size_t rank) const { return group.left[rank] || ranks_[static_cast<std::size_t>(group.world_ranks[rank])].gone; }
  bool any_gone(Group const& group) const {
    for (std::size_t i = 0; i < group.left.size(); ++i)
      if (gone(group, i)) return true;
    return false;
  }
  /// Waits for a rank that will never come.
  bool in_vain(Op const& op) {
    if (!op.arrived || op.matched) return false;
    Group const& group = *op.comm->group;
    if (op.kind == Op::collective) {
      for (std::size_t i = 0; i < group.left.size(); ++i)
        if (gone(group, i) && (!group.slots[op.slot].contains(static_cast<int>(i)) || group.slots[op.slot].size() == group.left.size())) return true;
      return false;
    }
    for (Part const& part : op.parts)
      if (!part.matched && gone(group, static_cast<std::size_t>(part.peer))) return true;
    return false;
  }

  int state(int me, Comm& comm) {
    if (comm.error != 0) return comm.error;
    for (auto& stream : streams_)
      if (stream.rank == me && !stream.ops.empty() && stream.ops.front()->comm == &comm && in_vain(*stream.ops.front())) return remote_error;
    if (comm.polls == 0) return 0;
    if (comm.made != nullptr) {
      if (!ready_to_split(comm)) return any_gone(*comm.group) ? remote_error : in_progress;
    }
    if (comm.finalizing && comm.group->finalized < comm.group->left.size()) return any_gone(*comm.group) ? remote_error : in_progress;
    if (--comm.polls > 0) return in_progress;
    if (comm.made != nullptr) *std::exchange(comm.made, nullptr) = part_of(comm);
    if (comm.finalizing) comm.finalized = true;
    if (comm.late) {
      comm.late_in->late = nullptr;
      comm.late_in->ops.push_back(std::exchange(comm.late, nullptr));
    }
    return 0;
  }

  bool ready_to_split(Comm const& comm) { return comm.group->splits[comm.splits - 1].size() == comm.group->left.size(); }
  Comm* part_of(Comm const& comm) {
    Group& group = *comm.group;
    if (group.made.size() < comm.splits) group.made.resize(comm.splits);
    auto& made = group.made[comm.splits - 1];
    if (made.empty()) {
      std::map<int, std::vector<std::pair<int, int>>> by_color;
      for (auto const& [rank, wish] : group.splits[comm.splits - 1]) by_color[wish.color].push_back({wish.key, rank});
      for (auto& [color, members] : by_color) {
        std::sort(members.begin(), members.end());
        auto const part = std::make_shared<Group>();
        for (auto const& [key, rank] : members) {
          made[rank] = {part, static_cast<int>(part->world_ranks.size())};
          part->world_ranks.push_back(group.world_ranks[static_cast<std::size_t>(rank)]);
        }
        part->left.resize(members.size());
      }
    }
    auto const& [part, rank] = made.at(comm.rank);
    return new_comm(part, rank);
  }
  // A blocking call waits for the others, and here not for ever.
  template <class Done>
  int wait(Group const& group, Done done) {
    auto const until = std::chrono::steady_clock::now() + std::chrono::seconds{20};
    auto& lock = *lock_;
    while (!done()) {
      if (any_gone(group)) return remote_error;
      if (changed_.wait_until(lock, until) == std::cv_status::timeout) {
        hold(false, "no call waits for ranks that do not come");
        return internal_error;
      }
    }
    return 0;
  }
  int split(int, Comm& comm, int color, int key, Comm** made) {
    hold(color >= 0, "colors are not negative");
    Group& group = *comm.group;
    if (group.splits.size() <= comm.splits) group.splits.resize(comm.splits + 1);
    group.splits[comm.splits++][comm.rank] = {color, key};
    changed_.notify_all();
    *made = nullptr;
    if (nonblocking_) {
      comm.made = made;
      comm.polls = delay_;
      return in_progress;
    }
    int const status = wait(group, [&] { return ready_to_split(comm); });
    if (status == 0) *made = part_of(comm);
    return status;
  }
  int finalize(int, Comm& comm) {
    Group& group = *comm.group;
    ++group.finalized;
    changed_.notify_all();
    if (nonblocking_) {
      comm.finalizing = true;
      comm.polls = delay_;
      return in_progress;
    }
    int const status = wait(group, [&] { return group.finalized == group.left.size(); });
    comm.finalized = status == 0;
    return status;
  }
  void abort(Rank& rank, Comm& comm) {
    hold(rank.depth == 0, "a communicator is not aborted within a group of calls");
    comm.alive = false;
    comm.group->left[static_cast<std::size_t>(comm.rank)] = true;
    --rank.live["communicator"];
    for (Stream& stream : streams_) {
      std::erase_if(stream.ops, [&](auto const& op) { return op->comm == &comm; });
      if (stream.late == &comm) stream.late = nullptr;
    }
    comm.late.reset();
    if (comm.made != nullptr) *comm.made = nullptr;   // a split that was under way comes to its end
    changed_.notify_all();
    for (Stream& stream : streams_)
      if (&at(stream.rank) == &rank) advance(stream);   // the device goes on without being asked
  }

  bool const nonblocking_;
  int const delay_;
  std::mutex mutex_;
  std::condition_variable changed_;
  static inline thread_local std::unique_lock<std::mutex>* lock_ = nullptr;
  std::vector<Rank> ranks_;
  std::deque<Memory> memories_;
  std::deque<Event> events_;
  std::deque<Stream> streams_;
  std::deque<Comm> comms_;
  std::string violations_;
};

using SimulatedNcclComm = BasicNcclComm<SimulatedNccl::Api>;

/// The communicator of a rank, as a program makes it from what it has.
inline SimulatedNcclComm communicator(SimulatedNccl& nccl, int rank, NcclOptions options = {std::chrono::seconds{60}}) {
  return SimulatedNcclComm{nccl.comm(rank), nccl.stream(rank), options, nccl.api(rank)};
}

/// Runs body(rank) on a thread per rank; a rank that throws dies. Throws the first exception.
template <class Body>
void on_simulated_ranks(SimulatedNccl& nccl, int ranks, Body body) {
  std::mutex mutex;
  std::exception_ptr first;
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank)
    threads.emplace_back([&, rank] {
      try {
        body(rank);
      } catch (...) {
        {
          std::lock_guard const lock{mutex};
          if (!first) first = std::current_exception();
        }
        nccl.die(rank);
      }
    });
  for (std::thread& thread : threads) thread.join();
  if (first) std::rethrow_exception(first);
}

}  // namespace dcp::test
