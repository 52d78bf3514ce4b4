// SPDX-License-Identifier: Apache-2.0
#pragma once
// A toolkit for devices that are not there, with the semantics of CUDA's, made so that whoever forgets to wait is found out:
//
//   memory      of a device is out of the host's reach: a host that touches what allocate() gave out dies. What was freed stays so, and a copy of it fails
//   streams     do nothing by themselves. Work is done when somebody waits for it, in the order of streams and events, and all other work later. So what
//               is not told to come after a kernel comes before it, and what is not waited for has not happened
//   copies      read and write when they are done, not when they are put into a stream; but from and to pageable memory as CUDA says
//   events      are not ready a few times, by a seeded number, before they are
//   errors      stay with the thread, as the program would see them, until forget_error(); in a stream they stay for ever

#include "support/simulated_memory.hpp"
#include "support/simulated_work.hpp"

#include <dcp/base/bytes.hpp>
#include <dcp/device/decode_elements.hpp>
#include <dcp/device/streams.hpp>

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>

namespace dcp::test {

/// Models detail::StreamApi. Thread-safe.
///
/// Example   auto const api = std::make_shared<SimulatedApi>(2);   // devices
///           auto const stream = api->create_user_stream(1);
///           std::byte* const tensor = api->allocate(1, 1024);
///           api->fill(stream, tensor, 1024, std::byte{7});        // a kernel that nobody has waited for
///           auto const driver = std::make_shared<detail::StreamDriver<SimulatedApi>>(api);
///           auto const filled = driver->record(1, api->handle(stream));
class SimulatedApi {
 public:
  struct Stream {
    std::uint64_t id = 0;   // 0: the legacy stream of the device that is current
  };
  struct Event {
    std::uint64_t id = 0;
  };
  static constexpr int success = 0, invalid_value = 1, no_memory = 2, lost_device = 46, no_device = 101, invalid_handle = 400, not_ready = SimulatedWork::not_ready, illegal_address = 700;

  /// Work that nobody has waited for when it is destroyed is never done; drain() before does it.
  explicit SimulatedApi(int devices = 2, std::uint64_t seed = 1) : devices_{devices}, random_{seed}, last_id_{static_cast<std::uint64_t>(devices)}, work_{devices, lost_device} {}

