// SPDX-License-Identifier: Apache-2.0
#pragma once
// Ranks that speak over NCCL, or over anything that has its calls: which calls these are is the parameter, so that what is done with them is the same code with GPUs
// and without, and is tested where there are none. nccl.hpp has the real ones.
//
// Way         Host bytes are copied to a pinned mirror, from there to a buffer on the device, through a collective operation into the same buffer, and back. One round
//             moves what fits the buffer; larger payloads go in rounds. The buffer is the only device memory that the library ever allocates.
// Order       Copies and collectives go into the one stream that was given, after what is in it. The host waits for the end of each round, so nothing is left in the
//             stream when an operation returns.
// Waiting     Calls that wait inside the driver for a stream or a device would hang with a collective that hangs, and are not used: an event is recorded, and asked for
//             in turn with the state of the communicator. A call of a nonblocking communicator that is "in progress" is asked for in the same way; until it has
//             ended nothing may follow it into the stream, because it is not there yet.
// Steps       barrier, exchange, split and the destructor of a split group begin with a gather of one record per rank that says what the rank is doing. Ranks that do
//             different things there get one Error, at once, that names them. NCCL itself hangs when calls do not fit.
// Exchange    All ranks gather how many bytes each sends to whom. From this both sides of a pair know, with no further word, how much of its row of bytes travels in
//             each round: half of the buffer by the number of partners that the sender, or the receiver, has. Only pairs with something to send connect.
//             (Cost: 16 bytes per rank for each partner of the rank that sends to most, gathered; so exchange is for traffic where most pairs have none.)
// Deadline    It measures a round: time in which not all ranks have done their part of it, nor what was in the stream before has ended. NCCL has no second channel by
//             which a rank that works could say so, hence progress() is heard by nobody: the deadline must be longer than the longest work of a rank
//             between two operations. A rank that comes after others have given up may still find their part of the operation done, and throws in its next one.
// Failure     At the deadline, or on an error of NCCL or the device, the object is poisoned: every later call throws the same Error at once. Each rank finds out by itself.
//             Event, buffer and mirror are left alone for ever then, because a kernel may still write to them. Who owns the communicator has to abort it.

#include <dcp/base/config.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/comm/agree.hpp>
#include <dcp/comm/communicator.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace dcp {

struct NcclOptions {
  std::chrono::milliseconds deadline = default_deadline;   // for each round of an operation; see NcclComm
  std::size_t buffer_bytes = std::size_t{1} << 20;         // on the device, and as many pinned on the host. Where ranks differ, the smallest is used; 64 per rank are the least
};

