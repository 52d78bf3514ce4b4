// SPDX-License-Identifier: Apache-2.0
#pragma once
// Tensors in the memory of devices: which of a state's are, after what in the program's streams they may be touched, and how their bytes come to the host and back.

#include <dcp/base/config.hpp>
#include <dcp/base/problems.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/core/encoding.hpp>
#include <dcp/core/state_dict.hpp>
#include <dcp/device/driver.hpp>
#include <dcp/plan/transfer.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace dcp::detail {

/// One device, and the point in the program's stream there that everything comes after.
class DeviceHere {
 public:
  DeviceHere(std::shared_ptr<DeviceDriver> driver, int ordinal) : driver_{std::move(driver)}, ordinal_{ordinal} {}
  bool is(DeviceDriver const* driver, int ordinal) const { return driver_.get() == driver && ordinal_ == ordinal; }

  /// The point becomes that where `stream` is now.
  template <class = Deferred>
  void record(void* stream) {
    auto event = driver_->record(ordinal_, stream);
    std::lock_guard const lock{mutex_};
    ready_ = std::move(event);
  }
  /// A lane whose copies come after the program's work.
  template <class = Deferred>
  std::shared_ptr<DeviceLane> lane() const {
    auto lane = driver_->lane(ordinal_);
    lane->after(*ready());
    return lane;
  }
  /// Until the program's work is done.
  template <class = Deferred>
  void wait() const { wait_for(*ready()); }
  /// Until what comes before `event` is done.
  template <class = Deferred>
  void wait_for(DeviceEvent const& event) const {
    constexpr std::chrono::minutes most{10};
    auto const begin = SteadyClock::now();
    while (!event.done()) {
      auto const waited = SteadyClock::now() - begin;
      if (waited > most) throw Error{ErrorCode::timeout, std::string{driver_->name()} + " device " + std::to_string(ordinal_) + ": what is in the program's stream has not ended after 10 minutes"};
      this_thread::sleep_for(std::clamp<std::chrono::nanoseconds>(waited / 8, std::chrono::microseconds{5}, std::chrono::milliseconds{2}));
    }
  }
  std::uint64_t unpinned_bytes() const { return driver_->unpinned_bytes(); }
  std::shared_ptr<DeviceDriver> const& driver() const { return driver_; }
  int ordinal() const { return ordinal_; }

 private:
  std::shared_ptr<DeviceEvent> ready() const {
    std::lock_guard const lock{mutex_};
    return ready_;
  }
  std::shared_ptr<DeviceDriver> driver_;
  int ordinal_;
  mutable Mutex mutex_;   // a plan that is used again is told of a new point while copies of the last save may be under way
  std::shared_ptr<DeviceEvent> ready_;
};

/// Copies elements [first, first + count) of a box, in row-major order, between memory of the device (its first element and strides) and dense memory of the host.
/// Only puts the copies into the lane. Elements have whole bytes.
template <class = Deferred>
void copy_elements(DeviceLane& lane, bool to_host, DType dtype, Extents const& shape, MemoryView const& device, std::int64_t first, std::int64_t count, std::byte* host) {
  auto const width = static_cast<std::size_t>(bits_of(dtype)) / 8;
  for_each_box(Box::whole(shape), first, first + count, [&](Box const& box, std::int64_t at) {
    std::byte* const begin = host + static_cast<std::size_t>(at - first) * width;
    // The innermost dimensions that lie side by side are one run, the next one is rows of such runs.
    int inner = box.rank();
    std::int64_t run = 1;
    while (inner > 0 && (box.shape[inner - 1] == 1 || device.strides[inner - 1] == run)) run *= box.shape[--inner];
    std::int64_t const rows = inner > 0 ? box.shape[inner - 1] : 1, pitch = inner > 0 ? device.strides[inner - 1] : run;
    int const outer = std::max(0, inner - 1);
    std::size_t done = 0;
    for_each_index(box, outer, [&](Extents const& index) {
      std::int64_t offset = 0;
      for (int d = 0; d < box.rank(); ++d) offset += (d < outer ? index[d] : box.origin[d]) * device.strides[d];
      std::byte* const there = device.data + offset * static_cast<std::int64_t>(width);
      std::byte* const here = begin + done;
      auto const bytes = static_cast<std::size_t>(run) * width, step = static_cast<std::size_t>(pitch) * width;
      // A stride of 0 or backwards is no pitch.
      if (rows > 1 && (pitch < run)) {
        for (std::int64_t r = 0; r < rows; ++r) {
          std::byte* const row = there + r * pitch * static_cast<std::int64_t>(width);
          to_host ? lane.copy(here + static_cast<std::size_t>(r) * bytes, bytes, row, bytes, bytes, 1) : lane.copy(row, bytes, here + static_cast<std::size_t>(r) * bytes, bytes, bytes, 1);
        }
      } else {
        to_host ? lane.copy(here, bytes, there, step, bytes, static_cast<std::size_t>(rows)) : lane.copy(there, step, here, bytes, bytes, static_cast<std::size_t>(rows));
      }
      done += bytes * static_cast<std::size_t>(rows);
    });
  });
}