  // --- what StreamApi asks for. fail() and calls() know these by their names.
  std::string_view name() const { return "simulated device"; }
  int where(void const* address, MemoryPlace& place) {
    return call("where", [&] {
      auto const* const part = memory_.find(address);
      place = part == nullptr ? MemoryPlace{} : part->place;
      return part != nullptr && work_.lost(place.ordinal) ? lost_device : success;
    });
  }
  int enter(int ordinal) {
    return call("enter", [&] {
      if (ordinal < 0 || ordinal >= devices_) return no_device;
      if (work_.lost(ordinal)) return lost_device;
      contexts_.insert(ordinal);
      auto const thread = std::this_thread::get_id();
      entered_[thread].push_back(current_device());
      current_[thread] = ordinal;
      return success;
    });
  }
  int leave() {
    return call("leave", [&] {
      auto& before = entered_[std::this_thread::get_id()];
      if (before.empty()) return no_device;
      current_[std::this_thread::get_id()] = before.back();
      before.pop_back();
      return success;
    });
  }
  int create_stream(Stream& stream) {
    return call("create_stream", [&] {
      if (work_.lost(current_device())) return lost_device;
      stream = add_stream(current_device(), true, false);
      return success;
    });
  }
  /// The work in it is done later all the same.
  int destroy_stream(Stream stream) {
    return call("destroy_stream", [&] {
      Queue* const queue = find(stream);
      if (queue == nullptr || stream.id == 0) return invalid_handle;
      queue->destroyed = true;
      return work_.lost(queue->ordinal) ? lost_device : success;
    });
  }
  int create_event(Event& event) {
    return call("create_event", [&] {
      if (work_.lost(current_device())) return lost_device;
      event.id = ++last_id_;
      events_[event.id].ordinal = current_device();
      return success;
    });
  }
  int destroy_event(Event event) {
    return call("destroy_event", [&] { return events_.erase(event.id) == 0 ? invalid_handle : success; });
  }
  int record(Event event, Stream stream) {
    return call("record", [&] {
      Queue* const queue = find(stream);
      auto const known = events_.find(event.id);
      if (queue == nullptr || known == events_.end() || known->second.ordinal != queue->ordinal) return invalid_handle;
      if (int const status = usable(*queue); status != success) return status;
      known->second.point = work_.put(*queue, [] { return success; });
      known->second.patience = static_cast<int>(random_() % 4);
      return success;
    });
  }
  /// For what the event stands for at the moment; nothing, if it was never recorded. Both may belong to different devices.
  int wait(Stream stream, Event event) {
    return call("wait", [&] {
      Queue* const queue = find(stream);
      auto const known = events_.find(event.id);
      if (queue == nullptr || known == events_.end()) return invalid_handle;
      if (work_.lost(queue->ordinal)) return lost_device;
      if (known->second.point) work_.put(*queue, [] { return success; }, known->second.point);
      return success;
    });
  }
  int query(Event event) {
    return call("query", [&] {
      auto const known = events_.find(event.id);
      if (known == events_.end()) return invalid_handle;
      if (work_.lost(known->second.ordinal)) return lost_device;
      if (!known->second.point) return success;
      if (known->second.patience > 0) return --known->second.patience, not_ready;
      return work_.advance(known->second.point);
    });
  }
  bool is_not_ready(int status) const { return status == not_ready; }
  int copy(void* to, void const* from, std::size_t bytes, Stream stream) {
    return call("copy", [&] { return put_copy({static_cast<std::byte*>(to), bytes, static_cast<std::byte const*>(from), bytes, bytes, 1}, stream); });
  }
  int copy_rows(void* to, std::size_t to_pitch, void const* from, std::size_t from_pitch, std::size_t bytes, std::size_t rows, Stream stream) {
    return call("copy_rows", [&] {
      if (to_pitch < bytes || from_pitch < bytes) return invalid_value;
      return put_copy({static_cast<std::byte*>(to), to_pitch, static_cast<std::byte const*>(from), from_pitch, bytes, rows}, stream);
    });
  }
  /// What threads of a device would do, one after the other.
  int decode(DeviceDecode const& work, Stream stream, bool& has_kernel) {
    return call("decode", [&] {
      has_kernel = decodes_;
      if (!has_kernel) return success;
      Queue* const queue = find(stream);
      if (queue == nullptr) return invalid_handle;
      if (int const status = usable(*queue); status != success) return status;
      work_.put(*queue, [this, work] { return run(work); });
      return success;
    });
  }
  int allocate_pinned(void*& address, std::size_t bytes) {
    return call("allocate_pinned", [&] {
      if (work_.lost(current_device())) return lost_device;
      if (bytes > pinned_limit_ - std::min(pinned_, pinned_limit_)) return no_memory;
      address = memory_.allocate(bytes, {MemoryKind::pinned, current_device()});
      pinned_ += bytes;
      return success;
    });
  }
  int free_pinned(void* address) {
    return call("free_pinned", [&] {
      auto* const part = memory_.owned(address);
      if (part == nullptr || part->place.kind != MemoryKind::pinned) return invalid_value;
      pinned_ -= part->bytes;
      memory_.free(*part);
      return success;
    });
  }
  void forget_error() {
    locked([&] { last_errors_.erase(std::this_thread::get_id()); });
  }
  std::string words(int status) const { return status == illegal_address ? "illegal address (700)" : status == lost_device ? "the device is gone (46)" : "status " + std::to_string(status); }
  Stream stream_of(void* handle) const { return {reinterpret_cast<std::uintptr_t>(handle)}; }

