// SPDX-License-Identifier: Apache-2.0
#pragma once
// Counts what operator new hands out, to test that memory is bounded by what a file holds rather than by what it claims.
// Include it in exactly one file of a test executable: it replaces the global operators new and delete of all of it.

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

#ifndef DCP_TEST_OPERATOR_NEW_IS_TAKEN
void* operator new(std::size_t size) { return dcp::test::counted(std::malloc(size == 0 ? 1 : size)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  auto const unit = static_cast<std::size_t>(alignment);
  return dcp::test::counted(std::aligned_alloc(unit, (size + unit - 1) / unit * unit + (size == 0 ? unit : 0)));
}
void* operator new(std::size_t size, std::nothrow_t const&) noexcept {   // std::stable_sort asks for its buffer so
  try {
    return operator new(size);
  } catch (std::bad_alloc const&) {
    return nullptr;
  }
}
void operator delete(void* memory, std::nothrow_t const&) noexcept { dcp::test::release(memory); }
void operator delete(void* memory) noexcept { dcp::test::release(memory); }
void operator delete(void* memory, std::size_t) noexcept { dcp::test::release(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { dcp::test::release(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { dcp::test::release(memory); }
#endif