/// Whether devices may have kernels that decode to memory of `dtype`.
template <class = Deferred>
bool decodes_on_devices(Encoding const& encoding, DType dtype) {
  if (encoding.scaled_codes() == ScaledCodes::none || encoding.parts()[0].grid.flat_each > 0 || encoding.parts()[1].grid.flat_each > 0) return false;
  DType const scale = encoding.parts()[1].dtype;
  return (dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16) && (scale == DType::f32 || scale == DType::bf16 || scale == DType::f16 || scale == DType::f8_e8m0);
}

/// Has a device decode `box` to memory of its, whose first element is that of the box. Only puts that into the lane, from whose buffers the device reads the parts.
/// False, and nothing was done: decodes_on_devices() says no, or the lane does, or memory is not aligned, or the box or what a scale covers is larger than kernels count.
/// Pre: encoding.check_scales() throws nothing.
template <class = Deferred>
bool decode_by(DeviceLane& lane, Encoding const& encoding, Box const& box, std::span<PartBytes const> given, DType dtype, MemoryView const& memory) {
  using Axis = DeviceDecode::Axis;
  if (!decodes_on_devices(encoding, dtype)) return false;
  EncodedPart const &codes = encoding.parts()[0], &scales = encoding.parts()[1];
  auto const width = static_cast<std::int64_t>(bits_of(dtype) / 8), scale_width = static_cast<std::int64_t>(bits_of(scales.dtype) / 8);
  if (reinterpret_cast<std::uintptr_t>(memory.data) % static_cast<std::uintptr_t>(width) != 0) return false;
  DeviceDecode work;
  ScaledCodes const kind = encoding.scaled_codes();
  work.code = kind == ScaledCodes::e4m3 ? DeviceDecode::Codes::e4m3 : kind == ScaledCodes::e5m2 ? DeviceDecode::Codes::e5m2 : kind == ScaledCodes::i8 ? DeviceDecode::Codes::i8 : DeviceDecode::Codes::e2m1;
  work.scale = scales.dtype == DType::f32 ? DeviceDecode::Scales::float32 : scales.dtype == DType::bf16 ? DeviceDecode::Scales::bfloat16 : scales.dtype == DType::f16 ? DeviceDecode::Scales::float16 : DeviceDecode::Scales::e8m0;
  work.value = dtype == DType::f32 ? DeviceDecode::Values::float32 : dtype == DType::bf16 ? DeviceDecode::Values::bfloat16 : DeviceDecode::Values::float16;
  work.codes = given[0].data;
  work.code_bytes = bytes_of(codes.dtype, static_cast<std::int64_t>(given[0].box.size()));
  work.values = memory.data;

  // The dimensions, innermost first; those that go on where the one inside ends are one with it.
  constexpr std::int64_t most = INT32_MAX;
  Extents const code_strides = row_major_strides(given[0].box.shape), scale_strides = row_major_strides(given[1].box.shape);
  std::int64_t const in_byte = kind == ScaledCodes::e2m1 ? 2 : 1;
  std::int64_t first_scale = 0;
  std::vector<Axis> axes;
  int const last = box.rank() - 1;
  for (int d = std::max(last, 0); d >= 0; --d) {
    std::int64_t const count = last < 0 ? 1 : box.shape[d];
    if (count > most) return false;
    Axis axis{.count = static_cast<std::uint32_t>(count), .group = static_cast<std::uint32_t>(std::max<std::int64_t>(1, count))};
    if (last >= 0) {
      std::int64_t const origin = box.origin[d] - given[0].box.origin[d] * codes.grid.axes[static_cast<std::size_t>(d)].each;
      axis.codes = d == last ? 1 : code_strides[d] * in_byte;
      axis.values = memory.strides[d];
      work.first_code += origin * axis.codes;
      for (std::size_t a = 0; a < scales.grid.axes.size(); ++a) {
        auto const [dim, each] = scales.grid.axes[a];
        if (dim != d) continue;
        if (each > most) return false;
        axis.group = static_cast<std::uint32_t>(each);
        axis.begun = static_cast<std::uint32_t>(box.origin[d] % each);
        axis.scales = scale_strides[static_cast<int>(a)];
        first_scale += (box.origin[d] / each - given[1].box.origin[static_cast<int>(a)]) * axis.scales;
      }
    }
    if (axes.size() > 1 && count == 1) continue;
    if (axes.size() > 1) {
      Axis& inner = axes.back();
      bool const same_scales = inner.scales == 0 && axis.scales == 0, own_scales = inner.group == 1 && axis.group == 1 && axis.scales == inner.scales * static_cast<std::int64_t>(inner.count);
      bool const goes_on = axis.codes == inner.codes * static_cast<std::int64_t>(inner.count) && axis.values == inner.values * static_cast<std::int64_t>(inner.count);
      if (inner.count == 1 || (goes_on && (same_scales || own_scales) && inner.count <= most / count)) {
        if (inner.count > 1) axis = {.count = inner.count * axis.count, .codes = inner.codes, .values = inner.values, .group = same_scales ? inner.count * axis.count : 1, .begun = 0, .scales = inner.scales};
        inner = axis;
        continue;
      }
    }
    axes.push_back(axis);
  }
  work.columns = axes[0];
  if (axes.size() > 1) work.rows = axes[1];
  if (axes.size() > 2) work.planes = axes[2];
  if (static_cast<std::int64_t>(work.rows.count) * static_cast<std::int64_t>(work.planes.count) > most) return false;
  // What is left lies outside of planes: each of them is work of its own.
  Extents sizes = Extents::filled(std::max(0, static_cast<int>(axes.size()) - 3), 0);
  for (int d = 0; d < sizes.rank(); ++d) sizes[d] = axes[static_cast<std::size_t>(d) + 3].count;
  DeviceDecode const first = work;
  bool done = true;
  for_each_index(Box::whole(sizes), sizes.rank(), [&](Extents const& index) {
    work = first;
    std::int64_t scale = first_scale;
    for (int d = 0; d < sizes.rank(); ++d) {
      Axis const& axis = axes[static_cast<std::size_t>(d) + 3];
      work.first_code += index[d] * axis.codes;
      work.values += index[d] * axis.values * width;
      scale += (index[d] + axis.begun) / axis.group * axis.scales;
    }
    work.scales = given[1].data + scale * scale_width;
    work.scale_bytes = bytes_of(scales.dtype, static_cast<std::int64_t>(given[1].box.size()) - scale);
    done = done && lane.decode(work);
  });
  return done;
}

