// SPDX-License-Identifier: Apache-2.0
#pragma once
// The memory of devices that are not there: whoever touches it with host code dies, and so does who touches what was freed.

#include <dcp/base/bytes.hpp>
#include <dcp/device/driver.hpp>

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <new>
#include <stdexcept>

namespace dcp::test {

/// Not thread-safe. Memory that it does not know of is the program's, and always within reach.
class SimulatedMemory {
 public:
  struct Part {
    std::byte* address;   // as it was given out
    std::byte* alias;     // the same bytes, within reach
    std::size_t bytes, mapped;
    MemoryPlace place;
    bool freed = false;
  };

  SimulatedMemory() = default;
  SimulatedMemory(SimulatedMemory const&) = delete;
  SimulatedMemory& operator=(SimulatedMemory const&) = delete;
  ~SimulatedMemory() {
    for (auto const& [address, part] : parts_) {
      if (part.alias != part.address) ::munmap(part.alias, part.mapped);
      ::munmap(part.address, part.mapped);
    }
  }

  std::byte* allocate(std::size_t bytes, MemoryPlace place) {
    std::size_t const mapped = round_up(std::max<std::size_t>(bytes, 1), std::size_t{4096});
    std::byte* const alias = map(mapped, PROT_READ | PROT_WRITE);
    std::byte* const address = place.kind == MemoryKind::device ? map(mapped, PROT_NONE) : alias;
    parts_[reinterpret_cast<std::uintptr_t>(address)] = {address, alias, bytes, mapped, place};
    return address;
  }
  /// The addresses are not given out again, so that whoever still uses them is found.
  void free(Part& part) {
    part.freed = true;
    ::madvise(part.alias, part.mapped, MADV_DONTNEED);
    ::mprotect(part.alias, part.mapped, PROT_NONE);
  }
  /// What was allocated, or freed, around this address.
  Part* find(void const* address) {
    auto const at = reinterpret_cast<std::uintptr_t>(address);
    auto found = parts_.upper_bound(at);
    if (found == parts_.begin()) return nullptr;
    --found;
    return at - found->first < found->second.mapped ? &found->second : nullptr;
  }
  /// What begins there and is not freed.
  Part* owned(void const* address) {
    Part* const part = find(address);
    return part != nullptr && part->address == address && !part->freed ? part : nullptr;
  }
  bool inside(std::byte const* address, std::size_t bytes) {
    Part const* const part = find(address);
    return part == nullptr || (!part->freed && bytes <= part->bytes && static_cast<std::size_t>(address - part->address) <= part->bytes - bytes);
  }
  template <class Byte>
  Byte* reach(Byte* address, std::size_t bytes) {
    if (!inside(address, bytes)) throw std::logic_error{"SimulatedMemory: out of bounds, or freed"};
    Part const* const part = find(address);
    return part == nullptr ? address : part->alias + (address - part->address);
  }

 private:
  static std::byte* map(std::size_t bytes, int protection) {
    void* const at = ::mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc{};
    return static_cast<std::byte*>(at);
  }
  std::map<std::uintptr_t, Part> parts_;
};

}  // namespace dcp::test
