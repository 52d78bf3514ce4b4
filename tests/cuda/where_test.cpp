// SPDX-License-Identifier: Apache-2.0
// What is made of the answers of a driver, and when one is looked for: with fake_driver.cpp in its place, in a process of its own.
#include <dcp/device/cuda.hpp>

#include <doctest/doctest.h>

#include <cstdint>
#include <string>

#include <dlfcn.h>

namespace {

dcp::MemoryPlace where(std::uintptr_t address) { return dcp::detail::cuda_driver()->where(reinterpret_cast<void const*>(address)); }

std::string refusal(std::uintptr_t address) {
  try {
    static_cast<void>(where(address));
  } catch (dcp::Error const& error) {
    return error.code() == dcp::ErrorCode::device ? error.message() : "another code";
  }
  return "none";
}

}  // namespace

TEST_CASE("CUDA: the driver is found when something has loaded it, and what it says is believed") {
  CHECK(where(1).kind == dcp::MemoryKind::host);   // nobody has loaded it
  CHECK(where(1).kind == dcp::MemoryKind::host);
  REQUIRE(::dlopen(DCP_FAKE_CUDA, RTLD_NOW | RTLD_LOCAL) != nullptr);
  CHECK(where(8).kind == dcp::MemoryKind::host);   // loaded and not used

  auto const check = [](std::uintptr_t address, dcp::MemoryKind kind, int ordinal) {
    CAPTURE(address);
    CHECK(where(address).kind == kind);
    CHECK(where(address).ordinal == ordinal);
  };
  check(1, dcp::MemoryKind::device, 3);
  check(2, dcp::MemoryKind::pinned, 1);
  check(3, dcp::MemoryKind::shared, -1);
  check(4, dcp::MemoryKind::shared, -1);
  check(5, dcp::MemoryKind::host, -1);
  check(6, dcp::MemoryKind::host, -1);
  check(7, dcp::MemoryKind::host, -1);
  CHECK(refusal(8) == "CUDA refused to say where memory is: cudaErrorInitializationError: initialization error");   // used by then: this would be a child
  CHECK(refusal(9) == "CUDA refused to say where memory is: cudaErrorCudartUnloading: driver shutting down");
}