/// The elements of a transfer whose memory is a device's.
template <class = Deferred>
class DeviceSource final : public ElementSource {
 public:
  DeviceSource(std::shared_ptr<DeviceHere const> device, Transfer const& transfer) : device_{std::move(device)}, dtype_{transfer.memory_dtype}, shape_{transfer.shape}, memory_{transfer.memory} {}
  void produce(std::int64_t first, std::int64_t count, std::byte* out) const override {
    if (copy_ != nullptr) {
      device_->wait_for(*made_);
      std::memcpy(out, copy_ + (first - copy_begin_) * (bits_of(dtype_) / 8), static_cast<std::size_t>(count * (bits_of(dtype_) / 8)));
      return;
    }
    // By pinned memory in two halves: one is copied on while the other one is filled.
    auto const lane = device_->lane();
    std::int64_t const width = bits_of(dtype_) / 8, each = std::max<std::int64_t>(1, buffer_bytes / width);
    std::int64_t waiting = 0;
    std::byte* waits_for = nullptr;
    ByteSpan from;
    int which = 0;
    for (std::int64_t at = first; at < first + count || waiting > 0;) {
      lane->finish();
      std::int64_t const ready = waiting;
      std::byte* const to = waits_for;
      ByteSpan const bytes = from;
      waiting = 0;
      if (at < first + count) {
        waiting = std::min(each, first + count - at);
        from = lane->buffer(which, static_cast<std::size_t>(std::min(each, count) * width));
        which = 1 - which;
        waits_for = out + (at - first) * width;
        copy_elements(*lane, true, dtype_, shape_, memory_, at, waiting, from.data());
        at += waiting;
      }
      if (ready > 0) std::memcpy(to, bytes.data(), static_cast<std::size_t>(ready * width));
    }
  }
  bool copied() const override { return copy_ != nullptr; }