namespace detail {

// The calls. A status of 0 is success; handles are small values, and a Comm{} is none.
template <class A>
concept NcclCalls = std::copyable<A> && requires(A& api, typename A::Comm comm, typename A::Comm* made, typename A::Stream stream, typename A::Event event, typename A::Event& new_event, void* to,
                                                 void const* from, void*& memory, std::size_t bytes, int& number) {
  // The device
  { api.current(number) } -> std::same_as<int>;
  { api.use(0) } -> std::same_as<int>;
  { api.allocate(memory, bytes) } -> std::same_as<int>;
  { api.free(to) } -> std::same_as<int>;
  { api.allocate_pinned(memory, bytes) } -> std::same_as<int>;
  { api.free_pinned(to) } -> std::same_as<int>;
  { api.create_event(new_event) } -> std::same_as<int>;
  { api.destroy_event(event) } -> std::same_as<int>;
  { api.record(event, stream) } -> std::same_as<int>;
  { api.query(event) } -> std::same_as<int>;
  { api.is_not_ready(0) } -> std::same_as<bool>;
  { api.copy_in(to, from, bytes, stream) } -> std::same_as<int>;    // from the mirror
  { api.copy_out(to, from, bytes, stream) } -> std::same_as<int>;   // to the mirror
  { api.forget_error() };
  { api.device_words(0) } -> std::convertible_to<std::string>;
  // The communicator
  { api.rank(comm, number) } -> std::same_as<int>;
  { api.size(comm, number) } -> std::same_as<int>;
  { api.device(comm, number) } -> std::same_as<int>;
  { api.async_error(comm, number) } -> std::same_as<int>;
  { api.is_in_progress(0) } -> std::same_as<bool>;
  { api.all_gather(from, to, bytes, comm, stream) } -> std::same_as<int>;   // in place: from == to + rank * bytes
  { api.broadcast(to, bytes, 0, comm, stream) } -> std::same_as<int>;       // in place
  { api.group_start() } -> std::same_as<int>;
  { api.group_end() } -> std::same_as<int>;
  { api.send(from, bytes, 0, comm, stream) } -> std::same_as<int>;
  { api.receive(to, bytes, 0, comm, stream) } -> std::same_as<int>;
  { api.split(comm, 0, 0, made) } -> std::same_as<int>;   // may write *made later, while the state of comm is "in progress"
  { api.finalize(comm) } -> std::same_as<int>;
  { api.destroy(comm) } -> std::same_as<int>;
  { api.abort(comm) } -> std::same_as<int>;
  { api.comm_words(0, comm) } -> std::convertible_to<std::string>;
};

/// What one rank sends to one other in an exchange, as a row of bytes: each message after its size. Frees the messages as it goes.
class NcclOutgoing {
 public:
  template <class = Deferred>
  explicit NcclOutgoing(std::span<Message> messages) : messages_{messages} {
    for (Message const& message : messages_) total_ += sizeof(std::uint64_t) + message.bytes.size();
  }
  std::uint64_t size() const { return total_; }

  /// The next into.size() bytes of the row.
  template <class = Deferred>
  void take(ByteSpan into) {
    while (!into.empty()) {
      Message& message = messages_.front();
      std::uint64_t const size = message.bytes.size();
      auto const part = at_ < sizeof size ? std::as_bytes(std::span{&size, 1}).subspan(at_) : ConstByteSpan{message.bytes}.subspan(at_ - sizeof size);
      auto const count = std::min(part.size(), into.size());
      std::ranges::copy(part.first(count), into.begin());
      into = into.subspan(count);
      at_ += count;
      if (at_ < sizeof size + size) continue;
      message.bytes = Bytes{};
      messages_ = messages_.subspan(1);
      at_ = 0;
    }
  }

 private:
  std::span<Message> messages_;
  std::uint64_t total_ = 0;
  std::size_t at_ = 0;   // in the first message and its size
};

/// The messages of such a row, as it comes in.
class NcclIncoming {
 public:
  template <class = Deferred>
  void give(ConstByteSpan from) {
    while (!from.empty()) {
      if (have_ < size_.size()) {
        auto const count = std::min(size_.size() - have_, from.size());
        std::ranges::copy(from.first(count), size_.begin() + static_cast<std::ptrdiff_t>(have_));
        have_ += count;
        from = from.subspan(count);
        if (have_ < size_.size()) return;
        std::uint64_t size = 0;
        std::memcpy(&size, size_.data(), sizeof size);
        messages_.emplace_back(static_cast<std::size_t>(size));
        filled_ = 0;
      }
      Bytes& bytes = messages_.back();
      auto const count = std::min(bytes.size() - filled_, from.size());
      std::ranges::copy(from.first(count), bytes.begin() + static_cast<std::ptrdiff_t>(filled_));
      filled_ += count;
      from = from.subspan(count);
      if (filled_ == bytes.size()) have_ = 0;
    }
  }
  std::vector<Bytes>& messages() { return messages_; }

