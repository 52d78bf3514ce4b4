// SPDX-License-Identifier: Apache-2.0
#pragma once
// Staging memory, aligned for direct I/O.

#include <dcp/base/bytes.hpp>

#include <cstddef>
#include <memory>
#include <new>

namespace dcp {

/// Uninitialised bytes at a page boundary.
class AlignedBuffer {
 public:
  static constexpr std::size_t alignment = 4096;

  AlignedBuffer() = default;
  explicit AlignedBuffer(std::size_t size) : bytes_{static_cast<std::byte*>(::operator new(size, std::align_val_t{alignment}))}, size_{size} {}

  std::byte* data() const { return bytes_.get(); }
  std::size_t size() const { return size_; }
  ByteSpan first(std::uint64_t count) const { return {bytes_.get(), static_cast<std::size_t>(count)}; }

 private:
  struct Free {
    void operator()(std::byte* bytes) const { ::operator delete(bytes, std::align_val_t{alignment}); }
  };
  std::unique_ptr<std::byte, Free> bytes_;
  std::size_t size_ = 0;
};

}  // namespace dcp
