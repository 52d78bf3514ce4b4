// SPDX-License-Identifier: Apache-2.0
#pragma once
// A DeviceDriver over the calls of a toolkit with streams and events, as CUDA's: which calls these are is the parameter, so that what is done with them is the same code
// on every kind of device, and is tested where there is none.
//
//   order       by events only: a lane waits for the event that was recorded in the program's stream, and never for a device or a stream of others
//   streams     are non-blocking: nothing here takes part in the order of the legacy stream
//   waiting     asks for the event again and again; a call that waits inside the driver could not be given up
//   memory      on the device: none. On the host: two pinned buffers for each lane, pinned once; where the system does not let that be they are pageable, and
//               unpinned_bytes() says so
//   devices     only those that tensors or streams belong to are made current, and the caller's is again when a call returns

#include <dcp/base/config.hpp>
#include <dcp/device/driver.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp::detail {

// The calls. A status of 0 is success; handles are small values. copy() and copy_rows() find out by themselves on which sides they are.
template <class A>
concept StreamApi = requires(A& api, typename A::Stream stream, typename A::Event event, void* to, void const* from, std::size_t bytes, MemoryPlace& place, void*& memory, typename A::Stream& new_stream,
                             typename A::Event& new_event) {
  { api.name() } -> std::convertible_to<std::string_view>;
  { api.where(from, place) } -> std::same_as<int>;
  { api.enter(0) } -> std::same_as<int>;   // the device is current in this thread until leave(), which brings back what was, be it none; they nest
  { api.leave() } -> std::same_as<int>;
  { api.create_stream(new_stream) } -> std::same_as<int>;
  { api.destroy_stream(stream) } -> std::same_as<int>;
  { api.create_event(new_event) } -> std::same_as<int>;
  { api.destroy_event(event) } -> std::same_as<int>;
  { api.record(event, stream) } -> std::same_as<int>;
  { api.wait(stream, event) } -> std::same_as<int>;
  { api.query(event) } -> std::same_as<int>;
  { api.is_not_ready(0) } -> std::same_as<bool>;
  { api.copy(to, from, bytes, stream) } -> std::same_as<int>;
  { api.copy_rows(to, bytes, from, bytes, bytes, bytes, stream) } -> std::same_as<int>;
  { api.allocate_pinned(memory, bytes) } -> std::same_as<int>;
  { api.free_pinned(to) } -> std::same_as<int>;
  { api.forget_error() };
  { api.words(0) } -> std::convertible_to<std::string>;
  { api.stream_of(to) } -> std::same_as<typename A::Stream>;
};

// One that has kernels, too: puts the one for `work` into the stream, or says that it has none. The parts lie in pinned memory, which devices read by the host's addresses.
template <class A>
concept DecodingApi = requires(A& api, DeviceDecode const& work, typename A::Stream stream, bool& has_kernel) {
  { api.decode(work, stream, has_kernel) } -> std::same_as<int>;
};

template <StreamApi Api>
class StreamDriver final : public DeviceDriver, public std::enable_shared_from_this<StreamDriver<Api>> {
 public:
  using Stream = typename Api::Stream;
  using Event = typename Api::Event;

  /// `deadline`: how long a lane may take for what is in it.
  explicit StreamDriver(std::shared_ptr<Api> api, std::chrono::milliseconds deadline = std::chrono::minutes{10}) : api_{std::move(api)}, deadline_{deadline} {}

  std::string_view name() const override { return api_->name(); }
  MemoryPlace where(void const* address) const override {
    MemoryPlace place;
    check(api_->where(address, place), "to say where memory is");
    return place;
  }
  std::shared_ptr<DeviceEvent> record(int ordinal, void* stream) override {
    OnDevice const here{*this, ordinal};
    auto event = std::make_shared<OwnedEvent>(this->shared_from_this(), ordinal);
    check(api_->record(event->event, api_->stream_of(stream)), "to record an event in a stream");
    return event;
  }
  void order(int ordinal, void* stream, DeviceEvent const& event) override {
    OnDevice const here{*this, ordinal};
    check(api_->wait(api_->stream_of(stream), static_cast<OwnedEvent const&>(event).event), "to let a stream wait for an event");
  }
  std::shared_ptr<DeviceLane> lane(int ordinal) override {
    std::unique_ptr<Lane> lane;
    {
      std::lock_guard const lock{mutex_};
      auto const free = std::find_if(free_.begin(), free_.end(), [&](auto const& one) { return one->ordinal == ordinal; });
      if (free != free_.end()) {
        lane = std::move(*free);
        free_.erase(free);
      }
    }
    if (!lane) lane = std::make_unique<Lane>(*this, ordinal);
    // Back when its user is done with it; the driver lives as long.
    auto const give_back = [self = this->shared_from_this()](Lane* used) { self->give_back(std::unique_ptr<Lane>{used}); };
    return std::shared_ptr<Lane>{lane.release(), give_back};
  }
  std::shared_ptr<std::byte> pinned(int ordinal, std::size_t bytes) override {
    auto buffer = std::make_shared<Buffer>();
    OnDevice const here{*this, ordinal};
    allocate(*buffer, bytes);
    auto const release = [self = this->shared_from_this(), buffer, ordinal](std::byte*) {
      try {
        OnDevice const there{*self, ordinal};
        self->free(*buffer);
      } catch (...) {
        if (!buffer->pinned) self->free(*buffer);   // else it is gone with the device
      }
    };
    return {buffer->memory, release};
  }
  std::uint64_t unpinned_bytes() const override { return unpinned_; }

