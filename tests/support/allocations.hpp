// SPDX-License-Identifier: Apache-2.0
#pragma once
// Counts what operator new hands out, to test that memory is bounded by what a file holds rather than by what it claims.
// Include it in exactly one file of a test executable: it replaces the global operators new and delete of all of it. What they count: allocation_counts.hpp.

#include "support/allocation_counts.hpp"

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
