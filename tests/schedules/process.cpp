// SPDX-License-Identifier: Apache-2.0
// What the program of schedules says about itself as a process.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <sys/types.h>

// Every schedule sees the same random numbers: they are names of attempts.
extern "C" int getentropy(void* out, std::size_t size) {
  static std::uint64_t number = 0;
  std::memset(out, 0, size);
  ++number;
  std::memcpy(out, &number, size < sizeof number ? size : sizeof number);
  return 0;
}

// A schedule goes on in another process where the search forks, and does not see that.
extern "C" pid_t getpid() noexcept { return 1000; }

// A race is told by the end of the process, while it is known which schedule it was.
extern "C" char const* __tsan_default_options();
extern "C" char const* __tsan_default_options() { return "halt_on_error=1"; }
