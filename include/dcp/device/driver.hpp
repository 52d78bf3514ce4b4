// SPDX-License-Identifier: Apache-2.0
#pragma once
// Devices as the library sees them: memory that host code cannot read, streams that do their work later, and events that order it. What
// implements this is in headers of its own (device/cuda.hpp); nothing here needs a toolkit.

#include <dcp/base/bytes.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/threading.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp {

/// What memory is, by the attributes of a pointer into it.
enum class MemoryKind : std::uint8_t {
  host,     // as any program's
  pinned,   // host memory that devices copy from and to by themselves
  shared,   // the host reads and writes it in place, but devices work on it too: managed memory, devices that share the host's
  device,   // out of the host's reach
};
struct MemoryPlace {
  MemoryKind kind = MemoryKind::host;
  int ordinal = -1;   // of the device that it belongs to
};

/// A point in the work of a stream.
class DeviceEvent {
 public:
  virtual ~DeviceEvent() = default;
  /// Whether the work before it has been done. Throws Error(device) for what went wrong in it.
  virtual bool done() const = 0;
};

/// What a device decodes: elements that are, each, a code times the scale of its group.
/// The box is planes of rows of columns; along each of these, what belongs to the next element lies a fixed step further.
struct DeviceDecode {
  enum class Codes : std::uint8_t { e4m3, e5m2, i8, e2m1 };   // a byte each; or two in a byte, the even one in the low bits
  enum class Scales : std::uint8_t { float32, bfloat16, float16, e8m0 };
  enum class Values : std::uint8_t { float32, bfloat16, float16 };
  struct Axis {
    std::uint32_t count = 1;
    std::int64_t codes = 0, values = 0;    // steps from element to element: in codes, in elements of the memory
    std::uint32_t group = 1, begun = 0;    // elements that share a scale, and how many of the first group come before the box
    std::int64_t scales = 0;               // step from group to group
  };
  Codes code = Codes::e4m3;
  Scales scale = Scales::float32;
  Values value = Values::float32;
  std::byte const* codes = nullptr;        // in memory that the device reads
  std::byte const* scales = nullptr;       // the same; the scale of the box's first element, aligned as its type
  std::uint64_t code_bytes = 0, scale_bytes = 0;   // from there to the ends of the parts
  std::int64_t first_code = 0;             // its number, counted from `codes`
  std::byte* values = nullptr;             // of the first element, aligned as its type
  Axis planes{}, rows{}, columns{};        // codes lie side by side along columns: their step is 1. There are fewer than 2^31 rows in all, and columns
};

/// A stream of the library's own, and memory to copy by; used by one thread at a time.
class DeviceLane {
 public:
  virtual ~DeviceLane() = default;
  /// What is put into the lane from now on comes after the event.
  virtual void after(DeviceEvent const& event) = 0;
  /// The end of what is in the lane at the moment.
  virtual std::shared_ptr<DeviceEvent> mark() = 0;
  /// Puts a copy of `rows` rows of `bytes` bytes into the lane, either way between host and device: `to_pitch` and `from_pitch` bytes lie between the beginnings of
  /// rows. Memory on the host that is not pinned is copied before the call returns, or slowly.
  virtual void copy(std::byte* to, std::size_t to_pitch, std::byte const* from, std::size_t from_pitch, std::size_t bytes, std::size_t rows) = 0;
  /// Puts into the lane what decodes from the lane's own buffers, where the device reads them itself, to memory on the device. False, and nothing was done: the device has no
  /// kernel for that, or the buffers are not pinned.
  virtual bool decode(DeviceDecode const&) { return false; }
  /// Until all that is in the lane has been done. Throws Error(device), Error(timeout); after that nobody must touch what was being copied, and the lane is not used again.
  virtual void finish() = 0;
  /// Memory of the lane's own, number `which` of two, which is pinned if the system lets it be; it stays where it is while nobody asks for more.
  virtual ByteSpan buffer(int which, std::size_t bytes) = 0;
};

/// One kind of devices.
class DeviceDriver {
 public:
  virtual ~DeviceDriver() = default;
  virtual std::string_view name() const = 0;
  /// Does not touch the device.
  virtual MemoryPlace where(void const* address) const = 0;
  /// The end of what is in a stream of the program's at the moment.
  virtual std::shared_ptr<DeviceEvent> record(int ordinal, void* stream) = 0;
  /// What is put into a stream of the program's from now on comes after the event.
  virtual void order(int ordinal, void* stream, DeviceEvent const& event) = 0;
  /// Another one, or one that has been given back.
  virtual std::shared_ptr<DeviceLane> lane(int ordinal) = 0;
  /// Memory of the host that is pinned, if the system lets it be.
  virtual std::shared_ptr<std::byte> pinned(int ordinal, std::size_t bytes) = 0;
  /// How many bytes of staging memory could not be pinned, ever.
  virtual std::uint64_t unpinned_bytes() const = 0;
};

/// A stream of the program's, in whose order the library is to come: dcp::on(stream).
struct DeviceStream {
  std::shared_ptr<DeviceDriver> driver;
  int ordinal = -1;
  void* stream = nullptr;
};

namespace detail {

/// The kinds of devices that the program has: each says so before main, by including its header.
template <class = Deferred>
class DeviceDrivers {
 public:
  static DeviceDrivers& instance() {
    static auto* const one = new DeviceDrivers;
    return *one;
  }
  void add(std::shared_ptr<DeviceDriver> driver) {
    std::lock_guard const lock{mutex_};
    drivers_.push_back(std::move(driver));
  }
  void remove(DeviceDriver const* driver) {
    std::lock_guard const lock{mutex_};
    std::erase_if(drivers_, [&](auto const& known) { return known.get() == driver; });
  }
  std::vector<std::shared_ptr<DeviceDriver>> all() const {
    std::lock_guard const lock{mutex_};
    return drivers_;
  }

 private:
  mutable Mutex mutex_;
  std::vector<std::shared_ptr<DeviceDriver>> drivers_;
};

}  // namespace detail
}  // namespace dcp
