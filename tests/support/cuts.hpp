// SPDX-License-Identifier: Apache-2.0
#pragma once
// Layouts at run time: the cuts in which a test loads the same tensors.

#include "support/generate.hpp"
#include "support/whole_tensor.hpp"

#include <dcp/core/layout.hpp>
#include <dcp/core/placement.hpp>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace dcp::test {

/// How ranks hold tensors between them.
struct Cut {
  std::string name;
  int ranks;
  std::function<Layout(WholeTensor const&)> layout_of;
};
inline Layout layout_on(std::vector<std::int64_t> const& mesh, Extents const& shape, std::vector<Rule> const& rules) {
  Layout layout;
  layout.shape = layout.split_shape = shape;
  layout.mesh = mesh_of(mesh);
  for (std::size_t a = 0; a < rules.size(); ++a) layout.rules[a] = rules[a];
  return layout;
}
inline Rule split(int dim) { return dim < 0 ? Rule{} : Rule{RuleKind::shard, dim, -1}; }

/// Rows, columns, both, neither, and flat shards, on 1 to 4 ranks.
inline std::vector<Cut> all_cuts() {
  std::vector<Cut> cuts{{"whole", 1, [](WholeTensor const& t) { return plain_layout(t.shape); }}, {"whole on two", 2, [](WholeTensor const& t) { return plain_layout(t.shape); }}};
  for (int ranks = 1; ranks <= 4; ++ranks) {
    auto const on = [&](std::string const& name, auto rule_of) {
      cuts.push_back({name + " over " + std::to_string(ranks), ranks, [ranks, rule_of](WholeTensor const& t) { return layout_on({ranks}, t.shape, {rule_of(t)}); }});
    };
    on("first dimension", [](WholeTensor const& t) { return split(t.shape.rank() > 0 ? 0 : -1); });
    on("last dimension", [](WholeTensor const& t) { return split(t.shape.rank() - 1); });
    on("rows", [](WholeTensor const& t) { return split(t.shape.rank() - 2); });
    on("flat", [](WholeTensor const&) { return FlatShard::rule; });
  }
  cuts.push_back({"rows and columns on 2 x 2", 4, [](WholeTensor const& t) { return layout_on({2, 2}, t.shape, {split(t.shape.rank() - 2), split(t.shape.rank() - 1)}); }});
  cuts.push_back({"columns on 2 x 2 with replicas", 4, [](WholeTensor const& t) { return layout_on({2, 2}, t.shape, {split(-1), split(t.shape.rank() - 1)}); }});
  cuts.push_back({"columns twice on 2 x 2", 4, [](WholeTensor const& t) { return layout_on({2, 2}, t.shape, {split(t.shape.rank() - 1), split(t.shape.rank() - 1)}); }});
  cuts.push_back({"rows on 2, each flat on 2", 4, [](WholeTensor const& t) { return layout_on({2, 2}, t.shape, {split(t.shape.rank() - 2), FlatShard::rule}); }});
  return cuts;
}

/// A cut that nobody has thought of: any mesh of at most four ranks, any dimension, flat or not.
inline Cut any_cut(Random& random) {
  std::vector<std::vector<std::int64_t>> const meshes{{1}, {2}, {3}, {4}, {2, 2}, {1, 3}};
  auto const mesh = random.any_of(meshes);
  std::vector<std::int64_t> const dims{random.between(-1, 2), random.between(-1, 2)};
  auto const flat = static_cast<std::size_t>(random.between(0, 5));   // the axis
  int ranks = 1;
  for (auto const extent : mesh) ranks *= static_cast<int>(extent);
  std::string name = "on " + std::to_string(mesh.size()) + " axes of " + std::to_string(ranks) + " ranks, dimensions " + std::to_string(dims[0]) + " and " + std::to_string(dims[1]) + ", flat " + std::to_string(flat);
  return {std::move(name), ranks, [mesh, dims, flat](WholeTensor const& tensor) {
    std::vector<Rule> rules;
    for (std::size_t a = 0; a < mesh.size(); ++a) rules.push_back(a == flat ? FlatShard::rule : split(static_cast<int>(std::min<std::int64_t>(dims[a], tensor.shape.rank() - 1))));
    return layout_on(mesh, tensor.shape, rules);
  }};
}

}  // namespace dcp::test
