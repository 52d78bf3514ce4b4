// SPDX-License-Identifier: Apache-2.0
#pragma once
// Memory for bytes on their way to the storage: one piece of address space that is used again and again, in a ring.

#include <dcp/base/bytes.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/error.hpp>

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace dcp {

namespace detail {
/// Memory for bytes of a file on their way there, as long as somebody keeps it.
struct Staged {
  ByteSpan bytes;
  std::shared_ptr<void> owner;
};
}  // namespace detail

/// A ring of at most `budget` bytes. Only what is taken is ever touched; when all has come back, the next taker gets the first bytes again,
/// so that a process which takes the same amounts every time touches no new page after the first. Thread-safe.
///
/// Law       parts that are taken never overlap, and together never exceed the budget
/// Throws    Error(budget) where the address space is limited (ulimit -v)
/// Example   auto part = pool->take(1 << 20, [] {});  std::memcpy(part.bytes.data(), source, part.bytes.size());
template <class = Deferred>
class StagingPool : public std::enable_shared_from_this<StagingPool<>> {
 public:
  static constexpr std::uint64_t page_bytes = 4096;

  explicit StagingPool(std::uint64_t budget) : capacity_{round_up(std::max<std::uint64_t>(1, budget), page_bytes)} {
    void* const memory = ::mmap(nullptr, static_cast<std::size_t>(capacity_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      Error error{ErrorCode::budget, "no address space for " + std::to_string(capacity_) + " bytes of staging memory"};
      throw error.with_errno(errno);
    }
    memory_ = static_cast<std::byte*>(memory);
    static_cast<void>(::madvise(memory_, static_cast<std::size_t>(capacity_), MADV_HUGEPAGE));   // a kernel without them has small ones
  }
  StagingPool(StagingPool const&) = delete;
  StagingPool& operator=(StagingPool const&) = delete;
  ~StagingPool() { ::munmap(memory_, static_cast<std::size_t>(capacity_)); }

  std::uint64_t capacity() const { return capacity_; }
  /// The most bytes that were ever taken at once.
  template <class = Deferred>
  std::uint64_t most_used() const {
    std::lock_guard const lock{mutex_};
    return most_used_;
  }
  /// How often somebody had to wait for memory to come back.
  template <class = Deferred>
  std::uint64_t waits() const {
    std::lock_guard const lock{mutex_};
    return waits_;
  }

  /// `bytes` bytes at a page boundary, as soon as there is room; meanwhile() is called at least every 50 ms until then. Throws what stop() was
  /// given, what meanwhile() throws, Error(budget) for more than the capacity.
  template <class Meanwhile>
  detail::Staged take(std::uint64_t bytes, Meanwhile meanwhile) {
    std::uint64_t const size = round_up(std::max<std::uint64_t>(1, bytes), page_bytes);
    if (size > capacity_) throw Error{ErrorCode::budget, std::to_string(bytes) + " bytes cannot be staged in " + std::to_string(capacity_) + " bytes"};
    std::unique_lock lock{mutex_};
    bool waited = false;
    for (;;) {
      if (stopped_) std::rethrow_exception(stopped_);
      if (std::uint64_t const at = room_for(size); at != nowhere) {
        parts_.push_back({at, size, false});
        used_ += size;
        most_used_ = std::max(most_used_, used_);
        auto const release = [pool = this->shared_from_this(), at](std::byte*) { pool->give_back(at); };
        return {{memory_ + at, static_cast<std::size_t>(bytes)}, std::shared_ptr<std::byte>{memory_ + at, release}};
      }
      if (!std::exchange(waited, true)) ++waits_;
      room_.wait_for(lock, std::chrono::milliseconds{50});
      lock.unlock();
      meanwhile();
      lock.lock();
    }
  }

  /// From now on, who waits or comes is thrown `failure`; until start().
  void stop(std::exception_ptr failure) {
    {
      std::lock_guard const lock{mutex_};
      stopped_ = std::move(failure);
    }
    room_.notify_all();
  }
  void start() {
    std::lock_guard const lock{mutex_};
    stopped_ = nullptr;
  }

 private:
  static constexpr std::uint64_t nowhere = ~std::uint64_t{0};
  struct Part {
    std::uint64_t at, size;
    bool back;
  };

  // With the lock held. Parts lie in the order in which they were taken, once around.
  std::uint64_t room_for(std::uint64_t size) const {
    if (first_ == parts_.size()) return 0;
    std::uint64_t const begin = parts_[first_].at, end = parts_.back().at + parts_.back().size;
    if (end > begin) return capacity_ - end >= size ? end : begin >= size ? 0 : nowhere;
    return begin - end >= size ? end : nowhere;
  }
  void give_back(std::uint64_t at) {
    {
      std::lock_guard const lock{mutex_};
      for (std::size_t i = first_; i < parts_.size(); ++i)
        if (parts_[i].at == at && !parts_[i].back) {
          parts_[i].back = true;
          break;
        }
      for (; first_ < parts_.size() && parts_[first_].back; ++first_) used_ -= parts_[first_].size;
      if (first_ == parts_.size()) parts_.clear(), first_ = 0;
      else if (first_ > 1024 && first_ * 2 > parts_.size()) parts_.erase(parts_.begin(), parts_.begin() + static_cast<std::ptrdiff_t>(first_)), first_ = 0;
    }
    room_.notify_all();
  }

  std::uint64_t capacity_;
  std::byte* memory_ = nullptr;
  mutable std::mutex mutex_;
  std::condition_variable room_;
  std::vector<Part> parts_;
  std::size_t first_ = 0;   // of parts_ that has not come back
  std::uint64_t used_ = 0, most_used_ = 0, waits_ = 0;
  std::exception_ptr stopped_;
};

}  // namespace dcp
