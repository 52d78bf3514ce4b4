// SPDX-License-Identifier: Apache-2.0
#pragma once
// How much of what could be tried is tried: a sample in every run, ten times more and above with DCP_LONG in the environment.

#include <algorithm>
#include <cstdlib>

namespace dcp::test {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool under_a_sanitizer = true;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
inline constexpr bool under_a_sanitizer = true;
#else
inline constexpr bool under_a_sanitizer = false;
#endif
#else
inline constexpr bool under_a_sanitizer = false;
#endif

inline bool long_run() { return std::getenv("DCP_LONG") != nullptr; }

/// Rounds of a campaign. A sanitizer makes each several times slower, and finds what it is for in a third of them.
inline int rounds(int usual, int many) {
  if (long_run()) return many;
  return under_a_sanitizer ? std::max(1, usual / 3) : usual;
}

}  // namespace dcp::test
