// SPDX-License-Identifier: Apache-2.0
#pragma once
// A state of host memory once more on a simulated device, so that what is written for the one is run on the other.

#include "support/simulated_device.hpp"

#include <dcp/core/state_dict.hpp>
#include <dcp/device/streams.hpp>
#include <dcp/plan/ties.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <utility>
#include <vector>

namespace dcp::test {

/// Simulated devices that the library knows of while this lives.
struct SimulatedDevices {
  explicit SimulatedDevices(int count, std::uint64_t seed = 1) : api{std::make_shared<SimulatedApi>(count, seed)}, driver{std::make_shared<detail::StreamDriver<SimulatedApi>>(api)} { detail::DeviceDrivers<>::instance().add(driver); }
  SimulatedDevices(SimulatedDevices const&) = delete;
  SimulatedDevices& operator=(SimulatedDevices const&) = delete;
  ~SimulatedDevices() { detail::DeviceDrivers<>::instance().remove(driver.get()); }
  DeviceStream on(int ordinal, SimulatedApi::Stream stream) const { return {driver, ordinal, api->handle(stream)}; }

  std::shared_ptr<SimulatedApi> api;
  std::shared_ptr<detail::StreamDriver<SimulatedApi>> driver;
};

/// `state` is a state as that on the host, with the same names, layouts, values and hooks, but its tensors are on devices, of which each has a stream. Tensors that share memory
/// there do so here.
///
/// Example   DeviceTwin twin{devices, world.rank(), {0}, on_host};
///           twin.upload();                                          // a kernel that nobody has waited for
///           dcp::save<dcp::SafeTensors>(world, "ckpt", twin.state, {.on = twin.on()});
class DeviceTwin {
 public:
  /// `rank`: whose state it is. `ordinals`: of the devices that tensors are on, by turns; -1: one stays on the host.
  DeviceTwin(SimulatedDevices& devices, std::int64_t rank, std::vector<int> const& ordinals, StateDict const& on_host) : state{on_host}, devices_{devices} {
    for (int const ordinal : ordinals)
      if (ordinal >= 0 && !streams_.contains(ordinal)) streams_[ordinal] = devices.api->create_user_stream(ordinal);
    std::size_t next = 0;
    std::map<std::byte*, std::byte*> known;
    for (auto const& entry : state.entries()) {
      if (!entry.tensor || entry.tensor->memory.data == nullptr) continue;
      TensorEntry& tensor = *entry.tensor;
      int const ordinal = ordinals[next++ % ordinals.size()];
      if (ordinal < 0) continue;
      auto const at = known.find(tensor.memory.data);
      if (at == known.end()) {
        std::size_t const bytes = extent_of(tensor, rank);
        copies_.push_back({ordinal, tensor.memory.data, devices.api->allocate(ordinal, bytes), bytes});
        known[tensor.memory.data] = copies_.back().device;
      }
      tensor.memory.data = known.at(tensor.memory.data);
    }
  }
  DeviceTwin(DeviceTwin const&) = delete;
  DeviceTwin& operator=(DeviceTwin const&) = delete;
  ~DeviceTwin() {
    devices_.api->drain();
    free();
  }

  /// Kernels that will have written what the host has now.
  void upload() {
    for (auto const& copy : copies_)
      if (copy.bytes > 0) devices_.api->write_later(streams_.at(copy.ordinal), copy.device, Bytes(copy.host, copy.host + copy.bytes));
  }
  /// Kernels that write something else.
  void overwrite() {
    for (auto const& copy : copies_)
      if (copy.bytes > 0) devices_.api->fill(streams_.at(copy.ordinal), copy.device, copy.bytes, std::byte{0xAA});
  }
  /// What the devices have now, to the host.
  void download() const {
    for (auto const& copy : copies_) {
      auto const bytes = devices_.api->read(copy.device, copy.bytes);
      if (!bytes.empty()) std::memcpy(copy.host, bytes.data(), bytes.size());
    }
  }
  /// Now, whatever is still to come in streams.
  void free() {
    for (auto const& copy : copies_) devices_.api->free(copy.device);
    copies_.clear();
  }
  /// The streams are destroyed, whatever is still in them, and others come in their place.
  void new_streams() {
    for (auto& [ordinal, stream] : streams_) devices_.api->destroy_stream(std::exchange(stream, devices_.api->create_user_stream(ordinal)));
  }
  std::vector<DeviceStream> on() const {
    std::vector<DeviceStream> all;
    for (auto const& [ordinal, stream] : streams_) all.push_back(devices_.on(ordinal, stream));
    return all;
  }
  SimulatedApi::Stream stream(int ordinal) const { return streams_.at(ordinal); }

  StateDict state;

 private:
  struct Copy {
    int ordinal;
    std::byte *host, *device;
    std::size_t bytes;
  };
  // From the first to behind the last element; no strides are negative.
  static std::size_t extent_of(TensorEntry const& tensor, std::int64_t rank) {
    HeldPart const held = detail::held_part(tensor.layout, rank);
    if (held.empty()) return 0;
    Extents const shape = held.flat ? Extents{held.elements()} : held.box.shape;
    std::int64_t last = 0;
    for (int d = 0; d < shape.rank(); ++d) last += (shape[d] - 1) * tensor.memory.strides[d];
    return static_cast<std::size_t>(((last + 1) * bits_of(tensor.dtype) + 7) / 8);
  }
  SimulatedDevices& devices_;
  std::map<int, SimulatedApi::Stream> streams_;
  std::vector<Copy> copies_;
};

}  // namespace dcp::test