 private:
  std::array<std::byte, sizeof(std::uint64_t)> size_{};
  std::size_t have_ = 0, filled_ = 0;
  std::vector<Bytes> messages_;
};

/// Out of sight, and never destroyed.
template <class T>
void keep_for_ever(std::unique_ptr<T> object) {
  struct Kept {
    Mutex mutex;
    std::vector<T*> objects;
  };
  static auto& kept = *new Kept;
  std::lock_guard const lock{kept.mutex};
  kept.objects.push_back(object.release());
}

/// What a rank is in. The first three move bytes without a record.
enum class NcclStep : std::uint64_t { begin = 0x6463'7001, broadcast, all_gather, barrier, exchange, split, close };

/// A communicator with what it needs on the device. Stays where it is.
template <NcclCalls Api>
class NcclGroup {
 public:
  using Comm = typename Api::Comm;
  using Stream = typename Api::Stream;
  using Event = typename Api::Event;

  /// `stuck` counts, over a communicator and all that were split from it, those whose work may never end.
  NcclGroup(Api api, Stream stream, NcclOptions options, std::shared_ptr<Atomic<int>> stuck, bool owner)
      : api_{std::move(api)}, stream_{stream}, deadline_{bounded_deadline(options.deadline)}, buffer_bytes_{options.buffer_bytes}, stuck_{std::move(stuck)}, owner_{owner} {}
  NcclGroup(NcclGroup const&) = delete;
  NcclGroup& operator=(NcclGroup const&) = delete;
  ~NcclGroup() { close(); }

  int rank() const { return rank_; }
  int size() const { return size_; }

  /// Not collective. Everything that is needed of the device and can fail on one rank alone.
  void prepare(Comm comm) {
    comm_ = comm;
    poll([] { return true; });
    check_nccl(api_.rank(comm_, rank_), "ncclCommUserRank");
    check_nccl(api_.size(comm_, size_), "ncclCommCount");
    int ordinal = 0;
    check_nccl(api_.device(comm_, ordinal), "ncclCommCuDevice");
    ordinal_ = ordinal;
    OnDevice const here{*this};
    auto const bytes = static_cast<std::size_t>(round_up(std::max<std::uint64_t>(buffer_bytes_, std::uint64_t{64} * ranks()), 64));
    void* memory = nullptr;
    check_device(api_.allocate(memory, bytes), "the buffer of NcclComm, " + std::to_string(bytes) + " bytes on the device");
    device_ = static_cast<std::byte*>(memory);
    check_device(api_.allocate_pinned(memory, bytes), "the mirror of NcclComm's buffer, " + std::to_string(bytes) + " pinned bytes on the host");
    mirror_ = ByteSpan{static_cast<std::byte*>(memory), bytes};
    check_device(api_.create_event(event_), "an event");
    has_event_ = true;
    buffer_bytes_ = bytes;
  }

  /// Collective. Rounds are cut by the size of the buffer, so all ranks must have the same one.
  void begin() {
    run(NcclStep::begin, [&] {
      for (Record const& record : meet(buffer_bytes_, 0)) buffer_bytes_ = std::min(buffer_bytes_, static_cast<std::size_t>(record.a));
    });
  }

  void barrier() {
    run(NcclStep::barrier, [&] { static_cast<void>(meet(0, 0)); });
  }

  void broadcast(ByteSpan bytes, int root) {
    run(NcclStep::broadcast, [&] {
      for (std::size_t at = 0; at < bytes.size();) {
        auto const part = bytes.subspan(at, std::min(buffer_bytes_, bytes.size() - at));
        if (rank_ == root) copy_in(0, part);
        called(api_.broadcast(device_, part.size(), root, comm_, stream_), "ncclBroadcast");
        if (rank_ != root) copy_out(0, part.size());
        finish();
        if (rank_ != root) std::ranges::copy(mirror_.first(part.size()), part.begin());
        at += part.size();
      }
    });
  }

  void all_gather(ConstByteSpan mine, ByteSpan all) {
    run(NcclStep::all_gather, [&] {
      gather(mine, [&](std::size_t at, std::size_t width) {
        for (std::size_t i = 0; i < ranks(); ++i) std::ranges::copy(mirror_.subspan(i * width, width), all.subspan(i * mine.size() + at, width).begin());
      });
    });
  }