  Api& api() const { return *api_; }
  std::chrono::milliseconds deadline() const { return deadline_; }

 private:
  template <class = Deferred>
  [[noreturn]] void fail(int status, std::string_view what) const {
    api_->forget_error();   // which would else be reported to the program, by a call of its own
    throw Error{ErrorCode::device, std::string{name()} + " refused " + std::string{what} + ": " + api_->words(status)};
  }
  void check(int status, std::string_view what) const {
    if (status != 0) [[unlikely]] fail(status, what);
  }
  // Where nobody can do anything about a failure; the program is not told of it by a call of its own, either.
  void ignore(int status) const {
    if (status != 0) [[unlikely]] api_->forget_error();
  }
  // Memory of the host, with its device current.
  struct Buffer {
    std::byte* memory = nullptr;
    std::size_t size = 0;
    bool pinned = false;
  };
  static constexpr std::size_t alignment = 4096;
  void allocate(Buffer& buffer, std::size_t bytes) {
    void* memory = nullptr;
    buffer.pinned = api_->allocate_pinned(memory, bytes) == 0;
    if (!buffer.pinned) {
      api_->forget_error();
      memory = ::operator new(bytes, std::align_val_t{alignment});
      unpinned_ += bytes;
    }
    buffer.memory = static_cast<std::byte*>(memory);
    buffer.size = bytes;
  }
  void free(Buffer& buffer) const {
    if (buffer.memory == nullptr) return;
    if (buffer.pinned) ignore(api_->free_pinned(buffer.memory));
    else ::operator delete(buffer.memory, std::align_val_t{alignment});
    buffer = {};
  }

  // Whether the work before an event has been done.
  bool ended(Event event, std::string_view what) const {
    int const status = api_->query(event);
    if (status == 0) return true;
    if (!api_->is_not_ready(status)) fail(status, what);
    api_->forget_error();   // toolkits remember this answer as an error
    return false;
  }

  // The device is current while this lives. A thread that has none current has none afterwards: to make another one current would make a context there.
  class OnDevice {
   public:
    OnDevice(StreamDriver const& driver, int ordinal) : driver_{driver} { driver.check(driver.api_->enter(ordinal), "to make device " + std::to_string(ordinal) + " current"); }
    OnDevice(OnDevice const&) = delete;
    OnDevice& operator=(OnDevice const&) = delete;
    ~OnDevice() { driver_.ignore(driver_.api_->leave()); }

   private:
    StreamDriver const& driver_;
  };

  struct OwnedEvent final : DeviceEvent {
    OwnedEvent(std::shared_ptr<StreamDriver const> of, int on) : driver{std::move(of)}, ordinal{on} { driver->check(driver->api_->create_event(event), "an event"); }
    OwnedEvent(OwnedEvent const&) = delete;
    OwnedEvent& operator=(OwnedEvent const&) = delete;
    ~OwnedEvent() override {
      try {
        OnDevice const here{*driver, ordinal};
        driver->ignore(driver->api_->destroy_event(event));
      } catch (...) {
        // The device is gone; so is what was on it.
      }
    }
    bool done() const override {
      OnDevice const here{*driver, ordinal};
      return driver->ended(event, "the work before an event");
    }
    std::shared_ptr<StreamDriver const> driver;
    int ordinal;
    Event event{};
  };

  class Lane final : public DeviceLane {
   public:
    Lane(StreamDriver& of, int on) : ordinal{on}, driver_{of} {
      OnDevice const here{driver_, ordinal};
      driver_.check(driver_.api_->create_stream(stream_), "a stream");
      if (int const status = driver_.api_->create_event(end_); status != 0) {
        driver_.ignore(driver_.api_->destroy_stream(stream_));
        driver_.fail(status, "an event");
      }
    }
    Lane(Lane const&) = delete;
    Lane& operator=(Lane const&) = delete;
    /// Only where its work has ended.
    ~Lane() override {
      try {
        OnDevice const here{driver_, ordinal};
        for (auto& buffer : buffers_) driver_.free(buffer);
        driver_.ignore(driver_.api_->destroy_event(end_));
        driver_.ignore(driver_.api_->destroy_stream(stream_));
      } catch (...) {
        // The device is gone; so is what was on it.
        for (auto& buffer : buffers_)
          if (!buffer.pinned) driver_.free(buffer);
      }
    }