  std::shared_ptr<DeviceHere const> const& device() const { return device_; }
  /// Puts a copy of elements [begin, end) into a lane, to `copy`. What is made from now on is made of that, once `made` says that it is there.
  void copy_by(DeviceLane& lane, std::int64_t begin, std::int64_t end, std::byte* copy) {
    copy_elements(lane, true, dtype_, shape_, memory_, begin, end - begin, copy);
    copy_ = copy;
    copy_begin_ = begin;
  }
  void made(std::shared_ptr<DeviceEvent> event) { made_ = std::move(event); }

 private:
  static constexpr std::int64_t buffer_bytes = 1 << 20;
  std::byte const* copy_ = nullptr;
  std::int64_t copy_begin_ = 0;
  std::shared_ptr<DeviceEvent> made_;
  std::shared_ptr<DeviceHere const> device_;
  DType dtype_;
  Extents shape_;
  MemoryView memory_;   // of the first element
};

/// Pinned memory that is kept for the next one who needs as much.
struct PinnedArea {
  std::shared_ptr<std::byte> memory;
  std::size_t size = 0;
  DeviceDriver const* pinned_by = nullptr;   // to others it is memory as any
};

/// What a save reads of devices, copied to pinned memory in the order of the program's streams. The copies are only put into lanes when this is made.
template <class = Deferred>
class DeviceSnapshot {
 public:
  struct Mark {
    std::shared_ptr<DeviceHere const> device;
    std::shared_ptr<DeviceEvent> made;
  };

  struct Part {
    DeviceSource<>* source;
    std::int64_t begin, end;
    std::uint64_t bytes;
  };
  /// nullptr for more than `most_bytes`.
  static std::shared_ptr<DeviceSnapshot> take(std::vector<Part> const& parts, std::uint64_t most_bytes, PinnedArea& area) {
    constexpr std::uint64_t alignment = 256;
    std::uint64_t total = 0;
    for (auto const& part : parts) total += round_up(part.bytes, alignment);
    if (total > most_bytes) return nullptr;
    if (total == 0) return std::make_shared<DeviceSnapshot>();
    DeviceHere const& first = *parts.front().source->device();
    if (area.size < total || area.pinned_by != first.driver().get()) {
      area = {};
      area = {first.driver()->pinned(first.ordinal(), static_cast<std::size_t>(total)), static_cast<std::size_t>(total), first.driver().get()};
    }
    auto snapshot = std::make_shared<DeviceSnapshot>();
    snapshot->memory_ = area.memory;
    std::uint64_t at = 0;
    for (auto const& part : parts) {
      part.source->copy_by(snapshot->lane(part.source->device()), part.begin, part.end, area.memory.get() + at);
      at += round_up(part.bytes, alignment);
    }
    for (std::size_t i = 0; i < snapshot->lanes_.size(); ++i) snapshot->marks_[i].made = snapshot->lanes_[i]->mark();
    for (auto const& part : parts)
      for (auto const& mark : snapshot->marks_)
        if (mark.device == part.source->device()) part.source->made(mark.made);
    return snapshot;
  }
  std::vector<Mark> const& marks() const { return marks_; }

