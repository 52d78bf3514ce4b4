// SPDX-License-Identifier: Apache-2.0
#pragma once
// Meshes and placements as torch prints them, in golden files.

#include <dcp/core/layout.hpp>

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include <array>
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

namespace dcp::test {

/// A mesh as torch prints it: nested lists of ranks.
inline MeshGeometry mesh_from_lists(nlohmann::json const& lists, std::int64_t world) {
  MeshGeometry mesh;
  mesh.world = world;
  std::vector<nlohmann::json const*> path;
  for (nlohmann::json const* level = &lists; level->is_array(); level = &level->front()) path.push_back(level);
  auto const first_of = [](nlohmann::json const* list) {
    while (list->is_array()) list = &list->front();
    return list->get<std::int64_t>();
  };
  mesh.base = first_of(&lists);
  for (auto const* level : path) {
    auto const axis = static_cast<std::size_t>(mesh.axes++);
    mesh.extents[axis] = static_cast<std::int64_t>(level->size());
    mesh.strides[axis] = level->size() > 1 ? first_of(&level->at(1)) - first_of(&level->at(0)) : 1;
  }
  return mesh;
}

/// Rules as torch prints them: R, S(dim), and _S(dim, split factor) for an axis that cuts after those on its right.
inline std::array<Rule, max_axes> rules_from_text(std::vector<std::string> const& placements, MeshGeometry const& mesh) {
  std::array<Rule, max_axes> rules{};
  std::map<int, int> next_step;   // of dimensions with a strided axis; counted from the right
  for (auto const& text : placements)
    if (int dim = 0, factor = 0; std::sscanf(text.c_str(), "_S(%d, %d)", &dim, &factor) == 2) next_step[dim] = 0;
  std::map<int, std::int64_t> cut_by;   // how many parts the axes on the right made of a dimension
  for (std::size_t a = placements.size(); a-- > 0;) {
    int dim = 0, factor = 0;
    if (placements[a] == "R") continue;
    bool const strided = std::sscanf(placements[a].c_str(), "_S(%d, %d)", &dim, &factor) == 2;
    if (!strided) REQUIRE(std::sscanf(placements[a].c_str(), "S(%d)", &dim) == 1);
    auto const step = next_step.find(dim);
    rules[a] = {RuleKind::shard, dim, step == next_step.end() ? -1 : step->second++};
    auto& parts = cut_by.try_emplace(dim, 1).first->second;
    if (strided) CHECK(factor == parts);
    parts *= mesh.extents[a];
  }
  return rules;
}

}  // namespace dcp::test