  std::vector<Message> exchange(std::vector<Message> outgoing) {
    return run(NcclStep::exchange, [&] { return exchange_rows(outgoing); });
  }

  /// Collective. Without prepare(), so that what fails of that on one rank can be agreed on.
  std::unique_ptr<NcclGroup> split(int color, int key, Stream stream) {
    return run(NcclStep::split, [&] {
      auto const wishes = meet(static_cast<std::uint64_t>(static_cast<std::int64_t>(color)), static_cast<std::uint64_t>(static_cast<std::int64_t>(key)));
      // NCCL wants colors that are not negative; keys are made plain as well.
      std::map<std::uint64_t, int> colors;
      for (Record const& wish : wishes) colors.emplace(wish.a, static_cast<int>(colors.size()));
      int place = 0;
      for (std::size_t i = 0; i < wishes.size(); ++i) {
        auto const theirs = static_cast<std::int64_t>(wishes[i].b);
        if (wishes[i].a == wishes[me()].a && (theirs < key || (theirs == key && i < me()))) ++place;
      }
      auto made = std::make_unique<NcclGroup>(api_, stream, NcclOptions{deadline_, buffer_bytes_}, stuck_, true);
      int const status = api_.split(comm_, colors.at(wishes[me()].a), place, &made->comm_);
      try {
        called(status, "ncclCommSplit");
      } catch (...) {
        if (api_.is_in_progress(status)) keep_for_ever(std::move(made));   // the handle may still be written
        throw;
      }
      if (made->comm_ == Comm{}) throw Error{ErrorCode::rank_failed, "ncclCommSplit made no communicator"};
      return made;
    });
  }
  Comm native() const { return comm_; }
  /// The destructor need not wait for the other ranks: they are known not to come.
  void abandon() { abandoned_ = true; }

 private:
  // One per rank, gathered.
  struct Record {
    NcclStep step;
    std::uint64_t count, a, b;
  };
  struct Row {
    std::uint64_t to, bytes;
  };
  static constexpr std::uint64_t nobody = ~std::uint64_t{0};

  std::size_t ranks() const { return static_cast<std::size_t>(size_); }
  std::size_t me() const { return static_cast<std::size_t>(rank_); }

  static char const* name_of(NcclStep step) {
    switch (step) {
      case NcclStep::begin: return "the constructor of NcclComm";
      case NcclStep::broadcast: return "broadcast";
      case NcclStep::all_gather: return "all_gather";
      case NcclStep::barrier: return "barrier";
      case NcclStep::exchange: return "exchange";
      case NcclStep::split: return "split";
      case NcclStep::close: return "the destructor of NcclComm";
    }
    return "something else";
  }

  // The device of the communicator is current while this lives.
  class OnDevice {
   public:
    explicit OnDevice(NcclGroup& group) : group_{group} {
      if (group_.ordinal_ < 0) return;
      group_.check_device(group_.api_.current(before_), "to say which device is current");
      if (before_ == group_.ordinal_) before_ = -1;
      else group_.check_device(group_.api_.use(group_.ordinal_), "to make device " + std::to_string(group_.ordinal_) + " current");
    }
    OnDevice(OnDevice const&) = delete;
    OnDevice& operator=(OnDevice const&) = delete;
    ~OnDevice() {
      if (before_ >= 0) static_cast<void>(group_.api_.use(before_));
    }

   private:
    NcclGroup& group_;
    int before_ = -1;
  };

  void check_device(int status, std::string const& what) {
    if (status == 0) return;
    api_.forget_error();   // which would else be reported to the program, by a call of its own
    throw Error{ErrorCode::device, "the device refused " + what + ": " + std::string{api_.device_words(status)}};
  }
  void check_nccl(int status, char const* call) {
    if (status != 0) throw Error{ErrorCode::rank_failed, std::string{call} + " failed in " + name_of(step_) + ": " + std::string{api_.comm_words(status, comm_)}};
  }