 private:
  DeviceLane& lane(std::shared_ptr<DeviceHere const> const& device) {
    for (std::size_t i = 0; i < marks_.size(); ++i)
      if (marks_[i].device == device) return *lanes_[i];
    marks_.push_back({device, nullptr});
    return *lanes_.emplace_back(device->lane());
  }
  std::shared_ptr<std::byte> memory_;   // outlives the lanes, whose copies end when they are given back
  std::vector<Mark> marks_;
  std::vector<std::shared_ptr<DeviceLane>> lanes_;
};

/// A tensor with memory of devices, read box by box: of what a rank holds of it, each box with the memory of its first element.
template <class = Deferred>
class DeviceTensor final : public TensorSource {
 public:
  struct Held {
    Box box;
    MemoryView memory;
    std::shared_ptr<DeviceHere const> device;   // nullptr: the host's memory, of another tensor that this one is put together of
  };
  DeviceTensor(DType dtype, std::vector<Held> held) : dtype_{dtype}, held_{std::move(held)} {}
  void read(Box const& box, std::byte* out) const override {
    for (auto const& held : held_) {
      Box part;
      if (!intersect(box, held.box, part)) continue;
      if (part == box && held.device != nullptr) return DeviceSource<>{held.device, make_transfer(dtype_, dtype_, box, held.box, held.memory, box, 0)}.produce(0, box.shape.elements(), out);
      Bytes bytes(static_cast<std::size_t>(bytes_of(dtype_, static_cast<std::int64_t>(part.size()))));
      Transfer const here = make_transfer(dtype_, dtype_, part, held.box, held.memory, part, 0);
      if (held.device != nullptr) DeviceSource<>{held.device, here}.produce(0, part.shape.elements(), bytes.data());
      else here.for_each_run(0, here.end, [&](std::uint64_t at, std::byte const* run, std::size_t size) { std::memcpy(bytes.data() + at, run, size); });
      Transfer const there = make_transfer(dtype_, dtype_, part, part, {bytes.data(), row_major_strides(part.shape)}, box, 0);
      there.for_each_run(0, there.end, [&](std::uint64_t at, std::byte const* run, std::size_t size) { std::memcpy(out + at, run, size); });
    }
  }

 private:
  DType dtype_;
  std::vector<Held> held_;
};

/// Elements [begin, end) of a transfer whose box is dense in its "file" at 0: dcp::pack and dcp::unpack, of whatever memory.
template <class = Deferred>
void pack(std::shared_ptr<DeviceHere const> const& device, Transfer const& transfer, std::int64_t begin, std::int64_t end, Bytes& out) {
  if (device == nullptr) return dcp::pack(transfer, begin, end, out);
  out.resize(static_cast<std::size_t>(bytes_of(transfer.dtype, end - begin)));
  DeviceSource<>{device, transfer}.produce(begin, end - begin, out.data());
}
template <class = Deferred>
void unpack(std::shared_ptr<DeviceHere const> const& device, Transfer const& transfer, std::int64_t begin, std::int64_t end, ConstByteSpan bytes) {
  if (device == nullptr) return dcp::unpack(transfer, begin, end, bytes);
  auto const lane = device->lane();
  constexpr std::int64_t buffer_bytes = 1 << 20;
  std::int64_t const width = bits_of(transfer.memory_dtype) / 8, each = std::max<std::int64_t>(1, buffer_bytes / width);
  int which = 0;
  for (std::int64_t at = begin; at < end; at += each, which = 1 - which) {
    std::int64_t const count = std::min(each, end - at);
    ByteSpan const buffer = lane->buffer(which, static_cast<std::size_t>(std::min(each, end - begin) * width));
    std::memcpy(buffer.data(), bytes.data() + (at - begin) * width, static_cast<std::size_t>(count * width));
    lane->finish();   // what is copied from the other buffer, which is next
    copy_elements(*lane, false, transfer.memory_dtype, transfer.shape, transfer.memory, at, count, buffer.data());
  }
  lane->finish();
}

