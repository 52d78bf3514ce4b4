// SPDX-License-Identifier: Apache-2.0
#pragma once
// Tensors that share memory: the same memory under two names is one tensor (tied weights); memory that overlaps otherwise is a mistake.

#include <dcp/base/config.hpp>
#include <dcp/base/algorithms.hpp>
#include <dcp/plan/schema.hpp>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace dcp {

namespace detail {
// The local part of a tensor entry, as an interval of addresses.
struct LocalMemory {
  StateEntry const* entry;
  Extents shape;
  std::uintptr_t begin, end;
};

/// This rank's part of a tensor, by its own entry: plain tensors are whole on every rank that lists them.
template <class = Deferred>
HeldPart held_part(Layout const& layout, std::int64_t rank) {
  if (layout.everywhere) return {Box::whole(layout.shape), 0, layout.shape.elements()};
  return held_by(layout, rank).value_or(HeldPart{nothing_of(layout.shape)});
}

template <class = Deferred>
bool same_memory(StateEntry const& a, StateEntry const& b) {
  return a.tensor->memory.data == b.tensor->memory.data && a.tensor->dtype == b.tensor->dtype && a.tensor->memory.strides == b.tensor->memory.strides &&
         a.tensor->layout == b.tensor->layout;
}

/// What this rank holds of a state's tensors, empty parts left out.
template <class = Deferred>
std::vector<LocalMemory> local_memory(StateDict const& state, std::int64_t rank) {
  std::vector<LocalMemory> parts;
  for (auto const& entry : state.entries()) {
    if (!entry.tensor || entry.tensor->source) continue;
    Layout const& layout = entry.tensor->layout;
    HeldPart const held = held_part(layout, rank);
    if (held.empty()) continue;
    Extents const shape = held.flat ? Extents{held.elements()} : held.box.shape;
    std::int64_t last = 0;
    for (int d = 0; d < shape.rank(); ++d) last += (shape[d] - 1) * entry.tensor->memory.strides[d];
    auto const begin = reinterpret_cast<std::uintptr_t>(entry.tensor->memory.data);
    parts.push_back({&entry, shape, begin, begin + std::max<std::uint64_t>(1, bytes_of(entry.tensor->dtype, last + 1))});
  }
  return parts;
}

// Whether two strided parts have a byte in common: both are sorted lists of runs, merged.
template <class = Deferred>
bool runs_meet(LocalMemory const& a, LocalMemory const& b) {
  auto const runs = [](LocalMemory const& m) {
    std::vector<std::pair<std::uintptr_t, std::uintptr_t>> list;
    auto const& tensor = *m.entry->tensor;
    for_each_run(m.shape, tensor.memory.strides, tensor.memory.strides, 0, m.shape.elements(), [&](std::int64_t, std::int64_t at, std::int64_t, std::int64_t length) {
      auto const begin = reinterpret_cast<std::uintptr_t>(tensor.memory.data) + bytes_of(tensor.dtype, at);
      list.emplace_back(begin, begin + bytes_of(tensor.dtype, length));
    });
    detail::sort(list);
    return list;
  };
  auto const first = runs(a), second = runs(b);
  for (std::size_t i = 0, j = 0; i < first.size() && j < second.size();) {
    if (first[i].second <= second[j].first) ++i;
    else if (second[j].second <= first[i].first) ++j;
    else return true;
  }
  return false;
}
}  // namespace detail

/// Ties that are visible in this rank's memory; the kept name is the first in name order, as Hugging Face's save_model keeps it.
///
/// Throws    Error(overlapping_memory), naming both, for tensors that share memory in any other way
template <class = Deferred>
std::vector<Tie> find_ties(StateDict const& state, std::int64_t rank) {
  std::vector<detail::LocalMemory> parts = detail::local_memory(state, rank);
  std::sort(parts.begin(), parts.end(), [](auto const& a, auto const& b) { return a.begin != b.begin ? a.begin < b.begin : a.entry->name < b.entry->name; });
  std::vector<Tie> ties;
  Problems problems;
  std::vector<detail::LocalMemory const*> open;   // parts that reach beyond the start of the current one
  for (auto const& part : parts) {
    std::erase_if(open, [&](auto const* other) { return other->end <= part.begin; });
    bool tied = false;
    for (auto const* other : open) {
      if (detail::same_memory(*part.entry, *other->entry)) {
        ties.push_back({part.entry->name, other->entry->name, unmarked_joints(*part.entry)});
        tied = true;
        break;
      }
      if (detail::runs_meet(*other, part))
        problems.add(ErrorCode::overlapping_memory, other->entry->name + " and " + part.entry->name + " share memory, but are not the same tensor; save one of them, or make their memory disjoint");
    }
    if (!tied) open.push_back(&part);
  }
  problems.raise();
  detail::sort(ties);
  return ties;
}

/// Whether this rank may speak against a tie: it holds elements of the tensor.
template <class = Deferred>
bool has_elements(Layout const& layout, std::int64_t rank) {
  return !detail::held_part(layout, rank).empty();
}

}  // namespace dcp
