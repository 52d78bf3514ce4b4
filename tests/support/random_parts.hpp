// SPDX-License-Identifier: Apache-2.0
#pragma once
// Random layouts of tensors on random meshes, and the memory that a rank has of them: with gaps, flat, or dense.

#include <dcp/core/layout.hpp>
#include <dcp/core/state_dict.hpp>
#include <dcp/plan/transfer.hpp>

#include "support/generate.hpp"

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace dcp::test {

// A tensor of a campaign.
struct Subject {
  std::string name;
  DType dtype;
  Extents shape;
};

class Generator {
 public:
  explicit Generator(std::uint64_t seed) : engine_{seed} {}
  std::int64_t up_to(std::int64_t most) { return std::uniform_int_distribution<std::int64_t>{0, most}(engine_); }
  bool chance(int percent) { return up_to(99) < percent; }
  template <class T>
  T const& pick(std::vector<T> const& list) {
    return list[static_cast<std::size_t>(up_to(static_cast<std::int64_t>(list.size()) - 1))];
  }

  Extents shape(bool large) {
    int const rank = static_cast<int>(up_to(4));
    std::vector<std::int64_t> const sizes = large ? std::vector<std::int64_t>{1, 7, 64, 129, 400} : std::vector<std::int64_t>{0, 1, 2, 3, 5, 8, 13, 17};
    Extents shape = Extents::filled(rank, 1);
    std::int64_t elements = 1;
    for (int d = 0; d < rank; ++d) {
      shape[d] = pick(sizes);
      if (elements * shape[d] > 2'000'000) shape[d] = 1;
      elements *= std::max<std::int64_t>(1, shape[d]);
    }
    return shape;
  }

  // A mesh over `ranks` ranks: a full grid, or a sub-mesh of one.
  MeshGeometry mesh(std::int64_t ranks) {
    MeshGeometry full;
    full.world = ranks;
    std::int64_t rest = ranks;
    while (rest > 1 && full.axes < 3) {
      std::vector<std::int64_t> divisors;
      for (std::int64_t d = 1; d <= rest; ++d)
        if (rest % d == 0) divisors.push_back(d);
      std::int64_t const extent = full.axes == 2 ? rest : pick(divisors);
      full.extents[static_cast<std::size_t>(full.axes++)] = extent;
      rest /= extent;
    }
    if (full.axes == 0 || rest > 1) full.extents[static_cast<std::size_t>(full.axes++)] = rest;
    std::int64_t stride = 1;
    for (int a = full.axes; a-- > 0;) {
      full.strides[static_cast<std::size_t>(a)] = stride;
      stride *= full.extents[static_cast<std::size_t>(a)];
    }
    if (!chance(25)) return full;
    MeshGeometry part;
    part.world = ranks;
    for (int a = 0; a < full.axes; ++a) {
      auto const i = static_cast<std::size_t>(a);
      if (chance(50)) part.base += up_to(full.extents[i] - 1) * full.strides[i];
      else part.extents[static_cast<std::size_t>(part.axes)] = full.extents[i], part.strides[static_cast<std::size_t>(part.axes++)] = full.strides[i];
    }
    return part;
  }

  Layout layout(Extents const& shape, std::int64_t ranks, DType dtype) {
    Layout layout;
    layout.shape = layout.split_shape = shape;
    layout.mesh = mesh(ranks);
    bool const ordered = chance(30);
    std::vector<int> steps;
    for (int a = 0; a < layout.mesh.axes; ++a) steps.push_back(a);
    std::shuffle(steps.begin(), steps.end(), engine_);
    for (int a = 0; a < layout.mesh.axes; ++a) {
      Rule& rule = layout.rules[static_cast<std::size_t>(a)];
      if (shape.rank() == 0 || chance(35)) continue;
      rule.kind = RuleKind::shard;
      rule.dim = static_cast<int>(up_to(shape.rank() - 1));
      // Elements smaller than a byte: only the outermost dimension, of whole bytes per row.
      if (bits_of(dtype) < 8) rule.dim = 0;
      rule.step = ordered ? steps[static_cast<std::size_t>(a)] : -1;
    }
    if (shape.rank() > 0 && bits_of(dtype) >= 8 && chance(15)) layout.split_shape[0] += up_to(9);
    if (layout.mesh.axes > 0 && bits_of(dtype) >= 8 && chance(20))
      make_flat(layout, static_cast<std::size_t>(up_to(layout.mesh.axes - 1)), [&](std::int64_t low, std::int64_t high) { return low + up_to(high - low); });
    return layout;
  }

  std::mt19937_64& engine() { return engine_; }

 private:
  std::mt19937_64 engine_;
};

// This rank's memory of a tensor: its box, perhaps with a pitch; of a flat part its elements.
struct RandomPart {
  Subject const* subject;
  Layout layout;
  HeldPart part;
  Extents strides;
  Bytes memory;

  void visit(auto each) {   // each(byte of memory, position in the global tensor)
    Box const& box = part.box;
    if (part.flat) {   // element by element
      auto const size = static_cast<std::size_t>(bits_of(subject->dtype)) / 8;
      auto const global = row_major_strides(subject->shape);
      for (std::int64_t element = part.begin; element < part.end; ++element) {
        std::int64_t rest = element, at = 0;
        for (int d = box.rank(); d-- > 0; rest /= box.shape[d]) at += (box.origin[d] + rest % box.shape[d]) * global[d];
        for (std::size_t i = 0; i < size; ++i) each(memory[static_cast<std::size_t>((element - part.begin) * strides[0]) * size + i], static_cast<std::uint64_t>(at) * size + i);
      }
      return;
    }
    auto const transfer = make_transfer(subject->dtype, subject->dtype, box, box, {memory.data(), strides}, Box::whole(subject->shape), 0);
    transfer.for_each_run(0, transfer.end, [&](std::uint64_t at, std::byte* bytes, std::size_t size) {
      for (std::size_t i = 0; i < size; ++i) each(bytes[i], at + i);
    });
  }
};

inline std::vector<RandomPart> hold(std::vector<Subject> const& subjects, std::vector<Layout> const& layouts, std::int64_t rank, std::uint64_t pitch, StateDict& state) {
  std::vector<RandomPart> all;
  all.reserve(subjects.size());
  for (std::size_t i = 0; i < subjects.size(); ++i) {
    auto const part = held_by(layouts[i], rank);
    if (!part) continue;
    Box const* const box = &part->box;
    RandomPart& held = all.emplace_back(RandomPart{&subjects[i], layouts[i], *part, part->flat ? Extents{1} : row_major_strides(box->shape), {}});
    std::int64_t elements = part->elements();
    if (part->flat) {   // of a wider buffer, one element in `pitch`
      held.strides[0] = 1 + static_cast<std::int64_t>(pitch);
      elements *= held.strides[0];
    } else if (pitch > 0 && box->rank() >= 2 && bits_of(subjects[i].dtype) >= 8 && !box->empty()) {
      // Rows with a gap behind each.
      for (int d = 0; d + 1 < box->rank(); ++d) held.strides[d] = 0;
      std::int64_t stride = box->shape[box->rank() - 1] + static_cast<std::int64_t>(pitch);
      for (int d = box->rank() - 1; d-- > 0;) {
        held.strides[d] = stride;
        stride *= box->shape[d];
      }
      elements = stride;
    }
    held.memory.assign(static_cast<std::size_t>((elements * bits_of(subjects[i].dtype) + 7) / 8) + 1, std::byte{0xEE});
    state.add_tensor(subjects[i].name, subjects[i].dtype, layouts[i], {held.memory.data(), held.strides});
  }
  return all;
}

}  // namespace dcp::test