/// Where the tensors of a state are on this rank.
class DevicesOfState {
 public:
  DevicesOfState() = default;
  /// Records where the program's streams are now. `entries`: of the state's tensors, nullptr where this rank has none. `streams`: at most one of each device.
  ///
  /// Throws    Error(invalid_argument) for memory of a device of which no stream is given: nobody could say when it may be touched; what the driver throws
  template <class = Deferred>
  static DevicesOfState of(std::vector<StateEntry const*> const& entries, std::vector<DeviceStream> const& streams) {
    DevicesOfState result;
    auto const drivers = DeviceDrivers<>::instance().all();
    if (drivers.empty()) return result;
    for (auto const& stream : streams) result.devices_.push_back(std::make_shared<DeviceHere>(stream.driver, stream.ordinal));
    result.record(streams);
    Problems problems;
    for (std::size_t t = 0; t < entries.size(); ++t) {
      StateEntry const* const entry = entries[t];
      if (entry == nullptr || entry->tensor->source || entry->tensor->memory.data == nullptr) continue;
      for (auto const& driver : drivers) {
        MemoryPlace const place = driver->where(entry->tensor->memory.data);
        if (place.kind == MemoryKind::host) continue;
        if (place.kind != MemoryKind::device) {
          result.in_place_ = true;
          result.shared_ = result.shared_ || place.kind == MemoryKind::shared;
          break;
        }
        auto const device = std::find_if(result.devices_.begin(), result.devices_.end(), [&](auto const& known) { return known->is(driver.get(), place.ordinal); });
        if (device == result.devices_.end()) {
          problems.add(ErrorCode::invalid_argument, entry->name + ": its memory is on " + std::string{driver->name()} + " device " + std::to_string(place.ordinal) + ", and no stream of that device was given");
          problems.hint("options.on = {dcp::on(stream)}: what the library does comes after what is in the stream then");
        } else {
          if (result.of_.empty()) result.of_.resize(entries.size());
          result.of_[t] = *device;
        }
        break;
      }
    }
    problems.raise();
    result.wait_in_place();
    return result;
  }
  /// The same state once more: what comes next comes after what is in the streams now.
  template <class = Deferred>
  void record_again(std::vector<DeviceStream> const& streams) {
    record(streams);
    wait_in_place();
  }

  /// The device that tensor `t` is on; nullptr: its memory is the host's.
  std::shared_ptr<DeviceHere const> of(std::size_t t) const { return of_.empty() ? nullptr : of_[t]; }
  bool any() const { return !of_.empty(); }
  /// Whether the host reads some where kernels of the program may write.
  bool shared() const { return shared_; }
  /// What a report has to say.
  template <class = Deferred>
  void warn(std::vector<std::string>& warnings) const {
    for (auto const& device : devices_)
      if (any() && device->unpinned_bytes() > 0) return warnings.push_back(std::to_string(device->unpinned_bytes()) + " bytes of staging memory could not be pinned: copies to and from devices are slower");
  }

 private:
  template <class = Deferred>
  void record(std::vector<DeviceStream> const& streams) {
    for (auto const& device : devices_) {
      auto const stream = std::find_if(streams.begin(), streams.end(), [&](DeviceStream const& one) { return device->is(one.driver.get(), one.ordinal); });
      if (stream == streams.end()) throw Error{ErrorCode::invalid_argument, "an earlier save of this state was given a stream of a device, and this one is not"};
      device->record(stream->stream);
    }
  }
  // What devices and the host both touch in place: the host waits, once.
  template <class = Deferred>
  void wait_in_place() const {
    if (in_place_)
      for (auto const& device : devices_) device->wait();
  }

  std::vector<std::shared_ptr<DeviceHere>> devices_, of_;
  bool in_place_ = false, shared_ = false;   // tensors that the host reads and writes where devices do, and of those the ones in memory that is no host's alone
};

}  // namespace dcp::detail
