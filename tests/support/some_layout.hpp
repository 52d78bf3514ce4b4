// SPDX-License-Identifier: Apache-2.0
#pragma once
// Placements for a list of tensors, of every kind in turn.

#include <dcp/core/layout.hpp>

#include "support/generate.hpp"
#include "support/whole_tensor.hpp"

#include <cstddef>
#include <vector>

namespace dcp::test {

/// A placement for the `index`-th tensor: on a line of ranks or on a grid of two rows, replicated, split by any of its dimensions, or by two;
/// or split as a flat buffer, in runs that begin and end inside rows.
inline Layout some_layout(WholeTensor const& tensor, std::size_t index, int ranks) {
  Layout layout;
  do {
    if (index % 7 == 6) return plain_layout(tensor.shape);
    layout = {};
    layout.shape = layout.split_shape = tensor.shape;
    bool const grid = ranks % 2 == 0 && index % 2 == 1;
    layout.mesh = grid ? mesh_of({2, ranks / 2}) : mesh_of({ranks});
    int const dims = tensor.shape.rank();
    for (std::size_t a = 0; a < static_cast<std::size_t>(layout.mesh.axes); ++a)
      if (auto const choice = static_cast<int>(index / 2 + 2 * a) % (dims + 1); choice < dims) layout.rules[a] = {RuleKind::shard, choice, -1};
    if (!grid && index % 5 == 3 && bits_of(tensor.dtype) >= 8) layout.rules[0] = FlatShard::rule;
    ++index;
  } while (!cuts_whole_bytes(layout, tensor.dtype));
  return layout;
}
inline HeldTensors::LayoutOf layouts(std::vector<WholeTensor> const& tensors, int ranks) {
  return [&tensors, ranks](WholeTensor const& tensor) { return some_layout(tensor, static_cast<std::size_t>(&tensor - tensors.data()), ranks); };
}

}  // namespace dcp::test
