// SPDX-License-Identifier: Apache-2.0
#pragma once
// Writes under way in the kernel, several at once from one thread, by io_uring. Needs liburing; component dcp::uring.

#include <dcp/base/config.hpp>
#include <dcp/base/bytes.hpp>

#include <liburing.h>

#include <cerrno>
#include <cstdint>
#include <memory>
#include <utility>

namespace dcp {

/// An io_uring of this process. One thread at a time.
template <class = Deferred>
class Uring {
 public:
  struct Ended {
    std::size_t id;
    int result;   // bytes, or an errno below zero
  };

  /// Nothing where the kernel, or what guards it (seccomp, a sysctl), gives no ring, or the ring does not do what a ring is for: a ring that
  /// was set up need not work.
  static std::unique_ptr<Uring> open(unsigned depth) {
    std::unique_ptr<Uring> uring{new Uring};
    if (::io_uring_queue_init(depth, &uring->ring_, 0) != 0) return nullptr;
    uring->is_open_ = true;
    std::unique_ptr<io_uring_probe, void (*)(io_uring_probe*)> const probe{::io_uring_get_probe_ring(&uring->ring_), ::io_uring_free_probe};
    if (!probe || ::io_uring_opcode_supported(probe.get(), IORING_OP_WRITE) == 0) return nullptr;
    io_uring_sqe* const entry = ::io_uring_get_sqe(&uring->ring_);
    if (entry == nullptr) return nullptr;
    ::io_uring_prep_nop(entry);
    ::io_uring_sqe_set_data64(entry, probe_id);
    Ended ended{};
    if (uring->submit() != 0 || uring->wait(ended) != 0 || ended.id != probe_id || ended.result != 0) return nullptr;
    return uring;
  }
  Uring(Uring const&) = delete;
  Uring& operator=(Uring const&) = delete;
  ~Uring() {
    if (is_open_) ::io_uring_queue_exit(&ring_);
  }

  /// Begins to write `bytes`, which must stay until `id` comes back. 0, or an errno: nothing is under way then.
  int write(int file, std::uint64_t offset, ConstByteSpan bytes, std::size_t id) {
    io_uring_sqe* const entry = ::io_uring_get_sqe(&ring_);
    if (entry == nullptr) return EAGAIN;
    ::io_uring_prep_write(entry, file, bytes.data(), static_cast<unsigned>(bytes.size()), offset);
    ::io_uring_sqe_set_data64(entry, id);
    int const failure = submit();
    // An entry that was not taken stays in the queue: it must never be, since its bytes will be others.
    if (failure != 0) ::io_uring_prep_nop(entry), ::io_uring_sqe_set_data64(entry, probe_id);
    return failure;
  }
  /// Waits for a write to end. 0, or an errno.
  int wait(Ended& ended) {
    for (;;) {
      io_uring_cqe* entry = nullptr;
      int const status = ::io_uring_wait_cqe(&ring_, &entry);
      if (status == -EINTR || status == -EAGAIN) continue;
      if (status != 0) return -status;
      ended = {static_cast<std::size_t>(::io_uring_cqe_get_data64(entry)), entry->res};
      ::io_uring_cqe_seen(&ring_, entry);
      return 0;
    }
  }

 private:
  static constexpr std::uint64_t probe_id = ~std::uint64_t{0};

  Uring() = default;
  int submit() {
    for (int attempt = 0;; ++attempt) {
      int const submitted = ::io_uring_submit(&ring_);
      if (submitted >= 1) return 0;
      if (submitted != -EINTR && submitted != -EAGAIN && submitted != -EBUSY) return submitted == 0 ? EIO : -submitted;
      if (attempt == 100) return EAGAIN;
    }
  }

  io_uring ring_{};
  bool is_open_ = false;
};

}  // namespace dcp