  // --- the program: its memory
  std::byte* allocate(int ordinal, std::size_t bytes) {
    return locked([&] { return memory_.allocate(bytes, {MemoryKind::device, ordinal}); });
  }
  std::byte* allocate_shared(int ordinal, std::size_t bytes) {
    return locked([&] { return memory_.allocate(bytes, {MemoryKind::shared, ordinal}); });
  }
  /// Waits for nothing, as an allocator that keeps memory for the next one: work that comes too late fails.
  void free(std::byte* address) {
    locked([&] {
      auto* const part = memory_.owned(address);
      if (part == nullptr) throw std::logic_error{"SimulatedApi: not to be freed"};
      memory_.free(*part);
    });
  }
  /// At once, and not in any stream's order.
  void write(std::byte* address, ConstByteSpan bytes) {
    locked([&] { std::memcpy(memory_.reach(address, bytes.size()), bytes.data(), bytes.size()); });
  }
  Bytes read(std::byte const* address, std::size_t bytes) {
    return locked([&] {
      std::byte const* const at = memory_.reach(address, bytes);
      return Bytes(at, at + bytes);
    });
  }

  // --- the program: its streams, and which device is current to this thread
  /// `blocking`: takes part in the order of the legacy stream.
  Stream create_user_stream(int ordinal, bool blocking = true) {
    return locked([&] { return add_stream(ordinal, false, blocking); });
  }
  Stream legacy_stream(int ordinal) const { return {SimulatedWork::legacy(ordinal)}; }
  /// What the library is given.
  void* handle(Stream stream) const {
    bool const legacy = stream.id <= SimulatedWork::legacy(devices_ - 1);
    return legacy ? nullptr : reinterpret_cast<void*>(static_cast<std::uintptr_t>(stream.id));
  }
  void make_current(int ordinal) {
    locked([&] { current_[std::this_thread::get_id()] = ordinal; });
  }
  int current_ordinal() {
    return locked([&] { return current_device(); });
  }

  // --- the program: its kernels
  void launch(Stream stream, std::function<void()> kernel) {
    put_kernel(stream, [kernel = std::move(kernel)] { return kernel(), success; });
  }
  void fill(Stream stream, std::byte* address, std::size_t bytes, std::byte pattern) { write_later(stream, address, Bytes(bytes, pattern)); }
  void write_later(Stream stream, std::byte* address, Bytes bytes) {
    put_kernel(stream, [this, address, bytes = std::move(bytes)] {
      if (!memory_.inside(address, bytes.size())) return illegal_address;
      return write(address, bytes), success;
    });
  }
  /// What comes after it is not ready this many times more.
  void delay(Stream stream, int times) { put_kernel(stream, [] { return success; }, times); }
  /// What comes after it is not done before release().
  void hold(Stream stream) { put_kernel(stream, [] { return success; }, 0, true); }
  void release(Stream stream) {
    std::lock_guard const lock{mutex_};
    work_.release(known(stream));
    released_.notify_all();
  }

  // --- the program waits
  /// The status of the work. Throws if that is held.
  int synchronize(Stream stream) {
    std::lock_guard const lock{mutex_};
    int const status = work_.advance(known(stream).last, true);
    if (status == not_ready) throw std::logic_error{"SimulatedApi: waits for ever"};
    return status;
  }
  /// Does all that is not held, of all streams: what a library has put there and not waited for happens here.
  void drain() {
    locked([&] { work_.drain(); });
  }

  // --- what goes wrong
  /// The `nth` next call of that name (1 is the next) has this status and does nothing. "transfer" is a copy when it is done: it stops in the middle, and its
  /// stream keeps the status; "run" is a kernel that decodes, when it is run.
  void fail(std::string const& call, int nth, int status) {
    locked([&] { failures_[call] = {nth, status}; });
  }
  void fail_nothing() {
    locked([&] { failures_.clear(); });
  }
  void lose(int ordinal) {
    locked([&] { work_.lose(ordinal); });
  }
  void limit_pinned(std::size_t bytes) {
    locked([&] { pinned_limit_ = bytes; });
  }
  /// Whether it has kernels that decode.
  void decodes(bool has_kernels) {
    locked([&] { decodes_ = has_kernels; });
  }
  /// From now on one call in so many also does some work that nobody has waited for, as real devices do; 0: none.
  void eager(unsigned one_in) {
    locked([&] { eager_ = one_in; });
  }