  template <class Body>
  auto run(NcclStep step, Body body) -> std::invoke_result_t<Body> {
    if (poison_) throw *poison_;
    step_ = step;
    ++count_;
    try {
      OnDevice const here{*this};
      return body();
    } catch (...) {
      poison_ = current_error();
      if (busy_) ++*stuck_;
    }
    auto const code = poison_->code();
    if (code != ErrorCode::timeout && code != ErrorCode::rank_failed && code != ErrorCode::ranks_disagree) poison_->with_rank(rank_, size_);
    poison_->with_hint(owner_ ? "this communicator was made by split: destroy it, which aborts it. The one that it was split from can be used again if it has not failed as well"
                              : "the owner of the ncclComm_t has to end it with ncclCommAbort (or ncclCommRevoke, where NCCL has it), on all ranks, and to make a new one; the device "
                                "memory of this NcclComm is not given back, because a kernel may still write to it");
    throw *poison_;
  }

  /// Asks until `done` says so and the communicator is at rest.
  template <class Done>
  void poll(Done done) {
    auto const begin = SteadyClock::now();
    for (int turn = 0;; ++turn) {
      bool const ended = done();
      int state = 0;
      check_nccl(api_.async_error(comm_, state), "ncclCommGetAsyncError");
      bool const at_rest = state == 0;
      if (!at_rest && !api_.is_in_progress(state))
        throw Error{ErrorCode::rank_failed, std::string{name_of(step_)} + " cannot end: " + std::string{api_.comm_words(state, comm_)}};
      // In this order: kernels that NCCL has ended because of an error let the event come, too.
      if (ended && at_rest) return;
      if (turn < 64) {
        this_thread::yield();
        continue;
      }
      auto const waited = SteadyClock::now() - begin;
      if (waited >= deadline_)
        throw Error{ErrorCode::timeout, std::string{name_of(step_)} + " has not ended within " + std::to_string(deadline_.count()) +
                                            " ms: a rank has failed, has not come to it or calls something else, or what was in the stream before has not ended"};
      // Short at first: a round takes a fraction of a millisecond when all ranks are there.
      this_thread::sleep_for(std::clamp<std::chrono::nanoseconds>(waited / 8, std::chrono::microseconds{5}, std::chrono::milliseconds{2}));
    }
  }
  /// After a call that a nonblocking communicator may still be doing.
  void called(int status, char const* call) {
    if (status != 0 && !api_.is_in_progress(status)) check_nccl(status, call);
    if (status != 0) poll([] { return true; });
  }

  /// `bytes` to place `at` of the buffer.
  void copy_in(std::size_t at, ConstByteSpan bytes) {
    std::ranges::copy(bytes, mirror_.subspan(at).begin());
    enter(at, bytes.size());
  }
  void enter(std::size_t at, std::size_t bytes) {
    busy_ = true;   // also if this call fails: who knows what it has begun
    check_device(api_.copy_in(device_ + at, mirror_.data() + at, bytes, stream_), "a copy to the device");
  }
  void copy_out(std::size_t at, std::size_t bytes) {
    busy_ = true;
    check_device(api_.copy_out(mirror_.data() + at, device_ + at, bytes, stream_), "a copy from the device");
  }
  /// All that is in the stream has ended.
  void finish() {
    check_device(api_.record(event_, stream_), "to record an event in the stream");
    poll([&] {
      int const status = api_.query(event_);
      if (status != 0 && !api_.is_not_ready(status)) check_device(status, std::string{"the work of "} + name_of(step_));
      return status == 0;
    });
    busy_ = false;
  }

