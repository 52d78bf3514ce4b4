// SPDX-License-Identifier: Apache-2.0
#pragma once
// The I/O priority of a thread.

#include <dcp/base/config.hpp>

#include <sys/syscall.h>
#include <unistd.h>

namespace dcp::detail {

/// While it lives, this thread and those that it starts have the lowest best-effort I/O priority (ioprio_set(2)). The BFQ scheduler and cgroup policies
/// heed it; other schedulers do not. Not done where the system refuses.
template <class = Deferred>
class LowIoPriority {
 public:
  explicit LowIoPriority(bool low) {
    if (!low) return;
    before_ = ::syscall(SYS_ioprio_get, who_process, 0);
    if (before_ >= 0 && ::syscall(SYS_ioprio_set, who_process, 0, best_effort << class_shift | lowest) != 0) before_ = -1;
  }
  LowIoPriority(LowIoPriority const&) = delete;
  LowIoPriority& operator=(LowIoPriority const&) = delete;
  ~LowIoPriority() {
    if (before_ >= 0) ::syscall(SYS_ioprio_set, who_process, 0, before_);
  }

 private:
  // linux/ioprio.h, which older systems keep for the kernel.
  static constexpr long who_process = 1, class_shift = 13, best_effort = 2, lowest = 7;
  long before_ = -1;
};

}  // namespace dcp::detail
