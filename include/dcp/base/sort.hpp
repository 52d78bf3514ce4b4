// SPDX-License-Identifier: Apache-2.0
#pragma once
// Sorting, at the price of a declaration until it happens.

#include <algorithm>

namespace dcp::detail {

/// Sorts all of `range`. Compilers instantiate std::sort, which is constexpr, wherever its name and its arguments are known, even in
/// bodies that nobody calls; this one they instantiate where it is called.
template <class Range>
void sort(Range& range) {
  std::sort(range.begin(), range.end());
}

}  // namespace dcp::detail