  /// Everyone's `mine`, in rounds. visit(at, width): everyone's bytes [at, at + width) are at the front of the mirror, in rank order.
  template <class Visit>
  void gather(ConstByteSpan mine, Visit visit) {
    auto const slab = static_cast<std::size_t>(round_down(buffer_bytes_ / ranks(), 16));
    for (std::size_t at = 0; at < mine.size();) {
      auto const width = std::min(slab, mine.size() - at);
      copy_in(me() * width, mine.subspan(at, width));
      called(api_.all_gather(device_ + me() * width, device_, width, comm_, stream_), "ncclAllGather");
      copy_out(0, width * ranks());
      finish();
      visit(at, width);
      at += width;
    }
  }

  /// Everyone's record, once all are known to be in the same step.
  std::vector<Record> meet(std::uint64_t a, std::uint64_t b) {
    Record const mine{step_, count_, a, b};
    std::vector<Record> all(ranks());
    gather(std::as_bytes(std::span{&mine, 1}), [&](std::size_t at, std::size_t width) {
      for (std::size_t i = 0; i < ranks(); ++i) std::memcpy(reinterpret_cast<std::byte*>(&all[i]) + at, mirror_.data() + i * width, width);
    });
    auto const differs = [&](Record const& one) { return one.step != all[0].step || one.count != all[0].count; };
    auto const other = std::ranges::find_if(all, differs);
    if (other == all.end()) return all;
    auto const closed = std::ranges::find(all, NcclStep::close, &Record::step);
    if (closed != all.end()) {
      auto const who = static_cast<int>(closed - all.begin());
      throw Error{ErrorCode::rank_failed, "rank " + std::to_string(who) + " destroyed its communicator, and other ranks wait for it in a collective operation"}.with_rank(who, size_);
    }
    auto const who = static_cast<int>(other - all.begin());
    throw Error{ErrorCode::ranks_disagree, "rank " + std::to_string(who) + " calls " + name_of(other->step) + " as operation " + std::to_string(other->count) + " of its communicator, but rank 0 calls " +
                                               name_of(all[0].step) + " as operation " + std::to_string(all[0].count)}
        .with_rank(who, size_);
  }

  // One partner of an exchange: `quota` of its `bytes` travel in each round, until all have.
  struct Partner {
    int rank;
    std::uint64_t bytes;
    std::size_t quota = 0, place = 0, now = 0;   // place: in the buffer, in this round
    std::uint64_t done = 0;
  };
  /// Places for this round in the half of the buffer that begins at `at`; the end of what is used.
  static std::size_t lay_out(std::vector<Partner>& partners, std::size_t at) {
    std::size_t end = at;
    for (Partner& partner : partners) {
      partner.now = static_cast<std::size_t>(std::min<std::uint64_t>(partner.quota, partner.bytes - partner.done));
      partner.place = at;
      if (partner.now == 0) continue;
      end = at + partner.now;
      at += partner.quota;
    }
    return end;
  }