  // --- what has been
  int calls(std::string const& call) const {
    return locked([&] { return calls_.contains(call) ? calls_.at(call) : 0; });
  }
  std::size_t pinned_bytes() const {
    return locked([&] { return pinned_; });
  }
  /// Devices that enter() has made current.
  std::set<int> contexts() const {
    return locked([&] { return contexts_; });
  }
  /// Of create_stream() and create_event(), not destroyed yet.
  int streams() const {
    return locked([&] { return work_.library_queues(); });
  }
  int events() const {
    return locked([&] { return static_cast<int>(events_.size()); });
  }
  /// Operations that have not been done.
  std::size_t pending() const {
    return locked([&] { return work_.pending(); });
  }
  /// What a call of the program's, in this thread, would be told of errors of the library's.
  int last_error() const {
    return locked([&] {
      auto const error = last_errors_.find(std::this_thread::get_id());
      return error == last_errors_.end() ? success : error->second;
    });
  }

 private:
  using Op = SimulatedWork::Op;
  using Queue = SimulatedWork::Queue;
  struct Recorded {
    int ordinal = 0;
    std::shared_ptr<Op> point = nullptr;
    int patience = 0;
  };
  struct Copy {
    std::byte* to;
    std::size_t to_pitch;
    std::byte const* from;
    std::size_t from_pitch, bytes, rows;
  };
  struct Failure {
    int countdown, status;
  };

  template <class Body>
  std::invoke_result_t<Body&> locked(Body body) const {
    std::lock_guard const lock{mutex_};
    return body();
  }
  template <class Body>
  int call(std::string const& name, Body body) {
    std::lock_guard const lock{mutex_};
    ++calls_[name];
    if (eager_ != 0 && random_() % eager_ == 0) work_.advance_one_of_all(random_());
    int status = injected(name);
    if (status == success) status = body();
    if (status != success) last_errors_[std::this_thread::get_id()] = status;
    return status;
  }
  int injected(std::string const& name) {
    auto const failure = failures_.find(name);
    if (failure == failures_.end() || --failure->second.countdown > 0) return success;
    int const status = failure->second.status;
    failures_.erase(failure);
    return status;
  }
  int current_device() { return current_[std::this_thread::get_id()]; }

  // --- streams
  Stream add_stream(int ordinal, bool library, bool blocking) {
    work_.add(++last_id_, ordinal, library, blocking);
    return {last_id_};
  }
  Queue* find(Stream stream) { return work_.find(stream.id == 0 ? SimulatedWork::legacy(current_device()) : stream.id); }
  Queue& known(Stream stream) {
    Queue* const queue = find(stream);
    return queue == nullptr ? throw std::logic_error{"SimulatedApi: no such stream"} : *queue;
  }
  int usable(Queue const& queue) {
    if (work_.lost(queue.ordinal)) return lost_device;
    if (queue.ordinal != current_device()) return invalid_handle;
    return queue.last && queue.last->done ? queue.last->status : success;
  }
  void put_kernel(Stream stream, std::function<int()> work, int delay = 0, bool held = false) {
    locked([&] { work_.put(known(stream), std::move(work), nullptr, delay, held); });
  }

