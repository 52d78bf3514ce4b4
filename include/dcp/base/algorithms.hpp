// SPDX-License-Identifier: Apache-2.0
#pragma once
// Algorithms of the standard library, at the price of a declaration until they run. A compiler instantiates a constexpr function, as
// C++20's std::sort and std::vector::insert are, wherever its name and its arguments are known, even in bodies that nobody calls;
// these it instantiates where they are called.

#include <algorithm>

namespace dcp::detail {

/// Sorts all of `range`.
template <class Range>
void sort(Range& range) {
  std::sort(range.begin(), range.end());
}

/// Whether sorted `range` holds `item`.
template <class Range, class Item>
[[nodiscard]] bool sorted_contains(Range const& range, Item const& item) {
  return std::binary_search(range.begin(), range.end(), item);
}

/// Copies all of `more` to the end of `list`.
template <class List, class More>
void append(List& list, More const& more) {
  list.insert(list.end(), more.begin(), more.end());
}

}  // namespace dcp::detail