  std::vector<Message> exchange_rows(std::vector<Message>& outgoing) {
    std::ranges::stable_sort(outgoing, {}, &Message::rank);
    std::vector<Message> own;
    std::vector<Partner> to, from;
    std::vector<NcclOutgoing> sends;
    std::vector<Row> rows;
    for (std::size_t i = 0; i < outgoing.size();) {
      std::size_t const first = i;
      int const rank = outgoing[first].rank;
      while (i < outgoing.size() && outgoing[i].rank == rank) ++i;
      auto const messages = std::span{outgoing}.subspan(first, i - first);
      if (rank == rank_) {
        for (Message& message : messages) own.push_back(std::move(message));
        continue;
      }
      sends.emplace_back(messages);
      to.push_back({rank, sends.back().size()});
      rows.push_back({static_cast<std::uint64_t>(rank), sends.back().size()});
    }

    std::vector<std::uint64_t> partners_to(ranks()), partners_from(ranks());   // how many each rank sends to, and receives from
    auto const records = meet(rows.size(), 0);
    std::uint64_t most = 0;
    for (std::size_t i = 0; i < ranks(); ++i) {
      partners_to[i] = records[i].a;
      most = std::max(most, records[i].a);
    }
    rows.resize(static_cast<std::size_t>(most), Row{nobody, 0});
    gather(std::as_bytes(std::span{rows}), [&](std::size_t, std::size_t width) {
      for (std::size_t i = 0; i < ranks(); ++i)
        for (std::size_t at = 0; at < width; at += sizeof(Row)) {
          Row row;
          std::memcpy(&row, mirror_.data() + i * width + at, sizeof row);
          if (row.to == nobody) continue;
          if (row.to >= ranks()) throw Error{ErrorCode::ranks_disagree, "rank " + std::to_string(i) + " says in exchange that it sends to rank " + std::to_string(row.to)};
          ++partners_from[static_cast<std::size_t>(row.to)];
          if (row.to == me()) from.push_back({static_cast<int>(i), row.bytes});
        }
    });
    // In rounds of the gather, a rank's rows come apart: one per sender still, but not in order.
    std::ranges::sort(from, {}, &Partner::rank);
    std::vector<NcclIncoming> receives(from.size());

    std::size_t const half = static_cast<std::size_t>(round_down(buffer_bytes_ / 2, 16));
    auto const quota = [&](std::size_t sender, std::size_t receiver) {
      return static_cast<std::size_t>(round_down(half / std::max(partners_to[sender], partners_from[receiver]), 16));
    };
    for (Partner& partner : to) partner.quota = quota(me(), static_cast<std::size_t>(partner.rank));
    for (Partner& partner : from) partner.quota = quota(static_cast<std::size_t>(partner.rank), me());
    for (;;) {
      auto const send_end = lay_out(to, 0), receive_end = lay_out(from, half);
      if (send_end == 0 && receive_end == half) break;
      for (std::size_t i = 0; i < to.size(); ++i) sends[i].take(mirror_.subspan(to[i].place, to[i].now));
      if (send_end > 0) enter(0, send_end);
      send_and_receive(to, from);
      if (receive_end > half) copy_out(half, receive_end - half);
      finish();
      for (std::size_t i = 0; i < from.size(); ++i) receives[i].give(mirror_.subspan(from[i].place, from[i].now));
      for (auto* side : {&to, &from})
        for (Partner& partner : *side) partner.done += partner.now;
    }

    std::vector<Message> incoming;
    auto const add_own = [&] {
      for (Message& message : own) incoming.push_back(std::move(message));
      own.clear();
    };
    for (std::size_t i = 0; i < from.size(); ++i) {
      if (from[i].rank > rank_) add_own();
      for (Bytes& bytes : receives[i].messages()) incoming.push_back({from[i].rank, std::move(bytes)});
    }
    add_own();
    return incoming;
  }

  void send_and_receive(std::vector<Partner> const& to, std::vector<Partner> const& from) {
    busy_ = true;
    check_nccl(api_.group_start(), "ncclGroupStart");
    int status = 0;
    char const* call = "";
    auto const add = [&](int result, char const* name) {
      if (status != 0 || result == 0 || api_.is_in_progress(result)) return;
      status = result;
      call = name;
    };
    for (Partner const& partner : to)
      if (partner.now > 0 && status == 0) add(api_.send(device_ + partner.place, partner.now, partner.rank, comm_, stream_), "ncclSend");
    for (Partner const& partner : from)
      if (partner.now > 0 && status == 0) add(api_.receive(device_ + partner.place, partner.now, partner.rank, comm_, stream_), "ncclRecv");
    // Also after a failure: an open group would swallow the program's own calls, its ncclCommAbort among them.
    int const ended = api_.group_end();
    check_nccl(status, call);
    called(ended, "ncclGroupEnd");
  }

  void close() noexcept try {
    bool const has_memory = device_ != nullptr || !mirror_.empty() || has_event_;
    if (owner_ && comm_ != Comm{}) end_communicator();
    if (busy_ || *stuck_ > 0 || !has_memory) return;   // freeing memory of the device waits for all of its work, also that which never ends
    OnDevice const here{*this};
    if (has_event_) static_cast<void>(api_.destroy_event(event_));
    if (!mirror_.empty()) static_cast<void>(api_.free_pinned(mirror_.data()));
    if (device_ != nullptr) static_cast<void>(api_.free(device_));
  } catch (...) {   // the device is gone; so is what was on it
  }