  // --- copies
  int put_copy(Copy copy, Stream stream) {
    Queue* const queue = find(stream);
    if (queue == nullptr) return invalid_handle;
    if (int const status = usable(*queue); status != success) return status;
    if (copy.bytes == 0 || copy.rows == 0) return success;
    std::size_t const last = copy.rows - 1;
    if (!memory_.inside(copy.to, last * copy.to_pitch + copy.bytes) || !memory_.inside(copy.from, last * copy.from_pitch + copy.bytes)) return invalid_value;
    bool const from_pageable = memory_.find(copy.from) == nullptr, to_pageable = memory_.find(copy.to) == nullptr;
    Bytes staged;
    if (from_pageable) {
      staged.resize(copy.bytes * copy.rows);
      for (std::size_t row = 0; row < copy.rows; ++row) std::memcpy(staged.data() + row * copy.bytes, copy.from + row * copy.from_pitch, copy.bytes);
      copy.from_pitch = copy.bytes;
    }
    auto const op = work_.put(*queue, [this, copy, from_pageable, staged = std::move(staged)]() mutable {
      if (from_pageable) copy.from = staged.data();
      return transfer(copy);
    });
    if (!to_pageable) return success;
    int status = 0;
    while ((status = work_.advance(op, true)) == not_ready) released_.wait(mutex_);
    return status;
  }
  int transfer(Copy const& copy) {
    std::size_t const last = copy.rows - 1;
    if (!memory_.inside(copy.to, last * copy.to_pitch + copy.bytes) || !memory_.inside(copy.from, last * copy.from_pitch + copy.bytes)) return illegal_address;   // freed since
    int const status = injected("transfer");
    std::size_t left = copy.bytes * copy.rows / (status == success ? 1 : 2);
    for (std::size_t row = 0; left != 0; ++row) {
      std::size_t const part = std::min(left, copy.bytes);
      std::memmove(memory_.reach(copy.to + row * copy.to_pitch, part), memory_.reach(copy.from + row * copy.from_pitch, part), part);
      left -= part;
    }
    return status;
  }

  // --- kernels that decode
  int run(DeviceDecode work) {
    auto const pinned = [&](std::byte const* at, std::uint64_t bytes) {
      auto const* const part = memory_.find(at);
      return part != nullptr && part->place.kind == MemoryKind::pinned && memory_.inside(at, static_cast<std::size_t>(bytes));
    };
    if (int const status = injected("run"); status != success) return status;
    if (!pinned(work.codes, work.code_bytes) || !pinned(work.scales, work.scale_bytes)) return illegal_address;
    // What the threads write lies between these, as strides may be negative.
    std::ptrdiff_t first = 0, last = 0;
    for (auto const* axis : {&work.planes, &work.rows, &work.columns}) {
      std::ptrdiff_t const end = (static_cast<std::ptrdiff_t>(axis->count) - 1) * axis->values * (work.value == DeviceDecode::Values::float32 ? 4 : 2);
      (end < 0 ? first : last) += end;
    }
    std::byte* const begin = work.values + first;
    auto const* const part = memory_.find(begin);
    if (part == nullptr || part->place.kind != MemoryKind::device || !memory_.inside(begin, static_cast<std::size_t>(last - first))) return illegal_address;
    work.values = memory_.reach(begin, static_cast<std::size_t>(last - first)) - first;
    detail::with_decode_run(work, [&](auto type) {
      using Run = typename decltype(type)::type;
      auto const grid = detail::DecodeGrid::of<Run>(work);
      for (std::uint32_t y = 0; y < grid.blocks_down * grid.down; ++y)
        for (std::uint32_t x = 0; x < grid.blocks_across * grid.across; ++x) detail::decode_thread<Run>(work, grid, x, y);
      return true;
    });
    return success;
  }

  mutable std::recursive_mutex mutex_;   // kernels of tests call, too
  std::condition_variable_any released_;
  int const devices_;
  std::mt19937_64 random_;
  std::uint64_t last_id_;   // those of the legacy streams come first
  SimulatedMemory memory_;
  SimulatedWork work_;
  std::map<std::uint64_t, Recorded> events_;
  std::map<std::thread::id, int> current_, last_errors_;
  std::map<std::thread::id, std::vector<int>> entered_;   // what was current before
  std::map<std::string, int> calls_;
  std::map<std::string, Failure> failures_;
  std::set<int> contexts_;
  std::size_t pinned_ = 0, pinned_limit_ = SIZE_MAX;
  unsigned eager_ = 0;
  bool decodes_ = false;
};

static_assert(dcp::detail::StreamApi<SimulatedApi> && dcp::detail::DecodingApi<SimulatedApi>);

}  // namespace dcp::test
