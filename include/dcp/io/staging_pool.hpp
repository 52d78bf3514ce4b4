// SPDX-License-Identifier: Apache-2.0
#pragma once
// Memory for bytes on their way to the storage: one piece of address space that is used again and again, in a ring.

#include <dcp/base/bytes.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/threading.hpp>

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
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

  enum class Sharing : std::uint8_t { own, with_processes };

  /// `sharing`: with processes that are given descriptor(), or with none.
  explicit StagingPool(std::uint64_t budget, Sharing sharing = Sharing::own) : capacity_{round_up(std::max<std::uint64_t>(1, budget), page_bytes)} {
    if (sharing == Sharing::with_processes) {
      descriptor_ = ::memfd_create("dcp-staging", MFD_CLOEXEC);
      if (descriptor_ < 0 || ::ftruncate(descriptor_, static_cast<off_t>(capacity_)) != 0) throw failure("no shared memory");
    }
    void* const memory = ::mmap(nullptr, static_cast<std::size_t>(capacity_), PROT_READ | PROT_WRITE, (descriptor_ < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED) | MAP_NORESERVE, descriptor_, 0);
    if (memory == MAP_FAILED) throw failure("no address space");
    memory_ = static_cast<std::byte*>(memory);
    static_cast<void>(::madvise(memory_, static_cast<std::size_t>(capacity_), MADV_HUGEPAGE));   // a kernel without them has small ones
  }
  StagingPool(StagingPool const&) = delete;
  StagingPool& operator=(StagingPool const&) = delete;
  ~StagingPool() {
    ::munmap(memory_, static_cast<std::size_t>(capacity_));
    if (descriptor_ >= 0) ::close(descriptor_);
  }

  std::uint64_t capacity() const { return capacity_; }
  /// Of the shared memory; -1 if it is not shared. Where in it a part lies: offset_of(part.bytes).
  int descriptor() const { return descriptor_; }
  std::uint64_t offset_of(ConstByteSpan part) const { return static_cast<std::uint64_t>(part.data() - memory_); }
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

  /// `bytes` bytes at a page boundary, as soon as there is room and whoever came before has got his; meanwhile() is called at least every 50 ms
  /// until then. Throws what stop() was given, what meanwhile() throws, Error(budget) for more than the capacity.
  template <class Meanwhile>
  detail::Staged take(std::uint64_t bytes, Meanwhile meanwhile) {
    std::uint64_t const size = round_up(std::max<std::uint64_t>(1, bytes), page_bytes);
    if (size > capacity_) throw Error{ErrorCode::budget, std::to_string(bytes) + " bytes cannot be staged in " + std::to_string(capacity_) + " bytes"};
    std::unique_lock lock{mutex_};
    Turn const turn{*this};
    bool waited = false;
    auto const place = [&] { return waiting_.front() == turn.number ? room_for(size) : nowhere; };
    for (;;) {
      if (stopped_) std::rethrow_exception(stopped_);
      if (std::uint64_t const at = place(); at != nowhere) {
        parts_.push_back({at, size, false});
        used_ += size;
        most_used_ = std::max(most_used_, used_);
        auto const release = [pool = this->shared_from_this(), at](std::byte*) { pool->give_back(at); };
        return {{memory_ + at, static_cast<std::size_t>(bytes)}, std::shared_ptr<std::byte>{memory_ + at, release}};
      }
      if (!std::exchange(waited, true)) ++waits_;
      lock.unlock();
      try {
        meanwhile();
      } catch (...) {
        lock.lock();
        throw;
      }
      lock.lock();
      room_.wait_for(lock, std::chrono::milliseconds{50}, [&] { return stopped_ || place() != nowhere; });
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

  Error failure(std::string what) {
    int const why = errno;
    if (descriptor_ >= 0) ::close(descriptor_);
    Error error{ErrorCode::budget, std::move(what) + " for " + std::to_string(capacity_) + " bytes of staging memory"};
    return error.with_errno(why);
  }
  struct Part {
    std::uint64_t at, size;
    bool back;
  };

  // A place among those who wait: large parts would never find room beside small ones. Made and left with the lock held.
  struct Turn {
    StagingPool& pool;
    std::uint64_t number;
    explicit Turn(StagingPool& of) : pool{of}, number{of.next_turn_++} { pool.waiting_.push_back(number); }
    Turn(Turn const&) = delete;
    ~Turn() {
      std::erase(pool.waiting_, number);
      pool.room_.notify_all();
    }
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
  int descriptor_ = -1;
  std::byte* memory_ = nullptr;
  mutable detail::Mutex mutex_;
  detail::Condition room_;
  std::vector<Part> parts_;
  std::vector<std::uint64_t> waiting_;   // turns, the first first
  std::uint64_t next_turn_ = 0;
  std::size_t first_ = 0;   // of parts_ that has not come back
  std::uint64_t used_ = 0, most_used_ = 0, waits_ = 0;
  std::exception_ptr stopped_;
};

}  // namespace dcp
