// SPDX-License-Identifier: Apache-2.0
#pragma once
// What the operators new and delete of allocations.hpp count. For every file of a test executable in one of whose files that header is included.

#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <new>

#include <malloc.h>

#if defined(__clang__)
#if __has_feature(thread_sanitizer)
#define DCP_TEST_OPERATOR_NEW_IS_TAKEN   // by the sanitizer, which is linked into the program
#endif
#endif

namespace dcp::test {

#ifdef DCP_TEST_OPERATOR_NEW_IS_TAKEN
inline constexpr bool counts_allocations = false;
inline int const says_so = std::fprintf(stderr, "not run: how much memory is allocated (under clang++'s thread sanitizer)\n");
#else
inline constexpr bool counts_allocations = true;
#endif

inline std::atomic<std::size_t> live_bytes{0}, peak_bytes{0}, largest_bytes{0};   // largest_bytes: of one allocation, since somebody set it to 0

/// The most that was allocated at once since it was made, beyond what was allocated then.
class AllocationPeak {
 public:
  AllocationPeak() : before_{live_bytes.load()} { peak_bytes = before_; }
  std::size_t bytes() const { return peak_bytes.load() - before_; }

 private:
  std::size_t before_;
};

inline void* counted(void* memory) {
  if (memory == nullptr) throw std::bad_alloc{};
  std::size_t const size = malloc_usable_size(memory), now = live_bytes += size;
  for (auto largest = largest_bytes.load(); size > largest && !largest_bytes.compare_exchange_weak(largest, size);) {
  }
  for (auto peak = peak_bytes.load(); now > peak && !peak_bytes.compare_exchange_weak(peak, now);) {
  }
  return memory;
}
inline void release(void* memory) {
  if (memory != nullptr) live_bytes -= malloc_usable_size(memory);
  std::free(memory);
}

}  // namespace dcp::test
