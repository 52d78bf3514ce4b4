// SPDX-License-Identifier: Apache-2.0
#pragma once
// Addresses without memory.

#include <dcp/base/bytes.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/error.hpp>

#include <sys/mman.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace dcp {

/// Hands out addresses that nobody else has, and that nothing is behind: for tensors that are planned with and never touched. Reading or
/// writing there ends the program. Move-only; addresses live as long as this does.
///
/// Throws    Error(budget) where the address space is limited (ulimit -v)
template <class = Deferred>
class ReservedAddresses {
 public:
  ReservedAddresses() = default;
  ReservedAddresses(ReservedAddresses&& other) noexcept : parts_{std::exchange(other.parts_, {})}, at_{std::exchange(other.at_, nullptr)}, left_{std::exchange(other.left_, 0)} {}
  ReservedAddresses& operator=(ReservedAddresses&&) = delete;
  ~ReservedAddresses() {
    for (auto const& [begin, bytes] : parts_) ::munmap(begin, bytes);
  }

  /// `bytes` bytes, on a multiple of 64.
  std::byte* take(std::uint64_t bytes) {
    bytes = round_up(std::max<std::uint64_t>(1, bytes), std::uint64_t{64});
    if (bytes > left_) {
      auto const more = static_cast<std::size_t>(std::max<std::uint64_t>(bytes, part_bytes));
      void* const begin = ::mmap(nullptr, more, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (begin == MAP_FAILED) {
        Error error{ErrorCode::budget, "no " + std::to_string(more) + " bytes of address space"};
        throw error.with_errno(errno);
      }
      parts_.emplace_back(begin, more);
      at_ = static_cast<std::byte*>(begin);
      left_ = more;
    }
    std::byte* const taken = at_;
    at_ += bytes;
    left_ -= bytes;
    return taken;
  }

 private:
  static constexpr std::uint64_t part_bytes = std::uint64_t{64} << 30;
  std::vector<std::pair<void*, std::size_t>> parts_;
  std::byte* at_ = nullptr;
  std::uint64_t left_ = 0;
};

}  // namespace dcp