  /// Ends a communicator of our own. NCCL's own end waits for the other ranks without a deadline, so it is called when they are known to have come.
  void end_communicator() {
    if (!poison_ && !abandoned_ && has_event_ && *stuck_ == 0) try {
        deadline_ = std::min<std::chrono::milliseconds>(deadline_, std::chrono::seconds{5});
        run(NcclStep::close, [&] {
          static_cast<void>(meet(0, 0));
          called(api_.finalize(comm_), "ncclCommFinalize");
        });
        static_cast<void>(api_.destroy(comm_));
        return;
      } catch (...) {   // the others have not come: aborted, which needs none of them
      }
    static_cast<void>(api_.abort(comm_));
    if (poison_ && busy_) --*stuck_;
  }

  Api api_;
  Comm comm_{};   // of a group made by split: written by the call that makes it, possibly later
  Stream stream_;
  std::chrono::milliseconds deadline_;
  std::size_t buffer_bytes_;
  std::shared_ptr<Atomic<int>> stuck_;
  bool owner_, abandoned_ = false;
  int rank_ = 0, size_ = 1, ordinal_ = -1;
  std::byte* device_ = nullptr;
  ByteSpan mirror_;
  Event event_{};
  bool has_event_ = false;
  NcclStep step_ = NcclStep::begin;
  std::uint64_t count_ = 0;
  bool busy_ = false;   // something of ours is in the stream that is not known to have ended
  std::optional<Error> poison_;
};

}  // namespace detail

/// The ranks of a communicator of `Api`; see NcclComm in nccl.hpp, which is the one for programs.
template <detail::NcclCalls Api>
class BasicNcclComm {
 public:
  using Comm = typename Api::Comm;
  using Stream = typename Api::Stream;

  explicit BasicNcclComm(Comm comm, Stream stream, NcclOptions options = {}, Api api = {})
      : group_{std::make_unique<Group>(std::move(api), stream, options, std::make_shared<detail::Atomic<int>>(0), false)} {
    if (comm == Comm{}) throw Error{ErrorCode::invalid_argument, "an NcclComm of no ncclComm_t"};
    group_->prepare(comm);
    group_->begin();
    stream_ = stream;
  }

  BasicNcclComm(BasicNcclComm&&) noexcept = default;
  BasicNcclComm& operator=(BasicNcclComm&&) noexcept = default;

  int rank() const { return group_->rank(); }
  int size() const { return group_->size(); }
  void barrier() { group_->barrier(); }
  void broadcast(ByteSpan bytes, int root) {
    detail::check_root(root, size());
    group_->broadcast(bytes, root);
  }
  void all_gather(ConstByteSpan mine, ByteSpan all) {
    detail::check_all_gather(mine, all, size());
    group_->all_gather(mine, all);
  }
  std::vector<Message> exchange(std::vector<Message> outgoing) {
    detail::check_destinations(outgoing, size());
    return group_->exchange(std::move(outgoing));
  }
  BasicNcclComm split(int color, int key) { return split(color, key, stream_); }
  BasicNcclComm split(int color, int key, Stream stream) {
    BasicNcclComm part{group_->split(color, key, stream), stream};
    try {
      agree(*this, "split", [&] { part.group_->prepare(part.group_->native()); });
    } catch (...) {
      part.group_->abandon();
      throw;
    }
    return part;
  }
  void progress() {}   // nobody could hear it; see nccl_protocol.hpp

 private:
  using Group = detail::NcclGroup<Api>;
  BasicNcclComm(std::unique_ptr<Group> group, Stream stream) : group_{std::move(group)}, stream_{stream} {}

  std::unique_ptr<Group> group_;
  Stream stream_{};
};

}  // namespace dcp