    void after(DeviceEvent const& event) override {
      OnDevice const here{driver_, ordinal};
      waits_ = true;   // whoever has the lane next would wait, too
      driver_.check(driver_.api_->wait(stream_, static_cast<OwnedEvent const&>(event).event), "to let a stream wait for an event");
    }
    std::shared_ptr<DeviceEvent> mark() override {
      OnDevice const here{driver_, ordinal};
      auto event = std::make_shared<OwnedEvent>(driver_.shared_from_this(), ordinal);
      driver_.check(driver_.api_->record(event->event, stream_), "to record an event in a stream");
      return event;
    }
    void copy(std::byte* to, std::size_t to_pitch, std::byte const* from, std::size_t from_pitch, std::size_t bytes, std::size_t rows) override {
      if (bytes == 0 || rows == 0) return;
      OnDevice const here{driver_, ordinal};
      copies_ = true;
      bool const one = rows == 1 || (to_pitch == bytes && from_pitch == bytes);
      int const status = one ? driver_.api_->copy(to, from, bytes * rows, stream_) : driver_.api_->copy_rows(to, to_pitch, from, from_pitch, bytes, rows, stream_);
      if (status != 0) {
        broken_ = true;
        driver_.fail(status, "a copy");   // those before it may still run
      }
    }
    bool decode([[maybe_unused]] DeviceDecode const& work) override {
      if constexpr (DecodingApi<Api>) {
        auto const pinned = [&](std::byte const* at, std::uint64_t bytes) {
          return std::any_of(buffers_.begin(), buffers_.end(), [&](Buffer const& buffer) { return buffer.pinned && at >= buffer.memory && at < buffer.memory + buffer.size && bytes <= static_cast<std::uint64_t>(buffer.memory + buffer.size - at); });
        };
        if (!pinned(work.codes, work.code_bytes) || !pinned(work.scales, work.scale_bytes)) return false;
        OnDevice const here{driver_, ordinal};
        bool const before = std::exchange(copies_, true);
        bool has_kernel = false;
        int const status = driver_.api_->decode(work, stream_, has_kernel);
        if (status != 0) {
          broken_ = true;
          driver_.fail(status, "a kernel that decodes");
        }
        if (!has_kernel) copies_ = before;
        return has_kernel;
      } else {
        return false;
      }
    }
    void finish() override {
      if (ended()) return;
      try {
        OnDevice const here{driver_, ordinal};
        driver_.check(driver_.api_->record(end_, stream_), "to record an event in a stream");
        auto const begin = SteadyClock::now();
        for (int asked = 0;; ++asked) {
          if (driver_.ended(end_, "copies")) break;
          if (asked < 64) continue;
          auto const waited = SteadyClock::now() - begin;
          if (waited > driver_.deadline_) throw Error{ErrorCode::timeout, std::string{driver_.name()} + ": copies have not ended after " + std::to_string(driver_.deadline_.count()) + " ms; what they come after in the program's stream may not have, either"};
          // Short at first: a copy of some MiB takes a fraction of a millisecond.
          this_thread::sleep_for(std::clamp<std::chrono::nanoseconds>(waited / 8, std::chrono::microseconds{5}, std::chrono::milliseconds{2}));
        }
      } catch (...) {
        broken_ = given_up_ = true;
        throw;
      }
      copies_ = waits_ = false;
    }
    ByteSpan buffer(int which, std::size_t bytes) override {
      Buffer& buffer = buffers_[static_cast<std::size_t>(which)];
      if (buffer.size < bytes) {
        if (copies_) finish();   // what is being copied from it
        OnDevice const here{driver_, ordinal};
        driver_.free(buffer);
        driver_.allocate(buffer, bytes);
      }
      return {buffer.memory, bytes};
    }

    bool ended() const { return !copies_ && !waits_; }
    bool broken() const { return broken_; }
    bool given_up() const { return given_up_; }
    int const ordinal;
    Lane* kept_before = nullptr;

   private:
    StreamDriver& driver_;
    Stream stream_{};
    Event end_{};
    std::array<Buffer, 2> buffers_;
    bool copies_ = false, waits_ = false;   // that are not known to have ended
    bool broken_ = false, given_up_ = false;
  };

  void give_back(std::unique_ptr<Lane> lane) {
    try {
      if (!lane->given_up()) lane->finish();   // its user may have failed in between
    } catch (...) {
    }
    if (!lane->ended()) return keep(lane.release());
    if (lane->broken()) return;
    try {
      std::lock_guard const lock{mutex_};
      free_.push_back(std::move(lane));
    } catch (std::bad_alloc const&) {
      // Then the next user makes one.
    }
  }
  // The work may still run: what that touches stays for ever, and whoever looks for leaks finds it here.
  static void keep(Lane* lane) { lane->kept_before = kept_.exchange(lane); }
  inline static Atomic<Lane*> kept_{nullptr};

  std::shared_ptr<Api> api_;
  std::chrono::milliseconds deadline_;
  Mutex mutex_;
  std::vector<std::unique_ptr<Lane>> free_;
  Atomic<std::uint64_t> unpinned_{0};
};

}  // namespace dcp::detail
