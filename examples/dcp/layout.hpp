// SPDX-License-Identifier: Apache-2.0
#pragma once
// dcp layout: which rank of a mesh holds what of a tensor.

#include <dcp/dcp.hpp>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <map>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

namespace tool {

// "8x6" or "8,6"; "scalar" for none.
inline std::vector<std::int64_t> numbers_of(std::string_view text) {
  std::vector<std::int64_t> numbers;
  if (text == "scalar") return numbers;
  for (std::size_t at = 0; at <= text.size();) {
    auto const end = std::min(text.find_first_of("x,", at), text.size());
    std::int64_t number = 0;
    auto const [stop, problem] = std::from_chars(text.data() + at, text.data() + end, number);
    if (problem != std::errc{} || stop != text.data() + end || number < 0) throw dcp::Error{dcp::ErrorCode::invalid_argument, "\"" + std::string{text} + "\" is no list of sizes, such as 4096x1024"};
    numbers.push_back(number);
    at = end + 1;
  }
  return numbers;
}

/// placement   for each axis of the mesh "S0" (Shard(0)) or "R" (Replicate), with commas between them
inline dcp::Layout layout_of(std::string_view shape, std::string_view placement, std::string_view mesh) {
  dcp::Layout layout;
  layout.shape = layout.split_shape = dcp::Extents{numbers_of(shape)};
  auto const extents = numbers_of(mesh);
  if (extents.empty() || extents.size() > static_cast<std::size_t>(dcp::max_axes)) throw dcp::Error{dcp::ErrorCode::invalid_argument, "a mesh of " + std::to_string(extents.size()) + " axes"};
  layout.mesh.axes = static_cast<int>(extents.size());
  std::int64_t stride = 1;
  for (std::size_t a = extents.size(); a-- > 0; stride *= extents[a]) {
    if (extents[a] < 1) throw dcp::Error{dcp::ErrorCode::invalid_argument, "an axis of the mesh has no ranks"};
    layout.mesh.extents[a] = extents[a], layout.mesh.strides[a] = stride;
  }
  layout.mesh.world = stride;
  std::size_t axis = 0;
  for (std::size_t at = 0; at <= placement.size(); ++axis) {
    auto const end = std::min(placement.find(',', at), placement.size());
    std::string_view const rule = placement.substr(at, end - at);
    int dim = 0;
    bool const shard = rule.size() > 1 && (rule[0] == 'S' || rule[0] == 's') && std::from_chars(rule.data() + 1, rule.data() + rule.size(), dim).ptr == rule.data() + rule.size();
    if (axis >= extents.size() || (!shard && rule != "R" && rule != "r")) throw dcp::Error{dcp::ErrorCode::invalid_argument, "\"" + std::string{placement} + "\" is no placement on a mesh of " + std::to_string(extents.size()) + " axes; S0,R shards dimension 0 over the first axis and replicates over the second"};
    if (shard && (dim < 0 || dim >= layout.shape.rank())) throw dcp::Error{dcp::ErrorCode::invalid_argument, "the tensor has no dimension " + std::to_string(dim)};
    if (shard) layout.rules[axis].kind = dcp::RuleKind::shard, layout.rules[axis].dim = dim;
    at = end + 1;
  }
  if (axis != extents.size()) throw dcp::Error{dcp::ErrorCode::invalid_argument, "a placement of " + std::to_string(axis) + " axes on a mesh of " + std::to_string(extents.size())};
  return layout;
}

inline void draw_layout(std::ostream& out, dcp::Layout const& layout) {
  std::vector<std::pair<dcp::Box, std::vector<std::int64_t>>> boxes;   // and the ranks that hold them, in rank order
  for (std::int64_t rank = 0; rank < layout.mesh.world; ++rank) {
    dcp::Box const box = *dcp::box_of_rank(layout, rank);
    auto const at = std::find_if(boxes.begin(), boxes.end(), [&](auto const& known) { return known.first == box; });
    if (at == boxes.end()) boxes.push_back({box, {rank}});
    else at->second.push_back(rank);
  }
  for (auto const& [box, ranks] : boxes) {
    out << (ranks.size() > 1 ? "ranks " : "rank ");
    for (std::size_t r = 0; r < ranks.size(); ++r) out << (r > 0 ? " " : "") << ranks[r];
    if (box.empty()) out << "  nothing\n";
    else out << "  " << box << ", " << box.size() << " elements\n";
  }
  constexpr std::int64_t most_rows = 48, most_columns = 48;
  if (layout.shape.rank() < 1 || layout.shape.rank() > 2 || layout.shape.empty() || layout.mesh.world > 1000) return;
  // One character cell per element, or per several where there are many.
  std::int64_t const rows = layout.shape.rank() == 2 ? layout.shape[0] : 1, columns = layout.shape[layout.shape.rank() - 1];
  std::int64_t const down = std::max<std::int64_t>(1, dcp::ceil_div(rows, most_rows)), across = std::max<std::int64_t>(1, dcp::ceil_div(columns, most_columns));
  out << '\n';
  std::size_t const width = std::to_string(layout.mesh.world - 1).size();
  for (std::int64_t i = 0; i < rows; i += down) {
    for (std::int64_t j = 0; j < columns; j += across) {
      std::string label = "?";
      for (auto const& [box, ranks] : boxes) {
        dcp::Box const cell{layout.shape.rank() == 2 ? dcp::Extents{i, j} : dcp::Extents{j}, dcp::Extents::filled(layout.shape.rank(), 1)};
        dcp::Box common;
        if (dcp::intersect(box, cell, common)) label = std::to_string(ranks[0]);
      }
      out << (j > 0 ? " " : "") << std::string(width - std::min(width, label.size()), ' ') << label;
    }
    out << '\n';
  }
  if (down > 1 || across > 1) out << "(a cell is " << down << " x " << across << " elements)\n";
  if (std::any_of(boxes.begin(), boxes.end(), [](auto const& entry) { return entry.second.size() > 1; })) out << "(of ranks that hold the same, the first)\n";
}

}  // namespace tool
